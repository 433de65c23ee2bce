"""LoRA: what is trained is PEFT's, helps, is stored as it was trained, and is billed to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from evenbits import load
from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import Compressor, Estimate, LayerCompressor, Options, Refusal, Role, TunableModel
from evenbits.errors import MissingExtra, SuiteError, TrialFailed
from evenbits.ledger import measure_bits
from evenbits.manifest import Manifest
from evenbits.models import open_model
from evenbits.planned_model import PlannedModel, plan_model
from evenbits.plugins import load_plugins
from evenbits.recovery import LeaveDense, OpenedArtifact, RecoveryWork, recover
from evenbits.sources import ModelSource
from evenbits.store import Results
from evenbits.testing import compress_model, tiny_model, tiny_text, tiny_tokens, untouched_randomness
from evenbits_lora import provide_recoveries
from evenbits_lora.options import LoraOptions, predict, select
from evenbits_lora.stage import LoraStage, add_lora, factors, frozen_linears
from evenbits_lora.train import batch_loss, rate

pytest.importorskip("peft", reason='needs pip install "evenbits[lora]"')

RTN = load_plugins().compressors["rtn"].value
KMEANS = load_plugins().compressors["kmeans"].value
TWO_BITS = RTN.options.model_validate({"bits": 2, "group_size": 16})
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"r": 4, "alpha": 8.0, "lr": 1e-2, "batch_size": 8}


class Made:
    """A tiny model, its tokens, and what a method made of it in `before`; stages are run on that."""

    def __init__(self, folder: Path, method: str = "rtn", architecture: Any = "llama", dtype: str = "float32") -> None:
        self.folder, self.dtype = folder, dtype
        self.base = tiny_model(folder / "base", architecture, tied=architecture == "gpt2", dtype=dtype)
        self.tokens = tiny_tokens(self.base, 32, 24)
        options: Options = TWO_BITS
        if method == "dense":
            self.compressor: LayerCompressor = LeaveDense(getattr(torch, dtype))
            descriptor, options = _dense(self.compressor), Options()
        elif method == "kmeans":
            options = KMEANS.options.model_validate({"d": 4, "codebook_size": 16, "scope": "model"})
            descriptor, self.compressor = KMEANS, KMEANS.make(options)  # type: ignore[assignment]
        else:
            descriptor, self.compressor = RTN, RTN.make(options)  # type: ignore[assignment]
        compress_model(descriptor, options, self.base, folder / "before", dtype=dtype)

    @property
    def planned(self) -> PlannedModel:
        return plan_model(ModelSource("tiny", self.base, "none"), self.dtype)

    def run(self, stage: Any, after: str = "after", before: str = "before", seed: int = 0) -> Manifest:
        work = RecoveryWork(
            Artifact(self.folder / before), self.compressor, stage, "lora", self.base, self.tokens, seed, CPU
        )
        with ArtifactWriter(self.folder / after) as writer:
            return recover(work, writer, {"key": "1" * 16, "recovery": ({"name": "lora", "options": {}},)})

    def opened(self, name: str = "before") -> OpenedArtifact:
        return OpenedArtifact(Artifact(self.folder / name), self.compressor, self.base, self.tokens, CPU)

    def loss(self, name: str) -> float:
        with torch.no_grad():
            return float(batch_loss(load(self.folder / name), self.tokens))

    def bill(self, name: str) -> Any:
        return measure_bits(self.folder / name, self.planned.facts)


def _dense(compressor: LayerCompressor) -> Compressor:
    def cost(options: Any, shapes: Any) -> Estimate:
        return Estimate(0.0, 0.0, {})

    return Compressor("dense", "", "", Options, lambda _: compressor, cost, lambda *_: Refusal("none"))


def stage(**options: Any) -> LoraStage:
    return LoraStage(LoraOptions(**{**QUICK, **options}))


# -- options --------------------------------------------------------------------------------------------------


def test_defaults_are_pocketllms() -> None:
    """arXiv:2511.17637's recipe: rank 32, alpha 64, 3 epochs, batch 16, lr 1e-4; adapters are stored, not merged."""
    options = LoraOptions()
    assert (options.r, options.alpha, options.epochs, options.batch_size, options.lr) == (32, 64, 3, 16, 1e-4)
    assert (options.dropout, options.targets, options.merge, options.loss) == (0, "all", False, "next-token")
    assert options.preset == "pocketllm"


