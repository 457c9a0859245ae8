"""From sources to clean documents: read, find what comes twice, judge, encode; in steps of independent tasks."""
