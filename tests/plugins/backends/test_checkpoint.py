"""Published checkpoints: evaluated to the right logits, billed from their files, refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugins.backends.small_checkpoints import AQLM, Small, aqlm, vptq, vptq_config, write_checkpoint
from torch import Tensor

from evenbits.artifact import Artifact
from evenbits.budget import BitBudget
from evenbits.compressor import LayerCompressor, Refusal, Role
from evenbits.errors import SuiteError, TrialFailed
from evenbits.ledger import measure_bits
from evenbits.models import build_model
from evenbits.plan import make_plan
from evenbits.planned_model import plan_model
from evenbits.plugins import load_plugins
from evenbits.shapes import read_inventory
from evenbits.sources import DigestCache, find_model
from evenbits.subject import load_artifact
from evenbits.suite import read_suite
from evenbits.suite_errors import check_options
from evenbits.suite_spec import ModelSpec
from evenbits.testing import compress_model, tiny_model, tiny_tokens
from evenbits_backends.layout import Grid, recognise
from evenbits_backends.libraries.checkpoint import CheckpointOptions, descriptor
from evenbits_backends.located import remote_headers, snapshot
from evenbits_backends.published import PublishedCheckpoint, offset_share
from evenbits_backends.trust import check_forward, plain_rounding

METHOD = descriptor()
GOLDEN = Path(__file__).parent / "golden"
DENSE = ("model.layers.1.mlp.down_proj",)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "base", "llama", hidden=32, intermediate=44)


@pytest.fixture(scope="module")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    folder = tmp_path_factory.mktemp("published")
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer, _ in read_inventory(base).layers}
    found = {
        "aqlm": write_checkpoint(base, folder / "tiny-AQLM-2Bit-2x6", aqlm, AQLM, DENSE),
        "vptq": write_checkpoint(base, folder / "tiny-v4-k32-8-woft", vptq, vptq_config(shapes)),
    }
    # its norms were trained after quantization, as AQLM's are
    found["aqlm"].edit(lambda tensors: tensors["model.norm.weight"].mul_(1.25))
    return found


@pytest.fixture
def copy(published: dict[str, Small], tmp_path: Path) -> Callable[[str], Small]:
    """A checkpoint that a test may spoil."""

    def copied(which: str) -> Small:
        there = published[which]
        return Small(Path(shutil.copytree(there.folder, tmp_path / there.folder.name)), there.weights)

    return copied


def options(folder: Path) -> CheckpointOptions:
    return CheckpointOptions(path=str(folder))


def compress(base: Path, checkpoint: Small, folder: Path, dtype: str = "float32") -> Any:
    return compress_model(METHOD, options(checkpoint.folder), base, folder, dtype=dtype)


# -- what it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["aqlm", "vptq"])
def test_evaluates_to_the_logits_of_what_it_stands_for(
    base: Path, published: dict[str, Small], which: str, tmp_path: Path
) -> None:
    small = published[which]
    compress(base, small, tmp_path / "artifact")
    tokens = tiny_tokens(base, 2, 16)
    stored = load_file(small.folder / "model.safetensors")
    state = {name: stored[name].float() for name in load_file(base / "model.safetensors") if name in stored}
    state |= {f"{name}.weight": weight for name, weight in small.weights.items()}
    expected = build_model(base, state, "float32")(tokens).logits
    dense = load_file(base / "model.safetensors")
    original = build_model(base, dense, "float32")(tokens).logits
    found = load_artifact(tmp_path / "artifact", load_plugins())(tokens).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, original, rtol=1e-2, atol=1e-2)


def by_hand(base: Path, which: str) -> dict[Role, int]:
    """Bytes as the two layouts are described in words."""
    counted = {Role.CODE: 0, Role.CODEBOOK: 0, Role.SCALE: 0}
    for layer, _ in read_inventory(base).layers:
        rows, columns = layer.out_features, layer.in_features
        if which == "aqlm" and layer.name in DENSE:
            counted[Role.DENSE] = 2 * rows * columns  # at the dtype it is evaluated in, bfloat16
        elif which == "aqlm":
            counted[Role.CODE] += 2 * rows * columns // 4
            counted[Role.CODEBOOK] += 2 * 64 * 4 * 2
            counted[Role.SCALE] += 2 * rows
        else:
            counted[Role.CODE] += -(-rows // 4) * 4 * -(-columns * 8 // 32)
            counted[Role.CODEBOOK] += (32 + 8) * 4 * 2
            for role in (Role.MASK, Role.SCALE, Role.ZERO):
                counted[role] = counted.get(role, 0) + 2 * columns
    return counted


@pytest.mark.parametrize(("which", "claimed"), [("aqlm", 2.0), ("vptq", 2.0)])
def test_bits_are_those_of_its_files_beside_the_claimed(
    base: Path, published: dict[str, Small], which: str, claimed: float, tmp_path: Path
) -> None:
    manifest = compress(base, published[which], tmp_path / "artifact", "bfloat16")
    model = plan_model(find_model(ModelSpec(path=str(base)), load_plugins(), DigestCache(None)), "bfloat16")
    estimate = METHOD.predict(options(published[which].folder), model.shapes)
    ledger = measure_bits(tmp_path / "artifact", model.facts)
    assert {role.value: count for role, count in estimate.role_bytes.items()} == ledger.roles
    meta = estimate.role_bytes[Role.META]
    assert {**estimate.role_bytes, Role.META: 0} == {**by_hand(base, which), Role.META: 0}
    assert meta < 300
    assert estimate.linear_bytes == ledger.linear_bytes
    assert estimate.index_bits == pytest.approx(ledger.bits.index)
    assert estimate.paper_bits == claimed
    assert ledger.bits.linear > claimed + 1  # codebooks, scales, a layer left dense: of matrices so small, most of it
    stored = load_file(published[which].folder / "model.safetensors")
    artifact = load_file(tmp_path / "artifact" / manifest.layers[0].file)
    name = manifest.layers[0].name
    for part in manifest.layers[0].roles:  # verbatim
        assert torch.equal(artifact[f"{name}/{part}"], stored[f"{name}.{part}"])
    assert ledger.left_dense == (DENSE if which == "aqlm" else ())


def test_claims(base: Path, published: dict[str, Small], tmp_path: Path) -> None:
    folder = published["aqlm"].folder
    assert options(folder).claimed == 2.0
    assert CheckpointOptions(path=str(folder), claimed=2.5).claimed == 2.5
    nameless = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    assert options(nameless).claimed is None
    shapes = read_inventory(base).shapes("float32")
    assert METHOD.predict(options(nameless), shapes).paper_bits == 3.0  # 2 codebooks of 6 bits for 4 weights
    assert options(folder).shown() == ("claimed", "path")


def test_fit_takes_it_or_says_its_bits(base: Path, published: dict[str, Small]) -> None:
    shapes, given = read_inventory(base).shapes("bfloat16"), {"path": str(published["vptq"].folder)}
    bits = METHOD.predict(options(published["vptq"].folder), shapes).linear_bits(shapes)
    assert METHOD.fit(BitBudget(round(bits, 1), 0.1), shapes, given) == options(published["vptq"].folder)
    refused = METHOD.fit(BitBudget(2.0, 0.05), shapes, given)
    assert isinstance(refused, Refusal)
    assert f"its files take {bits:.3f} bits, outside 2 +- 0.05 linear bits" in refused.reason


SUITE = """
name = "published"
model = {{ path = "{base}", name = "tiny" }}
dtype = "float32"
methods = [
    {{ name = "checkpoint", label = "theirs", options.path = "{path}", budget = "free" }},
    {{ name = "rtn", options.bits = 3, budget = "free" }},
]
[[evaluators]]
name = "perplexity"
options.corpus = {{ name = "text", path = "{text}" }}
options.context = 16
"""


@pytest.fixture
def suite(base: Path, tmp_path: Path) -> Callable[[Path], Path]:
    from evenbits.testing import tiny_text

    text = tmp_path / "text.txt"
    text.write_text(tiny_text(300))

    def written(path: Path) -> Path:
        file = tmp_path / "suite.toml"
        file.write_text(SUITE.format(base=base, path=path, text=text))
        return file

    return written


def test_other_files_are_another_trial(copy: Callable[[str], Small], suite: Callable[[Path], Path]) -> None:
    small = copy("aqlm")

    def trials() -> dict[str, str]:
        registry = load_plugins()
        return {
            trial.label: trial.id for trial in make_plan(read_suite(suite(small.folder), registry), registry).trials
        }

    first = trials()
    assert trials() == first
    (small.folder / "README.md").write_text("words")
    assert trials() == first
    small.edit(lambda tensors: tensors["model.layers.0.mlp.up_proj.codes"].bitwise_xor_(1))
    changed = trials()
    assert changed["theirs"] != first["theirs"]
    assert changed["rtn"] == first["rtn"]


def test_a_whole_run_and_its_report(published: dict[str, Small], suite: Callable[[Path], Path], tmp_path: Path) -> None:
    """Claimed bits stand beside measured ones in the record, in the terminal's table and on the page."""
    file, results = suite(published["aqlm"].folder), tmp_path / "results"
    file.write_text(re.sub(r".*rtn.*\n", "", file.read_text()))
    ran = subprocess.run(
        [sys.executable, "-m", "evenbits.cli", "run", str(file), "--results", str(results)],
        capture_output=True, text=True, env={**os.environ, "EVENBITS_DISABLE": "mlflow", "COLUMNS": "200"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr + ran.stdout
    records = [json.loads(path.read_text()) for path in results.glob("runs/published/*/record.json")]
    (record,) = [record for record in records if record["label"] == "theirs"]
    assert record["status"] == "done"
    bits = record["ledger"]["bits"]
    assert bits["paper"] == 2.0
    assert bits["linear"] == pytest.approx(record["predicted"]["linear"])
    lines = [line.split() for line in ran.stdout.splitlines() if "theirs" in line and "2.000" in line]
    assert any(f"{bits['linear']:.3f}" in line for line in lines), ran.stdout
    assert "claimed=2.0" in ran.stdout


# -- checkpoints that the adapters' libraries made ----------------------------------------------------------------


def made_by_a_library(name: str, folder: Path) -> Small:
    """With what is outside the blocks, which golden ones lack."""
    base = GOLDEN / "dense"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text()) | json.loads((GOLDEN / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    outside = {key: tensor for key, tensor in load_file(base / "model.safetensors").items() if ".layers." not in key}
    save_file({**outside, **load_file(GOLDEN / name / "model.safetensors")}, folder / "model.safetensors")
    return Small(folder)


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(GOLDEN.glob("*/outputs.safetensors"))])
def test_what_a_library_made_is_read_to_its_own_outputs(name: str, tmp_path: Path) -> None:
    """Every layer computes as the library's own did."""
    given = options(made_by_a_library(name, tmp_path / name).folder)
    compress_model(METHOD, given, GOLDEN / "dense", tmp_path / "artifact")
    artifact, compressor = Artifact(tmp_path / "artifact"), METHOD.make(given)
    assert isinstance(compressor, LayerCompressor)
    outputs = load_file(GOLDEN / name / "outputs.safetensors")
    probe = outputs.pop("probe")
    layers = list(artifact.packed())
    assert {stored.name for stored, _ in layers} == outputs.keys()
    for stored, packed in layers:
        assert not stored.left_dense
        restored = compressor.restore(packed, stored.shape, artifact.shared)
        check_forward(stored.shape, restored, probe, outputs[stored.name])


@pytest.mark.parametrize("name", ["gptqmodel-3", "gptqmodel-4"])
def test_zero_points_of_the_other_format_are_found(name: str, tmp_path: Path) -> None:
    """One level off is little of a weight's energy, and yet every weight is off to the same side."""
    small = made_by_a_library(name, tmp_path / name)
    small.configure(lambda config: config["quantization_config"].update(checkpoint_format="gptq_v2"))
    with pytest.raises(
        TrialFailed, match=r"whole groups lie to one side of the base model's weights \([6-9]\d% of its"
    ):
        compress_model(METHOD, options(small.folder), GOLDEN / "dense", tmp_path / "artifact")


def test_error_feedback_may_go_beyond_a_weight_of_zeros(tmp_path: Path) -> None:
    """Along directions that no input has; not for what holds nothing of the weight."""
    small = made_by_a_library("gptqmodel-4", tmp_path / "checkpoint")
    opened = PublishedCheckpoint(small.folder, GOLDEN / "dense", "float32")
    shape, generator = read_inventory(GOLDEN / "dense").layers[0][0], torch.Generator().manual_seed(0)
    weight, noise = (torch.randn(shape.out_features, shape.in_features, generator=generator) for _ in range(2))
    opened.check(shape, weight, weight + 1.3 * noise)  # an error of 1.7
    for wrong in (noise, weight.roll(1, 1), weight.flip(0), -weight, 2.5 * weight, weight + 2.1 * noise):
        with pytest.raises(TrialFailed, match=r"relative squared error to the base model's weight is [1-4]"):
            opened.check(shape, weight, wrong)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_in_another_order_are_found(bits: int) -> None:
    """They shift whole groups, to either side: that is no offset of the matrix."""
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 256, generator=draw)
    right = plain_rounding(weight, Grid(bits, 64)) - weight
    assert offset_share(right, 64) < 0.06
    parts = weight.view(64, 4, 64)
    step = (parts.amax(-1) - parts.amin(-1)) / (2**bits - 1)
    zeros = torch.round(-parts.amin(-1) / step)
    moved = (zeros[torch.randperm(64, generator=draw)] - zeros) * step
    wrong = right - moved[..., None].expand(64, 4, 64).reshape(64, 256)
    assert offset_share(wrong, 64) > 0.6
    assert offset_share(torch.ones(3, 7), 4) == pytest.approx(25 / 28)  # the last group is short: its mean is over four


