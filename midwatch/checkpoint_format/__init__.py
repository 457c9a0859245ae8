"""Checkpoints on disk: their manifests, whether their files are those that were written, and their directories."""
