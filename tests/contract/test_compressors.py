"""Every installed compressor keeps the contract; and the contract catches those that break it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from evenbits.budget import BitBudget
from evenbits.compressor import (
    Block,
    BlockCompressor,
    BlockResult,
    Compressor,
    Estimate,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelShapes,
    Needs,
    Options,
    PackedLayer,
    Refusal,
    Role,
    Shared,
    TensorReader,
    TensorWriter,
)
from evenbits.errors import SuiteError, TrialFailed
from evenbits.foreign import CheckpointCompressor
from evenbits.plugins import load_plugins
from evenbits.testing import (
    Check,
    NotApplicable,
    check_compressor,
    check_fit,
    check_fit_edges,
    check_tunable,
    make_case,
)
from evenbits.testing.compressors import CompressorContract

COMPRESSORS = load_plugins().compressors
# smaller than the defaults, which are made for real models; and the ways a plugin has that its default does not show
_SMALL = {"d": 2, "codebook_size": 16, "epochs": 6, "batch": 512}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "aqlm": [{"code_bits": 3, "group_size": 4, "rounds": 2, "tuning": {"epochs": 2}}],
    "kmeans": [{"codebook_size": 16, "d": 2}],
    "llm-codebook": [{"codebook_size": 16, "d": 2, "iterations": 4}],
    "pocketllm": [
        {"state_bits": 6, "epochs": 2},
        {"state_bits": 6, "epochs": 2, "feedback": False, "axis": "in", "scale_bits": 5, "decoder_scope": "matrix"},
        {
            "codebook": "learned",
            "codebook_bits": 8,
            "init": "kmeans",
            "feedback": False,
            "state_bits": None,
            "latent": None,
            "symbols": 0,
            **_SMALL,
        },
        {"recipe": "paper", **_SMALL},
        {"recipe": "paper", "row_scales": True, "scope": "model", **_SMALL},
        {"recipe": "paper", "rln": "none", "search": "weights", "feedback": True, **_SMALL},
        {"recipe": "code", **_SMALL},
    ],
    "vptq": [{"v": 4, "codebook_size": 16, "tuning": {"epochs": 1}}],
}
ESTIMATED = {"spqr"}  # how many outliers a layer has depends on its weights: `predict` is what it never exceeds
# a shape may be refused only where it has fewer sub-vectors than a codebook has codewords
REFUSED = {(1, 33), (7, 16)}


def _named() -> Iterator[Any]:
    """Each check of each installed compressor at each of its settings."""
    for name, provided in COMPRESSORS.items():
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            # what pocketllm's fit chooses takes a minute to train: its own tests compress smaller ones
            fitted = number == 0 and name != "pocketllm"
            try:
                # without its package a method that runs another library is not run: the adapters' own tests do
                contract = CompressorContract(provided.value, settings, name not in ESTIMATED, fitted)
            except SuiteError as error:  # no options of its own: it reads what somebody else stored
                yield pytest.param(None, id=f"{name}-options", marks=pytest.mark.skip(reason=str(error)))
                continue
            for check in contract.checks():
                yield pytest.param(check, id=f"{name}-{number}-{check.name}")
            yield pytest.param(Check("refused", "", partial(_refuses_little, contract)), id=f"{name}-{number}-refused")


def _refuses_little(contract: CompressorContract) -> None:
    assert set(contract.refused()) <= REFUSED


@pytest.mark.parametrize("check", list(_named()))
def test_installed_compressors_keep_the_contract(check: Check) -> None:
    try:
        check.run()
    except NotApplicable as reason:
        pytest.skip(str(reason))


def test_pocketllm_fits_what_it_says() -> None:
    descriptor = COMPRESSORS["pocketllm"].value
    check_fit_edges(descriptor, check_fit(descriptor))


class HalfOptions(Options):
    pass


class Half(LayerCompressor):
    """The weight as float16: the smallest compressor that keeps the contract."""

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        return PackedLayer({"scale": weight.half()}, {"scale": Role.SCALE})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["scale"].float()

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {"scale": packed.tensors["scale"]}


def predict_half(options: Options, shapes: ModelShapes) -> Estimate:
    return Estimate(16.0, 16.0, {Role.SCALE: 2 * shapes.weights})


class Byte(Half):
    """One byte a weight, so that the budget of 8 bits is met: round to 1/128 steps of the largest weight."""

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        step = torch.tensor([float(weight.abs().max()) / 127 or 1.0])
        tensors = {"codes": (weight / step).round().to(torch.int8), "step": step}
        return PackedLayer(tensors, {"codes": Role.CODE, "step": Role.SCALE})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        restored: Tensor = packed.tensors["codes"].float() * packed.tensors["step"]
        return restored

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {}


class OtherLinear(Byte):
    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        module = nn.Linear(layer.in_features, layer.out_features, bias=False)
        module.weight = nn.Parameter(1.01 * self.restore(packed, layer, shared))
        return module


def predict_byte(options: Options, shapes: ModelShapes) -> Estimate:
    return Estimate(8.0, 8.0, {Role.CODE: shapes.weights, Role.SCALE: 4 * len(shapes.layers)})


def fit_byte(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> Options | Refusal:
    bits = budget.bits(predict_byte(HalfOptions(), shapes), shapes)
    return HalfOptions() if bits in budget else Refusal("always 8 bits")


def descriptor(make: Callable[[Any], LayerCompressor] = lambda options: Byte(), **changes: Any) -> Compressor:
    plain = Compressor("byte", "a byte a weight", "", HalfOptions, make, predict_byte, fit_byte)
    return replace(plain, **changes)


def test_a_small_compressor_passes() -> None:
    assert check_compressor(descriptor()) == []


class GlobalRandomness(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        np.random.rand()
        return super().compress(weight, layer, shared, generator)


class FromGlobalState(Byte):
    """Depends on the global state without changing it."""

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        shift = 1e-4 * float(torch.get_rng_state().double().mean())
        return super().compress(weight + shift * weight.sign(), layer, shared, generator)


class UndeclaredSeed(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        noise = 1e-3 * torch.randn(weight.shape, generator=generator)
        return super().compress(weight + noise, layer, shared, generator)


class WritesIntoWeight(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        weight[0] += 1e-3
        return super().compress(weight, layer, shared, generator)


class Remembers(Byte):
    """Restores from what the object remembers instead of what is stored."""

    weight: Tensor | None = None

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        self.weight = weight.clone()
        return super().compress(weight, layer, shared, generator)

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return super().restore(packed, layer, shared) if self.weight is None else self.weight


class WritesIntoStored(Byte):
    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        restored = super().restore(packed, layer, shared)
        packed.tensors["codes"].zero_()
        return restored


class WrongDtype(Byte):
    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return super().restore(packed, layer, shared).double()


class TunesCodes(Byte):
    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {"codes": packed.tensors["codes"]}


class TunesNothingStored(Byte):
    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {"scale": torch.ones(1)}


class Detached(Half):
    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["scale"].detach().float()


class ZeroGoesUp(Byte):
    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return super().restore(packed, layer, shared) + 1e-4


class TupleMeta(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        packed = super().compress(weight, layer, shared, generator)
        return PackedLayer(packed.tensors, packed.roles, {**packed.meta, "size": (1, 2)})


class FromElsewhere(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        noise = int.from_bytes(os.urandom(4)) * 1e-12
        return super().compress(weight + noise * weight.sign(), layer, shared, generator)


class OnlyEven(Byte):
    """Ends in an error of its own for a shape that it does not know, instead of refusing it."""

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        weight.view(-1, 8)
        return super().compress(weight, layer, shared, generator)


class Quits(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        raise SystemExit(3)


class NoLayer(Byte):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        return weight  # type: ignore[return-value]


class Holds(Byte):
    """A packed path that keeps the decoded weight."""

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        module = nn.Linear(layer.in_features, layer.out_features, bias=False)
        module.weight = nn.Parameter(self.restore(packed, layer, shared))
        module.held_bytes = 4 * layer.weights  # type: ignore[assignment]
        return module


class Undocumented(Options):
    width: int = 8


class Thawed(Options, frozen=False):
    width: int = Field(default=8, description="bits of a code")


def fit_too_much(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> Options | Refusal:
    return HalfOptions()


def fit_mute(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> Options | Refusal:
    return fit_byte(budget, shapes, fixed) or Refusal("")


def fit_inside(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> Options | Refusal:
    bits = budget.bits(predict_byte(HalfOptions(), shapes), shapes)
    return HalfOptions() if budget.lower < bits < budget.upper - 1e-6 else Refusal("always 8 bits")


def fit_pinned_anywhere(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> Options | Refusal:
    return Wide.model_validate(fixed) if fixed else fit_byte(budget, shapes, fixed) and Wide()


def predict_less(options: Options, shapes: ModelShapes) -> Estimate:
    return Estimate(8.0, 8.0, {Role.CODE: shapes.weights - 1})


class Wide(Options):
    width: int = Field(default=8, description="bits of a code")


def made(kind: type[LayerCompressor]) -> dict[str, Any]:
    return {"make": lambda options: kind()}


def fitting(options: type[Options]) -> dict[str, Any]:
    return {"options": options, "fit": lambda b, s, f: fit_byte(b, s, f) and options()}


# what is broken, the check that catches it, and what that one says to do
BROKEN: list[tuple[str, dict[str, Any], str, str]] = [
    ("no summary", {"summary": ""}, "descriptor", "summary must be one line"),
    ("no name", {"name": "a b"}, "descriptor", "use letters, digits"),
    ("undocumented", fitting(Undocumented), "options", "use Field"),
    ("not frozen", fitting(Thawed), "options", "keep the options frozen"),
    ("fits everything", {"fit": fit_too_much}, "fit", "fit chose 8.0"),
    ("refuses mutely", {"fit": fit_mute}, "fit", "without a reason"),
    ("leaves out a window's end", {"fit": fit_inside}, "fit-edges", "compare by `bits in budget`"),
    ("takes what is pinned", {"options": Wide, "fit": fit_pinned_anywhere}, "fit-edges", "refuse it"),
    ("returns a tensor", made(NoLayer), "compress", "must return PackedLayer"),
    ("quits", made(Quits), "compress", "does not compress .SystemExit"),
    ("global randomness", made(GlobalRandomness), "global-state", "draw from the `generator`"),
    ("writes into its weight", made(WritesIntoWeight), "weights", "wrote into its weight: work on a copy"),
    ("crashes at odd shapes", made(OnlyEven), "shapes", "refuse it by TrialFailed"),
    ("predicts less", {"predict": predict_less}, "predict", "predict says"),
    ("from the global state", made(FromGlobalState), "determinism", "differs for one seed"),
    ("from elsewhere", made(FromElsewhere), "determinism", "draw from `generator` only"),
    ("undeclared seed", made(UndeclaredSeed), "seed", "declare stochastic=True"),
    ("remembers", made(Remembers), "restore", "compute from stored tensors"),
    ("writes into what is stored", made(WritesIntoStored), "restore", "restore"),
    ("wrong dtype", made(WrongDtype), "restore", "must return float32"),
    ("tunes codes", made(TunesCodes), "tunable", "only floats train"),
    ("tunes what is not stored", made(TunesNothingStored), "tunable", "is not stored"),
    ("meta is no JSON", made(TupleMeta), "round-trip", "meta must be plain JSON"),
    ("computes something else", made(OtherLinear), "linear", "both must decode the same"),
    ("holds the weight", made(Holds), "held", "no decoded weight may be kept"),
    ("zero goes up", made(ZeroGoesUp), "extremes", "all-zero weight restores"),
    ("predicts less of a model", {"predict": predict_less}, "model", "bytes for a model"),
]


@pytest.mark.parametrize(("changes", "check", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_compressor_is_caught(changes: dict[str, Any], check: str, message: str) -> None:
    (one,) = [each for each in CompressorContract(descriptor(**changes)).checks() if each.name == check]
    with pytest.raises(AssertionError, match=message):
        one.run()


def test_the_one_call_form_raises_the_first_failure() -> None:
    with pytest.raises(AssertionError, match="changed the global random state"):
        check_compressor(descriptor(lambda options: GlobalRandomness()))


def test_one_failing_check_leaves_the_others() -> None:
    found = {}
    for check in CompressorContract(descriptor(lambda options: GlobalRandomness()), fitted=False).checks():
        try:
            check.run()
        except NotApplicable:
            found[check.name] = "skipped"
        except AssertionError:
            found[check.name] = "failed"
    assert [name for name, status in found.items() if status == "failed"] == ["global-state"]
    assert set(found.values()) == {"failed", "skipped"}  # the rest passed, and are not here


class Tabled(Options):
    table: dict[str, int] = Field(default={}, description="levels by name")


def test_options_without_a_hash_are_fitted() -> None:
    chosen = Tabled(table={"low": 1})
    plain = descriptor(options=Tabled, fit=lambda b, s, f: fit_byte(b, s, f) and chosen)
    checks = {check.name: check for check in CompressorContract(plain).checks()}
    checks["fitted"].run()
    wrong = replace(plain, predict=lambda o, s: (predict_less if o == chosen else predict_byte)(o, s))
    (fitted,) = (check for check in CompressorContract(wrong).checks() if check.name == "fitted")
    with pytest.raises(AssertionError, match="predict says"):
        fitted.run()


def test_settings_that_are_all_refused_are_not_passed() -> None:
    class Refuses(Byte):
        def compress(self, *given: Any) -> PackedLayer:
            raise TrialFailed("too narrow")

    def make(options: Any) -> LayerCompressor:
        return Refuses() if options.table else Byte()

    chosen = Tabled(table={"low": 1})
    plain = descriptor(make, options=Tabled, fit=lambda b, s, f: fit_byte(b, s, f) and chosen)
    (fitted,) = (check for check in CompressorContract(plain).checks() if check.name == "fitted")
    with pytest.raises(NotApplicable, match="64x172 matrix is refused at each setting that fit chooses: too narrow"):
        fitted.run()


class Elsewhere(CheckpointCompressor):
    pass


def test_a_checkpoint_compressor_is_skipped_with_a_reason() -> None:
    foreign = descriptor(lambda options: Elsewhere(), needs=Needs(environment="nowhere"))
    checks = {check.name: check for check in CompressorContract(foreign, package="evenbits_rtn").checks()}
    checks["fit"].run()
    with pytest.raises(NotApplicable, match="another program compresses"):
        checks["round-trip"].run()
    with pytest.raises(AssertionError, match="declares no environment 'nowhere'"):
        checks["model"].run()


def test_a_detached_restore_is_caught() -> None:
    broken = descriptor(lambda options: Detached(), predict=predict_half)
    with pytest.raises(AssertionError, match="not differentiable"):
        check_tunable(broken, HalfOptions(), make_case(8, 16))


def test_what_is_tunable_may_be_empty() -> None:
    class Outliers(Half):
        """Weights above 1 in full: a matrix of small Gaussians has none."""

        def compress(self, weight: Tensor, *given: Any) -> PackedLayer:
            tensors = {"scale": weight.half(), "kept": weight[weight > 1], "place": (weight.flatten() > 1).nonzero()}
            return PackedLayer(tensors, {"scale": Role.SCALE, "kept": Role.KEPT, "place": Role.CODE})

        def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
            place = packed.tensors["place"].flatten()
            return (
                packed.tensors["scale"]
                .float()
                .flatten()
                .index_put((place,), packed.tensors["kept"])
                .view_as(packed.tensors["scale"])
            )

        def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
            return {name: packed.tensors[name] for name in ("scale", "kept")}

    plain = descriptor(lambda options: Outliers(), predict=predict_half)
    case = make_case(8, 16)
    check_tunable(plain, HalfOptions(), case)
    case.weight[2, 3] = 5.0
    check_tunable(plain, HalfOptions(), case)


class ByteBlock(BlockCompressor):
    """Byte by block, and a changed norm."""

    def compress_block(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        shared: Shared | None,
        generator: torch.Generator,
    ) -> BlockResult:
        packed = {}
        for layer in block.layers:
            weight = block.module.get_parameter(f"{layer.shape.kind}.weight").detach()
            packed[layer.name] = Byte().compress(weight, layer, None, generator)
        norm = block.module.get_parameter("input_layernorm.weight").detach() * 1.01
        return BlockResult(packed, {f"model.layers.{block.index}.input_layernorm.weight": norm})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return Byte().restore(packed, layer, shared)


class ByteWhole:
    """A model compressor: linear weights as bytes, the rest as it is."""

    def compress(
        self, model: nn.Module, calibration: Tensor | None, writer: TensorWriter, generator: torch.Generator
    ) -> None:
        for name, tensor in model.named_parameters():
            if ".layers." in name and tensor.dim() == 2:
                writer.write(name, (127 * tensor).to(torch.int8), Role.CODE, weights=tensor.numel())
                writer.write(f"{name}.step", torch.tensor([1 / 127]), Role.SCALE)  # billed, though it is no weight
            else:
                writer.write(name, tensor, None)

    def restore(self, reader: TensorReader) -> nn.Module:
        tensors = reader.tensors()
        model: nn.Module = AutoModelForCausalLM.from_config(reader.config)
        steps = {name: tensors.get(f"{name}.step", torch.ones(1)) for name, _ in model.named_parameters()}
        state = {name: tensors[name].float() * step for name, step in steps.items() if name in tensors}
        model.load_state_dict(state, strict=False)  # tied ones are there once
        return model


class NeverRestored(ByteWhole):
    def restore(self, reader: TensorReader) -> nn.Module:
        raise NotImplementedError


class DrawnAgain(ByteWhole):
    def restore(self, reader: TensorReader) -> nn.Module:
        return AutoModelForCausalLM.from_config(reader.config)  # type: ignore[no-any-return]


def test_a_model_compressor_must_restore() -> None:
    def run(make: type[ByteWhole]) -> None:
        whole = CompressorContract(replace(descriptor(), make=lambda options: make()), fitted=False)
        next(check for check in whole.checks() if check.name == "model").run()

    with pytest.raises(NotImplementedError):
        run(NeverRestored)
    with pytest.raises(AssertionError, match="two restored models of one artifact differ"):
        run(DrawnAgain)


def test_block_and_model_compressors_go_through_the_driver() -> None:
    assert check_compressor(descriptor(lambda options: ByteBlock())) == []
    assert check_compressor(replace(descriptor(), make=lambda options: ByteWhole())) == []
    with pytest.raises(AssertionError, match="predict says"):
        check_compressor(descriptor(lambda options: ByteBlock(), predict=predict_less), fitted=False)
    with pytest.raises(AssertionError, match="predict says"):
        check_compressor(replace(descriptor(predict=predict_less), make=lambda options: ByteWhole()), fitted=False)
