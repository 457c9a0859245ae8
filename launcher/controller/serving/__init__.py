"""Connections to the controller: listeners, peers and their roles."""
