"""Makes the frozen numbers beside it: what TRL, verl and OpenRLHF answer to random ragged inputs.

    python tests/trainer/frozen/make.py      # where trl==1.16.0, verl==0.9.1 and openrlhf==0.11.2 are installed (--no-deps will do)

Their functions are called as they are. What their modules import besides (ray, deepspeed and the like) may be missing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

UNUSED = ("aiohttp", "codetiming", "deepspeed", "flash_attn", "orjson", "pylatexenc", "ray", "torchdata", "vllm", "wandb")
ROWS, TIME = 6, 7


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that nothing called here needs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__name__, module.__spec__, module.__path__, module.__version__ = spec.name, spec, [], "0"
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        return None


def masks() -> dict[str, Tensor]:
    """[rows, time], the same lengths, an empty response among them, in four layouts."""
    lengths = [4, 2, 0, 3, 1, 4]
    found = {name: torch.zeros(ROWS, TIME) for name in ("right", "left", "both", "holes")}
    for row, length in enumerate(lengths):
        found["right"][row, :length] = 1
        found["left"][row, TIME - length :] = 1
        found["both"][row, 2 : 2 + length] = 1
        found["holes"][row, [0, 2, 3, 6][:length]] = 1
    return found


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Of three decimals, so that the files stay small."""
    return (torch.randn(shape, dtype=torch.float64) * scale).round(decimals=3)


def log_probs(*shape: int) -> tuple[Tensor, Tensor]:
    """Of two policies that are not far from each other, of which some tokens are."""
    one = -normal(*shape).abs() - 0.1
    return one, (one + normal(*shape, scale=0.4)).round(decimals=3)


