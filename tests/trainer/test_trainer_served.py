"""Generation by a server of the user's: the same tokens as the own engine's, and every way in which it can let the run down."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from test_trainer_generate import CONFIG, CONTEXT, VOCABULARY, decoder, engine, ragged
from test_trainer_policy import built, ppo, series
from trainer_harness import Step, Told, fresh, logs, same_bits, start_ranks, steer, steered, write_recipe
from vllm_stand_in import StandIn

from midwatch.protocol import Op
from midwatch.recipe import Recipe, RecipeError, Rope, load_recipe, parse_recipe
from midwatch.recipe.generate import Generate
from midwatch.recipe.huggingface.config import config_of
from trainer.generate import Request, Response
from trainer.generate.vllm_client import THREADS, ConnectionPool, Server, ServerError, Under
from trainer.huggingface import export

MODEL = msgspec.structs.replace(CONFIG, tie_embeddings=True)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    made = StandIn(CONTEXT)
    yield made
    made.close()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The tests' decoder, in Hugging Face's layout."""
    given: export.Tensors = {name: partial(lambda x: x, values.data) for name, values in decoder(MODEL).named_parameters()}
    to = tmp_path / "policy"
    to.mkdir()
    export.write(to, export.layout(MODEL, "llama", VOCABULARY), given, torch.float32, 1 << 30)
    (to / "config.json").write_bytes(export.dumped(config_of(MODEL, "llama", Rope(), CONTEXT, CONTEXT, VOCABULARY)))
    return to


def server(url: str, timeout: float = 20.0, model: str | None = None) -> Server:
    return Server(url, model, timeout, CONTEXT, VOCABULARY, "WEIGHTS/latest")


def ready(stand_in: StandIn, weights: Path, **options: Any) -> Server:
    made = server(stand_in.url, **options)
    made.meet(ConnectionPool())
    made.reload(ConnectionPool(), str(weights))
    return made


def begun(made: Server, requests: list[Request], most: int = 16) -> Under[Response]:
    return Under([partial(made.respond, request=request, version=7) for request in requests], most)


def answered(made: Server, requests: list[Request]) -> list[Response]:
    under = begun(made, requests)
    try:
        assert under.wait(60)
        if under.problem is not None:
            raise ServerError(under.problem)
        return under.results()
    finally:
        under.close()


def test_greedy_tokens_and_log_probabilities_are_the_own_engines(stand_in: StandIn, weights: Path) -> None:
    requests = ragged(24)
    found = answered(ready(stand_in, weights), requests)
    own = engine(MODEL, decoder(MODEL)).generate(requests)
    assert own is not None
    assert [each.tokens for each in found] == [each.tokens for each in own]
    assert [each.finish for each in found] == [each.finish for each in own]
    for ours, theirs in zip(own, found, strict=True):
        assert theirs.log_probs == pytest.approx(ours.log_probs, abs=1e-4)
    assert {each.version for each in found} == {7}
    assert stand_in.resets == 1


def test_everything_that_bends_a_response_goes_along(stand_in: StandIn, weights: Path) -> None:
    requests = [replace(each, temperature=0.7, top_k=9, top_p=0.9, seed=2**63 + at) for at, each in enumerate(ragged(8))]
    found = answered(ready(stand_in, weights), requests)
    own = engine(MODEL, decoder(MODEL)).generate([replace(each, seed=each.seed % 2**63) for each in requests])
    assert own is not None
    assert [each.tokens for each in found] == [each.tokens for each in own]


def test_requests_are_under_way_together_and_no_more_than_so_many(stand_in: StandIn, weights: Path) -> None:
    made = ready(stand_in, weights)
    stand_in.delay = 0.2
    began = time.monotonic()
    under = begun(made, [Request((5, 6), limit=2, temperature=0)] * 24, most=8)
    assert under.wait(30)
    under.close()
    assert 4 < stand_in.most <= 8
    assert time.monotonic() - began < 24 * 0.2


def test_ids_that_are_spelled_out_are_read_where_there_is_no_list_of_them(stand_in: StandIn, weights: Path) -> None:
    made, requests = ready(stand_in, weights), ragged(3)
    expected = [each.tokens for each in answered(made, requests)]

    def older(answer: dict[str, Any]) -> dict[str, Any]:
        del answer["choices"][0]["token_ids"], answer["choices"][0]["prompt_token_ids"]
        return answer

    stand_in.tamper = older
    assert [each.tokens for each in answered(made, requests)] == expected


