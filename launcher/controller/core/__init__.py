"""The run as the controller holds it: its state, checkpoints, data, samples, and what is shown of it."""
