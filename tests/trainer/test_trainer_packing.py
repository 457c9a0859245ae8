"""Packed rows through the model: under masks no logit depends on another document; in naive packing those that follow do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from midwatch.recipe import Recipe
from midwatch.recipe.model import Model, Rope
from trainer.model.decoder import Decoder
from trainer.stage.stage import open_stage

DOCUMENTS = (5, 1, 13, 8, 2)
"""Lengths of one row's documents; the rest of it is padding."""
PADDING = 3
TIME = sum(DOCUMENTS) + PADDING
IDS = 40
KINDS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "rope, grouped": {"position": "rope", "num_kv_heads": 2},
    "alibi": {"position": "alibi"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned", "max_positions": TIME},
    "none": {"position": "none"},
}


def model_of(kind: str, masked: bool) -> Decoder:
    model = Decoder(Model(num_layers=2, hidden_size=32, num_heads=4, **KINDS[kind]), IDS)
    model.initialise(3)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from zero, so that what is seen shows
    model.set_positions(Rope(kind="yarn", factor=2.0) if kind == "rope" else Rope(), TIME // 2)
    model.documents_masked = masked
    return model


def row(restart: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and segments, as the feed gives them."""
    tokens = torch.randint(0, IDS, (1, TIME), generator=torch.Generator().manual_seed(1))
    lengths = (*DOCUMENTS, PADDING)
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    segments[:, -PADDING:] = -1
    positions = torch.cat([torch.arange(length) for length in lengths])[None] if restart else torch.arange(TIME)[None]
    return tokens, positions, segments


@torch.no_grad()
def what_changes(kind: str, masked: bool, restart: bool) -> list[Tensor]:
    """For each token of the row's documents, whether each logit of the row is another, once that token is: [time] each."""
    model, (tokens, positions, segments) = model_of(kind, masked), row(restart)
    before, found = model(tokens, positions, segments), []
    for place in range(sum(DOCUMENTS)):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 7) % IDS
        found.append((model(other, positions, segments) != before)[0].any(-1))
    return found


@pytest.mark.parametrize("restart", [True, False], ids=["restarting", "running on"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_masks_no_logit_depends_on_another_document(kind: str, restart: bool) -> None:
    _, _, segments = row(restart)
    for place, differs in enumerate(what_changes(kind, True, restart)):
        own = segments[0] == segments[0, place]
        assert not differs[~own].any(), f"token {place}: not bit for bit the same"
        assert not differs[:place].any() and differs[place:][own[place:]].all(), f"token {place}: its own document sees it"


@pytest.mark.parametrize("restart", [True, False], ids=["restarting", "running on"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_naive_packing_every_later_document_sees_those_before(kind: str, restart: bool) -> None:
    for place, differs in enumerate(what_changes(kind, False, restart)):
        assert not differs[:place].any() and differs[place:].all(), place


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_of_a_masked_row_is_what_it_is_alone_where_positions_restart(kind: str) -> None:
    model, (tokens, positions, segments) = model_of(kind, True), row(True)
    with torch.no_grad():
        whole = model(tokens, positions, segments)
        for number in range(len(DOCUMENTS)):
            own = segments[0] == number
            alone = model(tokens[:, own], positions[:, own], segments[:, own])
            assert torch.allclose(whole[:, own], alone, atol=1e-4), number


@pytest.mark.parametrize(("masked", "restart"), [(False, None), (True, None), (True, False), (False, True)])
@pytest.mark.parametrize("index", [0, 2], ids=["pretrain", "sft"])
def test_a_stage_and_its_exams_read_positions_as_it_says(recipe: Recipe, index: int, masked: bool, restart: bool | None) -> None:
    stage = msgspec.structs.replace(recipe.stage[index], masked_documents=masked, restart_positions=restart, context=512)
    changed = msgspec.structs.replace(recipe, stage=(*recipe.stage[:index], stage, *recipe.stage[index + 1 :]))
    opened = open_stage(changed, Path(recipe.data.dir or ""), index, None)
    try:
        batches = [opened.feed.read(0, 64), *(task.samples.read(0, 64) for task in opened.tasks if task.stage is stage)]
        assert len(batches) > 1
        for batch in batches:
            second = batch.segments == 1
            assert second.any()
            assert (batch.positions[second] == 0).any() == (masked if restart is None else restart)
    finally:
        opened.close()
