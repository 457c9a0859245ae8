"""Steps in which every sequence is continued by one token, replayed as CUDA graphs: on a GPU launching their kernels one by one
takes longer than the kernels do.

What a graph reads lies in buffers that stay where they are. There is a graph for each of a few sizes of the batch; a smaller
batch is filled up with sequences of one token that write into the page that is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from trainer.generate.paged_attention import Tables

Step = Callable[[Tensor, Tensor, Tensor, Tables], Tensor]
"""(tokens, places, slots, tables), all of as many sequences -> logits [sequences, vocabulary]."""
_WARMING = 3


class Replayed:
    def __init__(self, step: Step, widest: int, longest: int, device: torch.device) -> None:
        """widest: pages of a sequence at the most; longest: tokens."""
        self._step, self._widest, self._longest, self._device = step, widest, longest, device
        self._captured: dict[int, _Captured] = {}

    def forget(self) -> None:
        self._captured.clear()

    def __call__(
        self, tokens: Items[int], places: Items[int], slots: Items[int], lengths: Items[int], pages: Items[Items[int]]
    ) -> Tensor:
        """Logits [sequences, vocabulary]; overwritten by the next call for as many."""
        count = len(tokens)
        size = 1 << (count - 1).bit_length()
        if size not in self._captured:
            self._captured[size] = _Captured(self._step, size, self._widest, self._longest, self._device)
        return self._captured[size].run(tokens, places, slots, lengths, pages)[:count]


class _Captured:
    def __init__(self, step: Step, size: int, widest: int, longest: int, device: torch.device) -> None:
        def whole(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._size, self._widest, self._device = size, widest, device
        self._tokens, self._places, self._slots = whole(size), whole(size), whole(size)
        self._tables = Tables(
            starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            key_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            lengths=whole(size, dtype=torch.int32) + 1,
            pages=whole(size, widest, dtype=torch.int32),
            most=1,
            longest=longest,
        )
        self._replay = _capture(lambda: step(self._tokens, self._places, self._slots, self._tables), device)

    def run(
        self, tokens: Items[int], places: Items[int], slots: Items[int], lengths: Items[int], pages: Items[Items[int]]
    ) -> Tensor:
        filled = self._size - len(tokens)
        all_lengths = torch.tensor([*lengths, *[1] * filled], dtype=torch.int32)
        for buffer, values in ((self._tokens, tokens), (self._places, places), (self._slots, slots)):
            self._write(buffer, torch.tensor([*values, *[0] * filled]))
        self._write(self._tables.lengths, all_lengths)
        self._write(self._tables.key_starts[1:], all_lengths.cumsum(0, dtype=torch.int32))
        table = torch.zeros(self._size, self._widest, dtype=torch.int32)
        for row, held in enumerate(pages):
            table[row, : len(held)] = torch.tensor(held, dtype=torch.int32)
        self._write(self._tables.pages, table)
        return self._replay()

    def _write(self, buffer: Tensor, values: Tensor) -> None:
        buffer.copy_(values.pin_memory() if self._device.type == "cuda" else values, non_blocking=True)


def _capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What does again whatever `run` does, into the same output. Without a GPU there is nothing to capture."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own gap
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARMING):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
