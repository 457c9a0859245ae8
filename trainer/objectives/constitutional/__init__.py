"""Objective `constitutional`: responses revised by principles, as data for later stages."""