class Cases:
    """Of one package."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[dict[str, Any]] = []

    def add(self, function: str, inputs: dict[str, Any], answer: Any, by: Sequence[str] = ()) -> None:
        """answer: name to number or tensor; of "loss" the gradients by the inputs named are noted too."""
        if by:
            gradients = torch.autograd.grad(answer["loss"], [inputs[name] for name in by])
            answer |= {f"gradient_{name}": each for name, each in zip(by, gradients, strict=True)}
        self.found.append({"function": function, "inputs": plain(inputs), "outputs": plain(answer)})

    def write(self) -> None:
        text = {"package": self.package, "version": version(self.package), "cases": self.found}
        lines = json.dumps(text, separators=(",", ":")).replace('{"function"', '\n{"function"')
        Path(__file__).with_name(f"{self.package}.json").write_text(lines + "\n")


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: plain_value(value) for name, value in values.items() if value is not None}


def plain_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return plain_value(value.detach().tolist())
    if isinstance(value, list):
        return [plain_value(each) for each in value]
    return round(value, 10) if isinstance(value, float) else value


def free(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def verl() -> Cases:
    algorithms: Any = importlib.import_module("verl.trainer.ppo.core_algos")
    functional: Any = importlib.import_module("verl.utils.torch_functional")
    cases = Cases("verl")
    for layout, mask in masks().items():
        for gamma, lam in ((1.0, 0.95), (0.9, 0.8)):
            rewards, values = normal(ROWS, TIME), normal(ROWS, TIME)
            advantages, returns = algorithms.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
            inputs = {"rewards": rewards, "values": values, "mask": mask, "gamma": gamma, "lam": lam, "layout": layout}
            cases.add("compute_gae_advantage_return", inputs, {"whitened": advantages, "returns": returns})
        x = normal(ROWS, TIME, scale=3) + 2
        cases.add("masked_whiten", {"x": x, "mask": mask}, {"whitened": functional.masked_whiten(x, mask)})
        for mode in ("token-mean", "seq-mean-token-mean"):
            new, old = log_probs(ROWS, TIME)
            new, advantages = free(new), normal(ROWS, TIME)
            inputs = {"log_probs": new, "old": old, "advantages": advantages, "mask": mask, "clip": 0.2, "mode": mode}
            # Without the second clip of "dual-clip PPO", which is not asked for.
            never = 1e9
            found, fraction, _, _ = algorithms.compute_policy_loss(
                old, new, advantages, mask, cliprange=0.2, clip_ratio_c=never, loss_agg_mode=mode
            )
            cases.add("compute_policy_loss", inputs, {"loss": found, "clip_fraction": fraction}, ["log_probs"])
        values, old, returns = free(normal(ROWS, TIME)), normal(ROWS, TIME), normal(ROWS, TIME)
        found, fraction = algorithms.compute_value_loss(values, returns, old, mask, 0.3)
        inputs = {"values": values, "old": old, "returns": returns, "mask": mask, "clip": 0.3}
        cases.add("compute_value_loss", inputs, {"loss": found, "clip_fraction": fraction}, ["values"])
    for function in ("compute_grpo_outcome_advantage", "compute_rloo_outcome_advantage"):
        scores, mask = normal(12), torch.ones(12, 1)
        groups = np.repeat(np.arange(3), 4)
        found, _ = getattr(algorithms, function)(scores[:, None].clone(), mask, groups)
        cases.add(function, {"scores": scores, "group": 4}, {"advantages": found[:, 0]})
    for estimator in ("k1", "k2", "k3"):
        policy, reference = log_probs(ROWS, TIME)
        policy = free(policy)
        found = algorithms.kl_penalty(policy, reference, estimator)
        inputs = {"policy": policy, "reference": reference, "estimator": estimator}
        cases.add("kl_penalty", inputs, {"kl": found, "loss": found.sum()}, ["policy"])
    controlled(cases, algorithms.AdaptiveKLController)
    return cases


def openrlhf() -> Cases:
    losses: Any = importlib.import_module("openrlhf.models.loss")
    utils: Any = importlib.import_module("openrlhf.models.utils")
    maker: Any = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    control: Any = importlib.import_module("openrlhf.trainer.ppo_utils.kl_controller")
    cases = Cases("openrlhf")
    for layout, mask in masks().items():
        for by_token in (True, False):
            new, old = log_probs(ROWS, TIME)
            new, advantages = free(new), normal(ROWS, TIME)
            clipped = losses.PolicyLoss(0.2, 0.2, token_level_loss=by_token)
            found, fraction, *_ = clipped(new, old, advantages, mask)
            mode = "token-mean" if by_token else "seq-mean-token-mean"
            inputs = {"log_probs": new, "old": old, "advantages": advantages, "mask": mask, "clip": 0.2, "mode": mode}
            cases.add("PolicyLoss", inputs, {"loss": found, "clip_fraction": fraction}, ["log_probs"])
        values, old, returns = free(normal(ROWS, TIME)), normal(ROWS, TIME), normal(ROWS, TIME)
        inputs = {"values": values, "old": old, "returns": returns, "mask": mask, "clip": 0.3}
        cases.add("ValueLoss", inputs, {"loss": losses.ValueLoss(0.3)(values, old, returns, mask)}, ["values"])
        scores, kl = normal(ROWS), normal(ROWS, TIME)
        found = utils.compute_reward(scores, 0.05, kl, mask)
        cases.add("compute_reward", {"scores": scores, "kl": kl, "mask": mask, "beta": 0.05}, {"rewards": found})
        # It takes the value before a masked token for followed by 0, so its answer is another one where there are holes.
        if layout != "holes":
            rewards, values = normal(ROWS, TIME), normal(ROWS, TIME)
            run = maker.RemoteExperienceMaker.get_advantages_and_returns
            advantages, returns = run(None, values, rewards, mask, 0.9, 0.8)
            inputs = {"rewards": rewards, "values": values, "mask": mask, "gamma": 0.9, "lam": 0.8, "layout": layout}
            cases.add("get_advantages_and_returns", inputs, {"advantages": advantages, "returns": returns})
    for estimator in ("k1", "k2", "k3"):
        policy, reference = log_probs(ROWS, TIME)
        found = utils.compute_approx_kl(policy, reference, kl_estimator=estimator)
        cases.add("compute_approx_kl", {"policy": policy, "reference": reference, "estimator": estimator}, {"kl": found})
    for margin in (0.0, 0.7):
        scores = free(normal(8, scale=2))
        found = losses.PairWiseLoss()(*scores.chunk(2), margin)
        cases.add("PairWiseLoss", {"scores": scores, "margin": margin}, {"loss": found}, ["scores"])
    for kind, beta, smoothing in (("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.1, 0.0), ("ipo", 0.5, 0.0)):
        policy, reference = free(-normal(8, scale=5).abs() - 5), -normal(8, scale=5).abs() - 5
        chosen, rejected = policy.chunk(2)
        found, *rewards = losses.DPOLoss(beta, smoothing, kind == "ipo")(chosen, rejected, *reference.chunk(2))
        inputs = {"policy": policy, "reference": reference, "beta": beta, "label_smoothing": smoothing, "kind": kind}
        answer = {"loss": found, "chosen_reward": rewards[0].mean(), "rejected_reward": rewards[1].mean()}
        cases.add("DPOLoss", inputs, answer, ["policy"])
    controlled(cases, control.AdaptiveKLController)
    return cases


def controlled(cases: Cases, controller: Callable[[float, float, float], Any]) -> None:
    """A KL coefficient after each of a few measurements."""
    each, found = controller(0.1, 6.0, 1000.0), []
    for kl in (0.5, 5.9, 6.3, 7.1, 40.0):
        each.update(kl, 64)
        found.append(float(each.value))
    inputs = {"beta": 0.1, "target": 6.0, "horizon": 1000.0, "count": 64, "kl": [0.5, 5.9, 6.3, 7.1, 40.0]}
    cases.add("AdaptiveKLController", inputs, {"beta": found})


def trl() -> Cases:
    cases = Cases("trl")
    dpo: Any = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer
    reward: Any = importlib.import_module("trl.trainer.reward_trainer").RewardTrainer
    grpo: Any = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    for mask in masks().values():
        # No pair of which one response is empty: it has a mean over such pairs as well.
        full = mask[[0, 1, 3, 4, 5, 0]]
        for kind, normalised in (("sigmoid", False), ("ipo", True), ("sigmoid", True)):
            policy, reference = log_probs(ROWS, TIME)
            # A model's log-probabilities are 0 outside of the response, as labels tell it where that is.
            policy, reference = free(policy), reference * full
            trainer = trl_trainer(
                loss_types=[f"{kind}_norm" if normalised and kind == "sigmoid" else kind],
                loss_weights=[1.0],
                f_divergence_type="reverse_kl",
                precompute_ref_logps=True,
                use_weighting=False,
                ld_alpha=None,
                beta=0.2,
            )
            out = SimpleNamespace(**dict.fromkeys(("entropy", "mean_logits"), torch.zeros(ROWS, TIME)))
            out.log_probs, out.is_top1 = policy * full, torch.zeros(ROWS, TIME, dtype=torch.bool)
            # Its mask is of inputs: one more token, the first, than there are targets.
            given = torch.cat([torch.zeros(ROWS, 1), full], 1)
            asked = {"completion_mask": given, "input_ids": given.long(), "attention_mask": given}
            asked["ref_chosen_logps"], asked["ref_rejected_logps"] = reference.sum(-1).chunk(2)
            found = dpo._compute_loss(trainer, lambda out=out, **_: out, asked, False)
            inputs = {"policy": policy, "reference": reference, "mask": full, "beta": 0.2, "kind": kind, "normalised": normalised}
            metrics = trainer._metrics["train"]
            answer = {"loss": found, "margin": metrics["rewards/margins"][0], "accuracy": metrics["rewards/accuracies"][0]}
            cases.add("DPOTrainer._compute_loss", inputs, answer, ["policy"])
        for name in ("bnpo", "grpo"):
            new, old = log_probs(ROWS, TIME)
            new, reference, advantages = free(new), (old + normal(ROWS, TIME, scale=0.3)).round(decimals=3), normal(ROWS)
            trainer = trl_trainer(
                loss_type=name,
                beta=0.04,
                epsilon_low=0.2,
                epsilon_high=0.2,
                importance_sampling_level="token",
                top_entropy_quantile=1.0,
                off_policy_mask_threshold=None,
                use_vllm=False,
                current_gradient_accumulation_steps=1.0,
                _entropy_bonus_enabled=False,
                _get_per_token_logps_and_entropies=lambda *_, out=new, **__: (out, torch.zeros_like(out), None),
                args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
            )
            nothing = torch.zeros(ROWS, 0)
            asked = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask, "completion_mask": mask}
            asked |= {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference}
            found = grpo._compute_loss(trainer, None, asked)
            if name == "grpo":
                # It counts empty responses as responses that lost nothing; here they are no responses.
                found = found * ROWS / (mask.sum(-1) > 0).sum()
            inputs = {"log_probs": new, "old": old, "reference": reference, "advantages": advantages, "mask": mask}
            inputs |= {"beta": 0.04, "clip": 0.2, "normalisation": "token" if name == "bnpo" else "sequence"}
            answer = {"loss": found, "kl": trainer._metrics["train"]["kl"][0]}
            cases.add("GRPOTrainer._compute_loss", inputs, answer, ["log_probs"])
    for margin, centre in ((0.0, 0.0), (0.7, 0.0), (0.3, 0.01)):
        scores = free(normal(8, scale=2))
        trainer = trl_trainer(args=SimpleNamespace(center_rewards_coefficient=centre or None))
        asked = {"attention_mask": torch.ones(8), "margin": torch.full((4,), margin, dtype=torch.float64)}
        found = reward.compute_loss(trainer, lambda out=scores, **_: SimpleNamespace(logits=out[:, None]), asked)
        answer = {
            "loss": found,
            "accuracy": trainer._metrics["train"]["accuracy"][0],
            "margin": trainer._metrics["train"]["margin"][0],
        }
        cases.add("RewardTrainer.compute_loss", {"scores": scores, "margin": margin, "centre": centre}, answer, ["scores"])
    kahneman_tversky(cases)
    return cases


def kahneman_tversky(cases: Cases) -> None:
    kto: Any = importlib.import_module("trl.trainer.kto_trainer").KTOTrainer
    mixed, alike = torch.tensor([True, False, True, False, False, True]), torch.ones(ROWS, dtype=torch.bool)
    for far, labels, weights in (
        (0.5, mixed, (1.0, 1.0)),
        (-0.5, mixed, (1.0, 1.0)),
        (0.5, mixed, (1.33, 0.5)),
        (0.1, alike, (2.0, 1.0)),
    ):
        mask = masks()["both"][[0, 1, 3, 4, 5, 0]]
        policy, reference = log_probs(ROWS, TIME)
        policy, reference = free(policy), reference * mask
        # Log-probabilities of mismatched responses; the reference point is the mean of their differences, or 0.
        apart = -normal(ROWS, scale=5).abs() - 5
        apart_reference = (apart - far + normal(ROWS, scale=0.2)).round(decimals=3)
        trainer = trl_trainer(
            loss_type="kto",
            calculate_KL=True,
            precompute_ref_logps=True,
            beta=0.2,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            _compute_kl_logps=lambda *_, out=apart: out,
        )
        out = SimpleNamespace(**dict.fromkeys(("entropy", "mean_logits"), torch.zeros(ROWS, TIME)))
        out.log_probs = policy * mask
        # Its mask is of inputs: one more token, the first, than there are targets.
        given = torch.cat([torch.zeros(ROWS, 1), mask], 1)
        asked = {"completion_mask": given, "input_ids": given.long(), "attention_mask": given, "label": labels}
        asked |= {"ref_logps": reference.sum(-1), "ref_KL_logps": apart_reference}
        trainer.model = Answering(out)
        found = kto._compute_loss(trainer, trainer.model, asked, False)
        inputs = {"policy": policy, "reference": reference, "mask": mask, "desirable": labels.double(), "beta": 0.2}
        inputs |= {"mismatched": apart, "mismatched_reference": apart_reference}
        inputs |= {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        metrics = trainer._metrics["train"]
        answer = {"loss": found, "kl": metrics["kl"][0]}
        named = {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"}
        answer |= {name: metrics[key][0] for name, key in named.items() if metrics[key]}
        cases.add("KTOTrainer._compute_loss", inputs, answer, ["policy"])


class Answering:
    """A model whose output is given."""

    training = True

    def __init__(self, out: Any) -> None:
        self.out = out

    def __call__(self, **_: Any) -> Any:
        return self.out


def trl_trainer(**settings: Any) -> Any:
    """As much of a trainer on one rank as a loss looks at."""
    accelerator = MagicMock(device=torch.device("cpu"), num_processes=1)
    accelerator.gather_for_metrics = accelerator.gather = lambda x: x
    accelerator.reduce = lambda x, reduction: x
    trainer = SimpleNamespace(accelerator=accelerator, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1)
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


if __name__ == "__main__":
    sys.meta_path.append(Unused())
    for number, make in enumerate((verl, openrlhf, trl)):
        random.seed(number)
        torch.manual_seed(number)
        make().write()
