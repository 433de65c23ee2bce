"""LLM-Codebook: plain k-means without salience, slow twins with it, what stays dense and costs, and the contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.budget import BitBudget
from evenbits.compressor import Layer, LayerShape, ModelShapes, Needs, PackedLayer, Refusal, Role
from evenbits.errors import SuiteError, TrialFailed
from evenbits.ledger import measure_bits
from evenbits.maths.bitpack import unpack
from evenbits.maths.hessian import calibrated_error, relative_error
from evenbits.maths.kmeans import kmeans
from evenbits.maths.weighted_kmeans import nearest_weighted, weighted_distances, weighted_kmeans, weighted_means
from evenbits.models import build_model
from evenbits.plan import make_plan
from evenbits.planned_model import plan_model
from evenbits.plugins import load_plugins
from evenbits.recovery import RecoveryWork, recover
from evenbits.shapes import LLAMA2_7B, QWEN3_14B, llama_shapes
from evenbits.sources import ModelSource
from evenbits.subject import restore_state
from evenbits.suite import read_suite
from evenbits.testing import check_compressor, compress_model, make_case, tiny_model, tiny_tokens
from evenbits_llm_codebook import provide_compressors
from evenbits_llm_codebook.compressor import LlmCodebookCompressor
from evenbits_llm_codebook.options import LlmCodebookOptions, fit, is_left_dense, needs, predict

(DESCRIPTOR,) = provide_compressors()
LORA = load_plugins().recoveries["lora"].value
REFERENCE = llama_shapes(192, 512, 6, 64, 2048, tied=False)  # as wide as the embedded model


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighed(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors, and weights that differ by orders of magnitude within a vector, some of them zero."""
    generator = draw(seed)
    vectors = torch.randn(n, d, generator=generator)
    weights = torch.exp(2 * torch.randn(n, d, generator=generator))
    return vectors, weights * (torch.rand(n, d, generator=generator) > 0.05)


