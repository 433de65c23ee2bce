"""A model computed from its packed layers says what the restored one does, holds no dense weight, names what ran."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evenbits
from evenbits import door
from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import (
    Compressor,
    Estimate,
    Layer,
    LayerCompressor,
    LayerShape,
    Options,
    PackedLayer,
    Refusal,
    Role,
    Shared,
    Survey,
)
from evenbits.environment import package_version
from evenbits.errors import ArtifactError, TrialFailed
from evenbits.kernels.launch import Choice
from evenbits.manifest import Manifest
from evenbits.measure import Measurement, Remark, Text, Weights, facts_of
from evenbits.packed import LayerKernels, PackedLayerModule, kernels_of, open_packed
from evenbits.plugins import Provided, Registry, load_plugins
from evenbits.recovery import LeaveDense, RecoveryWork, recover
from evenbits.report_protocols import ran_words
from evenbits.shapes import ARCHITECTURES, read_inventory
from evenbits.subject import MeasuredModel, load_artifact
from evenbits.testing import SHAPES, check_held, check_linear, compress_model, make_case, tiny_text
from evenbits.tiny import tiny_model
from evenbits_hardware import provide_profilers
from evenbits_hardware.memory import HostPeak
from evenbits_perplexity import provide_evaluators

from .test_streaming import Adapts, batches_of, some_model

CPU = torch.device("cpu")


# -- a method of eight bits ----------------------------------------------------------------------------------


class ByteOptions(Options):
    refuse: str = ""  # a kind of layer that it has no packed path for
    dense: str = ""  # a kind that it leaves as it is
    plain: bool = False  # whether its module says nothing of itself
    blind: bool = False  # whether `restore` is out of order


class ByteLinear(nn.Module):
    """Rows of codes (out, in) int8 times scales (out,), eight rows at a time."""

    codes: Tensor
    scale: Tensor
    unit: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, unit: Tensor | None) -> None:
        super().__init__()
        for name, tensor in (("codes", codes), ("scale", scale), ("unit", unit)):
            self.register_buffer(name, tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = []
        for first in range(0, self.codes.shape[0], 8):
            rows = slice(first, first + 8)
            tile = self.codes[rows].float() * self.scale[rows, None]
            if self.unit is not None:
                tile = tile * self.unit
            parts.append(functional.linear(inputs, tile.to(inputs.dtype)))
        return torch.cat(parts, dim=-1)


class SayingLinear(ByteLinear):
    @property
    def held_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def choice(self, rows: int) -> Choice:
        return Choice("bytes-gemv", "one row") if rows == 1 else Choice("bytes-tiles", "several rows", "eight")


class Bytes(LayerCompressor):
    def __init__(self, options: ByteOptions) -> None:
        self.options = options

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        return Shared({"unit": torch.tensor([2.0])}, {"unit": Role.SCALE})

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        if self.options.dense and layer.shape.is_called(self.options.dense):
            return PackedLayer({"weight": weight.clone()}, {"weight": Role.DENSE})
        scale = weight.abs().amax(1) / 254
        codes = (weight / (2 * scale[:, None])).round().to(torch.int8)
        return PackedLayer({"codes": codes, "scale": scale}, {"codes": Role.CODE, "scale": Role.SCALE})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        assert not self.options.blind
        assert shared is not None
        return packed.tensors["codes"].float() * packed.tensors["scale"][:, None] * shared.tensors["unit"]

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        if self.options.refuse and layer.is_called(self.options.refuse):
            return Refusal(f"no kernel for {layer.kind}")
        assert shared is not None
        made = ByteLinear if self.options.plain else SayingLinear
        unit = 1 * shared.tensors["unit"]  # as a method that decodes what is shared for each layer
        return made(packed.tensors["codes"], packed.tensors["scale"], unit)


BYTES = Compressor(
    "bytes", "", "", ByteOptions, Bytes, lambda o, s: Estimate(8.0, 8.0, {}), lambda budget, shapes, fixed: Refusal("")
)


def registry() -> Registry:
    found = load_plugins()
    found.compressors["bytes"] = Provided(BYTES, found.compressors["rtn"].plugin)
    return found


REGISTRY = registry()


def stored(folder: Path, base: Path, dtype: str = "float32", **options: Any) -> Manifest:
    return compress_model(BYTES, ByteOptions(**options), base, folder, dtype=dtype)


def packed_of(folder: Path, **options: Any) -> Any:
    return open_packed(Artifact(folder), Bytes(ByteOptions(**options)), CPU)


def logits(model: Any, batches: list[Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=batch).logits.float().flatten(0, 1) for batch in batches or batches_of()])


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error; NaN for anything that is not finite."""
    return float((found - expected).norm() / expected.norm())


