"""Weights from a Hugging Face directory to the ranks and back, bit by bit, by real ranks and the real `transformers`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_harness import logs, start_ranks, tensors, train_plain, write_recipe

from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.recipe import Recipe, RecipeError, dump_recipe, load_recipe, parse_recipe
from midwatch.recipe.huggingface.config import model_keys
from midwatch.recipe.model import Model, Rope
from shards.build.build import build
from shards.spec import Build
from shards.tokenization.tokenizer import Tokenizer
from trainer.huggingface.export import ExportError, export

transformers = pytest.importorskip("transformers")

RECIPE = """
[run]
name = "from"
[model]
from = "hf:{source}"
{model}
[tokenizer]
{tokenizer}
[data]
held_out = 0.1
[[data.source]]
name = "topics"
kind = "text"
origin = "stdlib-topics"
max_tokens = 20000
[[stage]]
name = "tune"
objective = "pretrain"
steps = 2
context = 32
global_batch = 4
eval_samples = 2
lr = {lr}
weight_decay = 0.0
mixture = {{topics = 1}}
"""

CONFIGS: dict[str, Any] = {
    "llama": lambda rows: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=rows,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 20_000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "gpt2": lambda rows: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=rows, n_positions=40, n_embd=48, n_layer=3, n_head=4, n_inner=100, bos_token_id=1, eos_token_id=2
        )
    ),
    "bloom": lambda rows: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=rows, hidden_size=48, n_layer=3, n_head=6)
    ),
}


@pytest.fixture(scope="module")
def tokenizer_file(recipe: Recipe) -> Path:
    """Of the tiny pipeline: 512 ids."""
    assert recipe.data.dir is not None
    return Path(recipe.data.dir) / "tokenizer.model"


@pytest.fixture
def source(tmp_path: Path, tokenizer_file: Path) -> Any:
    """Makes a directory of random weights with that tokenizer, in many files, with eight rows too many."""

    def make(family: str, name: str = "source", **more: Any) -> Path:
        torch.manual_seed(5)
        model = CONFIGS[family](520)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
        model.save_pretrained(tmp_path / name, max_shard_size=more.get("max_shard_size", "60KB"))
        shutil.copy(tokenizer_file, tmp_path / name / "tokenizer.model")
        return tmp_path / name

    return make


def begin(place: Path, source: Path, model: str = "", tokenizer: str = "", lr: float = 1e-3) -> Path:
    """A run directory of a recipe that begins with a directory's weights, its shards built."""
    place.mkdir()
    recipe = parse_recipe(RECIPE.format(source=source, model=model, tokenizer=tokenizer, lr=lr), base=place)
    data = msgspec.structs.replace(recipe.data, dir=str(place / "data"))
    build(Build(data=data, tokenizer=recipe.tokenizer, out=str(place / "data"), seed=0), workers=0)
    return write_recipe(place / "run", msgspec.structs.replace(recipe, data=data))


