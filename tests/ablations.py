"""Write a page of tables and verdicts in results/ablation/ from the records of ablation suites.

    for suite in suites/ablation/pocketllm_*.toml; do evenbits run $suite; done
    python tests/ablations.py suites/ablation/pocketllm_*.toml

The page has the name of what the suites have in common before the first "_".

Every number and every verdict is computed from records; a suite's text is its own leading comment. Trials without a
result are named. Claims are questions (ablation_claims.toml); `evenbits.verdict` answers, and where it compares nothing
(more bits, another recovery stage) the same paired test on the numbers alone, which then says so.
"""

from __future__ import annotations

import argparse
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from evenbits.errors import SuiteError
from evenbits.plugins import Registry, load_plugins
from evenbits.record import Record
from evenbits.report_text import format_number
from evenbits.rows import Cell, Column, Row
from evenbits.store import Results
from evenbits.suite import MethodSpec, Suite, read_suite
from evenbits.tables import gather
from evenbits.verdict import run_test, verdict

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = Path(__file__).with_name("ablation_claims.toml")
TITLES = {
    "pocketllm": "Ablations of PocketLLM on the reference model",
    "orderings": "Orderings that the literature reports, on two small models",
}
INTRODUCTION = """\
Written by `python tests/ablations.py suites/ablation/{topic}_*.toml` from the records of these suites. The first row
after the dense model is a table's base. Linear bits: every stored byte of the linear layers, per weight. Of several
seeds the mean stands, and [least, most]. ln rise: logarithm of the number over the dense model's. Weight error: squared
error over squared weights, the mean over compressed layers; calibrated error: the same weighted by the second moment of
the inputs, for methods that read it.

A verdict needs p <= 0.05 on the same test documents, at no more bits and equal tuning: of one seed by the paired
bootstrap, of several by a t test in which seeds and documents both vary. Beside it stands the ratio of the two mean
errors, calibrated where both have it, and in how many layers the first's is lower. With one seed, what a training run
leaves to chance is not tested; and many rows are asked of the same documents."""


class Claim(BaseModel):
    """What is said, and the rows that decide it: the first against each other one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    ahead: str
    behind: tuple[str, ...]


Claims = Mapping[str, Sequence[Claim]]  # by name of suite
Line = tuple[str, ...]
VERDICTS = ("claim", "the first", "against", "verdict on the first", "errors")
PAPER = "the paper:"  # so begin its own claims


def read_claims(path: Path = CLAIMS) -> Claims:
    return {
        name: [Claim.model_validate(found) for found in claims]
        for name, claims in tomllib.loads(path.read_text()).items()
    }


def row_name(row: Row, budgets: int = 1) -> str:
    """Its label, its stages, and under several budgets the centre of its own."""
    centre = f" @ {row.budget.centre:g}" if budgets > 1 and row.budget is not None else ""
    return " + ".join((row.name, *row.recovery)) + centre


def comment(text: str) -> str:
    """The comment that a suite begins with, as one paragraph."""
    lines = text.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end])


def spread(values: Sequence[float]) -> str:
    """The mean, and the range where there is one."""
    mean, low, high = (number(value) for value in (float(np.mean(values)), min(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def number(value: float) -> str:
    """Four digits behind the point while there are few before it: perplexities of one model lie close."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 else format_number(value)


def layer_errors(record: Record, *, calibrated: bool) -> dict[str, float]:
    """Relative squared error of each compressed layer's weights; calibrated: of those layers that have it."""
    assert record.ledger is not None
    found = {
        layer.name: layer.calibrated_error if calibrated else layer.error
        for layer in record.layers
        if layer.name not in record.ledger.left_dense
    }
    return {name: error for name, error in found.items() if error is not None}


def mean_errors(row: Row, *, calibrated: bool) -> list[float]:
    """By seed, the mean over compressed layers; none where a layer lacks it, and after a recovery stage, which moves
    weights on purpose."""
    records = [record for record in row.records if record.ledger is not None and record.layers and not row.recovery]
    found = [layer_errors(record, calibrated=calibrated) for record in records]
    if any(len(errors) < len(layer_errors(r, calibrated=False)) for errors, r in zip(found, records, strict=True)):
        return []
    return [float(np.mean(list(errors.values()))) for errors in found if errors]