# -- the same numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in sorted(ARCHITECTURES)), ("gpt2", True)])
def test_every_architecture(tmp_path: Path, kind: str, tied: bool) -> None:
    base = some_model(tmp_path / "base", kind, tied=tied)
    stored(tmp_path / "artifact", base)
    restored = load_artifact(tmp_path / "artifact", REGISTRY)
    model = packed_of(tmp_path / "artifact", blind=True)
    assert off(logits(model), logits(restored)) < 1e-5
    layers = [layer.name for layer, _ in read_inventory(base).layers]
    kernels = kernels_of(model)
    assert kernels is not None
    assert list(kernels.packed) == layers
    assert kernels.dense == {}
    assert kernels.remark is None
    for name in layers:  # the bias is there, the weight is not
        module = model.get_submodule(name)
        assert isinstance(module, PackedLayerModule)
        assert {n for n, _ in module.named_parameters()} <= {"bias"}
        assert (module.bias is None) == (getattr(restored.get_submodule(name), "bias", None) is None)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == (
        restored.get_output_embeddings().weight is restored.get_input_embeddings().weight
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_dtypes(tmp_path: Path, kind: str, dtype: str, tolerance: float) -> None:
    base = some_model(tmp_path / "base", kind)
    stored(tmp_path / "artifact", base, dtype)
    model = packed_of(tmp_path / "artifact")
    batch = batches_of()[:1]
    assert model(input_ids=batch[0]).logits.dtype == getattr(torch, dtype)
    assert off(logits(model, batch), logits(load_artifact(tmp_path / "artifact", REGISTRY), batch)) < tolerance


def test_decoding_with_a_cache(tmp_path: Path) -> None:
    stored(tmp_path / "artifact", some_model(tmp_path / "base", "llama"))
    model = packed_of(tmp_path / "artifact")
    tokens = batches_of()[0]
    with torch.no_grad():
        first = model(input_ids=tokens[:, :20], use_cache=True)
        rest = [first.logits]
        cache = first.past_key_values
        for place in range(20, tokens.shape[1]):
            step = model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
            rest.append(step.logits)
            cache = step.past_key_values
        assert off(torch.cat(rest, dim=1), model(input_ids=tokens).logits) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_added(tmp_path: Path, dense: bool, merge: bool) -> None:
    base = some_model(tmp_path / "base", "llama")
    compressor: Any = LeaveDense(torch.float32) if dense else Bytes(ByteOptions())
    method = replace(BYTES, name="dense", make=lambda options: compressor) if dense else BYTES
    compress_model(method, ByteOptions(), base, tmp_path / "before")
    work = RecoveryWork(
        Artifact(tmp_path / "before"), compressor, Adapts(merge=merge), "toy", base, batches_of()[0], 0, CPU
    )
    with ArtifactWriter(tmp_path / "after") as writer:
        recover(work, writer, {"key": "1" * 16, "recovery": ({"name": "toy", "options": {}},)})
    before, after = (logits(load_artifact(tmp_path / name, REGISTRY)) for name in ("before", "after"))
    assert off(before, after) > 0.05
    model = open_packed(Artifact(tmp_path / "after"), compressor, CPU)
    assert off(logits(model), after) < 1e-5
    kernels = kernels_of(model)
    assert kernels is not None
    held = [module for module in model.modules() if isinstance(module, PackedLayerModule)]
    assert bool(held) is not dense
    assert {module.adapter_a is not None for module in held} <= {True, False}
    if dense:
        assert set(kernels.dense.values()) == {"stored dense"}
    elif not merge:
        assert sum(module.adapter_a is not None for module in held) == 6  # two kinds in three blocks


# -- what could not be packed --------------------------------------------------------------------------------


def test_a_refused_layer_runs_dense_and_says_why(tmp_path: Path) -> None:
    base = some_model(tmp_path / "base", "llama")
    options = {"refuse": "down_proj", "dense": "k_proj"}
    stored(tmp_path / "artifact", base, **options)
    model = packed_of(tmp_path / "artifact", **options)
    assert off(logits(model), logits(load_artifact(tmp_path / "artifact", REGISTRY))) < 1e-5
    kernels = kernels_of(model)
    assert kernels is not None
    assert len(kernels.packed) == 15
    reasons = {"self_attn.k_proj": "stored dense", "mlp.down_proj": "no kernel for mlp.down_proj"}
    assert kernels.dense == {
        f"model.layers.{block}.{kind}": reason for block in range(3) for kind, reason in reasons.items()
    }
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), nn.Linear)
    assert kernels.remark == ("6 of 21 layers ran on dense weights: stored dense (3 layers), and one more reason")
    facts = kernels.facts({"prefill": 16, "decode": 1})
    assert json.loads(json.dumps(facts)) == facts
    assert facts == {
        "packed_layers": 15,
        "dense_layers": 6,
        "why_dense": {"stored dense": 3, "no kernel for mlp.down_proj": 3},
        "held_bytes": kernels.held_bytes,
        "phases": {
            "prefill": {
                "rows": 16,
                "ran": [{"kernel": "bytes-tiles", "config": "eight", "reason": "several rows", "layers": 15}],
            },
            "decode": {"rows": 1, "ran": [{"kernel": "bytes-gemv", "config": "", "reason": "one row", "layers": 15}]},
        },
    }


