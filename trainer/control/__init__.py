"""The boundary between steps: orders, heartbeats, logs and reports of a rank."""