def error_ratio(a: Row, b: Row) -> str:
    """Mean error of a over b's, and in how many layers a's is lower; nothing where one has none, or unlike layers."""
    if not mean_errors(a, calibrated=False) or not mean_errors(b, calibrated=False):
        return ""
    calibrated = bool(mean_errors(a, calibrated=True) and mean_errors(b, calibrated=True))
    means = []
    for row in (a, b):
        by_seed = [layer_errors(record, calibrated=calibrated) for record in row.records]
        means.append({name: float(np.mean([errors[name] for errors in by_seed])) for name in by_seed[0]})
    first, second = means
    if first.keys() != second.keys():
        return ""
    ratio = sum(first.values()) / sum(second.values())
    lower = sum(first[name] < second[name] for name in first)
    return f"{ratio:.3f}, lower in {lower} of {len(first)}{' (calibrated)' if calibrated else ''}"


def compressed_share(row: Row) -> float:
    ledger = row.records[0].ledger
    return ledger.compressed_weights / row.model.linear_weights if ledger is not None else 0.0


def outcome(a: Row, b: Row, column: Column) -> str:
    """What may be said of a against b; where that is nothing, how far the numbers themselves are apart."""
    found = verdict(a, b, column)
    if found.outcome != "not comparable":
        return f"{found.outcome} ({found.reason})"
    cells = a.cells.get(column.key), b.cells.get(column.key)
    if cells[0] is None or cells[1] is None or cells[0].items is None or cells[1].items is None:
        return f"not comparable ({found.reason})"
    return f"{_numbers(cells[0], cells[1])}, at unlike terms: {found.reason}"


def _numbers(a: Cell, b: Cell) -> str:
    """The test that `verdict` makes, of the numbers alone."""
    test = run_test(a, b)
    if test is None or math.isnan(test.p_value):
        return "numbers not testable"
    if test.p_value > 0.05:
        return f"numbers not distinguishable (p = {test.p_value:.3g})"
    return f"number {'lower' if a.value < b.value else 'higher'} (p = {test.p_value:.3g})"


def judged(claim: Claim, rows: Mapping[str, Row], column: Column) -> Iterator[Line]:
    """One line of the table of verdicts for each row that the claim names and the run has."""
    for other in claim.behind:
        a, b = rows.get(claim.ahead), rows.get(other)
        if a is None or b is None:
            missing = claim.ahead if a is None else other
            yield claim.text, claim.ahead, other, f"not run: {missing}", ""
            continue
        numbers = [f"{name} ({_value(row, column)})" for name, row in ((claim.ahead, a), (other, b))]
        yield claim.text, *numbers, outcome(a, b, column), error_ratio(a, b)


def _value(row: Row, column: Column) -> str:
    cell = row.cells.get(column.key)
    return "none" if cell is None else number(cell.value)


def lines_of(rows: Sequence[Row], column: Column, budgets: int = 1) -> Iterator[Line]:
    """The suite's table: bits, the metric, errors of the weights, and what is compressed where rows differ in that."""
    tuned = [row for row in rows if row.method != "dense"]
    partial = len({round(compressed_share(row), 6) for row in tuned}) > 1
    dense = next((row for row in rows if row.method == "dense" and not row.recovery), None)
    base = dense.cells.get(column.key) if dense is not None else None
    extra = ("compressed", "ln rise", "per compressed share") if partial else ("ln rise",)
    yield ("", "seeds", "index bits", "linear bits", column.name, *extra, "weight error", "calibrated error")
    for row in rows:
        cell = row.cells.get(column.key)
        rise = math.log(cell.value / base.value) if cell is not None and base is not None else math.nan
        share = compressed_share(row)
        more = (f"{share:.3f}", f"{rise:.4f}", f"{rise / share:.4f}" if share else "") if partial else (f"{rise:.4f}",)
        errors, calibrated = (mean_errors(row, calibrated=which) for which in (False, True))
        yield (
            row_name(row, budgets), str(len(row.records)),
            "" if row.method == "dense" else f"{row.bits.index:.3f}", f"{row.bits.linear:.4f}",
            "" if cell is None else spread(cell.by_seed), *more,
            *(spread(found) if found else "" for found in (errors, calibrated)),
        )  # fmt: skip


