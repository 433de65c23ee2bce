"""Bits are counted from the bytes on disk: every number here was worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evenbits.artifact import ArtifactWriter, dense_layer
from evenbits.compressor import PackedLayer, Role, Shared
from evenbits.ledger import dense_ledger, measure_bits, measure_layers
from evenbits.manifest import StoredLayer
from evenbits.record import ModelFacts

# two layers of 8 x 16 and one tensor of 10 numbers beside them; stored in float16, evaluated in float32
FACTS = ModelFacts(
    name="m", revision="r", dtype="float32", parameters=266, linear_weights=256, stored_bits=16,
    linear_bytes=1024, model_bytes=1064,
)  # fmt: skip


def layer(name: str, packed: PackedLayer) -> StoredLayer:
    return StoredLayer(
        name=name, block=0, kind=name, out_features=8, in_features=16, stored_dtype="float16", bias=False,
        file="blocks/block-0000.safetensors", roles=packed.roles, error=0.0,
    )  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Layer a: 32 bytes of codes, 16 of scales, 30 of facts; b left dense; 40 bytes of codebook that both share."""
    a = PackedLayer(
        {"codes": torch.zeros(32, dtype=torch.uint8), "scales": torch.ones(8, dtype=torch.float16)},
        {"codes": Role.CODE, "scales": Role.SCALE}, {"note": "kept in the header"},
    )  # fmt: skip
    b = dense_layer(torch.ones(8, 16), torch.float32)
    folder = tmp_path / "artifact"
    with ArtifactWriter(folder) as writer:
        writer.add_layer("a", a)
        writer.add_layer("b", b)
        writer.flush_block(0)
        writer.write_shared(Shared({"book": torch.zeros(20, dtype=torch.float16)}, {"book": Role.CODEBOOK}))
        writer.write("rest.safetensors", {"norm": torch.ones(10)})
        writer.finish(
            key="k", evenbits="0", model={}, method="x", distribution="", options={}, budget=None, seed=0,
            recovery=(), calibration=None, dtype="float32", paper_bits=2.5, layers=(layer("a", a), layer("b", b)),
            shared={"book": Role.CODEBOOK},
        )  # fmt: skip
    return folder


def test_bytes_by_role(artifact: Path) -> None:
    ledger = measure_bits(artifact, FACTS)
    assert ledger.roles == {"code": 32, "codebook": 40, "dense": 512, "meta": 30, "scale": 16}
    assert ledger.linear_bytes == 630
    assert ledger.rest_bytes == 40
    assert ledger.left_dense == ("b",)
    assert ledger.compressed_weights == 128
    assert ledger.bits.index == 8 * 32 / 128
    assert ledger.bits.paper == 2.5
    assert ledger.bits.linear == 8 * 630 / 256


def test_layers_by_their_own_bytes(artifact: Path) -> None:
    a, b = measure_layers(artifact)
    assert a.bits == 8 * (32 + 16 + 30) / 128  # a method that kept its weights among the facts would pay for them
    assert a.meta == {"note": "kept in the header"}
    assert (b.bits, b.meta) == (32, {})


def test_model_bits_include_file_headers(artifact: Path) -> None:
    ledger = measure_bits(artifact, FACTS)
    on_disk = sum(path.stat().st_size for path in artifact.rglob("*.safetensors"))
    assert on_disk > 640
    assert ledger.model_bytes == on_disk
    assert ledger.bits.model == 8 * on_disk / 266


def test_ratios(artifact: Path) -> None:
    ledger = measure_bits(artifact, FACTS)
    assert ledger.ratios == pytest.approx({
        "linear_fp32": 1024 / 630, "linear_stored": 512 / 630,
        "model_fp32": 1064 / ledger.model_bytes, "model_stored": 532 / ledger.model_bytes,
    })  # fmt: skip


def test_dense() -> None:
    ledger = dense_ledger(FACTS)
    assert (ledger.bits.linear, ledger.bits.model) == (32, 32)
    assert ledger.roles == {"dense": 1024}
    assert ledger.rest_bytes == 40
    assert ledger.ratios == {"linear_fp32": 1, "linear_stored": 0.5, "model_fp32": 1, "model_stored": 0.5}


def test_of_a_run(here: Any, suites: Any) -> None:
    """Two blocks of four 32 x 32 and three 32 x 64 matrices: 20,480 weights, 576 rows; embeddings and norms: 4,256."""
    methods = """[
        { name = "rtn", budget = "free", options = { bits = 3, group_size = 16 } },
        { name = "kmeans", budget = "free", options = { d = 2, codebook_size = 16, scope = "model" } },
    ]"""
    records, _ = here.run(suites.text(methods))
    dense, rtn, kmeans = (record.ledger for record in records)
    assert dense.roles == {"dense": 81920}
    # 3 bits each; a 16-bit scale for every 16 columns
    assert rtn.roles == {"code": 7680, "scale": 2560}
    assert rtn.bits.linear == 4.0
    assert rtn.ratios["linear_fp32"] == 8.0
    # 4 bits for two weights; a 16-bit scale a row; 16 codewords of two 16-bit numbers, once
    assert kmeans.roles == {"code": 5120, "codebook": 64, "scale": 1152}
    assert kmeans.bits.index == 2.0
    assert rtn.rest_bytes == kmeans.rest_bytes == dense.rest_bytes == 4 * 4256
