"""A pipeline's stage that has room only for what is on its way or waits for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import P2POp
from torch.distributed.pipelining import PipelineStage


class UnbufferedPipelineStage(PipelineStage):
    """torch's own keeps a buffer for what comes of every micro-batch of a step, forward and backward, from the first step on."""

    room: Callable[[], Tensor]
    """Makes a buffer for what goes from one part to the next."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        self._fill(self.grad_recv_info.get(bwd_chunk_id, ()))
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._empty(self.args_recv_info[bwd_chunk_id])
        self._empty(self.grad_recv_info.get(bwd_chunk_id, ()))

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_forward_infra(*args, **kwargs)
        for coming in self.args_recv_info.values():
            self._empty(coming)
        return found

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_backward_infra(*args, **kwargs)
        for coming in self.grad_recv_info.values():
            self._empty(coming)
        return found

    def _fill(self, coming: Iterable[Any]) -> None:
        for each in coming:
            if getattr(each, "buffer", None) is not None:
                each.buffer = self.room()

    def _empty(self, coming: Iterable[Any]) -> None:
        for each in coming:
            if getattr(each, "buffer", None) is not None:
                each.buffer = torch.empty(0, device=self.device)