def test_qloras_published_settings() -> None:
    """arXiv:2305.14314, appendix B: r 64, alpha 16, dropout 0.1, 2e-4 constant, batch 16, beta2 0.999, norm 0.3."""
    options = LoraOptions(preset="qlora")
    assert (options.r, options.alpha, options.dropout, options.lr) == (64, 16, 0.1, 2e-4)
    assert (options.schedule, options.warmup, options.batch_size) == ("constant", 0, 16)
    assert (options.beta2, options.max_grad_norm, options.weight_decay) == (0.999, 0.3, 0)
    assert options.targets == "all"
    # what is given wins, and what was dumped is read as it was
    given = LoraOptions.model_validate({"preset": "qlora", "r": 8, "max_grad_norm": None})
    assert (given.r, given.max_grad_norm, given.alpha) == (8, None, 16)
    assert LoraOptions.model_validate(json.loads(given.model_dump_json())) == given
    assert given.model_dump(mode="json")["lr"] == 2e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "other"}, "pocketllm"),
        ({"r": 0}, "greater than or equal to 1"),
        ({"targets": []}, "empty list"),
        ({"targets": "some"}, "all"),
        ({"rank": 4}, "Extra inputs"),
        ({"warmup": 1}, "less than 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraOptions.model_validate(given)


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in LoraOptions.model_fields.values())
    (descriptor,) = provide_recoveries()
    assert (descriptor.name, descriptor.options) == ("lora", LoraOptions)


def test_learning_rates() -> None:
    linear = LoraOptions(schedule="linear", warmup=0.2)
    rates = [rate(linear, step, 10) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = LoraOptions(schedule="cosine")
    assert [rate(cosine, step, 4) for step in (0, 2)] == pytest.approx([1, 0.5])
    assert {rate(LoraOptions(schedule="constant"), step, 4) for step in range(4)} == {1.0}


def test_targets(tmp_path: Path) -> None:
    shapes = plan_model(ModelSource("tiny", tiny_model(tmp_path / "base"), "none"), "float32").shapes

    def kinds(*targets: str) -> list[str]:
        return [layer.kind for layer in select(LoraOptions(targets=targets), shapes.layers)]

    assert kinds("q_proj", "mlp.down_proj") == ["self_attn.q_proj", "mlp.down_proj"] * 2
    assert kinds("model.layers.1.self_attn.q_proj") == ["self_attn.q_proj"]
    assert len(select(LoraOptions(), shapes.layers)) == 14
    with pytest.raises(SuiteError, match=r"^lora: target 'c_attn' is no linear layer of this model; there are: self_"):
        kinds("q_proj", "c_attn")
    with pytest.raises(SuiteError, match="'proj'"):
        predict(LoraOptions(targets=("proj",)), shapes)  # a part of a name is no name


# -- what training does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["rtn", "kmeans", "dense"])
def test_the_loss_falls_and_only_adapters_are_stored(tmp_path: Path, method: str, architecture: str) -> None:
    made = Made(tmp_path, method, architecture)
    made.run(stage())
    assert made.loss("after") < made.loss("before") - 0.1
    before, after = Artifact(tmp_path / "before"), Artifact(tmp_path / "after")
    for (one, packed), (other, same) in zip(before.packed(), after.packed(), strict=True):
        assert one.roles == other.roles
        assert all(torch.equal(packed.tensors[key], same.tensors[key]) for key in packed.tensors)
    assert all(torch.equal(tensor, after.rest()[name]) for name, tensor in before.rest().items())
    assert set(after.adapters()) == {layer.name for layer in after.layers}
    assert before.manifest.paper_bits == after.manifest.paper_bits


def test_distilling_brings_it_nearer_to_dense(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.run(stage(loss="distill"))
    dense = open_model(made.base, "float32", CPU)
    with torch.no_grad():
        first, second = (float(batch_loss(load(tmp_path / n), made.tokens, dense)) for n in ("before", "after"))
    assert second < 0.8 * first


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_stored_model_is_the_trained_one(tmp_path: Path, architecture: str, dtype: str) -> None:
    """The logits under PEFT at the end are those of the artifact, within the dtype of the adapters."""
    made = Made(tmp_path, architecture=architecture)

    class Keep(LoraStage):
        last: Tensor

        def recover(self, work: TunableModel, generator: torch.Generator) -> None:
            class_train = sys.modules["evenbits_lora.stage"].train

            def train(model: nn.Module, *arguments: Any) -> Any:
                found = class_train(model, *arguments)
                with torch.no_grad():
                    self.last = model(input_ids=made.tokens).logits
                return found

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("evenbits_lora.stage.train", train)
                super().recover(work, generator)

    keep = Keep(LoraOptions(**{**QUICK, "dtype": dtype}))
    made.run(keep)
    with torch.no_grad():
        found = load(tmp_path / "after")(input_ids=made.tokens).logits
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    assert (found - keep.last).norm() < tolerance * keep.last.norm()
    stored = {tensor.dtype for pair in Artifact(tmp_path / "after").adapters().values() for tensor in pair}
    assert stored == {getattr(torch, dtype)}


def test_the_update_is_pefts(tmp_path: Path) -> None:
    """The base that PEFT sees is what is restored; B A is PEFT's own delta; adding it is what PEFT's merge does."""
    made = Made(tmp_path)
    work = made.opened()
    names = [shape.name for shape in work.shapes]
    originals = [work.model.get_submodule(name) for name in names]
    with frozen_linears(work):
        layers = add_lora(work.model, names, LoraOptions(r=4, alpha=6))
        for name, layer in layers.items():
            assert type(layer).__module__ == "peft.tuners.lora.layer"
            assert torch.equal(layer.get_base_layer().weight, work.restore(name))
            a, b = factors(layer)
            assert a.abs().max() > 0
            assert not b.any()
            nn.init.normal_(layer.lora_B["evenbits"].weight)
            a, b = factors(layer)
            assert torch.allclose(b @ a, layer.get_delta_weight("evenbits"), atol=1e-6)
            work.add_adapter(name, {"A": a, "B": b})
            layer.merge()
            assert torch.allclose(layer.get_base_layer().weight, work.restore(name), atol=1e-5)
    assert [work.model.get_submodule(name) for name in names] == originals


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}], ids=["plain", "dropout"])
def test_it_depends_on_its_seed_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    made = Made(tmp_path)
    files = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        with untouched_randomness("lora"):
            files[name] = made.run(stage(**options), name, seed=seed).files
        torch.rand(3)
    assert files["one"] == files["two"]
    assert files["one"] != files["other"]


