"""Readers: a module for each kind of source, from stored bytes to documents. `shards.readers.sources` selects the reader."""
