"""A run's life: recipe, controller, journal, node agents, backends and the client that talks to them."""
