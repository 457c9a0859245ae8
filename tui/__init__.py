"""The operator's screen, and the headless reporter."""
