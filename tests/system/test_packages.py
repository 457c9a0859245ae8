"""What packages of others bring, found by their entry points and used through the command line: objectives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.harness import Run

SPEC = """
from typing import Annotated

import msgspec

from midwatch.objectives.setting import Setting
from midwatch.objectives.spec import Chart, ObjectiveSpec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    focus: Annotated[float, Setting("power of a token's missing probability", least=0.0, most=5.0, live=(0.0, 5.0))] = 2.0


SPEC = ObjectiveSpec(
    name="focal",
    summary="Predicts every next token of an answer, the more so the less likely it is.",
    implementation="acme_objectives.loss:objective",
    sources=("sft",),
    sample="sft",
    settings=Settings,
    metrics={"focal/missing": "mean probability that a target lacks"},
    charts=((Chart("focal/missing", "missing probability"),),),
)
"""
LOSS = '''
import torch

from trainer.objectives.loss import real, summed
from trainer.objectives.objective import Objective


def objective(stage):
    return Objective(loss, lambda mask: float(mask.sum()), ("focal/missing",))


def loss(policy, rows, settings, extra):
    """Lin et al. 2017, equation 4."""
    policy = real(policy, rows.mask)
    missing = -torch.expm1(policy)
    return summed(-missing ** settings["focus"] * policy, rows.mask, {"focal/missing": missing.detach()})
'''
STEPS = 120
RECIPE = """
[run]
name = "focal"

[model]
num_layers = 1
hidden_size = 32
num_heads = 2

[tokenizer]
vocab = 512
sample_bytes = 100_000

[data]
held_out = 0.1

[[data.source]]
name = "questions"
kind = "sft"
origin = "stdlib-sft"
max_documents = 60

[cluster]
ranks_per_node = 1

[report]
seconds = 0.2

[[stage]]
name = "answers"
objective = "focal"
steps = STEPS
context = 64
global_batch = 4
lr = 1e-3
mixture = { questions = 1.0 }
eval_every = 1000
eval_samples = 4
focus = 1.5
""".replace("STEPS", str(STEPS))


def package(place: Path, name: str, entries: str, **modules: str) -> None:
    """A package as an installer leaves it: its modules, and its metadata beside them."""
    for module, text in {"__init__": "", **modules}.items():
        file = place / name / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    metadata = place / f"{name}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(f"[midwatch.objectives]\n{entries}\n")


@pytest.fixture
def site(run: Run, tmp_path: Path) -> Path:
    """Where packages are installed for this run."""
    place = tmp_path / "site"
    place.mkdir()
    run.environment = run.environment | {"PYTHONPATH": str(place)}
    return place


def test_an_objective_of_another_package_trains_and_is_steered(run: Run, site: Path) -> None:
    package(site, "acme_objectives", "focal = acme_objectives.spec:SPEC", spec=SPEC, loss=LOSS)
    package(site, "broken", "halved = broken.spec:SPEC\nother = broken.absent:SPEC", spec="raise OSError('no licence')")
    file = run.root.parent / "focal.toml"
    file.write_text(RECIPE)
    checked = run.midwatch("check", str(file))
    assert checked.returncode == 0, checked.stderr
    planned = run.midwatch("plan", str(file))
    assert planned.returncode == 0 and "focal" in planned.stdout, planned.stderr
    script = "2: pause, set focus 0.5, resume"
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", "--script", script, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(c.verb, c.state) for c in run.ledger().commands.values()] == [(verb, "done") for verb in ("pause", "set", "resume")]
    assert run.ledger().commands[2].detail == {"key": "focus", "old": 1.5, "new": 0.5}
    assert "focus = 1.5" in (run.root / "recipe.toml").read_text()
    missing = run.rows("focal/missing")
    assert len(missing) == STEPS and all(0.5 < row.value < 1 for row in missing)
    assert run.rows("eval/questions/missing"), "its own metrics on held-out samples"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ('"focal"', '"halved"'),
            'focal.toml:31: stage "answers": objective "halved" of broken 1.2 (broken.spec:SPEC) cannot be loaded',
        ),
        (
            ('"focal"', '"other"'),
            "cannot be loaded: ModuleNotFoundError: No module named 'broken.absent' (correct or uninstall it)",
        ),
        (('"focal"', '"fokal"'), 'there is no objective "fokal" (did you mean "focal"?'),
        (("focus = 1.5", "focus = 9"), 'focal.toml:39: stage "answers": focus: must lie between 0 and 5'),
        (("focus = 1.5", "fokus = 1"), "unknown key 'fokus' (did you mean 'focus'?)"),
        (("focus = 1.5", "beta = 1"), 'beta: is for objective "dpo" or "kto", this stage\'s is "focal" (drop it)'),
    ],
)
def test_a_broken_objective_is_named_and_stops_what_asks_for_it(run: Run, site: Path, change: tuple[str, str], says: str) -> None:
    package(site, "acme_objectives", "focal = acme_objectives.spec:SPEC", spec=SPEC, loss=LOSS)
    package(site, "broken", "halved = broken.spec:SPEC\nother = broken.absent:SPEC", spec="raise OSError('no licence')")
    file = run.root.parent / "focal.toml"
    file.write_text(RECIPE.replace(*change))
    done = run.midwatch("check", str(file))
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_two_packages_with_one_name_and_a_spec_of_another_kind_are_refused(run: Run, site: Path) -> None:
    file = run.root.parent / "focal.toml"
    package(site, "acme_objectives", "focal = acme_objectives.spec:SPEC\nplain = acme_objectives.spec:Settings", spec=SPEC)
    package(site, "rival", "focal = rival.spec:SPEC\ndpo = rival.spec:SPEC", spec=SPEC)
    for name, says in (
        ("focal", 'objective "focal" is brought twice, by'),
        ("dpo", 'objective "dpo" is brought twice, by midwatch (trainer.objectives.dpo.spec:SPEC) and rival 1.2 (rival.spec:SPEC)'),
        ("plain", "is a StructMeta, not an ObjectiveSpec"),
    ):
        file.write_text(RECIPE.replace('"focal"\nsteps', f'"{name}"\nsteps'))
        done = run.midwatch("check", str(file))
        assert done.returncode == 2 and says in done.stderr, done.stderr
    file.write_text(RECIPE.replace('"focal"\nsteps', '"sft"\nsteps').replace("focus = 1.5", ""))
    assert run.midwatch("check", str(file)).returncode == 0, "others work"


def test_a_loss_that_cannot_be_loaded_ends_the_run_at_once_with_its_reason(run: Run, site: Path) -> None:
    package(site, "acme_objectives", "focal = acme_objectives.spec:SPEC", spec=SPEC, loss="import no_such_library")
    file = run.root.parent / "focal.toml"
    file.write_text(RECIPE)
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", timeout=120)
    says = "acme_objectives.loss:objective cannot be loaded: ModuleNotFoundError: No module named 'no_such_library'"
    assert done.returncode == 1 and says in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("cannot be loaded") <= 3 and "Traceback" not in done.stdout, "it is not tried again"
