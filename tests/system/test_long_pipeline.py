"""The long pipeline as recipes/long.toml has it, at 1:512, from a Hugging Face directory to another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from midwatch.recipe import Recipe, dump_recipe, load_recipe
from shards.format import manifest
from shards.readers.stdlib import files
from shards.tokenization.tokenizer import train
from tests.hugging_face import LLAMA, RECIPES, at_hand
from tests.miniature import miniature
from tests.system.harness import Run

transformers = pytest.importorskip("transformers")

LENGTH = 512
SOURCES = {
    "books": {"origin": "stdlib-code", "max_documents": 30},
    "web": {"origin": "stdlib-topics", "max_documents": 80},
    "chat": {"origin": "stdlib-sft", "max_documents": 300},
    "long-chat": {"origin": "stdlib-sft", "max_documents": 400},
}


def random_llama(place: Path) -> None:
    """A tiny one of Llama 3.1's kind in the place of the large one, with a tokenizer of its own."""
    scaling = dict(LLAMA["rope_scaling"], original_max_position_embeddings=8192 // LENGTH)  # type: ignore[call-overload]
    config = transformers.LlamaConfig(
        vocab_size=520,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131_072 // LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters=scaling | {"rope_theta": 500_000.0},
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config)
    (place / "model.safetensors").unlink()
    model.save_pretrained(place)
    (place / "tokenizer.model").write_bytes(train((path.read_text(errors="replace") for _, path in files()[:40]), vocab=512))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The pipeline at 1:512."""
    file = at_hand(RECIPES / "long.toml", tmp_path)
    random_llama(tmp_path / "Llama-3.1-8B")
    whole = load_recipe(file)
    return miniature(whole, SOURCES, length=LENGTH, steps=2, batch=2, rate=50.0)


def test_the_long_pipeline_at_1_to_512_ends_in_an_instruct_model_that_knows_what_it_is_made_from(
    recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    assert [stage.context for stage in recipe.stage] == [512, 1024, 2048, 64, 512, 2048]
    file = tmp_path / "long.toml"
    file.write_text(dump_recipe(recipe))
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr

    losses = run.rows("eval/books/loss")
    assert losses[-1].value < losses[0].value, "the base is random, and a text is better known than that at the end"

    out = tmp_path / "out"
    told = run.midwatch("export", str(run.root), "--checkpoint", str(recipe.total_steps), "--to", str(out), timeout=100)
    assert told.returncode == 0, told.stderr
    last = f"{recipe.total_steps}-1-sft-1m"
    assert last in told.stdout
    made_from_is_whole(run, json.loads((out / "midwatch.json").read_text()), last)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.max_position_embeddings == 2048
    ids = torch.randint(0, 512, (1, 2048), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = theirs(input_ids=ids).logits, our_logits(run.root, last, ids)
    assert (found - wanted).abs().max() < 1e-4
    assert not torch.allclose(wanted[0, -1], wanted[0, -2])


def made_from_is_whole(run: Run, known: dict[str, Any], last: str) -> None:
    """Every link, from the corpora and the base to the product, against the thing itself."""
    recipe = load_recipe(run.root / "recipe.toml")
    assert (known["run"], known["checkpoint"], known["stage"]) == ("long", last, "sft-1m")
    assert known["recipe"] == recipe.digest()
    assert known["began_with"] == {"from": recipe.model.source, "digest": recipe.model.source_digest}
    assert [stage["name"] for stage in known["stages"]] == [stage.name for stage in recipe.stage]
    data = Path(recipe.data.dir or "")
    for stage, link in zip(recipe.stage, known["stages"], strict=True):
        assert (link["objective"], link["context"]) == (stage.objective, stage.context)
        assert set(link["corpora"]) == set(stage.mixture)
        for name, corpus in link["corpora"].items():
            shards = manifest.load(data / name / "train")
            assert corpus == {"digest": shards.digest, "origin": shards.origin} and shards.tokenizer == known["tokenizer"]
            assert shards.origin.startswith("stdlib-")
        assert link["digest"] == run.ledger().digests[link["product"]]
    assert known["stages"][-1]["product"] == last and known["stages"][-1]["digest"] == known["digest"]

    origin = run.state(last)["origin"]
    assert origin["model"] == recipe.model.source_digest and origin["recipe"] == recipe.digest()
    assert origin["products"] == {link["name"]: link["product"] for link in known["stages"][:-1]}

    shown = [stage.origin for stage in run.snapshot().stages if stage.objective != "data"]
    assert shown == [recipe.model.source, *(link["product"] for link in known["stages"][:-1])]


def our_logits(root: Path, checkpoint: str, ids: Tensor) -> Tensor:
    """Of the last stage's product, in one process."""
    from midwatch.checkpoint_format import manifest as checkpoints
    from trainer.huggingface.export import whole
    from trainer.model.decoder import Decoder

    recipe = load_recipe(root / "recipe.toml")
    known, _ = checkpoints.read(root / "checkpoints" / checkpoint)
    model = Decoder(recipe.model, known.tensors["model.embedding.weight"].shape[0])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(whole(root / "checkpoints" / checkpoint, known.tensors[f"model.{name}"]))
    last = recipe.stage[-1]
    model.set_positions(last.rope or recipe.model.rope, recipe.stage[0].context, last.position_factor)
    positions = torch.from_numpy(np.arange(ids.shape[1]))[None]
    logits: Tensor = model(ids, positions, torch.zeros_like(ids))
    return logits


def test_the_recipe_is_the_one_that_is_written_but_for_its_size(recipe: Recipe) -> None:
    whole = msgspec.toml.decode((RECIPES / "long.toml").read_bytes())
    for small, large in zip(recipe.stage, whole["stage"], strict=True):
        assert (small.name, small.objective, small.mixture) == (large["name"], large["objective"], large["mixture"])
        assert small.context * LENGTH == large["context"]
        assert small.rope is not None and small.rope.original_context == 16
        assert (small.rope.kind, small.rope.factor, small.rope.beta_fast) == ("yarn", large["rope"]["factor"], 4.0)
        assert small.rope.factor >= small.context / 16
        assert (small.context_parallel, small.activation_checkpointing) == (
            min(2, large.get("context_parallel", 1)),
            large["activation_checkpointing"],
        )
