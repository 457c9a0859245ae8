"""Stages that make data: rejection sampling and the constitutional method."""