def saved(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def read_on_rank(root: Path) -> None:
    """What a rank does to begin: reads its part; it writes down what that took, and its part's bits."""
    from trainer.distributed.mesh import join, local, open_store
    from trainer.huggingface.load import load
    from trainer.model.sharded_model import ShardedModel

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    torch.set_num_threads(1)
    recipe = load_recipe(root / "recipe.toml")
    world = join(open_store(), "test", recipe.cluster, recipe.parallel)
    model = ShardedModel(recipe.model, 520, world)
    before = anonymous()
    peak, ended = [before], threading.Event()

    def look() -> None:
        while not ended.wait(0.0005):
            peak.append(anonymous())

    looking = threading.Thread(target=look, name="peak of memory")
    looking.start()
    for parameter in model.parameters().values():
        local(parameter).zero_()
    mine = sum(local(parameter).nbytes for parameter in model.parameters().values())
    read = load(model, recipe.model, world, 0)
    ended.set()
    looking.join()
    said = {"read": read, "mine": mine, "grown": max(peak) - before}
    (root / f"said-{world.rank}.json").write_text(json.dumps(said))


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_read_trained_at_rate_zero_and_exported_is_bit_for_bit_what_was_there(
    family: str, source: Any, tmp_path: Path
) -> None:
    came_from = source(family)
    run = begin(tmp_path / "one", came_from, lr=1e-30)
    train_plain(run)
    # Adam's smallest step does not reach float32's last bit, so what is exported has only gone through the ranks.
    export(run, "latest", tmp_path / "out", file_bytes=50_000)
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1, (
        "weights are as readable as what is beside them"
    )
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    first, second = saved(came_from), saved(tmp_path / "out")
    assert first.keys() - {"lm_head.weight"} <= second.keys() and second.keys() <= first.keys()
    for name, tensor in second.items():
        assert torch.equal(tensor.view(torch.int32), first[name].view(torch.int32)), name


@pytest.mark.parametrize("family", CONFIGS)
def test_a_trained_checkpoint_goes_out_and_in_and_out_again_as_the_same_bits_and_transformers_says_the_same(
    family: str, source: Any, tmp_path: Path
) -> None:
    run = begin(tmp_path / "one", source(family), lr=1e-2)
    train_plain(run)
    export(run, "latest", tmp_path / "out")
    again = begin(tmp_path / "two", tmp_path / "out", lr=1e-30)
    train_plain(again, size=1)
    export(again, "2-1-tune", tmp_path / "back")
    first, second = saved(tmp_path / "out"), saved(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first)
    assert not torch.equal(first[max(first)], saved(tmp_path / "source")[max(first)])

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (theirs(input_ids=ids).logits - our_logits(run, ids)).abs().max()
    print(f"{family}: {difference:.1e}")
    assert difference < 1e-4


def our_logits(run: Path, ids: Tensor, checkpoint: str = "2-1-tune", at: int = 0) -> Tensor:
    """Of a checkpoint at the end of a stage, in one process."""
    from trainer.model.decoder import Decoder

    recipe = load_recipe(run / "recipe.toml")
    known = tensors(run / "checkpoints" / checkpoint)
    model = Decoder(recipe.model, len(known["model.embedding.weight"]))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.from_numpy(known[f"model.{name}"]))
    stage = recipe.stage[at]
    model.set_positions(stage.rope or recipe.model.rope, recipe.stage[0].context, stage.position_factor)
    out: Tensor = model(ids, torch.arange(ids.shape[1]).expand_as(ids), torch.zeros_like(ids))
    return out


@pytest.mark.parametrize("family", CONFIGS)
def test_no_rank_reads_or_holds_more_than_its_own_part(family: str, tmp_path: Path, tokenizer_file: Path) -> None:
    model = CONFIGS[family](520)
    sizes: dict[str, dict[str, int]] = {
        "llama": {"hidden_size": 384, "intermediate_size": 1024, "head_dim": 64},
        "gpt2": {"n_embd": 384, "n_inner": 1536},
        "bloom": {"hidden_size": 384},
    }
    config = model.config
    for key, value in sizes[family].items():
        setattr(config, key, value)
    big = type(model)(config)
    big.save_pretrained(tmp_path / "big", max_shard_size="6MB")
    whole = sum(tensor.nbytes for tensor in saved(tmp_path / "big").values())
    assert whole > 15e6
    shutil.copy(tokenizer_file, tmp_path / "big" / "tokenizer.model")
    recipe = parse_recipe(RECIPE.format(source=tmp_path / "big", model="", tokenizer="", lr=1), base=tmp_path)
    root = write_recipe(tmp_path / "run", recipe)
    assert start_ranks(root, 2, read_on_rank).wait() == [0, 0], logs(root)
    said = [json.loads((root / f"said-{rank}.json").read_text()) for rank in range(2)]
    print(family, whole, said)
    assert sum(each["read"] for each in said) <= whole * 1.01
    for each in said:
        assert each["read"] <= 0.51 * whole
        # Its parameters, and one slice at a time.
        assert each["grown"] <= each["mine"] + 0.2 * whole


def test_ids_that_the_directory_lacks_get_rows_of_their_own(source: Any, tmp_path: Path, tokenizer_file: Path) -> None:
    torch.manual_seed(5)
    place = tmp_path / "narrow"
    CONFIGS["llama"](512).save_pretrained(place)
    foreign_tokenizer(place, 500)
    run = begin(tmp_path / "one", place, lr=1e-30)
    train_plain(run)
    export(run, "latest", tmp_path / "out")
    before, after = saved(place), saved(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][:512], before[name])
    trained = Tokenizer.load(tmp_path / "one" / "data" / "tokenizer.model")
    assert len(after[name]) == max(512, trained.vocab)
    assert 0.01 < after[name][512:].std() < 0.03 if trained.vocab > 512 else True


