"""Triton: an MLP unit of PocketLLM's networks in training, forward and backward, a kernel each. See ../unit.md."""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.launch import Case, Config, Kernel


@triton.jit
def normal_share(x):
    """Share of a standard normal below x."""
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def unit_forward(
    x,  # (count, INPUTS) float32
    flat,  # weights and biases in the order of Network.shapes
    y,  # (count, OUTPUTS) float32
    count,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS_PAD: tl.constexpr,
    HIDDEN_PAD: tl.constexpr,
    OUTPUTS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS  # 2^31 numbers are 2^27 rows of 16
    x += first * INPUTS
    y += first * OUTPUTS
    row = tl.arange(0, ROWS)
    i, h, o = tl.arange(0, INPUTS_PAD), tl.arange(0, HIDDEN_PAD), tl.arange(0, OUTPUTS_PAD)
    there, i_in, h_in, o_in = row < count - first, i < INPUTS, h < HIDDEN, o < OUTPUTS
    numbers = tl.load(x + row[:, None] * INPUTS + i[None, :], mask=there[:, None] & i_in[None, :], other=0.0)
    enter = tl.load(flat + h[None, :] * INPUTS + i[:, None], mask=i_in[:, None] & h_in[None, :], other=0.0)
    inner = tl.dot(numbers, enter, input_precision="ieee")
    inner += tl.load(flat + HIDDEN * INPUTS + h, mask=h_in, other=0.0)[None, :]
    after = flat + HIDDEN * INPUTS + HIDDEN
    leave = tl.load(after + o[None, :] * HIDDEN + h[:, None], mask=h_in[:, None] & o_in[None, :], other=0.0)
    found = tl.dot(inner * normal_share(inner), leave, input_precision="ieee")
    found += tl.load(after + OUTPUTS * HIDDEN + o, mask=o_in, other=0.0)[None, :]
    tl.store(y + row[:, None] * OUTPUTS + o[None, :], found, mask=there[:, None] & o_in[None, :])


@triton.jit
def unit_backward(
    x,
    flat,
    slope,  # (count, OUTPUTS) float32, the gradient of what came out
    back,  # (count, INPUTS) float32, the gradient of x
    parts,  # (programs, numbers of flat) float32: each program's share of the gradient of flat
    count,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS_PAD: tl.constexpr,
    HIDDEN_PAD: tl.constexpr,
    OUTPUTS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * ROWS
    x += first * INPUTS
    slope += first * OUTPUTS
    back += first * INPUTS
    row = tl.arange(0, ROWS)
    i, h, o = tl.arange(0, INPUTS_PAD), tl.arange(0, HIDDEN_PAD), tl.arange(0, OUTPUTS_PAD)
    there, i_in, h_in, o_in = row < count - first, i < INPUTS, h < HIDDEN, o < OUTPUTS
    numbers = tl.load(x + row[:, None] * INPUTS + i[None, :], mask=there[:, None] & i_in[None, :], other=0.0)
    out = tl.load(slope + row[:, None] * OUTPUTS + o[None, :], mask=there[:, None] & o_in[None, :], other=0.0)
    enter = tl.load(flat + h[:, None] * INPUTS + i[None, :], mask=h_in[:, None] & i_in[None, :], other=0.0)
    bias = tl.load(flat + HIDDEN * INPUTS + h, mask=h_in, other=0.0)
    after = HIDDEN * INPUTS + HIDDEN
    leave = tl.load(flat + after + o[:, None] * HIDDEN + h[None, :], mask=o_in[:, None] & h_in[None, :], other=0.0)

    inner = tl.dot(numbers, tl.trans(enter), input_precision="ieee") + bias[None, :]
    share = normal_share(inner)
    # of x Phi(x): Phi(x) + x phi(x). Rows that are not there have no slope, so they add nothing below
    steep = share + inner * tl.exp(-0.5 * inner * inner) * 0.3989422804014327
    inside = tl.dot(out, leave, input_precision="ieee") * steep
    found = tl.dot(inside, enter, input_precision="ieee")
    tl.store(back + row[:, None] * INPUTS + i[None, :], found, mask=there[:, None] & i_in[None, :])

    mine = parts + program.to(tl.int64) * (after + OUTPUTS * HIDDEN + OUTPUTS)
    of_enter = tl.dot(tl.trans(inside), numbers, input_precision="ieee")
    tl.store(mine + h[:, None] * INPUTS + i[None, :], of_enter, mask=h_in[:, None] & i_in[None, :])
    tl.store(mine + HIDDEN * INPUTS + h, tl.sum(inside, 0), mask=h_in)
    of_leave = tl.dot(tl.trans(out), inner * share, input_precision="ieee")
    tl.store(mine + after + o[:, None] * HIDDEN + h[None, :], of_leave, mask=o_in[:, None] & h_in[None, :])
    tl.store(mine + after + OUTPUTS * HIDDEN + o, tl.sum(out, 0), mask=o_in)


FORWARD_CONFIG = Config("64", {"ROWS": 64}, num_warps=4, num_stages=1)
BACKWARD_CONFIG = Config("64", {"ROWS": 64}, num_warps=4, num_stages=1)


def _case(inputs: int, hidden: int, outputs: int, tensors: tuple[str, ...]) -> Case:
    sizes = {"INPUTS": inputs, "HIDDEN": hidden, "OUTPUTS": outputs}
    pads = {f"{name}_PAD": max(16, 1 << (size - 1).bit_length()) for name, size in sizes.items()}
    types = dict.fromkeys(tensors, "*fp32") | {"count": "i32"}
    # flat is a part of a longer tensor, and starts anywhere
    aligned = tuple(name for name in tensors if name != "flat")
    return Case(f"{inputs}-{hidden}-{outputs}", types, {**sizes, **pads}, aligned=aligned)


_SIZES = ((8, 16, 8), (4, 16, 4), (3, 5, 7), (16, 32, 16))
FORWARD = Kernel(
    "pocket-unit-forward", unit_forward, (FORWARD_CONFIG,),
    tuple(_case(*size, ("x", "flat", "y")) for size in _SIZES),
)  # fmt: skip
BACKWARD = Kernel(
    "pocket-unit-backward", unit_backward, (BACKWARD_CONFIG,),
    tuple(_case(*size, ("x", "flat", "slope", "back", "parts")) for size in _SIZES),
)  # fmt: skip
KERNELS: tuple[Kernel, ...] = (FORWARD, BACKWARD)