def test_dropout_is_in_use_and_the_models_own_is_not(tmp_path: Path) -> None:
    """GPT-2's config asks for a dropout of 0.1 in training: two forward passes differ by ours alone."""
    made = Made(tmp_path, architecture="gpt2")
    work = made.opened()
    names = [shape.name for shape in work.shapes]
    for dropout, same in ((0.0, True), (0.5, False)):
        with frozen_linears(work):
            for layer in add_lora(work.model, names, LoraOptions(r=4, dropout=dropout)).values():
                nn.init.normal_(layer.lora_B["evenbits"].weight)
            one, two = (work.model(input_ids=made.tokens).logits for _ in range(2))
        assert torch.equal(one, two) is same


def test_micro_batches_are_one_batch(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.run(stage(dtype="float32"), "whole")
    made.run(stage(dtype="float32", micro_batch_size=3), "parts")
    whole, parts = (Artifact(tmp_path / name).adapters() for name in ("whole", "parts"))
    for name, pair in whole.items():
        for one, other in zip(pair, parts[name], strict=True):
            assert (one - other).norm() < 1e-3 * one.norm()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    made = Made(tmp_path, dtype=dtype)
    made.run(stage())
    assert made.loss("after") < made.loss("before") - 0.1


def test_a_loss_that_explodes_is_one_clear_line(tmp_path: Path) -> None:
    made = Made(tmp_path)
    with pytest.raises(TrialFailed, match=r"^lora: the loss is (nan|inf) at update \d+ of 12; lower lr$"):
        made.run(stage(lr=1e30, max_grad_norm=None))
    assert not (tmp_path / "after").exists()


# -- bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "kmeans", "dense"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("targets", ["all", ("q_proj", "v_proj")], ids=["all", "q,v"])
def test_predicted_bytes_are_written(tmp_path: Path, method: str, dtype: str, targets: Any) -> None:
    made = Made(tmp_path, method)
    options = {"targets": targets, "dtype": dtype, "epochs": 1}
    made.run(stage(**options))
    predicted = predict(LoraOptions(**{**QUICK, **options}), made.planned.shapes)
    assert {role for role, count in predicted.items() if count} == {Role.ADAPTER}
    before, after = made.bill("before"), made.bill("after")
    assert after.roles == {**before.roles, "adapter": predicted[Role.ADAPTER]}
    assert after.linear_bytes == before.linear_bytes + sum(predicted.values())
    assert after.rest_bytes == before.rest_bytes


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_dense_again(tmp_path: Path, architecture: str, dtype: str) -> None:
    made = Made(tmp_path, "kmeans", architecture, dtype)
    merged, apart = made.run(stage(merge=True), "merged"), made.run(stage(dtype="float32"), "apart")
    predicted = predict(LoraOptions(merge=True, **QUICK), made.planned.shapes)
    ledger, facts = made.bill("merged"), made.planned.facts
    assert ledger.roles == {"dense": facts.linear_bytes} == dict(predicted)
    assert ledger.bits.linear == ledger.bits.paper == 8 * facts.linear_bytes / facts.linear_weights
    assert (ledger.bits.index, ledger.compressed_weights) == (0, 0)
    assert len(ledger.left_dense) == len(merged.layers)
    assert "shared.safetensors" not in merged.files  # a codebook that nothing is decoded from
    assert "shared.safetensors" in apart.files
    with torch.no_grad():
        one, other = (load(tmp_path / name)(input_ids=made.tokens).logits.float() for name in ("merged", "apart"))
    assert (one - other).norm() <= (1e-5 if dtype == "float32" else 2e-2) * other.norm()


def test_merging_some_layers(tmp_path: Path) -> None:
    """Dense where merged, as before elsewhere, and the paper's bits weighed by both."""
    made = Made(tmp_path)
    options = {"merge": True, "targets": ("down_proj",)}
    after = made.run(stage(**options))
    assert {layer.name for layer in after.layers if layer.left_dense} == {
        f"model.layers.{block}.mlp.down_proj" for block in range(2)
    }
    ledger, before, shapes = made.bill("after"), made.bill("before"), made.planned.shapes
    dense = predict(LoraOptions(**{**QUICK, **options}), shapes)[Role.DENSE]
    assert ledger.roles["dense"] == dense == 4 * 2 * 48 * 88
    # what the compressor would have cost on the other layers alone
    others = replace(shapes, layers=tuple(layer for layer in shapes.layers if layer.kind != "mlp.down_proj"))
    assert ledger.linear_bytes - dense == RTN.predict(TWO_BITS, others).linear_bytes
    share = 2 * 48 * 88 / shapes.weights
    assert ledger.bits.paper == pytest.approx((1 - share) * before.bits.paper + share * 32)


# -- stages after each other ----------------------------------------------------------------------------------


def test_a_second_adapter_is_refused_before_any_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path)
    made.run(stage(targets=("q_proj",)), "one")
    capsys.readouterr()
    with pytest.raises(TrialFailed, match=r"^model\.layers\.0\.self_attn\.q_proj: has an adapter from a stage before"):
        made.run(stage(), "two", before="one")
    assert capsys.readouterr().out == ""
    # on other layers, and after a merge, it may follow; the first adapter is then kept as it is
    made.run(stage(targets=("down_proj",), dtype="float32"), "others", before="one")
    one, others = (Artifact(tmp_path / name).adapters() for name in ("one", "others"))
    for name, pair in one.items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(pair, others[name], strict=True))
    assert len(others) == 2 * len(one)
    assert made.loss("others") < made.loss("one")
    made.run(stage(merge=True), "merged")
    made.run(stage(), "again", before="merged")
    assert made.loss("again") < made.loss("merged")


