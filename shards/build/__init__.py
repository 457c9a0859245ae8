"""Builds shards: reads sources, removes duplicates, filters and encodes documents, and writes; in steps of independent tasks."""
