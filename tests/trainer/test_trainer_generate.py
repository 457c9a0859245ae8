"""The generation engine against naive decoding: same tokens, whatever shares the batch, the pages or the step."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from midwatch.recipe import Rope
from midwatch.recipe.model import Model
from trainer.generate import Engine, Request, RequestError, Response
from trainer.generate.block_manager import BlockManager
from trainer.generate.request import Sequence
from trainer.generate.sampling import uniform
from trainer.model import attention
from trainer.model.decoder import Decoder

CONFIG = Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64)
VOCABULARY, CONTEXT, STOPS = 61, 96, frozenset(range(2, 8))
CPU = torch.device("cpu")
torch.set_num_threads(1)


def decoder(config: Model = CONFIG, seed: int = 0) -> Decoder:
    made = Decoder(config, VOCABULARY)
    made.initialise(seed)
    with torch.no_grad():
        for parameter in made.parameters():  # so that one token is not always the likeliest
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return made


def engine(config: Model = CONFIG, weights: Decoder | None = None, **options: Any) -> Engine:
    made = Engine(config, VOCABULARY, CPU, CONTEXT, **options)
    made.refresh((weights or decoder(config)).named_parameters(), version=1)
    return made


def naive(model: Decoder, prompt: tuple[int, ...], limit: int, stops: frozenset[int] = STOPS) -> list[int]:
    """The likeliest tokens, each by a forward over everything before it."""
    ids = list(prompt)
    while len(ids) < CONTEXT and len(ids) - len(prompt) < limit:
        ids.append(int(logits(model, ids)[-1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def logits(model: Decoder, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids])
    found: Tensor = model(tokens, torch.arange(len(ids))[None], torch.zeros_like(tokens))
    return found[0]


def ragged(count: int, seed: int = 0, shared: int = 20) -> list[Request]:
    """Greedy requests of many lengths; every third begins with the same tokens."""
    draw = random.Random(seed)
    beginning = [draw.randrange(3, VOCABULARY) for _ in range(shared)]
    found = []
    for number in range(count):
        own = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 40))]
        prompt = tuple(([*beginning, *own]) if number % 3 == 0 else own)
        found.append(Request(prompt, limit=draw.randint(1, 30), temperature=0, stops=STOPS))
    return found


def answered(made: Engine, requests: list[Request]) -> list[Response]:
    found = made.generate(requests)
    assert found is not None
    return found


def test_greedy_tokens_are_those_of_naive_decoding() -> None:
    requests, model = ragged(64), decoder()
    made = engine(weights=model, running=16, page=8, step_tokens=48)
    found = answered(made, requests)
    assert [each.tokens for each in found] == [naive(model, each.prompt, each.limit) for each in requests]
    assert {each.finish for each in found} == {"length", "stop"}


def test_sequences_that_were_sent_back_go_on_as_if_they_had_not_been() -> None:
    requests, model = [replace(each, limit=24, stops=frozenset()) for each in ragged(64, seed=1)], decoder()
    made = engine(weights=model, running=32, page=4, pages=40, step_tokens=64)
    found = answered(made, requests)
    assert made.usage().preemptions > 5
    assert [each.tokens for each in found] == [naive(model, each.prompt, 24, frozenset()) for each in requests]
    assert made.usage().held == 0


def test_a_shared_prefix_is_computed_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    made = engine(weights=model, page=8)
    passed = counted_tokens(made, monkeypatch)
    prompt = tuple(range(3, 43))
    requests = [Request((*prompt, 50 + number), limit=3, temperature=0) for number in range(8)]
    found = answered(made, requests)
    assert [each.tokens for each in found] == [naive(model, each.prompt, 3, frozenset()) for each in requests]
    assert sum(passed) == 41 + 7 * 1 + 8 * 2  # the prefix once, each one's own last token, and two that follow
    later = answered(made, requests[:1])
    assert later[0].tokens == found[0].tokens
    assert sum(passed) == 41 + 7 + 16 + (41 - 40) + 2


def test_new_weights_take_over_in_the_middle_and_old_prefixes_are_forgotten() -> None:
    first, second = decoder(seed=0), decoder(seed=1)
    requests = [Request(each.prompt, limit=30, temperature=0) for each in ragged(16, seed=2)]
    made = engine(weights=first, page=8, running=8)
    ids = [made.add(each) for each in requests]
    drawn: dict[int, list[int]] = {id: [] for id in ids}
    before: dict[int, int] = {}
    for number in range(400):
        if number == 12:
            before = {id: len(tokens) for id, tokens in drawn.items()}
            made.refresh(second.named_parameters(), version=2)
        for event in made.step():
            drawn[event.id].append(event.token)
    assert not made.busy
    assert any(0 < before[id] < 30 for id in ids)
    for id, request in zip(ids, requests, strict=True):
        old = naive(first, request.prompt, before[id], frozenset())
        new = naive(second, (*request.prompt, *old), 30 - before[id], frozenset())
        assert drawn[id] == (old + new)[: CONTEXT - len(request.prompt)]


def test_a_response_says_which_weights_drew_it() -> None:
    made = engine()
    made.add(Request((5, 6), limit=4, temperature=0))
    made.step()
    made.refresh(decoder(seed=1).named_parameters(), version=7)
    (response,) = answered(made, [Request((5, 6), limit=2, temperature=0)])
    assert (response.first_version, response.version) == (7, 7)


@pytest.mark.parametrize(
    "config",
    [
        Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, intermediate_size=64),
        Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=1, intermediate_size=64, position="alibi"),
        Model(
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=64,
            position="learned",
            max_positions=CONTEXT,
            norm="layernorm",
        ),
        Model(
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=64,
            position="sinusoidal",
            mlp="gelu",
            tie_embeddings=False,
        ),
        Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64, position="none", norm_place="post"),
    ],
    ids=["mha", "alibi", "learned", "sinusoidal", "no positions"],
)
def test_every_kind_of_model_is_decoded(config: Model) -> None:
    requests, model = ragged(12, seed=3), decoder(config)
    made = engine(config, model, page=8, running=6, step_tokens=32)
    assert [each.tokens for each in answered(made, requests)] == [naive(model, each.prompt, each.limit) for each in requests]


def test_stretched_positions_are_those_of_the_stage() -> None:
    rope, requests, model = Rope(kind="yarn", factor=4.0), ragged(8, seed=4), decoder()
    model.set_positions(rope, 24)
    made = engine(weights=model)
    made.set_rope(rope, 24)
    assert [each.tokens for each in answered(made, requests)] == [naive(model, each.prompt, each.limit) for each in requests]


def test_bfloat16_follows_a_model_in_bfloat16() -> None:
    config = Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64, dtype="bfloat16")
    model = decoder(config).bfloat16()
    (response,) = answered(engine(config, model), [Request(tuple(range(3, 30)), limit=8, temperature=0)])
    every = logits(model, [*range(3, 30), *response.tokens]).log_softmax(-1)
    for place, (token, log_prob) in enumerate(zip(response.tokens, response.log_probs, strict=True)):
        assert every[26 + place, token] == pytest.approx(log_prob, abs=0.1)
        assert every[26 + place, token] > every[26 + place].max() - 0.1


def following_kernel(  # what flash-attn's varlen kernel computes over pages, sequence by sequence
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, most: int, longest: int, **given: Any
) -> Tensor:
    out = torch.empty_like(q)
    for at, pages in enumerate(given["block_table"].tolist()):
        length = int(key_starts[at + 1] - key_starts[at])
        start, stop = int(starts[at]), int(starts[at + 1])
        assert stop - start <= most
        assert length <= longest
        keys, values = (held[pages].flatten(0, 1)[:length].transpose(0, 1) for held in (k, v))
        keys, values = (each.repeat_interleave(q.shape[1] // len(keys), 0) for each in (keys, values))
        scores = q[start:stop].transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        behind = torch.arange(length - (stop - start), length)[:, None] - torch.arange(length)
        if (slopes := given.get("alibi_slopes")) is not None:
            scores = scores - slopes[:, None, None] * behind
        out[start:stop] = (scores.masked_fill(behind < 0, -math.inf).softmax(-1) @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_kernel_that_follows_pages_is_told_where_everything_lies(
    position: Any, replays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "flash_attn_varlen_func", following_kernel)
    config = Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64, position=position)
    requests, model = ragged(24, seed=5), decoder(config)
    made = engine(config, model, page=8, running=11, pages=40, step_tokens=32, kernel=True, replays=replays)
    assert [each.tokens for each in answered(made, requests)] == [naive(model, each.prompt, each.limit) for each in requests]


def test_what_is_drawn_depends_on_nobody_else() -> None:
    model = decoder()
    requests = [Request(each.prompt, limit=20, seed=number) for number, each in enumerate(ragged(32, seed=6))]
    alone = [answered(engine(weights=model), [each])[0] for each in requests[:6]]
    crowded = engine(weights=model, running=16, page=8, pages=20, step_tokens=40)
    found = answered(crowded, requests)
    assert crowded.usage().preemptions
    assert [each.tokens for each in alone] == [each.tokens for each in found[:6]]
    assert len({tuple(each.tokens) for each in found}) > 16


def test_log_probs_are_those_of_the_model_at_the_temperature_drawn_at() -> None:
    model = decoder()
    prompt = tuple(range(3, 20))
    (found,) = answered(engine(weights=model), [Request(prompt, limit=10, temperature=0.7, top_k=5, seed=3)])
    every = (logits(model, [*prompt, *found.tokens]) / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
    expected = every.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    assert found.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def drawn_often(**options: Any) -> Counter[int]:
    made = engine()
    requests = [Request((7, 9, 11), limit=1, seed=seed, **options) for seed in range(4000)]
    return Counter(each.tokens[0] for each in answered(made, requests))


def chances(temperature: float = 1.0) -> Tensor:
    return (logits(decoder(), [7, 9, 11])[-1] / temperature).softmax(-1)


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    for temperature in (1.0, 0.5):
        expected = 4000 * chances(temperature)
        found = drawn_often(temperature=temperature)
        squares = sum((found[id] - float(n)) ** 2 / float(n) for id, n in enumerate(expected) if n > 5)
        assert squares < 2 * int((expected > 5).sum()) + 10  # chi-squared, about one a token


def test_the_tokens_of_a_response_are_drawn_apart() -> None:
    even = decoder()
    with torch.no_grad():
        for parameter in even.parameters():
            parameter.zero_()
    found = answered(engine(weights=even), [Request((7,), limit=2, seed=seed) for seed in range(400)])
    assert sum(first == second for first, second in (each.tokens for each in found)) < 0.1 * len(found)


def test_top_k_and_top_p_leave_the_tail_out() -> None:
    ordered = chances().argsort(descending=True).tolist()
    assert set(drawn_often(top_k=3)) == set(ordered[:3])
    sums = chances().sort(descending=True).values.cumsum(0)
    nucleus = int((sums < 0.5).sum()) + 1
    assert set(drawn_often(top_p=0.5)) == set(ordered[:nucleus])


def test_uniform_numbers_are_spread_and_do_not_repeat() -> None:
    seeds, numbers = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    found = uniform(seeds.flatten(), numbers.flatten())
    assert len(np.unique(found)) == 40_000
    assert np.all((found >= 0) & (found < 1))
    assert np.abs(np.histogram(found, 20, (0, 1))[0] - 2000).max() < 200


def test_alternatives_are_the_likeliest_tokens() -> None:
    made = engine()
    made.add(Request((7, 9, 11), limit=1, temperature=0, alternatives=4))
    (event,) = made.step()
    every = logits(decoder(), [7, 9, 11])[-1].log_softmax(-1)
    values, ids = every.topk(4)
    assert [id for id, _ in event.alternatives] == ids.tolist()
    assert [chance for _, chance in event.alternatives] == pytest.approx(values.tolist(), abs=1e-5)


def spelled(ids: Any) -> str:
    return "".join(chr(96 + id) for id in ids)


def test_a_stop_string_ends_the_response_also_across_tokens() -> None:
    model = decoder()
    prompt = (9, 10, 11)
    whole = naive(model, prompt, 12, frozenset())
    text = spelled(whole[3:5])
    (found,) = answered(
        engine(weights=model, decode=spelled), [Request(prompt, limit=12, temperature=0, stop_strings=("nowhere", text))]
    )
    first = spelled(whole).index(text) + len(text)
    assert (found.tokens, found.finish) == (whole[:first], "stop")


def test_an_aborted_request_gives_its_pages_back() -> None:
    made = engine(running=2)
    ids = [made.add(Request((5, 6, 7), limit=50, temperature=0)) for _ in range(4)]
    for _ in range(3):
        made.step()
    for id in ids:
        made.abort(id)
    assert made.usage().held == made.usage().waiting == made.usage().running == 0
    assert not made.step()


def test_generation_that_is_interrupted_leaves_nothing_behind() -> None:
    made = engine()
    asked: list[None] = []

    def interrupted() -> bool:
        asked.append(None)
        return len(asked) > 5

    assert made.generate([Request((5, 6, 7), limit=50, temperature=0)] * 3, interrupted) is None
    assert not made.busy
    assert made.usage().held == 0


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request((), 5), "the prompt is empty"),
        (Request((3,) * CONTEXT, 5), f"{CONTEXT} tokens and the context {CONTEXT}"),
        (Request((VOCABULARY,), 5), "outside the vocabulary"),
        (Request((3,), 0), "limit is 0"),
        (Request((3,), 5, temperature=-1), "temperature is -1"),
        (Request((3,), 5, temperature=float("nan")), "temperature is nan"),
        (Request((3,), 5, top_p=0), "top_p is 0"),
        (Request((3,), 5, stop_strings=("a",)), "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(request_: Request, says: str) -> None:
    made = engine()
    with pytest.raises(RequestError, match=says):
        made.add(request_)
    assert not made.busy


def test_a_cache_without_room_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for a context of 96"):
        Engine(CONFIG, VOCABULARY, CPU, CONTEXT, pages=5, page=16)


def test_a_response_ends_with_the_context() -> None:
    (found,) = answered(engine(), [Request((5,) * (CONTEXT - 3), limit=50, temperature=0)])
    assert (len(found.tokens), found.finish) == (3, "length")


def test_pages_are_in_one_place_only_whatever_happens() -> None:
    """A random history of growing, sharing and leaving: no page is held and free, none is lost."""
    draw = random.Random(1)
    blocks = BlockManager(20, 4)
    live: list[Sequence] = []
    for number in range(3000):
        what = draw.random()
        if what < 0.4 or not live:
            tokens = [draw.randrange(2) for _ in range(draw.randint(1, 24))]
            sequence = Sequence(number, Request(tuple(tokens), 1), tokens, 1)
            blocks.share(sequence)
            if not blocks.grow(sequence, len(tokens)):
                blocks.release(sequence)
                continue
            blocks.know(sequence, len(tokens))
            live.append(sequence)
        elif what < 0.6:
            sequence = draw.choice(live)
            sequence.tokens.append(draw.randrange(2))
            if blocks.grow(sequence, len(sequence.tokens)):
                blocks.know(sequence, len(sequence.tokens))
            else:
                sequence.tokens.pop()
        elif what < 0.97:
            blocks.release(live.pop(draw.randrange(len(live))))
        else:
            blocks.forget()
        held = {page for sequence in live for page in sequence.pages}
        assert 0 not in held
        assert blocks.held == len(held)
        for sequence in live:  # what is shared is the same beginning
            for page, begins in zip(sequence.pages, range(0, 99, 4), strict=False):
                for other in live:
                    if page in other.pages:
                        assert other.tokens[: begins + 4][: len(sequence.tokens)][: begins + 4] == sequence.tokens[: begins + 4]


def counted_tokens(made: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that pass through the model, step by step."""
    passed: list[int] = []
    run: Callable[..., Tensor] = made.runner.run

    def counting(chunks: Any) -> Tensor:
        passed.append(sum(chunk.stop - chunk.start for chunk in chunks))
        return run(chunks)

    monkeypatch.setattr(made.runner, "run", counting)
    return passed
