"""The model: decoder, attention, positions, and their sharded form."""
