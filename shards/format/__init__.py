"""The shards themselves: seekable zstd, manifests, and what a data directory holds."""