def foreign_tokenizer(place: Path, size: int) -> None:
    """A byte-level BPE as GPT-2's, trained on a little text, with one token for both ends of a text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator([Path(__file__).read_text()], trainer)
    fast.save(str(place / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))


def test_a_recipe_learns_its_sizes_from_the_directory_and_keeps_them(source: Any, tmp_path: Path) -> None:
    place = source("llama")
    recipe = parse_recipe(RECIPE.format(source="source", model='dtype = "float32"', tokenizer="", lr=1), base=tmp_path)
    assert (recipe.model.num_layers, recipe.model.hidden_size, recipe.model.num_kv_heads, recipe.model.vocabulary) == (
        3,
        48,
        2,
        520,
    )
    assert recipe.model.rope.kind == "llama3" and recipe.model.rope_theta == 20_000.0
    assert recipe.tokenizer.path == str(place / "tokenizer.model")
    shutil.rmtree(place)
    assert parse_recipe(dump_recipe(recipe)) == recipe, "a run's own recipe is read without the directory"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("num_layers = 4", "[model] num_layers: 4 contradicts 3 of"),
        ("tie_embeddings = true", "[model] tie_embeddings: True contradicts False of"),
        ("rope = {kind = 'yarn', factor = 2}", "(set it in a stage)"),
        ("max_positions = 12", "[model] max_positions: the model of"),
        ("num_layer = 4", "unknown key 'num_layer' (did you mean 'num_layers'?)"),
    ],
)
def test_what_contradicts_the_directory_is_an_error_that_names_both(model: str, message: str, source: Any, tmp_path: Path) -> None:
    source("llama")
    with pytest.raises(RecipeError) as raised:
        parse_recipe(RECIPE.format(source="source", model=model, tokenizer="", lr=1), base=tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    if "contradicts" in message:
        assert str(tmp_path / "source" / "config.json") in str(raised.value)


def break_it(place: Path, how: str) -> None:
    config = json.loads((place / "config.json").read_text())
    files = sorted(place.glob("*.safetensors"))
    index = place / "model.safetensors.index.json"
    if how == "no config":
        (place / "config.json").unlink()
    elif how == "config no JSON":
        (place / "config.json").write_text('{"model_type": ')
    elif how == "another architecture":
        (place / "config.json").write_text(json.dumps(config | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    elif how == "another activation":
        (place / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    elif how == "a word for a number":
        (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "three"}))
    elif how == "one layer more":
        (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    elif how == "one layer less":
        (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    elif how == "wider":
        (place / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    elif how == "cut off":
        files[0].write_bytes(files[0].read_bytes()[:-100])
    elif how == "header cut off":
        files[0].write_bytes(files[0].read_bytes()[:30])
    elif how == "empty":
        files[0].write_bytes(b"")
    elif how == "garbage":
        files[0].write_bytes(b"\xff" * 1000)
    elif how == "a file missing":
        files[0].unlink()
    elif how == "no weights":
        index.unlink()
        for file in files:
            file.unlink()
    elif how == "no tokenizer":
        (place / "tokenizer.model").unlink()
    elif how == "another tokenizer":
        (place / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "config.json: cannot be read: No such file or directory (give the directory that holds config.json)"),
        ("config no JSON", "config.json: is not JSON"),
        (
            "another architecture",
            "MambaForCausalLM; those that can be read are LlamaForCausalLM, MistralForCausalLM, GPT2LMHeadModel, BloomForCausalLM",
        ),
        ("another activation", "hidden_act is 'gelu', and only 'silu' or 'swish' can be read"),
        ("a word for a number", "config.json: is not the configuration of a llama"),
        ("one layer more", "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ("one layer less", "is left over: config.json has none such"),
        ("wider", "is [80, 48], by config.json it is [96, 48]"),
        ("cut off", "bytes where its header needs"),
        ("header cut off", "is not a safetensors file, or is cut off"),
        ("empty", "is not a safetensors file, or is cut off"),
        ("garbage", "is not a safetensors file, or is cut off"),
        ("a file missing", "cannot be read: No such file or directory (fetch it again)"),
        ("no weights", "holds neither model.safetensors nor"),
        ("no tokenizer", "holds none of tokenizer.json, tokenizer.model (give [tokenizer] path)"),
        ("another tokenizer", "by config.json it is [100, 48]"),
    ],
)
def test_a_broken_directory_is_an_error_in_one_line_before_anything_starts(
    how: str, message: str, source: Any, tmp_path: Path
) -> None:
    break_it(source("llama"), how)
    with pytest.raises(RecipeError) as raised:
        parse_recipe(RECIPE.format(source="source", model="", tokenizer="", lr=1), base=tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith("recipe.toml:5: [model] from: ")


def test_a_directory_that_changes_after_the_recipe_was_read_stops_the_ranks_in_one_line(source: Any, tmp_path: Path) -> None:
    place = source("llama")
    run = begin(tmp_path / "one", place)
    break_it(place, "cut off")
    from trainer_harness import plain

    assert start_ranks(run, 2, plain).wait() == [1, 1]
    said = (run / "rank-0.log").read_text()
    assert "bytes where its header needs" in said and "Traceback" not in said
    assert not list((run / "checkpoints").iterdir())


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(source: Any, tmp_path: Path) -> None:
    place = tmp_path / "small"
    CONFIGS["llama"](300).save_pretrained(place)
    foreign_tokenizer(place, 400)
    with pytest.raises(RecipeError, match=r"has 400 ids, the embedding of .* 300 rows"):
        parse_recipe(RECIPE.format(source="small", model="", tokenizer="", lr=1), base=tmp_path)


def test_only_what_fits_a_family_is_exported(recipe: Recipe, quiet: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quiet, tmp_path / "run"))
    for changes, message in (
        ({"position": "sinusoidal"}, 'no Hugging Face model has these positions: position is "sinusoidal"'),
        ({"norm": "layernorm"}, "LlamaForCausalLM is the nearest, but norm is layernorm, not rmsnorm"),
        ({"norm_place": "post", "mlp": "relu"}, "norm_place is post, not pre; mlp is relu, not swiglu"),
        ({"position": "alibi"}, "BloomForCausalLM is the nearest, but norm is rmsnorm, not layernorm; mlp is swiglu, not gelu"),
    ):
        changed = msgspec.structs.replace(recipe.model, **changes)  # type: ignore[arg-type]
        kept = msgspec.structs.replace(recipe, model=changed, stage=recipe.stage[:1])
        write_recipe(run, kept)
        with pytest.raises(ExportError) as raised:
            export(run, "latest", tmp_path / "out")
        assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(quiet: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quiet, tmp_path / "run"))
    id = sorted(path.name for path in (run / "checkpoints").iterdir())[-1]
    file = run / "checkpoints" / id / "rank-00001.bin"
    body = bytearray(file.read_bytes())
    body[5000] ^= 1
    file.write_bytes(body)
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        export(run, id, tmp_path / "out")
    with pytest.raises(ExportError, match='there is no checkpoint "77"'):
        export(run, "77", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ExportError, match="is there already"):
        export(run, id, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_directory_and_says_what_from(quiet: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quiet, tmp_path / "run"))
    (run / "journal").mkdir()
    command = [sys.executable, "-P", "-m", "midwatch", "export", str(run), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]
    command.append("--untied")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM of checkpoint" in done.stdout
    origin = json.loads((tmp_path / "out" / "midwatch.json").read_text())
    assert origin["run"] == "tiny" and origin["checkpoint"] in {path.name for path in (quiet / "checkpoints").iterdir()}
    assert {tensor.dtype for tensor in saved(tmp_path / "out").values()} == {torch.bfloat16}
    assert "lm_head.weight" in saved(tmp_path / "out"), "--untied"
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "is there already" in again.stderr and "Traceback" not in again.stderr


def test_a_tied_head_can_be_written_out_and_is_read_as_the_same_model(quiet: Path, tmp_path: Path) -> None:
    export(quiet, "latest", tmp_path / "tied")
    export(quiet, "latest", tmp_path / "untied", untied=True)
    tied, untied = saved(tmp_path / "tied"), saved(tmp_path / "untied")
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert torch.equal(untied["lm_head.weight"], tied["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.randint(0, 500, (1, 20), generator=torch.Generator().manual_seed(1))
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("tied", "untied"))
    assert second.lm_head.weight.data_ptr() != second.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize(
    ("declared", "kind", "context", "positions"),
    [
        (4096, "none", 64, 4096),
        (4096, "none", 8192, 8192),
        (4096, "yarn", 8192, 16_384),
        (131_072, "yarn", 8192, 131_072),
        (4096, "ntk", 64, 16_384),
        (4096, "dynamic", 8192, 4096),
        (None, "none", 64, 64),
        (None, "linear", 64, 16_384),
    ],
)
def test_an_export_is_never_made_for_fewer_positions_than_the_model_came_with(
    declared: int | None, kind: Any, context: int, positions: int
) -> None:
    from midwatch.recipe.huggingface.config import config_of

    model = Model(num_layers=1, hidden_size=16, num_heads=2, max_position_embeddings=declared)
    stage = Rope(kind=kind) if kind == "none" else Rope(kind=kind, factor=4.0, original_context=4096)
    config = config_of(model, "llama", stage, 4096, context, 100)
    assert config["max_position_embeddings"] == positions
    _, keys = model_keys(config)
    back = msgspec.convert(keys, Model)
    assert config_of(back, "llama", back.rope, 4096, 64, 100)["max_position_embeddings"] == positions, "nor by going in and out"


@pytest.mark.parametrize("rope", ["linear", "ntk", "dynamic", "yarn", "llama3", "none"])
def test_a_stages_rope_goes_into_the_configuration_and_comes_back(rope: str) -> None:
    from midwatch.recipe.huggingface.config import config_of
    from midwatch.recipe.model import Rope
    from trainer.model.rope import frequencies

    model = Model(num_layers=1, hidden_size=64, num_heads=4)
    stage = Rope(kind=rope, factor=4.0, theta=30_000.0)  # type: ignore[arg-type]
    _, keys = model_keys(config_of(model, "llama", stage, 64, 256, 100))
    back = msgspec.convert(keys, Model)
    for length in (32, 64, 256):
        ours, scale = frequencies(stage, 16, model.rope_theta, 64, length)
        theirs, other = frequencies(back.rope, 16, back.rope_theta, back.rope.original_context or 0, length)
        assert torch.equal(ours, theirs) and scale == other


def test_a_table_that_is_read_between_its_rows_is_written_out_as_transformers_reads_it(recipe: Recipe, tmp_path: Path) -> None:
    shape = msgspec.structs.replace(recipe.model, num_kv_heads=None, position="learned", max_positions=32, norm="layernorm")
    model = msgspec.structs.replace(shape, mlp="gelu", bias=True)
    first, second = (msgspec.structs.replace(stage, steps=2, rope=None, prompts=()) for stage in recipe.stage[:2])
    stages = (first, msgspec.structs.replace(second, position_factor=2.0))
    run = write_recipe(tmp_path / "run", msgspec.structs.replace(recipe, model=model, stage=stages))
    train_plain(run)
    export(run, "latest", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.n_positions == 64
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - our_logits(run, ids, "4-1-extend", 1)).abs().max() < 1e-4


def test_directories_of_older_releases_and_narrower_weights_are_read(tmp_path: Path, tokenizer_file: Path) -> None:
    from safetensors.torch import save_file

    from midwatch.recipe.huggingface.files import open_directory
    from trainer.huggingface.load import _fill
    from trainer.model.decoder import Decoder

    torch.manual_seed(5)
    theirs = CONFIGS["gpt2"](520).to(torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    buffers = {f"h.{layer}.attn.bias": torch.ones(1, 1, 40, 40, dtype=torch.float16) for layer in range(3)}
    save_file(bare | buffers, tmp_path / "new" / "model.safetensors")
    directory = open_directory(tmp_path / "new")
    model = Decoder(msgspec.convert(directory.keys, Model), 520)
    _fill(dict(model.named_parameters()), model.config, directory, 0)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = theirs.float()(input_ids=ids).logits
        assert (model(ids, ids, torch.zeros_like(ids)) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("given", "kind", "theta"),
    [
        ({"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", 500_000.0),
        ({"rope_theta": 500_000.0, "rope_scaling": None}, "none", 500_000.0),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}}, "dynamic", 1e6),
        ({}, "none", 10_000.0),
    ],
)
def test_rope_is_found_wherever_releases_of_transformers_have_put_it(given: dict[str, Any], kind: str, theta: float) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 10}
    _, keys = model_keys({"model_type": "llama", "head_dim": None, "max_position_embeddings": 128} | sizes | given)
    assert (keys["rope"]["kind"], keys["rope_theta"]) == (kind, theta)
    if kind == "dynamic":
        assert keys["rope"]["original_context"] == 128
