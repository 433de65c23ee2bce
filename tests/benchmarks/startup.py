"""What evenbits itself costs: starting up, planning, and what a trial takes beyond its own work.

    python tests/benchmarks/startup.py --out results/bench

Every timing is of fresh processes, and stands beside that of a bare interpreter in the same run: a figure without
that is about the machine. Writes startup.json (all raw timings, the environment) and startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.store import Results

EVENBITS = str(Path(sys.executable).with_name("evenbits"))
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "evenbits --help": [EVENBITS, "--help"],
    "evenbits plugins": [EVENBITS, "plugins"],
}
# 20 entries x 5 budgets x 100 seeds: each fitted and predicted under its budget, each with its own calibration draw
ENTRIES, BUDGETS, SEEDS = 20, (2.5, 3, 4, 5, 6), 100
PLANNING = """
import json, pathlib, sys, time
begun = time.perf_counter()
from evenbits.plan import make_plan
from evenbits.plugins import load_plugins
from evenbits.suite import read_suite
imported = time.perf_counter()
registry = load_plugins()
suite = read_suite(pathlib.Path(sys.argv[1]), registry)
read = time.perf_counter()
plan = make_plan(suite, registry)
print(json.dumps({
    "trials": len(plan.trials), "skips": len(plan.skips), "torch": "torch" in sys.modules,
    "import": imported - begun, "read": read - imported, "plan": time.perf_counter() - read,
}))
"""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[float, str]:
    """Wall seconds and output of a command. Raises SystemExit with its last words where it fails."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout


def time_commands(runs: int) -> dict[str, list[float]]:
    """Interleaved, so that a disturbance of the machine hits all alike; one run of each beforehand fills the caches."""
    for command in COMMANDS.values():
        run(command)
    timings: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            timings[name].append(run(command)[0])
    return timings


def write_model(folder: Path) -> None:
    """A random Llama of two blocks, as a checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """One token a letter: a model is only restored with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {"<unk>": 0, "<s>": 1, **{chr(code): code - 95 for code in range(97, 123)}}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)


def write_large_suite(path: Path, model: Path, text: Path) -> None:
    entries = "\n".join(
        f'[[methods]]\nname = "gptq"\nlabel = "entry{index:02}"\noptions = {{ damping = {0.01 * (index + 1):.2f} }}\n'
        for index in range(ENTRIES)
    )
    path.write_text(
        f'name = "large"\nmodel = {{ path = "{model}" }}\ndtype = "float16"\nbudgets = {list(BUDGETS)}\n'
        f"seeds = {list(range(SEEDS))}\n{entries}\n"
        f'[calibration]\ncorpus = {{ name = "text", path = "{text}" }}\nsamples = 4\nlength = 16\n'
    )


def write_small_suite(path: Path, model: Path, trials: int) -> None:
    """`trials` entries of a method that needs no calibration, and nothing measured: what is left is mostly evenbits."""
    entries = "\n".join(
        f'[[methods]]\nname = "rtn"\nlabel = "entry{index}"\nbudget = "free"\n'
        f"options = {{ bits = {2 + index % 7}, group_size = {8 * (1 + index // 7)} }}\n"
        for index in range(trials)
    )
    path.write_text(f'name = "small"\nmodel = {{ path = "{model}" }}\ndtype = "float16"\n{entries}')


def summarise(seconds: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "seconds": list(seconds)}


def time_planning(folder: Path, model: Path, runs: int) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("a quick brown fox\n" * 200)
    suite = folder / "large.toml"
    write_large_suite(suite, model, text)
    results = [json.loads(run([sys.executable, "-c", PLANNING, str(suite)])[1]) for _ in range(runs)]
    first = results[0]
    return {
        "trials": first["trials"],
        "skips": first["skips"],
        "torch_loaded": first["torch"],
        **{part: summarise([result[part] for result in results]) for part in ("import", "read", "plan")},
    }


