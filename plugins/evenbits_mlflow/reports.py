"""The report that goes on a run's parent: the one beside the records where it is of these, else one drawn for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from evenbits.page import PAGE, write_page
from evenbits.record import Record
from evenbits.report import as_json, gather, write_report
from evenbits.tables import Table
from evenbits_mlflow.notes import run_command, run_note


@dataclass(frozen=True)
class Report:
    """folder: its files, there only as long as `report_of` is open. note: a description of the run, Markdown."""

    folder: Path
    note: str
    digest: str
    table: Table


@contextlib.contextmanager
def report_of(
    run: Path,
    suite: str,
    description: str,
    records: Sequence[Record],
    folders: Mapping[str, Path],
    known: str | None,
) -> Iterator[Report | None]:
    """The report of a run, or None where the server has it: `known` is the digest of what it has."""
    written = run / "report"
    drawn = not _is_of(written, records)
    digest = f"drawn-{_of_records(records)}" if drawn else _of_files(written)
    if digest == known:
        yield None
        return
    table = gather(records, folders)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if drawn:
            write_report(folder, records, folders, plots=find_spec("matplotlib") is not None, table=table)
        else:
            shutil.copytree(written, folder, dirs_exist_ok=True)
        if not (folder / PAGE).exists():
            write_page(folder, table, command=run_command(suite))
        for path in folder.glob("*.png"):  # the vector twin says as much, and each file is a call to a server
            if path.with_suffix(".svg").exists():
                path.unlink()
        yield Report(folder, run_note(suite, description, records, table), digest, table)


def _is_of(folder: Path, records: Sequence[Record]) -> bool:
    """Whether the report in a folder is of these very records. By content: a copied folder has lost its times."""
    try:
        found = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(found == json.loads(json.dumps(as_json(records))))


def _of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _of_records(records: Sequence[Record]) -> str:
    text = json.dumps([record.model_dump(mode="json") for record in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
