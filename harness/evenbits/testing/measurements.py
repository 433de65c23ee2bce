"""What evaluators and profilers have in common: findings that a record can hold, with unit and direction, and a
process, a model and a network that they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenbits.compressor import Options
from evenbits.errors import TrialFailed
from evenbits.measure import Evaluator, Measurement, Profiler, Remark, Sample
from evenbits.testing.compressors import told, without_gpu
from evenbits.testing.contract import Check, Devices, NotApplicable, scratch_folder
from evenbits.testing.settings import check_descriptor, check_options, settled

if TYPE_CHECKING:
    from evenbits.job import StageResult
    from evenbits.testing.subjects import Seen, Stand

WHICH = ("dense", "compressed")
Listed = tuple[str, str, Callable[[], None]]


class StageContract:
    """Of a stage that measures a stored model. `run` names its method."""

    run = ""

    def __init__(
        self,
        descriptor: Evaluator | Profiler,
        given: Mapping[str, Any] | None = None,
        model: Path | None = None,
        device: Devices = "auto",
    ) -> None:
        from evenbits.testing.names import CORPUS

        self.descriptor, self.model, self.device = descriptor, model, device
        self.options = settled(descriptor, given, CORPUS)
        self._seen: dict[str, Seen] = {}

    def checks(self) -> list[Check]:
        listed: list[Listed] = [
            ("descriptor", "name and summary are fit to be shown and stored", self._descriptor),
            ("options", "frozen, described, unknown keys refused, the same from JSON", self._options),
            ("dense", "measures the dense model", self._dense),
            ("compressed", "measures a compressed model, by the same metrics", self._compressed),
            ("findings", "what is found can stand in a record", self._findings),
            ("units", "every metric has a unit, a direction and an interval around its value", self._units),
            *self._own(),
            ("fingerprint", "the facts of the subject stand in every fingerprint, alike for all methods", self._facts),
            ("model", "the model and its files stay as they were", self._unchanged),
            ("global-state", "the process stays as it was", self._process),
            ("offline", "nothing is asked of the network", self._offline),
            ("cuda", "measures on a GPU", self._cuda),
        ]
        return [Check(*each) for each in listed]

    def _own(self) -> Iterable[Listed]:
        raise NotImplementedError

    # -- what it gave -----------------------------------------------------------------------------------------

    @cached_property
    def stand(self) -> Stand:
        from evenbits.testing.subjects import Stand

        return Stand(scratch_folder(self), self.model)

    def measure(self, which: str, options: Options | None = None, device: str = "cpu", outer: int = 0) -> Seen:
        """One run of a fresh stage on a fresh subject."""
        settings = self.options if options is None else options

        def stage(subject: Any) -> Any:
            return getattr(self.descriptor.make(settings), self.run)(subject)

        return self.stand.measure(which, stage, device, outer)

    def seen(self, which: str) -> Seen:
        if which not in self._seen:
            self._seen[which] = self.measure(which)
        return self._seen[which]

    def good(self, which: str) -> Seen:
        """Raises NotApplicable where there is nothing to look at."""
        seen = self.seen(which)
        if seen.error is not None:
            raise NotApplicable(f"does not measure the {which} model: see the check {which}")
        return seen

    def each(self) -> list[tuple[str, Seen]]:
        """Those of the two subjects that were measured; NotApplicable where none was."""
        found = [(which, self.seen(which)) for which in WHICH if self.seen(which).error is None]
        if not found:
            raise NotApplicable("it measures neither model: see the check dense")
        return found

    def metrics(self, which: str) -> dict[str, Measurement]:
        return {f.name: f for f in self.good(which).findings if isinstance(f, Measurement)}

    def recorded(self, which: str) -> StageResult:
        """As a record takes the findings. Raises TrialFailed where it cannot."""
        from evenbits.findings import take
        from evenbits.job import StageResult
        from evenbits.plan import Stage

        result = StageResult()
        for finding in self.good(which).findings:
            take(result, Stage(self.descriptor.name, {}, ""), finding)
        return result

    def required(self, metric: Measurement, facts: Mapping[str, Any]) -> Iterable[str]:
        """What of the subject's facts the fingerprint of a metric must have."""
        return facts

    # -- checks -----------------------------------------------------------------------------------------------

    def _descriptor(self) -> None:
        check_descriptor(self.descriptor)

    def _options(self) -> None:
        check_options(self.descriptor, self.options)

    def _measures(self, which: str) -> None:
        seen, name = self.seen(which), self.descriptor.name
        if isinstance(seen.error, SystemExit):
            raise seen.error
        if isinstance(seen.error, TrialFailed) and self.model is None:
            raise AssertionError(
                f"{name}: refuses a tiny {which} model ({seen.error}): where it needs another one, name its folder: "
                f"model=..., or evenbits check {name} --model FOLDER"
            ) from seen.error
        if seen.error is not None:
            raise AssertionError(
                f"{name}: fails on a tiny {which} model ({told(seen.error)}): a trial would have no number of it; "
                "raise TrialFailed with a reason for what it cannot measure"
            ) from seen.error
        assert seen.findings, f"{name}: finds nothing: give a Measurement, a Sample or a Remark that says why not"
        for found in seen.findings:
            assert isinstance(found, Measurement | Sample | Remark), (
                f"{name}: gives a {type(found).__name__}: return Measurement, Sample or Remark"
            )

    def _dense(self) -> None:
        self._measures("dense")

    def _compressed(self) -> None:
        self._measures("compressed")
        if self.seen("dense").error is not None:
            return
        names, dense = set(self.metrics("compressed")), set(self.metrics("dense"))
        self._same_names(names, dense)

    def _same_names(self, compressed: set[str], dense: set[str]) -> None:
        odd = ", ".join(sorted(compressed ^ dense))
        assert compressed == dense, (
            f"{self.descriptor.name}: measures {odd} on one of the dense and the compressed model only: "
            "a table compares the same metrics"
        )

    def _findings(self) -> None:
        for which, _ in self.each():
            try:
                self.recorded(which)
            except TrialFailed as error:
                raise AssertionError(f"{self.descriptor.name}: a record cannot hold what it found: {error}") from error

    def _units(self) -> None:
        name = self.descriptor.name
        if not any(self.metrics(which) for which, _ in self.each()):
            raise NotApplicable("it measures no number")
        for which, _ in self.each():
            for metric in self.metrics(which).values():
                assert isinstance(metric.unit, str), f"{name}: {metric.name}: the unit must be a string"
                assert metric.unit.strip(), f'{name}: {metric.name} has no unit: give one, such as "bytes" or "share"'
                assert metric.better in ("lower", "higher"), (
                    f'{name}: {metric.name}: better must be "lower" or "higher", not {metric.better!r}'
                )
                low = metric.value if metric.low is None else metric.low
                high = metric.value if metric.high is None else metric.high
                assert (metric.low is None) == (metric.high is None), (
                    f"{name}: {metric.name} has one end of an interval only: give low and high, or neither"
                )
                assert low <= metric.value <= high, (
                    f"{name}: {metric.name} is {metric.value:g}, outside its own interval {low:g} to {high:g}"
                )

    def _facts(self) -> None:
        name = self.descriptor.name
        if not any(self.metrics(which) for which, _ in self.each()):
            raise NotApplicable("it measures no number")
        for which, seen in self.each():
            for metric in self.metrics(which).values():
                lacking = [fact for fact in self.required(metric, seen.facts) if fact not in metric.fingerprint]
                assert not lacking, (
                    f"{name}: the fingerprint of {metric.name} lacks {', '.join(lacking)}: begin it with "
                    "**subject.facts, so that numbers of other devices and libraries do not share its column"
                )
                told_facts = {fact: metric.fingerprint.get(fact, value) for fact, value in seen.facts.items()}
                odd = [fact for fact, value in told_facts.items() if fact != "kernel" and value != seen.facts[fact]]
                assert not odd, f"{name}: the fingerprint of {metric.name} has another {odd[0]} than subject.facts"
        if len(self.each()) == 2:
            dense, compressed = self.metrics("dense"), self.metrics("compressed")
            for both in sorted(dense.keys() & compressed.keys()):
                one, other = dense[both].fingerprint, compressed[both].fingerprint
                odd = [key for key in {**one, **other} if one.get(key) != other.get(key)]
                assert not odd, (
                    f"{name}: the fingerprint of {both} has another {odd[0]} for a compressed model than for the "
                    "dense one, so that the two share no column: put what depends on the method into details"
                )

    def _unchanged(self) -> None:
        for which, seen in self.each():
            assert not seen.changed, (
                f"{self.descriptor.name}: on the {which} model it {', '.join(seen.changed)}: work on a copy, under "
                "torch.no_grad(); what comes after measures the same model"
            )

    def _process(self) -> None:
        for _, seen in self.each():
            assert not seen.process, (
                f"{self.descriptor.name}: changed {', '.join(seen.process)}: put back what it found, as by try/finally"
            )

    def _offline(self) -> None:
        reached = {host for which in WHICH for host in self.seen(which).reached}
        assert not reached, (
            f"{self.descriptor.name}: asked {', '.join(sorted(reached))} over the network: read local files, named by "
            "the option that the descriptor's `files` tells of"
        )

    def _cuda(self) -> None:
        without_gpu(self.device)
        seen = self.measure("compressed", device="cuda")
        if seen.error is not None:
            raise AssertionError(
                f"{self.descriptor.name}: fails on a GPU ({told(seen.error)}): move inputs to `subject.device`"
            ) from seen.error
        assert not seen.changed, f"{self.descriptor.name}: on a GPU it {', '.join(seen.changed)}"
