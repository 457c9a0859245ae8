"""Objective `ppo`: proximal policy optimisation with a value model."""
