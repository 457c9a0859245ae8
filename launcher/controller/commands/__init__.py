"""What clients, ranks, rules and Slurm ask of the run, from acceptance to outcome."""