def markdown(lines: Iterable[Sequence[str]], words: int) -> str:
    """A table whose first so many columns are words."""
    head, *body = [tuple(cell.replace("|", "\\|") for cell in line) for line in lines]
    rule = tuple(":--" if number < words else "--:" for number in range(len(head)))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def seeds_of(suite: Suite, method: MethodSpec, registry: Registry) -> tuple[int, ...]:
    """One seed is enough for what depends on none."""
    descriptor = registry.find("compressors", method.name, "method").value
    needs = descriptor.needs_of(descriptor.options.model_validate(dict(method.options)))
    drawn = descriptor.stochastic or needs.statistics != "none" or bool(method.recovery)
    return tuple(suite.seeds) if drawn else tuple(suite.seeds[:1])


def missing(suite: Suite, records: Sequence[Record], registry: Registry) -> Iterator[str]:
    """The suite's entries without a finished trial for some of their seeds."""

    def key_of(r: Record) -> tuple[str, tuple[str, ...], float | None, int]:
        return r.label or r.method, r.recovery, None if r.budget is None else r.budget.centre, r.seed

    done = {key_of(r) for r in records if r.status == "done"}
    failed = {key_of(r): r.failure.message for r in records if r.failure is not None}
    for method in suite.methods:
        stages = tuple(stage.name for stage in method.recovery)
        centres = [None] if method.budget == "free" else [spec.budget().centre for spec in suite.budgets]
        asked = seeds_of(suite, method, registry)
        for centre, seed in product(centres, suite.seeds):
            key = method.shown, stages, centre, seed
            if key in failed or (key not in done and seed in asked):
                at = "" if centre is None or len(centres) == 1 else f" @ {centre:g}"
                yield f"{' + '.join((method.shown, *stages))}{at}, seed {seed}: {failed.get(key, 'not run')}"


def section(
    path: Path, suite: Suite, results: Results, claims: Sequence[Claim], registry: Registry
) -> tuple[str, list[Line]]:
    """Heading, the suite's own words, its table and verdicts, which are also returned; what has no record is named."""
    parts = [f"## {suite.description or suite.name}", f"`{path.as_posix()}`. {comment(path.read_text())}".strip()]
    try:
        records, folders = results.records(suite.name)
    except SuiteError:
        return "\n\n".join([*parts, "**Not run.**"]), []
    order = {record.trial: number for number, record in enumerate(records)}
    lines: list[Line] = []
    for model in gather(records, folders).models:
        column = next((column for column in model.columns if column.quality), None)
        if column is None:
            continue
        found = [*model.dense, *(row for part in model.sections for row in (*part.rows, *part.outside))]
        found.sort(key=lambda row: (row.method != "dense", min(order[record.trial] for record in row.records)))
        budgets = len(suite.budgets)
        rows = {row_name(row, budgets): row for row in found}
        lines = [line for claim in claims for line in judged(claim, rows, column)]
        parts += [markdown(lines_of(found, column, budgets), 1), *([markdown([VERDICTS, *lines], 5)] if lines else [])]
    absent = [f"- {line}" for line in missing(suite, records, registry)]
    return "\n\n".join([*parts, *(["Without a result:", "\n".join(absent)] if absent else [])]), lines


def page(suites: Sequence[Path], results: Results, claims: Claims) -> str:
    """Verdicts on the paper's own claims first, then a section for each suite."""
    registry = load_plugins()
    registry.collect_all()
    read = [(path, read_suite(path, registry)) for path in suites]
    found = [section(path, suite, results, claims.get(suite.name, ()), registry) for path, suite in read]
    paper = [line for _, lines in found for line in lines if line[0].startswith(PAPER)]
    first = ["## The paper's claims", markdown([VERDICTS, *paper], 5)] if paper else []
    topic = topic_of(suites)
    title = TITLES.get(topic, f"Ablations: {topic}")
    return "\n\n".join([f"# {title}", INTRODUCTION.format(topic=topic), *first, *(text for text, _ in found)]) + "\n"


def topic_of(suites: Sequence[Path]) -> str:
    """What the suites' names have in common; SystemExit where that is nothing."""
    topics = {path.stem.partition("_")[0] for path in suites}
    if len(topics) > 1:
        raise SystemExit(f"one page holds suites of one topic, not of {', '.join(sorted(topics))}")
    return topics.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description="tables and verdicts of ablation suites")
    parser.add_argument("suites", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--out", type=Path, help="default: results/ablation/TOPIC.md")
    given = parser.parse_args()
    out = given.out or ROOT / "results" / "ablation" / f"{topic_of(given.suites)}.md"
    text = page(given.suites, Results(given.results), read_claims())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)


if __name__ == "__main__":
    main()
