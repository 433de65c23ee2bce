"""Made-up trials, written through the public functions of records as a run writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evenbits.record import Bits, BudgetFacts, Ledger, MetricFacts, ModelFacts, Record, write_record
from evenbits.store import Results

MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float16", parameters=1_200_000, linear_weights=1_000_000,
    stored_bits=16, linear_bytes=2_000_000, model_bytes=2_400_000,
)  # fmt: skip
PROTOCOL: Mapping[str, Any] = {"corpus": {"name": "wiki", "sha256": "ab"}, "context": 2048, "metric": "perplexity"}
TWO = BudgetFacts(centre=2.0, window=0.05)


def perplexity(items: np.ndarray[Any, Any], **changes: Any) -> tuple[MetricFacts, np.ndarray[Any, Any]]:
    with np.errstate(over="ignore"):  # a broken model's
        value = float(np.exp(items.mean()))
    facts = {"name": "perplexity", "unit": "perplexity", "better": "lower", "low": 0.98 * value, "high": 1.02 * value}
    return _metric(value, {**facts, **changes}), items


def accuracy(items: np.ndarray[Any, Any], **changes: Any) -> tuple[MetricFacts, np.ndarray[Any, Any]]:
    facts = {"name": "acc", "unit": "accuracy", "better": "higher", "low": 0.0, "high": 1.0}
    return _metric(float(items.mean()), {**facts, **changes}), items


def cost(name: str, value: float, unit: str = "bytes", **changes: Any) -> tuple[MetricFacts, None]:
    return _metric(value, {"name": name, "unit": unit, "better": "lower", **changes}), None


def _metric(value: float, facts: Mapping[str, Any]) -> MetricFacts:
    return MetricFacts(**{"value": value, "source": "tests", "fingerprint": "f", **facts})


class Trials:
    """A results folder with one suite's records."""

    def __init__(self, root: Path, suite: str = "tests") -> None:
        self.store = Results(root)
        self.suite = suite
        self.order: list[str] = []
        self.records: list[Record] = []
        self.folders: dict[str, Path] = {}
        root.mkdir(parents=True, exist_ok=True)
        self.store.check_schema(create=True)

    def add(
        self,
        method: str,
        *metrics: tuple[MetricFacts, np.ndarray[Any, Any] | None],
        linear: float = 2.0,
        protocol: Mapping[str, Any] = PROTOCOL,
        trial: str | None = None,
        **facts: Any,
    ) -> Record:
        """`protocol` is the fingerprint of all its metrics; dense models have no ledger and no budget."""
        trial = trial or f"{len(self.order):02d}{self.suite}".lower()
        dense = method == "dense"
        named = [
            (metric if items is None else metric.model_copy(update={"items": f"items-{metric.name}.npy"}), items)
            for metric, items in metrics
        ]
        record = Record(
            **{
                "trial": trial,
                "artifact": None if dense else f"artifact{trial}",
                "suite": self.suite,
                "model": MODEL,
                "method": method,
                "budget": None if dense else TWO,
                "ledger": None if dense else ledger(linear),
                "metrics": tuple(metric for metric, _ in named),
                "fingerprints": {"f": dict(protocol)},
                "status": "done",
                **facts,
            }
        )
        self.order.append(trial)
        self.records.append(record)
        self.folders[trial] = self.store.trial_folder(self.suite, trial)
        kept = {str(metric.items): items for metric, items in named if items is not None}
        write_record(self.folders[trial], record, kept)
        self.store.write_plan(self.suite, self.order)
        return record


def ledger(linear: float, roles: Sequence[str] = ("code",)) -> Ledger:
    size = round(linear * MODEL.linear_weights / 8)
    return Ledger(
        bits=Bits(index=linear, paper=linear, linear=linear, model=8 * (size + 400_100) / MODEL.parameters),
        roles={role: size // len(roles) for role in roles},
        linear_bytes=size,
        rest_bytes=400_000,
        model_bytes=size + 400_100,
        ratios={},
        compressed_weights=MODEL.linear_weights,
    )
