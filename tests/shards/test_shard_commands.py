"""The commands over shards as a user or a script calls them, and the format's page as a stranger would use it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards.corpus import Corpus
from shards.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs/shard-format.md"


def shards(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "shards", *map(str, arguments)], capture_output=True, text=True)


def test_the_pages_reader_gives_every_token_of_every_document(built: Path, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code) == 1 and code[0].count("\n") <= 24
    (tmp_path / "reader.py").write_text(code[0])
    command = [sys.executable, "-I", str(tmp_path / "reader.py"), str(built / "code/train")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    corpus = Corpus(built, "code", "train")
    assert len(corpus.manifest.shards) > 1 and len(lines) == corpus.documents
    for document, line in enumerate(lines):
        assert np.array_equal(np.array(line.split(), int), corpus.read(*corpus.span(document)))


def test_the_pages_rule_for_the_digest_is_the_one_used(built: Path) -> None:
    plain = json.loads((built / "chat/train/manifest.json").read_text())
    digest, plain["digest"] = plain["digest"], ""
    raw = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert xxhash.xxh3_128_hexdigest(raw) == digest


def test_the_pages_reserved_ids_are_the_ones_used(built: Path) -> None:
    tokenizer = Tokenizer.load(built / "tokenizer.model")
    for name, number in tokenizer.reserved.items():
        assert f"`{name}` {number}" in PAGE.read_text().replace("\n", " ")


def test_inspect_names_every_source_and_split(built: Path) -> None:
    shown = shards("inspect", built)
    assert shown.returncode == 0
    for name in ("code", "topics", "chat", "pairs"):
        assert len(re.findall(rf"^{name} +(train|held_out) ", shown.stdout, re.M)) == 2
    plain = json.loads(shards("inspect", built / "code/train", "--json").stdout)
    assert len(plain) == 1 and plain[0]["source"] == "code" and plain[0]["shards"]


def test_verify_finds_whole_shards_whole(built: Path) -> None:
    done = shards("verify", built)
    assert (done.returncode, done.stderr) == (0, "") and "8 manifests" in done.stdout


def test_verify_names_all_that_is_bad_and_exits_with_1(copied: Path) -> None:
    def damage(name: str, at: int = 60) -> None:
        raw = bytearray((copied / name).read_bytes())
        raw[at] ^= 1
        (copied / name).write_bytes(raw)

    damage("code/train/tokens-00001.zst")
    damage("chat/train/mask-00000.zst", -40)
    (copied / "pairs/train/ends-00000.zst").unlink()
    done = shards("verify", copied)
    assert done.returncode == 1
    for name in ("code/train/tokens-00001.zst", "chat/train/mask-00000.zst", "pairs/train/ends-00000.zst"):
        assert name in done.stderr
    assert len(done.stderr.splitlines()) == 3
    bad = json.loads(shards("verify", copied, "--json").stdout)["bad"]
    assert bad == done.stderr.splitlines()
    quick = shards("verify", copied, "--quick")
    assert quick.returncode == 1 and "tokens-00001" not in quick.stderr and "mask-00000" in quick.stderr


def test_verify_finds_columns_that_do_not_belong_together(copied: Path) -> None:
    """Every file whole and named in the manifest with its right hashes, but the ends are another shard's."""
    from shards import manifest

    directory = copied / "code/train"
    whole = manifest.load(directory)
    plain = json.loads((directory / "manifest.json").read_text())
    a, b = plain["shards"][0]["columns"], plain["shards"][1]["columns"]
    a["ends"], b["ends"] = b["ends"], a["ends"]
    plain["digest"] = ""
    raw = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    plain["digest"] = xxhash.xxh3_128_hexdigest(raw)
    (directory / "manifest.json").write_text(json.dumps(plain))
    assert manifest.load(directory).digest != whole.digest
    assert any("the last document ends at" in message for message in manifest.verify(directory))


def test_cat_prints_a_document_or_a_range(built: Path) -> None:
    corpus, tokenizer = Corpus(built, "topics", "train"), Tokenizer.load(built / "tokenizer.model")
    start, stop = corpus.span(2)
    text = tokenizer.decode(corpus.read(start, stop), reserved=True)
    assert shards("cat", built, "--source", "topics", "--document", 2).stdout == text + "\n"
    ids = shards("cat", built, "--source", "topics", "--tokens", f"{start}:{stop}", "--ids").stdout
    assert [int(number) for number in ids.split()] == corpus.read(start, stop).tolist()
    plain = json.loads(shards("cat", built, "--source", "topics", "--document", 2, "--json").stdout)
    assert plain["text"] == text and plain["start"] == start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document", "99999"], "documents 0 to"),
        (["--tokens", "5:x"], "not a range"),
        (["--tokens", "9:5"], "outside"),
        (["--source", "novels", "--document", "0"], "there are: chat, code, pairs, topics"),
    ],
)
def test_cat_asked_wrongly_says_so_in_one_line_and_exits_with_2(built: Path, arguments: list[str], message: str) -> None:
    done = shards("cat", built, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_directory_without_shards_is_said(tmp_path: Path) -> None:
    for name in ("inspect", "verify", "stats"):
        done = shards(name, tmp_path)
        assert done.returncode == 2 and "no shards here" in done.stderr and done.stderr.count("\n") == 1


def test_stats_add_up(built: Path) -> None:
    entries = json.loads(shards("stats", built, "--json").stdout)
    code = next(entry for entry in entries if (entry["source"], entry["split"]) == ("code", "train"))
    lengths = Corpus(built, "code", "train").lengths()
    assert code["tokens"] == lengths.sum() and code["length_min_median_p90_max"][3] == lengths.max()
    assert code["bytes_per_token"] == pytest.approx(code["text_bytes"] / code["tokens"], abs=0.001)
    assert shards("stats", built).returncode == 0


def test_a_pipe_closed_early_is_no_traceback(built: Path) -> None:
    command = f"{sys.executable} -m shards cat {built} --source code --tokens 0: | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_no_command_writes_among_the_shards(built: Path) -> None:
    def state() -> str:
        files = sorted(path for path in built.rglob("*") if path.is_file())
        return hashlib.sha256(repr([(path, path.stat().st_mtime_ns) for path in files]).encode()).hexdigest()

    before = state()
    shards("verify", built)
    shards("stats", built)
    shards("cat", built, "--document", 0)
    assert state() == before


def test_shards_import_no_torch_and_none_of_the_other_packages() -> None:
    code = (
        "import sys, shards.build, shards.commands, shards.feed, shards.prefetch\n"
        "print(*[name for name in ('torch', 'trainer', 'launcher', 'tui', 'midwatch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
