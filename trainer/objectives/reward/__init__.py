"""Objective `reward`: a reward model from preference pairs."""
