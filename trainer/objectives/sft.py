"""Supervised fine-tuning: the negative log-likelihood of the response's tokens alone; the mask leaves the prompt out."""

from __future__ import annotations

from trainer.objectives.pretrain import loss, weight

__all__ = ["loss", "weight"]
