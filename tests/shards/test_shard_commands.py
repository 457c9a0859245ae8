"""The commands over shards as a user or a script calls them, and the format's page as a stranger would use it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards.build.build import build
from shards.format.corpus import Corpus
from shards.spec import Build, Clean, Source
from shards.tokenization.tokenizer import Tokenizer

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
    from shards.format import manifest

    directory = copied / "code/train"
    whole = manifest.load(directory)
    plain = json.loads((directory / "manifest.json").read_text())
    a, b = plain["shards"][0]["columns"], plain["shards"][1]["columns"]
    a["ends"], b["ends"] = b["ends"], a["ends"]
    first, second = plain["shards"][:2]
    first["documents"], second["documents"] = second["documents"], first["documents"]
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


def merged(out: Path, *builds: Path) -> subprocess.CompletedProcess[str]:
    return shards("merge", out, *builds)


@pytest.fixture(scope="module")
def others(built: Path, tmp_path_factory: pytest.TempPathFactory, make_spec) -> tuple[Path, Path, Path]:
    """With the tokenizer of `built`: less of its code, and another source; with one of its own, its code."""
    from shards.build.build import build
    from shards.spec import Source
    from shards.spec import TokenizerSpec as Given

    place, given = tmp_path_factory.mktemp("others"), Given(path=str(built / "tokenizer.model"))
    code = Source(name="code", kind="text", origin="stdlib-code", max_documents=50)
    more = Source(name="more", kind="text", origin="stdlib-topics", max_documents=12)
    specs = (
        make_spec(place / "less", source=(code,), tokenizer=given),
        make_spec(place / "more", source=(more,), tokenizer=given),
        make_spec(place / "own", source=(code,), tokenizer=Given(vocab=500, sample_bytes=100_000)),
    )
    return tuple(build(spec, workers=0) for spec in specs)


def test_cat_shows_a_sample_as_the_trainer_learns_it(built: Path) -> None:
    from shards.sampling.batches import BatchFeed

    for source, kind in (("chat", "sft"), ("code", "text"), ("pairs", "preference")):
        feed = BatchFeed(built, "train", kind, 120, {source: 1}, 0)
        name, _, number = feed.order.at(7)
        batch = feed.samples(name, number, number + 1)
        told = json.loads(shards("cat", built, "--source", source, "--sample", number, "--context", 120, "--json").stdout)
        learned = [id for part in told["parts"] for id, mask in zip(part["ids"], part["mask"] or (), strict=False) if mask]
        if kind == "text":
            assert told["ids"] == [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
            assert "".join(part["text"] for part in told["parts"]) == told["text"]
        else:
            assert learned == [int(id) for row in range(len(batch.mask)) for id in batch.targets[row, batch.mask[row] > 0]]


def test_cat_marks_what_is_learned_where_there_is_no_colour_and_colours_it_on_a_terminal(built: Path) -> None:
    plain = shards("cat", built, "--source", "pairs", "--document", 0).stdout
    assert re.fullmatch(r"(?s)<\|user\|>.*<\|assistant\|>⟦.*\[EOS\]⟧⟨.*\[EOS\]⟩\n", plain)
    command = f"stty cols 80; {sys.executable} -m shards cat {built} --source pairs --sample 0 --context 300"
    shown = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True).stdout
    assert "\x1b[32m" in shown and "\x1b[31m" in shown and "⟦" not in shown and "document 0, rejected" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sample", "0"], "--context"), (["--sample", "99999", "--context", "64"], r"samples 0 to \d+ at a context of 64")],
)
def test_cat_of_a_sample_that_is_not_there_says_so(built: Path, arguments: list[str], message: str) -> None:
    done = shards("cat", built, "--source", "code", *arguments)
    assert done.returncode == 2 and re.search(message, done.stderr) and done.stderr.count("\n") == 1


def test_stats_count_the_vocabularys_use_and_the_documents_in_a_window(built: Path) -> None:
    entries = json.loads(shards("stats", built / "code", "--context", 500, "--json").stdout)
    corpora = [Corpus(built, "code", split) for split in ("train", "held_out")]
    ids = np.concatenate([corpus.read(0, corpus.tokens) for corpus in corpora])
    found = entries[0]["vocabulary"]
    assert found["tokens"] == len(ids) and found["never"] == found["ids"] - len(np.unique(ids))
    assert all(int(np.count_nonzero(ids == number)) == count for number, _, count in found["top"])
    entry = next(entry for entry in entries if entry["split"] == "train")
    windows = (corpora[0].tokens - 1) // 500
    documents = [corpora[0].document_at(n * 500 + 499) - corpora[0].document_at(n * 500) + 1 for n in range(windows)]
    assert entry["documents_in_window"] == pytest.approx(np.mean(documents), abs=0.01)
    assert sum(entry["lengths"].values()) == corpora[0].documents
    assert "vocabulary" not in json.loads(shards("stats", built, "--quick", "--json").stdout)[0]


def test_diff_of_a_build_with_a_copy_is_nothing(built: Path, copied: Path) -> None:
    done = shards("diff", built, copied)
    assert done.returncode == 0 and done.stdout.startswith("the same: 8 manifests")


def test_diff_names_what_differs_down_to_the_first_document(built: Path, others: tuple[Path, Path, Path]) -> None:
    done = shards("diff", built, others[0], "--json")
    found = {each["what"]: (each["a"], each["b"]) for each in json.loads(done.stdout)["differences"]}
    assert done.returncode == 1 and found["spec.source code.max_documents"] == (60, 50)
    assert found["chat/train"] == ("there", None) and found["code/train.documents"][0] > found["code/train.documents"][1]
    number = next(int(what.split()[-1]) for what in found if what.startswith("code/train, document"))
    x, y = (Corpus(root, "code", "train") for root in (built, others[0]))

    def at(corpus: Corpus, document: int) -> list[int] | None:
        return corpus.read(*corpus.span(document)).tolist() if document < corpus.documents else None

    assert at(x, number) != at(y, number) and all(at(x, before) == at(y, before) for before in range(number))
    told = shards("diff", others[0], others[2])
    assert "tokenizer: " in told.stdout and "code/train, document" not in told.stdout


def test_merge_makes_one_directory_of_builds_whose_sources_differ_that_runs_take(built: Path, others, tmp_path: Path) -> None:
    from shards.build.marker import is_built, read_marker

    done = merged(tmp_path / "all", built, others[1])
    assert done.returncode == 0, done.stderr
    assert shards("verify", tmp_path / "all").returncode == 0
    for root, name in ((built, "chat"), (others[1], "more")):
        x, y = Corpus(root, name, "train"), Corpus(tmp_path / "all", name, "train")
        assert np.array_equal(x.read(0, x.tokens), y.read(0, y.tokens)) and x.manifest.digest == y.manifest.digest
    marker = read_marker(tmp_path / "all")
    assert marker is not None and is_built(marker.spec)
    assert [source.name for source in marker.spec.data.source] == ["code", "topics", "chat", "pairs", "more"]


def test_merge_puts_the_shards_of_one_source_one_after_the_other_and_takes_the_same_ones_once(
    built: Path, copied: Path, others, tmp_path: Path
) -> None:
    done = merged(tmp_path / "all", built, others[0], copied)
    assert done.returncode == 0, done.stderr
    x, y, both = (Corpus(root, "code", "train") for root in (built, others[0], tmp_path / "all"))
    assert np.array_equal(both.read(0, both.tokens), np.concatenate([x.read(0, x.tokens), y.read(0, y.tokens)]))
    assert both.documents == x.documents + y.documents and both.span(x.documents)[0] == x.tokens
    assert "no recipe describes it" in done.stdout


def test_merge_refuses_other_tokenizers_what_is_there_and_what_is_damaged_and_leaves_nothing(
    copied: Path, others, tmp_path: Path
) -> None:
    done = merged(tmp_path / "all", others[0], others[2])
    assert done.returncode == 2 and f'build it again with [tokenizer] path = "{others[0]}/tokenizer.model"' in done.stderr
    assert merged(copied, others[0]).returncode == 2
    file = copied / "code/train/tokens-00001.zst"
    raw = bytearray(file.read_bytes())
    raw[60] ^= 1
    file.write_bytes(raw)
    done = merged(tmp_path / "all", copied, others[1])
    assert done.returncode == 1 and "tokens-00001.zst" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_build_takes_a_recipe_by_midwatch_and_a_spec_by_itself(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[run]\nname = "r"\n[model]\nlayers = 1\nwidth = 16\nheads = 2\n[data]\ndir = "shards"\n[tokenizer]\nvocab = 400\n'
        'sample_bytes = 100000\n[[data.source]]\nname = "t"\nkind = "text"\norigin = "stdlib-topics"\nmax_documents = 9\n'
        '[[stage]]\nname = "p"\nobjective = "pretrain"\nsteps = 1\ncontext = 32\nglobal_batch = 1\nmixture = { t = 1 }\n'
    )
    command = [sys.executable, "-m", "midwatch", "shards", "build"]
    done = subprocess.run([*command, recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'shards'}\n" and Corpus(tmp_path / "shards", "t", "train").tokens
    assert shards("build", recipe).returncode == 2 and shards("build").returncode == 2
    recipe.write_text(recipe.read_text().replace("steps = 1", "steps = 0"))
    done = subprocess.run([*command, recipe], capture_output=True, text=True)
    assert done.returncode == 2 and "recipe.toml:" in done.stderr and "Traceback" not in done.stderr


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
    shards("cat", built, "--source", "chat", "--sample", 0, "--context", 77)
    shards("diff", built, built)
    assert state() == before


def test_shards_import_no_torch_and_none_of_the_other_packages() -> None:
    code = (
        "import sys, shards.build.build, shards.commands, shards.sampling.batches, shards.sampling.prefetch\n"
        "print(*[name for name in ('torch', 'trainer', 'launcher', 'tui', 'midwatch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


def test_report_shows_what_was_removed_and_why(tmp_path: Path, make_spec: Callable[..., Build]) -> None:
    texts = [json.dumps({"text": f"{word} " * 200}) for word in ("one", "two", "one")]
    (tmp_path / "a.jsonl").write_text("\n".join(texts * 5))
    source = Source(name="a", kind="text", origin="jsonl", path=str(tmp_path / "a.jsonl"))
    code = Source(name="code", kind="text", origin="stdlib-code", max_documents=20)
    out = build(make_spec(tmp_path / "out", source=(source, code), clean=Clean(near_dup_threshold=0)), workers=0)
    shown = shards("report", out)
    assert shown.returncode == 0 and "exact duplicate" in shown.stdout and "a.jsonl:3" in shown.stdout
    found = json.loads(shards("report", out, "--json").stdout)
    assert found["sources"][0]["funnel"]["reasons"]["exact duplicate"]["documents"] == 13
    assert shards("report", out, "--html", tmp_path / "page.html").returncode == 0
    assert "exact duplicate" in (tmp_path / "page.html").read_text()
    plain = shards("report", tmp_path)
    assert plain.returncode == 1 and "a build writes it when it is done" in plain.stderr
