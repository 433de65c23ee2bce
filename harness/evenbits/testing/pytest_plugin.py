"""Fixtures for tests of plugins: tiny models, a text, a results folder, a run of a suite. Imports no torch by itself.

Loaded by pytest wherever evenbits is installed; `-p no:evenbits` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from evenbits.record import Record
    from evenbits.tiny import ModelKind


@pytest.fixture(scope="session")
def evenbits_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes random models: (kind="llama", seed=0, **shape) -> folder with model and tokenizer.

    kind: llama, gpt2, qwen3 or opt; shape: blocks, hidden, intermediate, dtype, tied, as
    evenbits.testing.tiny_model has them. What was made for one test serves the others: do not write into it.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: ModelKind = "llama", seed: int = 0, **shape: Any) -> Path:
        key = (kind, seed, *sorted(shape.items()))
        if key not in made:
            from evenbits.tiny import tiny_model

            made[key] = tiny_model(tmp_path_factory.mktemp(f"evenbits-{kind}"), kind, seed, **shape)
        return made[key]

    return make


@pytest.fixture(scope="session")
def evenbits_tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4000 words that the tiny models' tokenizer knows, as for corpus = {name = "text", path = "..."}."""
    from evenbits.tiny import tiny_text

    path = tmp_path_factory.mktemp("evenbits-text") / "tiny.txt"
    path.write_text(tiny_text(4000) + "\n")
    return path


@pytest.fixture
def evenbits_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty results folder of the test's own: what `--results` names on the command line."""
    return tmp_path_factory.mktemp("evenbits-results")


@pytest.fixture
def evenbits_run(
    evenbits_tiny_model: Callable[..., Path],
    evenbits_tiny_text: Path,
    evenbits_results: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[Record]]:
    """Runs a suite as `evenbits run` does: (suite, kind="llama", **shape) -> its records, in the plan's order.

    suite: its text; "$model" in it stands for the folder of a tiny model, "$text" for the file of evenbits_tiny_text.
    Trials run in processes of their own, which see installed plugins. Results are kept in evenbits_results, so that a
    second run of the same suite resumes the first.
    """

    def run(suite: str, kind: ModelKind = "llama", **shape: Any) -> list[Record]:
        from evenbits.testing.running import run_suite

        text = suite.replace("$model", evenbits_tiny_model(kind, **shape).as_posix())
        file = tmp_path_factory.mktemp("evenbits-suite") / "suite.toml"
        file.write_text(text.replace("$text", evenbits_tiny_text.as_posix()))
        return run_suite(file, evenbits_results)

    return run
