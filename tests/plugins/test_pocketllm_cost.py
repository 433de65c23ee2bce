"""PocketLLM's bytes against the paper's arithmetic, against a count by hand, and settings that fit a budget."""

from __future__ import annotations

import json
import random
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evenbits.budget import BitBudget, default_window
from evenbits.compressor import Compressor, LayerShape, ModelShapes, Refusal, Role
from evenbits.errors import SuiteError
from evenbits.shapes import LLAMA2_7B, QWEN3_14B, WIDTHS, llama_shapes, read_inventory
from evenbits.testing import check_fit
from evenbits_pocketllm.cost import (
    affine_numbers,
    codebook_group,
    codebook_groups,
    decoder_group,
    decoder_groups,
    decoder_numbers,
    geometry,
    mlp_numbers,
    norm_width,
    predict,
    take_census,
)
from evenbits_pocketllm.decoding import decoder_network
from evenbits_pocketllm.fitting import expected_distortion, fit
from evenbits_pocketllm.options import PocketOptions

RECIPES = ("evenbits", "paper", "code")
SCOPES = ("matrix", "kind", "model")
STORIES = llama_shapes(64, 172, 5, 32, 512, tied=True, dtype="float32")
BABY = llama_shapes(128, 352, 5, 64, 105, tied=True, dtype="float32")
REFERENCE = llama_shapes(192, 512, 6, 64, 2048, dtype="bfloat16")
SKIPPED = ({"blocks": [0, 1, 2, 30, 31], "skip": True},)
MIXED = (
    {"blocks": [0, 4], "skip": True},
    {"kinds": ["mlp.*"], "blocks": [1], "d": 3, "codebook_size": 32},
    {"kinds": ["self_attn.q_proj"], "codebook_size": 32, "d": 3},
)


def options_of(recipe: str = "evenbits", **given: Any) -> PocketOptions:
    return PocketOptions.model_validate({"recipe": recipe, **given})


def matrix(out_features: int, in_features: int, kind: str = "mlp.up_proj", block: int = 0) -> LayerShape:
    return LayerShape(f"model.layers.{block}.{kind}", block, kind, out_features, in_features)


def model(*layers: LayerShape) -> ModelShapes:
    return ModelShapes(layers, sum(layer.weights for layer in layers), 0)


def bits(options: PocketOptions, shapes: ModelShapes) -> float:
    return predict(options, shapes).linear_bits(shapes)


# -- bytes ---------------------------------------------------------------------------------------------------


def test_geometry_pads_the_last_chunk_of_a_line() -> None:
    layer = matrix(10, 7)
    along = geometry(options_of(axis="in", feedback=False, d=4), layer)
    across = geometry(options_of(axis="out", d=4), layer)
    assert (along.lines, along.length, along.chunks, along.vectors) == (10, 7, 2, 20)
    assert (across.lines, across.length, across.chunks, across.vectors) == (7, 10, 3, 21)


def test_bytes_by_hand_of_our_recipe() -> None:
    """10 x 7, columns in 5 chunks of 2: 35 indices of 3 bits; 10 scales of 6 bits on a grid of two float16; a decoder
    of 6 inputs, two residual units 6-16-6 and one 6-16-2, with 8 learned latents of 2 numbers, in float16."""
    options = options_of(d=2, codebook_size=8, scale_bits=6)
    decoder = 2 * (6 * 16 + 16 + 16 * 6 + 6) + (6 * 16 + 16 + 16 * 2 + 2) + 8 * 2
    found = predict(options, model(matrix(10, 7)))
    assert found.role_bytes == {Role.CODE: 14, Role.SCALE: 8 + 4, Role.DECODER: 2 * decoder}
    assert found.index_bits == 8 * 14 / 70
    uncounted = 2 * (16 + 6) + (16 + 2)
    assert found.paper_bits == pytest.approx(3 / 2 + (10 * 6 + 16 * (decoder - uncounted)) / 70)