def test_an_adapter_that_its_dtype_cannot_hold(tmp_path: Path) -> None:
    made = Made(tmp_path)

    class Large:
        def recover(self, work: TunableModel, generator: torch.Generator) -> None:
            name = work.shapes[0].name
            tensors = {"A": torch.full((1, 48), 1e5), "B": torch.full((48, 1), 1e-5)}
            work.add_adapter(name, tensors, dtype="float16")

    with pytest.raises(
        TrialFailed, match=r"^model\.layers\.0\.self_attn\.q_proj: its adapter is not finite in float16"
    ):
        made.run(Large())


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r'^peft is not installed: pip install "evenbits\[lora\]"$'):
        made.run(stage())


# -- a run ----------------------------------------------------------------------------------------------------

SUITE = """
name = "lora"
model = {{ path = "{model}", name = "tiny" }}
dtype = "float32"
budgets = [{{ centre = 6.5, window = 0.5 }}]
methods = [
    {{ name = "nf4", label = "qlora", budget = "free", options = {{ double_quant = true }}, recovery = [
        {{ name = "lora", options = {{ preset = "qlora", r = 2 }} }},
    ] }},
    {{ name = "nf4", recovery = [{{ name = "lora", options = {{ r = 2, lr = 1e-2, batch_size = 4 }} }}] }},
    {{ name = "kmeans", label = "merged", budget = "free", recovery = [
        {{ name = "lora", options = {{ r = 2, merge = true }} }},
    ] }},
    {{ name = "kmeans", label = "partly", budget = "free", options = {{ scope = "kind", d = 2 }}, recovery = [
        {{ name = "lora", options = {{ r = 2, merge = true, targets = ["q_proj"] }} }},
    ] }},
    {{ name = "rtn", label = "too-large", recovery = [{{ name = "lora", options = {{ r = 40 }} }}] }},
]
dense_recovery = [[{{ name = "lora", options = {{ r = 2, lr = 1e-2, batch_size = 4 }} }}]]

[calibration]
corpus = {{ name = "text", path = "{train}" }}
samples = 16
length = 32

[[evaluators]]
name = "perplexity"
options.corpus = {{ name = "text", path = "{test}" }}
options.context = 32
"""


