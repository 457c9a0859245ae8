"""A run's life: the `midwatch` command, controller, node agents, backends and plan."""
