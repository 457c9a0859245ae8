"""Slurm: the backend, its jobs, and the batch job that keeps a controller."""