def test_leaving_off_ends_the_threads_at_once(stand_in: StandIn, weights: Path) -> None:
    made = ready(stand_in, weights)
    stand_in.delay = 5.0
    under = begun(made, [Request((5, 6), limit=2, temperature=0)] * 20, most=10)
    assert not under.wait(0.3)
    began = time.monotonic()
    under.close()
    assert time.monotonic() - began < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def choice(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], Any]:
    def tampered(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["choices"][0])
        return answer

    return tampered


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda answer: b"<html>502 Bad Gateway</html>", "says what is not of the protocol"),
        (lambda answer: {"object": "text_completion"}, "says what is not of the protocol"),
        (lambda answer: {"choices": []}, "gave 0 responses to one prompt"),
        (lambda answer: [answer], "cannot be asked"),
        (lambda answer: (500, {"error": {"message": "EngineCore died"}}), "refuses: 500 EngineCore died"),
        (lambda answer: (400, {"detail": "no such model"}), "refuses: 400 no such model"),
        (choice(lambda it: it["token_ids"].pop()), "gives 9 tokens and 10 log-probabilities"),
        (choice(lambda it: it["logprobs"]["token_logprobs"].pop()), "gives 10 tokens and 9 log-probabilities"),
        (
            choice(lambda it: it["token_ids"].__setitem__(2, VOCABULARY)),
            f"gives token {VOCABULARY}, and the vocabulary has {VOCABULARY}",
        ),
        (choice(lambda it: it["logprobs"]["token_logprobs"].__setitem__(2, None)), "log-probability that is not a number"),
        (choice(lambda it: it.update(logprobs=None)), "gives no log-probabilities"),
        (choice(lambda it: it.update(token_ids=None) or it["logprobs"].update(tokens=["a"] * 10)), "gives no token ids"),
        (choice(lambda it: it["prompt_token_ids"].insert(0, 1)), "answers another prompt"),
        (choice(lambda it: it.update(finish_reason="abort")), "ends a response of 10 tokens, of 10 at the most, with 'abort'"),
        (choice(lambda it: (it["token_ids"].pop(), it["logprobs"]["token_logprobs"].pop())), "with 'length'"),
    ],
)
def test_an_answer_that_cannot_be_says_which_server_and_why(tamper: Any, says: str, stand_in: StandIn, weights: Path) -> None:
    made = ready(stand_in, weights)
    stand_in.tamper = tamper
    with pytest.raises(ServerError) as error:
        answered(made, [Request((5, 6, 7), limit=10, temperature=0)])
    assert says in str(error.value)
    assert str(error.value).startswith(f"{stand_in.url}/v1/completions: the server ")


def test_a_server_that_is_not_there_is_named_with_what_to_start_it_with() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ServerError, match=rf"{url}/v1/models.*cannot be asked.*start it with WEIGHTS/latest"):
            server(url).meet(ConnectionPool())


def test_a_server_that_takes_too_long_is_given_up(stand_in: StandIn, weights: Path) -> None:
    made = ready(stand_in, weights, timeout=1.0)
    stand_in.delay = 3.0
    with pytest.raises(ServerError, match=r"did not answer within 1 s .*raise \[generate\] timeout"):
        answered(made, [Request((5, 6), limit=2)])


