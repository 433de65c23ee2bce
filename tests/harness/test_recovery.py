"""Recovery stages: what they may train, that it helps, and that it is stored and billed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evenbits import load
from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import (
    AnyCompressor,
    Compressor,
    Estimate,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelShapes,
    Options,
    PackedLayer,
    Recovery,
    Refusal,
    Role,
    Shared,
    Survey,
    TensorReader,
    TensorWriter,
    TunableModel,
)
from evenbits.errors import ArtifactError, TrialFailed
from evenbits.ledger import measure_bits
from evenbits.manifest import Manifest
from evenbits.models import build_model, open_model
from evenbits.planned_model import plan_model
from evenbits.plugins import load_plugins
from evenbits.recovery import LeaveDense, OpenedArtifact, RecoveryWork, recover
from evenbits.sources import ModelSource
from evenbits.subject import restore_state
from evenbits.testing import compress_model, tiny_model, tiny_tokens
from evenbits.whole import restore_whole

RTN = load_plugins().compressors["rtn"].value
OPTIONS = RTN.options.model_validate({"bits": 2, "group_size": 16})
CPU = torch.device("cpu")
NORM = {"llama": "model.layers.1.post_attention_layernorm.weight", "gpt2": "transformer.h.1.ln_2.weight"}
LAYER = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


def divergence(dense: Any, model: Any, tokens: Tensor) -> Tensor:
    """Mean KL(dense || model) of the next-token distributions, in nats."""
    with torch.no_grad():
        target = functional.log_softmax(dense(input_ids=tokens).logits.float(), dim=-1)
    found = functional.log_softmax(model(input_ids=tokens).logits.float(), dim=-1)
    return functional.kl_div(found.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")


class Tune:
    """A few Adam steps on the scales (or whatever is tunable), one norm, and an adapter of rank 2."""

    def __init__(self, *, scales: bool = True, norm: str | None = None, adapter: str | None = None) -> None:
        self.scales, self.norm, self.adapter = scales, norm, adapter

    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        dense = work.dense()
        trained: list[Tensor] = list(work.parameters.values()) if self.scales else []
        if self.norm:
            trained.append(work.rest()[self.norm].requires_grad_())
        if self.adapter:
            out_features, in_features = work.model.get_submodule(self.adapter)._restore().shape  # type: ignore[operator]
            a = nn.Parameter(0.1 * torch.randn(2, in_features, generator=generator))
            b = nn.Parameter(torch.zeros(out_features, 2))
            work.add_adapter(self.adapter, {"A": a, "B": b})
            trained += [a, b]
        optimiser = torch.optim.Adam(trained, lr=3e-3)
        for _ in range(15):
            optimiser.zero_grad()
            divergence(dense, work.model, work.calibration).backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def rtn() -> LayerCompressor:
    made = RTN.make(OPTIONS)
    assert isinstance(made, LayerCompressor)
    return made


def run_stage(
    stage: Any, before: Path, after: Path, base: Path, tokens: Tensor, compressor: AnyCompressor | None = None
) -> Manifest:
    work = RecoveryWork(
        Artifact(before), compressor or rtn(), stage, "toy", base, tokens, 0, CPU
    )  # fmt: skip
    with ArtifactWriter(after) as writer:
        return recover(work, writer, {"key": "1" * 16, "recovery": ({"name": "toy", "options": {}},)})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stage_brings_the_model_nearer_to_dense(tmp_path: Path, architecture: Any) -> None:
    base = tiny_model(tmp_path / "base", architecture, tied=architecture == "gpt2")
    tokens = tiny_tokens(base, 8, 32)
    before = compress_model(RTN, OPTIONS, base, tmp_path / "before")
    stage = Tune(norm=NORM[architecture], adapter=LAYER[architecture])
    after = run_stage(stage, tmp_path / "before", tmp_path / "after", base, tokens)
    dense, compressed, recovered = (
        open_model(base, "float32", "cpu"),
        load(tmp_path / "before"),
        load(tmp_path / "after"),
    )
    first, second = (float(divergence(dense, model, tokens)) for model in (compressed, recovered))
    assert second < 0.5 * first
    # what it trained was stored, in the dtypes of before; what it did not train is as it was
    assert after.recovery == ({"name": "toy", "options": {}},)
    assert after.method == before.method
    assert after.options == before.options
    for (_, one), (_, other) in zip(
        Artifact(tmp_path / "before").packed(), Artifact(tmp_path / "after").packed(), strict=True
    ):
        assert one.roles == other.roles
        assert torch.equal(one.tensors["codes"], other.tensors["codes"])
        assert other.tensors["scale"].dtype == torch.float16
        assert not torch.equal(one.tensors["scale"], other.tensors["scale"])
    rest_before, rest_after = Artifact(tmp_path / "before").rest(), Artifact(tmp_path / "after").rest()
    assert rest_before.keys() == rest_after.keys()
    assert {name for name in rest_before if not torch.equal(rest_before[name], rest_after[name])} == {
        NORM[architecture]
    }
    assert {layer.name: layer.error for layer in after.layers} != {layer.name: layer.error for layer in before.layers}


def test_the_stored_model_is_the_trained_one(tmp_path: Path) -> None:
    """The logits that the stage saw last are those of the artifact, up to the stored dtype of the scales."""
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    compress_model(RTN, OPTIONS, base, tmp_path / "before")

    class Keep(Tune):
        last: Tensor

        def recover(self, work: TunableModel, generator: torch.Generator) -> None:
            super().recover(work, generator)
            with torch.no_grad():
                self.last = work.model(input_ids=tokens).logits

    stage = Keep(norm=NORM["llama"], adapter=LAYER["llama"])
    run_stage(stage, tmp_path / "before", tmp_path / "after", base, tokens)
    with torch.no_grad():
        found = load(tmp_path / "after")(input_ids=tokens).logits
    assert (found - stage.last).norm() < 2e-3 * stage.last.norm()


def test_adapters_are_billed(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    facts = plan_model(ModelSource("tiny", base, "none"), "float32").facts
    compress_model(RTN, OPTIONS, base, tmp_path / "before")
    run_stage(Tune(adapter=LAYER["llama"]), tmp_path / "before", tmp_path / "after", base, tokens)
    before, after = (measure_bits(tmp_path / name, facts) for name in ("before", "after"))
    count = 2 * (48 + 88) * 4  # rank 2, float32: the evaluated dtype
    assert after.roles["adapter"] == count
    assert {role: n for role, n in after.roles.items() if role != "adapter"} == before.roles
    assert after.linear_bytes - before.linear_bytes == count
    assert after.bits.linear == pytest.approx(before.bits.linear + 8 * count / facts.linear_weights)
    assert after.rest_bytes == before.rest_bytes
    assert after.model_bytes >= before.model_bytes + count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_may_follow_the_dense_model(tmp_path: Path, dtype: str) -> None:
    base = tiny_model(tmp_path / "base", dtype=dtype)
    tokens = tiny_tokens(base, 4, 32)
    leave = LeaveDense(getattr(torch, dtype))
    descriptor = Compressor("dense", "", "", Options, lambda options: leave, _nothing, _refuse)
    compress_model(descriptor, Options(), base, tmp_path / "before", dtype=dtype)
    stage = Tune(scales=False, norm=NORM["llama"], adapter=LAYER["llama"])
    after = run_stage(stage, tmp_path / "before", tmp_path / "after", base, tokens, leave)
    assert all(layer.left_dense for layer in after.layers)
    model, dense = load(tmp_path / "after"), open_model(base, dtype, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    assert changed <= {NORM["llama"], LAYER["llama"] + ".weight"}
    if dtype == "float32":
        facts = plan_model(ModelSource("tiny", base, "none"), dtype).facts
        assert measure_bits(tmp_path / "after", facts).bits.linear > 32


def _nothing(options: Options, shapes: ModelShapes) -> Estimate:
    return Estimate(0.0, 0.0, {})


def _refuse(budget: Any, shapes: ModelShapes, fixed: Mapping[str, Any]) -> Refusal:
    return Refusal("a toy")


def test_stages_follow_each_other(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    compress_model(RTN, OPTIONS, base, tmp_path / "0")
    run_stage(Tune(adapter=LAYER["llama"]), tmp_path / "0", tmp_path / "1", base, tokens)
    run_stage(Tune(), tmp_path / "1", tmp_path / "2", base, tokens)
    one, two = Artifact(tmp_path / "1").adapters(), Artifact(tmp_path / "2").adapters()
    assert one.keys() == two.keys() == {LAYER["llama"]}
    assert all(torch.equal(x, y) for x, y in zip(one[LAYER["llama"]], two[LAYER["llama"]], strict=True))
    dense = open_model(base, "float32", "cpu")
    errors = [float(divergence(dense, load(tmp_path / name), tokens)) for name in "012"]
    assert errors[0] > errors[1] > errors[2]


def test_a_stage_is_deterministic_and_leaves_the_global_state(tmp_path: Path) -> None:
    from evenbits.testing import untouched_randomness

    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    compress_model(RTN, OPTIONS, base, tmp_path / "before")
    files = []
    for name in ("one", "two"):
        with untouched_randomness("a stage"):
            stage = Tune(adapter=LAYER["llama"])
            files.append(run_stage(stage, tmp_path / "before", tmp_path / name, base, tokens).files)
        torch.rand(1)
    assert files[0] == files[1]


class Halves(LayerCompressor):
    """Two halves: a shared factor that all layers train together, and the sign of each weight times its mean."""

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        return Shared({"factor": torch.ones(1)}, {"factor": Role.DECODER})

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        return PackedLayer({"w": (2 * weight).half()}, {"w": Role.KEPT})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        assert shared is not None
        return packed.tensors["w"].float() * shared.tensors["factor"]

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        assert shared is not None
        return {"shared/factor": shared.tensors["factor"]}


def test_shared_parts_are_one_parameter(tmp_path: Path) -> None:
    """Weights are stored twice as large: the stage finds that the shared factor should fall."""
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    halves = Halves()
    descriptor = Compressor("halves", "", "", Options, lambda options: halves, _nothing, _refuse)
    compress_model(descriptor, Options(), base, tmp_path / "before")
    opened = OpenedArtifact(Artifact(tmp_path / "before"), halves, base, tokens, CPU)
    assert list(opened.parameters) == ["shared/factor"]
    run_stage(Tune(), tmp_path / "before", tmp_path / "after", base, tokens, halves)
    before, after = (Artifact(tmp_path / name).shared for name in ("before", "after"))
    assert before is not None
    assert after is not None
    assert float(before.tensors["factor"]) == 1
    assert float(after.tensors["factor"]) < 0.99
    dense = open_model(base, "float32", "cpu")
    errors = []
    for name in ("before", "after"):
        state = restore_state(Artifact(tmp_path / name), halves)
        errors.append(float(divergence(dense, build_model(tmp_path / name, state, "float32"), tokens)))
    assert errors[1] < errors[0]


class Spoils(Tune):
    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        next(iter(work.parameters.values())).data.fill_(float("nan"))


class UnknownLayer(Tune):
    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        work.add_adapter("model.norm", {"A": torch.zeros(1, 48), "B": torch.zeros(48, 1)})


class WrongAdapter(Tune):
    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        work.add_adapter(LAYER["llama"], {"A": torch.zeros(2, 48), "B": torch.zeros(48, 2)})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Spoils(), r"^model\.layers\.0\.self_attn\.q_proj: the restored weight is not finite"),
        (UnknownLayer(), r"'model\.norm' is not a linear layer"),
        (WrongAdapter(), r"^model\.layers\.1\.mlp\.down_proj: .*adapter"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_stage_that_spoils_the_model_fails(tmp_path: Path, stage: Any, message: str) -> None:
    base = tiny_model(tmp_path / "base")
    compress_model(RTN, OPTIONS, base, tmp_path / "before")
    with pytest.raises(TrialFailed, match=message):
        run_stage(stage, tmp_path / "before", tmp_path / "after", base, tiny_tokens(base, 2, 16))
    assert not (tmp_path / "after").exists()


def test_descriptors_predict_what_is_billed(tmp_path: Path) -> None:
    """A recovery's `predict` is what the plan takes off the budget."""
    base = tiny_model(tmp_path / "base")
    compress_model(RTN, OPTIONS, base, tmp_path / "before")
    shapes = plan_model(ModelSource("tiny", base, "none"), "float32").shapes

    def predict(options: Options, shapes: ModelShapes) -> Mapping[Role, int]:
        layer = next(layer for layer in shapes.layers if layer.name == LAYER["llama"])
        return {Role.ADAPTER: 4 * 2 * (layer.in_features + layer.out_features)}

    found = Recovery("toy", "", "", Options, lambda options: Tune(adapter=LAYER["llama"]), predict)
    run_stage(found.make(Options()), tmp_path / "before", tmp_path / "after", base, tiny_tokens(base, 2, 16))
    facts = plan_model(ModelSource("tiny", base, "none"), "float32").facts
    ledger = measure_bits(tmp_path / "after", facts)
    assert ledger.roles["adapter"] == found.predict(Options(), shapes)[Role.ADAPTER]


