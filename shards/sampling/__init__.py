"""What a step reads: mixtures, the order of samples, packing and the rows of a batch."""
