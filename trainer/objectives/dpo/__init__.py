"""Objective `dpo`: direct preference optimisation."""