def time_trials(folder: Path, model: Path, count: int, disable: str) -> dict[str, Any]:
    """Seconds from one record's writing to the next within a run, and what of these the trial's children took.

    disable: plugins to leave out, separated by commas.
    """
    suite, results = folder / f"small{disable}.toml", Results(folder / f"results{disable}")
    write_small_suite(suite, model, count)
    command = [EVENBITS, "run", str(suite), "--results", str(results.root), "--no-report"]
    wall, _ = run(command, {**os.environ, "EVENBITS_DISABLE": disable})
    records, folders = results.records("small")
    done = [record for record in records if record.status == "done"]
    if len(done) != count + 1:  # and the dense model, which comes first
        raise SystemExit(f"{len(done)} of {count + 1} trials are done in {results.root}")
    written = [(folders[record.trial] / "record.json").stat().st_mtime for record in done]
    trials = [later - earlier for earlier, later in pairwise(written)]
    children = [sum(record.seconds.values()) for record in done[1:]]
    around = [trial - inside for trial, inside in zip(trials, children, strict=True)]
    return {
        "disable": disable,
        "count": count,
        "run": wall,
        "trial": summarise(trials),
        "children": summarise(children),
        "around": summarise(around),
    }


def render(result: dict[str, Any]) -> str:
    facts = result["environment"]
    bare = result["commands"]["python -c pass"]["median"]
    commit = (facts["git"] or {}).get("commit", "no git")[:12]
    lines = [
        "# What evenbits itself costs",
        "",
        f"{result['date']}, commit {commit}{' (modified)' if (facts['git'] or {}).get('dirty') else ''}, "
        f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}.",
        "Written by `python tests/benchmarks/startup.py --out results/bench`.",
        "",
        f"| command, {result['runs']} fresh processes | median ms | min | max | over a bare interpreter |",
        "|---|---|---|---|---|",
    ]
    for name, timing in result["commands"].items():
        low, middle, high = (1000 * timing[key] for key in ("min", "median", "max"))
        lines.append(f"| `{name}` | {middle:.0f} | {low:.0f} | {high:.0f} | {middle - 1000 * bare:.0f} |")
    plan = result["planning"]
    lines += [
        "",
        f"Planning {plan['trials']:,} trials ({plan['skips']} skips): {plan['plan']['median']:.2f} s, "
        f"{1e6 * plan['plan']['median'] / plan['trials']:.0f} µs a trial; imports {plan['import']['median']:.2f} s, "
        f"plugins and suite {plan['read']['median']:.2f} s; "
        f"torch was {'loaded' if plan['torch_loaded'] else 'not loaded'}.",
    ]
    lines += [
        "",
        "A trial beyond its own work: round to nearest on a model of two tiny blocks, nothing measured. Medians over "
        f"the {result['trials'][0]['count']} trials of a run, from one record's writing to the next:",
        "",
        "| plugins left out | whole run s | a trial ms | in its two child processes | around them |",
        "|---|---|---|---|---|",
    ]
    for trials in result["trials"]:
        times = " | ".join(f"{1000 * trials[key]['median']:.0f}" for key in ("trial", "children", "around"))
        lines.append(f"| {trials['disable'] or 'none'} | {trials['run']:.1f} | {times} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for startup.json and startup.md")
    parser.add_argument("--runs", type=int, default=10, help="fresh processes a command")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "runs": arguments.runs,
        "environment": describe_environment(),
        "commands": {name: summarise(seconds) for name, seconds in time_commands(arguments.runs).items()},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        write_model(model)
        write_tokenizer(model)
        result["planning"] = time_planning(folder, model, min(3, arguments.runs))
        result["trials"] = [time_trials(folder, model, 12, disable) for disable in ("mlflow", "")]
    write_atomically(arguments.out / "startup.json", (json.dumps(result, indent=1) + "\n").encode())
    text = render(result)
    write_atomically(arguments.out / "startup.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
