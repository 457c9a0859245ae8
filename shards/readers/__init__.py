"""Readers: one module for each kind of source, from stored bytes to documents. `shards.build.sources` is their front."""
