"""Who imports whom, and what a fresh installation finds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tui", "launcher", "trainer", "midwatch", "shards")
TORCH_MAY = {Path("launcher/agent/elastic.py")}


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, by its dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(*packages: str) -> list[Path]:
    return sorted(f for package in packages for f in (ROOT / package).rglob("*.py"))


def test_the_contracts_hold() -> None:
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_only_the_trainer_and_the_agents_own_module_import_torch() -> None:
    wrong = [
        str(file.relative_to(ROOT))
        for file in sources("tui", "launcher", "midwatch", "shards")
        if any(name.split(".")[0] == "torch" for name in imports(file)) and file.relative_to(ROOT) not in TORCH_MAY
    ]
    assert not wrong


def test_what_an_attached_screen_imports_brings_no_torch_along() -> None:
    modules = [
        "midwatch",
        "midwatch.transport.client",
        "launcher.controller.__main__",
        "launcher.agent.__main__",
        "tui.app",
        "shards.build.build",
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building litters the tree that it builds from."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(copy)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_their_files_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {*PACKAGES}
    missing = [f for f in sources(*PACKAGES) if str(f.relative_to(ROOT)) not in names]
    assert missing == []
    styles = [f for p in PACKAGES for f in (ROOT / p).rglob("*.tcss")]
    assert all(str(f.relative_to(ROOT)) in names for f in styles)


def test_an_installation_runs_from_a_foreign_directory_with_a_stray_trainer_in_it(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for stray in ("trainer.py", "launcher.py", "midwatch.py", "shards.py", "tui.py"):
        (elsewhere / stray).write_text("raise SystemExit('a stray module ran')")
    zipfile.ZipFile(wheel).extractall(target)
    path = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{target}"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", *words]
        return subprocess.run(command, cwd=elsewhere, env=path, capture_output=True, text=True, timeout=60)

    done = run("-m", "midwatch", "--help")
    assert done.returncode == 0, done.stderr
    assert "standing watch" in done.stdout
    for module in ("trainer", "launcher.controller", "launcher.agent", "shards"):
        found = run("-c", f"import importlib.util as u; print(u.find_spec({module!r}).origin)")
        assert found.stdout.startswith(str(target)), (module, found.stdout, found.stderr)
    stray = subprocess.run([sys.executable, "-m", "trainer"], cwd=elsewhere, env=path, capture_output=True, text=True, timeout=60)
    assert "a stray module ran" in stray.stderr, "without -P it is found, so the test can fail"