def skewed(rows: int = 64, columns: int = 64, seed: int = 0) -> tuple[Tensor, LayerShape, Tensor]:
    """A weight, and the second moment of inputs of which a few columns are much larger than the others."""
    generator = draw(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs *= torch.exp(torch.randn(columns, generator=generator))
    return (
        weight,
        LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", rows, columns, "float32"),
        (inputs.T @ inputs / len(inputs)),
    )


def compress(weight: Tensor, layer: Layer, **options: Any) -> tuple[PackedLayer, Tensor]:
    compressor = LlmCodebookCompressor(LlmCodebookOptions(**options))
    packed = compressor.compress(weight, layer, None, draw())
    return packed, compressor.restore(packed, layer.shape, None)


# -- weighted k-means against the obvious loop ---------------------------------------------------------------


def slow_codes(vectors: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    distances = (weights[:, None].double() * (vectors[:, None] - centres[None]).double().square()).sum(2)
    return distances.argmin(1)


@given(n=st.integers(1, 60), d=st.integers(1, 9), k=st.integers(1, 300), seed=st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_assignment_is_the_least_weighted_distance(n: int, d: int, k: int, seed: int) -> None:
    vectors, weights = weighed(n, d, seed)
    centres = torch.randn(k, d, generator=draw(seed + 1))
    codes = nearest_weighted(vectors, weights, centres)
    found = weighted_distances(vectors, weights, centres, codes).double()
    best = weighted_distances(vectors, weights, centres, slow_codes(vectors, weights, centres)).double()
    scale = (weights * (vectors.square() + centres.square().max())).sum(1).double()
    assert bool((found <= best + 1e-5 * scale).all())


def test_update_is_the_weighted_mean_number_by_number() -> None:
    vectors, weights = weighed(200, 3)
    centres = torch.randn(7, 3, generator=draw(1))
    codes = torch.randint(6, (200,), generator=draw(2))  # the last centre has no vector
    weights[codes == 4, 1] = 0  # and one number of another no weight
    moved, mass = weighted_means(vectors, weights, codes, centres)
    for k in range(7):
        for i in range(3):
            member = [n for n in range(200) if int(codes[n]) == k]
            total = sum(float(weights[n, i]) for n in member)
            assert float(mass[k, i]) == pytest.approx(total)
            if total:
                expected = sum(float(weights[n, i]) * float(vectors[n, i]) for n in member) / total
                assert float(moved[k, i]) == pytest.approx(expected, abs=1e-5)
            else:
                assert moved[k, i] == centres[k, i]


def test_the_weighted_error_falls_step_by_step() -> None:
    vectors, weights = weighed(2000, 4)
    errors = []
    for iterations in range(8):
        centres, codes = weighted_kmeans(vectors, weights, 32, iterations, draw(), "sample")
        errors.append(float(weighted_distances(vectors, weights, centres, codes).double().sum()))
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    plain = kmeans(vectors, 32, 7, draw(), init="sample")[0]
    known = weighted_distances(vectors, weights, plain, nearest_weighted(vectors, weights, plain)).double().sum()
    assert errors[-1] < 0.9 * float(known)


@pytest.mark.parametrize("k", [16, 300])  # seeded by k-means++, and by random vectors
@pytest.mark.parametrize("size", [1.0, 0.25])
def test_equal_weights_are_plain_kmeans(k: int, size: float) -> None:
    vectors = torch.randn(3000, 4, generator=draw(3))
    centres, codes = weighted_kmeans(vectors, torch.full_like(vectors, size), k, 12, draw(4))
    plain, expected = kmeans(vectors, k, 12, draw(4))
    assert torch.equal(codes, expected)
    assert torch.equal(centres, plain)


def test_whole_weights_are_repetitions() -> None:
    """A weight of 3 for all numbers of a vector is that vector three times, to the centres and to the error."""
    vectors = torch.randn(150, 2, generator=draw(5))
    times = torch.randint(1, 4, (150,), generator=draw(6))
    many = vectors.repeat_interleave(times, 0)
    codes = torch.randint(5, (150,), generator=draw(7))
    centres = torch.zeros(5, 2)
    once = weighted_means(vectors, times[:, None].expand(-1, 2).float(), codes, centres)[0]
    repeated = weighted_means(many, torch.ones_like(many), codes.repeat_interleave(times), centres)[0]
    assert torch.allclose(once, repeated, atol=1e-6)


def test_empty_centres_are_revived() -> None:
    """Distinct vectors as many as centres: every one is found in the end, however unequal their weights."""
    distinct = torch.randn(24, 3, generator=draw(8))
    vectors = distinct[torch.randint(24, (500,), generator=draw(9))]
    weights = torch.rand(500, 3, generator=draw(10)) + 0.01
    centres, codes = weighted_kmeans(vectors, weights, 24, 60, draw(11), "sample")
    assert float((centres[codes] - vectors).abs().max()) < 1e-5


def test_weighted_kmeans_refuses_what_it_cannot_do() -> None:
    vectors = torch.ones(5, 2)
    for weights, k in ((torch.ones(5, 1), 2), (torch.ones(5, 2), 6), (-torch.ones(5, 2), 2), (vectors / 0, 2)):
        with pytest.raises(ValueError, match="k-means needs"):
            weighted_kmeans(vectors, weights, k, 3, draw())
    with pytest.raises(ValueError, match=r"centres \(k > 0, d\)"):
        nearest_weighted(vectors, vectors, torch.ones(0, 2))


# -- the method ----------------------------------------------------------------------------------------------


def test_no_salience_is_plain_kmeans() -> None:
    weight, shape, _ = skewed()
    packed, restored = compress(weight, Layer(shape), salience="none", row_scales=False, codebook_size=64)
    centres, _ = kmeans(weight.reshape(-1, 4), 64, 25, draw())
    assert torch.equal(packed.tensors["codebook"], centres.half())
    codes = unpack(packed.tensors["codes"], 6, weight.numel() // 4)
    assert torch.equal(restored, centres.half().float()[codes].reshape(weight.shape))
    # and every code is the nearest of the stored codewords
    assert torch.equal(codes, slow_codes(weight.reshape(-1, 4), torch.ones(1024, 4), centres.half().float()))


@pytest.mark.parametrize("salience", ["hessian", "fisher"])
def test_constant_salience_is_none(salience: Any) -> None:
    weight, shape, _ = skewed()
    alike = Layer(shape, second_moment=0.25 * torch.eye(64), fisher=torch.full((64, 64), 4.0))
    settings: dict[str, Any] = {"row_scales": False, "codebook_size": 64, "damping": 0.0}
    packed, restored = compress(weight, alike, salience=salience, **settings)
    expected, plain = compress(weight, Layer(shape), salience="none", **settings)
    assert torch.equal(packed.tensors["codes"], expected.tensors["codes"])
    assert torch.equal(restored, plain)


def test_much_damping_takes_salience_out() -> None:
    weight, shape, moment = skewed()
    layer = Layer(shape, second_moment=moment)
    errors = [relative_error(weight, compress(weight, layer, damping=damping)[1]) for damping in (0.0, 1.0, 1e6)]
    plain = relative_error(weight, compress(weight, Layer(shape), salience="none")[1])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(plain, rel=0.03)  # rows over their scales count by the square of these


@pytest.mark.parametrize("row_scales", [True, False])
@pytest.mark.parametrize("d", [1, 4, 5])
def test_salience_lowers_its_own_error(row_scales: bool, d: int) -> None:
    """5 does not divide 64 columns: what pads them weighs nothing."""
    weight, shape, moment = skewed()
    felt = torch.exp(2 * torch.randn(64, 64, generator=draw(12)))
    layer = Layer(shape, second_moment=moment, fisher=felt)
    options: dict[str, Any] = {"d": d, "codebook_size": 1 << min(2 * d, 8), "row_scales": row_scales}
    plain = compress(weight, layer, salience="none", **options)[1]
    hessian = compress(weight, layer, salience="hessian", **options)[1]
    fisher = compress(weight, layer, salience="fisher", **options)[1]
    bound = 1.0 if d == 1 else 0.9  # of one number, salience moves the centres and not the choice between them
    assert calibrated_error(weight, hessian, moment) < bound * calibrated_error(weight, plain, moment)
    feeling = [float((felt * (weight - restored).square()).sum()) for restored in (plain, fisher)]
    assert feeling[1] < (bound - 0.1) * feeling[0]
    if d > 1:
        assert relative_error(weight, plain) < relative_error(weight, hessian)  # what it pays


def test_row_scales_are_the_weighted_least_squares() -> None:
    """No other scale of a row has a lower weighted error with the same codes."""
    weight, shape, moment = skewed()
    packed, restored = compress(weight, Layer(shape, second_moment=moment), damping=0.0)
    salience = torch.diagonal(moment)
    error = (salience * (weight - restored).square()).sum(1)
    for factor in (0.99, 1.01):
        assert bool(((salience * (weight - factor * restored).square()).sum(1) > error).all())
    assert packed.roles["row_scale"] is Role.SCALE


class Felt:
    """A survey over Gaussian matrices with squared gradients, none at all in `deaf`, and inputs that differ in size."""

    def __init__(self, deaf: tuple[str, ...] = ()) -> None:
        generator = draw(13)
        names = [f"{block}.{kind}" for block in range(3) for kind in "qv"]
        self.weights = {name: 0.02 * torch.randn(24, 40, generator=generator) for name in names}
        layers = tuple(LayerShape(name, int(name[0]), name[2:], 24, 40) for name in names)
        self.shapes = ModelShapes(layers, sum(layer.weights for layer in layers), 0)
        squares = {name: torch.exp(2 * torch.randn(24, 40, generator=generator) - 20) for name in names}
        self.squares = {name: square * (name not in deaf) for name, square in squares.items()}
        self.moments = {name: torch.diag(torch.exp(2 * torch.randn(40, generator=generator))) for name in names}

    def __iter__(self) -> Iterator[tuple[LayerShape, Tensor]]:
        return ((layer, self.weights[layer.name]) for layer in self.shapes.layers)

    def second_moment(self, name: str) -> Tensor:
        return self.moments[name]

    def fisher(self, name: str) -> Tensor:
        return self.squares[name]

    def error(self, **options: Any) -> float:
        """Squared errors, weighed by the salience; over its mean in each layer where it is that of inputs."""
        chosen = LlmCodebookOptions(codebook_size=64, **options)
        compressor, total = LlmCodebookCompressor(chosen), 0.0
        shared = compressor.prepare(self, draw())
        for shape, weight in self:
            layer = Layer(shape, self.second_moment(shape.name), fisher=self.fisher(shape.name))
            packed = compressor.compress(weight, layer, shared, draw())
            felt = self.fisher(shape.name)
            if chosen.salience == "hessian":
                felt = self.second_moment(shape.name).diagonal() / self.second_moment(shape.name).diagonal().mean()
            total += float((felt * (weight - compressor.restore(packed, shape, shared)).square()).sum())
        return total


@pytest.mark.parametrize("scope", ["kind", "model"])
@pytest.mark.parametrize("salience", ["hessian", "fisher"])
def test_shared_codebooks_weigh_too(scope: Any, salience: Any) -> None:
    survey, chosen = Felt(), {"scope": scope, "salience": salience}
    assert survey.error(**chosen) < 0.75 * survey.error(**chosen, damping=1e6)


def test_layers_without_gradients_do_not_decide_the_shared_codebook() -> None:
    """Half of the layers felt by nothing: the others have the codebook to themselves, and a lower error."""
    chosen = {"scope": "model", "salience": "fisher"}
    assert 0 < Felt(("0.q", "1.q", "2.q")).error(**chosen) < 0.5 * Felt().error(**chosen)


def test_a_shared_codebook_of_a_models_squared_gradients(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    options = LlmCodebookOptions(scope="kind", codebook_size=16, d=2, salience="fisher", iterations=3)
    manifest = compress_model(DESCRIPTOR, options, base, tmp_path / "out", tokens=tiny_tokens(base, 4, 16))
    assert set(manifest.shared) == {f"codebook.{layer.kind}" for layer in manifest.layers}
    assert all(0 < (layer.calibrated_error or 0) < 1 for layer in manifest.layers)  # the second moment comes with them


def test_a_layer_without_salience_counts_its_weights_alike() -> None:
    weight, shape, _ = skewed()
    options: dict[str, Any] = {"row_scales": False, "codebook_size": 64}
    blind = compress(weight, Layer(shape, fisher=torch.zeros(64, 64)), salience="fisher", **options)[1]
    assert torch.equal(blind, compress(weight, Layer(shape), salience="none", **options)[1])


def test_failures_name_the_layer() -> None:
    weight, shape, moment = skewed()
    with pytest.raises(TrialFailed, match=r"up_proj: salience 'hessian' needs statistics"):
        compress(weight, Layer(shape))
    with pytest.raises(TrialFailed, match=r"up_proj: the salience of its weights is not finite"):
        compress(weight, Layer(shape, fisher=torch.full((64, 64), torch.inf)), salience="fisher")
    with pytest.raises(TrialFailed, match=r"up_proj: 4096 codewords for 1024 sub-vectors"):
        compress(weight, Layer(shape, second_moment=moment), codebook_size=4096)


# -- layers left dense, and what everything costs ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["matrix", "kind", "model"])
def test_layers_left_dense_are_dense_and_billed(tmp_path: Path, dtype: str, scope: Any) -> None:
    base = tiny_model(tmp_path / "base", dtype="bfloat16", hidden=64, intermediate=172)
    options = LlmCodebookOptions.model_validate(
        {"left_dense": ["down_proj"], "left_dense_share": 0.3, "draw": 3, "codebook_size": 32, "scope": scope,
         "salience": "none", "iterations": 2}
    )  # fmt: skip
    manifest = compress_model(DESCRIPTOR, options, base, tmp_path / "out", dtype=dtype)
    planned = plan_model(ModelSource("tiny", base, "none"), dtype)
    dense = {layer.name for layer in manifest.layers if layer.left_dense}
    assert dense == {layer.name for layer in planned.shapes.layers if is_left_dense(options, layer)}
    assert 2 < len(dense) < 14  # both of down_proj, and some by lot
    ledger = measure_bits(tmp_path / "out", planned.facts)
    estimate = predict(options, planned.shapes)
    assert ledger.linear_bytes == estimate.linear_bytes
    assert ledger.roles == {role.value: count for role, count in estimate.role_bytes.items() if count}
    assert ledger.bits.index == pytest.approx(estimate.index_bits)
    weights = sum(layer.weights for layer in planned.shapes.layers if layer.name in dense)
    assert estimate.role_bytes[Role.DENSE] == weights * (2 if dtype == "bfloat16" else 4)
    for stored, packed in Artifact(tmp_path / "out").packed():
        if stored.left_dense:
            assert packed.tensors["weight"].dtype == getattr(torch, dtype)
            assert stored.error == 0.0  # the checkpoint is bfloat16 too


def test_all_layers_may_stay_dense() -> None:
    options = LlmCodebookOptions(left_dense=tuple(dict.fromkeys(layer.kind for layer in REFERENCE.layers)))
    estimate = predict(options, replace(REFERENCE, dtype="float16"))
    assert (estimate.index_bits, estimate.paper_bits) == (0.0, 16.0)
    assert set(estimate.role_bytes) == {Role.DENSE}
    refused = fit(BitBudget(2.05, 0.05), REFERENCE, options.model_dump())
    assert isinstance(refused, Refusal)
    assert refused.reason == "every layer is left dense: there is nothing to fit"


def test_the_lot_is_each_layers_own() -> None:
    """Bytes are known beforehand, for any part of the model: a recovery stage may take layers out of the bill."""
    options = LlmCodebookOptions(left_dense_share=0.25)
    dense = {layer.name for layer in LLAMA2_7B.layers if is_left_dense(options, layer)}
    assert 0.15 < len(dense) / len(LLAMA2_7B.layers) < 0.35
    other = options.model_copy(update={"draw": 1})
    assert dense != {layer.name for layer in LLAMA2_7B.layers if is_left_dense(other, layer)}
    more = options.model_copy(update={"left_dense_share": 0.5})
    assert dense < {layer.name for layer in LLAMA2_7B.layers if is_left_dense(more, layer)}
    first, second = (
        replace(REFERENCE, layers=tuple(layer for layer in REFERENCE.layers if layer.block % 2 == parity))
        for parity in (0, 1)
    )
    whole = predict(options, REFERENCE).linear_bytes
    assert predict(options, first).linear_bytes + predict(options, second).linear_bytes == whole


@pytest.mark.parametrize("by_lot", [False, True])
def test_recovery_of_the_layers_left_dense_costs_nothing(tmp_path: Path, by_lot: bool) -> None:
    """Merged adapters leave the bytes as they were, and as the plan adds them up: the method's on all other layers,
    and the dense weights. The loss on the text that is trained on falls."""
    pytest.importorskip("peft", reason='needs pip install "evenbits[lora]"')
    base = tiny_model(tmp_path / "base", hidden=64, intermediate=172)
    tokens = tiny_tokens(base, 16, 24)
    planned = plan_model(ModelSource("tiny", base, "none"), "float32")
    chosen: dict[str, Any] = {"salience": "none", "codebook_size": 32, "scope": "kind", "iterations": 2}
    chosen |= {"left_dense_share": 0.3, "draw": 3} if by_lot else {"left_dense": ("down_proj",)}
    options = LlmCodebookOptions(**chosen)
    lot = tuple(layer.name for layer in planned.shapes.layers if is_left_dense(options, layer))
    assert 0 < len(lot) < 14
    targets = lot if by_lot else options.left_dense
    stage = LORA.options.model_validate({"targets": targets, "merge": True, "r": 4, "lr": 0.01, "batch_size": 8})

    rest = LORA.dense(stage, planned.shapes)
    assert set(rest) == set(lot)
    left = replace(planned.shapes, layers=tuple(x for x in planned.shapes.layers if x.name not in rest))
    billed = predict(options, left).linear_bytes + sum(LORA.predict(stage, planned.shapes).values())
    assert billed == predict(options, planned.shapes).linear_bytes

    compress_model(DESCRIPTOR, options, base, tmp_path / "before")
    compressor = LlmCodebookCompressor(options)
    work = RecoveryWork(
        Artifact(tmp_path / "before"), compressor, LORA.make(stage), "lora", base, tokens, 0,
        torch.device("cpu"),
    )  # fmt: skip
    with ArtifactWriter(tmp_path / "after") as writer:
        manifest = recover(work, writer, {"key": "1" * 16, "recovery": ({"name": "lora", "options": {}},)})
    assert {layer.name for layer in manifest.layers if layer.left_dense} == set(lot)
    before, after = (measure_bits(tmp_path / name, planned.facts) for name in ("before", "after"))
    assert after.linear_bytes == before.linear_bytes == billed
    losses = []
    for name in ("before", "after"):
        model = build_model(tmp_path / name, restore_state(Artifact(tmp_path / name), compressor), "float32")
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    assert losses[1] < losses[0]


def test_names_that_leave_nothing_dense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"left_dense: 'dwn_proj' is no linear layer .*mlp\.down_proj"):
        fit(BitBudget(2.05, 0.05), REFERENCE, {"left_dense": ["dwn_proj"]})
    base = tiny_model(tmp_path / "base")
    options = LlmCodebookOptions(left_dense=("dwn_proj",), salience="none", codebook_size=16)
    with pytest.raises(SuiteError, match="dwn_proj"):
        compress_model(DESCRIPTOR, options, base, tmp_path / "out")


def test_paper_bits_are_the_papers_arithmetic() -> None:
    """16 K d + log2(K) N / d, as PocketLLM counts the same codebooks: 2.0209 bits less its decoder's 32 * 768 a matrix.

    And LLM-Codebook says that its codebooks take KB: at d = 4, K = 2^12 each has 32.
    """
    options = LlmCodebookOptions(d=8, codebook_size=1 << 15, row_scales=False)
    decoders = 32 * 768 * len(LLAMA2_7B.layers) / LLAMA2_7B.weights
    assert predict(options, LLAMA2_7B).paper_bits + decoders == pytest.approx(2.0209, abs=5e-5)
    small = predict(LlmCodebookOptions(d=4, codebook_size=1 << 12, row_scales=False), LLAMA2_7B)
    assert small.role_bytes[Role.CODEBOOK] == len(LLAMA2_7B.layers) * 32 * 1024
    by_hand = sum(3 * layer.weights + 16 * 4 * 4096 for layer in LLAMA2_7B.layers) / LLAMA2_7B.weights
    assert small.paper_bits == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("size", "gigabytes", "ratio"), [(1 << 14, 2.0, 6.7), (1 << 11, 1.65, 8.2)])
def test_published_sizes_are_those_of_some_setting(size: int, gigabytes: float, ratio: float) -> None:
    """The abstract's 2 GB for 7B (it says 6x) and an eighth, with codebooks of kilobytes: d = 8 gives both."""
    shapes = replace(LLAMA2_7B, dtype="float16")
    estimate = predict(LlmCodebookOptions(d=8, codebook_size=size, row_scales=False), shapes)
    stored = estimate.linear_bytes + shapes.rest_bytes
    assert stored == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert 2 * shapes.parameters / stored == pytest.approx(ratio, abs=0.05)
    assert estimate.role_bytes[Role.CODEBOOK] // len(shapes.layers) <= 256 * 1024


@pytest.mark.parametrize("centre", [2.05, 3.05, 4.05])
def test_fit_finds_a_setting_at_the_suites_budgets(centre: float) -> None:
    for shapes, budget in (
        (REFERENCE, BitBudget(centre, 0.05)),
        (llama_shapes(128, 352, 5, 32, 4096, tied=True), BitBudget(centre + 0.41, 0.045)),
        (LLAMA2_7B, BitBudget(centre, 0.05)),
        (QWEN3_14B, BitBudget(centre, 0.05)),
    ):
        chosen = fit(budget, shapes, {"salience": "fisher"})
        assert isinstance(chosen, LlmCodebookOptions), chosen
        assert chosen.salience == "fisher"
        assert budget.bits(predict(chosen, shapes), shapes) in budget


def test_fit_leaves_room_for_what_stays_dense() -> None:
    shapes: ModelShapes = replace(REFERENCE, dtype="float16")
    budget = BitBudget(6.0, 0.1)
    chosen = fit(budget, shapes, {"left_dense": ["down_proj"]})
    assert isinstance(chosen, LlmCodebookOptions), chosen
    estimate = predict(chosen, shapes)
    assert budget.bits(estimate, shapes) in budget
    down = sum(layer.weights for layer in shapes.of_kind("mlp.down_proj"))
    assert estimate.role_bytes[Role.DENSE] == 2 * down


def test_needs_follow_the_salience() -> None:
    assert needs(LlmCodebookOptions(salience="none")) == Needs()
    assert needs(LlmCodebookOptions()) == Needs("second_moment")
    assert needs(LlmCodebookOptions(salience="fisher")) == Needs("fisher")
    for wrong in ({"damping": -1}, {"left_dense_share": 1.0}, {"salience": "both"}, {"codebook_size": 100}):
        with pytest.raises(ValidationError):
            LlmCodebookOptions.model_validate(wrong)


@pytest.mark.parametrize("salience", ["fisher", "none"])
def test_contract(salience: str) -> None:
    """The default one, and what `fit` chooses, are checked with all other methods in tests/contract."""
    refused = check_compressor(
        DESCRIPTOR, {"salience": salience, "d": 2, "codebook_size": 16, "iterations": 4}, fitted=False
    )
    assert refused == []


def test_case_of_the_contract_has_both_statistics() -> None:
    case = make_case(8, 16)
    layer = case.layer("fisher")
    assert layer.fisher is not None
    assert layer.fisher.shape == case.weight.shape
    assert layer.second_moment is not None


def test_layers_made_dense_by_a_stage_count_as_dense_in_paper_bits(root: Path) -> None:
    """The shipped suite leaves one kind dense, with LoRA merged into it and without: the same bits in every sense."""
    registry = load_plugins()
    registry.collect_all()
    planned = make_plan(read_suite(root / "suites" / "ablation" / "llm_codebook_recovery.toml", registry), registry)
    found = {(trial.label, bool(trial.recovery)): trial.predicted for trial in planned.trials}
    plain, merged = (
        next(bits for (label, r), bits in found.items() if "down" in label and r is x) for x in (False, True)
    )
    assert plain is not None
    assert merged is not None
    assert plain.linear == pytest.approx(merged.linear, abs=1e-9)
    assert plain.paper == pytest.approx(merged.paper, abs=2e-3)
    assert merged.paper > 5
