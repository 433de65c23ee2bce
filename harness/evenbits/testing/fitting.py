"""Whether `fit` is honest: what it returns lies in the budget by `predict`, what nothing fits is refused, and what is
pinned stays. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from evenbits.budget import BitBudget, default_window
from evenbits.compressor import Compressor, ModelShapes, Options, Refusal
from evenbits.shapes import llama_shapes

BUDGETS = (1.0, 2.0, 3.0, 4.0, 8.0)
BETWEEN = (4.2, 4.5, 4.6)  # what a method of one width stores with its scales; tried where nothing else fits


def check_fit(descriptor: Compressor, budgets: Sequence[float] = BUDGETS) -> list[Options]:
    """What `fit` returns lies in the budget by `predict`; what nothing fits is refused. Returns what it chose."""
    shapes = llama_shapes(512, 1376, 4, 256, 4096)
    chosen: list[Options] = []
    for on in ("linear", "model"):
        for centre in (*budgets, *BETWEEN):
            if chosen and centre not in budgets:
                break
            budget = BitBudget(centre, default_window(centre), on)
            found = descriptor.fit(budget, shapes, {})
            if isinstance(found, Refusal):
                assert found.reason, f"{descriptor.name}: fit refuses {budget} without a reason"
                continue
            assert isinstance(found, descriptor.options), f"{descriptor.name}: fit must return its options or Refusal"
            bits = budget.bits(descriptor.predict(found, shapes), shapes)
            assert bits in budget, f"{descriptor.name}: fit chose {bits:.4f} bits for {budget}: {found}"
            assert found == descriptor.fit(budget, shapes, {}), f"{descriptor.name}: fit must be deterministic"
            pinned = descriptor.fit(budget, shapes, found.model_dump(mode="json"))
            assert pinned == found, f"{descriptor.name}: fit must leave pinned options as they are, got {pinned}"
            chosen.append(found)
    assert chosen, (
        f"{descriptor.name}: fit finds nothing at {', '.join(map(str, (*budgets, *BETWEEN)))} bits on a small Llama"
    )
    for impossible in (BitBudget(0.01, 0.005), BitBudget(0.01, 0.005, "model")):
        refused = descriptor.fit(impossible, shapes, {})
        assert isinstance(refused, Refusal), f"{descriptor.name}: fit takes {impossible} with {refused}: refuse it"
        assert refused.reason, f"{descriptor.name}: fit refuses {impossible} without a reason: say what is nearest"
    return chosen


def check_fit_edges(descriptor: Compressor, chosen: Sequence[Options]) -> None:
    """At a window's very ends, in a window of no width, and with all options pinned under another budget.

    chosen: settings that `fit` returned; the first and the last are looked at, as its budgets ascend.
    """
    name, shapes = descriptor.name, llama_shapes(512, 1376, 4, 256, 4096)
    for found in dict.fromkeys((0, len(chosen) - 1)):
        options = chosen[found]
        bits = descriptor.predict(options, shapes).linear_bits(shapes)
        window = default_window(bits)
        given = options.model_dump(mode="json")
        ends = {"upper": BitBudget(bits - window, window), "lower": BitBudget(bits + window, window)}
        for end, budget in ends.items():
            _check_inside(descriptor, budget, shapes)
            at_end = descriptor.fit(budget, shapes, given)
            assert at_end == options, (
                f"{name}: fit refuses {budget} where the pinned options have {bits:.6f} bits, its very {end} end: "
                f"compare by `bits in budget`, got {at_end}"
            )
        exactly = descriptor.fit(BitBudget(bits, 0.0), shapes, given)
        assert exactly == options, f"{name}: fit must take pinned options of exactly the budget's bits, got {exactly}"
        elsewhere = BitBudget(bits / 2, bits / 8)
        refused = descriptor.fit(elsewhere, shapes, given)
        assert isinstance(refused, Refusal), (
            f"{name}: with all options pinned at {bits:.4f} bits fit takes {elsewhere} with {refused}: refuse it"
        )
        assert refused.reason, f"{name}: fit refuses {elsewhere} without a reason: say what the pinned options have"


def _check_inside(descriptor: Compressor, budget: BitBudget, shapes: ModelShapes) -> None:
    found = descriptor.fit(budget, shapes, {})
    if isinstance(found, Refusal):
        assert found.reason, f"{descriptor.name}: fit refuses {budget} without a reason"
        return
    bits = budget.bits(descriptor.predict(found, shapes), shapes)
    assert bits in budget, f"{descriptor.name}: fit chose {bits:.6f} bits for {budget}: {found}"
