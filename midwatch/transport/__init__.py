"""Connections between a run's parts: finding a controller, clients, ssh, TLS identities."""
