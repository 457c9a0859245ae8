"""How likely a text reads after a reference: the perplexity of an n-gram model of words, trained here and scored by kenlm.

Words, not SentencePiece pieces: cleaning comes before the tokenizer is trained, and a model of words needs none. They are
lower-cased, digits become 0, and punctuation and characters of scripts without spaces stand alone, after CCNet's
normalisation (Wenzek et al. 2020, section 3.3). A document's perplexity is CCNet's:

    10 ^ (- sum over lines of log10 p(line) / sum over lines of (words of the line + 1))

the one more being the end of the line, and lines without words left out.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.common.errors import ShardError, SpecError
from shards.common.optional import need
from shards.filters.kneser_ney import BOS, EOS, NgramOrder, estimate
from shards.filters.settings import Perplexity

# Symbols stand alone, and so do the characters of scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = (
    (0xE00, 0xEFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_PIECE = 1 << 20  # characters of a text treated at a time, so that memory stays bounded
_SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def _tables() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """For every code point, what stands for it, and whether it stands alone; takes half a second, once a process."""
    folded = np.arange(0x110000, dtype=np.uint32)
    alone = np.zeros(0x110000, np.bool_)
    for point in range(0x110000):
        char = chr(point)
        if char.isdecimal():
            folded[point] = ord("0")
        elif not (char.isalnum() or char.isspace() or unicodedata.category(char)[0] in "MC"):
            alone[point] = True
    for first, last in _UNSPACED:
        alone[first : last + 1] = True
    folded[0xD800:0xE000] = 0xFFFD
    return folded, alone


def _spaced(text: str) -> str:
    folded, alone = _tables()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    apart = alone[points]
    places = np.arange(len(points)) + 2 * np.cumsum(apart) - apart
    out = np.full(len(points) + 2 * int(np.count_nonzero(apart)), ord(" "), np.uint32)
    out[places] = folded[points]
    return out.tobytes().decode("utf-32-le")


def sentences(text: str) -> Iterator[str]:
    """The lines of a text as they are counted and scored: words with one space between; lines without words left out."""
    text = text.lower()
    for line in "".join(_spaced(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE)).splitlines():
        if words := line.split():
            yield " ".join(words)


class Trained(NamedTuple):
    """What a model was made of."""

    words: int  # of the reference, ends of lines not counted
    vocabulary: int  # words told apart, <unk>, <s> and </s> included
    ngrams: tuple[int, ...]  # of each order
    whole: bool  # whether the whole reference was read


def train(texts: Iterable[str], settings: Perplexity, path: Path) -> Trained:
    """Write the model of a reference as an ARPA file; the same texts give the same bytes.

    Raises SpecError where the reference has no words.
    """
    numbers: dict[str, int] = {}
    chunks: list[npt.NDArray[np.int32]] = []
    total, whole = 0, True
    for text in texts:
        if total >= settings.max_words:
            whole = False
            break
        ids: list[int] = []
        for sentence in sentences(text):
            words = sentence.split(" ")
            total += len(words)
            ids.append(-BOS)
            ids += [numbers.setdefault(word, len(numbers) + 1) for word in words]
            ids.append(-EOS)
        chunks.append(np.array(ids, np.int32))
    if not total:
        raise SpecError(f'perplexity: the reference "{settings.reference}" has no words (name text like what is wanted)')
    seen = np.concatenate(chunks)
    chunks.clear()
    names = list(numbers)
    counts = np.bincount(seen[seen > 0], minlength=len(names) + 1)[1:].tolist()
    chosen = sorted(range(len(names)), key=lambda number: (-counts[number], names[number]))[: settings.vocabulary]
    vocabulary = [*_SPECIAL, *(names[number] for number in chosen)]
    renumbered = np.zeros(len(names) + 1, np.int64)  # others are <unk>, 0
    renumbered[np.array(chosen) + 1] = np.arange(len(chosen)) + len(_SPECIAL)
    text_ids = np.where(seen > 0, renumbered[np.maximum(seen, 0)], -seen)
    orders = [order for order in estimate(text_ids, len(vocabulary), settings.order, settings.min_count) if len(order.words)]
    _write_arpa(orders, vocabulary, path)
    return Trained(total, len(vocabulary), tuple(len(order.words) for order in orders), whole)


def _write_arpa(orders: list[NgramOrder], vocabulary: list[str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(order.words)}\n" for n, order in enumerate(orders, 1))
        for n, order in enumerate(orders, 1):
            file.write(f"\n\\{n}-grams:\n")
            for begin in range(0, len(order.words), 1 << 16):
                rows = slice(begin, begin + (1 << 16))
                with np.errstate(divide="ignore"):
                    logs = np.maximum(np.log10(order.probability[rows]), -99).tolist()
                    backs = np.maximum(np.log10(order.backoff[rows]), -99).tolist()
                for words, log, back in zip(order.words[rows].tolist(), logs, backs, strict=True):
                    name = " ".join([vocabulary[word] for word in words])
                    file.write(f"{log:.7g}\t{name}\t{back:.7g}\n" if n < len(orders) else f"{log:.7g}\t{name}\n")
        file.write("\n\\end\\\n")


class Scorer:
    """Scores texts by a model's ARPA file. Raises SpecError where kenlm is missing, ShardError where the file is none."""

    def __init__(self, path: Path) -> None:
        kenlm = need("kenlm", "scoring perplexity")
        config = kenlm.Config()
        config.show_progress = False
        config.arpa_complain = kenlm.ARPALoadComplain.NONE
        try:
            self._model = kenlm.Model(str(path), config)
        except (OSError, RuntimeError) as error:
            raise ShardError(f"{path}: kenlm cannot read the model: {error} (train it again)") from None

    def perplexity(self, text: str) -> float:
        """CCNet's perplexity of a document, 1 or more; infinite where it has no words."""
        score, length = 0.0, 0
        for sentence in sentences(text):
            score += self._model.score(sentence, bos=True, eos=True)
            length += sentence.count(" ") + 2
        return 10.0 ** min(-score / length, 99) if length else math.inf


def judge(perplexity: float, settings: Perplexity) -> str:
    """Why a text of this perplexity is refused, or ""."""
    if settings.max_perplexity and perplexity > settings.max_perplexity:
        return "perplexity: too high"
    if perplexity < settings.min_perplexity:
        return "perplexity: too low"
    return ""
