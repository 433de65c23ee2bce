"""Write what CONTRIBUTING.md and plugins/README.md say that is read off the code: `python tests/documents.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from evenbits import compressor, hookspecs, measure

ROOT = Path(__file__).resolve().parents[1]
AUTHORS = "plugins/README.md"
TUTORIAL = ROOT / "tests" / "tutorial"
LANGUAGES = {".py": "python", ".toml": "toml"}
DESCRIPTORS = (
    compressor.Compressor,
    compressor.Recovery,
    measure.Evaluator,
    measure.Profiler,
    measure.Corpus,
    compressor.Needs,
    compressor.Estimate,
    compressor.PackedLayer,
    measure.Measurement,
)
READING = {
    "errors": "what a user can cause",
    "compressor": "the protocols: what a method declares and what flows through it",
    "budget": "centre, window, choice of settings",
    "measure": "what evaluators, profilers and corpora declare",
    "shapes": "a model's linear layers from file headers",
    "hookspecs": "every hook",
    "plugins": "discovery, attribution, clashes",
    "suite_spec": "what a suite may say, as frozen models",
    "suite": "a suite read and checked",
    "matching": "settings under a budget, recovery counted in",
    "plan": "suite to trials with content ids",
    "effort": "how long a plan takes, from what was measured",
    "manifest": "what an artifact says of itself",
    "artifact": "writing and reading artifacts",
    "ledger": "bytes by role to the four bit numbers",
    "models": "opening a model, walking its layers",
    "calibration": "hidden states and second moments",
    "block_pass": "statistics in turn, in one pass a block",
    "blocks": "the model to compress, a block at a time",
    "driver": "a compressor over a model",
    "tuning": "a block tuned towards the dense one's outputs",
    "opened": "a stored model, open for training",
    "recovery": "the stage after",
    "streaming": "a stored model's logits, one block in memory",
    "packed": "a stored model, each layer on its packed weights",
    "findings": "what evaluators and profilers return, checked",
    "stages": "what the child processes do",
    "executor": "the child processes",
    "record": "the one source of truth",
    "store": "a results folder",
    "attempt": "one trial: compress, evaluate, profile",
    "run": "the loop over trials",
    "fingerprints": "in which fields two protocols differ",
    "statistics": "the bootstrap, on items",
    "significance": "tests and intervals where seeds vary too",
    "verdict": "what may be called better than what",
    "tables": "records to tables",
    "compare": "two trials, metric by metric",
    "report_sheets": "what a report's tables hold",
    "published": "what papers print, beside a suite",
    "reproduction": "printed beside measured, with verdicts",
    "steps": "where a noisy series changes its level",
    "nights": "a night's digest",
    "history": "nights as series",
    "gate": "a run against a baseline",
    "page": "the report as one static page",
    "cli": "the command line",
}


def hook_lines() -> str:
    lines = []
    for name in hookspecs.HOOKS:
        signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
        lines.append(f"- `{name}{signature}`: {' '.join(str(getattr(hookspecs, name).__doc__).split())}")
    return "\n".join(lines) + "\n"


def count_lines(module: str) -> int:
    return len((ROOT / "harness" / "evenbits" / f"{module}.py").read_text().splitlines())


def reading_lines() -> str:
    rows = [f"| [`{m}`](harness/evenbits/{m}.py) | {count_lines(m)} | {what} |" for m, what in READING.items()]
    last = "Then one plugin: `plugins/evenbits_rtn`, the smallest; `plugins/evenbits_gptq`, the calibrated one."
    return "\n".join(["| module | lines | what |", "|---|--:|---|", *rows, "", last]) + "\n"


def descriptor_lines() -> str:
    """Each class with its fields as they are declared, and its documentation."""
    parts = []
    for cls in DESCRIPTORS:
        fields = []
        for field in dataclasses.fields(cls):
            optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            fields.append(f"    {field.name}: {str(field.type).strip(chr(34))}{_default(field) if optional else ''}")
        doc = inspect.cleandoc(str(cls.__doc__))
        parts.append(f"### `{cls.__name__}`\n\n```\n" + "\n".join(fields) + f"\n\n{doc}\n```\n")
    return "\n".join(parts)


def _default(field: dataclasses.Field[object]) -> str:
    """As it would be typed; of a function, or of what is made anew, only that there is one."""
    if isinstance(field.default, compressor.Needs):
        return " = Needs()"
    return " = ..." if field.default is dataclasses.MISSING or callable(field.default) else f" = {field.default!r}"


def tutorial_lines(place: str) -> str:
    """A file of the tutorial as a fenced block, under its place."""
    path = TUTORIAL / place
    return f"`{place}`\n\n```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n"


def fill(text: str, marker: str, lines: str, closing: str | None = None) -> str:
    """The text with `lines` between <!-- marker --> and <!-- /closing -->; SystemExit where it has no such section."""
    head, begin, rest = text.partition(f"<!-- {marker} -->\n")
    _, end, tail = rest.partition(f"<!-- /{closing or marker} -->")
    if not begin or not end:
        raise SystemExit(f"no section <!-- {marker} -->")
    return head + begin + lines + end + tail


def authors_page(text: str) -> str:
    """plugins/README.md with its tutorial, hooks and descriptors as they are now."""
    text = fill(text, "hooks", hook_lines())
    text = fill(text, "descriptors", descriptor_lines())
    for place in re.findall(r"^<!-- tutorial: (\S+) -->", text, re.M):
        text = fill(text, f"tutorial: {place}", tutorial_lines(place), "tutorial")
    return text


def main() -> None:
    path = ROOT / "CONTRIBUTING.md"
    path.write_text(fill(path.read_text(), "reading-order", reading_lines()))
    path = ROOT / AUTHORS
    path.write_text(authors_page(path.read_text()))


if __name__ == "__main__":
    main()
