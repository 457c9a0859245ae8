"""A bad recipe says file, line, key and the way out; a good one reads back as it was written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli.__main__ import main
from launcher.cli.runs import check_recipe
from midwatch.recipe import Recipe, RecipeError, Rope, Source, Stage, dump_recipe, load_recipe, parse_recipe, warnings
from midwatch.recipe.live_settings import check_setting, stage_settings
from midwatch.recipe.toml_lines import key_lines
from tests.hugging_face import RECIPES, at_hand

GOOD = """\
[run]
name = "tiny"

[model]
num_layers = 2
hidden_size = 64
num_heads = 4

[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"

[[data.source]]
name = "ask"
kind = "sft"
origin = "stdlib-sft"

[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 10
context = 32
global_batch = 4
mixture = { text = 1.0 }

[[stage]]
name = "sft"
objective = "sft"
steps = 5
context = 32
global_batch = 4
lr = 1e-5
mixture = { ask = 1.0 }

[[watch]]
name = "spike"
metric = "train/loss"
sigma = 6
"""


def line_with(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


BAD: list[tuple[str, str, str, str, str]] = [
    # what is wrong, text that is replaced, its replacement, what stands in the line named, what the message must say
    ("unknown key", "num_heads = 4", "num_heads = 4\nnum_haeds = 4", "num_haeds", "did you mean 'num_heads'"),
    ("unknown key of a stage", "steps = 10", "steps = 10\nstepz = 3", "stepz", "did you mean 'steps'"),
    ("unknown section", "[model]", "[modle]\nx = 1\n[model]", "[modle]", "did you mean 'model'"),
    ("unknown key with no neighbour", "num_layers = 2", "num_layers = 2\nzzz = 1", "zzz", "known here: "),
    ("wrong type", "steps = 10", 'steps = "ten"', 'steps = "ten"', "expected `int`"),
    ("wrong type of a weight", "{ text = 1.0 }", '{ text = "much" }', '"much"', "but it is {'text': 'much'}"),
    ("unknown choice", 'objective = "pretrain"', 'objective = "pretrian"', "pretrian", "'pretrain'"),
    ("width that does not divide", "hidden_size = 64", "hidden_size = 65", "hidden_size = 65", "use 64 or 68"),
    ("odd heads", "hidden_size = 64", "hidden_size = 12", "num_heads = 4", "even width"),
    (
        "key-value heads that do not divide",
        "num_heads = 4",
        "num_heads = 4\nnum_kv_heads = 3",
        "num_kv_heads",
        "use one of 1, 2, 4",
    ),
    ("no layers", "num_layers = 2", "num_layers = 0", "num_layers = 0", "at least 1"),
    ("no steps", "steps = 10", "steps = 0", "steps = 0", "at least 1"),
    ("infinite rate", "lr = 1e-5", "lr = inf", "lr = inf", "lr"),
    ("a rate that is no number", "lr = 1e-5", "lr = nan", "lr = nan", "greater than 0"),
    ("weight that is no number", "{ ask = 1.0 }", "{ ask = nan }", "nan", "mixture"),
    ("negative decay", "lr = 1e-5", "weight_decay = -1", "weight_decay", "negative"),
    ("warm-up longer than its stage", "lr = 1e-5", "warmup_steps = 9", "warmup_steps", "use 0 to 5"),
    ("unknown source", "{ ask = 1.0 }", "{ aks = 1.0 }", "aks", 'did you mean "ask"'),
    ("wrong kind of source", "{ ask = 1.0 }", "{ text = 2.0 }", "text = 2.0", "sft reads sft sources"),
    ("a part of no source", "{ ask = 1.0 }", '{ "aks.en" = 1.0 }', "aks.en", "lacks"),
    ("a source and a part of it", "{ ask = 1.0 }", '{ ask = 1.0, "ask.en" = 1.0 }', "ask.en", 'part of "ask"'),
    ("a temperature without tokens", "lr = 1e-5", "mixture_temperature = 3.0", "mixture_temperature", 'mixture_by = "tokens"'),
    ("no epochs at all", "lr = 1e-5", "max_epochs = { ask = 0 }", "max_epochs", "greater than 0"),
    ("epochs of a source that is not read", "lr = 1e-5", "max_epochs = { text = 2 }", "max_epochs", "the mixture does not"),
    ("a mixture after the end", "lr = 1e-5", "anneal = [{ at = 5, mixture = { ask = 1.0 } }]", "at = 5", "use 1 to 4 steps"),
    ("a mixture of nothing to come", "lr = 1e-5", "anneal = [{ at = 0.5, mixture = { ask = 0 } }]", "ask = 0", "above 0"),
    ("an unknown source to come", "lr = 1e-5", "anneal = [{ at = 0.5, mixture = { aks = 1 } }]", "aks = 1", 'did you mean "ask"'),
    ("two stages of a name", 'name = "sft"', 'name = "pretrain"', "", "two stages are named"),
    ("two sources of a name", 'name = "ask"', 'name = "text"', "", "same name"),
    ("a source that needs a path", 'origin = "stdlib-sft"', 'origin = "jsonl"', "", "needs a path"),
    (
        "level that zstd has not",
        '[[data.source]]\nname = "text"',
        '[data]\nlevel = 40\n[[data.source]]\nname = "text"',
        "level",
        "1 to 19",
    ),
    ("vocabulary too small", "[model]", "[tokenizer]\nvocab = 20\n[model]", "vocab", "at least 320"),
    ("negative seed", 'name = "tiny"', 'name = "tiny"\nseed = -3', "seed", "0 or more"),
    ("huge seed", 'name = "tiny"', 'name = "tiny"\nseed = 99999999999999999999', "seed", "2^63"),
    ("name that is no directory", 'name = "tiny"', 'name = "../x"', "../x", "cannot name a directory"),
    ("stage whose name cannot be a file's", 'name = "sft"', 'name = "a/b"', "a/b", "name"),
    ("rule without a condition", "sigma = 6", "", "spike", "exactly one of"),
    ("rule with two", "sigma = 6", "sigma = 6\nabove = 3", "spike", "exactly one of"),
    ("missing key", "steps = 10\n", "", "[[stage]]", "'steps' is missing"),
    ("not TOML", "num_layers = 2", "num_layers = = 2", "num_layers = =", "not valid TOML"),
    ("key given twice", "num_layers = 2", "num_layers = 2\nnum_layers = 2", "", "not valid TOML"),
    (
        "section where a table of another kind stands",
        "[model]\nnum_layers = 2\nhidden_size = 64\nnum_heads = 4",
        "",
        "",
        "'model' is missing",
    ),
]


def test_mixtures_to_come_and_parts_of_a_source_read_back_as_they_were() -> None:
    text = GOOD.replace(
        "{ ask = 1.0 }",
        '{ "ask.en" = 1.0, "ask.de" = 0.5 }\nmixture_by = "tokens"\nmixture_temperature = 2\nmax_epochs = { "ask.de" = 2.5 }\n'
        'anneal = [{ at = 0.5, mixture = { ask = 1 } }, { at = 4, mixture = { "ask.fr" = 1 } }]',
    )
    recipe = parse_recipe(text)
    stage = recipe.stage[1]
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert stage.sources == ("ask.en", "ask.de", "ask", "ask.fr") and stage.mixing.max_epochs == {"ask.de": 2.5}
    assert stage.schedule == [(2 * stage.global_batch, {"ask": 1.0}), (4 * stage.global_batch, {"ask.fr": 1.0})]
    assert stage_settings(recipe, stage)["mixture.ask.fr"] == 0.0


def test_frames_of_an_unusual_size_are_warned_of() -> None:
    told = warnings(parse_recipe(GOOD.replace("[model]", "[data]\nframe_tokens = 1024\n[model]", 1)))
    assert any("frame_tokens is 1,024" in each and "8,192 to 65,536" in each for each in told)
    assert not any("frame_tokens" in each for each in warnings(parse_recipe(GOOD)))


@pytest.mark.parametrize(("old", "new", "place", "says"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_a_bad_recipe_names_file_line_and_way_out(old: str, new: str, place: str, says: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, "my.toml")
    message = str(error.value)
    assert message.startswith("my.toml")
    assert says in message
    if place:
        assert f"my.toml:{line_with(text, place)}: " in message


def test_every_problem_is_told_at_once() -> None:
    text = (
        GOOD.replace("hidden_size = 64", "hidden_size = 65")
        .replace("steps = 10", "steps = 0")
        .replace("{ ask = 1.0 }", "{ aks = 1.0 }")
    )
    with pytest.raises(RecipeError) as error:
        parse_recipe(text)
    assert len(str(error.value).splitlines()) == 3


def test_lines_are_right_below_multi_line_strings_and_arrays() -> None:
    text = GOOD.replace(
        "steps = 10",
        'prompts = [ # a comment with ] and "\n  "def [",\n  """two\nsteps = 3\n""",\n]\nsteps = "ten"',
    )
    with pytest.raises(RecipeError, match=rf":{line_with(text, 'ten')}: stage.steps"):
        parse_recipe(text)


def test_lines_are_right_for_inline_tables_dotted_and_quoted_keys() -> None:
    inline = GOOD.replace("lr = 1e-5", 'rope = { kind = "yarn", factr = 2.0 }')
    with pytest.raises(RecipeError, match=rf":{line_with(inline, 'factr')}: .*did you mean 'factor'"):
        parse_recipe(inline)
    dotted = GOOD.replace("lr = 1e-5", 'rope.kind = "yarn"\nrope.factor = "two"')
    with pytest.raises(RecipeError, match=rf":{line_with(dotted, 'two')}: "):
        parse_recipe(dotted)
    table = GOOD.replace("\n[[watch]]", '\n[stage.rope]\nkind = "yarn"\n"factor" = "two"\n\n[[watch]]')
    with pytest.raises(RecipeError, match=rf":{line_with(table, 'two')}: "):
        parse_recipe(table)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ("[run]\n".encode("utf-16"), r":1: is UTF-16 \(save it as UTF-8\)"),
        ("[run]\n".encode("utf-16-be"), r":1: holds a NUL byte \(is it UTF-16"),
        (b"[run]\nname = 'a\0b'\n", r":2: holds a NUL byte"),
        (b"[run]\r\n\r\nname = 'caf\xe9'\r\n", r":3: is not UTF-8: byte 0xe9 \(save it as UTF-8\)"),
        (b"[run]\nname = 'a\x1b[2Jb'\n", r":2: not valid TOML: Found invalid character '\\x1b'"),
        (b"#" * (16 << 20) + b"##", r"is larger than 16 MiB"),
    ],
)
def test_a_file_that_is_no_utf8_text_is_refused_by_its_line(raw: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(raw)
    with pytest.raises(RecipeError, match=told):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("change", [lambda raw: b"\xef\xbb\xbf" + raw, lambda raw: raw.replace(b"\n", b"\r\n")])
def test_a_byte_order_mark_and_the_line_ends_of_windows_change_nothing(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.toml", tmp_path / "other.toml"
    plain.write_text(GOOD)
    other.write_bytes(change(GOOD.encode()))
    assert load_recipe(other) == load_recipe(plain)


def test_a_recipe_comes_through_a_pipe_once_and_its_paths_are_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read, write = os.pipe()
    os.write(write, GOOD.replace('origin = "stdlib-topics"', 'origin = "text"\npath = "corpus/*.txt"').encode())
    os.close(write)
    recipe = load_recipe(Path(f"/dev/fd/{read}"))
    os.close(read)
    assert recipe.data.source[0].path == str(tmp_path / "corpus/*.txt")


def test_a_recipe_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_text_makes_anything_but_a_recipe_or_an_error(data: st.DataObject) -> None:
    """Pieces of the good recipe shuffled, cut and spiced."""
    lines = GOOD.splitlines()
    pieces = st.one_of(
        st.sampled_from(lines), st.text(max_size=20), st.sampled_from(["[[stage]]", '"""', "x = [", "= 1", "a = {", "["])
    )
    text = "\n".join(data.draw(st.lists(pieces, max_size=30)))
    key_lines(text)
    with contextlib.suppress(RecipeError):
        parse_recipe(text)


def test_absurd_nesting_is_an_error_like_any_other() -> None:
    with pytest.raises(RecipeError, match="nested"):
        parse_recipe("x = " + "[" * 5000)


def test_paths_are_taken_from_the_recipes_directory(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(GOOD.replace('origin = "stdlib-topics"', 'origin = "text"\npath = "corpus/*.txt"'))
    assert load_recipe(file).data.source[0].path == str(tmp_path / "corpus/*.txt")
    file.write_text('[tokenizer]\ntemplate = "mine.jinja"\n' + GOOD)
    assert load_recipe(file).tokenizer.template == str(tmp_path / "mine.jinja")
    file.write_text('[tokenizer]\ntemplate = "llama3"\n' + GOOD)
    assert load_recipe(file).tokenizer.template == "llama3", "a name is no path"


def test_a_chat_template_is_looked_over_before_a_run_is_made(tmp_path: Path) -> None:
    file, template = tmp_path / "r.toml", tmp_path / "mine.jinja"
    file.write_text('[tokenizer]\ntemplate = "mine.jinja"\n' + GOOD)
    with pytest.raises(RecipeError, match=r"r\.toml: tokenizer: template: .*mine\.jinja: No such file or directory \(give a Jinja"):
        check_recipe(file)
    template.write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(RecipeError, match=r"mine\.jinja: has no assistant turn"):
        check_recipe(file)
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}")
    check_recipe(file)
    file.write_text('[tokenizer]\ntemplate = "own"\n' + GOOD)
    with pytest.raises(RecipeError, match=r"r\.toml:2: .*no tokenizer is brought along"):
        load_recipe(file)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda f: f.name)
