"""Readers: one module for each kind of source, from stored bytes to documents. `shards.readers.sources` is their front."""
