"""What a suite may say about lm-eval tasks, and where a folder of tasks lies."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field

from evenbits.compressor import Options
from evenbits.errors import SuiteError

PACKAGE = "package:"


class LmEvalOptions(Options):
    tasks: tuple[str, ...] = Field(min_length=1, description="task names, as lm-eval knows them")
    folder: str | None = Field(
        default=None,
        description='folder of YAML tasks and their data, or "package:NAME/FOLDER" inside an installed package; '
        "without it, lm-eval's own tasks, whose data come from the hub",
    )
    bos: Literal["tokenizer", "always", "none"] = Field(
        default="tokenizer", description="whether a BOS stands in front of every request"
    )
    batch_size: int = Field(default=16, ge=1, description="requests scored at a time")
    max_length: int | None = Field(default=None, ge=2, description="context in tokens; None: the model's")
    limit: int | None = Field(default=None, ge=1, description="only the first so many items of each task")
    mean: str | None = Field(
        default=None, description="name of a further metric: the mean of the tasks' accuracies, e.g. zero_shot_acc"
    )


def task_folder(options: LmEvalOptions) -> Path | None:
    """Raises SuiteError when the folder, or the package it should be in, is not there."""
    if options.folder is None:
        return None
    if not options.folder.startswith(PACKAGE):
        folder = Path(options.folder).expanduser()
    else:
        name, _, inside = options.folder.removeprefix(PACKAGE).partition("/")
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise SuiteError(f"lm-eval: no installed package {name!r} (from folder {options.folder!r})")
        folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise SuiteError(f"lm-eval: no folder of tasks at {folder}")
    return folder


def task_files(options: LmEvalOptions) -> list[Path]:
    """Every file of the folder: what they say is part of what a trial is."""
    folder = task_folder(options)
    return [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
