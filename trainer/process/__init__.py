"""How a rank's process starts."""
