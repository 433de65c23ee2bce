"""Every hook. A plugin is a module (entry point group "evenbits") with functions of these names.

Hooks return values. They are called implementation by implementation, so that each object is known by the
distribution it came from; a broken one is reported and the rest still work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer
    from torch import nn

    from evenbits.compressor import Compressor, Options, Recovery
    from evenbits.executor import Executor
    from evenbits.measure import Corpus, Evaluator, Profiler
    from evenbits.plan import Plan, Trial
    from evenbits.record import Record
    from evenbits.run import RunContext

NAMESPACE = "evenbits"
hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def provide_compressors() -> Sequence[Compressor]:
    """Compression methods. Called at listing time: return descriptors, import nothing heavy."""
    return ()


@hookspec
def provide_recoveries() -> Sequence[Recovery]:
    """Stages that may follow any compressor (LoRA, end-to-end tuning)."""
    return ()


@hookspec
def provide_evaluators() -> Sequence[Evaluator]:
    """Measures of quality."""
    return ()


@hookspec
def provide_profilers() -> Sequence[Profiler]:
    """Measures of hardware cost; each runs alone on the machine."""
    return ()


@hookspec
def provide_corpora() -> Sequence[Corpus]:
    """Sources of text for calibration and perplexity."""
    return ()


@hookspec
def provide_models() -> Mapping[str, Path]:
    """Named models that a suite may ask for as `model = "name"`: name -> Hugging Face folder."""
    return {}


@hookspec
def provide_executors() -> Mapping[str, type[Executor]]:
    """Where trials run, by name; "local" is built in."""
    return {}


@hookspec
def provide_options() -> type[Options]:
    """Options of the plugin itself: a suite's [plugins.NAME] table is checked against them."""
    raise NotImplementedError


@hookspec(firstresult=True)
def load_model(path: Path, dtype: str) -> nn.Module | None:
    """Open a dense model in a way of its own; None to pass on to the next plugin, in the end to transformers.
    Compressing, and opening what was stored, goes through transformers."""


@hookspec
def on_plan(plan: Plan, context: RunContext) -> None:
    """A run is about to begin; everything that will be tried is known."""


@hookspec
def on_trial_start(trial: Trial, context: RunContext) -> None:
    """A trial begins."""


@hookspec
def on_record(record: Record, folder: Path, context: RunContext) -> None:
    """A record was written to `folder` (done, failed or skipped). Also called for records that a resumed run
    finds, so that a mirror which missed them catches up: deliver each record once."""


@hookspec
def on_trial_failed(trial: Trial, record: Record, context: RunContext) -> None:
    """A trial ended as a failed record; called after `on_record`."""


@hookspec
def on_finish(records: Sequence[Record], context: RunContext) -> None:
    """The run is over; `records` are all of the plan's, in its order."""


@hookspec
def extend_cli(app: typer.Typer) -> None:
    """Add commands to `evenbits`. Import what they need inside the command."""


HOOKS: tuple[str, ...] = tuple(
    name for name, value in list(globals().items()) if getattr(value, f"{NAMESPACE}_spec", None) is not None
)


def describe(name: str) -> str:
    """First line of a hook's documentation."""
    doc: Any = globals()[name].__doc__
    return str(doc).strip().splitlines()[0]
