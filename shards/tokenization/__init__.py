"""Text to ids: tokenizers, chat templates and records."""
