"""Objective `grpo`: group-relative policy optimisation."""
