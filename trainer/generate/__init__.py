"""Generation: continuations of prompts by the weights that are being trained, or by those of a checkpoint."""

from trainer.generate.engine import Engine, Usage
from trainer.generate.request import Event, Finish, Request, RequestError, Response

__all__ = ["Engine", "Event", "Finish", "Request", "RequestError", "Response", "Usage"]
