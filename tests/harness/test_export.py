"""Exports: what they hold decodes to the artifact's weights, by readers that share no code with the writers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.harness.exported import REGISTRY, logits, make_artifact, read_stream, restored_weights
from torch import Tensor

from evenbits import export as module
from evenbits import load
from evenbits.artifact import Artifact
from evenbits.commands_export import ExportFormat, find_artifact
from evenbits.errors import ArtifactError, SuiteError
from evenbits.export import Exported, export
from evenbits.export_formats import pack_words
from evenbits.export_gptq import Gptq
from evenbits.maths.uniform import Grid, OnGrid


def exported(source: Path, form: str, **options: Any) -> Exported:
    return export(source, form, source.with_name(f"{source.name}-{form}"), REGISTRY, **options)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def layer_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


# -- readers by the formats' descriptions -----------------------------------------------------------------------


def read_gptq(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """(out, in) float32."""
    bits, index = config["bits"], tensors["g_idx"].numpy()
    scales = tensors["scales"].float().numpy()  # (groups, out)
    codes = read_stream(tensors["qweight"].T.contiguous(), bits, len(index))
    zeros = read_stream(tensors["qzeros"], bits, scales.shape[1]) + 1
    found: np.ndarray[Any, Any] = ((codes - zeros.T[:, index]) * scales.T[:, index]).astype(np.float32)
    return found


def read_compressed(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """(out, in) float32."""
    bits, (rows, columns) = scheme["num_bits"], tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"].float().numpy()
    offset = 1 << (bits - 1)
    codes = read_stream(tensors["weight_packed"], bits, columns) - offset
    zeros = np.zeros_like(scales)
    if not scheme["symmetric"]:
        zeros = read_stream(tensors["weight_zero_point"].T.contiguous(), bits, rows).T - offset
    assert ("weight_zero_point" in tensors) is not scheme["symmetric"]
    size = scheme["group_size"] if scheme["strategy"] == "group" else columns
    index = np.arange(columns) // size
    assert scales.shape == (rows, columns // size)
    found: np.ndarray[Any, Any] = ((codes - zeros[:, index]) * scales[:, index]).astype(np.float32)
    return found


def scheme_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    (scheme,) = (
        group["weights"] for group in config["config_groups"].values() if group["targets"] in (["Linear"],)
        or name in group["targets"]
    )  # fmt: skip
    found: Mapping[str, Any] = scheme
    return found


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("compressed-tensors", "rtn", {"bits": 4, "group_size": 32, "symmetric": False}),
    ("compressed-tensors", "rtn", {"bits": 3, "group_size": 64}),  # rows of 64 are one group, rows of 128 two
    ("compressed-tensors", "rtn", {"bits": 5, "group_size": None, "symmetric": False}),
    ("compressed-tensors", "awq", {"bits": 4, "group_size": 32}),
    ("compressed-tensors", "sparsegpt", {"bits": 4, "group_size": 32, "symmetric": False}),
    ("gptq", "rtn", {"bits": 2, "group_size": 32}),
    ("gptq", "rtn", {"bits": 3, "group_size": None}),
    ("gptq", "rtn", {"bits": 8, "group_size": 128, "symmetric": False}),
    ("gptq", "gptq", {"bits": 4, "group_size": 16, "act_order": True}),
    ("gptq", "rtn", {"bits": 4, "group_size": 48}),  # the last group is short
]


@pytest.mark.parametrize(("form", "method", "options"), CASES, ids=lambda one: str(one).replace(" ", ""))
def test_codes_are_held_unchanged(tmp_path: Path, form: str, method: str, options: dict[str, Any]) -> None:
    source = make_artifact(tmp_path, method, options)
    done = exported(source, form)
    tensors, config = tensors_of(done.folder), config_of(done.folder)["quantization_config"]
    for name, weight in restored_weights(source).items():
        layer = layer_of(tensors, name)
        read = read_gptq(layer, config) if form == "gptq" else read_compressed(layer, scheme_of(config, name))
        assert np.array_equal(read, weight.numpy()), name
    rest = Artifact(source).rest()
    for name, tensor in rest.items():  # folded norms with them
        assert torch.equal(tensors[name], tensor)
    assert config["quant_method"] == form
    if form == "gptq":
        assert config == json.loads((done.folder / "quantize_config.json").read_text())
        assert config["desc_act"] is bool(options.get("act_order"))
        assert config["sym"] is options.get("symmetric", True)
        size = options["group_size"]
        assert config["group_size"] == (-1 if size in (None, 128) else size)  # 128: no row is longer
    else:
        assert len(config["config_groups"]) == (2 if options["group_size"] == 64 else 1)
        assert {"lm_head", "model.embed_tokens"} == set(config["ignore"])


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_plugins_that_read_the_format_read_it(tmp_path: Path, form: str) -> None:
    """The readers of published checkpoints, where their plugin is installed."""
    layouts = pytest.importorskip("evenbits_backends.layout", reason="the plugin evenbits_backends is not installed")
    source = make_artifact(tmp_path, "rtn", {"bits": 4, "group_size": 32, "symmetric": False})
    done = exported(source, form)
    layout, facts = layouts.recognise(config_of(done.folder)["quantization_config"], str(done.folder))
    tensors, weights = tensors_of(done.folder), restored_weights(source)
    for stored in Artifact(source).layers:
        layer = layer_of(tensors, stored.name)
        assert layer.keys() == layout.roles(stored.shape, facts).keys()
        assert torch.equal(layout.decode(layer, stored.shape, facts), weights[stored.name])


@pytest.mark.parametrize(
    ("method", "options", "changes"),
    [
        ("rtn", {"bits": 3, "group_size": 16}, {"dtype": "bfloat16", "tied": True}),
        ("awq", {"bits": 3, "group_size": 32}, {"dtype": "float16"}),
        ("kmeans", {}, {"kind": "gpt2"}),
        ("rtn", {"bits": 4}, {"adapters": True, "dtype": "bfloat16"}),
        ("llm-pruner", {"ratio": 0.4, "importance": "magnitude"}, {}),
    ],
    ids=lambda one: str(one).replace(" ", ""),
)
def test_dense_is_the_restored_model(
    tmp_path: Path, method: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    import transformers

    source = make_artifact(tmp_path, method, options, **changes)
    done = exported(source, "dense", shard_bytes=40_000)
    config = config_of(done.folder)
    assert "quantization_config" not in config  # so transformers asks nobody
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert {path.name for path in done.folder.glob("*.safetensors")} == set(index["weight_map"].values())
    model = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    assert str(model.dtype).removeprefix("torch.") == changes.get("dtype", "float32")
    assert torch.equal(logits(model), logits(load(source)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer("w1").input_ids == transformers.AutoTokenizer.from_pretrained(source)("w1").input_ids
    assert not list(tmp_path.glob(".exporting*"))


def test_shapes_that_no_config_says(tmp_path: Path) -> None:
    source = make_artifact(tmp_path, "llm-pruner", {"ratio": 0.4, "importance": "magnitude", "first_block": 1})
    with pytest.raises(ArtifactError, match=r"no config of model type 'llama' can say .*layers\.\d.*evenbits\.load"):
        exported(source, "dense")


# -- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("gptq", "rtn", {"bits": 5}, {}, r"q_proj: it has codes of 5 bits, and GPTQ's layout holds 2, 3, 4, 8"),
    ("gptq", "rtn", {"bits": 2, "group_size": 2, "symmetric": False}, {}, r"\d+ of its \d+ groups have zero point 0"),
    ("gptq", "kmeans", {}, {}, "'kmeans' stores no integer codes on grids"),
    ("gptq", "llm-pruner", {"importance": "magnitude"}, {}, "'llm-pruner' stores a whole model"),
    ("gptq", "rtn", {"bits": 4}, {"adapters": True}, "it has adapters beside its codes"),
    ("gptq", "sparsegpt", {"bits": None}, {}, "kept weights are stored as float16, not as codes"),
    ("compressed-tensors", "gptq", {"act_order": True, "group_size": 32}, {}, r"not runs of neighbouring columns"),
    ("compressed-tensors", "rtn", {"group_size": 48}, {}, "its 64 columns are no multiple of the group size 48"),
    ("compressed-tensors", "rtn", {}, {"kind": "gpt2"}, "GPT-2's Conv1D"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "method", "options", "changes", "said"), REFUSED, ids=[f"{one[0]}-{one[4][:12]}" for one in REFUSED]
)
def test_what_a_format_cannot_hold(
    tmp_path: Path, form: str, method: str, options: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    source = make_artifact(tmp_path, method, options, **changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match=f"{said}.*--format {form} cannot hold that, --format dense can$") as error:
        exported(source, form)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_scales_that_float16_does_not_hold() -> None:
    grid = Grid(torch.full((32, 1), 1e6), torch.full((32, 1), 8), 4)
    found = OnGrid(torch.zeros(32, 32, dtype=torch.uint8), grid, torch.zeros(32, dtype=torch.int64), 32, True)
    assert "leave the range of float16" in str(Gptq().refusal(found))


def test_what_readers_round_is_measured_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_artifact(tmp_path, "rtn", {"bits": 4, "group_size": 32}, dtype="bfloat16")
    done = exported(source, "compressed-tensors")
    scale, weights = {}, restored_weights(source)
    for name, tensor in tensors_of(done.folder).items():
        if name.endswith("weight_scale"):
            assert tensor.dtype == torch.float16  # as stored: what rounds is the reader
            scale[name.removesuffix(".weight_scale")] = tensor
    differences = []
    for name, weight in weights.items():
        steps = (weight.view(*scale[name].shape, -1) / scale[name].float()[..., None]).round().bfloat16()
        read = (steps * scale[name].bfloat16()[..., None]).float().view_as(weight)
        expected = weight.bfloat16().float()
        differences.append(float((read - expected).norm() / expected.norm()))
    assert done.difference == pytest.approx(max(differences), rel=1e-6)
    assert 1e-4 < done.difference < 4e-3
    monkeypatch.setattr(module, "LARGEST_DIFFERENCE", 1e-4)
    again = source.with_name("again")
    with pytest.raises(ArtifactError, match=r"computed in bfloat16, as readers do, differ by 0\.\d+ % of their size"):
        export(source, "compressed-tensors", again, REGISTRY)
    assert not again.exists()


def test_a_folder_in_use_or_refused_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_artifact(tmp_path, "rtn", {"bits": 4})
    with pytest.raises(SuiteError, match="there is something already"):
        export(source, "dense", source, REGISTRY)
    with pytest.raises(SuiteError, match=r"config\.json/out: cannot be made \(Not a directory\); give --out"):
        export(source, "dense", source / "config.json" / "out", REGISTRY)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error, said in ((full, "No space left"), (PermissionError(13, "Permission denied"), "Permission denied")):
        monkeypatch.setattr("evenbits.export_folder.save_file", Mock(side_effect=error))
        with pytest.raises(SuiteError, match=rf"^\S+out: cannot be written \(.*{said}"):
            export(source, "dense", tmp_path / "out", REGISTRY)
        assert not list(tmp_path.glob("*out*"))
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert export(source, "dense", tmp_path / "empty", REGISTRY).folder == tmp_path / "empty"


# -- bits, names -----------------------------------------------------------------------------------------------------


def test_bits_are_those_on_disk(tmp_path: Path) -> None:
    source = make_artifact(tmp_path, "rtn", {"bits": 4, "group_size": 32, "symmetric": False})
    shapes = [(layer.out_features, layer.in_features) for layer in Artifact(source).layers]
    weights = sum(rows * columns for rows, columns in shapes)
    rest = sum(tensor.numel() for tensor in Artifact(source).rest().values())
    done = exported(source, "gptq")
    assert done.before.linear_bits == 4 + (16 + 4) / 32
    indices = sum(32 * columns for _, columns in shapes)
    assert done.after.linear_bits == pytest.approx(4 + (16 + 4) / 32 + indices / weights, abs=1e-12)
    assert done.after.model_bytes == (done.folder / "model.safetensors").stat().st_size
    assert done.after.model_bits == 8 * done.after.model_bytes / (weights + rest)
    dense = exported(source, "dense")
    assert dense.before == done.before
    assert dense.after.linear_bits == 32


@pytest.mark.parametrize("bits", range(1, 9))
def test_words(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 37), generator=torch.Generator().manual_seed(bits))
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-37 * bits // 32))
    assert np.array_equal(read_stream(words, bits, 37), codes.numpy())
    beyond = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")[:, 37 * bits :]
    assert not beyond.any()


def test_the_command_knows_all_formats() -> None:
    assert [form.value for form in ExportFormat] == list(module.FORMATS)


def test_names_of_artifacts(tmp_path: Path) -> None:
    from tests.harness.trials import Trials

    trials = Trials(tmp_path / "results")
    store = trials.store
    dense = trials.add("dense")
    first, second = trials.add("rtn", seed=0), trials.add("rtn", seed=1)
    key = first.chain[-1] if first.chain else str(first.artifact)
    with pytest.raises(SuiteError, match=rf"its artifact {key} is not in .*; run the suite again"):
        find_artifact(first.trial, store.root)
    (store.artifacts / key).mkdir(parents=True)
    (store.artifacts / key / "manifest.json").write_text("{}")
    assert find_artifact(first.trial, store.root) == store.artifacts / key
    assert find_artifact(str(store.artifacts / key), store.root) == store.artifacts / key
    with pytest.raises(SuiteError, match="the uncompressed model, which has no artifact"):
        find_artifact(dense.trial, store.root)
    assert second.trial != first.trial
    with pytest.raises(SuiteError, match=r"trials of seeds 0, 1; export one of them: add /SEED"):
        find_artifact(f"{first.suite}:rtn", store.root)
