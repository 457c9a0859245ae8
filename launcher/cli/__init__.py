"""The command line: what `midwatch` understands, and the commands that need no screen."""
