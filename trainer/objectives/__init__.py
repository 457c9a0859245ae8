"""What a stage trains for: one folder for each objective, with its `spec.py`, which needs no torch, and its `loss.py`."""