def test_bytes_by_hand_of_a_stored_window() -> None:
    """An int8 codebook of 2^5 codewords of 3 numbers with its float16 scale, and float16 row scales."""
    options = options_of(codebook="learned", latent=3, state_bits=5, codebook_bits=8, decoder="mlp", symbols=0)
    found = predict(options, model(matrix(10, 7), matrix(10, 7, block=1)))
    decoder = 2 * (3 * 16 + 16 + 16 * 3 + 3) + (3 * 16 + 16 + 16 * 1 + 1)
    assert found.role_bytes == {
        Role.CODE: 2 * 18, Role.SCALE: 2 * 20 + 2, Role.CODEBOOK: 32 * 3, Role.DECODER: 2 * decoder
    }  # fmt: skip


def by_hand(options: PocketOptions, shapes: ModelShapes) -> dict[Role, int]:
    """Layer by layer and group by group, without the census that `predict` counts with."""
    roles = dict.fromkeys((Role.CODE, Role.SCALE, Role.CODEBOOK, Role.DECODER, Role.DENSE), 0)
    for layer in shapes.layers:
        settings = options.of(layer)
        if settings is None:
            roles[Role.DENSE] += layer.weights * WIDTHS[layer.dtype]
            continue
        lines, length = layer.out_features, layer.in_features
        if options.axis == "out":
            lines, length = length, lines
        index = lines * len(range(0, length, settings.d)) * (settings.codebook_size.bit_length() - 1)
        roles[Role.CODE] += -(-index // 8)
        if options.row_scales:
            extra = 4 if options.scale_bits < 16 else 0
            roles[Role.SCALE] += -(-layer.out_features * options.scale_bits // 8) + extra
    for group in codebook_groups(options, shapes) if options.codebook == "learned" else ():
        numbers = 2 ** (options.state_bits or group.settings.index_bits) * (options.latent or group.settings.d)
        roles[Role.CODEBOOK] += numbers * options.codebook_bits // 8
        roles[Role.SCALE] += 2 if options.codebook_bits == 8 else 0
    for group in decoder_groups(options, shapes):
        network = decoder_network(group.settings, norm_width(group.settings, group.layers[0]))
        symbols = group.settings.codebook_size * options.symbol_latent if options.symbols else 0
        roles[Role.DECODER] += (network.parameters + symbols) * options.decoder_bits // 8
    return {role: count for role, count in roles.items() if count}


@pytest.mark.parametrize("parts", [(), SKIPPED[:1], MIXED], ids=["plain", "skipped", "mixed"])
@pytest.mark.parametrize(
    ("recipe", "scopes"),
    [
        *((recipe, (scope, scope)) for recipe in ("evenbits", "paper", "learned") for scope in SCOPES),
        ("evenbits", ("model", "kind")),
        ("evenbits", ("model", "matrix")),
        ("paper", ("kind", "matrix")),
        ("paper", ("model", "matrix")),
    ],
)
def test_predict_is_the_count_by_group(recipe: str, scopes: tuple[str, str], parts: Any) -> None:
    shapes = llama_shapes(64, 172, 7, 32, 512, dtype="bfloat16")
    given: dict[str, Any] = {"scope": scopes[0], "decoder_scope": scopes[1], "parts": parts, "codebook_size": 16}
    if recipe == "learned":
        given |= {"codebook": "learned", "codebook_bits": 8, "scale_bits": 5}
    options = options_of("evenbits" if recipe == "learned" else recipe, **given)
    assert predict(options, shapes).role_bytes == by_hand(options, shapes)


@pytest.mark.parametrize("rln", ["row", "code", "layernorm"])
@pytest.mark.parametrize("latent", [None, 5])
@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_decoder_numbers_are_those_of_the_network(rln: str, latent: int | None, units: int) -> None:
    options = options_of("code", rln=rln, latent=latent, units=units, axis="out", codebook_size=16)
    layer = matrix(10, 7)
    network = decoder_network(options, norm_width(options, layer))
    assert mlp_numbers(options) == (network.mlp_weights, network.mlp_parameters - network.mlp_weights)
    assert decoder_numbers(options, [layer]) == network.parameters
    assert (affine_numbers(options, [layer]) == 0) == (units == 1)


def test_groups_cover_the_layers_and_name_what_differs() -> None:
    shapes = llama_shapes(64, 172, 6, 32, 512)
    options = options_of(parts=MIXED, scope="kind")
    books = {group.name: group for group in codebook_groups(options, shapes)}
    assert set(books) == {
        *(f"self_attn.{x}_proj" for x in "kvo"), "self_attn.q_proj.d3k32",
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")), *(f"mlp.{x}_proj.d3k32" for x in ("gate", "up", "down")),
    }  # fmt: skip
    assert {group.name for group in decoder_groups(options, shapes)} == {"model", "model.d3k32"}
    left = [layer for layer in shapes.layers if layer.block not in (0, 4)]
    for group in books.values():
        assert all(codebook_group(options, layer) == group.name for layer in group.layers)
        assert len({(s.d, s.codebook_size) for layer in group.layers if (s := options.of(layer))}) == 1
    assert sorted(x.name for g in books.values() for x in g.layers) == sorted(x.name for x in left)
    with pytest.raises(ValueError, match="left dense"):
        decoder_group(options, shapes.layers[0])
    assert decoder_groups(options_of(decoder="none", latent=1, symbols=0), shapes) == ()


def test_layers_left_dense_are_billed_as_stored() -> None:
    """16 bits of a bfloat16 checkpoint, 32 of a float32 one; the paper's average does not see them."""
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        shapes = llama_shapes(64, 172, 5, 32, 512, dtype=dtype)
        found = predict(options_of(parts=({"blocks": [4], "skip": True},)), shapes)
        assert found.role_bytes[Role.DENSE] == shapes.weights // 5 * width
    none = predict(options_of(parts=({"skip": True},)), STORIES)
    assert (none.index_bits, none.paper_bits, none.role_bytes) == (0, 0, {Role.DENSE: 4 * 226_560})


def test_affine_decoders_are_shared_only_between_equal_widths() -> None:
    for scope, count in (("matrix", 224), ("kind", 7)):
        found = predict(options_of("code", scope=scope, decoder_scope=scope), LLAMA2_7B)
        wider = (66_048 - 24_576) * count // 7
        assert found.role_bytes[Role.DECODER] == 4 * (count * (444 + 24_576) + wider)
    with pytest.raises(SuiteError, match=r"q_proj normalises 4096 .*down_proj 11008, so they cannot share"):
        predict(options_of("code", scope="model", decoder_scope="model"), LLAMA2_7B)
    one_size = options_of("code", scope="model", decoder_scope="model", rln="layernorm")
    assert predict(one_size, LLAMA2_7B).role_bytes[Role.DECODER] == 4 * (444 + 3 * 2 * 4)


# -- the paper's arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "width", "square", "wide", "block", "ratio"),
    [
        (8, 15, 2.1265, 1.9686, 2.0209, 15.8),
        (4, 15, 3.8765, 3.7971, 3.8234, 8.37),
        (4, 16, 4.2515, 4.0936, 4.1459, 7.72),
        (4, 12, 3.0171, 3.0064, 3.0099, 10.6),
        (8, 16, 2.5015, 2.1866, 2.2910, 14.0),
        (8, 12, 1.5327, 1.5122, 1.5190, 21.1),
    ],
)
def test_average_bits_of_llama2_7b(d: int, width: int, square: float, wide: float, block: float, ratio: float) -> None:
    """The table counts 768 MLP weights whatever d; at d = 4 the decoder has 384, and we count those."""
    options = options_of("paper", d=d, codebook_size=1 << width)
    other = 32 * (768 - mlp_numbers(options)[0])
    for size, printed in (((4096, 4096), square), ((11008, 4096), wide), ((4096, 11008), wide)):
        shapes = model(matrix(*size))
        assert predict(options, shapes).paper_bits + other / shapes.weights == pytest.approx(printed, abs=5.1e-5)
    found = predict(options, LLAMA2_7B)
    more = other * len(LLAMA2_7B.layers) / LLAMA2_7B.weights
    assert found.paper_bits + more == pytest.approx(block, abs=5.1e-5)
    assert 32 / found.paper_bits == pytest.approx(ratio, rel=5e-3)
    assert found.index_bits == width / d
    biases = 32 * mlp_numbers(options)[1] * len(LLAMA2_7B.layers) / LLAMA2_7B.weights
    assert found.linear_bits(LLAMA2_7B) == pytest.approx(found.paper_bits + biases, rel=1e-9)


def test_two_bits_of_the_paper_and_on_disk() -> None:
    """2.0209 with the 768 numbers that the paper counts; with the 840 that are stored, 2.0210 bits."""
    options = options_of("paper")
    assert mlp_numbers(options) == (768, 72)
    assert decoder_numbers(options, LLAMA2_7B.layers[:1]) == 840
    assert predict(options, LLAMA2_7B).paper_bits == pytest.approx(2.020928, abs=1e-6)
    assert bits(options, LLAMA2_7B) == pytest.approx(2.021007, abs=1e-6)
    assert sum(mlp_numbers(options_of("paper", d=4))) == 444


def test_the_papers_worked_example() -> None:
    """`up` of Llama-2-7B: 16.26x against fp32. The 16.4x in print comes of 5.6M indices, rounded: 16.36x."""
    found = predict(options_of("paper"), model(matrix(11008, 4096)))
    assert 32 / found.paper_bits == pytest.approx(16.26, abs=0.005)
    assert 8 * found.role_bytes[Role.CODEBOOK] == 16 * 2**15 * 8
    assert pytest.approx(16.36, abs=0.005) == 32 * 45.1e6 / (16 * 2**15 * 8 + 15 * 5.6e6 + 32 * 768)


def test_what_gains_and_biases_cost() -> None:
    """The released code trains 24,576 a matrix (66,048 for `down`): 0.0338 bit a weight in fp32, 0.0169 in fp16."""
    block = [layer for layer in LLAMA2_7B.layers if layer.block == 0]
    for precision, cost in ((32, 0.0338), (16, 0.0169)):
        options = options_of("code", decoder_bits=precision)
        assert {affine_numbers(options, [layer]) for layer in block} == {24_576, 66_048}
        plain = options.model_copy(update={"affine": False})
        assert bits(options, LLAMA2_7B) - bits(plain, LLAMA2_7B) == pytest.approx(cost, abs=5e-5)
        assert predict(options, LLAMA2_7B).paper_bits == predict(plain, LLAMA2_7B).paper_bits


@pytest.mark.parametrize(("d", "linear", "whole"), [(8, 4.21, 4.66), (4, 5.73, 6.13)])
def test_only_blocks_3_to_29(d: int, linear: float, whole: float) -> None:
    """Five of 32 blocks at 16 bits: what "2.02 bits" then costs."""
    options = options_of("paper", d=d, codebook_size=1 << 15, parts=SKIPPED)
    found = predict(options, LLAMA2_7B)
    assert found.linear_bits(LLAMA2_7B) == pytest.approx(linear, abs=0.005)
    assert found.model_bits(LLAMA2_7B) == pytest.approx(whole, abs=0.005)
    everywhere = options.model_copy(update={"parts": ()})
    assert found.paper_bits == predict(everywhere, LLAMA2_7B).paper_bits
    assert found.linear_bits(LLAMA2_7B) == pytest.approx((27 * bits(everywhere, LLAMA2_7B) + 5 * 16) / 32)


@pytest.mark.parametrize(("d", "paper"), [(8, 1.964410), (4, 3.794705)])
def test_qwen3_14b(d: int, paper: float) -> None:
    """Hidden 5120, keys and values 1024 wide, 17408 inside: by the formula, matrix by matrix."""
    total = sum(
        16 * 2**15 * d + 15 * n / d + 32 * 3 * 32 * d
        for n in (5120 * 5120, 1024 * 5120, 1024 * 5120, 5120 * 5120, *(3 * (17408 * 5120,)))
    )
    weights = 2 * 5120 * 5120 + 2 * 1024 * 5120 + 3 * 17408 * 5120
    found = predict(options_of("paper", d=d, codebook_size=1 << 15), QWEN3_14B)
    assert found.paper_bits == pytest.approx(total / weights, rel=1e-9)
    assert found.paper_bits == pytest.approx(paper, abs=1e-6)


def test_the_committed_figures_are_these(root: Path) -> None:
    page = runpy.run_path(str(root / "tests" / "pocketllm_bits.py"))["page"]()
    written = (root / "results" / "pocketllm_bits.md").read_text()
    assert written == page + "\n", "python tests/pocketllm_bits.py > results/pocketllm_bits.md"


# -- fit -----------------------------------------------------------------------------------------------------

CASES = [
    *((STORIES, BitBudget(centre, 0.1)) for centre in (2.25, 3.25, 4.25)),
    *((shapes, BitBudget(centre, 0.05)) for shapes in (BABY, REFERENCE) for centre in (2.05, 3.05, 4.05)),
    *(
        (shapes, BitBudget(centre, default_window(centre)))
        for shapes in (LLAMA2_7B, QWEN3_14B)
        for centre in (2.0, 3.0, 4.0)
    ),
    (REFERENCE, BitBudget(5.6, 0.1, "model")),
]


@pytest.mark.parametrize(("shapes", "budget"), CASES, ids=lambda case: str(getattr(case, "weights", case)))
@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_stays_inside_the_budget(recipe: str, shapes: ModelShapes, budget: BitBudget) -> None:
    chosen = fit(budget, shapes, {"recipe": recipe})
    if recipe == "code" and shapes is STORIES:  # gains and biases alone are nearly 4 bits a weight
        assert isinstance(chosen, Refusal)
        assert "nearest" in chosen.reason
        return
    assert isinstance(chosen, PocketOptions), chosen
    assert budget.bits(predict(chosen, shapes), shapes) in budget
    assert chosen.recipe == recipe
    assert PocketOptions.model_validate(json.loads(chosen.model_dump_json())) == chosen
    vectors = [group.vectors for group in codebook_groups(chosen, shapes)]
    assert chosen.codebook == "computed" or min(vectors) >= chosen.codebook_size
    if recipe == "evenbits":
        assert chosen.window_bits == 12
        if budget.on == "linear":
            assert chosen.index_bits / chosen.d >= int(budget.centre)  # none wastes a bit on what surrounds the indices
    else:
        assert chosen.scope == chosen.decoder_scope
        assert (chosen.state_bits, chosen.codebook_bits, chosen.rln) == (
            None,
            16,
            "row" if recipe == "paper" else "code",
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_keeps_the_contract_of_fit(recipe: str) -> None:
    def chosen(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> PocketOptions | Refusal:
        return fit(budget, shapes, {"recipe": recipe, **fixed})

    def make(options: PocketOptions) -> Any:
        raise AssertionError("a fit makes no compressor")

    check_fit(Compressor(recipe, "settings only", "", PocketOptions, make, predict, chosen))


@pytest.mark.parametrize(("name", "weights"), [("stories260K", 226_560), ("babyllama105", 921_600)])
def test_fit_on_checkpoints(data: Path, name: str, weights: int) -> None:
    shapes = read_inventory(data / "models" / name).shapes("float32")
    assert shapes.weights == weights
    assert shapes.layers == (STORIES if name == "stories260K" else BABY).layers
    budget = BitBudget(2.25, 0.1)
    assert fit(budget, shapes, {}) == fit(budget, STORIES if name == "stories260K" else BABY, {})


@pytest.mark.parametrize(
    "fixed",
    [
        {"d": 2, "hidden": 24},
        {"state_bits": 8, "scale_bits": 16},
        {"state_bits": None, "decoder_scope": "model"},
        {"codebook": "learned", "scope": "model", "codebook_bits": 8},
        {"recipe": "paper", "codebook_size": 1 << 12},
        {"recipe": "paper", "scope": "kind", "decoder_scope": "matrix", "decoder_bits": 16},
        {"recipe": "code", "d": 4, "scope": "kind", "decoder_scope": "kind", "decoder_bits": 16},
        {"recipe": "paper", "decoder": "none", "rln": "none", "training": "alternating", "search": "weights"},
        {"recipe": "paper", "rln": "none", "state_bits": 10, "codebook_size": 1 << 10},
        {"parts": ({"blocks": [0], "d": 1, "codebook_size": 16},)},
    ],
    ids=str,
)
def test_fit_keeps_what_is_fixed(fixed: dict[str, Any]) -> None:
    budget = BitBudget(2.3, 0.2)
    chosen = fit(budget, BABY, fixed)
    assert isinstance(chosen, PocketOptions), chosen
    plain = chosen.model_dump()
    wanted = PocketOptions.model_validate(fixed).model_dump()
    assert {key: plain[key] for key in fixed} == {key: wanted[key] for key in fixed}
    assert budget.bits(predict(chosen, BABY), BABY) in budget
    assert PocketOptions.model_validate(plain) == chosen


def test_fit_refuses_with_a_reason() -> None:
    budget = BitBudget(2.3, 0.1)
    refused = fit(budget, STORIES, {"d": 1, "codebook_size": 16})
    assert isinstance(refused, Refusal)
    assert "nearest: 4." in refused.reason
    assert len(refused.reason) < 300
    starved = fit(budget, STORIES, {"recipe": "paper", "scope": "matrix", "codebook_size": 1 << 15})
    assert isinstance(starved, Refusal)
    assert "more codewords than a codebook has sub-vectors" in starved.reason
    dense = fit(budget, STORIES, {"parts": ({"skip": True},)})
    assert isinstance(dense, Refusal)
    assert "left dense" in dense.reason
    half = fit(BitBudget(2.0, 0.05), LLAMA2_7B, {"parts": SKIPPED})
    assert isinstance(half, Refusal)  # five blocks at 16 bits alone are 2.5 bits a weight


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"codebook_size": 100}, "a power of two is needed, not 100"),
        ({"no_such": 1}, "option no_such: "),
        ({"recipe": "ours"}, "option recipe: "),
        ({"d": "four"}, "option d: "),
        ({"recipe": "paper", "codebook": "computed"}, "rln"),
        ({"recipe": "code", "scope": "model", "decoder_scope": "model"}, "cannot share a decoder"),
        ({"parts": ({"layers": [1]},)}, r"option parts\.0\.layers: "),
    ],
)
def test_wrong_options_are_named(fixed: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message) as caught:
        fit(BitBudget(2.0, 0.05), LLAMA2_7B, fixed)
    assert "\n" not in str(caught.value)


