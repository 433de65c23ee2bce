"""The contract as named checks: of a method, a recovery stage, an evaluator or a profiler. Listing imports no torch."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evenbits.compressor import Compressor, Recovery
from evenbits.errors import SuiteError
from evenbits.measure import Evaluator, Profiler
from evenbits.plugins import Provided, Registry, did_you_mean, load_plugins
from evenbits.shapes import read_inventory
from evenbits.testing.settings import Descriptor

Devices = Literal["auto", "cpu", "cuda"]
KINDS = {
    "compressors": "method",
    "recoveries": "recovery stage",
    "evaluators": "evaluator",
    "profilers": "profiler",
}


class NotApplicable(Exception):
    """Why a check has nothing to look at here: no GPU, no environment, a method that says it does not do this."""


@dataclass(frozen=True)
class Check:
    """One promise. `run()` raises AssertionError with what to do, NotApplicable, or what the plugin itself raises."""

    name: str
    says: str
    body: Callable[[], None]

    def run(self) -> None:
        __tracebackhide__ = True
        try:
            self.body()
        except SystemExit as error:
            raise AssertionError(
                f"{self.name}: it ended the interpreter (SystemExit {error.code}): raise evenbits.errors.TrialFailed "
                "with a reason instead"
            ) from error


def scratch_folder(owner: object) -> Path:
    """A folder that goes when its owner goes, or the interpreter."""
    folder = tempfile.mkdtemp(prefix="evenbits-check-")
    weakref.finalize(owner, shutil.rmtree, folder, True)
    return Path(folder)


def find_target(name: str, registry: Registry) -> Provided[Any]:
    """What is installed under this name. Raises SuiteError with near names, or where two kinds have it."""
    found = {what: getattr(registry, kind)[name] for kind, what in KINDS.items() if name in getattr(registry, kind)}
    if len(found) > 1:
        raise SuiteError(f"{name!r} is a {' and a '.join(found)}: give its descriptor instead of its name")
    if found:
        return next(iter(found.values()))
    if why := registry.why_out(name):
        raise SuiteError(f"{name!r}: {why}")
    known = [each for kind in KINDS for each in getattr(registry, kind)]
    near = did_you_mean(name, known)
    raise SuiteError(f"no method, recovery stage, evaluator or profiler {name!r} is installed{near}")


def checks(
    target: str | Descriptor,
    options: Mapping[str, Any] | None = None,
    *,
    exact: bool = True,
    fitted: bool = True,
    model: Path | None = None,
    device: Devices = "auto",
) -> list[Check]:
    """The contract of `target`, in an order in which what fails first explains the rest.

    exact, fitted: of a method, see `check_compressor`. model: of a recovery stage, evaluator or profiler, the folder
    of the model it is tried on, in place of a tiny Llama. device: "cpu" leaves the GPU alone, "cuda" demands one.
    Raises SuiteError for a name that is not installed, for options that do not fit, and for a model that cannot be
    read.
    """
    package = ""
    if isinstance(target, str):
        provided = find_target(target, load_plugins())
        package, descriptor = provided.package, provided.value
    else:
        descriptor = target
    if device == "cuda":
        from evenbits.devices import cuda_devices

        if not cuda_devices():
            raise SuiteError('device "cuda": no CUDA device here; give "cpu" or "auto"')
    if isinstance(descriptor, Compressor):
        from evenbits.testing.compressors import CompressorContract

        if model is not None:
            raise SuiteError(f"{descriptor.name}: a method is tried on a tiny model of its own: name no model")
        return CompressorContract(descriptor, options, exact, fitted, device, package).checks()
    if not (exact and fitted):
        raise SuiteError(f"{descriptor.name}: upper bounds and settings that `fit` chose are of methods alone")
    if model is not None:
        read_inventory(model)  # said here, not check by check
    if isinstance(descriptor, Recovery):
        from evenbits.testing.recoveries import RecoveryContract

        return RecoveryContract(descriptor, options, model, device).checks()
    if isinstance(descriptor, Evaluator):
        from evenbits.testing.evaluators import EvaluatorContract

        return EvaluatorContract(descriptor, options, model, device).checks()
    if isinstance(descriptor, Profiler):
        from evenbits.testing.profilers import ProfilerContract

        return ProfilerContract(descriptor, options, model, device).checks()
    raise SuiteError(f"{type(descriptor).__name__} has no contract: give a Compressor, Recovery, Evaluator or Profiler")


def contract_tests(
    target: str | Descriptor,
    options: Mapping[str, Any] | None = None,
    *,
    exact: bool = True,
    fitted: bool = True,
    model: Path | None = None,
    device: Devices = "auto",
) -> Callable[[Check], None]:
    """A pytest test for each check: assign it to a name that begins with test. Arguments are those of `checks`."""
    import pytest

    found = checks(target, options, exact=exact, fitted=fitted, model=model, device=device)

    @pytest.mark.parametrize("check", found, ids=[check.name for check in found])
    def test_contract(check: Check) -> None:
        __tracebackhide__ = True
        try:
            check.run()
        except NotApplicable as reason:
            pytest.skip(str(reason))

    return test_contract


def check_compressor(
    descriptor: Compressor, options: Mapping[str, Any] | None = None, *, exact: bool = True, fitted: bool = True
) -> list[tuple[int, int]]:
    """The whole contract for one compressor, to its first failure.

    options: settings to check beside what `fit` chooses; by default the options' defaults. exact: whether the
    stored bytes are known beforehand; False for methods whose bits depend on the data, which must stay below.
    fitted: also check `fit` and its settings; once is enough where several settings are checked.
    A shape may be refused with TrialFailed and a reason, but not the plain one (64 x 128). Returns the shapes
    that were refused. Raises AssertionError with what to do.
    """
    from evenbits.testing.compressors import CompressorContract

    contract = CompressorContract(descriptor, options, exact, fitted)
    for check in contract.checks():
        try:
            check.run()
        except NotApplicable:
            continue
    return contract.refused()