def test_another_models_embedding_is_refused(tmp_path: Path) -> None:
    small = made_by_a_library("gptqmodel-4", tmp_path / "checkpoint")
    small.edit(lambda tensors: tensors["model.embed_tokens.weight"].normal_())
    with pytest.raises(TrialFailed, match=r"embed_tokens\.weight: its relative squared error to the base model's is"):
        PublishedCheckpoint(small.folder, GOLDEN / "dense", "float32").rest()


# -- what is refused, in one line ---------------------------------------------------------------------------------


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def dropped(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return dropped


def bare(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def other_hidden(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(len(tensors["model.embed_tokens.weight"]), 40).half()


@pytest.mark.parametrize(("change", "message"), [
    (drop("model.layers.0.mlp.up_proj.codes"),
     "no tensor 'model.layers.0.mlp.up_proj.codes'; it has codebooks, scales"),
    (drop(*(f"model.layers.0.mlp.up_proj.{part}" for part in ("codes", "codebooks", "scales"))),
     "no tensor 'model.layers.0.mlp.up_proj.codes', and no dense weight of the layer"),
    (drop("model.layers.0.input_layernorm.weight"),
     "no tensor 'model.layers.0.input_layernorm.weight', which the base model has"),
    (drop("lm_head.weight"), "no tensor 'lm_head.codes', and no dense weight"),
    (bare, "no tensor of model.layers.0.self_attn.q_proj; the checkpoint's are called as "
     "'layers.0.self_attn.q_proj.codebooks'; it was saved without the causal model around it"),
    (other_hidden, r"model.embed_tokens.weight: \(36, 40\) in .*, \(36, 32\) in the base model: another model's"),
    (lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(44)}),
     "'model.layers.0.mlp.up_proj.bias' is nothing of the base model: it cannot be left out"),
    (lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.codes": torch.zeros(40, 8, 2, dtype=torch.int8)}),
     r"model.layers.0.mlp.up_proj.codes: \(40, 8, 2\) in the checkpoint, \(44, 8, 2\) for a layer of 44 x 32"),
    (lambda tensors: tensors["model.layers.1.mlp.up_proj.codes"].random_(-32, 32),
     "model.layers.1.mlp.up_proj: its relative squared error to the base model's weight is 1.*another model's"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_or_not_of_this_model(
    base: Path,
    copy: Callable[[str], Small],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    small = copy("aqlm")
    small.edit(change)
    with pytest.raises((TrialFailed, SuiteError), match=message) as caught:
        compress(base, small, tmp_path / "artifact")
    assert "\n" not in str(caught.value)


ENTRY = {"vector_lens": [-1, 8], "num_centroids": [-1, 64], "num_res_centroids": [-1, -1], "outlier_size": 0}


@pytest.mark.parametrize("config", [
    {"quant_method": "gptq", "bits": 4, "group_size": "128"},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:x": {"group_size": None}}},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:(": {"bits": 8}}},
    {"quant_method": "awq", "bits": 4, "group_size": "128"},
    {"quant_method": "auto-round", "bits": 4, "act_bits": "16"},
    {"quant_method": "compressed-tensors", "config_groups": ["x"]},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"strategy": "group"}}}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["re:("], "weights": {}}}},
    {"quant_method": "hqq", "quant_config": [4]},
    {"quant_method": "vptq", "config_for_layers": ["x"]},
    {"quant_method": "vptq", "config_for_layers": {"a": {**ENTRY, "vector_lens": [-1, "8"]}}},
    {"quant_method": "vptq", "config_for_layers": {"a": {**ENTRY, "vector_lens": [-1, 0]}}},
    {"quant_method": "vptq", "config_for_layers": {"a": {**ENTRY, "num_centroids": [-1, 0]}}},
    {"quant_method": "vptq", "config_for_layers": {"a": {**ENTRY, "group_num": 0}}},
], ids=lambda config: config["quant_method"])  # fmt: skip
def test_a_malformed_config_is_one_line(config: dict[str, Any]) -> None:
    with pytest.raises(TrialFailed, match=r"can(not)? be read") as caught:
        recognise(config, "model")
    assert "\n" not in str(caught.value)


