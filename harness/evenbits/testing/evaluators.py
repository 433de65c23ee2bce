"""The contract of evaluators: the same numbers again, items that can be paired, and every option that matters told."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from pydantic import ValidationError

from evenbits.compressor import Options
from evenbits.errors import EvenbitsError
from evenbits.measure import Evaluator, Measurement, Sample, fingerprint_id
from evenbits.testing.contract import NotApplicable
from evenbits.testing.measurements import Listed, StageContract

SAME = 1e-3  # relative: sums in another order give less
NEW = (1, 2, 16)  # tried for numbers that have none


class EvaluatorContract(StageContract):
    run = "evaluate"

    def _own(self) -> Iterable[Listed]:
        return (
            ("determinism", "the same numbers again, whatever the global state", self._determinism),
            ("items", "one number an item, as many and in one order for all models", self._items),
            ("options-told", "an option that changes a number is in its fingerprint", self._options_told),
        )

    def _determinism(self) -> None:
        name = self.descriptor.name
        for which, seen in self.each():
            again = self.measure(which, outer=12345)
            assert again.error is None, f"{name}: a second run on the {which} model fails: {again.error}"
            other = {f.name: f for f in again.findings if isinstance(f, Measurement)}
            for metric in self.metrics(which).values():
                assert metric.name in other, f"{name}: {metric.name} is missing in a second run on one model"
                if metric.volatile:
                    continue
                twin = other[metric.name]
                assert metric.value == twin.value, (
                    f"{name}: {metric.name} is {metric.value!r}, then {twin.value!r} on one model: draw from a "
                    "generator seeded with `subject.seed`, and keep one order"
                )
                same = np.array_equal(_items(metric), _items(twin))
                assert same, f"{name}: the items of {metric.name} differ from run to run, or in their order"
                assert fingerprint_id(metric.fingerprint) == fingerprint_id(twin.fingerprint), (
                    f"{name}: the fingerprint of {metric.name} differs from run to run"
                )
            texts, twins = ([f.text for f in s.findings if isinstance(f, Sample)] for s in (seen, again))
            assert texts == twins, f"{name}: its samples differ from run to run: decode greedily, or by `subject.seed`"

    def _items(self) -> None:
        name = self.descriptor.name
        found = {which: self.metrics(which) for which, _ in self.each()}
        with_items = {m for metrics in found.values() for m, each in metrics.items() if each.items is not None}
        if not with_items:
            raise NotApplicable("its metrics have no items: trials cannot be paired by them")
        for metric in sorted(with_items):
            counts = {which: len(_items(metrics[metric])) for which, metrics in found.items() if metric in metrics}
            assert all(counts.values()), f"{name}: {metric} has items, but none: leave items=None"
            assert len(set(counts.values())) == 1, (
                f"{name}: {metric} has {counts} items: give one for every window or question, whatever the model says"
            )
            for which in counts:
                finite = np.isfinite(np.asarray(_items(found[which][metric]), dtype=np.float64))
                assert bool(finite.all()), f"{name}: {metric} has items that are not finite on the {which} model"

    def _options_told(self) -> None:
        """Each option in turn is given another value; where a metric moves, its fingerprint must, too."""
        if not self.metrics("dense"):
            raise NotApplicable("it measures no number")
        assert isinstance(self.descriptor, Evaluator)
        for field, other in _variations(self.options, self.descriptor.location):
            seen = self.measure("dense", other)
            if isinstance(seen.error, EvenbitsError):
                continue  # the value does not suit a tiny model
            if seen.error is not None:
                raise AssertionError(
                    f"{self.descriptor.name}: with {field} = {getattr(other, field)!r} it ends in "
                    f"{type(seen.error).__name__}: {seen.error}: raise TrialFailed with a reason"
                ) from seen.error
            for metric in (f for f in seen.findings if isinstance(f, Measurement)):
                before = self.metrics("dense").get(metric.name)
                if before is None or metric.volatile:
                    continue
                moved = not math.isclose(metric.value, before.value, rel_tol=SAME, abs_tol=1e-9)
                same = fingerprint_id(metric.fingerprint) == fingerprint_id(before.fingerprint)
                assert not (moved and same), (
                    f"{self.descriptor.name}: {field} = {getattr(other, field)!r} moves {metric.name} from "
                    f"{before.value:g} to {metric.value:g} under one fingerprint: put {field!r} into the fingerprint"
                )


def _items(metric: Measurement) -> Any:
    return np.empty(0) if metric.items is None else metric.items


def _variations(options: Options, location: tuple[str, ...]) -> Iterator[tuple[str, Options]]:
    """(field, the options with another value of it), one for each field that has another valid one."""
    model = type(options)
    given = options.model_dump(mode="json")
    for name, field in model.model_fields.items():
        if name in location:
            continue
        for value in _others(field.annotation, getattr(options, name)):
            try:
                other = model.model_validate({**given, name: value})
            except (ValidationError, EvenbitsError):
                continue
            if other != options:
                yield name, other
                break


def _others(annotation: Any, value: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _others(each, value)
    elif get_origin(annotation) is Literal:
        yield from (each for each in get_args(annotation) if each != value)
    elif annotation is bool:
        yield not value
    elif annotation in (int, float):
        if isinstance(value, int | float) and value:
            yield from (annotation(value / 2), annotation(value * 2), value + 1)
        else:
            yield from (annotation(each) for each in NEW if each != value)
