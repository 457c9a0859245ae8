"""Objective `kto`: Kahneman-Tversky optimisation."""
