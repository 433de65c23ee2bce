"""The contract of profilers: the same metrics each time, and what varies said to vary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evenbits.measure import Measurement
from evenbits.testing.measurements import Listed, StageContract


class ProfilerContract(StageContract):
    run = "profile"

    def _own(self) -> Iterable[Listed]:
        return (("repeats", "the same metrics again; what differs is declared volatile", self._repeats),)

    def _same_names(self, compressed: set[str], dense: set[str]) -> None:
        """What compressing took is known of a compressed model alone."""
        lacking = ", ".join(sorted(dense - compressed))
        assert not lacking, f"{self.descriptor.name}: measures {lacking} on the dense model only"

    def required(self, metric: Measurement, facts: Mapping[str, Any]) -> Iterable[str]:
        """Bytes on disk are the same on every device; what varies from run to run varies with all of them."""
        return facts if metric.volatile else ("model",)

    def _repeats(self) -> None:
        name = self.descriptor.name
        which = self.each()[-1][0]
        again = self.measure(which, outer=12345)
        assert again.error is None, f"{name}: a second run on the {which} model fails: {again.error}"
        first = self.metrics(which)
        second = {f.name: f for f in again.findings if isinstance(f, Measurement)}
        odd = ", ".join(sorted(first.keys() ^ second.keys()))
        assert not odd, f"{name}: {odd} is measured in one of two runs only: give a Remark that says why it cannot be"
        for metric, one in first.items():
            other = second[metric]
            assert one.volatile == other.volatile, f"{name}: {metric} is volatile in one of two runs only"
            assert one.volatile or one.value == other.value, (
                f"{name}: {metric} is {one.value:g}, then {other.value:g}: declare it volatile=True"
            )
            assert (one.unit, one.better) == (other.unit, other.better), (
                f"{name}: {metric} changes its unit or direction"
            )
