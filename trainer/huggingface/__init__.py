"""Hugging Face directories: loading weights, tokenizers, exporting."""
