"""The driver: coverage of architectures, streaming in a block's memory, the three forms, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evenbits import load
from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import (
    Block,
    BlockCompressor,
    BlockResult,
    Compressor,
    Estimate,
    Fold,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelCompressor,
    ModelShapes,
    Needs,
    Options,
    PackedLayer,
    Refusal,
    Role,
    Shared,
    Survey,
    TensorReader,
    TensorWriter,
)
from evenbits.driver import Driver, Stored, Work
from evenbits.errors import SuiteError, TrialFailed
from evenbits.fisher import squared_gradients
from evenbits.ledger import measure_bits
from evenbits.models import build_model, check_coverage, guarded_randomness, open_model, torch_dtype
from evenbits.planned_model import plan_model
from evenbits.plugins import load_plugins
from evenbits.recovery import LeaveDense
from evenbits.shapes import ARCHITECTURES, read_inventory
from evenbits.sources import ModelSource
from evenbits.subject import restore_state
from evenbits.testing import compress_model, manifest_facts, tiny_model, tiny_tokens

LAYERS_A_BLOCK = {"llama": 7, "qwen3": 7, "opt": 6, "gpt2": 4}
RTN = load_plugins().compressors["rtn"].value
GPTQ = load_plugins().compressors["gptq"].value
CPU = torch.device("cpu")


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits.float()
    return found


def drive(
    compressor: Any,
    base: Path,
    folder: Path,
    *,
    needs: Needs | None = None,
    tokens: Tensor | None = None,
    dtype: str = "float32",
) -> tuple[Driver, Stored]:
    """Run a compressor object that no plugin provides; the artifact says it is "toy"."""
    work = Work(base, dtype, CPU, compressor, needs or Needs(), None, 0, tokens, folder.parent / "moments")
    toy = Compressor("toy", "", "", Options, lambda options: compressor, _no_prediction, lambda b, s, f: Refusal("toy"))
    with ArtifactWriter(folder) as writer:
        driver = Driver(work, writer)
        stored = driver.run()
        writer.copy_base_files(base)
        writer.finish(
            **manifest_facts(toy, Options(), dtype), layers=tuple(stored.layers), shared=stored.shared,
            model_form=stored.form, whole=stored.whole, whole_weights=stored.whole_weights,
        )  # fmt: skip
    return driver, stored


def _no_prediction(options: Options, shapes: ModelShapes) -> Estimate:
    return Estimate(0.0, 0.0, {})


def bare(base: Path, prefix: str = "transformer.") -> None:
    """Rename the tensors as the hub's gpt2 has them: without the first part of the path, and with mask buffers."""
    file = base / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor.clone() for name, tensor in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(tensors, file, metadata={"format": "pt"})


