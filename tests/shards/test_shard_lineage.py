"""A lineage's samples: each once, in one order at any number of ranks, whatever happens to the run on the way."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import ShardError
from shards.sampling.order import BLOCK, Sample, SampleOrder
from shards.sampling.segments import Change

SIZES = {"a": 300, "b": 41, "c": 7, "d": 120}
weights = st.floats(0.01, 10)
mixtures = st.dictionaries(st.sampled_from("abc"), weights, min_size=1)
events = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 8, 16, 64])),
    st.tuples(st.just("set"), mixtures),
    st.tuples(st.just("add"), weights),
    st.tuples(st.just("save")),
    st.tuples(st.just("kill")),
    st.tuples(st.just("rollback"), st.integers(0, 9), st.integers(0, 3)),
)
BATCH = 64


def by_ranks(order: SampleOrder, start: int, ranks: int) -> list[Sample]:
    """A global batch as so many ranks read it, each its own part."""
    each = BATCH // ranks
    bounds = [start + rank * each for rank in range(ranks)] + [start + BATCH]
    return [sample for low, high in itertools.pairwise(bounds) for sample in order.span(low, high)]


class Lineage:
    """A run: an order, where it stands, and what its line has seen; checkpoints are bytes, as on a disk."""

    def __init__(self, seed: int, mixture: dict[str, float], limits: dict[str, int], schedule: list[tuple[int, dict[str, float]]]):
        self.limits = limits
        self.make = lambda: SampleOrder(
            seed,
            {name: SIZES[name] for name in "abc"},
            mixture,
            limits=limits,
            schedule=[Change(step * BATCH, each, each) for step, each in schedule],
        )
        self.order, self.position, self.step = self.make(), 0, 0
        self.seen: list[Sample | None] = []  # None: passed over
        self.passed: list[Sample] = []
        self.saved: list[bytes] = []
        self.changed = False
        self.save()

    def save(self) -> None:
        self.saved.append(
            msgspec.msgpack.encode((self.order.state(), self.position, self.step, self.seen, self.passed, self.changed))
        )

    def load(self, number: int) -> None:
        del self.saved[number + 1 :]
        state, self.position, self.step, seen, passed, self.changed = msgspec.msgpack.decode(self.saved[-1])
        self.seen, self.passed = [each and tuple(each) for each in seen], [tuple(each) for each in passed]
        self.order = self.make()
        for name in state["sizes"]:
            self.order.add_source(name, SIZES[name])
        self.order.restore(state)

    def train(self, steps: int, ranks: int) -> bool:
        for _ in range(steps):
            try:
                found = by_ranks(self.order, self.position, ranks)
            except ShardError:
                assert self.order.end is not None and self.position + BATCH > self.order.end
                return False
            assert found == self.order.span(self.position, self.position + BATCH)
            self.seen += found
            self.position += BATCH
            self.step += 1
        return True

    def skip(self, steps: int) -> None:
        count = steps * BATCH
        if self.order.end is not None and self.position + count > self.order.end:
            return
        self.order.delay(self.position, count)
        if self.order.end is not None and self.position + count > self.order.end:
            return
        self.passed += self.order.span(self.position, self.position + count)
        self.position += count


@given(
    seed=st.integers(0, 2**40),
    mixture=mixtures,
    limits=st.dictionaries(st.sampled_from("abc"), st.integers(1, 900), max_size=3),
    schedule=st.lists(st.tuples(st.integers(1, 25), mixtures), max_size=3, unique_by=lambda each: each[0]),
    happening=st.lists(events, min_size=5, max_size=25),
)
@settings(max_examples=60)
def test_each_sample_of_an_epoch_comes_once_whatever_happens(seed, mixture, limits, schedule, happening) -> None:
    run = Lineage(seed, mixture, limits, sorted(schedule, key=lambda each: each[0]))
    for kind, *arguments in happening:
        if kind == "train":
            run.train(*arguments)
        elif kind == "set" or kind == "add":
            wanted = arguments[0] if kind == "set" else {"d": arguments[0], "a": 1.0}
            run.order.add_source("d", SIZES["d"])
            left = {name for name in wanted if run.order.taken(run.position).get(name, 0) < limits.get(name, 1 << 60)}
            with contextlib.nullcontext() if left else pytest.raises(ShardError, match="used up"):
                run.order.reweight(run.position, wanted)
        elif kind == "save":
            run.save()
        elif kind == "kill":
            run.load(len(run.saved) - 1)
        else:
            run.load(arguments[0] % len(run.saved))
            run.skip(arguments[1])
    counted = Counter(run.seen + run.passed)
    assert all(times == 1 for times in counted.values())
    for name, size in SIZES.items():
        epochs = Counter(epoch for source, epoch, _ in counted if source == name)
        total = sum(epochs.values())
        assert total <= limits.get(name, total)
        assert epochs == {epoch: min(size, total - epoch * size) for epoch in range(-(-total // size))}
        assert run.order.taken(run.position).get(name, 0) == total


def limited(limits: dict[str, int], mixture: dict[str, float] | None = None, **more: Any) -> SampleOrder:
    return SampleOrder(5, {"a": 5000, "b": 100, "c": 30}, mixture or {"a": 2, "b": 1, "c": 1}, limits=limits, **more)


def test_a_used_up_source_has_weight_0_from_its_last_sample_on_and_the_others_share_its_place() -> None:
    free, order = limited({}), limited({"b": 2900, "c": 1000})
    whole = order.span(0, 40_000)
    last = {name: max(place for place, sample in enumerate(whole) if sample[0] == name) for name in "bc"}
    assert Counter(name for name, _, _ in whole)["b"] == 2900 and Counter(name for name, _, _ in whole)["c"] == 1000
    assert last["c"] < last["b"]
    assert whole[: last["c"] + 1] == free.span(0, last["c"] + 1)
    assert [segment.start for segment in order.segments] == [0, last["c"] + 1, last["b"] + 1]
    between = Counter(name for name, _, _ in whole[last["c"] + 1 :][:BLOCK])
    assert between["a"] == pytest.approx(BLOCK * 2 / 3, abs=1) and between["b"] == pytest.approx(BLOCK / 3, abs=1)
    assert {name for name, _, _ in whole[last["b"] + 1 :]} == {"a"} and order.end is None


def test_when_all_are_used_up_it_says_where_and_what_to_do_and_nothing_is_read_beyond() -> None:
    order = limited({"a": 10, "b": 20, "c": 5})
    assert order.end == 35 and Counter(name for name, _, _ in order.span(0, 35)) == {"a": 10, "b": 20, "c": 5}
    with pytest.raises(ShardError, match=r'after 35 samples: "a", "b", "c".*\(set mixture') as caught:
        order.span(34, 36)
    assert "advance" in str(caught.value)
    with pytest.raises(ShardError, match='"b" used up'):
        order.reweight(35, {"b": 1})
    order.add_source("d", 9)
    order.reweight(35, {"d": 1, "b": 3})
    assert order.end is None and {name for name, _, _ in order.span(35, 60)} == {"d"}


def test_an_operators_change_holds_until_the_next_scheduled_one() -> None:
    plan = [Change(start, mixture, mixture) for start, mixture in ((1000, {"b": 1.0}), (2000, {"c": 1.0}))]
    order = limited({}, {"a": 1}, schedule=plan)
    order.reweight(500, {"a": 1, "b": 1})
    sources = [name for name, _, _ in order.span(0, 3000)]
    assert set(sources[:500]) == {"a"} and set(sources[500:1000]) == {"a", "b"}
    assert set(sources[1000:2000]) == {"b"} and set(sources[2000:]) == {"c"}
    order.reweight(1000, {"a": 1})  # at the very boundary of the scheduled one: the operator comes last
    sources = [name for name, _, _ in order.span(0, 3000)]
    assert set(sources[1000:2000]) == {"a"} and set(sources[2000:]) == {"c"}
    assert order.asked(999) == {"a": 1, "b": 1} and order.asked(1000) == {"a": 1} and order.asked(2000) == {"c": 1}


def test_a_scheduled_change_is_put_off_by_what_is_passed_over_and_earlier_ones_are_not() -> None:
    order = limited({}, {"a": 1}, schedule=[Change(100, {"b": 1.0}, {}), Change(900, {"c": 1.0}, {})])
    before = order.span(0, 300)
    order.delay(300, 64)
    assert order.span(0, 300) == before
    assert order.at(963)[0] == "b" and order.at(964)[0] == "c"


@pytest.mark.parametrize("starts", [[0], [5, 5], [9, 5]])
def test_a_schedule_out_of_order_is_refused(starts: list[int]) -> None:
    with pytest.raises(ShardError, match="rise"):
        limited({}, schedule=[Change(start, {"a": 1.0}, {}) for start in starts])


def test_a_state_with_another_limit_is_refused() -> None:
    with pytest.raises(ShardError, match=r'"b" gives 200 samples in all.*max_epochs'):
        limited({"b": 200}).restore(limited({"b": 300}).state())


def test_a_state_of_the_first_version_is_refused_with_the_way_out() -> None:
    old = {"version": 1, "seed": 5, "sizes": {"a": 5000}, "segments": [{"start": 0, "counts": {"a": BLOCK}, "bases": {"a": 0}}]}
    with pytest.raises(ShardError, match=r"version 1.*\(go on with the release that wrote it"):
        limited({}).restore(old)
