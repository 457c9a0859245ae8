"""What runs on the ranks: model, stages, checkpoints and evaluation."""
