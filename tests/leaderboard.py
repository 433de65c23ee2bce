"""The README's leaderboard and the reports under results/leaderboard/, from the records of a run.

    evenbits run suites/methods.toml && python tests/leaderboard.py suites/methods.toml
    evenbits run suites/quickstart.toml && python tests/leaderboard.py suites/quickstart.toml --page
    python tests/leaderboard.py --check

The first writes results/leaderboard/NAME/: the report with each page and picture that it refers to (pictures as small
PNG) and rows.json, from which alone the README's section is made. Numbers are refused that the suite as it plans today
would not ask for. `--page` writes the report alone. `--check` says whether the README shows what rows.json holds and
rows.json what the suite plans, exit 1 where not, and names methods whose code has changed since they were measured.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evenbits.errors import EvenbitsError
from evenbits.markdown import table_lines
from evenbits.named_trials import suite_name
from evenbits.plan import Plan, Trial, make_plan
from evenbits.plugins import Registry, load_plugins
from evenbits.record import Record
from evenbits.report import write_report
from evenbits.report_format import format_budget, format_number
from evenbits.rows import Column, Row, why
from evenbits.store import Results
from evenbits.suite import read_suite
from evenbits.suite_spec import CalibrationSpec
from evenbits.tables import ModelTable, Table, gather

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")
SECTION = re.compile(r"<!-- leaderboard -->.*?<!-- /leaderboard -->", re.S)
SHADES = 128  # of a picture's colours; the eye sees no loss, the file has a third of the bytes
METRICS = 2  # quality metrics that the README shows, the first ones of the report
SCHEMA = 1
LEGEND = (
    "[low, high] is a 95 % interval over items and seeds. **Bold** and `*`: best at its budget; `~`: not "
    "distinguishable from it; `-`: another is better at no more bits; no sign: behind only methods with more bits."
)

Facts = dict[str, Any]


# -- the report's pages ---------------------------------------------------------------------------------------------


def copy_report(written: Path, folder: Path, note: str) -> list[str]:
    """report.md, and from page to page all that they link to, into an emptied `folder`; returns the names, sorted.

    A picture is copied as the PNG beside it. A link to a table of numbers becomes words, for these are not kept.
    Raises FileNotFoundError for a link to nothing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    waiting, done = ["report.md"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        if name.endswith(".png"):
            (folder / name).write_bytes(smaller(written / name))
            continue
        text = LINK.sub(_kept, (written / name).read_text())
        waiting += [target for _, _, target in LINK.findall(text)]
        (folder / name).write_text(text.rstrip("\n") + ("\n\n" + note if name == "report.md" else "") + "\n")
    return sorted(done)


def _kept(link: re.Match[str]) -> str:
    picture, words, target = link.groups()
    if target.endswith((".csv", ".json", ".html")):
        return f"{words} (`{target}`, beside the records)" if words != target else f"`{target}` (beside the records)"
    return f"{picture}[{words}]({target.removesuffix('.svg')}.png)" if picture else link[0]


def smaller(path: Path) -> bytes:
    """The PNG with a palette."""
    target = io.BytesIO()
    with Image.open(path) as picture:
        flat = picture.convert("RGB").quantize(SHADES, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    flat.save(target, "png", optimize=True)
    return target.getvalue()


# -- rows.json ------------------------------------------------------------------------------------------------------


def rows_file(suite: Path, plan: Plan, records: Sequence[Record], table: Table, picture: str | None) -> Facts:
    """What the README shows, and what it was measured with, from the records; evaluators' options from the plan."""
    (model,) = table.models
    columns = [column for column in model.columns if column.quality][:METRICS]
    done = [record for record in records if record.status == "done"]
    return {
        "schema": SCHEMA,
        "suite": suite.as_posix(),
        "name": plan.suite.name,
        "description": plan.suite.description,
        "commits": commits_of(records),
        "measured": max(record.finished for record in done)[:10],
        "versions": done[-1].environment.get("versions", {}),
        "model": {"name": model.model.name, "revision": model.model.revision, "dtype": model.model.dtype},
        "settings": _settings(plan),
        "picture": picture,
        "metrics": [{"name": column.title, "better": column.better} for column in columns],
        "rows": [_row(model, row, columns, marks) for row, marks in _rows_of(model)],
        "absent": [_absent(record) for record in records if record.status != "done"],
    }


def _settings(plan: Plan) -> Facts:
    suite = plan.suite
    return {
        "evaluators": [
            {"name": s.name, "label": s.label, "options": dict(s.options)} for s in plan.trials[0].evaluators
        ],
        "profilers": [{"name": s.name, "label": s.label, "options": dict(s.options)} for s in plan.trials[0].profilers],
        "calibration": None if suite.calibration is None else suite.calibration.model_dump(mode="json"),
    }


def _rows_of(model: ModelTable) -> Iterator[tuple[Row, Mapping[tuple[str, str], str]]]:
    """Every row with its marks by column."""
    for row in model.dense:
        yield row, {}
    for section in model.sections:
        for index, row in enumerate(section.rows):
            yield row, {key: mark for (i, key), mark in section.marks.items() if i == index}
        for row in section.outside:
            yield row, {}


def _row(model: ModelTable, row: Row, columns: Sequence[Column], marks: Mapping[tuple[str, str], str]) -> Facts:
    first = row.records[0]
    cells: Facts = {}
    for column in columns:
        if (cell := row.cells.get(column.key)) is not None:
            over = model.recovery(row, column)
            relative = None if over is None else _rounded(over)
            cells[column.title] = {**_rounded(cell), "mark": marks.get(column.key, ""), "over_dense": relative}
    return {
        **_entry(row.name, first.recovery, None if first.method == "dense" else row.budget),
        "budget_text": "" if first.method == "dense" else format_budget(row.budget),
        "method": row.method,
        "options": first.model_dump(mode="json")["options"],
        "settings": row.settings,
        "seeds": [record.seed for record in row.records],
        "predicted": None if first.predicted is None else first.predicted.model_dump(),
        "linear_bits": row.bits.linear,
        "model_bits": row.bits.model,
        "model_bytes": round(row.model_bytes),
        "within": row.within,
        "trials": [record.trial for record in row.records],
        "artifacts": [record.artifact for record in row.records],
        "metrics": cells,
    }


def _entry(label: str, recovery: Sequence[str], budget: Any) -> Facts:
    """What a row is known by."""
    facts = None if budget is None else {"centre": budget.centre, "window": budget.window, "on": budget.on}
    return {"label": "+".join([label, *recovery]), "budget": facts}


def _rounded(cell: Any) -> Facts:
    return {
        name: None if (v := getattr(cell, name)) is None else float(f"{v:.6g}") for name in ("value", "low", "high")
    }


def _absent(record: Record) -> Facts:
    entry = _entry(record.label or record.method, record.recovery, record.budget)
    return {**entry, "seed": record.seed, "status": record.status, "reason": why(record)}


# -- whether they are what the suite asks for today -----------------------------------------------------------------


def differences(rows: Facts, plan: Plan, registry: Registry) -> list[str]:
    """In what the rows' settings differ from the suite's as it plans today; none: they are not stale."""
    found: list[str] = []
    model = plan.trials[0].model.facts
    for name in ("name", "revision", "dtype"):
        if rows["model"][name] != getattr(model, name):
            found.append(f"model: {name} {rows['model'][name]}, and {getattr(model, name)} today")
    planned: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        recovery = [stage.name for stage in trial.recovery]
        planned.setdefault(_name(_entry(trial.label, recovery, trial.budget)), []).append(trial)
    measured = {_name(row): row for row in rows["rows"]}
    found += [f"{name}: planned today, not measured" for name in sorted(planned.keys() - measured.keys())]
    found += [f"{name}: measured, not planned today" for name in sorted(measured.keys() - planned.keys())]
    for name in sorted(planned.keys() & measured.keys()):
        trials, row = planned[name], measured[name]
        if row["method"] != trials[0].method:
            found.append(f"{name}: method {row['method']}, and {trials[0].method} today")
            continue
        defaults = _defaults(registry, "compressors", row["method"])
        found += [f"{name}: {words}" for words in _options(row["options"], dict(trials[0].options), defaults)]
        if row["seeds"] != [trial.seed for trial in trials]:
            found.append(f"{name}: seeds {row['seeds']}, and {[trial.seed for trial in trials]} today")
        now = trials[0].predicted
        if (row["predicted"] is None) != (now is None) or (
            now is not None and any(abs(row["predicted"][k] - v) > 1e-6 for k, v in now.model_dump().items())
        ):
            found.append(f"{name}: bits predicted as {row['predicted']}, and {now} today")
    skipped = {_name(_entry(s.label, [r.name for r in s.recovery], s.budget)) for s in plan.skips}
    absent = {_name(one) for one in rows["absent"] if one["status"] == "skipped"}
    found += [f"{name}: skipped in one, not in the other" for name in sorted(skipped ^ absent)]
    return found + _measuring(rows["settings"], _settings(plan), registry)


def _measuring(then: Facts, now: Facts, registry: Registry) -> list[str]:
    found: list[str] = []
    for kind, what in (("evaluators", "evaluator"), ("profilers", "profiler")):
        old, new = ([(s["name"], s["label"]) for s in side[kind]] for side in (then, now))
        if old != new:
            found.append(f"{kind}: {old}, and {new} today")
            continue
        for a, b in zip(then[kind], now[kind], strict=True):
            defaults = _defaults(registry, kind, a["name"])
            found += [f"{what} {a['name']}: {words}" for words in _options(a["options"], b["options"], defaults)]
    defaults = {name: field.default for name, field in CalibrationSpec.model_fields.items() if not field.is_required()}
    drawn = _options(then["calibration"] or {}, now["calibration"] or {}, defaults)
    return found + [f"calibration: {words}" for words in drawn]


def _options(then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Options that differ. One that came since and stands at its default changes nothing."""
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key, defaults.get(key)), now.get(key)
        if key not in now or old != new:
            yield f"{key}={json.dumps(then.get(key))}, and {json.dumps(now.get(key))} today"


def _defaults(registry: Registry, kind: str, name: str) -> Mapping[str, Any]:
    if name == "dense":
        return {}
    fields = registry.find(kind, name, kind).value.options.model_fields
    return {key: field.default for key, field in fields.items() if not field.is_required()}


def changed_code(rows: Facts, plan: Plan) -> list[str]:
    """Labels whose artifacts another code, or other library versions, would make today."""
    keys = {trial.artifact for trial in plan.trials}
    return list(dict.fromkeys(row["label"] for row in rows["rows"] if set(row["artifacts"]) - keys))


def _name(entry: Facts) -> str:
    return str(entry["label"]) + ("" if entry["budget"] is None else f" @ {entry['budget']['centre']:g}")


def plan_today(suite: Path, registry: Registry) -> Plan:
    """As `evenbits plan` makes it, without a cache of digests."""
    return make_plan(read_suite(suite, registry), registry)


# -- the README's section -------------------------------------------------------------------------------------------


def readme_section(rows: Facts) -> str:
    """From rows.json and nothing else: a table a metric, a line a method, a column a budget; the first picture."""
    folder, suite = f"results/leaderboard/{rows['name']}", rows["suite"]
    commits = ", ".join(f"`{short(commit)}`" for commit in rows["commits"])
    opening = (
        f"{_sentence(rows['description'])}: `{suite}`, measured at commit {commits} on {rows['measured']} "
        f"([the whole report]({folder}/report.md)). "
        f"Written by `evenbits run {suite} && python tests/leaderboard.py {suite}`."
    )
    parts = [opening, *(_metric_table(rows, metric) for metric in rows["metrics"])]
    if rows["absent"]:
        parts.append(_absences(rows))
    if rows["picture"] is not None:
        name = Path(rows["picture"]).stem
        parts.append(f"![{name}]({folder}/{rows['picture']})")
    return "<!-- leaderboard -->\n" + "\n\n".join([*parts, LEGEND]) + "\n<!-- /leaderboard -->"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _metric_table(rows: Facts, metric: Facts) -> str:
    """Methods in the order of the smallest budget, best first; those without a place there below."""
    arrow = "↓" if metric["better"] == "lower" else "↑"
    budgets = list(dict.fromkeys(row["budget_text"] for row in rows["rows"] if row["budget_text"]))
    lines = [[f"{metric['name']} {arrow}", *(f"{budget} bits" for budget in budgets)]]
    placed = {(row["label"], row["budget_text"]): row for row in rows["rows"]}
    sign = 1 if metric["better"] == "lower" else -1

    def place(label: str) -> list[float]:
        cells = [placed.get((label, budget), {}).get("metrics", {}).get(metric["name"]) for budget in budgets]
        return [float("inf") if cell is None or cell["value"] is None else sign * cell["value"] for cell in cells]

    labels = dict.fromkeys(row["label"] for row in rows["rows"])
    dense = [label for label in labels if (label, "") in placed and placed[label, ""]["method"] == "dense"]
    free = [label for label in labels if (label, "") in placed and label not in dense]
    for label in dense:
        row = placed[label, ""]
        lines.append([f"{label} ({row['linear_bits']:.0f} bits)", *[_cell(row, metric["name"])] * len(budgets)])
    for label in sorted((label for label in labels if label not in dense and label not in free), key=place):
        lines.append([label, *(_cell(placed.get((label, budget)), metric["name"]) for budget in budgets)])
    for label in free:
        lines.append(
            [f"{label} ({placed[label, '']['linear_bits']:.2f} bits)", _cell(placed[label, ""], metric["name"])]
        )
    width = len(lines[0])
    return table_lines([[*line, *[""] * (width - len(line))] for line in lines], 1, escape=False)


def _cell(row: Facts | None, metric: str) -> str:
    """Value, interval and mark; "none" where there is no such row, or no number of it."""
    cell = None if row is None else row["metrics"].get(metric)
    if row is None or cell is None or cell["value"] is None:
        return "none"
    value = format_number(cell["value"])
    interval = ""
    if cell["low"] is not None and cell["high"] is not None:
        interval = f" [{format_number(cell['low'])}, {format_number(cell['high'])}]"
    mark = cell["mark"].replace("*", "\\*").replace("~", "\\~")
    best = f"**{value}**" if cell["mark"] == "*" else value
    outside = "" if row["within"] or not row["budget_text"] else f" ({row['linear_bits']:.3f} bits, off the window)"
    return " ".join(filter(None, (best + interval, mark))) + outside


def _absences(rows: Facts) -> str:
    """A sentence a label: at which budgets it has no setting, or failed."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in rows["absent"]:
        words = "no setting" if one["status"] == "skipped" and "no setting" in one["reason"] else one["status"]
        at = "" if one["budget"] is None else f"{one['budget']['centre']:g}"
        places = found.setdefault((one["label"], words), [])
        if at not in places:
            places.append(at)
    texts = [f"{label}: {words} at {' and '.join(places)}" for (label, words), places in found.items()]
    return "; ".join(texts) + "."


def shown_rows(readme: str, board: Path) -> tuple[str, Path]:
    """The README's section, and the rows.json that it is made of. Raises SystemExit where it has no single section."""
    found = SECTION.findall(readme)
    name = re.search(r"results/leaderboard/([\w.-]+)/report\.md", found[0]) if len(found) == 1 else None
    if name is None:
        raise SystemExit("README.md needs one <!-- leaderboard --> section that links to its report")
    return found[0], board / name[1] / "rows.json"


# -- commands -------------------------------------------------------------------------------------------------------


def check(root: Path = ROOT) -> tuple[list[str], list[str]]:
    """(what is stale of the README's leaderboard, what is worth telling)."""
    section, path = shown_rows((root / "README.md").read_text(), root / "results" / "leaderboard")
    if not path.is_file():
        return [f"{path.relative_to(root)} is not there: the README's section cannot be made from it"], []
    rows = json.loads(path.read_text())
    stale = [] if readme_section(rows) == section else ["README.md does not show what rows.json holds"]
    registry = load_plugins()
    plan = plan_today(root / rows["suite"], registry)
    stale += differences(rows, plan, registry)
    told = []
    if labels := changed_code(rows, plan):
        commits = ", ".join(map(short, rows["commits"]))
        told.append(f"measured at {commits}; other code or library versions would compress today: {', '.join(labels)}")
    return stale, told


def write(suite: Path, results: Path, out: Path, commit: str | None, *, page: bool, unfinished: bool) -> list[str]:
    """The report's folder, and unless `page` rows.json and the README's section. Returns what is worth telling.

    A page may have failed trials, shown with their reasons: that a library is caught computing wrong is a result.
    """
    path = ROOT / suite
    suite = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    store, name = Results(results), suite_name(path)
    records, folders = store.records(name)
    failed = [record for record in records if record.status == "failed"]
    missing = len(store.planned(name)) - len(records)
    if (missing or (failed and not page)) and not unfinished:
        run = store.run_folder(name)
        raise SystemExit(f"{run}: {len(failed)} trials failed, {missing} have no record; run the suite again")
    if not page:
        records = [record for record in records if record not in failed]
    commits = [commit] if commit is not None else commits_of(records)
    if not all(commits):
        raise SystemExit("the records do not say at which commit they were measured; give it by --commit")
    table = gather(records, folders)
    board = out / "results" / "leaderboard"
    with tempfile.TemporaryDirectory() as folder:
        write_report(Path(folder), records, folders, table=table)
        picture = re.search(r"!\[[^\]]*\]\(([^()\s]+)\.svg\)", (Path(folder) / "report.md").read_text())
        rows: Facts = {}
        if not page:
            registry = load_plugins()
            plan = plan_today(path, registry)
            rows = rows_file(suite, plan, records, table, None if picture is None else f"{picture[1]}.png")
            rows["commits"] = commits
            refuse_stale(rows, plan, registry, unfinished=unfinished)
        note = f"`evenbits run {suite.as_posix()}` at commit {', '.join(map(short, commits))}."
        copied = copy_report(Path(folder), board / name, note)
    for ending in (".md", ".png"):  # where earlier versions put this suite's report
        (board / f"{name}{ending}").unlink(missing_ok=True)
    size = sum((board / name / file).stat().st_size for file in copied)
    if not page:
        (board / name / "rows.json").write_text(one_line_a_row(rows))
        readme = out / "README.md"
        text = readme.read_text() if readme.is_file() else "<!-- leaderboard -->\n<!-- /leaderboard -->\n"
        text, count = SECTION.subn(lambda _: readme_section(rows), text)
        if count != 1:
            raise SystemExit("README.md needs one <!-- leaderboard --> section")
        readme.write_text(text)
    return [f"results/leaderboard/{name}: {len(copied)} files, {size // 1000} kB"]


def commits_of(records: Sequence[Record]) -> list[str]:
    """At which the done records were measured; "+" after one whose checkout had changes, "" for none known."""
    gits = [record.environment.get("git") or {} for record in records if record.status == "done"]
    return sorted({str(git.get("commit", "")) + ("+" if git.get("dirty") else "") for git in gits})


def short(commit: str) -> str:
    return commit[:7] + ("+" if len(commit) > 7 and commit.endswith("+") else "")


def refuse_stale(rows: Facts, plan: Plan, registry: Registry, *, unfinished: bool) -> None:
    """Raises SystemExit for rows that were not measured as the suite plans today.

    Options of evaluators and profilers are not in the records: the suite is taken from the commit they name, too.
    """
    found = differences(rows, plan, registry)
    if unfinished:
        found = [words for words in found if "planned today, not measured" not in words and "seeds" not in words]
    for commit in rows["commits"]:
        if then := suite_at(commit.rstrip("+"), rows["suite"]):
            now = tomllib.loads((ROOT / rows["suite"]).read_text())
            found += [
                f"{k}: another in the suite at {commit[:7]}"
                for k in ("evaluators", "profilers")
                if then.get(k) != now.get(k)
            ]
    if found:
        raise SystemExit("the records are not what the suite plans today: " + "; ".join(found))


def suite_at(commit: str, suite: str) -> Facts:
    """The suite's file at a commit; empty where the repository has no such commit or file."""
    done = subprocess.run(["git", "show", f"{commit}:{suite}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return tomllib.loads(done.stdout) if done.returncode == 0 else {}


def one_line_a_row(rows: Facts) -> str:
    """JSON whose differences can be read."""
    text = json.dumps({**rows, "rows": [], "absent": []}, indent=1, ensure_ascii=False, allow_nan=False)
    for name in ("rows", "absent"):
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows[name])
        text = text.replace(f'"{name}": []', f'"{name}": [\n  {lines}\n ]' if lines else f'"{name}": []')
    return text + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("suite", nargs="?", default="suites/methods.toml", type=Path)
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="results folder with the suite's run")
    parser.add_argument("--commit", help="at which it was measured, in place of what the records say")
    parser.add_argument("--page", action="store_true", help="the report alone; the README shows another suite")
    parser.add_argument("--out", default=ROOT, type=Path, help="write below this folder, not into the repository")
    parser.add_argument("--unfinished", action="store_true", help="for a look at a run that is still going on")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, say what is stale; exit 1 where something is"
    )
    given = parser.parse_args()
    try:
        if given.check:
            stale, told = check()
        else:
            if given.unfinished and given.out.resolve() == ROOT:
                raise SystemExit("--unfinished needs --out: what is not finished is not put into the repository")
            stale = []
            told = write(
                given.suite, given.results, given.out, given.commit, page=given.page, unfinished=given.unfinished
            )
    except EvenbitsError as error:
        raise SystemExit(f"leaderboard: {error}") from None
    for words in (*(f"stale: {one}" for one in stale), *told):
        sys.stdout.write(words + "\n")
    if stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