def test_a_module_that_says_nothing_is_named_by_its_class(tmp_path: Path) -> None:
    stored(tmp_path / "artifact", some_model(tmp_path / "base", "opt"))
    kernels = kernels_of(packed_of(tmp_path / "artifact", plain=True))
    assert kernels is not None
    assert kernels.held_bytes is None
    (ran,) = kernels.facts({"decode": 1})["phases"]["decode"]["ran"]
    assert (ran["kernel"], ran["layers"]) == ("ByteLinear", len(kernels.packed))


def test_a_path_that_cannot_be_made_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path / "artifact", some_model(tmp_path / "base", "llama"))

    def broken(*_: Any) -> Any:
        raise ValueError("backend 'triton' cannot run here")

    monkeypatch.setattr(Bytes, "linear", broken)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.0\.self_attn\.q_proj: .*backend 'triton' cannot run"):
        packed_of(tmp_path / "artifact")


def whole(folder: Path) -> Path:
    pruner = REGISTRY.compressors["llm-pruner"].value
    base = tiny_model(folder / "base", "llama", hidden=64, intermediate=128)
    options = pruner.options.model_validate({"ratio": 0.25})
    compress_model(pruner, options, base, folder / "whole", tokens=batches_of()[0])
    return folder / "whole"


def test_a_model_stored_whole_is_refused_or_runs_as_it_is(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"'llm-pruner' stores a whole model, which computes as .*; open it restored"
    ):
        load_artifact(folder, REGISTRY, weights="packed")
    subject = MeasuredModel(REGISTRY, folder, True, "float32", CPU, 0, {})
    kernels = kernels_of(subject.opened("packed"))
    assert kernels is not None
    assert kernels.remark == (
        "nothing ran from packed weights: method 'llm-pruner' stores a whole model, which computes as the method "
        "restores it"
    )
    assert torch.equal(logits(subject.opened("packed")), logits(subject.model))


def test_the_dense_model_is_torchs_own_without_a_remark(tmp_path: Path) -> None:
    subject = MeasuredModel(REGISTRY, some_model(tmp_path / "base", "llama"), False, "float32", CPU, 0, {})
    kernels = kernels_of(subject.opened("packed"))
    assert kernels is not None
    assert kernels.remark is None
    assert kernels.facts({"decode": 1})["whole"] == "the dense model, by torch's matmul"
    assert kernels_of(subject.model) is None  # and the other one is no longer held
    assert subject.model is subject.model


# -- memory --------------------------------------------------------------------------------------------------


def test_what_layers_share_is_held_once_and_files_are_let_go(tmp_path: Path) -> None:
    stored(tmp_path / "artifact", some_model(tmp_path / "base", "llama"))
    model = packed_of(tmp_path / "artifact")
    kernels = kernels_of(model)
    assert kernels is not None
    modules = [module for module in kernels.packed.values() if isinstance(module, SayingLinear)]
    assert len({module.get_buffer("unit").data_ptr() for module in modules}) == 1
    assert len({module.codes.data_ptr() for module in modules}) == 21
    own = sum(module.codes.nbytes + module.scale.nbytes for module in modules)
    assert kernels.held_bytes == own + 4 < sum(module.held_bytes for module in modules)
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert str(tmp_path / "artifact") not in maps


