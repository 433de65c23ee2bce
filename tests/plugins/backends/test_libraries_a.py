"""GPTQModel, llm-compressor, AutoAWQ and AutoGPTQ: their own files, what is refused, and what they cost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Layer, LayerCompressor, LayerShape, ModelShapes, PackedLayer, Refusal
from evenbits.driver import Driver, Work
from evenbits.environment_files import environments_of
from evenbits.environments import find
from evenbits.errors import TrialFailed
from evenbits.foreign import Bench
from evenbits.maths.hessian import relative_error
from evenbits.models import build_model, open_model
from evenbits.shapes import llama_shapes, read_inventory
from evenbits.subject import restore_state
from evenbits.testing import manifest_facts, tiny_model, tiny_tokens
from evenbits.workers import WorkerLaunch
from evenbits_backends.adapter import Adapter
from evenbits_backends.methods import descriptors
from evenbits_backends.opened import StoredCheckpoint
from evenbits_backends.trust import Claim

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("gptqmodel-4", "gptqmodel-3", "llmcompressor-rtn", "llmcompressor-gptq", "llmcompressor-awq", "autoawq")
METHODS = {one.name: one for one in descriptors()}


def shapes_of(hidden: int, intermediate: int, blocks: int = 1) -> ModelShapes:
    return llama_shapes(hidden, intermediate, blocks, hidden // 2, 105, dtype="float32")


def dense() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / "dense" / "model.safetensors").items()}


def layers() -> list[LayerShape]:
    """In the order in which their inputs become known, as the driver has them."""
    return [replace(shape, dtype="float32") for shape, _ in read_inventory(GOLDEN / "dense").layers]


def made(name: str) -> tuple[Compressor, Any]:
    method = METHODS[name.split("-")[0]]
    return method, method.options.model_validate(json.loads((GOLDEN / name / "made.json").read_text())["options"])


def opened(name: str, folder: Path | None = None) -> StoredCheckpoint:
    method, options = made(name)
    adapter = method.make(options)
    assert isinstance(adapter, Adapter)
    found = load_file(GOLDEN / name / "outputs.safetensors")
    probe = found.pop("probe")
    return StoredCheckpoint(
        folder or GOLDEN / name, GOLDEN / "dense", "float32", adapter.claim, probes={64: probe}, outputs=found
    )


def restored(checkpoint: StoredCheckpoint, shape: LayerShape) -> tuple[PackedLayer, torch.Tensor]:
    packed = checkpoint.layer(shape)
    return packed, Adapter("", METHODS["autoawq"].options(), Claim("")).restore(packed, shape, checkpoint.shared)


@pytest.mark.parametrize("name", NAMES)
def test_a_librarys_own_file_decodes_to_its_own_outputs(name: str) -> None:
    """Every layer is taken, by both checks, and its error is what rounding to so many bits explains."""
    checkpoint, weights = opened(name), dense()
    assert len(layers()) == 7
    for shape in layers():
        weight = weights[f"{shape.name}.weight"]
        packed, found = restored(checkpoint, shape)
        assert "weight" not in packed.tensors, "left dense"
        fold = checkpoint.check(shape, weight, found)
        assert (fold is not None) == ("awq" in name)
        if fold is None:
            assert 1e-4 < relative_error(weight, found) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_predicted_to_the_last(name: str) -> None:
    checkpoint = opened(name)
    method, options = made(name)
    count = checkpoint.shared.nbytes + sum(checkpoint.layer(shape).nbytes for shape in layers())
    shapes = ModelShapes(tuple(layers()), 1, 0, dtype="float32")
    assert method.predict(options, shapes).linear_bytes == count


@pytest.mark.parametrize("name", NAMES)
def test_a_corrupted_file_is_refused(name: str, tmp_path: Path) -> None:
    shape = layers()[0]
    weight = dense()[f"{shape.name}.weight"]
    scale = f"{shape.name}.{'weight_scale' if name.startswith('llm') else 'scales'}"
    codes = f"{shape.name}.{'weight_packed' if name.startswith('llm') else 'qweight'}"

    def changed(tensor: str, to: Any) -> StoredCheckpoint:
        folder = tmp_path / tensor
        shutil.copytree(GOLDEN / name, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[tensor] = to(tensors[tensor]).contiguous()
        save_file(tensors, folder / "model.safetensors")
        return opened(name, folder)

    for tensor, to in ((scale, lambda t: 2 * t), (codes, lambda t: t.flip(0))):
        checkpoint = changed(tensor, to)
        with pytest.raises(TrialFailed, match=r"own layer have a relative|to other outputs") as caught:
            checkpoint.check(shape, weight, restored(checkpoint, shape)[1])
        assert "\n" not in str(caught.value)
        # where nobody ran the library, the weight itself tells
        checkpoint._outputs = {}
        with pytest.raises(TrialFailed, match="stored a weight with a relative squared error of"):
            checkpoint.check(shape, weight, restored(checkpoint, shape)[1])


def test_rounding_by_llm_compressor_is_our_own_rounding() -> None:
    """The same levels but for the scale, which it keeps in float32: codes differ where a weight lies on a border."""
    from evenbits_rtn import provide_compressors

    (rtn,) = provide_compressors()
    ours = rtn.make(rtn.options.model_validate({"bits": 4, "group_size": 16}))
    assert isinstance(ours, LayerCompressor)
    checkpoint, weights = opened("llmcompressor-rtn"), dense()
    for shape in layers():
        weight = weights[f"{shape.name}.weight"]
        _, theirs = restored(checkpoint, shape)
        packed = ours.compress(weight, Layer(shape), None, torch.Generator())
        found = ours.restore(packed, shape, None)
        step = (
            weight.abs().view(len(weight), -1, 16).amax(-1, keepdim=True).expand(-1, -1, 16).reshape(weight.shape) / 7.5
        )
        same = (theirs - found).abs() < 0.01 * step
        assert float(same.float().mean()) > 0.97
        assert relative_error(weight, theirs) == pytest.approx(relative_error(weight, found), rel=0.05)


@pytest.mark.parametrize(
    ("method", "fixed", "message"),
    [
        ("llmcompressor", {"group_size": 64}, "mlp.down_proj has 352 columns, no multiple of 64"),
        (
            "autoawq",
            {"group_size": 32, "clip": True},
            "searches ranges of 64 rows at once, and mlp.gate_proj has 352; what can: clip",
        ),
        ("autoawq", {"group_size": 64, "clip": False}, "352 columns, no multiple of 64"),
    ],
)
def test_what_a_library_does_not_take_is_refused_with_the_reason(
    method: str, fixed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shapes, found = shapes_of(128, 352), METHODS[method]
    refusal = found.fit(BitBudget(4.5, 1.0), shapes, fixed)
    assert isinstance(refusal, Refusal)
    assert message in refusal.reason
    adapter = found.make(found.options.model_validate(fixed))
    assert isinstance(adapter, Adapter)
    with pytest.raises(TrialFailed, match=message.replace("(", r"\(")):
        adapter.open(Bench(tmp_path, shapes, "float32", "cpu", 0, None, None, tmp_path))


@pytest.mark.parametrize(
    ("method", "fixed", "centre", "chosen"),
    [
        ("llmcompressor", {"algorithm": "rtn", "symmetric": True}, 5.0, (4, 32)),
        ("llmcompressor", {}, 4.23, (4, None)),
        ("gptqmodel", {"symmetric": True}, 4.8, (4, 32)),
        ("gptqmodel", {}, 3.8, (3, 32)),
        ("gptqmodel", {}, 4.35, (4, 128)),
        ("gptqmodel", {"group_size": None}, 4.33, (4, None)),
        ("gptqmodel", {}, 3.28, (3, None)),  # 2 bits in groups of 16 fit too, and are far worse
        ("autoawq", {"clip": False}, 4.63, (4, 32)),
        ("autogptq", {}, 2.76, (2, 32)),
    ],
)
def test_fit_finds_a_setting_inside_the_budget(
    method: str, fixed: dict[str, Any], centre: float, chosen: tuple[int, int | None]
) -> None:
    shapes, found = shapes_of(128, 352, blocks=5), METHODS[method]
    budget = BitBudget(centre, 0.05)
    options: Any = found.fit(budget, shapes, fixed)
    assert not isinstance(options, Refusal), options.reason
    assert (options.bits, options.group_size) == chosen
    assert budget.bits(found.predict(options, shapes), shapes) in budget


def test_measured_bytes_of_babyllama105_are_those_of_the_libraries() -> None:
    """Sizes of tensors in files that the libraries wrote; the artifact adds its facts, some hundred bytes."""
    shapes = shapes_of(128, 352, blocks=5)
    expected = [
        ("llmcompressor", {"algorithm": "rtn", "group_size": 32}, 576_560),
        ("llmcompressor", {"algorithm": "rtn", "group_size": None}, 485_680),
        ("llmcompressor", {"algorithm": "awq", "group_size": 32, "symmetric": False}, 590_960),
        ("llmcompressor", {"bits": 3, "group_size": 32}, 461_360),
        ("gptqmodel", {"group_size": 32}, 555_200),
        ("gptqmodel", {"group_size": 64}, 520_000),
        ("gptqmodel", {"group_size": None}, 498_400),
        ("gptqmodel", {"bits": 3, "group_size": 32}, 436_400),
        ("gptqmodel", {"bits": 2, "group_size": 32}, 317_600),
    ]
    for name, given, count in expected:
        found = METHODS[name]
        predicted = found.predict(found.options.model_validate(given), shapes).linear_bytes
        assert 0 < predicted - count < 150, (name, given)


def test_needs_follow_the_options() -> None:
    def needs(name: str, **given: Any) -> tuple[str, str, str | None]:
        found = METHODS[name].needs_of(METHODS[name].options.model_validate(given))
        return found.statistics, found.device, found.environment

    assert needs("llmcompressor", algorithm="rtn") == ("none", "any", "llmcompressor")
    assert needs("llmcompressor") == ("tokens", "any", "llmcompressor")
    assert needs("gptqmodel") == ("tokens", "any", "gptqmodel")
    assert needs("gptqmodel", method="awq", symmetric=False) == ("tokens", "cuda", "gptqmodel")
    assert needs("autoawq") == ("tokens", "any", "autoawq")
    assert needs("autogptq") == ("tokens", "cuda", "autogptq")


def test_options_that_exclude_each_other_are_refused() -> None:
    options = METHODS["gptqmodel"].options
    with pytest.raises(ValueError, match="act_group_aware needs a group_size"):
        options.model_validate({"group_size": None, "act_group_aware": True})
    with pytest.raises(ValueError, match="awq is 4 bits with zero points"):
        options.model_validate({"method": "awq"})
    assert options.model_validate({"group_size": None}).model_dump()["act_group_aware"] is False


def test_dead_libraries_name_their_successors() -> None:
    assert "llmcompressor with algorithm awq succeeds it" in METHODS["autoawq"].summary
    assert "gptqmodel succeeds it" in METHODS["autogptq"].summary


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from evenbits_backends.methods import descriptors\n"
        "from evenbits.budget import BitBudget\n"
        "from evenbits.shapes import llama_shapes\n"
        "shapes = llama_shapes(128, 352, 1, 64, 105)\n"
        "for one in descriptors():\n"
        "    if one.name in ('gptqmodel', 'llmcompressor', 'autoawq', 'autogptq'):\n"
        "        one.fit(BitBudget(4.5, 1.0), shapes, {})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "given"),
    [
        ("llmcompressor", {"algorithm": "awq", "group_size": 32, "symmetric": False}),
        ("gptqmodel", {"group_size": 32}),
        ("autoawq", {"group_size": 32}),
        ("autoawq", {"group_size": 32, "duo_scaling": False, "clip": False}),
    ],
)
def test_in_its_environment_a_library_makes_a_model_near_the_dense_one(
    library: str, given: dict[str, Any], tmp_path: Path
) -> None:
    """Through the driver: exact bytes, and norms that undo what was rescaled, as the whole model's outputs show."""
    environment = environments_of("evenbits_backends")[library]
    if (home := find(environment)) is None:
        pytest.skip(f"no environment {library!r}: evenbits env create {library}")
    found = METHODS[library]
    options = found.options.model_validate(given)
    model = tiny_model(tmp_path / "model", hidden=128, intermediate=192)  # AutoAWQ searches ranges of 64 rows
    tokens = tiny_tokens(model)
    work = Work(
        model, "float32", torch.device("cpu"), found.make(options), found.needs_of(options), None, 0, tokens, None,
        launch=WorkerLaunch(environment, home, threads=1),
    )  # fmt: skip
    with ArtifactWriter(tmp_path / "artifact") as writer:
        stored = Driver(work, writer).run()
        writer.copy_base_files(model)
        writer.finish(
            **manifest_facts(found, options), layers=tuple(stored.layers), shared=stored.shared,
            made_with=stored.made_with,
        )  # fmt: skip
    artifact = Artifact(tmp_path / "artifact")
    assert artifact.shared is not None
    count = artifact.shared.nbytes + sum(packed.nbytes for _, packed in artifact.packed())
    assert count == found.predict(options, read_inventory(model).shapes("float32")).linear_bytes
    assert artifact.manifest.made_with["torch"].startswith("2.13")
    adapter = found.make(options)
    assert isinstance(adapter, LayerCompressor)
    ours = build_model(tmp_path / "artifact", restore_state(artifact, adapter), "float32")
    theirs = open_model(model, "float32", "cpu")
    with torch.no_grad():
        expected, outputs = (one(input_ids=tokens).logits for one in (theirs, ours))
    assert relative_error(expected, outputs) < 0.2  # norms left as they were: above 1