def test_biases_of_zeros_are_no_biases_and_are_billed(base: Path, copy: Callable[[str], Small], tmp_path: Path) -> None:
    small, name = copy("aqlm"), "model.layers.0.mlp.up_proj"
    model = plan_model(find_model(ModelSpec(path=str(base)), load_plugins(), DigestCache(None)), "float32")
    before = METHOD.predict(options(small.folder), model.shapes).linear_bytes
    small.edit(lambda tensors: tensors.update({f"{name}.bias": torch.zeros(44).half()}))
    manifest = compress(base, small, tmp_path / "artifact")
    (layer,) = [layer for layer in manifest.layers if layer.name == name]
    assert layer.roles["bias"] is Role.META
    predicted = METHOD.predict(options(small.folder), model.shapes).linear_bytes
    assert predicted == measure_bits(tmp_path / "artifact", model.facts).linear_bytes == before + 2 * 44
    small.edit(lambda tensors: tensors.update({f"{name}.bias": torch.ones(44)}))
    with pytest.raises(TrialFailed, match=r"up_proj\.bias' is nothing of the base model"):
        compress(base, small, tmp_path / "other")


def test_other_blocks(copy: Callable[[str], Small], tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "three", "llama", hidden=32, intermediate=44, blocks=3)
    with pytest.raises(SuiteError, match="2 blocks, 3 in the base model: another model's checkpoint"):
        METHOD.predict(options(copy("aqlm").folder), read_inventory(other).shapes("float32"))


