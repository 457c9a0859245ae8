"""Engines that write the policy's responses: one on each rank, or a server of the user's."""
