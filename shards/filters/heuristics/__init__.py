"""Heuristic rules that say whether a text is worth training on, each as its paper has it."""
