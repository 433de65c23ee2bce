"""Results folders: schema, lock, and what cleaning removes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import ArtifactError, SuiteError
from evenbits.store import Results

RTN_GPTQ = '[{ name = "rtn", budget = "free" }, { name = "gptq", budget = "free" }]'


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.name != ".lock"}


def test_lock(tmp_path: Path) -> None:
    with Results(tmp_path).lock(), pytest.raises(ArtifactError, match="is in use by process"), Results(tmp_path).lock():
        pass
    with Results(tmp_path).lock():
        pass


def test_a_results_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"), Results(tmp_path / "file").lock():
        pass


@pytest.mark.parametrize(("text", "said"), [
    ('{"schema": 2}', "newer than this evenbits knows"),
    ("{", "damaged"),
    ('{"schema": "one"}', "damaged"),
    ("[]", "damaged"),
])  # fmt: skip
def test_schema(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "evenbits.json").write_text(text)
    for create in (False, True):
        with pytest.raises(ArtifactError, match=said):
            Results(tmp_path).check_schema(create=create)
    assert (tmp_path / "evenbits.json").read_text() == text


def test_a_suite_that_was_never_run(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no run of suite 'x'"):
        Results(tmp_path).records("x")


def test_damaged_plan(tmp_path: Path) -> None:
    Results(tmp_path).write_plan("x", ["a"])
    (tmp_path / "runs/x/plan.json").write_text("[1")
    with pytest.raises(ArtifactError, match="damaged"):
        Results(tmp_path).records("x")


def spoil(root: Path, trial: str, artifact: str) -> set[str]:
    """What killed runs and changed suites leave; returns the paths that must go."""
    (root / "runs/tiny/report").mkdir()
    (root / "runs/tiny/report/report.md").write_text("kept")
    stale = shutil.copytree(root / "runs/tiny" / trial, root / "runs/tiny" / ("0" * 16))
    record = json.loads((stale / "record.json").read_text())
    record["chain"] = ["1" * 16]
    (stale / "record.json").write_text(json.dumps(record))
    unreferenced = shutil.copytree(root / "artifacts" / artifact, root / "artifacts" / ("1" * 16))
    unfinished = root / "runs/tiny" / ("2" * 16)  # a trial of an older plan, killed before it had a record
    unfinished.mkdir()
    (unfinished / "log.txt").write_text("")
    writing = root / "artifacts/.writing-abc-77"
    writing.mkdir()
    files = [
        f"runs/tiny/{trial}/.record.json.x1",
        "runs/tiny/.plan.json.x2",
        "runs/tiny/report/.report.md.x3",
        f"artifacts/{artifact}/.cost.json.x4",
        "cache/.digests.json.x5",
        ".evenbits.json.x6",
    ]
    for moments in (root / "cache").glob("moments/*"):
        files.append(str((moments / ".block-0000.safetensors.77").relative_to(root)))
    for name in files:
        (root / name).write_text("half")
    folders = [stale, unreferenced, unfinished, writing]
    return {*files, *(str(p.relative_to(root)) for folder in folders for p in [folder, *folder.rglob("*")])}


def test_clean(here: Any, evenbits: Any, suites: Any, tmp_path: Path) -> None:
    records, _ = here.run(suites.text(RTN_GPTQ))
    root = tmp_path / "results"
    kept = tree(root)
    gone = spoil(root, records[1].trial, records[1].artifact)
    kept |= {"runs/tiny/report", "runs/tiny/report/report.md"}
    assert tree(root) == kept | gone
    dry = evenbits("clean", "--dry-run", "--results", root)
    assert dry.returncode == 0, dry.stderr
    assert "would remove" in dry.stdout
    assert tree(root) == kept | gone
    done = evenbits("clean", "--results", root)
    assert done.returncode == 0, done.stderr
    assert tree(root) == kept
    again, notes = here.run(suites.text(RTN_GPTQ))
    assert again == records
    assert notes.stages == []
    evenbits("clean", "--artifacts", "--results", root)
    assert not (root / "artifacts").exists()
    assert Results(root).records("tiny")[0] == records


def test_the_next_run_removes_leftovers(here: Any, suites: Any, tmp_path: Path) -> None:
    records, _ = here.run(suites.text(RTN_GPTQ))
    root = tmp_path / "results"
    gone = {name for name in spoil(root, records[1].trial, records[1].artifact) if Path(name).name.startswith(".")}
    here.run(suites.text(RTN_GPTQ))
    assert tree(root) & gone == set()
    assert (root / "artifacts" / ("1" * 16)).is_dir()  # only `clean` removes what is whole
