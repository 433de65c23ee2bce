"""Cutting, grouping and the networks of PocketLLM against formulas written out, and the sizes that are billed."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evenbits_pocketllm.layout import cut, join, order, restore_order
from evenbits_pocketllm.network import Network, decode, decode_statistics, decode_with, encode, initial

NORMS = ("row", "code", "layernorm", "none")
NORMALISED = [(norm, affine) for norm in NORMS for affine in (False, True) if norm != "none" or not affine]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# layout


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("d", [1, 3, 4, 16])
def test_cut_takes_neighbours_on_a_line_and_join_restores(axis: Literal["in", "out"], d: int) -> None:
    weight = torch.arange(10.0 * 14).reshape(10, 14).requires_grad_()
    vectors = cut(weight, axis, d)
    lines, length = (10, 14) if axis == "in" else (14, 10)
    assert vectors.shape == (lines, math.ceil(length / d), d)
    for line, chunk, place in ((0, 0, 0), (3, 0, d - 1), (7, vectors.shape[1] - 1, 0)):
        at = chunk * d + place
        if at < length:
            assert vectors[line, chunk, place] == (weight[line, at] if axis == "in" else weight[at, line])
    assert vectors.flatten(1)[:, length:].abs().sum() == 0
    again = join(vectors, axis, 10, 14)
    assert torch.equal(again, weight)
    (again * torch.arange(140.0).reshape(10, 14)).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(140.0).reshape(10, 14))


def test_groups_of_the_released_code_are_chunk_major() -> None:
    """Entry i of its array is chunk i // lines of line i % lines, and as many neighbours as there are chunks go
    together: with more lines than chunks a group is of many rows at one place, and some straddle two places."""
    lines, chunks, d = 5, 3, 2
    vectors = torch.randn(lines, chunks, d, generator=seeded())
    groups = order(vectors, "code")
    assert groups.shape == (lines, chunks, d)
    for i in range(lines * chunks):
        assert torch.equal(groups[i // chunks, i % chunks], vectors[i % lines, i // lines])


@pytest.mark.parametrize("norm", NORMS)
def test_order_is_undone(norm: Any) -> None:
    vectors = torch.randn(6, 4, 3, generator=seeded()).requires_grad_()
    groups = order(vectors, norm)
    assert groups.shape == ((24, 1, 3) if norm in ("layernorm", "none") else (6, 4, 3))
    restored = restore_order(groups, norm, 6, 4)
    assert torch.equal(restored, vectors)
    assert restored.requires_grad
    codes = torch.arange(24).reshape(6, 4)
    assert torch.equal(restore_order(order(codes, norm), norm, 6, 4), codes)
    if norm == "row":
        assert torch.equal(groups, vectors)


# sizes


@pytest.mark.parametrize(("d", "weights", "parameters"), [(8, 768, 840), (4, 384, 444)])
def test_sizes_of_the_paper(d: int, weights: int, parameters: int) -> None:
    """The paper bills 768 numbers for a decoder at d = 8: the weights of three units of 16, without their biases."""
    network = Network(inputs=d, outputs=d, hidden=16, units=3, norm="row", affine=False, width=4096)
    assert (network.mlp_weights, network.mlp_parameters, network.parameters) == (weights, parameters, parameters)
    assert network.norms == 3


@pytest.mark.parametrize("d", [4, 8])
def test_gains_and_biases_are_thirty_times_what_the_paper_bills(d: int) -> None:
    network = Network(inputs=d, outputs=d, hidden=16, units=3, norm="code", affine=True, width=4096)
    assert network.parameters - network.mlp_parameters == 24_576
    assert initial(network, seeded()).numel() == network.parameters


@pytest.mark.parametrize(("units", "norms"), [(1, 0), (2, 2), (3, 3), (5, 5)])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (6, 1), (2, 5)])
def test_parameters_are_those_of_the_parts(units: int, norms: int, inputs: int, outputs: int) -> None:
    network = Network(inputs, outputs, hidden=7, units=units, norm="row", affine=True, width=inputs * 3)
    flat = initial(network, seeded())
    parts = network.views(flat)
    assert network.norms == norms
    assert flat.dtype == torch.float32
    assert network.parameters == flat.numel() == sum(part.numel() for part in parts.values())
    weights = [part.numel() for name, part in parts.items() if name.endswith("weight")]
    assert network.mlp_weights == sum(weights)
    for kind in ("encoder", "decoder"):
        with pytest.raises(ValueError, match=f"{kind}: [0-9]+ parameters expected"):
            network.views(torch.zeros(network.parameters + 99), kind)


# formulas


def written_out_unit(numbers: Tensor, parts: dict[str, Tensor], unit: int) -> Tensor:
    hidden = numbers @ parts[f"unit{unit}.in.weight"].T + parts[f"unit{unit}.in.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ parts[f"unit{unit}.out.weight"].T + parts[f"unit{unit}.out.bias"]


def written_out_norm(numbers: Tensor, parts: dict[str, Tensor], network: Network, at: int) -> Tensor:
    """numbers: (groups, per_group, latent)."""
    if network.norm == "none":
        return numbers
    joined = numbers if network.norm == "layernorm" else numbers.reshape(numbers.shape[0], -1)
    mean = joined.mean(-1, keepdim=True)
    variance = (joined - mean).square().mean(-1, keepdim=True)
    joined = (joined - mean) / (variance + 1e-5).sqrt()
    if network.affine:
        joined = joined * parts["gain"][at] + parts["bias"][at]
    return joined.reshape(numbers.shape)


def networks(norm: Any, affine: bool, units: int = 3) -> tuple[Network, Tensor, Tensor, Tensor, Tensor]:
    """A network of latents of 5 for sub-vectors of 3, its encoder and decoder with gains drawn, and data for both."""
    width = 5 if norm == "layernorm" else 20
    network = Network(5, 3, hidden=6, units=units, norm=norm, affine=affine, width=width)
    flats = []
    for kind in ("encoder", "decoder"):
        flat = initial(network, seeded(3), kind).double()
        flats.append(flat + 0.2 * torch.randn(flat.shape, generator=seeded(4), dtype=torch.float64))
    draw = seeded(5)
    vectors = torch.randn(7, 4, 3, generator=draw, dtype=torch.float64)
    return network, flats[0], flats[1], vectors, torch.randn(7, 4, 5, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("norm", "affine"), NORMALISED)
def test_three_units_as_published(norm: Any, affine: bool) -> None:
    """x1 = M0(s), x2 = x1 + M1(N1(x1)), z = N3(x2 + M2(N2(x2))); decoding: y1 = c + M1(N1(c)),
    y2 = N3(y1 + M2(N2(y1))), s = M0(y2)."""
    network, encoder, decoder, vectors, codewords = networks(norm, affine)
    parts = network.views(encoder, "encoder")
    first = written_out_unit(vectors, parts, 0)
    second = first + written_out_unit(written_out_norm(first, parts, network, 0), parts, 1)
    third = second + written_out_unit(written_out_norm(second, parts, network, 1), parts, 2)
    latents = encode(vectors, encoder, network)
    assert latents.shape == (7, 4, 5)
    torch.testing.assert_close(latents, written_out_norm(third, parts, network, 2))

    parts = network.views(decoder)
    first = codewords + written_out_unit(written_out_norm(codewords, parts, network, 0), parts, 1)
    second = first + written_out_unit(written_out_norm(first, parts, network, 1), parts, 2)
    decoded = decode(codewords, decoder, network)
    assert decoded.shape == (7, 4, 3)
    torch.testing.assert_close(decoded, written_out_unit(written_out_norm(second, parts, network, 2), parts, 0))


def test_one_unit_is_the_plain_unit_without_normalisation() -> None:
    network, encoder, decoder, vectors, codewords = networks("row", affine=False, units=1)
    torch.testing.assert_close(
        encode(vectors, encoder, network), written_out_unit(vectors, network.views(encoder, "encoder"), 0)
    )
    torch.testing.assert_close(
        decode(codewords, decoder, network), written_out_unit(codewords, network.views(decoder), 0)
    )


@pytest.mark.parametrize("norm", ["row", "code", "layernorm"])
def test_latents_are_layer_normalised(norm: Any) -> None:
    """The encoder closes with torch's layer norm over a group, or over a single sub-vector; no other groups matter."""
    network, encoder, _, vectors, _ = networks(norm, affine=False)
    latents = encode(vectors, encoder, network)
    joined = latents.flatten(1) if norm != "layernorm" else latents.flatten(0, 1)
    torch.testing.assert_close(functional.layer_norm(joined, joined.shape[1:], eps=0), joined, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(joined.mean(1), torch.zeros(len(joined), dtype=torch.float64))
    torch.testing.assert_close(encode(vectors[2:4], encoder, network), latents[2:4])


def test_initial_is_that_of_torch_linears() -> None:
    """Uniform within 1 / sqrt(inputs) for weights and biases, as torch.nn.Linear starts; gains one and biases zero."""
    network = Network(64, 25, hidden=400, units=2, norm="row", affine=True, width=128)
    before = torch.random.get_rng_state()
    flat = initial(network, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(flat, initial(network, seeded()))
    assert not torch.equal(flat, initial(network, seeded(1)))
    parts = network.views(flat)
    assert torch.equal(parts.pop("gain"), torch.ones(2, 128))
    assert torch.equal(parts.pop("bias"), torch.zeros(2, 128))
    for name, part in parts.items():
        bound = 1 / 8 if ".in." in name else 1 / 20
        linear = torch.nn.Linear(64 if ".in." in name else 400, 8).weight.detach()
        assert float(linear.abs().max()) == pytest.approx(bound, rel=0.05)
        assert bound * (0.8 if name.endswith("bias") else 0.99) < float(part.abs().max()) <= bound, name
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.25 if name.endswith("bias") else 0.05)
    encoder = network.views(initial(network, seeded(), "encoder"), "encoder")
    assert encoder["unit0.in.weight"].shape == (400, 25)
    assert encoder["unit0.out.weight"].shape == (64, 400)


@pytest.mark.parametrize(("norm", "affine"), NORMALISED)
def test_gradients(norm: Any, affine: bool) -> None:
    network, encoder, decoder, vectors, codewords = networks(norm, affine)
    for function, flat, data in ((encode, encoder, vectors), (decode, decoder, codewords)):
        inputs = (data[:2].clone().requires_grad_(), flat.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda x, p, f=function: f(x, p, network), inputs)


# decoding as a function of codeword and group statistics


@pytest.mark.parametrize(("norm", "affine"), NORMALISED)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_decoding_is_a_function_of_codeword_and_statistics(norm: Any, affine: bool, units: int) -> None:
    network, _, decoder, _, codewords = networks(norm, affine, units)
    statistics = decode_statistics(codewords, decoder, network)
    grouped = norm in ("row", "code") and units > 1
    assert statistics.shape == (7, units if grouped else 0, 2)
    torch.testing.assert_close(
        decode_with(codewords, statistics, decoder, network), decode(codewords, decoder, network), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("norm", ["row", "code"])
def test_a_part_of_a_group_decodes_as_in_the_whole(norm: Any) -> None:
    """One codeword at two places of a row decodes alike there, and otherwise in another row."""
    network, _, decoder, _, codewords = networks(norm, affine=False)
    codewords[:, 3] = codewords[0, 1]
    codewords[0, 3] = codewords[0, 1]
    whole = decode(codewords, decoder, network)
    torch.testing.assert_close(whole[0, 3], whole[0, 1])
    assert (whole[1, 3] - whole[0, 3]).abs().max() > 1e-3
    statistics = decode_statistics(codewords, decoder, network)
    picked = torch.tensor([3, 0])
    torch.testing.assert_close(decode_with(codewords[:, picked], statistics, decoder, network), whole[:, picked])
    alone = decode(codewords[:, picked], decoder, network)
    assert (alone - whole[:, picked]).abs().max() > 1e-3
