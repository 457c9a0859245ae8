"""A stage of the pipeline: its models, its data and the state of its training."""
