"""Preferences by hand: which of two answers an annotator likes better, kept a line a decision, and what becomes of them."""
