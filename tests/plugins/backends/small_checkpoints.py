"""Small checkpoints in the layouts of other people's libraries, written by plain loops of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evenbits.shapes import read_inventory

Encoded = tuple[dict[str, Tensor], Tensor]  # what a file holds of a layer, and the weight that it stands for


@dataclass
class Small:
    """A checkpoint's folder, and the weight that each of its layers stands for."""

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)

    def edit(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Rewrite its one file."""
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    def configure(self, change: Callable[[dict[str, Any]], None]) -> None:
        config = json.loads((self.folder / "config.json").read_text())
        change(config)
        (self.folder / "config.json").write_text(json.dumps(config))


def write_checkpoint(
    base: Path,
    folder: Path,
    encode: Callable[[Tensor, torch.Generator], Encoded],
    quantization: Mapping[str, Any],
    dense: tuple[str, ...] = (),
) -> Small:
    """The base model with every layer but `dense` encoded, in half precision as published ones are."""
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    inventory, generator = read_inventory(base), torch.Generator().manual_seed(1)
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    found = Small(folder)
    for shape, _ in inventory.layers:
        if shape.name in dense:
            found.weights[shape.name] = tensors[f"{shape.name}.weight"].float()
            continue
        parts, found.weights[shape.name] = encode(tensors.pop(f"{shape.name}.weight").float(), generator)
        tensors |= {f"{shape.name}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found.configure(lambda config: config.update(quantization_config=dict(quantization)))
    return found


AQLM = {
    "quant_method": "aqlm",
    "nbits_per_codebook": 6,
    "num_codebooks": 2,
    "in_group_size": 4,
    "out_group_size": 1,
    "linear_weights_not_to_quantize": ["lm_head.weight"],
}


def aqlm(weight: Tensor, generator: torch.Generator) -> Encoded:
    """Two codebooks of 64 words of 4 weights: the second takes what the first leaves."""
    scales = weight.std(1).half()
    left = (weight / scales.float()[:, None]).reshape(-1, 4)
    books, codes = [], []
    for _ in range(2):
        book = 0.7 * left[torch.randperm(len(left), generator=generator)[:64]]
        book = torch.nn.functional.pad(book, (0, 0, 0, 64 - len(book))).half()
        nearest = torch.cdist(left, book.float()).argmin(1)
        left = left - book.float()[nearest]
        books.append(book)
        codes.append(nearest)
    rows, columns = weight.shape
    restored = torch.zeros(rows, columns)
    stored = torch.zeros(rows, columns // 4, 2, dtype=torch.int8)
    for row in range(rows):
        for group in range(columns // 4):
            for place, (book, code) in enumerate(zip(books, codes, strict=True)):
                index = int(code[row * (columns // 4) + group])
                stored[row, group, place] = index if index < 32 else index - 64  # wraps, as the package packs it
                restored[row, 4 * group : 4 * group + 4] += book[index].float()
        restored[row] *= scales[row].float()
    parts = {"codes": stored, "codebooks": torch.stack(books)[:, :, None], "scales": scales[:, None, None, None]}
    return parts, restored


def vptq_config(names: Mapping[str, tuple[int, int]], **changes: Any) -> dict[str, Any]:
    """names: (out, in) by layer. What the vptq package writes of each layer."""
    settings = {
        "vector_lens": [-1, 4], "num_centroids": [-1, 32], "num_res_centroids": [-1, 8], "group_num": 1,
        "outlier_size": 0, "indices_as_float": False, "enable_norm": True, "enable_perm": True,
        "is_indice_packed": True, "bias": None, "vector_quant_dim": "out", **changes,
    }  # fmt: skip
    layers = {
        name: {**settings, "in_features": columns, "out_features": rows, "group_size": columns}
        for name, (rows, columns) in names.items()
    }
    return {"quant_method": "vptq", "config_for_layers": layers}


def pack_bits(numbers: list[int], width: int) -> list[int]:
    """int32 words of a row of numbers, the lowest bit first."""
    bits = "".join(format(number, f"0{width}b")[::-1] for number in numbers)
    words = [int(bits[i : i + 32].ljust(32, "0")[::-1], 2) for i in range(0, len(bits), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def vptq(weight: Tensor, generator: torch.Generator) -> Encoded:
    """Vectors of 4 outputs: 32 words, 8 of what these leave; inputs in another order, each with scale and bias."""
    rows, columns = weight.shape
    order = torch.randperm(columns, generator=generator)
    scale, bias = weight.std(0).half(), weight.mean(0).half()
    normed = ((weight - bias.float()) / scale.float())[:, order]
    padded = torch.nn.functional.pad(normed, (0, 0, 0, -rows % 4))
    left = padded.T.reshape(columns, -1, 4)  # an input's vectors
    found, indices = torch.zeros_like(left), []
    books = []
    for words in (32, 8):
        book = 0.7 * left.reshape(-1, 4)[torch.randperm(left[..., 0].numel(), generator=generator)[:words]]
        book = book.half()
        nearest = torch.cdist(left.reshape(-1, 4), book.float()).argmin(1).reshape(columns, -1)
        found, left = found + book.float()[nearest], left - book.float()[nearest]
        books.append(book.reshape(1, -1))
        indices.append(nearest)
    packed = [
        pack_bits([int(indices[0][c, v]) + 32 * int(indices[1][c, v]) for c in range(columns)], 8)
        for v in range(left.shape[1])
    ]
    restored = torch.zeros(rows, columns)
    decoded = found.reshape(columns, -1).T[:rows]
    for place, column in enumerate(order.tolist()):
        restored[:, column] = decoded[:, place] * scale[column].float() + bias[column].float()
    parts = {
        "indices": torch.tensor([packed], dtype=torch.int32), "centroids.weight": books[0],
        "res_centroids.weight": books[1], "perm": order.to(torch.int16), "weight_scale": scale, "weight_bias": bias,
    }  # fmt: skip
    return parts, restored
