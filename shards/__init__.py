"""Text to tokens to zstd shards to batches."""