def test_every_recipe_that_comes_along_loads_and_reads_back(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(at_hand(file, tmp_path))
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", ["ladder", "long", "midtrain"])
def test_recipes_for_clusters_are_good_once_what_they_name_is_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = at_hand(RECIPES / f"{name}.toml", tmp_path)
    monkeypatch.setattr("sys.argv", ["midwatch", "check", str(file)])
    assert main() == 0
    told = capsys.readouterr()
    assert "good" in told.out and "warning" not in told.err
    monkeypatch.setattr("sys.argv", ["midwatch", "plan", str(file), "--json"])
    assert main() == 0
    planned = json.loads(capsys.readouterr().out)
    recipe = load_recipe(file)
    assert planned["gpus"] == recipe.cluster.most_nodes * 8 and planned["gpus"] % recipe.ranks_multiple == 0
    assert 7.5e9 < planned["parameters"]["total"] < 8.1e9
    assert [stage["context_tokens"] for stage in planned["stages"]] == [stage.context for stage in recipe.stage]


def test_in_recipes_for_clusters_every_rank_has_rows_at_every_stage(tmp_path: Path) -> None:
    for name in ("ladder", "long", "midtrain"):
        recipe = load_recipe(at_hand(RECIPES / f"{name}.toml", tmp_path / name))
        for stage in recipe.stage:
            ranks = recipe.cluster.most_nodes * recipe.cluster.ranks_per_node // stage.context_parallel
            assert stage.global_batch % (ranks * stage.micro_batch) == 0, f"{name}: {stage.name}"
            assert recipe.model.key_value_heads % stage.context_parallel == 0, f"{name}: {stage.name}"


def test_a_recipe_whose_base_is_not_there_says_where_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"long.toml:\d+: \[model\] from: .*Llama-3.1-8B/config.json: cannot be read"):
        load_recipe(Path(shutil.copy(RECIPES / "long.toml", tmp_path)))


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
sizes = st.integers(1, 10_000)
positive = st.floats(1e-9, 1e6)
stages = st.builds(
    Stage,
    name=st.from_regex(r"[a-z][a-z0-9_-]{0,9}", fullmatch=True),
    objective=st.just("pretrain"),
    steps=st.integers(20, 10_000),
    context=sizes,
    global_batch=sizes,
    mixture=st.just({"text": 1.0}) | st.just({"text": 0.25}),
    lr=positive,
    warmup_steps=st.none() | st.integers(0, 20),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    masked_documents=st.none() | st.booleans(),
    rope=st.builds(Rope, kind=st.sampled_from(["none", "yarn"]), factor=positive, original_context=st.none() | sizes),
    prompts=st.lists(words, max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=80)
@given(stages, words, st.integers(0, 2**40))
def test_a_dumped_recipe_reads_back_as_the_same(stage: Stage, path: str, seed: int) -> None:
    good = parse_recipe(GOOD)
    recipe = msgspec.structs.replace(
        good,
        run=msgspec.structs.replace(good.run, seed=seed),
        stage=(stage,),
        data=msgspec.structs.replace(
            good.data, source=(*good.data.source, Source(name="more", kind="text", origin="text", path=path))
        ),
    )
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_live_settings_stay_within_their_bounds() -> None:
    recipe = parse_recipe(GOOD)
    stage = recipe.stage[0]
    known = stage_settings(recipe, stage)
    assert {"lr", "max_grad_norm", "beta1", "checkpoint_every", "mixture.text"} <= known.keys()
    assert all(check_setting(recipe, stage, key, value) == value for key, value in known.items())
    wrong: list[tuple[str, float, str]] = [
        ("learning_rate", 1.0, "it has: lr"),
        ("lr", -1.0, "between"),
        ("beta1", 1.0, "between"),
        ("lr", math.nan, "not a number"),
        ("max_grad_norm", math.inf, "not a number"),
        ("checkpoint_every", 2.5, "whole"),
        ("mixture.ask", 1.0, "no setting"),
        ("beta", 0.1, "no setting"),
    ]
    for key, value, says in wrong:
        with pytest.raises(ValueError, match=says):
            check_setting(recipe, stage, key, value)


PREFERS = GOOD.replace('kind = "sft"\norigin = "stdlib-sft"', 'kind = "preference"\norigin = "stdlib-preference"').replace(
    'objective = "sft"', 'objective = "dpo"'
)


@pytest.mark.parametrize(
    ("text", "keys", "place", "says"),
    [
        (GOOD, 'dpo_loss = "ipo"', "dpo_loss", 'dpo_loss: is for objective "dpo", this stage\'s is "sft" .drop it'),
        (GOOD, "length_normalised = true", "length_normalised", 'objective "dpo"'),
        (GOOD, "reference_free = true", "reference_free", 'objective "dpo"'),
        (PREFERS, 'dpo_loss = "ipo"\nbeta = 0', "beta = 0", "greater than 0 for dpo_loss .ipo"),
        (PREFERS, 'dpo_loss = "ipo"\nlabel_smoothing = 0.1', "label_smoothing", 'dpo_loss "sigmoid" .drop it, or use'),
        (PREFERS, 'dpo_loss = "hinge"', "hinge", "'sigmoid'"),
    ],
)
def test_losses_of_preferences_are_for_stages_of_preferences(text: str, keys: str, place: str, says: str) -> None:
    changed = text.replace("lr = 1e-5", f"lr = 1e-5\n{keys}")
    with pytest.raises(RecipeError, match=rf":{line_with(changed, place)}: .*{says}"):
        parse_recipe(changed)


def test_ipo_has_no_label_smoothing_to_set_and_a_beta_above_0() -> None:
    recipe = parse_recipe(
        PREFERS.replace("lr = 1e-5", 'lr = 1e-5\ndpo_loss = "ipo"\nreference_free = true\nlength_normalised = true')
    )
    stage = recipe.stage[1]
    assert not stage.needs_reference and msgspec.structs.replace(stage, reference_free=False).needs_reference
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert check_setting(recipe, stage, "beta", 0.5) == 0.5
    for key, value, says in (("beta", 0.0, "greater than 0"), ("label_smoothing", 0.1, "no setting")):
        with pytest.raises(ValueError, match=says):
            check_setting(recipe, stage, key, value)
    plain = msgspec.structs.replace(stage, dpo_loss="sigmoid")
    assert check_setting(recipe, plain, "beta", 0.0) == 0.0 and check_setting(recipe, plain, "label_smoothing", 0.1) == 0.1


def test_a_high_rate_of_fine_tuning_is_warned_of() -> None:
    hot: dict[str, Any] = {"lr": 3e-4}
    recipe = parse_recipe(GOOD)
    assert not any("lr" in w for w in warnings(recipe))
    changed = msgspec.structs.replace(recipe, stage=(recipe.stage[0], msgspec.structs.replace(recipe.stage[1], **hot)))
    assert any('stage "sft": lr 0.0003 is more than a tenth' in w for w in warnings(changed))
    assert isinstance(changed, Recipe)


SPREAD = (
    GOOD
    + """
[parallel]
tensor = 4
[cluster]
backend = "external"
ranks_per_node = 2
nodes = "12:16"
"""
)


@pytest.mark.parametrize(
    ("old", "new", "place", "says"),
    [
        (
            "tensor = 4",
            "tensor = 4\nhsdp_shard_size = 9",
            "nodes =",
            '12 to 16 nodes of 2 ranks cannot make a multiple of 36 ranks.*use nodes = "12:18" or',
        ),
        ('nodes = "12:16"', "nodes = 3", "nodes =", '3 nodes of 2 ranks cannot make .*use nodes = "3:4" or ranks_per_node = 4'),
        (
            '"external"\nranks_per_node = 2\nnodes = "12:16"',
            '"local"',
            "[cluster]",
            "1 node of 1 rank cannot make .*need .use ranks_per_node = 4.$",
        ),
        (
            "lr = 1e-5",
            "context_parallel = 5\nlr = 1e-5",
            "nodes =",
            "a multiple of 20 ranks, which .parallel. and context_parallel need",
        ),
    ],
)
def test_a_world_that_the_model_does_not_fit_is_told_with_one_that_it_does(old: str, new: str, place: str, says: str) -> None:
    text = SPREAD.replace(old, new, 1).replace('"12:16"', '"12:14"' if "context" in new else '"12:16"')
    assert text != SPREAD
    with pytest.raises(RecipeError, match=says) as error:
        parse_recipe(text, "my.toml")
    assert str(error.value).startswith(f"my.toml:{line_with(text, place)}: [cluster] ")


@pytest.mark.parametrize(("kept", "neighbours"), [("true", 0), ("false", 1), ("2", 2), ('"auto"', 0)])
def test_what_becomes_of_blocks_after_their_forward_is_a_setting(kept: str, neighbours: int) -> None:
    recipe = parse_recipe(SPREAD.replace("tensor = 4", f"tensor = 4\nreshard_after_forward = {kept}"))
    assert recipe.parallel.neighbours == neighbours
    assert recipe.ranks_multiple == 4 * max(1, neighbours)
    assert parse_recipe(dump_recipe(recipe)).parallel == recipe.parallel


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("1", "1 must be at least 2 .or true, false or .auto."),
        ("3\nhsdp_shard_size = 4", "3 must be a divisor of hsdp_shard_size, 4, at least 2"),
        ('"always"', "reshard_after_forward"),
    ],
)
def test_blocks_cannot_stay_sharded_over_ranks_that_do_not_divide(value: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_recipe(SPREAD.replace("tensor = 4", f"tensor = 4\nreshard_after_forward = {value}"))


def test_the_nodes_that_train_are_the_largest_number_that_the_model_fits() -> None:
    recipe = parse_recipe(SPREAD.replace("12:16", "11:15"))
    assert (recipe.ranks_multiple, recipe.nodes_multiple) == (4, 2)
    assert (recipe.fewest_nodes, recipe.most_nodes) == (12, 14)
    assert [recipe.training_nodes(n) for n in (0, 1, 2, 13, 14, 15, 99)] == [0, 0, 2, 12, 14, 14, 14]
    plain = parse_recipe(GOOD)
    assert (plain.fewest_nodes, plain.most_nodes, plain.training_nodes(5)) == (1, 1, 1)


def test_numbers_of_nodes_that_are_rounded_down_are_told() -> None:
    assert "of 12 to 16 nodes 12, 14 or 16 train at a time, and others stand by: the ranks must be a multiple of 4" in warnings(
        parse_recipe(SPREAD)
    )
    for whole in ("nodes = 12", 'nodes = "12:12"'):
        assert not any("stand by" in w for w in warnings(parse_recipe(SPREAD.replace('nodes = "12:16"', whole))))
    assert not any("stand by" in w for w in warnings(parse_recipe(SPREAD.replace("tensor = 4", "tensor = 2"))))


@pytest.mark.parametrize(
    ("sbatch", "problem"),
    [
        ('time = "4"', "sbatch.time: the time limit 4 is 240 s"),
        ('time = "00:04:59"', "is 299 s"),
        ('time = "1-0"\nlines = ["--gres=gpu:1", "--time=0:05:00"]', "sbatch.lines.1: the time limit 0:05:00 is 300 s"),
        ('lines = ["-t 3:30"]', "is 210 s"),
        ('time = "soon"', "'soon' is no time limit"),
        ('time = "6"', ""),
        ('time = "4"\nsignal_seconds = 60', ""),
        ('time = "4"\nlines = ["--time=1-00"]', ""),
        ('time = "UNLIMITED"', ""),
    ],
)
def test_a_time_limit_that_leaves_no_time_to_train_is_refused_with_its_line(sbatch: str, problem: str) -> None:
    text = GOOD + f'\n[cluster]\nbackend = "slurm"\nnodes = 1\n[cluster.sbatch]\n{sbatch}\n'
    if not problem:
        parse_recipe(text)
        return
    with pytest.raises(RecipeError) as error:
        parse_recipe(text)
    assert problem in str(error.value)
    line = next(n for n, each in enumerate(text.splitlines(), 1) if each.startswith(sbatch.splitlines()[-1]))
    assert str(error.value).startswith(f"recipe.toml:{line}: [cluster] sbatch.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_layers = 2", "layers = 2", "[model] layers is named num_layers now"),
        ("hidden_size = 64", "width = 64", "[model] width is named hidden_size now"),
        ("lr = 1e-5", "lr = 1e-5\nwarmup = 1", "[[stage]] warmup is named warmup_steps now"),
        ("lr = 1e-5", "lr = 1e-5\npolicy = { tokens = 4 }", "[[stage]] policy is named rollout now"),
        ("lr = 1e-5", "lr = 1e-5\nrollout = { tokens = 4 }", "[stage.rollout] tokens is named max_new_tokens now"),
        ('objective = "sft"', 'objective = "rejection"', '[[stage]] objective = "rejection" is "rejection_sampling" now'),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    line = text[: text.index(new.splitlines()[-1])].count("\n") + 1
    assert f"recipe.toml:{line}: {message}" in str(caught.value)


def test_a_rule_on_a_renamed_metric_is_refused() -> None:
    with pytest.raises(RecipeError, match='"policy/mismatch" is "policy/logprob_mismatch" now'):
        parse_recipe(GOOD + '[[watch]]\nname = "far"\nmetric = "policy/mismatch"\nabove = 1\n')


def test_a_setting_by_its_old_name_is_refused_with_the_new_one() -> None:
    recipe = parse_recipe(GOOD)
    with pytest.raises(ValueError, match="clip is named max_grad_norm now"):
        check_setting(recipe, recipe.stage[0], "clip", 1.0)
