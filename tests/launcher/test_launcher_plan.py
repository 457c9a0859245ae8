"""`midwatch plan`: its arithmetic against published figures, its tables, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launcher.plan import ACCELERATORS, Assumptions, Plan, PlanError, find_accelerator, plan_budget, plan_recipe
from launcher.plan.budget import best_size, state, verdict
from launcher.plan.flops import attention_flops_per_token, flops_per_token, kv_cache_bytes_per_token
from launcher.plan.memory import memory
from launcher.plan.pipeline import bubble
from launcher.plan.units import count, factor, money, parse_count, size, span
from midwatch.recipe import Cluster, Model, Recipe, Stage, parse_recipe

ROOT = Path(__file__).parents[2]
LLAMA_8B = Model(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, intermediate_size=14336, tie_embeddings=False, dtype="bfloat16"
)
LONG = """
[run]
name = "long"
[model]
num_layers = 32
hidden_size = 4096
num_heads = 32
num_kv_heads = 8
intermediate_size = 14336
tie_embeddings = false
dtype = "bfloat16"
[tokenizer]
vocab = 100000
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[[data.source]]
name = "pairs"
kind = "preference"
origin = "stdlib-preference"
[cluster]
backend = "ssh"
hosts = ["gpu-[01-08]"]
nodes = "4:8"
ranks_per_node = 8
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 10000
context = 8192
global_batch = 512
micro_batch = 1
mixture = { text = 1.0 }
[[stage]]
name = "extend"
objective = "pretrain"
steps = 100
context = 131072
global_batch = 64
micro_batch = 1
mixture = { text = 1.0 }
[[stage]]
name = "dpo"
objective = "dpo"
steps = 100
context = 8192
global_batch = 64
micro_batch = 1
mixture = { pairs = 1.0 }
"""


def recipe() -> Recipe:
    return parse_recipe(LONG)


def midwatch(*words: str, columns: int = 80, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "midwatch", "plan", *words]
    environment = os.environ | {"COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment, stdin=subprocess.DEVNULL)


def test_from_8k_to_128k_each_factor_is_labelled_for_what_it_is() -> None:
    found = plan_recipe(recipe(), Assumptions()).factors[0]
    assert (found.before, found.after) == ("pretrain", "extend")
    assert found.length == 16
    assert found.kv_cache_per_sequence == found.activations_per_sequence == 16
    assert found.attention_flops_per_sequence == 256
    assert found.attention_flops_per_token == 16
    assert 1 < found.flops_per_token < 16


def test_70b_have_280_gb_of_weights_and_560_gb_of_optimizer() -> None:
    held = state(70e9)
    assert (held.weights_bytes, held.gradients_bytes, held.optimizer_bytes) == (280e9, 280e9, 560e9)
    said = midwatch("--params", "70B").stdout
    assert "280 GB" in said and "560 GB" in said


def test_llamas_size_and_kv_cache_are_the_published_ones() -> None:
    """Llama 3 8B has 8.03B parameters with 128,256 ids; its cache takes 128 KiB a token in half precision."""
    assert LLAMA_8B.parameters(128_256) == 8_030_261_248
    assert kv_cache_bytes_per_token(LLAMA_8B) == 128 * 1024


def test_flops_are_palms_six_a_parameter_and_attentions_twelve() -> None:
    embedding = 128_256 * 4096
    plain = 6 * (8_030_261_248 - embedding)
    attention = 12 * 32 * 4096 * 8192
    assert attention_flops_per_token(LLAMA_8B, 8192) == attention
    assert flops_per_token(LLAMA_8B, 128_256, 8192) == pytest.approx(plain + attention, rel=1e-4)


def test_a_head_of_its_own_width_and_an_mlp_of_two_matrices_are_counted() -> None:
    wide = Model(num_layers=1, hidden_size=64, num_heads=4, head_dim=64, intermediate_size=128, mlp="gelu")
    assert attention_flops_per_token(wide, 100) == 12 * 4 * 64 * 100
    assert flops_per_token(wide, 1000, 100) == 6 * (64 * 256 * 4 + 2 * 64 * 128 + 64_000) + 12 * 256 * 100


def test_state_is_sharded_over_the_ranks_until_micro_batches_accumulate() -> None:
    parameters = LLAMA_8B.parameters(128_256)
    once, twice = (
        memory(LLAMA_8B, 128_256, msgspec.structs.replace(recipe().stage[0], global_batch=batch), 64, False) for batch in (64, 128)
    )
    assert once.weights_bytes == -(-4 * parameters // 64)
    assert once.optimizer_bytes == 2 * once.weights_bytes
    assert not once.gradients_whole and once.gradients_bytes == once.weights_bytes
    assert twice.gradients_whole and twice.gradients_bytes == 4 * parameters
    assert twice.peak_bytes - once.peak_bytes > 3 * parameters


def test_a_checkpoints_copy_is_the_hosts_and_on_a_cpu_that_is_the_ranks_own() -> None:
    model, stage = Model(num_layers=2, hidden_size=64, num_heads=2), recipe().stage[0]
    gpu, cpu = (memory(model, 1000, stage, 64, on_cpu) for on_cpu in (False, True))
    assert gpu.staging_bytes == cpu.staging_bytes == gpu.weights_bytes + gpu.optimizer_bytes
    assert cpu.peak_bytes == gpu.peak_bytes + gpu.staging_bytes


def test_dpo_holds_a_reference_and_computes_its_forward_besides() -> None:
    plan = plan_recipe(recipe(), Assumptions())
    first, _, dpo = plan.stages
    assert dpo.memory_per_gpu.reference_bytes == dpo.memory_per_gpu.weights_bytes
    assert dpo.tokens_per_step == 2 * 64 * 8192, "a pair is two rows"
    assert dpo.flops_per_step == pytest.approx(first.flops_per_token * dpo.tokens_per_step * 4 / 3)
    free = msgspec.structs.replace(recipe().stage[2], reference_free=True)
    dpo = plan_recipe(msgspec.structs.replace(recipe(), stage=(*recipe().stage[:2], free)), Assumptions()).stages[2]
    assert dpo.memory_per_gpu.reference_bytes == 0
    assert dpo.flops_per_step == pytest.approx(first.flops_per_token * dpo.tokens_per_step)


def test_float32_with_groups_of_heads_keeps_scores_on_a_gpu_and_the_note_says_so() -> None:
    grouped = msgspec.structs.replace(recipe(), model=msgspec.structs.replace(LLAMA_8B, dtype="float32"))
    plan = plan_recipe(grouped, Assumptions())
    assert plan.stages[0].memory_per_gpu.attention_kernel == "scores"
    assert plan.stages[0].fits is False
    assert any(note.startswith("pretrain, extend, dpo: float32 with groups of heads") for note in plan.notes)
    assert plan_recipe(recipe(), Assumptions()).stages[0].memory_per_gpu.attention_kernel == "fused"


@pytest.mark.parametrize(
    ("pipeline", "micro_batches", "virtual", "share"), [(4, 8, 1, 3 / 11), (8, 8, 1, 7 / 15), (4, 8, 2, 3 / 19), (1, 4, 1, 0.0)]
)
def test_the_bubble_is_narayanans(pipeline: int, micro_batches: int, virtual: int, share: float) -> None:
    found = bubble(pipeline, micro_batches, virtual)
    assert found.share_of_step == pytest.approx(share)
    assert found.over_ideal_time == pytest.approx((pipeline - 1) / (virtual * micro_batches))


def test_a_pipeline_makes_a_step_longer_by_its_bubble() -> None:
    plain, piped = (plan_recipe(recipe(), Assumptions(pipeline=p, micro_batches=m)).stages[0] for p, m in ((1, None), (4, 8)))
    assert piped.bubble is not None and piped.bubble.share_of_step == pytest.approx(3 / 11)
    assert piped.step_seconds == pytest.approx(plain.step_seconds * 11 / 8)


def test_chinchillas_70b_is_the_best_for_its_own_budget() -> None:
    """Hoffmann et al. 2022: 70B parameters and 1.4T tokens for 5.76e23 operations; 6 N D gives 5.88e23."""
    parameters, tokens = best_size(6 * 70e9 * 1.4e12)
    assert parameters == pytest.approx(70e9) and tokens == pytest.approx(1.4e12)
    assert best_size(5.76e23)[0] == pytest.approx(70e9, rel=0.02)


def test_a_budget_of_days_gives_the_best_size_and_its_tokens() -> None:
    budget = plan_budget(find_accelerator("a100-80gb", 2.0), 64, 0.4, days=14)
    assert budget.flops == pytest.approx(64 * 312e12 * 0.4 * 14 * 86_400)
    assert 6 * budget.parameters * budget.tokens == pytest.approx(budget.flops)
    assert budget.tokens_per_parameter == pytest.approx(20)
    assert budget.gpu_hours == pytest.approx(64 * 14 * 24)
    assert budget.cost_usd == pytest.approx(2 * budget.gpu_hours)


def test_of_days_size_and_tokens_any_two_give_the_third() -> None:
    gpu = find_accelerator("h100-sxm")
    size_alone = plan_budget(gpu, 64, 0.4, parameters=7e9)
    assert size_alone.tokens == pytest.approx(140e9)
    back = plan_budget(gpu, 64, 0.4, parameters=7e9, days=size_alone.days)
    assert back.tokens == pytest.approx(140e9)
    assert plan_budget(gpu, 64, 0.4, tokens=140e9, days=size_alone.days).parameters == pytest.approx(7e9)
    assert plan_budget(gpu, 64, 0.4, tokens=140e9).parameters == pytest.approx(7e9)
    with pytest.raises(PlanError, match="give two of them"):
        plan_budget(gpu, 64, 0.4, tokens=140e9, parameters=7e9, days=1)


@pytest.mark.parametrize(
    ("tokens_per_parameter", "says"), [(1.3, "far below"), (12, "below Chinchilla's 20"), (20, "about"), (1875, "as Llama 3 does")]
)
def test_the_verdict(tokens_per_parameter: float, says: str) -> None:
    assert says in verdict(tokens_per_parameter)


def test_each_stage_costs_what_its_operations_take() -> None:
    plan = plan_recipe(recipe(), Assumptions(gpu="h100-sxm", gpus=64, mfu=0.5, usd_per_hour=3.0))
    first, extend, _ = plan.stages
    assert first.seconds == pytest.approx(first.flops / (64 * 989e12 * 0.5))
    assert first.gpu_hours == pytest.approx(first.seconds / 3600 * 64)
    assert first.cost_usd == pytest.approx(first.gpu_hours * 3.0)
    assert first.cost_to_pretraining == 1.0
    assert extend.cost_to_pretraining == pytest.approx(extend.flops / first.flops)
    assert plan.cost_usd == pytest.approx(sum(stage.cost_usd for stage in plan.stages))
    assert plan.tokens is not None and plan.tokens.pretraining_tokens == first.tokens + extend.tokens


def test_ranks_are_the_recipes_with_all_nodes_present() -> None:
    assert plan_recipe(recipe(), Assumptions()).gpus == 64
    assert plan_recipe(recipe(), Assumptions(gpus=8)).gpus == 8


def test_shares_that_are_filled_up_are_computed_and_told() -> None:
    plan = plan_recipe(recipe(), Assumptions(gpus=48))
    extend = plan.stages[1]
    assert extend.tokens_per_step == 64 * 131_072
    assert extend.flops_per_step == pytest.approx(96 * 131_072 * extend.flops_per_token)
    assert any("64 samples are filled up to 96" in note for note in plan.notes)


def test_what_does_not_fit_is_said_with_what_would_help() -> None:
    plan = plan_recipe(recipe(), Assumptions(gpu="l4", gpus=512))
    said = [note for note in plan.notes if "does not fit" in note]
    assert said == [
        'pretrain, dpo: it does not fit (use activation_checkpointing = "block")',
        'extend: it does not fit (use activation_checkpointing = "block", context_parallel = 4)',
    ]
    assert all(stage.fits is False for stage in plan.stages)


def test_what_only_flash_attn_computes_is_told() -> None:
    """torch masks documents itself, but for heads that are no multiple of 8 wide; ALiBi it does not."""

    def told(**changes: Any) -> list[str]:
        model = msgspec.structs.replace(recipe().model, **changes)
        plan = plan_recipe(msgspec.structs.replace(recipe(), model=model), Assumptions(gpus=512))
        return [note.partition(" (")[0] for note in plan.notes if "extra `gpu`" in note]

    assert told() == []
    assert told(position="alibi") == ["pretrain, extend, dpo: the estimate for ALiBi assumes flash-attn"]
    assert told(head_dim=68) == ["dpo: the estimate for masked documents assumes flash-attn"]


def test_a_recipe_for_processors_is_planned_on_them_with_its_threads() -> None:
    plan = plan_recipe(msgspec.structs.replace(recipe(), cluster=Cluster(device="cpu", ranks_per_node=2, threads=4)), Assumptions())
    assert (plan.gpu.name, plan.gpus) == ("cpu", 2)
    assert plan.peak_flops_per_second_per_gpu == pytest.approx(4 * ACCELERATORS["cpu"].bfloat16_tflops * 1e12)
    assert plan.stages[0].fits is None


def test_a_recipe_that_pretrains_nothing_has_no_verdict_and_no_ratio() -> None:
    stage = msgspec.structs.replace(recipe().stage[2], name="only")
    plan = plan_recipe(msgspec.structs.replace(recipe(), stage=(stage,)), Assumptions())
    assert plan.tokens is None and plan.stages[0].cost_to_pretraining is None and plan.factors == ()


@pytest.mark.parametrize(
    ("text", "value"), [("7B", 7e9), ("1.5T", 1.5e12), ("350M", 350e6), ("7e9", 7e9), ("70_000", 70_000), (" 12k ", 12e3)]
)
def test_sizes_are_read_as_people_write_them(text: str, value: float) -> None:
    assert parse_count(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "B", "seven", "-7B", "7BB", "0", "nan", "1e999"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"350M, 7B or 1\.5T"):
        parse_count(text)


def test_numbers_are_written_as_people_read_them() -> None:
    assert [count(v) for v in (999, 2048, 6.74e9, 1.5e12)] == ["999", "2.05k", "6.74B", "1.50T"]
    assert [size(v) for v in (512, 280e9, 9.96e9, 1.2e15)] == ["512 B", "280 GB", "10.0 GB", "1.20 PB"]
    assert [span(v) for v in (2e-5, 0.012, 8.5, 250, 11_100, 1_231_200, 1e9)] == [
        "20 µs",
        "12 ms",
        "8.5 s",
        "4 min 10 s",
        "3 h 05 min",
        "14 d 6 h",
        "31.7 years",
    ]
    assert [money(v) for v in (0, 0.001, 1.5, 1234.5, 2e6)] == ["$0.00", "< $0.01", "$1.50", "$1,234", "$2.00M"]
    assert [factor(v) for v in (16, 1.25, 0.375, 256, 1875)] == ["16", "1.25", "0.375", "256", "1,875"]


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_is_planned_with(name: str) -> None:
    plan = plan_recipe(recipe(), Assumptions(gpu=name))
    assert plan.seconds > 0 and plan.gpu.name == name
    fp8 = ACCELERATORS[name].fp8_tflops
    assert fp8 is None or fp8 > ACCELERATORS[name].bfloat16_tflops >= ACCELERATORS[name].float32_tflops


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "long.toml"
    place.write_text(LONG)
    return place


@pytest.mark.parametrize("columns", [80, 200])
def test_the_tables_fit_the_terminal_and_no_name_is_cut(file: Path, columns: int) -> None:
    done = midwatch(str(file), "--gpu", "h200", "--pipeline", "4", columns=columns)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    rows = [line for line in lines if "(" not in line and ";" not in line and ":" not in line]
    assert max(map(len, rows)) <= columns
    for title in ("PARAMETERS", "COMPUTE", "FROM STAGE TO STAGE", "MEMORY A GPU", "PIPELINE BUBBLE", "TOKENS OF PRETRAINING"):
        assert any(line.startswith(title) for line in lines), title
    assert "16 x" in done.stdout and "256 x" in done.stdout and "$" in done.stdout


def test_json_has_the_same_figures_and_reads_back(file: Path) -> None:
    done = midwatch(str(file), "--json")
    plan = msgspec.json.decode(done.stdout, type=Plan)
    assert plan == plan_recipe(recipe(), Assumptions())
    raw: dict[str, Any] = json.loads(done.stdout)
    assert raw["stages"][0]["memory_per_gpu"]["weights_bytes"] > 0
    budget = json.loads(midwatch("--params", "7B", "--json").stdout)
    assert budget["tokens"] == 140e9 and budget["state"]["optimizer_bytes"] == 56e9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere.toml",), "no such recipe"),
        ((), "give a recipe, or a budget"),
        (("--params", "seven"), "350M, 7B or 1.5T"),
        (("--params", "7B", "--gpu", "h100"), "did you mean h100-sxm or h100-nvl or h100-pcie?"),
        (("--params", "7B", "--gpu", "abacus"), "known are: b200, h200, h100-sxm"),
        (("--params", "7B", "--gpu", "a100-80gb", "--precision", "fp8"), "use bfloat16"),
        (("--params", "7B", "--mfu", "40"), "must lie above 0 and not above 1"),
        (("--params", "7B", "--mfu", "nan"), "must lie above 0 and not above 1"),
        (("--params", "7B", "--price", "-1"), "must not be negative"),
        (("--params", "7B", "--gpus", "0"), "--gpus: 0 must be at least 1"),
        (("--params", "7B", "--tokens", "1T", "--days", "3", "--gpus", "8"), "give two of them"),
        (("--params", "7B", "--pipeline", "4"), "--pipeline needs a recipe"),
        (("--days", "14"), "--gpus 64"),
        (("--days", "0", "--gpus", "8"), "must be above 0"),
        (("long.toml", "--days", "14"), "--days is for a budget without a recipe"),
        (("long.toml", "--pipeline", "3"), "64 GPUs are not a multiple of 3, for pipeline 3 (use --gpus 63 or 66)"),
        (("long.toml", "--pipeline", "4", "--virtual", "2", "--micro-batches", "6"), "use 8, or --virtual 1"),
        (("long.toml", "--virtual", "2"), "--virtual needs --pipeline"),
    ],
)
def test_bad_input_ends_with_2_and_the_way_out(words: tuple[str, ...], says: str, file: Path) -> None:
    done = midwatch(*words, cwd=file.parent)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_planning_imports_no_torch(file: Path) -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['midwatch', 'plan', {str(file)!r}]\n"
        "try:\n    runpy.run_module('midwatch', run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit(bool({'torch', 'textual'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_that_is_not_at_hand_is_said_to_be_assumed() -> None:
    absent = msgspec.structs.replace(recipe(), tokenizer=msgspec.structs.replace(recipe().tokenizer, path="/nowhere/my.model"))
    plan = plan_recipe(absent, Assumptions())
    assert plan.vocabulary == 100_000
    assert any("/nowhere/my.model is not here" in note for note in plan.notes)


def test_a_tokenizer_json_and_what_its_chat_template_adds_are_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({chr(n): n for n in range(32, 127)} | {"<0>": 0}, [])).save(str(path))
    tokenizer = msgspec.structs.replace(recipe().tokenizer, path=str(path))
    plain = plan_recipe(msgspec.structs.replace(recipe(), tokenizer=tokenizer), Assumptions())
    chatml = plan_recipe(
        msgspec.structs.replace(recipe(), tokenizer=msgspec.structs.replace(tokenizer, template="chatml")), Assumptions()
    )
    assert plain.vocabulary == 127 + 7, "no file says that it has a BOS"
    assert chatml.vocabulary == plain.vocabulary + 2


def test_an_embedding_with_more_rows_than_the_tokenizer_has_ids_is_planned_with_them() -> None:
    padded = msgspec.structs.replace(recipe(), model=msgspec.structs.replace(recipe().model, vocabulary=128_256))
    assert plan_recipe(padded, Assumptions()).parameters.total == LLAMA_8B.parameters(128_256)


def test_stages_that_only_change_their_batch_change_no_factor() -> None:
    stages = recipe().stage[:1]
    other: Stage = msgspec.structs.replace(stages[0], name="again", global_batch=128)
    found = plan_recipe(msgspec.structs.replace(recipe(), stage=(*stages, other)), Assumptions()).factors[0]
    assert msgspec.structs.astuple(found)[2:] == (1, 1, 1, 1, 1, 1)
