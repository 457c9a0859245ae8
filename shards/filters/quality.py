"""How much a text is like the user's good text and unlike the bad: logistic regression on hashed words and pairs of words.

A model's file is a line of JSON (what it was trained on, how it scored on examples kept apart) and the coefficients as
little-endian float32: nothing in it is ever executed.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shards.common.errors import ShardError, SpecError
from shards.common.optional import need
from shards.filters.settings import Quality

FEWEST = 10  # examples of a kind that a model can be trained on
_VERSION = 1


class ClassifierReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a model was trained on, and its scores on the examples kept apart."""

    good: int  # examples, those kept apart included
    bad: int
    held_out: int
    accuracy: float  # at 0.5
    auc: float  # chance that a good example scores above a bad one


class Classifier:
    """A trained model."""

    def __init__(
        self, settings: Quality, report: ClassifierReport, coefficients: npt.NDArray[np.float32], intercept: float
    ) -> None:
        self.settings = settings
        self.report = report
        self._coefficients = coefficients
        self._intercept = intercept
        self._columns = _vectorizer(settings)

    @classmethod
    def train(cls, good: Iterable[str], bad: Iterable[str], settings: Quality) -> Classifier:
        """A model of good against bad text; the same texts give the same model.

        Which examples are kept apart depends on their text alone, so that duplicates never stand on both sides. Raises
        SpecError where there are too few examples.
        """
        linear = need("sklearn.linear_model", "a quality classifier")
        metrics = need("sklearn.metrics", "a quality classifier")
        texts: list[str] = []
        sizes = []
        for kind, given in (("good", good), ("bad", bad)):
            before = len(texts)
            texts += [text[: settings.characters] for text in given if text.strip()]
            sizes.append(len(texts) - before)
            if sizes[-1] < FEWEST:
                raise SpecError(f"quality: {sizes[-1]} {kind} examples (give at least {FEWEST} documents, better thousands)")
        labels = np.repeat([1, 0], sizes)
        draws = np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts], np.uint64)
        apart = draws < np.uint64(settings.held_out * 2**64)
        for label in (0, 1):
            mine = np.flatnonzero(labels == label)
            # Few examples can happen to lie all on one side: then those of the least, or greatest, number change it.
            if not apart[mine].any():
                apart[mine[draws[mine] == draws[mine].min()]] = True
            elif apart[mine].all():
                apart[mine[draws[mine] == draws[mine].max()]] = False
            if apart[mine].all() or not apart[mine].any():
                raise SpecError("quality: the examples of a kind are all the same text (give different documents)")
        matrix = _vectorizer(settings).transform(texts)
        model = linear.LogisticRegression(C=settings.regularisation, class_weight="balanced", max_iter=500)
        model.fit(matrix[~apart], labels[~apart])
        coefficients, intercept = model.coef_[0].astype(np.float32), float(np.float32(model.intercept_[0]))
        scores = _sigmoid(matrix[apart] @ coefficients + intercept)
        report = ClassifierReport(
            good=sizes[0],
            bad=sizes[1],
            held_out=int(apart.sum()),
            accuracy=float(np.mean((scores >= 0.5) == labels[apart])),
            auc=float(metrics.roc_auc_score(labels[apart], scores)),
        )
        return cls(settings, report, coefficients, intercept)

    def scores(self, texts: Sequence[str]) -> list[float]:
        """0 (bad) to 1 (good) for each text; faster for many at once."""
        matrix = self._columns.transform([text[: self.settings.characters] for text in texts])
        scores: list[float] = _sigmoid(matrix @ self._coefficients + self._intercept).tolist()
        return scores

    def save(self, path: Path) -> None:
        """Write the model; the same model gives the same bytes."""
        head = {
            "version": _VERSION,
            "settings": msgspec.to_builtins(self.settings),
            "report": msgspec.to_builtins(self.report),
            "intercept": self._intercept,
        }
        path.write_bytes(msgspec.json.encode(head) + b"\n" + self._coefficients.astype("<f4").tobytes())

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read a model; ShardError where the file is not a whole one."""
        try:
            line, _, body = path.read_bytes().partition(b"\n")
            head = msgspec.json.decode(line)
            if head["version"] != _VERSION:
                raise ShardError(f"{path}: a model of version {head['version']}, not {_VERSION} (train it again)")
            settings, report = msgspec.convert(head["settings"], Quality), msgspec.convert(head["report"], ClassifierReport)
            coefficients = np.frombuffer(body, "<f4").astype(np.float32)
            intercept = float(head["intercept"])
        except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path}: not a whole quality model: {error} (train it again)") from None
        if len(coefficients) != settings.features:
            raise ShardError(f"{path}: {len(coefficients)} of {settings.features} coefficients (train it again)")
        return cls(settings, report, coefficients, intercept)


def _vectorizer(settings: Quality) -> Any:
    text = need("sklearn.feature_extraction.text", "a quality classifier")
    return text.HashingVectorizer(n_features=settings.features, ngram_range=(1, 2), alternate_sign=False, dtype=np.float32)


def _sigmoid(values: Any) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * np.asarray(values, np.float64)))
    return result


def quantiles(scores: Sequence[float], buckets: int) -> tuple[float, ...]:
    """Edges that part a sample's scores into buckets of equal size; fewer where scores are equal."""
    found = np.quantile(np.asarray(scores, np.float64), np.arange(1, buckets) / buckets)
    return tuple(sorted({float(edge) for edge in found if 0 < edge < 1}))


def bucket(score: float, edges: Sequence[float]) -> str:
    """q0 for scores below the first edge, and so on: the label that sampling goes by."""
    return f"q{bisect.bisect_right(edges, score)}"


def judge(score: float, settings: Quality) -> str:
    """Why a text of this score is refused, or ""."""
    return "quality: score too low" if score < settings.min_score else ""
