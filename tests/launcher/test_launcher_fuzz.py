"""What the launcher reads, damaged and hostile: it loads, or the loader's own error says what and where."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from launcher.backends.base import StartError, started
from launcher.controller.annotation import prompts, records, store
from launcher.controller.core.rollout_samples import Samples, Written
from launcher.metrics import chunks
from launcher.metrics.store import MetricStore
from launcher.plan import Assumptions, PlanError, plan_recipe
from launcher.preflight import checks
from launcher.preflight.node_report import look
from midwatch import protocol
from midwatch.checkpoint_format import verify
from midwatch.checkpoint_format.manifest import FILE_NAME, CheckpointError
from midwatch.journal import entries as journal_entries
from midwatch.journal import journal
from midwatch.journal.run_state import Ledger
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.recipe import RecipeError, dump_recipe, load_recipe, parse_recipe, warnings
from midwatch.recipe.huggingface.files import INDEX, SINGLE
from midwatch.run_directory import read_address
from midwatch.transport import tls_identity
from midwatch.transport.ssh import Result
from tests.examples import example
from tests.fuzzing import COUNT, Subject, holds, scratch
from tests.hugging_face import LLAMA, RECIPES, write_llama

HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 500, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0,
                         "mscale_all_dim": 1},
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 500, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "n_positions": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 500, "hidden_size": 16, "n_layer": 2,
        "n_head": 4, "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip

HF_RECIPE = """
[run]
name = "begun"
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[[stage]]
name = "first"
objective = "pretrain"
steps = 10
context = 32
global_batch = 4
mixture = { text = 1.0 }
"""


def fuzz_recipe(tmp_path: Path) -> Subject:
    file = tmp_path / "recipe.toml"

    def load(raw: bytes) -> None:
        file.write_bytes(raw)
        recipe = load_recipe(file)
        # What is good must be what the rest of the program can carry.
        warnings(recipe)
        assert parse_recipe(dump_recipe(recipe)) == recipe
        recipe.digest()
        msgspec.json.encode(recipe)
        for stage in recipe.stage:
            struct.pack("<qqq", stage.position_after(stage.steps), stage.resolved_warmup_steps, recipe.total_steps)
        try:
            msgspec.json.encode(plan_recipe(recipe, Assumptions()))
        except PlanError as error:
            raise RecipeError(f"recipe.toml: {error}") from None

    seeds = [recipe.read_bytes() for recipe in sorted(RECIPES.glob("*.toml"))]
    seeds = [raw for raw in seeds if b"hf:" not in raw]
    return Subject("recipe", seeds, load, (RecipeError,), "toml", names="recipe.toml", lines=60, quick=300)


def fuzz_hugging_face(tmp_path: Path, what: str) -> Subject:
    """what: the file of the directory that is mutated."""
    places = {
        family: write_llama(tmp_path / family, **dict.fromkeys(LLAMA) | config)
        for family, config in HF_CONFIGS.items()
        if what == "config.json" or family == "llama"
    }
    whole = (places["llama"] / SINGLE).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + length]

    def load(raw: bytes) -> None:
        family = next((each for each in places if each.encode() in raw), "llama")
        (places[family] / what).write_bytes(raw)
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(f'{HF_RECIPE}[model]\nfrom = "hf:{family}"\n')
        digest = load_recipe(recipe).digest()
        assert load_recipe(recipe).digest() == digest

    def seal(raw: bytes) -> bytes:
        """With the length before a header, and the weights that it promises behind it."""
        return struct.pack("<Q", len(raw)) + raw + whole[8 + length :] if what == SINGLE else raw

    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(json.loads(header), SINGLE)}
    configs = [(place / "config.json").read_bytes() for place in places.values()]
    seeds = {"config.json": configs, INDEX: [json.dumps(index).encode()], SINGLE: [header]}
    return Subject(what, seeds[what], load, (RecipeError,), "json", seal=seal, names="recipe.toml:", quick=300)


def fuzz_journal(tmp_path: Path) -> Subject:
    folder = tmp_path / "journal"
    folder.mkdir()
    entries = [msgspec.convert(example(kind) | {"report": 0}, kind) for kind in journal_entries.Entry.__args__]

    def seal(raw: bytes) -> bytes:
        return b"".join(b"%08x " % zlib.crc32(line) + line + b"\n" for line in raw.split(b"\n") if line)

    def load(raw: bytes) -> None:
        (folder / "000001.log").write_bytes(raw)
        reading = journal.read_journal(folder)
        ledger = Ledger()
        for term, entry in reading.entries:
            ledger.apply(term, entry)

    seed = b"\n".join(msgspec.json.encode(entry) for entry in entries)
    return Subject("journal", [seed], load, (journal.JournalError,), "json lines", seal=seal)


def fuzz_checkpoint(tmp_path: Path) -> Subject:
    place = tmp_path / "checkpoint"
    place.mkdir()
    content = bytes(1000)
    (place / "data.bin").write_bytes(content)
    manifest = {
        "format": 3, "id": "a", "generation": 1, "files": {"data.bin": {"bytes": 1000, "xxh3": xxhash.xxh3_128_hexdigest(content)}},
        "tensors": {}, "state": {"step": 1}, "world": 1,
    }  # fmt: skip

    def load(raw: bytes) -> None:
        (place / FILE_NAME).write_bytes(raw)
        verify.verify(place)

    seeds = [msgspec.msgpack.encode(manifest)]
    return Subject("checkpoint", seeds, load, (CheckpointError,), "msgpack", names=str(place))


def fuzz_metrics(tmp_path: Path) -> Subject:
    rows = [chunks.StepMetrics(0, step, step * 10, 1.5, {"train/loss": 1.0 / step, "train/lr": 0.1}) for step in range(1, 20)]
    body = msgspec.msgpack.encode(chunks.MetricFrame("rank", 1, rows))
    folder, index = tmp_path / "metrics", tmp_path / "index"
    folder.mkdir()

    def seal(raw: bytes) -> bytes:
        return chunks.HEADER.pack(len(raw), xxhash.xxh32_intdigest(raw)) + raw

    def load(raw: bytes) -> None:
        for file in (*folder.iterdir(), *tmp_path.glob("index*")):
            file.unlink()
        (folder / "000001.chunk").write_bytes(raw)
        metrics = MetricStore.open(folder, index)
        try:
            for each in metrics.names():
                metrics.columns(each.name, [LineageSegment(0, -1, None)], 0, 30, 10)
        finally:
            metrics.close()

    return Subject("metrics", [body], load, (), "msgpack", seal=seal)


def fuzz_samples(tmp_path: Path) -> Subject:
    folder = tmp_path / "samples"
    folder.mkdir()
    lines = [Written(source="1", number=n, time=1.0, stage="ppo", step=n, lineage=0, reward=0.1 * n, text="x") for n in range(6)]
    seed = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)

    def load(raw: bytes) -> None:
        (folder / "000001-00000.jsonl").write_bytes(raw)
        samples = Samples(folder, 2)
        for order in ("step", "reward", "kl", "longest"):
            found = samples.find(protocol.SampleQuery(id=1, order=order, pattern="x"), [LineageSegment(0, -1, None)])
            protocol.decode(protocol.encode(found))
        samples.close()

    return Subject("samples", [seed], load, (), "json lines")


def fuzz_preferences(tmp_path: Path) -> Subject:
    made = [msgspec.convert(example(kind), kind) for kind in records.Record.__args__]
    seed = b"".join(msgspec.json.encode(each) + b"\n" for each in made)

    def load(raw: bytes) -> None:
        for file in tmp_path.glob("*.jsonl*"):
            file.unlink()
        (tmp_path / "ann.jsonl").write_bytes(raw)
        (tmp_path / store.DRAWN).write_bytes(raw)
        opened = store.Store(tmp_path, "ann", "test")
        opened.undo("new", "now")
        opened.close()
        store.SampledPairs(tmp_path).close()
        for decisions in store.all_decisions(tmp_path).values():
            for decision in decisions:
                assert decision.label in ("", "neither", "first", "second")

    return Subject("preferences", [seed], load, (store.PreferenceError,), "json lines")


def fuzz_prompts(tmp_path: Path) -> Subject:
    file = tmp_path / "prompts.jsonl"
    turn = {"role": "user", "content": "Hello"}
    lines = [{"prompt": "What?"}, {"prompt": [turn]}, {"messages": [turn, turn | {"role": "assistant"}]}]
    seed = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def load(raw: bytes) -> None:
        file.write_bytes(raw)
        prompts.of_file(file)

    return Subject("prompts", [seed], load, (store.PreferenceError,), "json lines", names=str(file))


def fuzz_protocol(tmp_path: Path) -> Subject:
    """Every message, whoever sends it: what was taken for one goes back to bytes and is the same again."""
    seeds = [msgspec.msgpack.encode(example(kind)) for kind in protocol.Message.__args__]

    def load(raw: bytes) -> None:
        message = protocol.decode(raw)
        again = protocol.encode(message)
        assert protocol.encode(protocol.decode(again)) == again

    return Subject("protocol", seeds, load, (protocol.ProtocolError,), "msgpack")


def fuzz_replies(tmp_path: Path) -> Subject:
    """What a node says over ssh, and small files that others can write."""
    identity = tls_identity.TlsIdentity(**example(tls_identity.TlsIdentity))
    seeds = [msgspec.json.encode(look()), b'{"pid": 7, "created": 1.5}', identity.encode()]

    def load(raw: bytes) -> None:
        text = raw.decode(errors="replace")
        msgspec.json.encode(checks.understand(Result(0, text, "")))
        for read in (lambda: started("node", 0, text, ""), lambda: tls_identity.TlsIdentity.decode(raw)):
            try:
                msgspec.json.encode(read())
            except (StartError, tls_identity.KeysError):
                continue
        for name in ("address", "job"):
            (tmp_path / name).write_bytes(raw)
        read_address(tmp_path / "address")

    return Subject("replies", seeds, load, (), "json")


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "recipe": fuzz_recipe,
    **{name: (lambda tmp_path, name=name: fuzz_hugging_face(tmp_path, name)) for name in ("config.json", INDEX, SINGLE)},
    "journal": fuzz_journal,
    "checkpoint": fuzz_checkpoint,
    "metrics": fuzz_metrics,
    "samples": fuzz_samples,
    "preferences": fuzz_preferences,
    "prompts": fuzz_prompts,
    "protocol": fuzz_protocol,
    "replies": fuzz_replies,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_damaged_or_hostile_input_loads_or_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SUBJECTS)
def test_thousands_of_damaged_or_hostile_inputs_load_or_are_refused_by_name(tmp_path: Path, name: str, seed: int) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place), COUNT, seed)
