"""The moment of a step at which a rank holds the most, by following FSDP2 through forward and backward.

FSDP2 (torch 2.13, `fully_shard` a block and once around the rest) holds the rest whole from forward's beginning to backward's
end; of the blocks the one that computes, and the next one's gathered buffer. In backward the block's gradients come, are copied
into a float32 buffer and reduced from it; that buffer lives until the block after has its own. Gradients of embedding and output
layer are reduced last of all.
"""

from __future__ import annotations

import msgspec

FLOAT32 = 4


class Shape(msgspec.Struct, frozen=True):
    """What the moments are made of. Numbers of parameters, and bytes where the name says so."""

    ranks: int
    layers: int
    each: int
    """Bytes of the compute type."""
    block: int
    root: int
    """Parameters outside the blocks."""
    table: int
    """Those of the output layer."""
    tied: bool
    models: int
    """2 with DPO's reference."""
    accumulates: bool
    saved_bytes: int
    saved_bytes_per_block: int
    saved_bytes_after: int
    """By the norm behind the last block, which is freed first."""
    logits_bytes: int
    """One copy."""
    working_bytes: int
    """What a block's backward makes beyond what it frees."""

    @property
    def whole_bytes(self) -> int:
        """Gradients of earlier micro-batches: of all parameters, on every rank, until the last micro-batch's are reduced."""
        return FLOAT32 * (self.layers * self.block + self.root) if self.accumulates else 0


def moments(shape: Shape) -> dict[str, int]:
    """Bytes beyond weights, optimizer and reference, by the moment's name."""
    rest = shape.models * shape.each * shape.root
    return {
        "in a block's forward": rest + shape.whole_bytes + _in_forward(shape),
        "as backward begins": rest + shape.whole_bytes + shape.saved_bytes + 3 * shape.logits_bytes,
        "in a block's backward": rest + max(_in_block(shape, done) for done in range(shape.layers)),
        "as backward ends": rest + _at_end(shape),
    }


def _in_forward(shape: Shape) -> int:
    """The last block, just gathered, from a buffer that the one before it had too."""
    one = shape.each * shape.block
    return (3 if shape.layers > 1 else 2) * one + shape.saved_bytes - shape.saved_bytes_per_block - shape.saved_bytes_after


def _in_block(shape: Shape, done: int) -> int:
    """At the worst point of the backward of a block, `done` blocks after the first to be taken."""
    last, first = done == shape.layers - 1, done == 0
    one = shape.each * shape.block
    gathered = one if last else 2 * one
    in_flight = 0 if first else FLOAT32 * shape.block
    reduced = FLOAT32 * done * shape.block
    sums = shape.whole_bytes - reduced if shape.accumulates else 0
    # Added to float32 sums as they come; otherwise kept until the block is done.
    gradients = 0 if shape.accumulates and shape.each == FLOAT32 else one
    left = shape.saved_bytes - shape.saved_bytes_after - done * shape.saved_bytes_per_block
    always = shape.each * shape.table + sums + reduced // shape.ranks + gathered
    begins = left + shape.working_bytes + in_flight
    ends = left - shape.saved_bytes_per_block + gradients + in_flight
    reducing = left - shape.saved_bytes_per_block + (gradients if not shape.accumulates else 0) + FLOAT32 * shape.block - one
    return always + max(begins, ends, reducing)


def _at_end(shape: Shape) -> int:
    """A tied table has two gradients, of both its uses, and their sum."""
    blocks = FLOAT32 * shape.layers * shape.block // shape.ranks
    sums = FLOAT32 * shape.root if shape.accumulates else 0
    return blocks + sums + (3 if shape.tied else 2) * shape.each * shape.table + FLOAT32 * shape.block