def growth(folder: Path, weights: Weights) -> int:
    """Bytes that opening a model and running it once takes, at its peak."""
    with HostPeak() as peak:
        assert bool(torch.isfinite(logits(load_artifact(folder, REGISTRY, weights=weights), [tokens_of(8)])).all())
    return peak.peak - peak.baseline


def tokens_of(count: int) -> Tensor:
    return torch.arange(count)[None]


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc, which only Linux has")
def test_the_peak_is_that_of_the_packed_model(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", blocks=4, hidden=512, intermediate=1024)
    stored(tmp_path / "packed", base)
    either: tuple[Weights, Weights] = ("restored", "packed")
    for weights in either:
        growth(tmp_path / "packed", weights)  # what is made once
    restored, packed = (growth(tmp_path / "packed", weights) for weights in either)
    dense = (base / "model.safetensors").stat().st_size
    assert dense > 35e6
    assert restored > 0.9 * dense
    # codes are a quarter; a block's file is mapped beside them for a moment (0.517 seen on a busy machine)
    assert packed < 0.6 * dense


# -- what users reach ----------------------------------------------------------------------------------------


def test_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "load_plugins", lambda: REGISTRY)
    base = some_model(tmp_path / "base", "llama")
    stored(tmp_path / "artifact", base)
    stored(tmp_path / "part", base, refuse="o_proj")
    model = evenbits.load(tmp_path / "artifact", weights="packed")
    assert off(logits(model), logits(evenbits.load(tmp_path / "artifact"))) < 1e-5
    assert kernels_of(model) is not None
    with pytest.warns(UserWarning, match=r"3 of 21 layers ran on dense weights: no kernel for self_attn.o_proj"):
        evenbits.load(tmp_path / "part", weights="packed")
    with pytest.raises(ValueError, match="weights must be 'restored' or 'packed' or 'approximate', not 'fused'"):
        evenbits.load(tmp_path / "artifact", weights="fused")  # type: ignore[arg-type]


class Measured(MeasuredModel):
    """With a text of the tiny tokenizer's words."""

    def corpus(self, reference: Any) -> Text:
        return Text((tiny_text(900, seed=5),), "\n\n", {"name": "tiny"})


POLICY = {"kernel": "packed", "numba": package_version("numba")}


def subject_of(folder: Path, *, artifact: bool = True) -> Measured:
    sizes = dict.fromkeys(("linear", "model", "dense_linear", "dense_model"), 1)
    facts = {"model": "tiny", "kernel": "dense-restored"}
    return Measured(REGISTRY, folder, artifact, "float32", CPU, 0, facts, sizes)


def test_perplexity_of_either(tmp_path: Path) -> None:
    base = some_model(tmp_path / "base", "llama")
    stored(tmp_path / "artifact", base, refuse="o_proj")
    (evaluator,) = provide_evaluators()

    def evaluate(folder: Path, weights: str, *, artifact: bool = True) -> list[Any]:
        options = {"corpus": {"name": "tiny"}, "context": 64, "weights": weights}
        made = evaluator.make(evaluator.options.model_validate(options))
        return list(made.evaluate(subject_of(folder, artifact=artifact)))

    (restored,) = evaluate(tmp_path / "artifact", "restored")
    packed, remark = evaluate(tmp_path / "artifact", "packed")
    (dense,) = evaluate(base, "packed", artifact=False)
    assert isinstance(remark, Remark)
    assert "3 of 21 layers ran on dense weights" in remark.text
    assert packed.value == pytest.approx(restored.value, rel=1e-5)
    assert packed.value != dense.value
    assert packed.fingerprint == dense.fingerprint == {**restored.fingerprint, **POLICY}
    assert restored.fingerprint["kernel"] == "dense-restored"
    phase = packed.details["kernels"]["phases"]["batch"]
    assert phase["ran"] == [{"kernel": "bytes-tiles", "config": "eight", "reason": "several rows", "layers": 18}]
    assert phase["rows"] == 8 * 64
    assert "kernels" not in restored.details


