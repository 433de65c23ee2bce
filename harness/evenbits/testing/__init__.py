"""Everything that tests a plugin: the contract as named checks, tiny models, and what a test needs around them.

    from evenbits.testing import contract_tests

    test_contract = contract_tests("median")  # pytest: one test a check, test_contract[determinism], [round-trip] ...

`contract_tests(target, options=None, *, exact=True, fitted=True, model=None, device="auto")` gives a parametrized
pytest test; `checks(...)`, of the same arguments, the `Check`s themselves (name, says, run()); `check_compressor(...)`
runs a compressor's one after the other. `evenbits check NAME` runs them without pytest, in a process of their own.

target: the name of an installed method, recovery stage, evaluator or profiler, or its descriptor (`Compressor`,
`Recovery`, `Evaluator`, `Profiler`). options: those that it has no defaults for, or a setting to check beside them.

A check raises AssertionError with what to do, or NotApplicable with the reason why there is nothing to check. None
needs a network or a GPU; where there is a GPU it is used too, unless device = "cpu".

The pytest plugin (`evenbits.testing.pytest_plugin`, loaded with evenbits installed) has four fixtures:

    evenbits_tiny_model(kind="llama", **shape) -> Path   folder of a random model; llama, gpt2, qwen3 or opt
    evenbits_tiny_text -> Path                           a text file that it can read, for corpus {name = "text", path}
    evenbits_results -> Path                             an empty results folder of the test's own
    evenbits_run(suite, *, kind="llama") -> list[Record] runs the text of a suite; $model, $text stand for the first two

Importing this package imports no torch: what is asked of it is loaded when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenbits.testing.cases import SHAPES, Case, make_case, run_case, untouched_randomness
    from evenbits.testing.contract import Check, NotApplicable, check_compressor, checks, contract_tests
    from evenbits.testing.fitting import BUDGETS, check_fit, check_fit_edges
    from evenbits.testing.linears import check_held, check_linear
    from evenbits.testing.matrices import (
        check_cuda,
        check_determinism,
        check_extremes,
        check_prediction,
        check_restore,
        check_round_trip,
        check_tunable,
    )
    from evenbits.testing.settings import check_options
    from evenbits.testing.stored import check_model, compress_model, manifest_facts, stored_layer
    from evenbits.tiny import ModelKind, tiny_model, tiny_text, tiny_tokens

_HOMES = {
    "evenbits.testing.cases": ("SHAPES", "Case", "make_case", "run_case", "untouched_randomness"),
    "evenbits.testing.contract": ("Check", "NotApplicable", "check_compressor", "checks", "contract_tests"),
    "evenbits.testing.fitting": ("BUDGETS", "check_fit", "check_fit_edges"),
    "evenbits.testing.linears": ("check_held", "check_linear"),
    "evenbits.testing.matrices": (
        "check_cuda",
        "check_determinism",
        "check_extremes",
        "check_prediction",
        "check_restore",
        "check_round_trip",
        "check_tunable",
    ),
    "evenbits.testing.settings": ("check_options",),
    "evenbits.testing.stored": ("check_model", "compress_model", "manifest_facts", "stored_layer"),
    "evenbits.tiny": ("ModelKind", "tiny_model", "tiny_text", "tiny_tokens"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BUDGETS",
    "SHAPES",
    "Case",
    "Check",
    "ModelKind",
    "NotApplicable",
    "check_compressor",
    "check_cuda",
    "check_determinism",
    "check_extremes",
    "check_fit",
    "check_fit_edges",
    "check_held",
    "check_linear",
    "check_model",
    "check_options",
    "check_prediction",
    "check_restore",
    "check_round_trip",
    "check_tunable",
    "checks",
    "compress_model",
    "contract_tests",
    "make_case",
    "manifest_facts",
    "run_case",
    "stored_layer",
    "tiny_model",
    "tiny_text",
    "tiny_tokens",
    "untouched_randomness",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