def test_an_adapter_is_not_lost_to_a_second_one(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 2, 16)
    compress_model(RTN, OPTIONS, base, tmp_path / "0")
    run_stage(Tune(adapter=LAYER["llama"]), tmp_path / "0", tmp_path / "1", base, tokens)
    with pytest.raises(TrialFailed, match=r"has an adapter from a stage before"):
        run_stage(Tune(adapter=LAYER["llama"]), tmp_path / "1", tmp_path / "2", base, tokens)


class AddsHalf(Tune):
    """An adapter that is asked to be stored in float16."""

    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        shape = next(shape for shape in work.shapes if shape.name == self.adapter)
        a = torch.randn(2, shape.in_features, generator=generator)
        b = torch.randn(shape.out_features, 2, generator=generator)
        work.add_adapter(shape.name, {"A": a, "B": b}, dtype="float16")


class Merges(Tune):
    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        work.merge_adapters([LAYER["llama"]])


def test_adapters_keep_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    """What is billed and what the error is of are the rounded adapters, and a later stage leaves them as they are."""
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    facts = plan_model(ModelSource("tiny", base, "none"), "float32").facts
    compress_model(RTN, OPTIONS, base, tmp_path / "0")
    run_stage(AddsHalf(adapter=LAYER["llama"]), tmp_path / "0", tmp_path / "1", base, tokens)
    run_stage(Tune(), tmp_path / "1", tmp_path / "2", base, tokens)
    assert [measure_bits(tmp_path / name, facts).roles["adapter"] for name in "12"] == [2 * 2 * (48 + 88)] * 2
    one, two = (Artifact(tmp_path / name).adapters()[LAYER["llama"]] for name in "12")
    assert all(torch.equal(x, y) and x.dtype == y.dtype == torch.float16 for x, y in zip(one, two, strict=True))


