"""Checkpoints on disk: manifests, and whether the files are what they say."""
