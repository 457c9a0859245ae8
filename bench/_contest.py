"""One contestant of the trainer's contest on a CPU: `python -m bench._contest NAME ROOT STEPS RESULT`.

Each trains the Llama of ROOT/recipe.toml on the tokens under ROOT, on one core and with one thread, and leaves the moment and the
process's CPU seconds at the end of every step, the losses of the first steps and its number of parameters. In the steps that are
timed each looks at the loss as often as it does by itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench._ranks import leave_after

FIRST_LOSSES = 3
"""Of the first steps, for telling whether all begin alike; they are not timed."""


class Stopwatch:
    """Ends of steps."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: dict[int, float] = {}

    def note(self, step: int, loss: Callable[[], float]) -> None:
        """After step number `step`, from 0."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if step < FIRST_LOSSES:
            self.losses[step] = loss()

    def found(self, parameters: int) -> dict[str, Any]:
        return {
            "parameters": parameters,
            "wall_at_step_seconds": self.wall,
            "cpu_at_step_seconds": self.cpu,
            "first_losses": [self.losses[step] for step in sorted(self.losses)],
        }


def midwatch(root: Path, steps: int) -> dict[str, Any]:
    """The trainer's own loop, boundary and metrics in it; there is nobody at the link's other end."""
    import gc

    from midwatch.protocol import Lineage, Metrics, RankBody, Start
    from midwatch.recipe import load_recipe
    from trainer.control.reporting import NoLink
    from trainer.distributed.mesh import join, open_store, settle
    from trainer.loop.loop import boundary, step
    from trainer.stage.training import Training

    watch = Stopwatch()

    class Listening(NoLink):
        def send(self, body: RankBody) -> None:
            if isinstance(body, Metrics) and body.step <= FIRST_LOSSES:
                watch.losses[body.step - 1] = body.values["train/loss"]

    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "bench", recipe.cluster, recipe.parallel)
    start = Start(generation=1, term=1, lineage=Lineage(id=1))
    training = Training(recipe, root, root / "data", world, Listening(), start)
    training.open(start)
    gc.collect()
    gc.freeze()
    for _ in range(steps):
        boundary(training)
        step(training)
        watch.note(FIRST_LOSSES, float)
    training.close()
    return watch.found(sum(parameter.numel() for parameter in training.model.parameters().values()))


def nanogpt(root: Path, steps: int) -> dict[str, Any]:
    """The plain loop."""
    import torch

    from bench._llama import train
    from midwatch.recipe import load_recipe

    torch.set_num_threads(1)
    recipe, watch = load_recipe(root / "recipe.toml"), Stopwatch()
    count = train(recipe.model, recipe.tokenizer.vocab, recipe.stage[0], root / "tokens.bin", steps, watch.note)
    return watch.found(count)


def transformers(root: Path, steps: int) -> dict[str, Any]:
    """`transformers.Trainer` with settings that ask for the same."""
    import numpy as np
    import torch
    from torch.utils.data import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from midwatch.recipe import load_recipe

    torch.set_num_threads(1)
    recipe, watch = load_recipe(root / "recipe.toml"), Stopwatch()
    model, stage = recipe.model, recipe.stage[0]
    tokens = np.memmap(root / "tokens.bin", dtype=np.uint16, mode="r")

    class Windows(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(tokens) // stage.context

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = torch.from_numpy(tokens[index * stage.context : (index + 1) * stage.context].astype(np.int64))
            return {"input_ids": row, "labels": row}

    class Watching(Trainer):  # type: ignore[misc]  # the class is untyped here
        def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
            self.newest: torch.Tensor = super().training_step(*arguments, **more)
            return self.newest

    class Ends(TrainerCallback):  # type: ignore[misc]  # the class is untyped here
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            watch.note(state.global_step - 1, lambda: float(trainer.newest) * trainer.args.gradient_accumulation_steps)

    set_seed(1)
    config = LlamaConfig(
        vocab_size=recipe.tokenizer.vocab,
        hidden_size=model.hidden_size,
        intermediate_size=model.hidden_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.key_value_heads,
        max_position_embeddings=stage.context,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    network = LlamaForCausalLM(config)
    settings = TrainingArguments(
        output_dir=str(root / "transformers"),
        per_device_train_batch_size=stage.micro_batch,
        gradient_accumulation_steps=stage.global_batch // stage.micro_batch,
        max_steps=steps,
        learning_rate=stage.lr,
        lr_scheduler_type="cosine",
        warmup_steps=stage.resolved_warmup_steps,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        adam_epsilon=stage.eps,
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Watching(model=network, args=settings, train_dataset=Windows(), callbacks=[Ends()])
    trainer.train()
    return watch.found(sum(parameter.numel() for parameter in network.parameters()))


def torchtitan(root: Path, steps: int) -> dict[str, Any]:
    """Its trainer has no way to run on a CPU (0.2.2): without an accelerator it sets a CUDA device, and that is tried here."""
    from torchtitan.tools import utils

    utils.device_module.set_device(f"{utils.device_type}:0")
    raise SystemExit("torchtitan's trainer takes the accelerator that is there; this is a contest of CPUs")


CONTESTANTS = {"midwatch": midwatch, "nanogpt": nanogpt, "transformers": transformers, "torchtitan": torchtitan}


def main() -> None:
    name, root, steps, result = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    Path(result).write_text(json.dumps(CONTESTANTS[name](Path(root), int(steps))))


if __name__ == "__main__":
    leave_after(main)
