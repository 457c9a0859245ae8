"""The real vLLM as rollout engine, in an environment of its own (tests/vllm.sh): what it draws is the policy's at every step."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file
from test_trainer_policy import built, ppo, series
from trainer_harness import Ranks, Step, Told, fresh, logs, start_ranks, steered, write_recipe

from midwatch.protocol import Start
from midwatch.recipe import Recipe, Stage, load_recipe
from midwatch.recipe.generate import Generate
from trainer.huggingface import export

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
CONTEXT = 96
MISMATCH = 1e-4


class Vllm:
    """The server's process, always at the same port."""

    def __init__(self, place: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.log = place / "vllm.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self, model: Path) -> None:
        """Returns once it answers."""
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "policy"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(CONTEXT), "--dtype", "float32"]
        command += ["--enforce-eager", "--max-num-seqs", "32", "--logprobs-mode", "processed_logprobs"]
        own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        until(self._answers, 400)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()[-5000:]
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    assert PYTHON.exists(), f"{PYTHON} is not there: `sh tests/vllm.sh` installs it"
    server = Vllm(tmp_path_factory.mktemp("vllm"))
    yield server
    server.close()


def run(recipe: Recipe, vllm: Vllm, place: Path, tied: bool, stage: Stage, by: Any = steered) -> tuple[Path, Ranks]:
    """A pretraining and then a stage that the server draws for; it has heads of 32, the least that vLLM has kernels for."""
    model = msgspec.structs.replace(recipe.model, hidden_size=64, num_heads=2, num_kv_heads=1, tie_embeddings=tied)
    root = built(msgspec.structs.replace(recipe, model=model), place, "run", stage, every=4)
    generate = Generate(engine="vllm", url=vllm.url, weights=str(place / "weights"), timeout=60)
    write_recipe(root, msgspec.structs.replace(load_recipe(root / "recipe.toml"), generate=generate))
    return root, start_ranks(root, 1, by, [], fresh())


def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def alarms(root: Path) -> list[str]:
    return [note["text"] for note in Told.read(root).all("Note") if note["level"] == "alarm"]


def assert_followed(root: Path) -> None:
    found = series(Told.read(root), "policy/logprob_mismatch")
    print(f"policy/logprob_mismatch is {max(found):.1e} at most")
    assert len(found) == 8
    assert max(found) <= MISMATCH


def tied_copy(of: Path, to: Path) -> Path:
    """The same model without an output layer of its own, as most tied models are published."""
    shutil.copytree(of, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(to / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_ppo_of_a_tied_model(recipe: Recipe, vllm: Vllm, tmp_path: Path) -> None:
    """The run comes first, and waits with one copy of the policy. The server is started from a copy that has no output layer."""
    stage = ppo(8, prompts=16, epochs=1, global_batch=16, micro_batch=4, lr=1e-3)
    root, ranks = run(recipe, vllm, tmp_path, True, stage)
    latest = tmp_path / "weights" / "latest"
    try:
        until(latest.exists)
        time.sleep(12)  # two more attempts
        assert len(list((tmp_path / "weights").iterdir())) == 2, "one copy waits, and the link"
        vllm.start(tied_copy(latest.resolve(), tmp_path / "tied"))
        assert ranks.wait(300) == [0], logs(root)
    finally:
        ranks.kill()
    assert_followed(root)


PPO: dict[str, Any] = {"objective": "ppo", "prompts": 16}
GRPO: dict[str, Any] = {"objective": "grpo", "prompts": 4, "num_generations": 4}


@pytest.mark.parametrize(
    ("given", "tied"),
    [(GRPO, False), (GRPO | {"temperature": 0.7}, False), (GRPO, True), (PPO, False)],
    ids=["GRPO, untied", "GRPO, untied, at 0.7", "GRPO, tied", "PPO, untied"],
)
def test_the_server_follows_the_policy(given: dict[str, Any], tied: bool, recipe: Recipe, vllm: Vllm, tmp_path: Path) -> None:
    root, ranks = run(recipe, vllm, tmp_path, tied, ppo(8, **given, epochs=1, global_batch=16, micro_batch=4, lr=1e-3))
    try:
        if not vllm.runs:
            until((tmp_path / "weights" / "latest").exists)
            vllm.start(tmp_path / "weights" / "latest")
        assert ranks.wait(300) == [0], logs(root)
    finally:
        ranks.kill()
    assert_followed(root)
    assert not [text for text in alarms(root) if "weights" in text]


def without_its_head(root: Path, script: list[Step], start: Start) -> None:
    """Ranks that write a tied model as it is published, without its output layer: vLLM then keeps the old one."""
    export.placed = partial(_tied, export.placed)
    steered(root, script, start)


def _tied(placed: Callable[..., Any], *given: Any, untied: bool = False) -> Any:
    return placed(*given)


def test_an_output_layer_that_was_not_taken_over_is_found_before_anything_is_learned(
    recipe: Recipe, vllm: Vllm, tmp_path: Path
) -> None:
    stage = ppo(8, prompts=16, epochs=1, global_batch=16, micro_batch=4, lr=1e-3)
    root, ranks = run(recipe, vllm, tmp_path, True, stage, without_its_head)
    try:
        if not vllm.runs:
            until((tmp_path / "weights" / "latest").exists)
            vllm.start(tmp_path / "weights" / "latest")
        until(lambda: any("answers with other weights than it was told to load" in text for text in alarms(root)))
    finally:
        ranks.kill()
    found = series(Told.read(root), "policy/logprob_mismatch")
    assert all(each <= MISMATCH for each in found)
    assert len(found) <= 1
