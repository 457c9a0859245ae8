"""The order of samples: exactly once an epoch, the same at any number of ranks, found in constant time."""

from __future__ import annotations

import time
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import ShardError
from shards.sampling.order import BLOCK, VERSION, SampleOrder
from shards.sampling.permutation import permute
from shards.sampling.segments import apportion

weights = st.floats(0.01, 10)
names = st.sampled_from(["a", "b", "c"])


@given(size=st.integers(1, 5000), key=st.binary(max_size=8))
def test_the_permutation_hits_everything_once(size: int, key: bytes) -> None:
    images = permute(np.arange(size, dtype=np.uint64), size, key)
    assert np.array_equal(np.sort(images), np.arange(size))


def test_keys_give_different_permutations_without_fixed_habits() -> None:
    plain = np.arange(1000, dtype=np.uint64)
    images = [permute(plain, 1000, str(key).encode()) for key in range(50)]
    assert len({image.tobytes() for image in images}) == 50
    # Neighbours do not stay neighbours: by chance about 2 in 1,000 would.
    together = np.mean([np.abs(np.diff(image.astype(np.int64))) == 1 for image in images])
    assert together < 0.004


@given(
    sizes=st.dictionaries(names, st.integers(5, 400), min_size=1),
    changes=st.lists(st.tuples(st.integers(1, 1500), st.dictionaries(names, weights, min_size=1)), max_size=4),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=25)
def test_every_sample_of_an_epoch_comes_once_through_changes_of_mixture(sizes, changes, seed, data) -> None:
    order = SampleOrder(seed, sizes, {name: data.draw(weights) for name in sizes})
    position = 0
    for step, mixture in changes:
        position += step
        mixture = {name: weight for name, weight in mixture.items() if name in sizes}
        if mixture:
            order.reweight(position, mixture)
    seen: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in sizes}
    for name, epoch, sample in order.span(0, position + 3000):
        seen[name][epoch, sample] += 1
    for name, counted in seen.items():
        assert all(times == 1 for times in counted.values())
        total = sum(counted.values())
        epochs = Counter(epoch for epoch, _ in counted)
        for epoch, count in epochs.items():
            assert count == min(sizes[name], total - epoch * sizes[name])
            assert all(sample < sizes[name] for _, sample in counted)


@given(seed=st.integers(0, 1000), ranks=st.integers(1, 64), steps=st.integers(1, 5), change=st.integers(1, 4000))
def test_any_number_of_ranks_reads_the_same_samples_in_the_same_order(seed, ranks, steps, change) -> None:
    order = SampleOrder(seed, {"a": 1000, "b": 33}, {"a": 3, "b": 1})
    order.reweight(change, {"a": 1, "b": 1})
    each = 3
    batch = ranks * each
    whole = order.span(0, steps * batch)
    by_rank = [
        sample
        for step in range(steps)
        for rank in range(ranks)
        for sample in order.span(step * batch + rank * each, step * batch + (rank + 1) * each)
    ]
    assert by_rank == whole


def test_a_change_of_mixture_changes_nothing_before_it() -> None:
    order = SampleOrder(0, {"a": 100, "b": 100}, {"a": 1, "b": 1})
    before = order.span(0, 500)
    order.reweight(500, {"b": 1})
    assert order.span(0, 500) == before
    assert {name for name, _, _ in order.span(500, 700)} == {"b"}


def test_a_source_left_out_goes_on_later_where_it_was() -> None:
    order = SampleOrder(0, {"a": 100, "b": 100}, {"a": 1, "b": 1})
    order.reweight(50, {"b": 1})
    order.reweight(150, {"a": 1})
    read = [sample for sample in order.span(0, 300) if sample[0] == "a" and sample[1] == 0]
    assert len(read) == len(set(read)) == 100


def test_a_new_source_begins_at_its_beginning() -> None:
    order = SampleOrder(0, {"a": 100}, {"a": 1})
    order.add_source("b", 10)
    order.reweight(30, {"a": 1, "b": 1})
    read = [sample for sample in order.span(0, 100) if sample[0] == "b"]
    assert len({sample for _, epoch, sample in read if epoch == 0}) == 10


