"""What a mixture means of what was built: parts by label, shares by tokens and temperature, limits of epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.build.build import build
from shards.common.errors import ShardError
from shards.format.corpus import Corpus
from shards.sampling.batches import BatchFeed
from shards.sampling.mixing import Mixing, limit, named, parts, shares, weigh
from shards.sampling.segments import BLOCK
from shards.spec import Source


def test_a_whole_means_all_its_parts_and_a_part_just_itself() -> None:
    built = ["web.en", "web.de", "webs", "books"]
    assert named({"web": 1, "books": 1}, built) == {"web.en": "web", "web.de": "web", "books": "books"}
    assert named({"web.de": 1}, built) == {"web.de": "web.de"}
    assert named({"web": 1}, ["web", "web.en"]) == {"web": "web"}


def test_a_name_that_means_nothing_or_the_same_twice_is_refused() -> None:
    with pytest.raises(ShardError, match=r'no source "wbe" \(there are: web\.de, web\.en\)'):
        named({"wbe": 1}, ["web.en", "web.de"])
    with pytest.raises(ShardError, match=r'both mean "web\.en"'):
        named({"web": 1, "web.en": 1}, ["web.en", "web.de"])


TOKENS = {"en": 8_000_000, "de": 1_000_000, "sw": 1_000}


@given(weight=st.floats(0.01, 100), temperature=st.sampled_from([0.5, 1.0, 2.0, 3.0, 5.0]))
def test_shares_by_tokens_are_weight_times_tokens_to_the_power_of_one_over_the_temperature(weight, temperature) -> None:
    found = weigh(dict.fromkeys(TOKENS, weight), {name: name for name in TOKENS}, TOKENS, Mixing("tokens", temperature))
    for a in TOKENS:
        for b in TOKENS:
            assert found[a] / found[b] == pytest.approx((TOKENS[a] / TOKENS[b]) ** (1 / temperature), rel=1e-9)


def test_a_weight_is_shared_by_the_parts_in_proportion_to_their_tokens() -> None:
    meant = {"web.en": "web", "web.de": "web", "code": "code"}
    found = weigh({"web": 3, "code": 1}, meant, {"web.en": 900, "web.de": 100, "code": 50}, Mixing())
    assert found == pytest.approx({"web.en": 2.7, "web.de": 0.3, "code": 1})
    assert weigh({"web": 1}, {"web.en": "web"}, {"web.en": 0}, Mixing()) == {"web.en": 0.0}


def test_a_limit_of_a_part_comes_before_one_of_the_whole_which_holds_for_each_part() -> None:
    built, epochs = ["web.en", "web.de", "web.fr"], {"web": 2, "web.de": 0.5}
    assert [limit(name, 101, epochs, built) for name in built] == [202, 50, 202]
    assert limit("books", 101, epochs, built) is None and limit("web.x", 101, {"web": 2}, ["web", "web.x"]) is None
    assert limit("web.en", 3, {"web.en": 0.01}, built) == 1


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, make_spec) -> Path:
    """A source in two parts, and one beside it."""
    sources = tuple(
        Source(name=name, kind="text", origin="stdlib-topics", max_documents=count)
        for name, count in (("web.en", 40), ("web.de", 12), ("books", 25))
    )
    return build(make_spec(tmp_path_factory.mktemp("split") / "shards", source=sources), workers=0)


def test_a_feed_reads_all_parts_of_a_source_by_their_tokens_and_says_for_which_name(split: Path) -> None:
    feed = BatchFeed(split, "train", "text", 32, {"web": 3, "books": 1}, 0)
    assert feed.named == {"web.en": "web", "web.de": "web", "books": "books"}
    read = Counter(name for name, _, _ in feed.order.span(0, BLOCK))
    tokens = {name: Corpus(split, name, "train").tokens for name in read}
    assert read["books"] == BLOCK // 4
    assert read["web.en"] / read["web.de"] == pytest.approx(tokens["web.en"] / tokens["web.de"], rel=0.01)
    feed.reweight(BLOCK, {"web.de": 1})
    assert {name for name, _, _ in feed.order.span(BLOCK, BLOCK + 50)} == {"web.de"}
    assert set(feed.digests) == set(read)
    other = BatchFeed(split, "train", "text", 32, {"web.en": 1}, 0)
    other.restore(feed.state())
    assert other.order.span(BLOCK - 50, BLOCK + 50) == feed.order.span(BLOCK - 50, BLOCK + 50)


def test_a_feed_takes_mixtures_by_tokens_limits_and_a_schedule_together(split: Path) -> None:
    mixing = Mixing("tokens", 2.0, {"web": 1.5})
    feed = BatchFeed(split, "train", "text", 32, {"web": 1, "books": 1}, 0, mixing=mixing, schedule=[(400, {"books": 1})])
    read = Counter(name for name, _, _ in feed.order.span(0, 50_000))
    assert {name for name, _, _ in feed.order.span(400, 800)} == {"books"}
    assert max(read["web.en"], read["web.de"]) < 400
    feed.reweight(800, {"web": 1, "books": 0.01})
    read = Counter(name for name, _, _ in feed.order.span(0, 200_000))
    assert {name: read[name] for name in ("web.en", "web.de")} == {
        name: int(1.5 * feed.samples_per_epoch(name)) for name in ("web.en", "web.de")
    }


def test_a_state_of_a_mixture_taken_otherwise_is_refused(split: Path) -> None:
    feed = BatchFeed(split, "train", "text", 32, {"web": 1}, 0, mixing=Mixing("tokens", 2.0))
    with pytest.raises(ShardError, match=r"mixture temperature 2\.0, this stage 3\.0"):
        BatchFeed(split, "train", "text", 32, {"web": 1}, 0, mixing=Mixing("tokens", 3.0)).restore(feed.state())


def test_shares_and_parts_are_told_from_what_is_built(split: Path) -> None:
    assert parts(split, "web") == ["web.de", "web.en"] and parts(split, "books") == ["books"] and parts(split, "no") == ["no"]
    tokens = {name: Corpus(split, name, "train").tokens for name in ("web.en", "web.de", "books")}
    whole = sum(tokens.values())
    told = shares(split, {"web": 1, "books": 1}, Mixing("tokens"))
    assert told == pytest.approx({"web": (whole - tokens["books"]) / whole, "books": tokens["books"] / whole})
