"""Rollouts: engines that draw responses, rewards, and the buffer of what was drawn."""