def test_expected_distortion_ranks_as_measured() -> None:
    """At 2 bits an index, best first: window 16, 12, 12 over pairs, 10, 8; then plain codebooks by length and scope."""
    ranked = [
        *(options_of(state_bits=window) for window in (16, 14)),
        options_of(decoder_scope="kind"),
        options_of(),
        options_of(d=2, codebook_size=16),
        options_of(state_bits=10),
        options_of(state_bits=8),
        options_of("paper", d=8, codebook_size=1 << 16),
        options_of("paper", d=6, codebook_size=1 << 12),
        options_of("paper", d=4, codebook_size=256),
        options_of("paper", d=4, codebook_size=256, scope="kind"),
        options_of("paper", d=4, codebook_size=256, scope="model"),
    ]
    found = [expected_distortion(options, take_census(options, BABY)) for options in ranked]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert 16 * found[3] == pytest.approx(1.19, rel=0.005)
    assert 16 * found[4] == pytest.approx(1.21, rel=0.005)


def test_planning_needs_no_torch() -> None:
    code = "import sys, evenbits_pocketllm.fitting; raise SystemExit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_learned_latents_of_indices_are_billed() -> None:
    options = options_of(symbols=2, symbol_latent=3, latent=2, codebook_size=16)
    network = decoder_network(options, 0)
    assert network.inputs == 2 + 2 * 3
    assert decoder_numbers(options, [matrix(10, 7)]) == network.parameters + 16 * 3


