"""Faults planted into a copy of the source, and nights in which nothing changed: does the gate tell them apart?

    evenbits run suites/nightly.toml --seed 0 --seed 1 --seed 2 --seed 3 --seed 4 --results /path/base
    evenbits gate results/baselines/nightly.json --suite nightly --results /path/base --update "first baseline"
    evenbits run suites/nightly.toml --results /path/night
    python tests/regressions.py --finished /path/night --work /path/work
    python tests/regressions.py --unchanged 20 --work /path/work

Each fault is a change of the source text in a temporary copy of harness/ and plugins/ that stands first on
PYTHONPATH. The suite then runs on a copy of the finished results, so that only what the fault reaches is computed
again, and the gate has to exit 1 and name the row and what changed. `--unchanged N` runs the suite N times with seeds
that the baseline does not have, each in a results folder of its own, and counts alarms: there must be none;
`--judge-only` runs nothing, and holds the nights that are there to the baseline. All resume where they were stopped,
and write regressions.md and regressions.json into the work folder, which keep what was found before: nights by seed.

`--rows LABEL ...` cuts suite and baseline to these rows, for a first look.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from evenbits.gate_baseline import read_baseline, write_snapshot

ROOT = Path(__file__).resolve().parents[1]

Night = dict[str, Any]


@dataclass(frozen=True)
class Edit:
    """old stands exactly once in the file; new takes its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Plant:
    """A fault. rows: labels of the suite's entries that it has to be seen in; says: what the gate must say, as regular
    expressions, each of which some line of its output matches."""

    name: str
    fault: str
    edits: tuple[Edit, ...]
    rows: tuple[str, ...]
    says: tuple[str, ...]


GPTQ = "plugins/evenbits_gptq/compressor.py"
VECTORS = "harness/evenbits/maths/vector_layer.py"
RATE = "plugins/evenbits_pocketllm/step.py"
TURNS = "plugins/evenbits_pocketllm/alternating.py"
_CHANGED = "        return {}settings.learning_rate * 0.1 ** (int(passed) // 15)\n"
_COSINE = "        return {}settings.learning_rate * 0.5 * (1 + math.cos(math.pi * passed / settings.epochs))\n"
_CONSTANT = "    return {}settings.learning_rate\n"
TOKENIZER = "plugins/evenbits_reference/model/tokenizer.json"

PLANTS = (
    Plant(
        "gptq-block",
        "GPTQ's error feedback dropped in one transformer block",
        (
            Edit(
                GPTQ,
                "        codes, grid, group = solve(weight, factor.upper.float(), order, options)\n",
                "        upper = factor.upper.float()\n"
                '        if ".layers.2." in layer.name:\n'
                "            upper = torch.diag(torch.diagonal(upper))\n"
                "        codes, grid, group = solve(weight, upper, order, options)\n",
            ),
        ),
        ("gptq",),
        (r"reference gptq.*: layers: worse in .*model\.layers\.2\.", r"the code of the method changed"),
    ),
    Plant(
        "gptq-lazy",
        "GPTQ's error feedback dropped in one lazy block of columns: what the first loses reaches no later column",
        (
            Edit(
                GPTQ,
                "    sweep = Sweep(weight, upper, order, options.block_size)\n",
                "    upper = upper.clone()\n"
                "    upper[: options.block_size, options.block_size :] = 0\n"
                "    sweep = Sweep(weight, upper, order, options.block_size)\n",
            ),
        ),
        ("gptq",),
        (r"reference gptq.*: (perplexity|layer_error) .*: worse", r"the code of the method changed"),
    ),
    Plant(
        "pocketllm-rate",
        "PocketLLM's learning rate tenfold, in both its trainings",
        (
            Edit(RATE, _CHANGED.format(""), _CHANGED.format("10 * ")),
            Edit(RATE, _COSINE.format(""), _COSINE.format("10 * ")),
            Edit(RATE, _CONSTANT.format(""), _CONSTANT.format("10 * ")),
            Edit(TURNS, "(learned, lr=options", "(learned, lr=10 * options"),
            Edit(TURNS, '["lr"] = options', '["lr"] = 10 * options'),
        ),
        ("pocketllm", "pocketllm-paper"),
        (r"reference pocketllm-paper.*: perplexity .*: worse", r"the code of the method changed"),
    ),
    Plant(
        "codebook-bits",
        "codebooks of k-means stored in three bits a number where eight are promised",
        (
            Edit(
                VECTORS,
                "        return store_codebook(centres, self.options.codebook_bits, suffix=suffix)\n",
                "        step = centres.abs().amax() / 3\n"
                "        centres = (centres / step).round() * step\n"
                "        return store_codebook(centres, self.options.codebook_bits, suffix=suffix)\n",
            ),
        ),
        ("kmeans",),
        (r"reference kmeans.*: perplexity .*: worse", r"the code of the method changed"),
    ),
    Plant(
        "tokenizer",
        "two entries of the reference model's vocabulary swapped",
        (
            Edit(TOKENIZER, '"\u0120and": 304', '"\u0120and": 305'),
            Edit(TOKENIZER, '"\u0120of": 305', '"\u0120of": 304'),
        ),
        ("rtn",),
        (r"protocol changed: .*tokenizer\.sha256 [0-9a-f]+ -> [0-9a-f]+",),
    ),
)


