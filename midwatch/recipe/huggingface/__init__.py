"""Hugging Face directories, as far as a recipe reads them: config.json, weight files and their layout."""
