"""The baseline file and the command: what is written, what is refused, exit codes, Markdown and JUnit XML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.harness.test_gate import LOSSES, Night
from typer.testing import CliRunner

from evenbits.cli import app
from evenbits.errors import ArtifactError, EvenbitsError, SuiteError
from evenbits.gate_baseline import read_baseline, update_baseline
from evenbits.gate_snapshot import SCHEMA, take_run
from evenbits.record import Failure

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Night:
    return Night(tmp_path_factory.mktemp("base")).run((0, 1, 2))


@pytest.fixture
def file(base: Night, tmp_path: Path) -> Path:
    path = tmp_path / "baselines" / "nightly.json"
    update_baseline(path, None, take_run(base.trials.store, "nightly"), "first", now=NOW)
    return path


def command(*arguments: Any) -> tuple[int, str]:
    """Exit code as `evenbits.cli.main` gives it, and what was printed."""
    done = CliRunner().invoke(app, ["gate", *map(str, arguments)])
    if isinstance(done.exception, EvenbitsError):
        return 2, str(done.exception)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_the_file_keeps_the_run(base: Night, file: Path) -> None:
    snapshot = read_baseline(file)
    assert snapshot.rows == base.snapshot.rows
    assert snapshot.protocols == base.snapshot.protocols
    row = snapshot.rows_by_place()["small gptq @ 2"]
    assert row.seeds == (0, 1, 2)
    metric = row.metrics[0]
    assert metric.items is not None
    assert np.exp(metric.items.array().mean(axis=1)) == pytest.approx(np.array(metric.values))
    assert [(one.reason, one.date, one.commit) for one in snapshot.updates] == [("first", "2026-01-02", "a" * 40)]
    again = file.with_name("again.json")
    update_baseline(again, None, take_run(base.trials.store, "nightly"), "first", now=NOW)
    assert again.read_bytes() == file.read_bytes()
    assert sum(line.startswith('{"model"') for line in file.read_text().splitlines()) == 1 + len(LOSSES)


def test_updates_are_logged_with_what_they_accept(base: Night, file: Path, tmp_path: Path) -> None:
    night = Night(tmp_path / "night")
    night.extra, night.code = {"gptq": 0.1}, {"gptq": "x"}
    night.run((0, 1, 2))
    code, said = command(file, "--results", night.trials.store.root, "--update", "GPTQ without\n act order")
    assert code == 0, said
    assert "alarms accepted" in said
    first, second = read_baseline(file).updates
    assert (first.reason, second.reason) == ("first", "GPTQ without act order")
    assert any(text.startswith("small gptq @ 2: perplexity ") and ": worse, " in text for text in second.accepted)
    assert command(file, "--results", night.trials.store.root)[0] == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read (No such file or directory); `evenbits gate"),
        ("{", "not a baseline: "),
        ("[]", "not a baseline (no schema_version)"),
        ('{"schema_version": 99}', f"schema 99 is newer than this evenbits knows ({SCHEMA}); upgrade evenbits"),
        ('{"schema_version": 1, "suite": "a"}', "environments: Field required; restore the file"),
    ],
)
def test_unreadable_baselines(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "b.json"
    if text is not None:
        path.write_text(text)
    code, said = command(path, "--results", tmp_path)
    assert code == 2
    assert says in said
    assert "\n" not in said


def test_damaged_items(file: Path) -> None:
    data = json.loads(file.read_text())
    data["rows"][0]["metrics"][0]["items"]["data"] = "AAAA"
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="per-item values of the baseline are damaged"):
        read_baseline(file)
    data["rows"][0]["metrics"][0]["values"] = [2.0, 3.0]
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="small dense: not one entry a seed; restore the file"):
        read_baseline(file)
    data["rows"][0]["metrics"][0]["values"] = [float("inf")]
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"values\.0: Input should be a finite number; restore the file"):
        read_baseline(file)
    file.write_text(json.dumps({**data, "rows": []}))
    with pytest.raises(ArtifactError, match="a baseline without rows"):
        read_baseline(file)


def test_what_update_refuses(base: Night, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    same = take_run(base.trials.store, "nightly")
    with pytest.raises(SuiteError, match="say why the baseline changes"):
        update_baseline(file, read_baseline(file), same, "  ")
    one = take_run(Night(tmp_path / "one").run().trials.store, "nightly")
    with pytest.raises(SuiteError, match=r"1 seed\(s\), the baseline 3, .* --seed 0 --seed 1 --seed 2"):
        update_baseline(file, read_baseline(file), one, "because")
    broken = Night(tmp_path / "broken")
    broken.left_out = {"aqlm"}
    broken.run((0, 1, 2))
    failure = Failure(kind="error", stage="compress", message="no memory")
    broken.trials.add("aqlm", label="aqlm", status="failed", failure=failure, ledger=None)
    with pytest.raises(SuiteError, match="incomplete, 1 without numbers: small aqlm @ 2 failed"):
        update_baseline(file, read_baseline(file), take_run(broken.trials.store, "nightly"), "because")
    assert file.read_bytes() == before
    assert command(file, "--results", broken.trials.store.root)[0] == 3


def test_usage(base: Night, file: Path, tmp_path: Path) -> None:
    root = base.trials.store.root
    assert command(file, "--results", tmp_path)[1].endswith("no run of suite 'nightly' here; `evenbits run` makes one")
    assert "the baseline of suite 'nightly', not of 'other'" in command(file, "--results", root, "--suite", "other")[1]
    assert "--level 2: a share between" in command(file, "--results", root, "--level", 2)[1]
    assert "cannot be written" in command(file, "--results", root, "--markdown", file / "gate.md")[1]
    assert "say by --suite" in command(tmp_path / "new.json", "--results", root, "--update", "x")[1]


def test_exit_codes(base: Night, file: Path, tmp_path: Path) -> None:
    """Of the process itself: what a CI job sees."""
    night = Night(tmp_path / "night")
    night.extra, night.code = {"gptq": 0.1}, {"gptq": "x"}
    night.run()
    absent = Night(tmp_path / "absent").run()
    absent.trials.store.write_plan("nightly", [*absent.trials.order, "neverran"])
    for results, path, code in (
        (base, file, 0),
        (night, file, 1),
        (base, tmp_path / "none.json", 2),
        (absent, file, 3),
    ):
        line = [sys.executable, "-m", "evenbits.cli", "gate", str(path), "--results", str(results.trials.store.root)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


def test_the_command_writes_a_summary_and_junit(base: Night, file: Path, tmp_path: Path) -> None:
    night = Night(tmp_path / "night")
    night.extra, night.code = {"gptq": 0.1, "aqlm": -0.03}, {"gptq": "x<&", "aqlm": "x"}
    night.left_out = {"vptq"}
    night.run()
    markdown, xml = tmp_path / "gate.md", tmp_path / "gate.xml"
    files = "--markdown", markdown, "--junit", xml
    code, said = command(file, "--results", night.trials.store.root, *files)
    assert code == 1
    change = re.match(r"nightly: REGRESSION: small gptq @ 2: perplexity \+([0-9.]+) %, and \d more row", said)
    assert change is not None
    assert float(change[1]) == pytest.approx(10.5, abs=2)  # e^0.1, less the luck of seed 0
    assert re.search(r"small gptq @ 2: perplexity \d\.\d+ -> \d\.\d+, \+\d+\.\d+ % \[.*\]: worse, ", said)
    assert said.count("with it: artifact of seed 0 artifactgptq0 ->") == 1
    assert "with it: artifact of seed 0 artifactgptq0 -> artifactgptq0x<& with equal settings" in said
    assert "small vptq @ 2: vanished" in said
    text = markdown.read_text()
    assert text.startswith("# Gate: nightly: REGRESSION: ")
    assert text.index("## Regressions") < text.index("## Improvements") < text.index("## Numbers")
    assert "x&lt;&amp;" in text
    root = ElementTree.fromstring(xml.read_text())
    cases = {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}
    failed = {key for key, case in cases.items() if case.find("failure") is not None}
    assert {("small gptq @ 2", "perplexity"), ("small vptq @ 2", "row")} <= failed
    assert len(failed) == int(root.get("failures", ""))
    assert len(cases) == int(root.get("tests", ""))
    failure = cases["small gptq @ 2", "perplexity"].find("failure")
    assert failure is not None
    assert f"+{change[1]} % [" in str(failure.text)
    assert ("small kmeans @ 2", "perplexity") in cases.keys() - failed


SUITE = 'name = "nightly"\nmodel = "small"\nmethods = [{ name = "rtn", budget = "free" }]\n'
PRINTED = """
title = "Table 1"
model = "small"
origin = {{ source = "a paper", version = "v1", context = 2048, trust = "{trust}" }}
[[rows]]
method = "RTN"
label = "rtn"
stage = "none"
tolerance = "rtn"
values = {{ perplexity = {value} }}
"""


def test_printed_numbers_gate_too(base: Night, tmp_path: Path) -> None:
    """A published file in a baseline's place: what gates and differs is exit 1; what is printed cannot be updated."""
    suite, printed = tmp_path / "s.toml", tmp_path / "s.published.toml"
    suite.write_text(SUITE)
    measured = next(row for row in base.snapshot.rows if row.label == "rtn").metrics[0].values[0]
    root = base.trials.store.root
    xml = tmp_path / "gate.xml"
    for shift, trust, code in ((0.002, "V", 0), (0.2, "V", 1), (0.2, "R", 0)):
        printed.write_text(PRINTED.format(value=measured + shift, trust=trust))
        assert command(printed, "--results", root, "--junit", xml, "--markdown", tmp_path / "gate.md")[0] == code
        case = ElementTree.fromstring(xml.read_text()).find(".//testcase[@name='perplexity']")
        assert case is not None
        assert (case.find("failure") is not None) == (code == 1)
        assert "Table 1" in (tmp_path / "gate.md").read_text()
    assert "what papers print is no run's to update" in command(printed, "--results", root, "--update", "x")[1]
    assert "no run of suite 'nightly' here" in command(printed, "--results", tmp_path / "none")[1]