def test_shares_are_exact_in_every_block_and_none_is_lost() -> None:
    counts = apportion({"large": 1.0, "third": 0.5, "crumb": 1e-9, "none": 0.0})
    assert sum(counts.values()) == BLOCK
    assert counts["crumb"] == 1 and counts["none"] == 0
    assert abs(counts["large"] - BLOCK * 2 / 3) <= 2
    order = SampleOrder(1, dict.fromkeys(counts, 50), {"large": 1.0, "third": 0.5, "crumb": 1e-9, "none": 0.0})
    read = Counter(name for name, _, _ in order.span(7 * BLOCK, 8 * BLOCK))
    assert read == {name: count for name, count in counts.items() if count}


@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_any_weights_fill_a_block(mixture: dict[str, float]) -> None:
    counts = apportion(mixture)
    assert sum(counts.values()) == BLOCK and min(counts.values()) >= 1
    assert apportion(dict(reversed(mixture.items()))) == counts


@pytest.mark.parametrize("mixture", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}, {"z": 1.0}])
def test_a_mixture_that_means_nothing_is_refused(mixture: dict[str, float]) -> None:
    with pytest.raises(ShardError, match="mixture"):
        SampleOrder(0, {"a": 10, "b": 10}, mixture)


def test_a_restored_order_goes_on_as_if_never_stopped() -> None:
    order = SampleOrder(3, {"a": 1000, "b": 50}, {"a": 2, "b": 1})
    order.reweight(777, {"a": 1, "b": 3})
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(order.state()))
    other = SampleOrder(3, {"a": 1000, "b": 50}, {"a": 1, "b": 1})
    other.restore(state)
    assert other.span(500, 6000) == order.span(500, 6000)


def test_a_rollback_forgets_the_changes_after_it() -> None:
    order = SampleOrder(3, {"a": 1000, "b": 50}, {"a": 2, "b": 1})
    golden, then = order.state(), order.span(100, 1000)
    order.reweight(300, {"b": 1})
    with pytest.raises(ShardError, match="restore an earlier state"):
        order.reweight(200, {"a": 1})
    order.restore(golden)
    assert order.span(100, 1000) == then
    order.reweight(200, {"a": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": VERSION + 1}, "version"),
        ({"seed": 4}, "seed"),
        ({"sizes": {"a": 999, "b": 50}}, '"a" has 1000 samples'),
        ({"sizes": {"a": 1000, "b": 50, "gone": 5}}, '"gone" has no samples'),
        ({"changes": []}, "no mixture at 0"),
        ({"segments": [{"start": 0, "counts": {"a": 4096}, "bases": {"a": 0}}]}, "malformed"),
        ({"segments": 3}, "malformed"),
    ],
)
def test_a_state_that_cannot_be_continued_exactly_is_refused_with_the_way_out(change, message) -> None:
    order = SampleOrder(3, {"a": 1000, "b": 50}, {"a": 2, "b": 1})
    before = order.span(0, 100)
    with pytest.raises(ShardError, match=message) as caught:
        order.restore({**order.state(), **change})
    assert "(" in str(caught.value)
    assert order.span(0, 100) == before


def test_the_algorithm_is_the_one_its_version_names() -> None:
    """Fails when a change would reorder running jobs: then VERSION must change, and these with it."""
    order = SampleOrder(1234, {"a": 1000, "b": 77}, {"a": 2, "b": 1})
    order.reweight(5000, {"a": 1, "b": 1})
    assert VERSION == 2
    assert order.span(0, 6) == PINNED[0] and order.span(4999, 5003) == PINNED[1] and order.at(10**12) == PINNED[2]


PINNED = (
    [("a", 0, 186), ("a", 0, 327), ("a", 0, 559), ("b", 0, 19), ("b", 0, 41), ("a", 0, 64)],
    [("a", 3, 913), ("a", 3, 645), ("a", 3, 192), ("b", 21, 21)],
    ("a", 500000000, 43),
)


def test_ten_thousand_million_samples_open_at_once_and_anywhere() -> None:
    started = time.perf_counter()
    order = SampleOrder(0, {"a": 10**10, "b": 10**9}, {"a": 10, "b": 1})
    samples = order.span(10**11 + 5, 10**11 + 5 + 512)
    assert time.perf_counter() - started < 0.25
    assert len(set(samples)) == 512
