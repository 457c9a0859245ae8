"""Judges of text: its language, how likely it reads, its quality, personal data, toxicity, and evaluation texts in it."""