# -- coverage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2"])
def test_every_linear_layer_is_compressed_and_restored(tmp_path: Path, architecture: Any, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", architecture, tied=tied)
    tokens = tiny_tokens(base, 2, 16)
    dense = open_model(base, "float32", "cpu")
    manifest = compress_model(RTN, RTN.options.model_validate({"bits": 8, "group_size": 16}), base, tmp_path / "rtn")
    assert len(manifest.layers) == 2 * LAYERS_A_BLOCK[architecture]
    inside = [
        name
        for name, module in dense.named_modules()
        if ".layers." in name or ".h." in name
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    ]
    assert sorted(layer.name for layer in manifest.layers) == sorted(inside)
    model = load(tmp_path / "rtn")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected, found = logits(dense, tokens), logits(model, tokens)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()
    for layer in manifest.layers:
        weight, restored = (m.get_submodule(layer.name).weight for m in (dense, model))
        assert 0 < (weight - restored).norm() < 0.01 * weight.norm(), layer.name
        assert layer.error == pytest.approx(float((weight - restored).square().sum() / weight.square().sum()), rel=1e-3)
        bias = getattr(dense.get_submodule(layer.name), "bias", None)
        assert layer.bias == (bias is not None)
        if bias is not None:
            assert torch.equal(bias, model.get_submodule(layer.name).bias)
            assert bias.abs().max() > 0
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert (embeddings.data_ptr() == head.data_ptr()) == tied
    with safe_open(tmp_path / "rtn" / "rest.safetensors", framework="pt") as opened:
        assert ("lm_head.weight" in opened.keys()) == (not tied)  # noqa: SIM118


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2"])
@pytest.mark.parametrize(
    ("stored", "evaluated"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_layers_left_dense_are_the_model_bit_for_bit(
    tmp_path: Path, architecture: Any, stored: str, evaluated: str
) -> None:
    base = tiny_model(tmp_path / "base", architecture, dtype=stored)
    assert read_inventory(base).dtype == stored
    _, written = drive(LeaveDense(torch_dtype(evaluated)), base, tmp_path / "dense", dtype=evaluated)
    assert all(layer.stored_dtype == stored and layer.left_dense for layer in written.layers)
    artifact = Artifact(tmp_path / "dense")
    state = restore_state(artifact, LayerCompressor())
    assert {tensor.dtype for tensor in state.values()} == {torch_dtype(evaluated)}
    tokens = tiny_tokens(base, 2, 16)
    expected = open_model(base, evaluated, "cpu")
    model = build_model(tmp_path / "dense", state, evaluated)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    for (name, one), (other_name, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_checkpoint_of_bare_names_is_the_same_model(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "full", "gpt2", tied=True)
    other = tiny_model(tmp_path / "bare", "gpt2", tied=True)
    bare(other)
    assert any(tensor.key == "h.0.attn.c_attn.weight" for _, tensor in read_inventory(other).layers)
    assert read_inventory(other).shapes() == read_inventory(base).shapes()
    options = RTN.options.model_validate({"bits": 4, "group_size": 16})
    first, second = (compress_model(RTN, options, m, tmp_path / f"rtn-{m.name}") for m in (base, other))
    assert first.layers == second.layers
    tokens = tiny_tokens(base, 2, 16)
    assert torch.equal(logits(load(tmp_path / "rtn-full"), tokens), logits(load(tmp_path / "rtn-bare"), tokens))


def test_sharded_checkpoints(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    whole = compress_model(RTN, RTN.options(), base, tmp_path / "whole")
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    for part in (0, 1):
        shard = {name: tensors[name].clone() for name in names[part::2]}
        save_file(shard, base / f"model-{part + 1:05d}-of-00002.safetensors", metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    index = {
        "metadata": {},
        "weight_map": {n: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, n in enumerate(names)},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = compress_model(RTN, RTN.options(), base, tmp_path / "sharded")
    assert sharded.files == whole.files


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - LAYERS_A_BLOCK.keys()))
def test_the_other_architectures_of_the_table(tmp_path: Path, kind: str) -> None:
    """Few heads, and windows of 8 tokens where the architecture has them: blocks differ in what they may see."""
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=36, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=128, sliding_window=8, pad_token_id=None,
        bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    with guarded_randomness(0):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    dense = open_model(base, "float32", "cpu")
    compressor = Watcher()
    _, stored = drive(compressor, base, tmp_path / "out", needs=Needs("second_moment", sequential=True), tokens=tokens)
    linear = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")]
    assert sorted(layer.name for layer in stored.layers) == sorted(linear)
    assert_same_moments(compressor.given, moments_by_hand(dense, tokens, linear))
    model = build_model(tmp_path / "out", restore_state(Artifact(tmp_path / "out"), compressor), "float32")
    assert torch.equal(logits(model, tokens), logits(dense, tokens))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == config.tie_word_embeddings


# -- what is refused -----------------------------------------------------------------------------------------


def edit_config(base: Path, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox", "mamba"])
def test_an_unknown_architecture_is_refused(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base")
    edit_config(base, model_type=kind)
    with pytest.raises(SuiteError, match=rf"architecture '{kind}' is not understood.*known: .*llama"):
        compress_model(RTN, RTN.options(), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_weight_in_a_block_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    file = base / "model.safetensors"
    extra = {"model.layers.1.self_attn.gate.weight": torch.ones(4, 4)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    with pytest.raises(SuiteError, match=r"1 weight\(s\).*would stay dense.*layers\.1\.self_attn\.gate\.weight"):
        compress_model(RTN, RTN.options(), base, tmp_path / "out")


def test_a_model_whose_modules_hold_more_than_the_files_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    driver = Driver(Work(base, "float32", CPU, LayerCompressor(), Needs(), None, 0, None, None), ArtifactWriter(base))
    lacking = replace(driver.inventory, layers=driver.inventory.layers[1:])
    with pytest.raises(TrialFailed, match=r"model\.layers\.0\.self_attn\.q_proj \(Linear\) is not understood"):
        check_coverage(driver.model, lacking)


class Toy(LayerCompressor):
    """The weight as float32, so that what is done to it can be seen."""

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        return PackedLayer({"w": weight}, {"w": Role.KEPT})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["w"]


class WrongShape(Toy):
    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["w"][:-1]


class NotFinite(Toy):
    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["w"] / 0 if layer.kind == "mlp.up_proj" else packed.tensors["w"]


class MissingRole(Toy):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        return PackedLayer({"w": weight, "step": weight[0]}, {"w": Role.KEPT})


class RoleLost(Toy):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        packed = super().compress(weight, layer, shared, generator)
        packed.tensors["unbilled"] = weight
        return packed


class Crashes(Toy):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        raise KeyError("gone")


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (WrongShape(), r"^model\.layers\.0\.self_attn\.q_proj: restored to \(47, 48\), expected \(48, 48\)"),
        (NotFinite(), r"^model\.layers\.0\.mlp\.up_proj: the restored weight is not finite"),
        (MissingRole(), r"^model\.layers\.0\.self_attn\.q_proj: .*every tensor needs exactly one role.*step"),
        (RoleLost(), r"^model\.layers\.0\.self_attn\.q_proj: .*every tensor needs exactly one role.*unbilled"),
        (Crashes(), r"^model\.layers\.0\.self_attn\.q_proj: KeyError: 'gone'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_compressor_fails_with_the_layer(tmp_path: Path, compressor: Any, message: str) -> None:
    base = tiny_model(tmp_path / "base")
    with pytest.raises(TrialFailed, match=message):
        drive(compressor, base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "base"] == []


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.mlp\.down_proj: the checkpoint's weight is not finite"):
        drive(Toy(), base, tmp_path / "out")


@pytest.mark.parametrize(
    "needs", [Needs("second_moment"), Needs("second_moment", sequential=True), Needs("inputs"), Needs("fisher")]
)
def test_statistics_without_calibration_are_refused(tmp_path: Path, needs: Needs) -> None:
    base = tiny_model(tmp_path / "base")
    with pytest.raises(TrialFailed, match=r"calibration"):
        drive(Toy(), base, tmp_path / "out", needs=needs)


# -- what compressors are given ------------------------------------------------------------------------------


class Watcher(Toy):
    """Notes what it is given; makes every weight of block 0 half as large when `crude`."""

    def __init__(self, crude: bool = False) -> None:
        self.given: dict[str, Layer] = {}
        self.crude = crude

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        self.given[layer.name] = layer
        if self.crude and layer.shape.block == 0:
            weight = 0.5 * weight
        return super().compress(weight, layer, shared, generator)


def moments_by_hand(model: nn.Module, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Second moments with plain hooks on one forward pass of the whole model, in float64."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            found[name] = rows.T @ rows / len(rows)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


def assert_same_moments(given: dict[str, Layer], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, moment in expected.items():
        found = given[name].second_moment
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), moment, rtol=1e-4, atol=1e-5 * float(moment.abs().max())), name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2"])
def test_dense_second_moments_are_those_of_the_dense_model(
    tmp_path: Path, architecture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenbits.calibration.TOKENS_AT_A_TIME", 96)  # 3 batches, the last one short
    base = tiny_model(tmp_path / "base", architecture)
    tokens = tiny_tokens(base, 8, 32)
    compressor = Watcher(crude=True)
    drive(compressor, base, tmp_path / "out", needs=Needs("second_moment"), tokens=tokens)
    model = open_model(base, "float32", "cpu")
    assert_same_moments(compressor.given, moments_by_hand(model, tokens, list(compressor.given)))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_sequential_second_moments_pass_through_compressed_blocks(tmp_path: Path, architecture: Any) -> None:
    base = tiny_model(tmp_path / "base", architecture)
    tokens = tiny_tokens(base, 8, 32)
    compressor = Watcher(crude=True)
    drive(compressor, base, tmp_path / "out", needs=Needs("second_moment", sequential=True), tokens=tokens)
    model = open_model(base, "float32", "cpu")
    names = list(compressor.given)
    expected = moments_by_hand(model, tokens, names)
    dense = dict(expected)
    for name in names:
        if compressor.given[name].shape.block == 0:
            model.get_submodule(name).weight.mul_(0.5)
    through = moments_by_hand(model, tokens, names)
    expected = {n: through[n] if compressor.given[n].shape.block else expected[n] for n in names}
    assert_same_moments(compressor.given, expected)
    last = names[-1]
    assert not torch.allclose(expected[last], dense[last], rtol=0.05)


class FisherWatcher(Watcher):
    """Also notes what a survey says."""

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        self.surveyed = {layer.name: survey.fisher(layer.name) for layer in survey.shapes.layers}
        return None


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fisher_is_the_dense_models_in_float32(tmp_path: Path, architecture: Any, sequential: bool) -> None:
    """Whatever the model is evaluated in, and whatever has been compressed before; with second moments beside it."""
    base = tiny_model(tmp_path / "base", architecture)
    tokens = tiny_tokens(base, 4, 16)
    compressor = FisherWatcher(crude=True)
    needs = Needs("fisher", sequential=sequential)
    drive(compressor, base, tmp_path / "out", needs=needs, tokens=tokens, dtype="bfloat16")
    inventory = read_inventory(base)
    names, turned = [layer.name for layer, _ in inventory.layers], inventory.architecture.transposed
    expected = squared_gradients(open_model(base, "float32", "cpu"), tokens, names, turned)
    assert compressor.given.keys() == expected.keys()
    for name, wanted in expected.items():
        for found in (compressor.given[name].fisher, compressor.surveyed[name]):
            assert found is not None
            assert torch.allclose(found, wanted, rtol=1e-5), name
        assert compressor.given[name].second_moment is not None


def test_within_a_block_groups_see_the_groups_before(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 8, 32)
    compressor = Watcher(crude=True)
    needs = Needs("second_moment", sequential=True, within_block=True)
    drive(compressor, base, tmp_path / "out", needs=needs, tokens=tokens)
    model = open_model(base, "float32", "cpu")
    names = list(compressor.given)
    expected: dict[str, Tensor] = {}
    for group in read_inventory(base).architecture.groups:
        now = [f"model.layers.0.{kind}" for kind in group]
        expected |= moments_by_hand(model, tokens, now)
        for name in now:
            model.get_submodule(name).weight.mul_(0.5)
    expected |= moments_by_hand(model, tokens, [name for name in names if ".layers.1." in name])
    assert_same_moments(compressor.given, {name: expected[name] for name in names})


def test_inputs_are_the_rows_of_the_second_moment(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 8, 32)
    compressor = Watcher()
    drive(compressor, base, tmp_path / "out", needs=Needs("inputs"), tokens=tokens)
    for layer in compressor.given.values():
        assert layer.inputs is not None
        assert layer.second_moment is not None
        assert layer.inputs.shape == (256, layer.shape.in_features)
        moment = layer.inputs.double().T @ layer.inputs.double() / 256
        assert torch.allclose(moment.float(), layer.second_moment, rtol=1e-4, atol=1e-4)


def test_gptq_beats_rtn_by_its_own_measure_in_every_layer(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, intermediate=172)
    tokens = tiny_tokens(base, 32, 32)
    shared = {"bits": 3, "group_size": 32}
    gptq = compress_model(GPTQ, GPTQ.options(**shared), base, tmp_path / "gptq", tokens=tokens)
    for layer in gptq.layers:
        assert layer.calibrated_error is not None
        assert layer.error is not None
        assert layer.calibrated_error < layer.error


class SharesMean(Toy):
    """Shares one number: the mean of all weights, by walking the survey twice."""

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        names = [layer.name for layer, _ in survey]
        total = sum(float(weight.double().sum()) for _, weight in survey)
        mean = total / survey.shapes.weights
        moment = survey.second_moment(names[0])
        return Shared({"mean": torch.tensor([mean]), "moment": moment}, {"mean": Role.CODEBOOK, "moment": Role.KEPT})


def test_prepare_walks_all_weights_and_shares_once(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base)
    _, stored = drive(SharesMean(), base, tmp_path / "out", tokens=tokens)
    assert stored.shared == {"mean": Role.CODEBOOK, "moment": Role.KEPT}
    shared = Artifact(tmp_path / "out").shared
    assert shared is not None
    state = load_file(base / "model.safetensors")
    weights = [state[f"{layer.name}.weight"].double() for layer in stored.layers]
    mean = sum(float(w.sum()) for w in weights) / sum(w.numel() for w in weights)
    assert float(shared.tensors["mean"]) == pytest.approx(mean, abs=1e-6)
    model = open_model(base, "float32", "cpu")
    name = stored.layers[0].name
    expected = moments_by_hand(model, tokens, [name])[name]
    assert torch.allclose(shared.tensors["moment"].double(), expected, rtol=1e-4, atol=1e-4)


# -- blocks and whole models ---------------------------------------------------------------------------------


class RescaleNorms(BlockCompressor):
    """Folds a factor 2 from the first norm into q, k and v: the block computes the same from other tensors."""

    change = "model.layers.{}.input_layernorm.weight"
    seen: ClassVar[list[tuple[int, int, int]]] = []

    def compress_block(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        shared: Shared | None,
        generator: torch.Generator,
    ) -> BlockResult:
        for states, target in zip(inputs, targets, strict=True):
            assert torch.allclose(block.run(states), target, atol=1e-5)
            assert torch.allclose(block.run(states[1:3]), target[1:3], atol=1e-5)
        packed, changed, folds = {}, {}, {}
        for layer in block.layers:
            weight = block.module.get_parameter(f"{layer.shape.kind}.weight").detach().clone()
            factor = 2.0 if layer.shape.kind[-6:] in ("q_proj", "k_proj", "v_proj") else 1.0
            packed[layer.name] = PackedLayer({"w": weight * factor}, {"w": Role.KEPT})
            if factor != 1:
                folds[layer.name] = Fold(columns=torch.full((weight.shape[1],), factor))
        name = self.change.format(block.index)
        norm = block.module.get_parameter("input_layernorm.weight")
        changed[name] = norm.detach() / 2
        return BlockResult(packed, changed, folds)

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["w"]


def test_a_block_compressor_changes_and_stores_norms(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base)
    drive(RescaleNorms(), base, tmp_path / "out", tokens=tokens)
    state = restore_state(Artifact(tmp_path / "out"), RescaleNorms())
    dense = open_model(base, "float32", "cpu")
    model = build_model(tmp_path / "out", state, "float32")
    name = "model.layers.1.input_layernorm.weight"
    assert torch.equal(model.get_parameter(name) * 2, dense.get_parameter(name))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(model.get_parameter(name), dense.get_parameter(name) * 2)
    assert torch.allclose(logits(model, tokens), logits(dense, tokens), atol=1e-4)
    layers = Artifact(tmp_path / "out").manifest.layers
    assert all(layer.error == 0 for layer in layers)  # against what the stored weights stand for
    assert {layer.kind for layer in layers if layer.folded} == {f"self_attn.{part}_proj" for part in "qkv"}


class HalvesInTurn(BlockCompressor):
    """Rounds to multiples of 1/16 in the order of the groups, asking for statistics on the way."""

    needs = Needs("second_moment", sequential=True, within_block=True)

    def compress_block(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        shared: Shared | None,
        generator: torch.Generator,
    ) -> BlockResult:
        assert all(layer.second_moment is None for layer in block.layers)
        assert [len(group) for group in block.groups] == [3, 1, 2, 1]
        packed = {}
        last = block.layers[-1].name
        (before,) = block.refresh([last])
        for names in block.groups:
            for layer in block.refresh(names):
                assert layer.second_moment is not None
                weight = (16 * block.weight(layer.name)).round() / 16
                block.install(layer.name, weight)
                assert torch.equal(block.weight(layer.name), weight)
                packed[layer.name] = PackedLayer({"w": weight}, {"w": Role.KEPT})
        (after,) = block.refresh([last])
        assert before.second_moment is not None
        assert after.second_moment is not None
        assert not torch.allclose(before.second_moment, after.second_moment, rtol=1e-3)
        return BlockResult(packed)

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["w"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_block_compressor_may_refresh_its_statistics(tmp_path: Path, kind: Any) -> None:
    base = tiny_model(tmp_path / "base", kind)
    compressor = HalvesInTurn()
    if kind == "gpt2":  # its weights lie (in, out): `weight` and `install` turn them
        compressor = _InGpt2()
    drive(compressor, base, tmp_path / "out", tokens=tiny_tokens(base), needs=compressor.needs)
    for layer in Artifact(tmp_path / "out").manifest.layers:
        assert layer.error is not None
        assert layer.error > 0
        assert layer.calibrated_error is not None  # on the statistics that it last asked for


class _InGpt2(HalvesInTurn):
    def compress_block(self, block: Block, *args: Any) -> BlockResult:
        packed = {}
        for names in block.groups:
            for layer in block.refresh(names):
                weight = block.weight(layer.name)
                assert weight.shape == (layer.shape.out_features, layer.shape.in_features)
                assert layer.second_moment is not None
                assert layer.second_moment.shape[0] == layer.shape.in_features
                block.install(layer.name, (16 * weight).round() / 16)
                packed[layer.name] = PackedLayer({"w": block.weight(layer.name)}, {"w": Role.KEPT})
        return BlockResult(packed)


@pytest.mark.parametrize(
    "change",
    ["model.layers.{}.mlp.up_proj.weight", "model.norm.weight", "model.layers.9.input_layernorm.weight", "no.such"],
)
def test_a_block_may_not_change_what_is_not_its_own(tmp_path: Path, change: str) -> None:
    base = tiny_model(tmp_path / "base")
    compressor = RescaleNorms()
    compressor.change = change
    with pytest.raises(TrialFailed, match=r"^block 0: .* is not a tensor that a block may change"):
        drive(compressor, base, tmp_path / "out", tokens=tiny_tokens(base))


class LosesALayer(RescaleNorms):
    def compress_block(self, block: Block, *args: Any) -> BlockResult:
        result = super().compress_block(block, *args)
        result.layers.pop("model.layers.0.mlp.up_proj", None)
        return result


def test_a_block_that_loses_a_layer_fails(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    with pytest.raises(TrialFailed, match=r"block 0: .*model\.layers\.0\.mlp\.up_proj"):
        drive(LosesALayer(), base, tmp_path / "out", tokens=tiny_tokens(base))


class WholeHalf:
    """A model compressor: the state as float16, tied tensors once."""

    forget: ClassVar[tuple[str, ...]] = ()

    def compress(
        self, model: nn.Module, calibration: Tensor | None, writer: TensorWriter, generator: torch.Generator
    ) -> None:
        state = dict(model.named_parameters())
        for name, tensor in state.items():
            linear = ".layers." in name and tensor.dim() == 2 and name not in self.forget
            writer.write(
                name, tensor.detach().half(), Role.KEPT if linear else None, weights=tensor.numel() if linear else 0
            )
        writer.meta({"dtype": "float16"})

    def restore(self, reader: TensorReader) -> nn.Module:
        assert reader.meta() == {"dtype": "float16"}
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(reader.config)
        model.load_state_dict({k: t.float() for k, t in reader.tensors().items()}, strict=False)
        return model


class _Reader:
    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    def config(self) -> Any:
        return transformers.AutoConfig.from_pretrained(self.artifact.folder)

    def tensors(self) -> dict[str, Tensor]:
        return self.artifact.whole()

    def meta(self) -> dict[str, Any]:
        return self.artifact.whole_meta()


def test_a_model_compressor_stores_and_restores_the_whole(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", tied=True)
    compressor: ModelCompressor = WholeHalf()
    driver, stored = drive(compressor, base, tmp_path / "out")
    assert (stored.form, stored.whole_weights) == ("whole", driver.shapes.weights)
    artifact = Artifact(tmp_path / "out")
    model = compressor.restore(_Reader(artifact))
    tokens = tiny_tokens(base, 2, 16)
    dense = logits(open_model(base, "float32", "cpu"), tokens)
    assert (logits(model.eval(), tokens) - dense).norm() < 0.01 * dense.norm()
    facts = plan_model(ModelSource("tiny", base, "none"), "float32").facts
    ledger = measure_bits(tmp_path / "out", facts)
    assert ledger.bits.linear == 16 + 8 * ledger.roles["meta"] / driver.shapes.weights  # facts are billed too
    assert ledger.rest_bytes == 2 * (facts.parameters - facts.linear_weights)


def test_a_model_compressor_must_account_for_every_linear_weight(tmp_path: Path) -> None:
    """A linear layer that is stored as "rest" would not be billed in linear bits."""
    base = tiny_model(tmp_path / "base")
    compressor = WholeHalf()
    compressor.forget = ("model.layers.0.mlp.up_proj.weight",)  # type: ignore[misc]
    with pytest.raises(TrialFailed, match=r"linear weights"):
        drive(compressor, base, tmp_path / "out")


# -- memory --------------------------------------------------------------------------------------------------

STREAM = """
import json, re, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from evenbits.plugins import load_plugins
from evenbits.testing import compress_model

def high_water():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

def compress(base, out):
    rtn = load_plugins().compressors["rtn"].value
    compress_model(rtn, rtn.options(bits=4, group_size=64), base, out)

small, large, out = map(Path, sys.argv[1:])
out.mkdir()
compress(small, out / "small")  # what is imported and allocated once, whatever the model
before = high_water()
compress(large, out / "large")
print(json.dumps({"growth": high_water() - before, "size": (large / "model.safetensors").stat().st_size}))
"""


def write_plain_llama(base: Path, template: Path, blocks: int, hidden: int, intermediate: int) -> None:
    """A checkpoint without a model: config, tokenizer and random float32 tensors."""
    base.mkdir()
    for path in template.iterdir():
        if path.suffix == ".json":
            (base / path.name).write_bytes(path.read_bytes())
    edit_config(base, num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=intermediate)
    sizes = {f"self_attn.{k}_proj": (hidden, hidden) for k in "qkvo"}
    sizes |= {f"mlp.{kind}_proj": (intermediate, hidden) for kind in ("gate", "up")}
    sizes["mlp.down_proj"] = (hidden, intermediate)
    tensors = {"model.embed_tokens.weight": torch.zeros(39, hidden), "model.norm.weight": torch.ones(hidden)}
    for block in range(blocks):
        for kind, size in sizes.items():
            tensors[f"model.layers.{block}.{kind}.weight"] = torch.full(size, 0.01 * (block + 1))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(hidden)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc, which only Linux has")
def test_data_free_methods_stream_in_the_memory_of_a_block(tmp_path: Path) -> None:
    template = tiny_model(tmp_path / "template")
    write_plain_llama(tmp_path / "small", template, 1, 512, 512)
    write_plain_llama(tmp_path / "large", template, 24, 512, 512)  # 24 blocks of 7 MB
    command = [sys.executable, "-c", STREAM, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["size"] > 24 * 7e6
    assert found["growth"] < 0.2 * found["size"]
