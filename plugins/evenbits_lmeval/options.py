"""What a suite may say about lm-eval tasks: three doors to tasks, eras of the harness, where the files lie."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evenbits.compressor import Options
from evenbits.errors import SuiteError

PACKAGE = "package:"
PAPERS_FIVE = "papers-five"
"""In `tasks`: the five sets that papers on quantisation report."""
FIVE = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
METRIC_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"  # it names the file of its items
FEW_SHOT_SEED = 1234  # lm-eval's own default

Bos = Literal["tokenizer", "always", "none"]
# True leaves the matter to the tokenizer's template, whatever the era; "always" also refuses one that puts no BOS
ADD_BOS: dict[Bos, bool] = {"tokenizer": True, "always": True, "none": False}


@dataclass(frozen=True)
class Era:
    """How a range of lm-eval's versions turned a context and a continuation into tokens.

    encoding: "apart" encodes the two by themselves, the space at the continuation's front; "joint" encodes them as one
    text and cuts it where the context's own encoding ends, spaces at the context's end moved to the continuation.
    """

    encoding: Literal["joint", "apart"]
    bos: Bos
    versions: str


# What they have in common: a request longer than the context window loses tokens on the left, BOS included.
# What they differ in beside this table:
# - before an empty context (BLiMP) 0.3.0 put the end of text, later versions BOS where there is one
# - BLiMP's sentences had no space before them in 0.3.0, and have had one since (`target_delimiter`)
# Sources: lm_eval/base.py and lm_eval/tasks/blimp.py at v0.3.0; pull requests 546 (joint encoding) and 3347 (BOS).
ERAS: dict[str, Era] = {
    "A": Era("apart", "none", "0.3.0"),
    "B": Era("joint", "none", "0.4.0 to 0.4.9.1"),
    "C": Era("joint", "tokenizer", "0.4.9.2 and later"),
}


class LmEvalOptions(Options):
    tasks: tuple[str, ...] = Field(
        min_length=1, description='names of tasks or groups; "papers-five" stands for ' + ", ".join(FIVE)
    )
    folder: str | None = Field(
        default=None,
        description='folder of YAML tasks and their data, or "package:NAME/FOLDER" inside an installed package; '
        "without it and without data, lm-eval's own tasks, whose data come from the hub",
    )
    data: str | None = Field(
        default=None,
        description="folder of local data files (piqa.validation.jsonl, blimp/PARADIGM.jsonl ...), scored as lm-eval "
        "scores the hub's",
    )
    rows: Literal["known", "any"] = Field(
        default="known", description='whether a set that papers report must have its known number of rows; "any": no'
    )
    era: Literal["A", "B", "C"] = Field(
        default="C",
        description="lm-eval versions whose encoding is followed: A 0.3.0 (context and continuation apart, no BOS), "
        "B 0.4.0 to 0.4.9.1 (jointly, no BOS), C later (jointly, the tokenizer decides on BOS)",
    )
    bos: Bos | None = Field(
        default=None, description="whether a BOS stands in front of every request; without it, as the era had it"
    )
    few_shot: int | None = Field(
        default=None, ge=0, description="solved examples in front of each item; without it, as the task says"
    )
    scorer: Literal["auto", "tree", "hflm"] = Field(
        default="auto",
        description="tree: what requests share is encoded once; hflm: lm-eval's own; auto: tree where the model allows",
    )
    batch_size: int = Field(default=16, ge=1, description="requests that hflm scores at a time")
    batch_tokens: int | None = Field(
        default=None, ge=1, description="tokens that the tree scorer encodes at a time; without it, its own choice"
    )
    max_length: int | None = Field(default=None, ge=2, description="context in tokens; None: the model's")
    limit: int | None = Field(default=None, ge=1, description="only the first so many items of each task")
    members: bool = Field(
        default=False,
        description="whether each task of a group (each paradigm of BLiMP) is a metric of its own, too; else its "
        "figure stands in the group's details, its choices beside the record",
    )
    mean: str | None = Field(
        default=None,
        pattern=METRIC_NAME,
        description="name of a further metric: the mean of the tasks' accuracies, e.g. zero_shot_acc",
    )
    mean_norm: str | None = Field(
        default=None,
        pattern=METRIC_NAME,
        description="the same of acc_norm, and of acc for tasks without acc_norm (WinoGrande)",
    )

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        names = expand(tasks)
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)!r} stands twice in tasks")
        return tasks

    @model_validator(mode="after")
    def _one_door(self) -> LmEvalOptions:
        if self.folder is not None and self.data is not None:
            raise ValueError('give "folder" (YAML tasks) or "data" (data files of known tasks), not both')
        if self.mean is not None and self.mean == self.mean_norm:
            raise ValueError(f'"mean" and "mean_norm" need names of their own, not both {self.mean!r}')
        for name in self.names:
            for metric in (f"{name}_acc", f"{name}_acc_norm"):
                if metric in (self.mean, self.mean_norm):
                    raise ValueError(f"{metric!r} is the name of a task's own metric; give the mean another")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks and groups asked for, shortcuts written out."""
        return expand(self.tasks)

    @property
    def bos_rule(self) -> Bos:
        return ERAS[self.era].bos if self.bos is None else self.bos


def expand(tasks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for task in tasks for name in (FIVE if task == PAPERS_FIVE else (task,)))


def task_folder(options: LmEvalOptions) -> Path | None:
    """Raises SuiteError when the folder, or the package it should be in, is not there."""
    if options.folder is None:
        return None
    if not options.folder.startswith(PACKAGE):
        folder = Path(options.folder).expanduser()
    else:
        name, _, inside = options.folder.removeprefix(PACKAGE).partition("/")
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):  # of a dotted name the part before the last dot is imported
            spec = None
        if spec is None or spec.origin is None:
            raise SuiteError(f"lm-eval: no installed package {name!r} (from folder {options.folder!r})")
        folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise SuiteError(f"lm-eval: no folder of tasks at {folder}")
    return folder


def task_files(options: Any) -> list[Path]:
    """Every local file that says what is scored: the plan hashes what they say.

    Raises SuiteError for tasks and files that are not there and for broken rows, naming file and row. Of a folder's
    rows only that they are JSON is known here; choices and labels are checked when lm-eval has loaded them, before
    anything is scored.
    """
    from evenbits_lmeval.folder import folder_files
    from evenbits_lmeval.sets import local_files

    if options.data is not None:
        return local_files(options)
    folder = task_folder(options)
    return [] if folder is None else folder_files(folder, options.names)
