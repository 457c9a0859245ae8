"""What all views and dialogs share: the frame of the screen, keys, the command line, formatting."""
