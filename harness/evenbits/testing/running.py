"""A suite run as the command line runs it, without its words and its downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evenbits.executor import LocalExecutor
from evenbits.plan import make_plan
from evenbits.plugins import load_plugins
from evenbits.record import Record
from evenbits.run import Run
from evenbits.store import Results
from evenbits.suite import read_suite


def run_suite(file: Path, results: Path) -> list[Record]:
    """All records of the plan, in its order. Raises SuiteError for what is wrong with the suite."""
    registry = load_plugins()
    registry.collect_all()
    suite = read_suite(file, registry)
    store = Results(results)
    with store.lock():
        store.check_schema(create=True)
        plan = make_plan(suite, registry, cache=store.cache)
        executor: Any = LocalExecutor(suite.limits.workers)
        if suite.executor != "local":
            executor = registry.find("executors", suite.executor, "executor").value(suite)
        try:
            return Run(plan, registry, store, executor).go()
        finally:
            executor.close()
