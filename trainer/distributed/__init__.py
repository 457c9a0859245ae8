"""Ranks and meshes, and attention over sequences that are sharded."""
