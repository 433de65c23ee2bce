"""Scales that a norm or the layer before takes back are no error; those that nothing takes back are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.plugins.backends.test_checkpoint import made_by_a_library
from torch import Tensor

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits.maths.hessian import relative_error
from evenbits.models import read_tensor
from evenbits.shapes import read_inventory
from evenbits.testing import tiny_model
from evenbits_backends.layout import Grid
from evenbits_backends.opened import StoredCheckpoint, decode
from evenbits_backends.rescaling import Rescaling, fitted
from evenbits_backends.trust import Claim, check_left, check_weight, folded, plain_rounding

GOLDEN = Path(__file__).parent / "golden"
AWQ = Claim("x", calibrated=True, rescales=True)
KINDS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
SHAPES = [LayerShape(f"model.layers.0.{kind}", 0, kind, *size) for kind, size in KINDS.items()]
VALUES = 16  # width of a head: two heads of values, each read by two of the queries'


class Block:
    """Random weights, and how AWQ stores them: `scales` by the operation that takes them back."""

    def __init__(self, bits: int | None) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.bits = bits
        self.dense = {shape.kind: self.normal(shape.out_features, shape.in_features) for shape in SHAPES}
        self.norms = {name: 1 + 0.1 * self.normal(64) for name in ("input_layernorm", "post_attention_layernorm")}
        sizes = {"input_layernorm": 64, "post_attention_layernorm": 64, "self_attn.v_proj": 32, "mlp.up_proj": 128}
        self.scales = {name: (0.7 * self.normal(size)).exp() for name, size in sizes.items()}

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.draw)

    def columns(self, kind: str) -> Tensor:
        writer = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}.get(kind)
        if writer is None:
            return self.scales["input_layernorm" if kind.startswith("self_attn") else "post_attention_layernorm"]
        scale = self.scales[writer]
        return scale if writer == "mlp.up_proj" else scale.view(2, 1, VALUES).expand(2, 2, VALUES).flatten()

    def stored(self, kind: str) -> Tensor:
        weight = self.dense[kind] * self.columns(kind)
        if kind in self.scales:
            weight = weight / self.scales[kind][:, None]
        return weight if self.bits is None else plain_rounding(weight, Grid(self.bits, 32))

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        kind = name.removeprefix("model.layers.0.").removesuffix(".weight")
        return self.norms[kind], self.norms[kind] / self.scales[kind]


@pytest.mark.parametrize("bits", [None, 2, 3, 4])
def test_what_is_taken_back_is_no_error(bits: int | None) -> None:
    block = Block(bits)
    rescaling = Rescaling("llama", VALUES, block.norm)
    for shape in SHAPES:
        weight, stored = block.dense[shape.kind], block.stored(shape.kind)
        fold = rescaling.fold(shape, weight, stored)
        assert fold is not None
        assert fold.columns is not None
        # a norm tells exactly, rounded rows as nearly as rounding lets them
        allowed = (
            {None: 1e-5, 4: 0.05, 3: 0.1, 2: 0.3}[bits] if shape.kind in ("self_attn.o_proj", "mlp.down_proj") else 1e-5
        )
        assert float((fold.columns / block.columns(shape.kind) - 1).abs().amax()) < allowed
        check_weight(shape, weight, stored, fold, None if bits is None else Grid(bits, 32), AWQ)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_columns_that_nothing_takes_back_are_refused(kind: str, bits: int) -> None:
    """As AutoAWQ 0.2.9 left them on a CPU; a fold fitted to the layer alone sees nothing of it. At 2 bits rounding's
    own error leaves room for such scales."""
    block = Block(bits)
    rescaling = Rescaling("llama", VALUES, block.norm)
    for shape in SHAPES:
        weight, stored = block.dense[shape.kind], block.stored(shape.kind)
        if shape.kind != kind:
            rescaling.fold(shape, weight, stored)
            continue
        scale = (0.8 * block.normal(shape.in_features)).exp()
        wrong = plain_rounding(weight * block.columns(kind) * scale, Grid(bits, 32))
        if kind in block.scales:
            wrong = plain_rounding(weight * block.columns(kind) * scale / block.scales[kind][:, None], Grid(bits, 32))
        check_weight(shape, weight, wrong, fitted(weight, wrong), Grid(bits, 32), AWQ)
        with pytest.raises(TrialFailed, match="not trusted"):
            check_weight(shape, weight, wrong, rescaling.fold(shape, weight, wrong), Grid(bits, 32), AWQ)
        return


def test_values_that_heads_do_not_explain() -> None:
    block = Block(4)
    rescaling = Rescaling("llama", 24, block.norm)
    for shape in SHAPES[:3]:
        rescaling.fold(shape, block.dense[shape.kind], block.stored(shape.kind))
    with pytest.raises(TrialFailed, match=r"o_proj: reads 64 channels, which 32 values in heads of 24 do not explain"):
        rescaling.fold(SHAPES[3], block.dense["self_attn.o_proj"], block.stored("self_attn.o_proj"))


def test_gemmas_norms_add_one() -> None:
    block = Block(None)

    def norm(name: str) -> tuple[Tensor, Tensor]:
        ours, theirs = block.norm(name)
        return ours - 1, theirs - 1

    fold = Rescaling("gemma", VALUES, norm).fold(SHAPES[0], block.dense["self_attn.q_proj"], torch.zeros(64, 64))
    assert fold is not None
    assert fold.columns is not None
    torch.testing.assert_close(fold.columns, block.columns("self_attn.q_proj"), rtol=1e-4, atol=0)


# -- checkpoints that libraries made ------------------------------------------------------------------------------


def check_all(folder: Path) -> Mapping[str, float]:
    """Error of each layer's weight beside plain rounding's, of a checkpoint that must be one of golden's model."""
    opened = StoredCheckpoint(folder, GOLDEN / "dense", "float32", AWQ)
    found = {}
    for shape, stored in read_inventory(GOLDEN / "dense").layers:
        weight, packed = read_tensor(stored).float(), opened.layer(shape)
        dense = set(packed.roles.values()) == {Role.DENSE}
        restored = packed.tensors["weight"].float() if dense else decode(packed, shape, opened.shared)
        fold = opened.check(shape, weight, restored)
        assert fold is not None
        rescaled = weight * fold.columns * (1 if fold.rows is None else fold.rows[:, None])
        grid = opened.layout.grid(shape, opened.facts)
        assert grid is not None
        found[shape.name] = relative_error(rescaled, restored) / relative_error(
            rescaled, plain_rounding(rescaled, grid)
        )
    return found