def test_a_merged_adapter_leaves_its_layer_dense(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 32)
    facts = plan_model(ModelSource("tiny", base, "none"), "float32").facts
    compress_model(RTN, OPTIONS, base, tmp_path / "0")
    run_stage(AddsHalf(adapter=LAYER["llama"]), tmp_path / "0", tmp_path / "1", base, tokens)
    after = run_stage(Merges(), tmp_path / "1", tmp_path / "2", base, tokens)
    assert [layer.name for layer in after.layers if layer.left_dense] == [LAYER["llama"]]
    assert "adapters.safetensors" not in after.files
    weights = [load(tmp_path / name).get_parameter(LAYER["llama"] + ".weight") for name in "12"]
    assert torch.equal(*weights)
    one, two = (measure_bits(tmp_path / name, facts) for name in "12")
    assert two.roles["dense"] == 4 * 48 * 88
    assert "adapter" not in two.roles
    assert two.roles["code"] < one.roles["code"]
    assert two.left_dense == (LAYER["llama"],)
    assert two.bits.paper > one.bits.paper
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.mlp\.down_proj: has no adapter that could be merged"):
        run_stage(Merges(), tmp_path / "2", tmp_path / "3", base, tokens)


# -- whole models ----------------------------------------------------------------------------------------------


class Narrow:
    """A model compressor: leaves out the second half of every block's channels, and stores the rest in float16."""

    form = "plain"

    def compress(
        self, model: Any, calibration: Tensor | None, writer: TensorWriter, generator: torch.Generator
    ) -> None:
        for name, tensor in model.named_parameters():
            if "proj" not in name:
                writer.write(name, tensor, None)
                continue
            kept = self._cut(name, tensor).half()
            count = tensor.numel()
            if self.form == "doubled" and "down_proj" in name:
                writer.write(f"{name}.half", kept / 2, Role.KEPT, weights=count)
            else:
                writer.write(name, kept, Role.KEPT, weights=count)

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        if "mlp" not in name:
            return tensor
        return tensor[:, : tensor.shape[1] // 2] if "down_proj" in name else tensor[: tensor.shape[0] // 2]

    def restore(self, reader: TensorReader) -> nn.Module:
        from transformers import AutoModelForCausalLM

        config = reader.config
        config.intermediate_size //= 2
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        state = {k.removesuffix(".half"): 2 * t if k.endswith("half") else t for k, t in reader.tensors().items()}
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return model


class Doubled(Narrow):
    form = "doubled"


class Halved(Narrow):
    """Stores half of one layer's weight under the weight's own name."""

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        kept = super()._cut(name, tensor)
        return kept / 2 if "layers.1.mlp.down_proj" in name else kept

    def restore(self, reader: TensorReader) -> nn.Module:
        model = super().restore(reader)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(2)
        return model


class Gone(Narrow):
    """Has no second block's MLP any more."""

    def restore(self, reader: TensorReader) -> nn.Module:
        model = super().restore(reader)
        del model.get_submodule("model.layers.1.mlp").down_proj
        return model


def whole(folder: Path, compressor: Any, stage: Any, after: str = "after", before: str = "before") -> Manifest:
    """Run a stage on what the model compressor makes of the tiny model in `folder`."""
    base = folder / "base"
    if not base.exists():
        tiny_model(base)
    tokens = tiny_tokens(base, 4, 32)
    descriptor = Compressor("narrow", "", "", Options, lambda options: compressor, _nothing, _refuse)
    if not (folder / before).exists():
        compress_model(descriptor, Options(), base, folder / before)
    return run_stage(stage, folder / before, folder / after, base, tokens, compressor)


def logits_of(folder: Path, compressor: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = restore_whole(Artifact(folder), compressor)(input_ids=tokens).logits
    return found


def test_a_stage_follows_a_model_of_other_shapes(tmp_path: Path) -> None:
    """It meets the smaller layers, and what it saw last is what is stored: adapters beside the weights, and norms."""

    class Keep(Tune):
        def recover(self, work: TunableModel, generator: torch.Generator) -> None:
            assert work.parameters == {}
            sizes = {shape.name: (shape.out_features, shape.in_features, shape.dtype) for shape in work.shapes}
            assert sizes[LAYER["llama"]] == (48, 44, "float16")
            assert len(sizes) == 14
            assert all(work.restore(name).shape == size[:2] for name, size in sizes.items())
            assert set(work.rest()) >= {NORM["llama"], "model.embed_tokens.weight"}
            super().recover(work, generator)
            with torch.no_grad():
                self.last = work.model(input_ids=work.calibration).logits

    stage = Keep(scales=False, norm=NORM["llama"], adapter=LAYER["llama"])
    after = whole(tmp_path, Narrow(), stage)
    base, tokens = tmp_path / "base", tiny_tokens(tmp_path / "base", 4, 32)
    dense = open_model(base, "float32", "cpu")
    found = [restore_whole(Artifact(tmp_path / name), Narrow()) for name in ("before", "after")]
    first, second = (float(divergence(dense, model, tokens)) for model in found)
    assert second < 0.97 * first  # one norm and a rank of two, and half the channels are gone
    assert torch.allclose(logits_of(tmp_path / "after", Narrow(), tokens), stage.last, atol=1e-4)
    assert (after.model_form, after.whole_weights) == ("whole", Artifact(tmp_path / "before").manifest.whole_weights)
    one, two = (Artifact(tmp_path / name).whole() for name in ("before", "after"))
    assert {name for name in one if not torch.equal(one[name], two[name])} == {NORM["llama"]}
    facts = plan_model(ModelSource("tiny", base, "none"), "float32").facts
    before_bill, bill = (measure_bits(tmp_path / name, facts) for name in ("before", "after"))
    assert bill.roles == {**before_bill.roles, "adapter": 4 * 2 * (48 + 44)}
    assert bill.rest_bytes == before_bill.rest_bytes
    # a stage after that finds the adapter
    with pytest.raises(TrialFailed, match="has an adapter from a stage before"):
        whole(tmp_path, Narrow(), Tune(scales=False, adapter=LAYER["llama"]), "more", "after")


def test_merging_into_a_whole_model_adds_no_byte(tmp_path: Path) -> None:
    whole(tmp_path, Narrow(), Tune(scales=False, adapter=LAYER["llama"]))
    whole(tmp_path, Narrow(), Merges(), "merged", "after")
    tokens = tiny_tokens(tmp_path / "base", 4, 32)
    facts = plan_model(ModelSource("tiny", tmp_path / "base", "none"), "float32").facts
    bills = [measure_bits(tmp_path / name, facts) for name in ("before", "merged")]
    assert bills[0].roles == bills[1].roles
    assert Artifact(tmp_path / "merged").whole()[LAYER["llama"] + ".weight"].dtype == torch.float16
    beside, merged = (logits_of(tmp_path / name, Narrow(), tokens) for name in ("after", "merged"))
    assert 0 < (beside - merged).norm() < 1e-3 * beside.norm()
    assert (beside - logits_of(tmp_path / "before", Narrow(), tokens)).norm() > 1e-2 * beside.norm()
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.mlp\.down_proj: has no adapter that could be merged"):
        whole(tmp_path, Narrow(), Merges(), "again", "merged")


def test_what_no_stage_can_do_with_a_whole_model(tmp_path: Path) -> None:
    whole(tmp_path, Doubled(), Tune(scales=False, adapter=LAYER["llama"]))
    with pytest.raises(TrialFailed, match=r"down_proj: method 'narrow' stores its weight in a form of its own"):
        whole(tmp_path, Doubled(), Merges(), "merged", "after")
    whole(tmp_path, Halved(), Tune(scales=False, adapter=LAYER["llama"]), "adapted", "halved")
    with pytest.raises(TrialFailed, match=r"down_proj: method 'narrow' stores its weight in a form of its own"):
        whole(tmp_path, Halved(), Merges(), "merged", "adapted")
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.mlp\.down_proj: method 'narrow' left no such layer"):
        whole(tmp_path, Gone(), Merges(), "gone", "before")
    with pytest.raises(ArtifactError, match="stores a whole model, but method 'narrow' restores layers"):
        restore_whole(Artifact(tmp_path / "before"), rtn())