def test_a_block_at_a_time_is_restored() -> None:
    (evaluator,) = provide_evaluators()
    options = {"corpus": {"name": "tiny"}, "context": 64, "weights": "packed", "memory": "block"}
    with pytest.raises(ValueError, match="memory = block restores the weights of a block at a time"):
        evaluator.options.model_validate(options)


def test_the_hardware_profiler_runs_either(tmp_path: Path) -> None:
    base = some_model(tmp_path / "base", "llama")
    stored(tmp_path / "artifact", base, refuse="o_proj")
    (profiler,) = (found for found in provide_profilers() if found.name == "hardware")

    def profile(folder: Path, weights: str, *, artifact: bool = True) -> tuple[dict[str, Measurement], list[str]]:
        options = {"prompt_tokens": 12, "decode_tokens": 3, "repeats": 2, "warmup": 1, "weights": weights}
        found = profiler.make(profiler.options.model_validate(options)).profile(subject_of(folder, artifact=artifact))
        measured = {one.name: one for one in found if isinstance(one, Measurement)}
        return measured, [one.text for one in found if isinstance(one, Remark)]

    restored, nothing = profile(tmp_path / "artifact", "restored")
    packed, remarks = profile(tmp_path / "artifact", "packed")
    dense, silent = profile(base, "packed", artifact=False)
    assert packed.keys() == dense.keys() == {name for name in restored if not name.startswith("size_")}
    assert (nothing, silent) == ([], [])
    assert remarks == ["3 of 21 layers ran on dense weights: no kernel for self_attn.o_proj (3 layers)"]
    for name in ("latency_prefill_ms", "decode_tokens_per_second", "memory_inference_bytes"):
        assert restored[name].fingerprint["kernel"] == "dense-restored"
        assert packed[name].fingerprint == dense[name].fingerprint
        assert packed[name].fingerprint == {**restored[name].fingerprint, **POLICY}
        phases = packed[name].details["kernels"]["phases"]
        assert {phase: (one["rows"], one["ran"][0]["kernel"]) for phase, one in phases.items()} == {
            "prefill": (12, "bytes-tiles"),
            "decode": (1, "bytes-gemv"),
        }
        assert dense[name].details["kernels"]["whole"] == "the dense model, by torch's matmul"
        assert "kernels" not in restored[name].details


def test_pocketllm_computes_what_it_restores(tmp_path: Path) -> None:
    pocket = REGISTRY.compressors["pocketllm"].value
    options = pocket.options.model_validate({"recipe": "evenbits", "state_bits": 6, "epochs": 1, "feedback": False})
    base = some_model(tmp_path / "base", "llama", blocks=1)
    compress_model(pocket, options, base, tmp_path / "artifact", tokens=batches_of()[0])
    model = open_packed(Artifact(tmp_path / "artifact"), pocket.make(options), CPU)
    assert off(logits(model), logits(load_artifact(tmp_path / "artifact", REGISTRY))) < 1e-4
    kernels = kernels_of(model)
    assert kernels is not None
    assert len(kernels.packed) == 7


def test_an_approximation_is_asked_for_by_name_and_says_how_near_it_is(tmp_path: Path) -> None:
    """PocketLLM's decoders that normalise over groups, folded; methods without one compute as they do packed."""
    pocket = REGISTRY.compressors["pocketllm"].value
    options = pocket.options.model_validate({"recipe": "paper", "d": 4, "codebook_size": 16, "hidden": 8, "epochs": 1})
    base = some_model(tmp_path / "base", "llama", blocks=1)
    compress_model(pocket, options, base, tmp_path / "artifact")
    subject = MeasuredModel(REGISTRY, tmp_path / "artifact", True, "float32", CPU, 0, {})
    restored = logits(subject.opened("restored"))
    packed, near = subject.opened("packed"), evenbits.load(tmp_path / "artifact", weights="approximate")
    assert off(logits(packed), restored) < 1e-4 < off(logits(near), restored) < 0.3
    exact, folded = kernels_of(packed), kernels_of(near)
    assert exact is not None
    assert folded is not None
    (ran,) = folded.facts({"decode": 1})["phases"]["decode"]["ran"]
    found = [folded.choice(name, 1).decibels for name in folded.packed]
    each = [value for value in found if value is not None and math.isfinite(value)]  # one without any error is inf
    assert None not in found
    assert ran["decibels"] == [min(each), max(each)]
    assert 5 < min(each) < max(each)
    (words,) = ran_words(folded.facts({"decode": 1}))
    assert words.endswith(f"its error {min(each):.0f} to {max(each):.0f} dB below the weight)")
    assert all("decibels" not in one for one in exact.facts({"decode": 1})["phases"]["decode"]["ran"])
    assert facts_of(subject, "approximate")["kernel"] == "packed-approximate"
    stored(tmp_path / "bytes", base)
    found = [logits(load_artifact(tmp_path / "bytes", REGISTRY, weights=w)) for w in ("approximate", "packed")]
    assert torch.equal(*found)