def test_a_suite_with_qlora_and_the_dense_model(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    paths = {"model": model, "train": tmp_path / "train.txt", "test": tmp_path / "test.txt"}
    words = tiny_text(6000).split()
    for name, part in (("train", words[:3000]), ("test", words[3000:])):
        paths[name].write_text(" ".join(part))
    text = SUITE.format(**paths)
    assert tomllib.loads(text)["name"] == "lora"
    (tmp_path / "suite.toml").write_text(text)
    command = [sys.executable, "-m", "evenbits.cli", "run", "suite.toml", "--results", "results", "--no-report"]
    environment = {**os.environ, "EVENBITS_DISABLE": "mlflow"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    records = Results(tmp_path / "results").records("lora")[0]
    found: dict[tuple[str, ...], Any] = {(record.label, *record.recovery): record for record in records}
    labels = ("dense", "qlora", "nf4", "merged", "partly", "too-large")
    assert found.keys() == {("dense",), *((label, "lora") for label in labels)}
    skipped = found.pop(("too-large", "lora"))
    assert skipped.status == "skipped"
    assert "the recovery stage alone takes" in skipped.reason
    assert {record.status for record in found.values()} == {"done"}
    for label in ("qlora", "nf4", "merged", "partly"):
        record = found[label, "lora"]
        assert record.ledger.bits.linear == record.predicted.linear
    assert found["nf4", "lora"].within_budget is True
    assert found["merged", "lora"].ledger.bits.linear == 32
    dumped = found["qlora", "lora"].recovery_options[0]
    assert (dumped["r"], dumped["alpha"], dumped["dropout"]) == (2, 16, 0.1)
    perplexity = {key: record.metrics[0].value for key, record in found.items()}
    assert perplexity["dense", "lora"] < 0.9 * perplexity[("dense",)]
    assert perplexity["nf4", "lora"] < 0.9 * perplexity[("dense",)]
    assert found["dense", "lora"].ledger.roles.keys() == {"dense", "adapter"}
    log = (tmp_path / "results/runs/lora" / found["nf4", "lora"].trial / "log.txt").read_text()
    assert "lora: epoch 3 of 3, 12 of 12 updates: next-token" in log
