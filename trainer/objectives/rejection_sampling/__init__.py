"""Objective `rejection_sampling`: the best of several responses, as data for later stages."""