@pytest.mark.parametrize("library", ["autoawq", "llmcompressor-awq"])
def test_a_librarys_own_scales_are_taken_back(library: str, tmp_path: Path) -> None:
    """Gains of norms change by up to 15 % and more; what is stored is no further off than rounding is."""
    small = made_by_a_library(library, tmp_path / library)
    dense, stored = load_file(GOLDEN / "dense" / "model.safetensors"), load_file(small.folder / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert float((stored[norm].float() / dense[norm].float() - 1).abs().amax()) > 0.15
    assert max(check_all(small.folder).values()) < 1.3


def another_norm(tensors: dict[str, Tensor]) -> None:
    norm = tensors["model.layers.0.input_layernorm.weight"]
    norm *= (0.5 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(0))).exp()


def columns_of_down(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.scales"][0] *= 2  # a group's


@pytest.mark.parametrize(("change", "layer"), [(another_norm, "self_attn.q_proj"), (columns_of_down, "mlp.down_proj")])
def test_a_scale_out_of_place_is_refused(
    change: Callable[[dict[str, Tensor]], None], layer: str, tmp_path: Path
) -> None:
    small = made_by_a_library("autoawq", tmp_path / "autoawq")
    small.edit(change)
    with pytest.raises(TrialFailed, match=rf"{layer}: x stored a weight with .*: not trusted"):
        check_all(small.folder)


def test_a_layer_left_dense_must_be_rescaled_too(tmp_path: Path) -> None:
    """Equal to the base model's, behind a norm that is not: other outputs."""
    small = made_by_a_library("autoawq", tmp_path / "autoawq")
    dense = load_file(GOLDEN / "dense" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"

    def leave(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = dense[f"{name}.weight"]

    small.edit(leave)
    with pytest.raises(TrialFailed, match=r"k_proj: x left it dense, with a relative squared error of"):
        check_all(small.folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_dense_layer_behind_a_rounded_one(bits: int) -> None:
    """Its scales are exact, what takes them back is fitted: also a scale of all columns at once is found."""
    block = Block(bits)
    rescaling = Rescaling("llama", VALUES, block.norm)
    up, down = SHAPES[-2:]
    weight = block.dense[down.kind]
    rescaling.fold(up, block.dense[up.kind], block.stored(up.kind))
    fold = rescaling.fold_dense(down, weight, weight * block.columns(down.kind))
    assert fold is not None
    torch.testing.assert_close(fold.columns, block.columns(down.kind))
    factors = (0.3, 3.0) if bits == 2 else (0.7, 1.4)  # a row of 64 at 2 bits fits its factor that ill
    for stored in (weight, *(factor * weight * block.columns(down.kind) for factor in factors)):
        with pytest.raises(TrialFailed, match=r"down_proj: a column of .* than .*up_proj takes back, \d+% off"):
            rescaling.fold_dense(down, weight, stored)


def test_a_dense_layer_that_another_reads() -> None:
    """Columns by the norm, rows by its own weight: also where these are far from one on average."""
    block = Block(None)
    block.scales["mlp.up_proj"] *= 3
    shape = SHAPES[-2]
    weight, stored = block.dense[shape.kind], block.stored(shape.kind)
    fold = Rescaling("llama", VALUES, block.norm).fold_dense(shape, weight, stored)
    assert fold is not None
    check_left(shape.name, folded(weight, fold), stored, AWQ)


def test_biases_are_multiplied_as_rows_are() -> None:
    block, ours = Block(4), torch.ones(128)
    rescaling = Rescaling("llama", VALUES, block.norm)
    up = SHAPES[-2]
    rescaling.fold(up, block.dense[up.kind], block.stored(up.kind))
    found = rescaling.bias(f"{up.name}.bias", ours)
    assert found is not None
    expected, doubt = found
    assert relative_error(1 / block.scales[up.kind], expected) < doubt**2 < 0.02
    assert rescaling.bias("model.layers.0.self_attn.q_proj.bias", ours) is None
    assert rescaling.bias("model.norm.weight", ours) is None


@pytest.mark.parametrize("gain", [float("nan"), float("inf"), 0.0])
def test_a_norm_without_a_gain_is_refused(gain: float, tmp_path: Path) -> None:
    small = made_by_a_library("autoawq", tmp_path / "autoawq")
    small.edit(lambda tensors: tensors["model.layers.0.input_layernorm.weight"][5].fill_(gain))
    with pytest.raises(
        TrialFailed, match=r"input_layernorm: its gain is not finite, or nothing where the base model's"
    ):
        check_all(small.folder)


@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_a_norm_that_no_layer_reads_stays(value: float, tmp_path: Path) -> None:
    small = made_by_a_library("autoawq", tmp_path / "autoawq")
    small.edit(lambda tensors: tensors["model.norm.weight"].fill_(value))
    with pytest.raises(TrialFailed, match=r"model\.norm\.weight: (not finite in|x left it dense)"):
        StoredCheckpoint(small.folder, GOLDEN / "dense", "float32", AWQ).rest()


def test_nothing_else_may_change(tmp_path: Path) -> None:
    """Norms of a rescaled checkpoint do; an embedding never does, nor a norm where nothing is rescaled."""
    small = made_by_a_library("autoawq", tmp_path / "autoawq")
    opened = StoredCheckpoint(small.folder, GOLDEN / "dense", "float32", AWQ)
    assert {name.split(".")[-2] for name in opened.rest()} >= {"input_layernorm", "post_attention_layernorm"}
    with pytest.raises(TrialFailed, match=r"layernorm.weight: x left it dense, with a relative squared error of"):
        StoredCheckpoint(small.folder, GOLDEN / "dense", "float32", Claim("x", calibrated=True)).rest()
    small.edit(lambda tensors: tensors["model.embed_tokens.weight"][3].mul_(2))
    with pytest.raises(TrialFailed, match=r"model\.embed_tokens\.weight: x left it dense"):
        StoredCheckpoint(small.folder, GOLDEN / "dense", "float32", AWQ).rest()


def test_a_model_that_is_not_known_is_fitted(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "gpt2", "gpt2")
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (tmp_path / "stored").mkdir()
    for file in base.iterdir():
        (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
    text = (base / "config.json").read_text().rstrip().removesuffix("}")
    quantization = str(config).replace("'", '"').replace("True", "true")
    (tmp_path / "stored" / "config.json").write_text(f'{text}, "quantization_config": {quantization}}}')
    opened = StoredCheckpoint(tmp_path / "stored", base, "float32", AWQ)
    shape = read_inventory(base).layers[0][0]
    weight = torch.randn(shape.out_features, shape.in_features)
    fold = opened.rescaled(shape, weight, 2 * weight)
    assert fold is not None
    assert fold.rows is not None
    torch.testing.assert_close(fold.columns, torch.full((shape.in_features,), 2.0))
