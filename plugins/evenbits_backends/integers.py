"""Settings of the libraries that round to even levels, and their choice under a budget. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from evenbits import integer
from evenbits.budget import BitBudget, choose, pinned
from evenbits.compressor import Estimate, LayerShape, ModelShapes, Options, Refusal, average_bits

SCALE_BITS = 16


class Rounds(Protocol):
    """Options of such a library: levels, columns to a scale (None: a whole row), whether zero points are stored."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...


OptionsT = TypeVar("OptionsT", bound=Options)
Objection = Callable[[Any, LayerShape], str | None]  # why a library does not take a layer under some options


def paper_bits(options: Rounds, shapes: ModelShapes) -> float:
    """b + 16 / g, as the papers count (arXiv:2210.17323, arXiv:2306.00978): zero points and indices left out."""
    return average_bits(
        (options.bits + SCALE_BITS / min(options.group_size or layer.in_features, layer.in_features), layer.weights)
        for layer in shapes.layers
    )


def fit_rounding(
    model: type[OptionsT],
    budget: BitBudget,
    shapes: ModelShapes,
    fixed: Mapping[str, Any],
    predict: Callable[[Any, ModelShapes], Estimate],
    choices: Mapping[str, Sequence[Any]],
    objection: Objection,
) -> OptionsT | Refusal:
    """The options of least expected distortion inside the budget, of those that the library takes on these shapes.

    choices: for "bits", "group_size" and "symmetric" what may be tried; what `fixed` names stays as it is.
    """
    base = pinned(model, fixed)
    widest = max(layer.in_features for layer in shapes.layers)
    sizes = [size for size in choices["group_size"] if size is None or size <= widest]
    candidates = list(_candidates(base, fixed, {**choices, "group_size": sizes}))
    refused = {options: why for options in candidates if (why := first_objection(options, shapes, objection))}
    taken = [options for options in candidates if options not in refused]
    if not taken:
        return Refusal(next(iter(refused.values())) if refused else "no setting is valid with what is pinned")
    found = choose(budget, shapes, taken, predict, quality=lambda options: -expected_distortion(options, shapes))
    if isinstance(found, Refusal) and refused:
        return Refusal(f"{found.reason} ({len(refused)} others refused; one: {next(iter(refused.values()))})")
    return found


def first_objection(options: Any, shapes: ModelShapes, objection: Objection) -> str | None:
    """Of the first layer that the library does not take under these options."""
    return next((why for layer in shapes.layers if (why := objection(options, layer))), None)


def _candidates(base: OptionsT, fixed: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> Iterator[OptionsT]:
    """Validated anew, as options may exclude each other; what is not valid is not tried."""
    given = base.model_dump()

    def tried(name: str) -> Sequence[Any]:
        return (given[name],) if name in fixed else choices[name]

    for bits in tried("bits"):
        for group in tried("group_size"):
            for symmetric in tried("symmetric"):
                update = {"bits": bits, "group_size": group, "symmetric": symmetric}
                try:
                    yield type(base).model_validate({**given, **update})
                except ValueError:
                    continue


def expected_distortion(options: Any, shapes: ModelShapes) -> float:
    """Of Gaussian weights (`evenbits.integer`), as plain rounding has it."""
    plain = integer.IntegerOptions(bits=options.bits, group_size=options.group_size, symmetric=options.symmetric)
    return integer.expected_distortion(plain, shapes)
