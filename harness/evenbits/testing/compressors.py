"""The contract of compressors. Layer compressors are tried on matrices; all of them on a tiny model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenbits.compressor import Compressor, LayerCompressor, Options
from evenbits.devices import cuda_devices
from evenbits.errors import EvenbitsError, TrialFailed
from evenbits.foreign import CheckpointCompressor, Launch
from evenbits.testing.contract import Check, Devices, NotApplicable
from evenbits.testing.fitting import check_fit, check_fit_edges
from evenbits.testing.settings import check_descriptor, check_options, settled

if TYPE_CHECKING:
    from evenbits.testing.cases import Case, Ran, Runs

FITTED_SHAPE = (64, 172)


class CompressorContract:
    """One compressor at one setting; every matrix is compressed once and looked at by all checks."""

    def __init__(
        self,
        descriptor: Compressor,
        given: Mapping[str, Any] | None = None,
        exact: bool = True,
        fitted: bool = True,
        device: Devices = "auto",
        package: str = "",
    ) -> None:
        self.descriptor = descriptor
        self.options = settled(descriptor, given)
        self.exact, self.fitted, self.device, self.package = exact, fitted, device, package

    def checks(self) -> list[Check]:
        listed: list[tuple[str, str, Callable[[], None]]] = [
            ("descriptor", "name and summary are fit to be shown and stored", self._descriptor),
            ("options", "frozen, described, unknown keys refused, the same from JSON", self._options),
        ]
        if self.fitted:
            listed += [
                ("fit", "what fit returns lies in the budget; what nothing fits is refused", self._fit),
                ("fit-edges", "a window's ends, a window of no width, pinned options", self._fit_edges),
            ]
        listed += [
            ("compress", "a 64 x 128 matrix compresses and restores", self._compress),
            ("global-state", "the global random state stays as it was", self._global_state),
            ("weights", "the weight and its statistics stay as they were", self._weights),
            ("shapes", "odd shapes compress, or are refused with a reason", self._shapes),
            ("predict", "predict names the bytes that are stored, role by role", self._predict),
            ("determinism", "one seed gives the same bytes, whatever the global state", self._determinism),
            ("seed", "a method that is not declared stochastic does not depend on the seed", self._seed),
            ("restore", "restore depends on what is stored alone, and leaves it", self._restore),
            ("tunable", "what may be trained is stored, float, and has gradients", self._tunable),
            ("round-trip", "through an artifact on disk, bit for bit", self._round_trip),
            ("linear", "the packed path computes what the restored weight does", self._linear),
            ("held", "the packed path holds no decoded weight", self._held),
            ("extremes", "a weight of zeros, and one with a huge outlier", self._extremes),
        ]
        if self.fitted:
            listed.append(("fitted", "the settings that fit chooses store what predict says", self._fitted))
        listed += [
            ("cuda", "on a GPU: deterministic, and decoded as on the CPU", self._cuda),
            ("model", "over a tiny model: the same files twice, of the predicted size, and it runs", self._model),
        ]
        return [Check(*each) for each in listed]

    def refused(self) -> list[tuple[int, int]]:
        """The shapes that the method refuses."""
        return list(self.runs.refused()) if self._no_matrices() is None else []

    # -- declarations -----------------------------------------------------------------------------------------

    def _descriptor(self) -> None:
        check_descriptor(self.descriptor)

    def _options(self) -> None:
        check_options(self.descriptor, self.options)
        if self.fitted:
            for found in self._found_or_none():
                check_options(self.descriptor, found)

    @cached_property
    def chosen(self) -> list[Options]:
        return check_fit(self.descriptor)

    def _found_or_none(self) -> list[Options]:
        try:
            return self.chosen
        except AssertionError:
            return []

    def _fit(self) -> None:
        assert self.chosen

    def _fit_edges(self) -> None:
        if not self._found_or_none():
            raise NotApplicable("fit returns nothing to look at: see the check fit")
        check_fit_edges(self.descriptor, self.chosen)

    # -- matrices ---------------------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> Runs:
        from evenbits.testing.cases import Runs

        return Runs(self.descriptor, self.options)

    def _no_matrices(self) -> str | None:
        """Why single matrices say nothing of this method, or None."""
        compressor = self.descriptor.make(self.options)
        if isinstance(compressor, CheckpointCompressor):
            return "another program compresses: see the check model"
        if not isinstance(compressor, LayerCompressor):
            return "compresses a whole model: see the check model"
        if type(compressor).compress is LayerCompressor.compress:
            return "compresses a block: see the check model"
        if self._needs_gpu() and not cuda_devices():
            return "the method needs a CUDA device, and there is none here"
        return None

    def _needs_gpu(self) -> bool:
        return self.descriptor.needs_of(self.options).device == "cuda"

    def _apply(self) -> Runs:
        """Raises NotApplicable where there is no matrix to look at."""
        if reason := self._no_matrices():
            raise NotApplicable(reason)
        return self.runs

    def _each(self) -> Iterable[tuple[Case, Ran]]:
        from evenbits.testing.cases import SHAPES

        runs = self._apply()
        if runs.ran(SHAPES[0]).error is not None:
            raise NotApplicable("no matrix compresses: see the check compress")
        return [(runs.case(*size), runs.ran(size)) for size in runs.taken()]

    def _compress(self) -> None:
        from evenbits.testing.cases import SHAPES

        error = self._apply().ran(SHAPES[0]).error
        if error is not None:
            raise AssertionError(
                f"{self.descriptor.name}: a {SHAPES[0][0]}x{SHAPES[0][1]} matrix of small Gaussians does not compress "
                f"({told(error)}): any method must take this one"
            ) from error

    def _global_state(self) -> None:
        from evenbits.testing.cases import check_state_untouched

        for _, ran in self._each():
            check_state_untouched(self.descriptor.name, ran)

    def _weights(self) -> None:
        from evenbits.testing.cases import check_given_untouched

        for _, ran in self._each():
            check_given_untouched(self.descriptor.name, ran)

    def _shapes(self) -> None:
        from evenbits.testing.cases import SHAPES

        self._each()
        name = self.descriptor.name
        for size in SHAPES[1:]:
            error = self.runs.ran(size).error
            if isinstance(error, TrialFailed):
                assert str(error), f"{name}: TrialFailed without a reason: name the layer and what is wrong with it"
            elif error is not None:
                raise AssertionError(
                    f"{name}: a {size[0]}x{size[1]} matrix ends in {told(error)}: pad its last group, or refuse it by "
                    "TrialFailed with a reason"
                ) from error

    def _predict(self) -> None:
        from evenbits.testing.matrices import check_prediction

        for case, ran in self._each():
            check_prediction(self.descriptor, self.options, case, exact=self.exact, ran=ran)

    def _determinism(self) -> None:
        from evenbits.testing.matrices import check_determinism

        for case, ran in self._each():
            check_determinism(self.descriptor, self.options, case, ran=ran)

    def _seed(self) -> None:
        from evenbits.testing.matrices import check_seed

        if self.descriptor.stochastic:
            raise NotApplicable("declared stochastic: it may depend on the seed")
        for case, ran in self._each():
            check_seed(self.descriptor, self.options, case, ran=ran)

    def _restore(self) -> None:
        from evenbits.testing.matrices import check_restore

        for case, ran in self._each():
            check_restore(self.descriptor, self.options, case, ran=ran)

    def _tunable(self) -> None:
        from evenbits.testing.matrices import check_tunable

        for case, ran in self._each():
            check_tunable(self.descriptor, self.options, case, ran=ran)

    def _round_trip(self) -> None:
        from evenbits.testing.matrices import check_round_trip

        with tempfile.TemporaryDirectory() as folder:
            for case, ran in self._each():
                check_round_trip(self.descriptor, self.options, case, Path(folder), ran=ran)

    def _linear(self) -> None:
        from evenbits.testing.linears import check_linear

        for case, ran in self._each():
            check_linear(self.descriptor, self.options, case, ran=ran)

    def _held(self) -> None:
        from evenbits.testing.linears import check_held

        large, small = (dict(enumerate(self._each())).get(i) for i in (0, 1))
        assert large is not None
        if small is None:
            raise NotApplicable("takes one shape only: there is nothing to compare it with")
        check_held(self.descriptor, self.options, large[0], small[0], ran=(large[1], small[1]))

    def _extremes(self) -> None:
        from evenbits.testing.matrices import check_extremes

        self._each()
        check_extremes(self.descriptor, self.options)

    def _fitted(self) -> None:
        from evenbits.testing.cases import try_case
        from evenbits.testing.matrices import check_prediction, check_restore

        self._each()
        if not self._found_or_none():
            raise NotApplicable("fit returns nothing to look at: see the check fit")
        case = self.runs.case(*FITTED_SHAPE)
        found = self._found_or_none()  # not a set of them: options that hold a dict have no hash
        others = [one for number, one in enumerate(found) if one != self.options and one not in found[:number]]
        refused: list[str] = []
        for setting in others:
            ran = try_case(self.descriptor, setting, case)
            if isinstance(ran.error, TrialFailed):
                refused.append(str(ran.error))
                continue
            check_prediction(self.descriptor, setting, case, exact=self.exact, ran=ran)
            check_restore(self.descriptor, setting, case, ran=ran)
        if others and len(refused) == len(others):
            size = "x".join(map(str, FITTED_SHAPE))
            raise NotApplicable(f"a {size} matrix is refused at each setting that fit chooses: {refused[0]}")

    def _cuda(self) -> None:
        from evenbits.testing.cases import SHAPES
        from evenbits.testing.matrices import check_cuda

        runs = self._apply()
        without_gpu(self.device)
        check_cuda(self.descriptor, self.options, runs.case(*SHAPES[0]))

    # -- a model ----------------------------------------------------------------------------------------------

    def _model(self) -> None:
        from evenbits.testing.stored import check_model

        launch = self._launch()
        if self._needs_gpu():
            without_gpu(self.device)
        device = "cuda" if self._needs_gpu() else "cpu"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            check_model(self.descriptor, self.options, folder, exact=self.exact, device=device, launch=launch)

    def _launch(self) -> Launch | None:
        """Of the environment that the method names; NotApplicable where it is not made."""
        name = self.descriptor.needs_of(self.options).environment
        if name is None:
            return None
        if not self.package:
            raise NotApplicable(f"needs the environment {name!r}: check it by the method's name, as it is installed")
        from evenbits.environment_files import find_environment
        from evenbits.environments import find
        from evenbits.workers import WorkerLaunch

        try:
            environment = find_environment(self.package, name)
        except EvenbitsError as error:
            raise AssertionError(f"{self.descriptor.name}: {error}") from error
        if environment.device == "cuda":
            without_gpu(self.device)
        made = find(environment)
        if made is None:
            raise NotApplicable(f"its environment is not made here: `evenbits env create {name}` makes it")
        return WorkerLaunch(environment, made, 1)


def without_gpu(device: Devices) -> None:
    """Raises NotApplicable where no GPU is to be used."""
    if device == "cpu":
        raise NotApplicable('left out by device = "cpu"')
    if not cuda_devices():
        raise NotApplicable("no CUDA device here")


def told(error: BaseException) -> str:
    """The error in one line, with the last place of its traceback."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, EvenbitsError):
        return f"{type(error).__name__}: {text}"
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f", {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {text}{where}"