@pytest.mark.parametrize("centre", [2.25, 3.25, 4.25, 4.6])
def test_kinds_are_mixed_where_no_single_rate_uses_the_window(centre: float) -> None:
    """No index of a small d has a quarter of a bit: some kinds take one bit more, and the window is used."""
    budget = BitBudget(centre, 0.1)
    mixed = fit(budget, BABY, {})
    assert isinstance(mixed, PocketOptions)
    assert mixed.parts[0].codebook_size == 2 * mixed.codebook_size
    single = fit(budget, BABY, {"parts": ()})
    assert isinstance(single, Refusal) or predict(single, BABY).index_bits < predict(mixed, BABY).index_bits
    plain = fit(BitBudget(2.05, 0.05), BABY, {})
    assert isinstance(plain, PocketOptions)
    assert plain.parts == ()


@pytest.mark.parametrize("seed", range(12))
def test_what_fit_chooses_compresses_to_what_was_predicted(seed: int) -> None:
    """Random budgets and pinned options on a small model: every layer is compressed, and the bytes are as predicted."""
    import torch

    from evenbits.compressor import Layer
    from evenbits_pocketllm.compressor import PocketCompressor

    draw = random.Random(seed)
    pinned: list[dict[str, Any]] = [
        {},
        {"codebook": "learned", "decoder": "none", "latent": None, "symbols": 0, "state_bits": None},
        {"recipe": "paper", "batch": 2048},
        {"recipe": "paper", "rln": "none", "search": "weights", "training": "alternating", "row_scales": True},
    ]
    shapes = llama_shapes(48, 80, 2, 16, 32, dtype="float32")
    small = {"epochs": 1, "feedback": False, "train_vectors": 1 << 12, **pinned[seed % len(pinned)]}
    if seed % len(pinned) == 0:
        small["state_bits"] = 8
    chosen = fit(BitBudget(draw.uniform(2.0, 5.5), 0.25), shapes, small)
    if isinstance(chosen, Refusal):
        assert "nearest" in chosen.reason or "more codewords" in chosen.reason
        return
    generator = torch.Generator().manual_seed(seed)
    weights = {
        layer.name: 0.02 * torch.randn(layer.out_features, layer.in_features, generator=generator)
        for layer in shapes.layers
    }

    class Weights:
        def __init__(self) -> None:
            self.shapes = shapes

        def __iter__(self) -> Any:
            return ((layer, weights[layer.name]) for layer in shapes.layers)

        def second_moment(self, name: str) -> Any:
            raise NotImplementedError

        fisher = second_moment

    compressor = PocketCompressor(chosen)
    with torch.no_grad():
        shared = compressor.prepare(Weights(), generator)
        stored = 0 if shared is None else shared.nbytes
        for layer in shapes.layers:
            packed = compressor.compress(weights[layer.name], Layer(layer), shared, generator)
            restored = compressor.restore(packed, layer, shared)
            assert restored.shape == weights[layer.name].shape
            assert bool(torch.isfinite(restored).all())
            stored += packed.nbytes
    assert stored == predict(chosen, shapes).linear_bytes


def test_a_part_that_matches_no_layer_is_refused() -> None:
    for part in ({"kinds": ["attn.*"]}, {"blocks": [99]}):
        with pytest.raises(SuiteError, match="no layer matches"):
            predict(options_of(parts=({**part, "skip": True},)), STORIES)
