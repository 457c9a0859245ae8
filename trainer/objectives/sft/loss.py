"""Supervised fine-tuning: the negative log-likelihood of the response's tokens alone; the mask leaves the prompt out."""

from __future__ import annotations

from trainer.objectives.pretrain.loss import loss, objective, weight

__all__ = ["loss", "objective", "weight"]