def test_many_reasons_are_counted() -> None:
    kernels = LayerKernels({}, {"a": "x", "b": "x", "c": "y", "d": "z"})
    assert kernels.remark == "4 of 4 layers ran on dense weights: x (2 layers), and 2 more reasons"
    assert LayerKernels({}, {}).remark is None


# -- the contract --------------------------------------------------------------------------------------------


def breaks(monkeypatch: pytest.MonkeyPatch, forward: Any = None, choice: Any = None) -> None:
    """Make the module wrong in one way."""
    right = ByteLinear.forward
    if forward is not None:
        monkeypatch.setattr(SayingLinear, "forward", lambda self, inputs: forward(right(self, inputs), inputs))
    if choice is not None:
        monkeypatch.setattr(SayingLinear, "choice", lambda self, rows: choice)


def test_the_contract_takes_a_right_path() -> None:
    for shape in SHAPES:
        check_linear(BYTES, ByteOptions(), make_case(*shape))
    check_linear(BYTES, ByteOptions(plain=True), make_case(24, 40))
    check_linear(BYTES, ByteOptions(refuse="up_proj"), make_case(24, 40))
    check_held(BYTES, ByteOptions(), make_case(*SHAPES[0]), make_case(*SHAPES[1]))
    check_held(BYTES, ByteOptions(plain=True), make_case(*SHAPES[0]), make_case(*SHAPES[1]))


@pytest.mark.parametrize(
    ("forward", "choice", "said"),
    [
        (lambda out, x: out * 1.001, None, r"differs from the restored weight by"),
        (lambda out, x: out * (1.01 if x.dtype == torch.bfloat16 else 1), None, r"bfloat16 differs from"),
        (lambda out, x: out * (1.01 if out[..., 0].numel() == 1 else 1), None, r"\(1, 40\) float32 differs from"),
        (lambda out, x: out.float(), None, r"float16 gives \(\(1, 24\), torch.float32\), expected"),
        (lambda out, x: out.reshape(-1, 24), None, r"\(2, 3, 40\) float32 gives \(\(6, 24\)"),
        (lambda out, x: out * float("nan"), None, r"differs from the restored weight by nan"),
        (lambda out, x: out if x.is_contiguous() else out * 1.01, None, r"\(5, 40\) float32 differs from"),
        (lambda out, x: out if len(x) else out[:, :3], None, r"`linear` of no rows gives \(0, 3\)"),
        (None, "bytes", r"choice\(1\) must be a Choice with a kernel and a reason, not 'bytes'"),
        (None, Choice("bytes", ""), r"choice\(1\) must be a Choice with a kernel and a reason"),
    ],
)
def test_the_contract_refuses_a_wrong_path(
    monkeypatch: pytest.MonkeyPatch, forward: Any, choice: Any, said: str
) -> None:
    breaks(monkeypatch, forward, choice)
    with pytest.raises(AssertionError, match=said):
        check_linear(BYTES, ByteOptions(), make_case(24, 40))


def test_the_contract_refuses_a_decoded_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_case(*SHAPES[0]), make_case(*SHAPES[1])
    monkeypatch.setattr(SayingLinear, "held_bytes", property(lambda self: 4 * self.codes.numel()))
    with pytest.raises(AssertionError, match=r"of 960 and 8192 weights held_bytes grows by 28928, .* no decoded"):
        check_held(BYTES, ByteOptions(), *cases)
    monkeypatch.setattr(SayingLinear, "held_bytes", property(lambda self: 3))
    with pytest.raises(AssertionError, match=r"held_bytes says 3, the module's tensors alone take \d+"):
        check_held(BYTES, ByteOptions(), *cases)
