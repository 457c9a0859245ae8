"""The controller: one process that keeps a run's journal, gathers its ranks, carries commands and answers screens."""