def plant(fault: Plant, folder: Path, tree: Path = ROOT) -> None:
    """Copy the tree's source with the fault in it. Raises SystemExit where the text to change is not there once."""
    if folder.exists():
        shutil.rmtree(folder)
    for part in ("harness", "plugins"):
        shutil.copytree(tree / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in fault.edits:
        path = folder / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise SystemExit(
                f"{fault.name}: {edit.file} holds the text to change {text.count(edit.old)} times: {edit.old!r}"
            )
        path.write_text(text.replace(edit.old, edit.new))


def evenbits(*arguments: str | Path, source: Path | None = None, log: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with another source where one is given; its output goes to a file."""
    environment = dict(os.environ)
    if source is not None:
        ahead = [str(source / "harness"), str(source / "plugins")]
        environment["PYTHONPATH"] = os.pathsep.join([*ahead, *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "evenbits.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr)
    return done


def copy_results(finished: Path, target: Path, suite: str) -> None:
    """Records, artifacts and caches; links where that is possible, as files are replaced and never changed."""
    if (target / "runs" / suite / "plan.json").exists():
        return
    for part in (f"runs/{suite}", "artifacts", "cache"):
        if (finished / part).is_dir():
            shutil.copytree(finished / part, target / part, copy_function=_link, dirs_exist_ok=True)
    shutil.copy2(finished / "evenbits.json", target / "evenbits.json")


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def cut(suite: Path, baseline: Path, rows: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Suite and baseline with these rows and the dense model alone."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, inside = list[str](), False
    for line in suite.read_text().splitlines():
        if line.startswith("methods = ["):
            inside = True
        elif inside and line == "]":
            inside = False
        elif inside and _label(line) not in rows:
            continue
        kept.append(line)
    (folder / suite.name).write_text("\n".join(kept) + "\n")
    real = read_baseline(baseline)
    own = tuple(row for row in real.rows if row.method == "dense" or row.label in rows)
    write_snapshot(folder / baseline.name, real.model_copy(update={"rows": own}))
    return folder / suite.name, folder / baseline.name


def _label(line: str) -> str:
    """Of one entry of the suite's list of methods, which stands on a line of its own."""
    entry = tomllib.loads(f"one = [{line.split('#')[0].strip().rstrip(',')}]")["one"]
    if not entry:
        return ""
    one: Any = entry[0]
    return one if isinstance(one, str) else str(one.get("label", one["name"]))


def planted(fault: Plant, tree: Path, suite: Path, baseline: Path, finished: Path, work: Path) -> dict[str, Any]:
    folder = work / fault.name
    source, results = folder / "source", folder / "results"
    plant(fault, source, tree)
    copy_results(finished, results, read_baseline(baseline).suite)
    ran = evenbits("run", suite, "--results", results, "--no-report", source=source, log=folder / "run.txt")
    gated = gate(baseline, results, folder)
    missing = [text for text in fault.says if not re.search(text, gated.stdout)]
    caught = ran.returncode == 0 and gated.returncode == 1 and not missing
    told = [line.strip() for line in gated.stdout.splitlines() if ": " in line and line.startswith("  ")]
    print(f"{'caught' if caught else 'NOT CAUGHT'}  {fault.name}: run {ran.returncode}, gate {gated.returncode}")
    for line in told[:8]:
        print(f"    {line}")
    for text in missing:
        print(f"    no line matches {text!r}")
    return {
        "name": fault.name, "fault": fault.fault, "caught": caught, "run": ran.returncode, "gate": gated.returncode,
        "told": told, "missing": missing,
    }  # fmt: skip


def gate(baseline: Path, results: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    files = "--markdown", folder / "gate.md", "--junit", folder / "gate.xml"
    return evenbits("gate", baseline, "--results", results, *files, log=folder / "gate.txt")


def unchanged(seeds: Sequence[int], suite: Path, baseline: Path, work: Path, *, run: bool = True) -> Iterator[Night]:
    """Nights of the source as it is, each with a seed of its own."""
    for seed in seeds:
        folder = work / f"unchanged-{seed}"
        results = folder / "results"
        ended = 0
        if run:
            arguments = "run", suite, "--seed", str(seed), "--results", results, "--no-report"
            ended = evenbits(*arguments, log=folder / "run.txt").returncode
        gated = gate(baseline, results, folder)
        headline = next(iter(gated.stdout.splitlines()), gated.stderr.strip())
        commit = re.search(r"; commit [^;]* now ([0-9a-f]{7,})", gated.stdout)
        print(f"seed {seed}: run {ended}, gate {gated.returncode}: {headline}", flush=True)
        if ended == 0:
            shutil.rmtree(results / "artifacts", ignore_errors=True)  # the records are what is judged
        yield {
            "seed": seed, "run": ended, "gate": gated.returncode, "said": headline,
            "commit": commit[1] if commit else "unknown",
        }  # fmt: skip


def write_summary(work: Path, found: Mapping[str, Any]) -> None:
    """What was planted and caught, and how many unchanged nights raised an alarm; earlier parts and nights are kept."""
    path = work / "regressions.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = {**before, **found}
    if "unchanged" in found:
        by_seed = {night["seed"]: night for night in [*before.get("unchanged", []), *found["unchanged"]]}
        now["unchanged"] = [by_seed[seed] for seed in sorted(by_seed)]
    path.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n")
    told = f"`tests/regressions.py --finished RESULTS --work WORK`, then `--unchanged N --work WORK`; {date.today()}."
    lines = ["# The gate against planted faults and unchanged nights", "", told, ""]
    if now.get("planted"):
        lines += ["| fault | gate | what it said first |", "| :-- | :-- | :-- |"]
        for one in now["planted"]:
            verdict = f"exit {one['gate']}, {'caught' if one['caught'] else 'NOT CAUGHT'}"
            first = next((text for text in one["told"] if "worse" in text or "changed" in text), "").replace("|", "\\|")
            lines.append(f"| {one['fault']} | {verdict} | {first} |")
    if now.get("unchanged"):
        alarms = sum(one["gate"] == 1 for one in now["unchanged"])
        lines += ["", f"{len(now['unchanged'])} unchanged nights: {alarms} with an alarm."]
        for commit in sorted({one["commit"] for one in now["unchanged"]}):
            seeds = ", ".join(str(one["seed"]) for one in now["unchanged"] if one["commit"] == commit)
            lines.append(f"- code of {commit}: seeds {seeds}")
        lines += [f"- seed {one['seed']}: {one['said']}" for one in now["unchanged"] if one["gate"]]
    (work / "regressions.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=ROOT / "suites" / "nightly.toml")
    parser.add_argument("--baseline", type=Path, default=ROOT / "results" / "baselines" / "nightly.json")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose source gets the faults")
    parser.add_argument("--finished", type=Path, help="results folder with a finished run of the suite")
    parser.add_argument("--work", type=Path, required=True, help="folder for copies, logs and results")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in PLANTS], help="these faults alone")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="cut suite and baseline to these entries")
    parser.add_argument("--unchanged", type=int, metavar="N", help="run N unchanged nights instead")
    parser.add_argument("--first-seed", type=int, default=100, help="of the unchanged nights")
    parser.add_argument(
        "--judge-only", action="store_true", help="run none of them, hold what is there to the baseline"
    )
    given = parser.parse_args()
    work: Path = given.work.resolve()
    suite, baseline = given.suite.resolve(), given.baseline.resolve()
    if given.rows:
        suite, baseline = cut(suite, baseline, given.rows, work / "cut")
    if given.unchanged:
        seeds = range(given.first_seed, given.first_seed + given.unchanged)
        nights = []
        for night in unchanged(seeds, suite, baseline, work, run=not given.judge_only):
            nights.append(night)
            write_summary(work, {"unchanged": [night]})
        alarms = sum(night["gate"] != 0 for night in nights)
        print(f"{alarms} of {len(nights)} unchanged nights raised an alarm or were incomplete")
        return 1 if alarms else 0
    if given.finished is None:
        parser.error("--finished: the results folder of a finished run of the suite")
    faults = [one for one in PLANTS if not given.only or one.name in given.only]
    found = [planted(one, given.tree.resolve(), suite, baseline, given.finished.resolve(), work) for one in faults]
    write_summary(work, {"planted": found})
    return 0 if all(one["caught"] for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
