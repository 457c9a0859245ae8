"""What is checked on the nodes before a run starts."""
