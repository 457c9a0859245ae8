"""One turn of fine-tuning or DPO, or of PPO: `python -m bench._tuners NAME OBJECTIVE ROOT STEPS RESULT`, on one core, one thread.

ROOT has a recipe and its shards. TRL gets the very documents that Midwatch packs into its rows, as ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench._ranks import leave_after


def midwatch(objective: str, root: Path, steps: int) -> dict[str, Any]:
    """The trainer's own loop; there is nobody at the link's other end but for who commits what PPO begins with."""
    import gc

    from midwatch.protocol import Lineage, Metrics, RankBody, Start
    from midwatch.recipe import load_recipe
    from trainer.control.standalone import LogLink
    from trainer.distributed.mesh import join, open_store, settle
    from trainer.loop.loop import boundary, step
    from trainer.loop.stage_end import end_stage
    from trainer.stage.training import Training

    told: list[dict[str, float]] = []

    class Listening(LogLink):
        def send(self, body: RankBody) -> None:
            super().send(body)
            if isinstance(body, Metrics):
                told.append(body.values)

    recipe = load_recipe(root / f"{objective}.toml")
    settle(recipe.cluster)
    world = join(open_store(), "bench", recipe.cluster, recipe.parallel)
    start = Start(generation=1, term=1, lineage=Lineage(id=1))
    training = Training(recipe, root / objective, root / "data", world, Listening(root / objective, 100), start)
    training.open(start)
    while training.stage.stage.name != objective:  # what PPO begins with
        boundary(training)
        end_stage(training) if training.stage_is_over else step(training)
    gc.collect()
    gc.freeze()
    wall, cpu, tokens = [time.perf_counter()], [time.process_time()], []
    for _ in range(steps):
        boundary(training)
        at = training.progress.position
        step(training)
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        if objective != "ppo":
            tokens.append(int((training.stage.feed.read(at, training.progress.position).segments >= 0).sum()))
    training.reporter.flush()
    training.close()
    first = next((values["train/loss"] for values in told if "train/loss" in values), 0.0)
    return {"wall": wall, "cpu": cpu, "tokens": tokens, "first_loss": first, "told": told if objective == "ppo" else []}


def documents(objective: str, root: Path, steps: int) -> tuple[list[dict[str, list[int]]], int, Any]:
    """What Midwatch's first steps read, document by document, how many a step there are, and the tokenizer."""
    from midwatch.recipe import load_recipe
    from shards.tokenization.tokenizer import FILE_NAME, Tokenizer
    from trainer.stage.stage import open_stage

    recipe = load_recipe(root / f"{objective}.toml")
    run = open_stage(recipe, root / "data", 0, None)
    stage = recipe.stage[0]
    batch = run.feed.read(0, steps * stage.global_batch)
    # `mask` marks targets, each the token after; a document's own mask is one later.
    found: list[dict[str, list[int]]] = []
    for tokens, mask, segments in zip(batch.tokens, batch.mask, batch.segments, strict=True):
        for number in range(int(segments.max()) + 1):
            places = np.flatnonzero(segments == number)
            counts = np.concatenate([[0], mask[places][:-1]])
            found.append({"ids": tokens[places].tolist(), "counts": (counts > 0).tolist()})
    a_step = stage.global_batch if objective == "dpo" else max(1, round(len(found) / steps))
    run.close()
    return found, a_step, Tokenizer.load(root / "data" / FILE_NAME)


def trl(objective: str, root: Path, steps: int) -> dict[str, Any]:
    """SFTTrainer and DPOTrainer with settings that ask for the same."""
    import copy

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from midwatch.recipe import load_recipe
    from trainer.huggingface import tokenizer as hf_tokenizer

    torch.set_num_threads(1)
    recipe = load_recipe(root / f"{objective}.toml")
    model, stage = recipe.model, recipe.stage[0]
    found, a_step, own = documents(objective, root, steps)
    place = root / "trl"
    place.mkdir(exist_ok=True)
    for name, body in hf_tokenizer.files(own, stage.context).items():
        (place / name).write_bytes(body)
    tokenizer = AutoTokenizer.from_pretrained(place)
    wall, cpu, tokens, losses = [], [], [], []

    class Watching:
        def training_step(self, network: Any, inputs: Any, *arguments: Any, **more: Any) -> Any:
            if not wall:
                wall.append(time.perf_counter())
                cpu.append(time.process_time())
            tokens.append(int(inputs["attention_mask"].sum()))
            loss = super().training_step(network, inputs, *arguments, **more)  # type: ignore[misc]  # of the class it is mixed into
            if not losses:
                losses.append(float(loss))
            return loss

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # its columns are what the collator takes

    class Ends(TrainerCallback):  # type: ignore[misc]  # the class is untyped here
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall.append(time.perf_counter())
            cpu.append(time.process_time())

    set_seed(1)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=own.vocab,
            hidden_size=model.hidden_size,
            intermediate_size=model.hidden_width,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.key_value_heads,
            max_position_embeddings=stage.context,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            bos_token_id=own.bos,
            eos_token_id=own.eos,
            pad_token_id=own.pad,
        )
    )
    settings: dict[str, Any] = {
        "output_dir": str(place / "out"),
        "per_device_train_batch_size": a_step,
        "max_steps": steps,
        "learning_rate": stage.lr,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "optim": "adamw_torch_fused",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
    }
    if objective == "sft":

        class Tuning(Watching, SFTTrainer):  # type: ignore[misc]  # the class is untyped here
            pass

        labels = [[id if counts else -100 for id, counts in zip(each["ids"], each["counts"], strict=True)] for each in found]
        rows = Dataset.from_dict({"input_ids": [each["ids"] for each in found], "labels": labels})
        kind, more = SFTConfig(**settings), {}
    else:

        class Tuning(Watching, DPOTrainer):  # type: ignore[misc,no-redef]  # untyped, and one or the other
            pass

        half = len(found) // 2
        columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for chosen, rejected in zip(found[:half], found[half:], strict=True):
            begin = chosen["counts"].index(True)
            columns["prompt_ids"].append(chosen["ids"][:begin])
            columns["chosen_ids"].append(chosen["ids"][begin:])
            columns["rejected_ids"].append(rejected["ids"][begin:])
        rows = Dataset.from_dict(columns)
        kind, more = DPOConfig(**settings, beta=stage.settings.beta), {"ref_model": copy.deepcopy(network)}
    Tuning(model=network, args=kind, train_dataset=rows, processing_class=tokenizer, callbacks=[Ends()], **more).train()
    return {"wall": wall, "cpu": cpu, "tokens": tokens, "first_loss": losses[0]}


def main() -> None:
    name, objective, root, steps, result = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    Path(result).write_text(json.dumps({"midwatch": midwatch, "trl": trl}[name](objective, Path(root), int(steps))))


if __name__ == "__main__":
    leave_after(main)
