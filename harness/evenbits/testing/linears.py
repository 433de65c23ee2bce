"""The packed path: a module that computes from what is stored must compute what the restored weight does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenbits.compressor import Compressor, Options, Refusal
from evenbits.kernels.launch import Choice
from evenbits.testing.cases import Case, Ran, run_case, untouched_randomness

# what a packed path may differ from a dense layer of the restored weight, of the outputs' energy: sums in another
# order, in half precision also weights rounded at another place and sums rounded tile by tile
LINEAR_ERROR = {torch.float32: 1e-8, torch.float16: 1e-6, torch.bfloat16: 4e-5}
ROWS = (1, 5, 33)  # decoding one sequence, several, and a prompt that is no multiple of a tile
HELD_PER_LINE = 32  # bytes that a packed layer may hold beyond what is stored, for each of its rows and columns
HELD_AT_ALL = 1024


def check_linear(
    descriptor: Compressor, options: Options, case: Case, device: str = "cpu", *, ran: Ran | None = None
) -> None:
    """A packed path computes what the restored weight does, or is refused with a reason.

    Any module: float32 inputs of no row, one, several, three dimensions and other strides, and their dtype back. One
    that says what it runs (`evenbits.kernels.launch.PackedModule`) also: half precision, a kernel with a reason for one
    row and for several, and bytes held that do not grow as a dense weight would (`check_held`).
    """
    outcome = run_case(descriptor, options, case, device=device) if ran is None else ran.outcome()
    compressor, packed, shared, restored = outcome
    given = case.inputs.to(device)
    with untouched_randomness(f"{descriptor.name}: linear"), torch.no_grad():
        module = compressor.linear(packed, case.shape, shared, torch.device(device))
        if isinstance(module, Refusal):
            assert module.reason, f"{descriptor.name}: `linear` is refused without a reason"
            return
        choose: Any = getattr(module, "choice", None)
        for dtype in (torch.float32,) if choose is None else LINEAR_ERROR:
            for rows in ROWS:
                _check_outputs(descriptor.name, module, given[:rows].to(dtype), restored)
        _check_outputs(descriptor.name, module, given[:6].reshape(2, 3, -1), restored)
        _check_outputs(descriptor.name, module, given[:5].T.contiguous().T, restored)
        nothing = tuple(module(given[:0]).shape)
        assert nothing == (0, case.shape.out_features), f"{descriptor.name}: `linear` of no rows gives {nothing}"
    if choose is not None:
        for rows in (1, ROWS[-1]):
            found = choose(rows)
            said = isinstance(found, Choice) and found.kernel and found.reason
            assert said, f"{descriptor.name}: choice({rows}) must be a Choice with a kernel and a reason, not {found!r}"


def _check_outputs(name: str, module: Any, inputs: Tensor, restored: Tensor) -> None:
    """Against a dense layer: weights rounded to the inputs' dtype, sums in float32.

    The energy is what outputs of such inputs have on average: a single one may be near zero by chance.
    """
    outputs, shape = module(inputs), (*inputs.shape[:-1], restored.shape[0])
    what = f"{name}: `linear` of {tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    found = (tuple(outputs.shape), outputs.dtype)
    assert found == (shape, inputs.dtype), f"{what} gives {found}, expected {(shape, inputs.dtype)}"
    expected = inputs.float() @ restored.to(inputs.dtype).float().T
    energy = inputs.float().square().sum() * restored.square().sum() / restored.shape[1]
    difference = float((outputs.float() - expected).square().sum() / energy)
    assert difference <= LINEAR_ERROR[inputs.dtype], (
        f"{what} differs from the restored weight by {difference:g} of its outputs' energy; both must decode the same"
    )


def check_held(
    descriptor: Compressor, options: Options, case: Case, smaller: Case, *, ran: tuple[Ran, Ran] | None = None
) -> None:
    """From a small layer to a larger one, `held_bytes` grows as what is stored does, and a little for every row and
    column: tables of a fixed size may be decoded, the weight may not. Modules that do not say are left alone."""
    grown = []
    for index, one in enumerate((case, smaller)):
        outcome = run_case(descriptor, options, one) if ran is None else ran[index].outcome()
        compressor, packed, shared, _ = outcome
        module = compressor.linear(packed, one.shape, shared, torch.device("cpu"))
        held = getattr(module, "held_bytes", None)
        if not isinstance(held, int):
            assert held is None, f"{descriptor.name}: held_bytes must be a whole number of bytes, not {held!r}"
            return
        assert not isinstance(module, Refusal)
        tensors = [*module.parameters(), *module.buffers()]
        there = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
        assert held >= there, f"{descriptor.name}: held_bytes says {held}, the module's tensors alone take {there}"
        allowed = packed.nbytes + HELD_PER_LINE * (one.shape.out_features + one.shape.in_features)
        grown.append((held, allowed + (0 if shared is None else shared.nbytes)))
    held, allowed = (large - small for large, small in zip(*grown, strict=True))
    assert held <= allowed + HELD_AT_ALL, (
        f"{descriptor.name}: between layers of {smaller.shape.weights} and {case.shape.weights} weights held_bytes "
        f"grows by {held}, what is stored with some bytes a row and column by {allowed}: no decoded weight may be kept"
    )
