"""Sessions with a checkpoint's model: the process that answers, and who asks it."""