def cut(small: Small) -> None:
    file = small.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(small: Small) -> None:
    (small.folder / "model.safetensors").rename(small.folder / "pytorch_model.bin")


def sharded(small: Small) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (small.folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("spoil", "message"), [
    (cut, r"model.safetensors: [\d,]+ bytes of [\d,]+: truncated or damaged; fetch it again"),
    (pickled, r"no \*.safetensors \(only pytorch_model.bin, which is pickled: convert it to safetensors\)"),
    (sharded, r"model-00002-of-00002.safetensors: missing; model.safetensors.index.json names it"),
    (lambda small: (small.folder / "config.json").unlink(), "no config.json; give the folder of a quantized"),
    (lambda small: (small.folder / "config.json").write_text("{"), "config.json: cannot be read"),
    (lambda small: small.configure(lambda config: config.pop("quantization_config")),
     "no quantization_config in its config: a dense model, not a quantized one"),
    (lambda small: shutil.rmtree(small.folder), "no such folder"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_said_where_the_suite_is_read(
    copy: Callable[[str], Small], spoil: Callable[[Small], Any], message: str
) -> None:
    small = copy("aqlm")
    spoil(small)
    with pytest.raises(SuiteError, match=message) as caught:
        check_options(CheckpointOptions, {"path": str(small.folder)}, "methods.0: options")
    assert "\n" not in str(caught.value)


def test_an_unknown_method(base: Path, copy: Callable[[str], Small]) -> None:
    small = copy("aqlm")
    small.configure(lambda config: config["quantization_config"].update(quant_method="quip"))
    with pytest.raises(SuiteError, match="quantization method 'quip' cannot be read; what can: gptq, awq"):
        METHOD.predict(options(small.folder), read_inventory(base).shapes("float32"))


def test_files_that_change_after_planning(base: Path, copy: Callable[[str], Small], tmp_path: Path) -> None:
    small = copy("aqlm")
    planned = options(small.folder)
    small.edit(lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(TrialFailed, match="its files have changed since the run was planned; run again"):
        compress_model(METHOD, planned, base, tmp_path / "artifact")
    with pytest.raises(SuiteError, match="its files are not those of content"):
        METHOD.predict(planned, read_inventory(base).shapes("float32"))


def test_an_artifact_outlives_its_checkpoint(base: Path, copy: Callable[[str], Small], tmp_path: Path) -> None:
    small = copy("vptq")
    compress(base, small, tmp_path / "artifact")
    shutil.rmtree(small.folder)
    assert load_artifact(tmp_path / "artifact", load_plugins())(tiny_tokens(base, 1, 4)).logits.isfinite().all()


# -- outside the layers -------------------------------------------------------------------------------------------


def test_a_quantized_head_is_decoded_and_stored_dense(base: Path, copy: Callable[[str], Small], tmp_path: Path) -> None:
    small = copy("aqlm")
    expected: list[Tensor] = []

    def encode(tensors: dict[str, Tensor]) -> None:
        parts, restored = aqlm(tensors.pop("lm_head.weight").float(), torch.Generator().manual_seed(0))
        expected.append(restored)
        tensors.update({f"lm_head.{name}": tensor for name, tensor in parts.items()})

    small.edit(encode)
    compress(base, small, tmp_path / "artifact")
    rest = load_file(tmp_path / "artifact" / "rest.safetensors")
    assert torch.allclose(rest["lm_head.weight"], expected[0], rtol=1e-5, atol=1e-6)


def test_a_head_of_its_own_beside_tied_embeddings(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", hidden=32, intermediate=44, tied=True)
    small = write_checkpoint(base, tmp_path / "small", aqlm, AQLM)
    compress(base, small, tmp_path / "one")
    small.edit(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    compress(base, small, tmp_path / "two")
    small.edit(lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(TrialFailed, match=r"'lm_head.weight' is nothing of the base model; the base model's head is"):
        compress(base, small, tmp_path / "three")


def test_a_quantized_head_is_checked_as_a_layer_is(base: Path, copy: Callable[[str], Small], tmp_path: Path) -> None:
    small = copy("aqlm")

    def encode(tensors: dict[str, Tensor]) -> None:
        parts, _ = aqlm(tensors.pop("lm_head.weight").float(), torch.Generator().manual_seed(0))
        parts["codes"] = parts["codes"].flip(0)
        tensors.update({f"lm_head.{name}": tensor for name, tensor in parts.items()})

    small.edit(encode)
    with pytest.raises(TrialFailed, match=r"lm_head: its relative squared error to the base model's weight is 1"):
        compress(base, small, tmp_path / "artifact")


# -- the hub ------------------------------------------------------------------------------------------------------


def test_sources() -> None:
    for given, message in (
        ({}, "give either path, a folder, or id and revision"),
        ({"path": "x", "id": "a/b"}, "give either path, a folder, or id and revision"),
        ({"id": "a/b"}, "revision None is no commit hash of 40 hex digits"),
        ({"id": "a/b", "revision": "main"}, "revision 'main' is no commit hash"),
    ):
        with pytest.raises(SuiteError, match=message):
            check_options(CheckpointOptions, given, "options")


def test_a_repository_in_the_hubs_cache(
    base: Path, published: dict[str, Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny-AQLM-2Bit-2x6"
    shutil.copytree(published["aqlm"].folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    cached = CheckpointOptions(id="org/tiny-AQLM-2Bit-2x6", revision=COMMIT)
    assert (cached.claimed, cached.content) == (2.0, None)
    assert snapshot("org/tiny-AQLM-2Bit-2x6", COMMIT) == repository / "snapshots" / COMMIT
    shapes = read_inventory(base).shapes("float32")
    assert METHOD.predict(cached, shapes) == METHOD.predict(options(published["aqlm"].folder), shapes)
    assert METHOD.fetches(cached) == ()
    compress_model(METHOD, cached, base, tmp_path / "artifact")


def test_a_repository_that_is_not_here(base: Path) -> None:
    shapes = read_inventory(base).shapes("float32")
    given = {"id": "org/no-such-thing-4bit", "revision": COMMIT}
    message = "is not in the local cache, and the hub cannot be reached: nothing is known of it; fetch it where there"
    with pytest.raises(SuiteError, match=message):
        METHOD.predict(CheckpointOptions.model_validate(given), shapes)
    refused = METHOD.fit(BitBudget(4.0, 0.1), shapes, given)
    assert isinstance(refused, Refusal)
    assert message in refused.reason


def test_weights_of_another_name_are_not_called_pickled(
    published: dict[str, Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older checkpoints are gptq_model-4bit-128g.safetensors, which the hub reads no headers of."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    class Api:
        def hf_hub_download(self, repository: str, name: str, revision: str) -> str:
            return str(published["aqlm"].folder / name)

        def get_safetensors_metadata(self, repository: str, revision: str) -> None:
            raise NotASafetensorsRepoError("not one")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(TrialFailed, match=r"no model\.safetensors .* of another name, fetch it and give the folder's"):
        remote_headers("org/gptq_model-4bit-128g", COMMIT)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as reading headers takes: a repository's files at a commit, in whole or from byte to byte."""

    root: Path
    sent: ClassVar[dict[str, int]] = {}

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        _, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        file = self.root / name
        if not name or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        self.send_response(206 if asked else 200)
        for key, value in (
            ("Content-Length", len(part)),
            ("ETag", f'"{hashlib.sha256(data).hexdigest()}"'),
            ("X-Repo-Commit", COMMIT),
        ):
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.sent[name] = self.sent.get(name, 0) + len(part)
            self.wfile.write(part)

    def log_message(self, *arguments: Any) -> None:
        pass


READ_HEADERS = """
import json, sys
from pathlib import Path
from evenbits.shapes import read_inventory
from evenbits_backends.libraries.checkpoint import CheckpointOptions, descriptor, headers
options = CheckpointOptions(id="org/tiny-AQLM-2Bit-2x6", revision=sys.argv[2])
estimate = descriptor().predict(options, read_inventory(Path(sys.argv[1])).shapes("float32"))
named = headers(options).named
fetched = descriptor().fetches(options)
print(json.dumps([{r.value: n for r, n in estimate.role_bytes.items()}, estimate.paper_bits, named, fetched]))
assert "torch" not in sys.modules
"""


def test_headers_of_a_repository_come_over_the_network(
    base: Path, copy: Callable[[str], Small], tmp_path: Path
) -> None:
    """Without its weights, and without torch: of a file larger than what is asked for at first, the first part."""
    small = copy("aqlm")
    small.edit(lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.zeros(200_000)}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("There", (Hub,), {"root": small.folder, "sent": {}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    try:
        found = subprocess.run(
            [sys.executable, "-c", READ_HEADERS, str(base), COMMIT], capture_output=True, text=True, env=environment
        )
    finally:
        server.shutdown()
        server.server_close()
    assert found.returncode == 0, found.stderr
    roles, paper, named, fetched = json.loads(found.stdout.splitlines()[-1])
    shapes = read_inventory(base).shapes("float32")
    expected = METHOD.predict(options(small.folder), shapes)
    assert roles == {role.value: count for role, count in expected.role_bytes.items()}
    assert paper == 2.0
    assert "not fetched yet" in named
    weights = sum(t.numel() * t.element_size() for t in load_file(small.folder / "model.safetensors").values())
    assert fetched == [["checkpoint org/tiny-AQLM-2Bit-2x6", weights]]
    sent: dict[str, int] = server.RequestHandlerClass.sent  # type: ignore[attr-defined]
    assert 0 < sent["model.safetensors"] <= 200_002 < (small.folder / "model.safetensors").stat().st_size
