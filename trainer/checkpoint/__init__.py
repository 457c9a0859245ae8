"""Checkpoints: saving, loading, hashing, and what they were made from."""
