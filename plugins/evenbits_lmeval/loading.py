"""Tasks as lm-eval's own objects, by three doors: its tasks by name, a folder of YAML, local rows kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evenbits.errors import SuiteError, TrialFailed
from evenbits.plugins import did_you_mean
from evenbits_lmeval.folder import only_local_data
from evenbits_lmeval.options import FEW_SHOT_SEED, LmEvalOptions, task_folder
from evenbits_lmeval.rows import Row
from evenbits_lmeval.sets import BLIMP, LocalSet, data_folder, local_sets


@dataclass(frozen=True)
class GroupMetric:
    """How a group's figure comes from its tasks'. by_items: each item counts alike; else each task."""

    metric: str
    by_items: bool


@dataclass(frozen=True)
class TaskGroup:
    """tasks: names, of subgroups too. metrics: () where lm-eval states no figure for the group."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[GroupMetric, ...]


@dataclass
class Loaded:
    """listed: each name asked for, with its group, or its task, or the tasks of a tag."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, TaskGroup] = field(default_factory=dict)
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, name: str, tasks: Mapping[str, Any]) -> None:
        if twice := sorted(tasks.keys() & self.tasks.keys()):
            raise SuiteError(f"lm-eval: {twice[0]!r} is scored twice: by itself or in another group, and in {name!r}")
        self.tasks.update(tasks)
        self.listed[name] = tuple(tasks)


@contextmanager
def loaded_tasks(options: LmEvalOptions) -> Iterator[Loaded]:
    """The tasks, ready to build their requests; data sets made from a folder's files are gone afterwards.

    Raises SuiteError for unknown names, clashes, tasks that cannot be scored here and examples that a task does not
    take, TrialFailed for a data set that
    cannot be read (no network).
    """
    with quiet(), _templates_compiled_once(), TemporaryDirectory(prefix="evenbits-lmeval-") as scratch:
        if options.data is not None:
            loaded = _local(options)
        else:
            folder = task_folder(options)
            local = folder is not None and only_local_data(folder, options.names)
            with _data_sets_in(Path(scratch) if local else None):
                loaded = _by_name(options, folder)
        for name, task in loaded.tasks.items():
            _refuse(name, task)
            _set_few_shot(name, task, options.few_shot)
            if options.era == "A" and name.startswith(f"{BLIMP}_"):
                task.set_config("target_delimiter", "")  # 0.3.0 put no space before the sentence
        yield loaded


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval reports progress, defaults and every truncated request by its logger, one line each."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a prompt's template anew for each item: 2 of the 2.5 ms that an item of ARC costs it."""
    import lm_eval.utils

    env: Any = getattr(lm_eval.utils, "env", None)  # a jinja2.Environment
    if env is None or "from_string" in vars(env):
        yield
        return
    env.from_string = lru_cache(maxsize=256)(env.from_string)  # a template may be rendered any number of times
    try:
        yield
    finally:
        del env.from_string  # the instance's: the class's own is there again


def _refuse(name: str, task: Any) -> None:
    """What lm-eval refuses, too, when it is not told otherwise."""
    if getattr(task, "UNSAFE_CODE", False):
        raise SuiteError(f"lm-eval: {name} runs code that the model writes, and evenbits does not; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise SuiteError(f"lm-eval: {name} asks about images or sound, and evenbits gives text alone; leave it out")


def _set_few_shot(name: str, task: Any, few_shot: int | None) -> None:
    """As lm-eval: its own number without a wish, else 0; a task that fixes 0 does not take another."""
    own = task.get_config("num_fewshot")
    if few_shot and own == 0:
        raise SuiteError(f"lm-eval: few_shot = {few_shot}, but {name} is scored without examples")
    task.set_config("num_fewshot", (own or 0) if few_shot is None else few_shot)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)


# -- local rows ----------------------------------------------------------------------------------------------


def _local(options: LmEvalOptions) -> Loaded:
    loaded = Loaded()
    for name, sets in local_sets(options).items():
        loaded.add(name, {each.name: local_task(each, options) for each in sets})
        if name == BLIMP:  # 67 paradigms of 1000 pairs on the hub: lm-eval counts each alike
            loaded.groups[name] = TaskGroup(name, loaded.listed[name], (GroupMetric("acc", by_items=False),))
    return loaded


def local_task(which: LocalSet, options: LmEvalOptions) -> Any:
    """lm-eval's task object over the rows of a data file, which are read into memory: nothing is cached on disk."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    folder = data_folder(options)
    config = dict(import_module("yaml").safe_load(which.yaml.read_text(encoding="utf-8")))
    splits: dict[str, list[Row]] = {config.get("test_split") or config["validation_split"]: which.read(folder)}
    if options.few_shot:
        config["training_split"] = "train"
        splits["train"] = which.read(folder, which.few_shot)
    else:
        config["fewshot_config"] = {"samples": []}  # else the items themselves are listed once more, for nothing
    data = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    return ConfigurableTask(config={**config, "task": which.name, "custom_dataset": lambda **_: data})


# -- lm-eval's own, and folders ------------------------------------------------------------------------------


def _by_name(options: LmEvalOptions, folder: Path | None) -> Loaded:
    manager = _manager(options.names, folder)
    unknown = [name for name in options.names if name not in manager.all_tasks]
    if unknown:
        near = did_you_mean(unknown[0], manager.all_tasks) if folder is None else ""
        known = ", ".join(sorted(manager.all_tasks)[:12]) or "none"
        there = near if "did you mean" in near else f"; there are: {known}"
        raise SuiteError(f"lm-eval: no task {', '.join(unknown)} in {folder or 'lm-eval'}{there}")
    loaded = Loaded()
    for name in options.names:
        found = _found(manager, name, folder)
        loaded.add(name, found["tasks"])
        for group in found.get("groups", {}).values():
            metrics = tuple(GroupMetric(each.metric, each.weight_by_size) for each in group.aggregate_metric_list or ())
            loaded.groups[group.name] = TaskGroup(
                group.name, tuple(task.task_name for task in group.get_all_tasks()), metrics
            )
    return loaded


def _found(manager: Any, name: str, folder: Path | None) -> Any:
    try:
        return manager.load([name])
    except (SuiteError, TrialFailed):
        raise
    except Exception as error:  # lm-eval and datasets raise whatever their parts raise: a name, a path, a network
        said = " ".join(str(error).split())[:200]
        instead = (
            ""
            if folder is not None
            else '; its data come from the hub: with data = "FOLDER" they are read from local files'
        )
        raise TrialFailed(
            f"lm-eval: task {name!r} cannot be loaded ({type(error).__name__}: {said}){instead}"
        ) from error


def _manager(names: tuple[str, ...], folder: Path | None) -> Any:
    """Where names are looked up. All of lm-eval's tasks take seconds to index: single tasks are found without."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if folder is not None:
        return TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    root = Path(lm_eval.tasks.__file__).parent
    likely = {root / part for name in names for part in (name, name.split("_")[0]) if (root / part).is_dir()}
    if likely:
        manager = TaskManager(include_path=[str(path) for path in sorted(likely)], include_defaults=False)
        if set(names) <= set(manager.all_subtasks):  # groups and tags may reach outside their folder
            return manager
    return TaskManager()


@contextmanager
def _data_sets_in(folder: Path | None) -> Iterator[None]:
    """Have `datasets` convert local files below `folder` instead of in the user's cache; None: leave it as it is."""
    import datasets

    config: Any = datasets.config
    before = config.HF_DATASETS_CACHE
    if folder is not None:
        config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        config.HF_DATASETS_CACHE = before
