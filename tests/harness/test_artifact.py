"""Artifacts: whole or not there, verified, read as written; and the ledger that bills them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from evenbits import load
from evenbits.artifact import TEMPORARY, Artifact, ArtifactWriter, dense_layer, remove_unfinished
from evenbits.compressor import Compressor, LayerShape, Options, PackedLayer, Role, Shared
from evenbits.errors import ArtifactError, SuiteError
from evenbits.ledger import dense_ledger, measure_bits
from evenbits.manifest import MANIFEST, MANIFEST_DIGEST, SCHEMA, read_manifest
from evenbits.planned_model import plan_model
from evenbits.plugins import load_plugins
from evenbits.sources import ModelSource
from evenbits.testing import compress_model, manifest_facts, stored_layer, tiny_model

RTN = load_plugins().compressors["rtn"].value
SHAPE = LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 3, 5, "float32")


def write_one(folder: Path, packed: PackedLayer, shared: Shared | None = None, **changes: Any) -> Any:
    with ArtifactWriter(folder) as writer:
        writer.add_layer(SHAPE.name, packed)
        if shared is not None:
            writer.write_shared(shared)
        stored = stored_layer(SHAPE, writer.flush_block(0), packed)
        facts = {**manifest_facts(RTN, RTN.options()), **changes}
        return writer.finish(**facts, layers=(stored,), shared={} if shared is None else shared.roles)


@given(
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32]),
    size=st.lists(st.integers(0, 4), max_size=3),
    role=st.sampled_from(list(Role)),
    meta=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, size: list[int], role: Role, meta: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("artifact") / "a"
    tensor = (100 * torch.rand(size)).to(dtype)
    write_one(
        folder, PackedLayer({"x": tensor, "y": tensor.T if tensor.dim() == 2 else tensor}, {"x": role, "y": role}, meta)
    )
    ((layer, packed),) = Artifact(folder).packed()
    assert layer.shape == SHAPE
    assert packed.roles == {"x": role, "y": role}
    assert packed.meta == meta
    assert packed.tensors["x"].dtype == dtype
    assert torch.equal(packed.tensors["x"], tensor)
    assert torch.equal(packed.tensors["y"], tensor.T if tensor.dim() == 2 else tensor)


def test_tensors_that_share_memory_are_each_stored(tmp_path: Path) -> None:
    whole = torch.arange(15.0)
    write_one(tmp_path / "a", PackedLayer({"x": whole[:4], "y": whole[2:6]}, {"x": Role.KEPT, "y": Role.KEPT}))
    ((_, packed),) = Artifact(tmp_path / "a").packed()
    assert packed.tensors["x"].tolist() == [0, 1, 2, 3]
    assert packed.tensors["y"].tolist() == [2, 3, 4, 5]
    assert (tmp_path / "a/blocks/block-0000.safetensors").stat().st_size < 400


def test_shared_parts(tmp_path: Path) -> None:
    shared = Shared({"book": torch.ones(2, 2)}, {"book": Role.CODEBOOK}, {"kinds": ["a", "b"]})
    write_one(tmp_path / "a", PackedLayer({"x": torch.ones(1)}, {"x": Role.CODE}), shared)
    read = Artifact(tmp_path / "a").shared
    assert read is not None
    assert (read.roles, read.meta) == (shared.roles, shared.meta)
    assert torch.equal(read.tensors["book"], torch.ones(2, 2))


def test_nothing_is_left_of_a_writer_that_fails(tmp_path: Path) -> None:
    def fail(writer: ArtifactWriter) -> None:
        writer.add_layer(SHAPE.name, PackedLayer({}, {}))
        writer.flush_block(0)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), ArtifactWriter(tmp_path / "a") as writer:
        fail(writer)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_leave_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY}key-1234"
    (left / "blocks").mkdir(parents=True)
    (left / "blocks" / "x").write_bytes(b"1")
    write_one(tmp_path / "kept", PackedLayer({}, {}))
    assert remove_unfinished(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert remove_unfinished(tmp_path / "absent") == 0


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    write_one(tmp_path / "a", PackedLayer({"x": torch.ones(1)}, {"x": Role.CODE}))
    before = read_manifest(tmp_path / "a")
    write_one(tmp_path / "a", PackedLayer({"x": torch.zeros(1)}, {"x": Role.CODE}))
    assert read_manifest(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_damage_is_found(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    folder = tmp_path / "a"
    compress_model(RTN, RTN.options(), base, folder)
    Artifact(folder)
    for name in ("blocks/block-0001.safetensors", "rest.safetensors", "config.json", "tokenizer.json"):
        flip(folder / name)
        with pytest.raises(ArtifactError, match=rf"{name}: sha256 differs.*remove the folder"):
            load(folder)
        flip(folder / name)
    (folder / "rest.safetensors").rename(tmp_path / "rest")
    with pytest.raises(ArtifactError, match=r"rest\.safetensors: missing"):
        Artifact(folder)


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    write_one(tmp_path / "a", PackedLayer({}, {}))
    path = tmp_path / "a" / MANIFEST
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "schema_version": SCHEMA + 1}))
    with pytest.raises(ArtifactError, match=r"schema 2 is newer than this evenbits knows \(1\); upgrade"):
        Artifact(tmp_path / "a")
    path.write_text(json.dumps({**good, "paper_bits": good["paper_bits"] + 1}))
    with pytest.raises(ArtifactError, match=r"differs from its sha256"):
        Artifact(tmp_path / "a")
    lacking = json.dumps({k: v for k, v in good.items() if k != "layers"}).encode()
    path.write_bytes(lacking)
    (tmp_path / "a" / MANIFEST_DIGEST).write_text(hashlib.sha256(lacking).hexdigest())
    with pytest.raises(ArtifactError, match=r"layers: Field required"):
        Artifact(tmp_path / "a")
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"damaged"):
        Artifact(tmp_path / "a")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"not an artifact"):
        Artifact(tmp_path / "a")


def test_an_artifact_of_a_method_that_is_not_installed(tmp_path: Path) -> None:
    write_one(tmp_path / "a", PackedLayer({}, {}), method="gone")
    with pytest.raises(SuiteError, match=r"unknown method 'gone'"):
        load(tmp_path / "a")


def test_base_files_without_weights(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    for name in ("pytorch_model.bin", "model.gguf", "model.safetensors.index.json", "flax_model.msgpack"):
        (base / name).write_bytes(b"{}")
    compress_model(RTN, RTN.options(), base, tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST, "rest.safetensors", "blocks"} <= names
    assert not {name for name in names if name.startswith(("pytorch_model", "model", "flax_model"))}


# -- the ledger ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_ledger_bills_what_is_on_disk(tmp_path: Path, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", tied=tied)
    planned = plan_model(ModelSource("tiny", base, "none"), "float16")
    facts, shapes = planned.facts, planned.shapes
    options = RTN.options.model_validate({"bits": 3, "group_size": 32, "symmetric": False})
    compress_model(RTN, options, base, tmp_path / "a", dtype="float16")
    ledger = measure_bits(tmp_path / "a", facts)
    estimate = RTN.predict(options, shapes)
    assert ledger.roles == {role.value: count for role, count in estimate.role_bytes.items()}
    assert ledger.bits.linear == estimate.linear_bits(shapes)
    assert ledger.bits.index == pytest.approx(3, abs=0.01)
    files = list((tmp_path / "a").rglob("*.safetensors"))
    assert ledger.model_bytes == sum(path.stat().st_size for path in files)
    payload = sum(t.numel() * t.element_size() for path in files for t in load_file(path).values())
    assert payload == ledger.linear_bytes + ledger.rest_bytes
    assert ledger.rest_bytes == shapes.rest_bytes
    parameters = sum(t.numel() for t in load_file(base / "model.safetensors").values())
    assert facts.parameters == parameters
    assert ledger.bits.model == 8 * ledger.model_bytes / parameters
    assert ledger.bits.model > estimate.model_bits(shapes)  # the headers
    assert ledger.compressed_weights == facts.linear_weights == shapes.weights
    assert ledger.ratios["linear_fp32"] == pytest.approx(32 / ledger.bits.linear)
    assert ledger.ratios["model_fp32"] == pytest.approx(4 * parameters / ledger.model_bytes)
    assert facts.stored_bits == 32


def test_a_layer_left_dense_is_billed_at_the_evaluated_dtype(tmp_path: Path) -> None:
    from evenbits.compressor import Layer, LayerCompressor, Needs
    from evenbits.driver import Driver, Work

    class AllButDown(LayerCompressor):
        def compress(self, weight: Any, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
            if layer.shape.kind == "mlp.down_proj":
                return dense_layer(weight, torch.float16)
            return PackedLayer({"w": weight.to(torch.float8_e5m2).view(torch.uint8)}, {"w": Role.CODE})

        def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Any:
            return packed.tensors["w"].view(torch.float8_e5m2).float()

    base = tiny_model(tmp_path / "base")
    facts = plan_model(ModelSource("tiny", base, "none"), "float16").facts
    work = Work(base, "float16", torch.device("cpu"), AllButDown(), Needs(), None, 0, None, None)
    toy = Compressor("toy", "", "", Options, lambda o: AllButDown(), RTN.predict, RTN.fit)
    with ArtifactWriter(tmp_path / "a") as writer:
        stored = Driver(work, writer).run()
        writer.finish(**manifest_facts(toy, Options()), layers=tuple(stored.layers))
    ledger = measure_bits(tmp_path / "a", facts)
    down = 2 * 48 * 88
    assert ledger.left_dense == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    assert ledger.roles == {"code": facts.linear_weights - down, "dense": 2 * down}
    assert ledger.compressed_weights == facts.linear_weights - down
    assert ledger.bits.index == 8
    assert ledger.bits.linear == 8 * (facts.linear_weights + down) / facts.linear_weights


def test_the_dense_ledger(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", tied=True, dtype="bfloat16")
    ledger = dense_ledger(plan_model(ModelSource("tiny", base, "none"), "bfloat16").facts)
    assert ledger.bits.linear == ledger.bits.model == 16
    assert ledger.ratios == {"linear_fp32": 2, "linear_stored": 1, "model_fp32": 2, "model_stored": 1}
    tensors = load_file(base / "model.safetensors").values()
    assert ledger.model_bytes == sum(2 * t.numel() for t in tensors)
