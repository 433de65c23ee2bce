"""An MLP unit in training by two Triton kernels, where torch takes ten, each too small for the GPU to be busy.

The twin is `network._unit` under autograd. See unit.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from evenbits.kernels.launch import triton_refusal

WIDEST, WIDEST_HIDDEN = 16, 32  # what a program holds in registers without spilling; the paper's are 8 and 16


def unit_refusal(inputs: int, hidden: int, outputs: int, device: torch.device) -> str | None:
    """Why the kernels cannot compute units of this size on this device; None where they can."""
    if max(inputs, outputs) > WIDEST or hidden > WIDEST_HIDDEN:
        return f"units of {inputs}, {hidden} and {outputs} numbers are wider than {WIDEST}, {WIDEST_HIDDEN}, {WIDEST}"
    return triton_refusal(device)


def unit_numbers(inputs: int, hidden: int, outputs: int) -> int:
    return hidden * inputs + hidden + outputs * hidden + outputs


def fused_unit(numbers: Tensor, flat: Tensor, hidden: int, outputs: int) -> Tensor:
    """(..., inputs) float32 -> (..., outputs): Linear, GELU in its exact form, Linear.

    flat: weight (hidden, inputs), bias, weight (outputs, hidden), bias, end to end; gradients reach both, once.
    Deterministic: each program leaves its share of the parameters' gradient, and one sum adds these up.
    Raises ValueError for other dtypes or another number of parameters.
    """
    wanted = unit_numbers(numbers.shape[-1], hidden, outputs)
    if {numbers.dtype, flat.dtype} != {torch.float32} or flat.shape != (wanted,):
        raise ValueError(
            f"a fused unit takes float32 numbers and {wanted} float32 parameters, not {numbers.dtype} numbers and "
            f"{tuple(flat.shape)} {flat.dtype}"
        )
    found: Tensor = _Unit.apply(numbers, flat, hidden, outputs)  # type: ignore[no-untyped-call]
    return found


class _Unit(Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, flat: Tensor, hidden: int, outputs: int) -> Tensor:
        from evenbits_pocketllm.gpu.unit import FORWARD_CONFIG, unit_forward

        numbers, flat = numbers.contiguous(), flat.contiguous()
        ctx.save_for_backward(numbers, flat)
        ctx.sizes = (numbers.shape[-1], hidden, outputs)
        found = numbers.new_empty(*numbers.shape[:-1], outputs)
        count, rows = numbers.numel() // numbers.shape[-1], FORWARD_CONFIG.tiles["ROWS"]
        with torch.cuda.device_of(numbers):  # type: ignore[no-untyped-call]  # in backward autograd sees to it
            unit_forward[(-(-count // rows),)](
                numbers, flat, found, count, **_constants(*ctx.sizes), ROWS=rows,
                num_warps=FORWARD_CONFIG.num_warps, num_stages=FORWARD_CONFIG.num_stages,
            )  # fmt: skip
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        from evenbits_pocketllm.gpu.unit import BACKWARD_CONFIG, unit_backward

        numbers, flat = ctx.saved_tensors
        slope, back = gradients[0].contiguous(), torch.empty_like(numbers)
        count, rows = numbers.numel() // numbers.shape[-1], BACKWARD_CONFIG.tiles["ROWS"]
        programs = -(-count // rows)
        parts = numbers.new_empty(programs, flat.numel())
        unit_backward[(programs,)](
            numbers, flat, slope, back, parts, count, **_constants(*ctx.sizes), ROWS=rows,
            num_warps=BACKWARD_CONFIG.num_warps, num_stages=BACKWARD_CONFIG.num_stages,
        )  # fmt: skip
        return back, parts.sum(0), None, None


def _constants(inputs: int, hidden: int, outputs: int) -> dict[str, int]:
    sizes = {"INPUTS": inputs, "HIDDEN": hidden, "OUTPUTS": outputs}
    # a product on the GPU wants 16 numbers each way
    return sizes | {f"{name}_PAD": max(16, 1 << (size - 1).bit_length()) for name, size in sizes.items()}
