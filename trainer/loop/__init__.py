"""The training loop: batches, commands, evaluation, the end of a stage."""
