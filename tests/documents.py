"""Write the parts of CONTRIBUTING.md that are read off the code: `python tests/documents.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

from evenbits import hookspecs

ROOT = Path(__file__).resolve().parents[1]
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


def main() -> None:
    path = ROOT / "CONTRIBUTING.md"
    text = path.read_text()
    for marker, lines in (("hooks", hook_lines()), ("reading-order", reading_lines())):
        head, begin, rest = text.partition(f"<!-- {marker} -->\n")
        _, end, tail = rest.partition(f"<!-- /{marker} -->")
        if not begin or not end:
            raise SystemExit(f"CONTRIBUTING.md needs one <!-- {marker} --> section")
        text = head + begin + lines + end + tail
    path.write_text(text)


if __name__ == "__main__":
    main()