@pytest.mark.parametrize(
    ("options", "model", "says"),
    [
        (
            {"max_model_len": 50},
            None,
            r"takes 50 tokens at the most, and the stage's context is 96 \(start it with --max-model-len 96\)",
        ),
        ({"names": ("other",)}, "policy", "serves other, not 'policy'"),
        ({"names": ()}, None, "serves nothing"),
        ({"developing": False}, None, "has no such endpoint .*VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_serves_something_else_is_told_of(options: Any, model: str | None, says: str, weights: Path) -> None:
    made = StandIn(**({"max_model_len": CONTEXT} | options))
    try:
        with pytest.raises(ServerError, match=says):
            ready(made, weights, model=model)
    finally:
        made.close()


# Runs


def policy_run(recipe: Recipe, place: Path, name: str, url: str | None, timeout: float = 20.0, **given: Any) -> Path:
    """A short pretraining and PPO after it, with the own engine or by the server at the URL."""
    given = {"prompts": 16, "epochs": 1, "global_batch": 8, "micro_batch": 4, "lr": 1e-3} | given
    root = built(recipe, place, name, ppo(4, **given), every=2)
    if url is None:
        return root
    generate = Generate(engine="vllm", url=url, weights=str(place / "weights"), timeout=timeout)
    return write_recipe(root, msgspec.structs.replace(load_recipe(root / "recipe.toml"), generate=generate))


@pytest.fixture(scope="module")
def own(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a server, on one rank."""
    root = policy_run(recipe, tmp_path_factory.mktemp("own"), "own", None)
    steer(root, size=1)
    return root


def test_a_run_by_a_server_is_bit_for_bit_the_run_by_the_own_engine(recipe: Recipe, stand_in: StandIn, tmp_path: Path) -> None:
    own, served = policy_run(recipe, tmp_path, "own", None), policy_run(recipe, tmp_path, "served", stand_in.url)
    steer(own)
    told = steer(served)
    assert same_bits(own / "checkpoints" / "16-1-policy", served / "checkpoints" / "16-1-policy")
    assert max(series(told, "policy/logprob_mismatch")) < 1e-4
    assert stand_in.asked
    assert len(stand_in.loaded) == stand_in.resets == len({*stand_in.loaded})
    left = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert left == ["latest", stand_in.loaded[-1].name]
    assert (tmp_path / "weights" / "latest").resolve() == stand_in.loaded[-1]
    assert (stand_in.loaded[-1] / "tokenizer.json").exists()


Load = Callable[[Path], None]


def taking_nothing(stand_in: StandIn, load: Load) -> Load:
    """From the second reload on says that it loaded, and did not."""
    return lambda directory: None if stand_in.loaded else load(directory)


def keeping_its_head(stand_in: StandIn, load: Load) -> Load:
    """The same of its output layer alone, as vLLM does where a tied model's file has none."""

    def part(directory: Path) -> None:
        assert stand_in.loaded or stand_in.decoder is None
        old = None if stand_in.decoder is None else stand_in.decoder.state_dict()["head.weight"]
        load(directory)
        assert stand_in.decoder is not None and stand_in.engine is not None
        if old is not None:
            weights = stand_in.decoder.state_dict() | {"head.weight": old}
            stand_in.decoder.load_state_dict(weights)
            stand_in.engine.refresh(weights.items(), len(stand_in.loaded))

    return part


@pytest.mark.parametrize(("fault", "lr"), [(taking_nothing, 1e-3), (keeping_its_head, 1e-5)])
def test_a_reload_that_did_not_take_is_found_before_anything_is_drawn(
    fault: Callable[[StandIn, Load], Load], lr: float, own: Path, recipe: Recipe, stand_in: StandIn, tmp_path: Path
) -> None:
    """The difference is far below `rollout.mismatch`. Once the server takes the weights, the run goes on as if nothing had been."""
    root, load = policy_run(recipe, tmp_path, "run", stand_in.url, lr=lr), stand_in.load
    stand_in.load = fault(stand_in, load)  # type: ignore[method-assign]
    ranks = start_ranks(root, 1, steered, [], fresh())
    try:
        until(lambda: bool(alarms(root)))
        drawn = [body for body in stand_in.asked if "prompt_logprobs" not in body]
        copies = sorted(path.name for path in (tmp_path / "weights").iterdir())
        stand_in.load = load  # type: ignore[method-assign]
        assert ranks.wait() == [0], logs(root)
    finally:
        ranks.kill()
    assert "answers with other weights than it was told to load" in alarms(root)[0]
    assert len({body["seed"] for body in drawn}) == 16 + 2  # of the first rollout and an evaluation
    assert len(copies) <= 3
    assert max(series(Told.read(root), "policy/logprob_mismatch")) < 1e-4
    assert lr != 1e-3 or same_bits(own / "checkpoints" / "16-1-policy", root / "checkpoints" / "16-1-policy")


def test_responses_that_are_not_the_policys_are_not_learned_from(
    own: Path, recipe: Recipe, stand_in: StandIn, tmp_path: Path
) -> None:
    """The server scores prompts by the new weights and draws with older ones, as one that caches would."""
    root, load = policy_run(recipe, tmp_path, "run", stand_in.url, mismatch=1e-3), stand_in.load

    def once(directory: Path) -> None:
        engine = stand_in.engine
        load(directory)
        if len(stand_in.loaded) == 2:
            stand_in.engine = engine

    stand_in.load = once  # type: ignore[method-assign]
    steer(root, Step(Op.RESUME, phase="paused", looks=10), size=1)
    assert "engine and trainer differ by" in alarms(root)[0]
    assert same_bits(own / "checkpoints" / "16-1-policy", root / "checkpoints" / "16-1-policy")


def alarms(root: Path) -> list[str]:
    return [note["text"] for note in Told.read(root).all("Note") if note["level"] == "alarm"]


def mended_when_paused(root: Path, says: str, port: int) -> None:
    """Resumes once the alarm has been told and somebody listens at the port again."""

    def look() -> None:
        while not any(says in note["text"] for note in Told.read(root).all("Note")):
            time.sleep(0.05)
        (root / "alarmed").touch()

    threading.Thread(target=look, daemon=True).start()
    steered(root, [Step(Op.RESUME, phase="paused", looks=60)], fresh())


def test_a_run_whose_server_is_away_waits_and_goes_on_when_it_is_there(
    own: Path, recipe: Recipe, stand_in: StandIn, tmp_path: Path
) -> None:
    """At the first attempt nobody has started it; later it dies while it answers. Nothing of that shows in the weights."""
    root = policy_run(recipe, tmp_path, "run", stand_in.url)
    stand_in.close()
    ranks = start_ranks(root, 1, mended_when_paused, "cannot be asked", stand_in.port)
    try:
        until(lambda: (root / "alarmed").exists())
        alarm = [note["text"] for note in Told.read(root).all("Note") if note["level"] == "alarm"]
        assert f"{stand_in.url}/v1/models" in alarm[0]
        assert f"start it with {tmp_path / 'weights' / 'latest'}" in alarm[0]
        assert (tmp_path / "weights" / "latest" / "model.safetensors").exists()
        stand_in.start(stand_in.port)
        assert ranks.wait() == [0], logs(root)
    finally:
        ranks.kill()
    assert same_bits(own / "checkpoints" / "16-1-policy", root / "checkpoints" / "16-1-policy")


def test_answers_that_break_off_pause_the_run_and_nothing_is_lost(
    own: Path, recipe: Recipe, stand_in: StandIn, tmp_path: Path
) -> None:
    root, count = policy_run(recipe, tmp_path, "run", stand_in.url), [0]

    def breaking(answer: dict[str, Any]) -> Any:
        count[0] += 1
        return [answer] if count[0] == 21 else answer  # of the second rollout

    stand_in.tamper = breaking
    told = steer(root, Step(Op.RESUME, phase="paused", looks=10), size=1)
    assert [note for note in told.all("Note") if "cannot be asked" in note["text"] and note["level"] == "alarm"]
    assert same_bits(own / "checkpoints" / "16-1-policy", root / "checkpoints" / "16-1-policy")


def test_a_pause_holds_while_the_server_writes_and_changes_no_bit(recipe: Recipe, stand_in: StandIn, tmp_path: Path) -> None:
    own, held = policy_run(recipe, tmp_path, "own", None), policy_run(recipe, tmp_path, "held", stand_in.url)
    steer(own)
    stand_in.delay = 0.5
    told = steer(held, Step(Op.PAUSE, phase="generating"), Step(Op.RESUME, looks=10))
    assert told.outcome(1)["ok"]
    assert same_bits(own / "checkpoints" / "16-1-policy", held / "checkpoints" / "16-1-policy")


def test_a_stop_now_does_not_wait_for_the_server(recipe: Recipe, stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.delay = 60.0
    root = policy_run(recipe, tmp_path, "run", stand_in.url, timeout=100.0)
    began = time.monotonic()
    told = steer(root, Step(Op.STOP_NOW, phase="sampling", looks=3), size=1)
    assert told.all("Ended")[-1]["cause"] == "stopped-now"
    assert time.monotonic() - began < 45


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


# Recipes

BASE = """
[run]
name = "r"
[model]
num_layers = 2
hidden_size = 32
num_heads = 4
{model}
[data]
[[data.source]]
name = "docs"
kind = "text"
origin = "stdlib-docs"
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 1
context = 32
global_batch = 1
mixture = {{docs = 1}}
[generate]
"""


@pytest.mark.parametrize(
    ("lines", "model", "says"),
    [
        ('engine = "vllm"', "", "needs url"),
        ('engine = "vllm"\nurl = "gpu9:8000"\nweights = "w"', "", "'gpu9:8000' is not of the form http://HOST:PORT"),
        ('engine = "vllm"\nurl = "http://gpu9:99999"\nweights = "w"', "", "is not of the form"),
        ('engine = "vllm"\nurl = "http://gpu9:8000"', "", "needs weights"),
        ('engine = "vllm"\nurl = "http://gpu9:8000"\nweights = "w"\ntimeout = 0', "", "timeout: must be greater than 0"),
        ('url = "http://gpu9:8000"', "", 'url: is of a server (set engine = "vllm", or leave it out)'),
        ('engine = "vllm"\nurl = "http://gpu9:8000"\nweights = "w"', 'position = "none"', "has no model like this one"),
        ('engine = "vllm"\nurl = "http://gpu9:8000"\nweights = "w"', 'mlp = "gelu"', "mlp is gelu, not swiglu"),
    ],
)
def test_a_recipe_that_cannot_be_served_says_why(lines: str, model: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(BASE.format(model=model) + lines)
    assert says in str(error.value)


def test_weights_are_named_from_the_recipes_directory(tmp_path: Path) -> None:
    lines = 'engine = "vllm"\nurl = "http://gpu9:8000"\nweights = "w"'
    assert parse_recipe(BASE.format(model="") + lines, base=tmp_path).generate.weights == str(tmp_path / "w")
