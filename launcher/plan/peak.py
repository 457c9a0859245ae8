"""The moment of a step at which a rank holds the most, by following FSDP2 through forward and backward.

FSDP2 (torch 2.13, `fully_shard` a block and once around the rest) holds the rest whole from forward's beginning to backward's
end; of the blocks the one that computes, and the next one's gathered buffer. In backward the block's gradients come, are copied
into a float32 buffer and reduced from it; that buffer lives until the block after has its own. Gradients of embedding and output
layer are reduced last of all. A rank that is alone and computes in float32 goes without FSDP2. In a pipeline other micro-batches
wait for their backward meanwhile; blocks stay gathered from a backward to the next forward, and gradients are reduced once all
micro-batches are through.
"""

from __future__ import annotations

import msgspec

FLOAT32 = 4


class OptimizerShape(msgspec.Struct, frozen=True):
    """What the moments are made of, on one rank. Numbers of parameters, and bytes where the name says so."""

    shards: int
    """Ranks over which a block's gradients are spread; 0: they go to the host as they are reduced."""
    alone: bool
    """Nothing is gathered, cast or reduced: the rank goes without FSDP2."""
    layers: int
    """Of the part that computes."""
    other_layers: int
    """Of the rank's other parts."""
    each: int
    """Bytes of the compute type."""
    block: int
    """Of a tensor-parallel rank."""
    root: int
    """Parameters outside the blocks."""
    table: int
    """Those of the output layer; 0 where another rank has it."""
    table_gradients: int
    """The tables' as backward ends."""
    models: int
    """2 with DPO's reference."""
    accumulates: bool
    saved_bytes: int
    """By the micro-batch that computes, in the part that does."""
    saved_bytes_per_block: int
    saved_bytes_after: int
    """By what is behind the last block, which is freed first."""
    again_bytes: int
    """Computed again for a block's backward."""
    waiting_bytes: int
    """Saved by other micro-batches, in a pipeline."""
    logits_bytes: int
    """One copy, of a tile."""
    tiled: bool
    """There are more tokens than one tile's, and the output layer's gradient is summed in float32."""
    hidden_bytes: int
    """What goes from one block to the next."""
    working_bytes: int
    """What a block's backward makes beyond what it frees."""
    pipelined: bool
    steady: bool
    """In a pipeline: backwards have begun before the last forwards wait."""

    @property
    def whole_bytes(self) -> int:
        """Gradients of earlier micro-batches: of all that the rank has a part of, until the last micro-batch's are reduced."""
        return FLOAT32 * ((self.layers + self.other_layers) * self.block + self.root) if self.accumulates else 0


def moments(shape: OptimizerShape) -> dict[str, int]:
    """Bytes beyond weights, optimizer and reference, by the moment's name."""
    rest = 0 if shape.alone else shape.models * shape.each * shape.root
    if shape.pipelined:
        return _pipelined(shape, rest)
    waiting = rest + shape.whole_bytes
    return {
        "in a block's forward": waiting + _in_forward(shape),
        "as backward begins": waiting + _at_logits(shape),
        "in a block's backward": rest + max(_in_block(shape, done) for done in range(shape.layers)),
        "as backward ends": rest + _at_end(shape),
    }


def _pipelined(shape: OptimizerShape, rest: int) -> dict[str, int]:
    """While most micro-batches wait, and where the last backwards follow each other and find all blocks gathered."""
    one, layers = shape.each * shape.block, shape.layers + shape.other_layers
    sums = rest + shape.whole_bytes
    steady = rest + (shape.whole_bytes + one * shape.other_layers if shape.steady else 0) + shape.waiting_bytes
    after = sums + one * shape.other_layers + max(0, shape.waiting_bytes - shape.saved_bytes)
    entering = one * shape.layers + shape.saved_bytes_per_block if shape.steady else 0
    among = max(_among_others(shape, done, min(done + 2, shape.layers)) for done in range(shape.layers))
    return {
        "in a block's forward": steady + max(_in_forward(shape), entering),
        "as backward begins": steady + _at_logits(shape),
        "in a block's backward": max(steady + among, after + _among_others(shape, 0, shape.layers) if shape.waiting_bytes else 0),
        "as backward ends": sums + one * layers + shape.each * shape.table_gradients,
        "as gradients are reduced": sums + one * layers + FLOAT32 * max(shape.root, shape.block),
    }


def _at_logits(shape: OptimizerShape) -> int:
    """The output layer's backward: its tiles, or what comes of them, beside the buffer that the last block was gathered in."""
    sums = FLOAT32 * shape.table if shape.tiled else 0
    begins = 2 * shape.logits_bytes + (shape.hidden_bytes + sums if shape.tiled else 0)
    gradients = shape.each * shape.table + (0 if shape.each == FLOAT32 and shape.tiled else sums)
    last = 0 if shape.tiled else shape.logits_bytes * shape.each // FLOAT32
    buffer = 0 if shape.alone else shape.each * shape.block
    return shape.saved_bytes + buffer + max(begins, shape.hidden_bytes + gradients + last)


def _in_forward(shape: OptimizerShape) -> int:
    """The last block, just gathered, from a buffer that the one before it had too."""
    buffers = 0 if shape.alone else 3 if shape.layers > 1 else 2
    return buffers * shape.each * shape.block + shape.saved_bytes - shape.saved_bytes_per_block - shape.saved_bytes_after


def _in_block(shape: OptimizerShape, done: int) -> int:
    """At the worst point of the backward of a block, `done` blocks after the first to be taken."""
    last, first = done == shape.layers - 1, done == 0
    one = shape.each * shape.block
    gathered = 0 if shape.alone else one if last else 2 * one
    in_flight = 0 if first or shape.alone else FLOAT32 * shape.block
    reduced = FLOAT32 * done * shape.block
    sums = shape.whole_bytes - reduced if shape.accumulates else 0
    # Added to float32 sums as they come; otherwise kept until the block is done.
    gradients = 0 if shape.accumulates and shape.each == FLOAT32 else one
    left = shape.saved_bytes - shape.saved_bytes_after - done * shape.saved_bytes_per_block
    always = shape.each * shape.table + sums + _spread(shape, reduced) + gathered
    begins = left + shape.again_bytes + shape.working_bytes + in_flight
    ends = left - shape.saved_bytes_per_block + gradients + in_flight
    reducing = left - shape.saved_bytes_per_block + (gradients if not shape.accumulates else 0) + FLOAT32 * shape.block - one
    return always + max(begins, ends, 0 if shape.alone else reducing)


def _among_others(shape: OptimizerShape, done: int, gathered: int) -> int:
    """The same for a micro-batch whose gradients are only summed; gathered: blocks that are."""
    one = shape.each * shape.block
    left = shape.saved_bytes - shape.saved_bytes_after - done * shape.saved_bytes_per_block
    gradients = 0 if shape.each == FLOAT32 else one
    ends = left - shape.saved_bytes_per_block + gradients
    always = shape.each * shape.table + gathered * one + shape.hidden_bytes
    return always + max(left + shape.again_bytes + shape.working_bytes, ends)


def _at_end(shape: OptimizerShape) -> int:
    blocks = _spread(shape, FLOAT32 * (shape.layers + shape.other_layers) * shape.block)
    sums = FLOAT32 * shape.root if shape.accumulates else 0
    return blocks + sums + shape.each * shape.table_gradients + (0 if shape.alone else FLOAT32 * shape.block)


def _spread(shape: OptimizerShape, reduced: int) -> int:
    """Gradients that are reduced, as they lie on the rank's device."""
    return reduced // shape.shards if shape.shards else 0
