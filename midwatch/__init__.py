"""What all sides share: protocol, transport, recipe, run directory, journal and checkpoint format."""
