"""Filters of text: language, perplexity, quality, personal data, toxicity, contamination, and heuristic rules."""
