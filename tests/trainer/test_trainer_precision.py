"""Numbers that were silently a little or wholly wrong: what rounding does to them, and what one sequence does to another."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from midwatch.recipe.model import Model
from trainer.generate import Engine, Request, sampling
from trainer.loop import loop
from trainer.model.decoder import Decoder
from trainer.model.logprobs import likelihood
from trainer.objectives import CRITIC
from trainer.objectives.loss import summed
from trainer.objectives.ppo import critic_metrics, value_loss

CONFIG = Model(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64)
VOCABULARY = 61
torch.set_num_threads(1)


def weights(config: Model = CONFIG) -> list[tuple[str, Tensor]]:
    model = Decoder(config, VOCABULARY)
    model.initialise(0)
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def test_pages_that_held_no_numbers_are_usable_again() -> None:
    """A policy that has become NaN is rolled back. What it left in the cache reached every later response."""
    good = weights()
    requests = [Request(tuple(range(1, 20)), 20, seed=seed) for seed in range(4)]
    engine = Engine(CONFIG, VOCABULARY, torch.device("cpu"), 64, page=16, running=4, step_tokens=8)
    engine.refresh(good, 1)
    before = engine.generate(requests)
    engine.refresh([(name, torch.full_like(values, math.nan)) for name, values in good], 2)
    assert (broken := engine.generate(requests)) is not None and math.isnan(broken[0].log_probs[0])
    engine.refresh(good, 3)
    after = engine.generate(requests)
    assert before is not None and after is not None
    assert [each.log_probs for each in after] == [each.log_probs for each in before]


def test_top_p_of_one_leaves_nothing_out_beside_a_request_that_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chances are float32, and may add up to more than 1: what was beyond 1 could not be drawn where another request has top-k."""
    source = torch.Generator().manual_seed(0)
    logits = (torch.randn(400, 5000, generator=source) * 2).sort(descending=True).values
    whole = (logits.log_softmax(-1).double().exp() * 2.0**52).long().sum(-1)
    logits = logits[int(whole.argmax())][None]
    monkeypatch.setattr(sampling, "uniform", lambda seeds, numbers: np.full(len(seeds), 1 - 2.0**-53))

    def drawn(*requests: Request) -> int:
        sequences: list[Any] = [SimpleNamespace(request=request, drawn=0) for request in requests]
        return sampling.sample_tokens(logits.expand(len(requests), -1), sequences).tokens[0]

    assert int(whole.max()) > 2**52
    assert drawn(Request((1,), 1)) == drawn(Request((1,), 1), Request((1,), 1, top_k=3)) == 4999


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.0, 1e-4), (3000.0, 1.0)])
def test_explained_variance_is_right_where_returns_hardly_differ(mean: float, deviation: float) -> None:
    """By the way that sums take in a step. In float32, 0.75 became 0.64 or NaN."""
    source = torch.Generator().manual_seed(0)
    returns = mean + deviation * torch.randn(64, 256, generator=source)
    values = returns + 0.5 * deviation * torch.randn(64, 256, generator=source)
    parts = list(zip(values.chunk(8), returns.chunk(8), strict=True))
    mask = torch.ones(8, 256)

    def loss(found: Tensor, rows: Any, settings: Any, extra: Any) -> Any:
        each, metrics = value_loss(found, found, extra, mask, math.inf)
        return summed(each, mask, metrics)

    network: Any = SimpleNamespace(
        speaks=True, backward=lambda rows, loss_of: [loss_of(at, each) for at, (each, _) in enumerate(parts)]
    )
    student = loop.TrainableObjective(
        SimpleNamespace(network=network), SimpleNamespace(loss=loss, metrics=CRITIC.metrics, by_token=False), ""
    )  # type: ignore[arg-type]
    training: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cpu")), progress=SimpleNamespace(settings={}))
    lesson: Any = SimpleNamespace(parts=parts, held=[given for _, given in parts], weight=values.numel())
    sums = loop._gradients(training, student, lesson)[1 : 1 + len(CRITIC.metrics)].tolist()
    found = critic_metrics({name: each / values.numel() for name, each in zip(CRITIC.metrics, sums, strict=True)})
    exact = 1 - float((returns - values).double().var(correction=0) / returns.double().var(correction=0))
    assert found["value/explained_variance"] == pytest.approx(exact, abs=1e-3)
    assert found["value/return"] == pytest.approx(mean, abs=0.02 * max(1, mean))


def test_a_temperature_divides_logits_that_are_rounded_as_the_engines_are() -> None:
    """bfloat16 at temperature 0.3. What the output layer takes was divided, which rounded it again, by 0.03 nats a token."""
    config = Model(num_layers=1, hidden_size=256, num_heads=4, num_kv_heads=2, intermediate_size=64, dtype="bfloat16")
    source = torch.Generator().manual_seed(0)
    model = Decoder(config, 4000).bfloat16()
    model.initialise(0)
    with torch.no_grad():
        model.embedding.weight.normal_(0, 0.2, generator=source)
    tokens = torch.randint(0, 4000, (1, 64), generator=source)
    rest = torch.arange(64)[None], torch.zeros_like(tokens)
    targets = torch.randint(0, 4000, (1, 64), generator=source)
    with torch.no_grad():
        logits: Tensor = model(tokens, *rest)
        model.temperature = 0.3
        expected = (logits / 0.3).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        assert torch.equal(model(tokens, *rest, targets), expected)
        assert torch.equal(model(tokens, *rest, targets, True)[..., 0], expected)
        assert torch.equal(model(tokens, *rest), logits / 0.3)


@pytest.mark.parametrize("tile", [7, 4096])
def test_the_gradient_at_a_temperature_is_that_of_the_formula(tile: int) -> None:
    source = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((2, 10, 8), (30, 8)))
    targets = torch.randint(0, 30, (2, 10), generator=source)
    scale = torch.randn(2, 10, generator=source)
    given = [each.clone().requires_grad_() for each in (x, weight)]
    (likelihood(given[0], given[1], targets, tile, temperature=0.7) * scale).sum().backward()
    exact = [each.clone().requires_grad_() for each in (x, weight)]
    every = (exact[0] @ exact[1].t() / 0.7).log_softmax(-1)
    (every.gather(-1, targets[..., None])[..., 0] * scale).sum().backward()
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_scores_are_not_rounded_to_bfloat16() -> None:
    """Of a reward or value model in bfloat16, whose scores lie around 30: they were multiples of 1/8."""
    config = Model(num_layers=1, hidden_size=256, num_heads=4, num_kv_heads=2, intermediate_size=64, dtype="bfloat16")
    model = Decoder(config, VOCABULARY, scalar=True).bfloat16()
    model.initialise(0)
    assert model.score is not None and model.norm is not None
    kept: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, given, out: kept.append(out))
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        model.score.weight.mul_(30)
        found = model(tokens, torch.arange(60)[None], torch.zeros_like(tokens))
        exact = (kept[0].double() @ model.score.weight.double().t())[..., 0]
    assert found.dtype == torch.float32 and float(exact.abs().max()) > 16
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
