"""A checkpoint's folder: its config, and its tensors by name wherever they are among its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evenbits.compressor import LayerShape, Role
from evenbits.errors import SuiteError, TrialFailed
from evenbits.shapes import read_header

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32", "F64")
OLDER_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")


class Entry(NamedTuple):
    """A tensor as a file's header has it. dtype: in safetensors' words ("F16")."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class CheckpointHeaders:
    """What a checkpoint is made of, known without its weights.

    where: how messages call it. config: config.json. older: the quantization config beside it that older ones have.
    """

    def __init__(
        self, where: str, config: Mapping[str, Any], entries: Mapping[str, Entry], older: Mapping[str, Any] | None
    ) -> None:
        self.named, self.config, self.entries = where, config, entries
        self.quantization: Mapping[str, Any] = dict(config.get("quantization_config") or older or {})
        if not self.quantization:
            raise TrialFailed(f"{where}: no quantization_config in its config: a dense model, not a quantized one")

    def packed(self, shape: LayerShape, names: Collection[str]) -> bool:
        """Whether the layer is there in a layout's tensors (`names`), or else as a dense weight.

        Raises TrialFailed, naming the tensor, where it is neither in whole.
        """
        there = [name for name in names if f"{shape.name}.{name}" in self.entries]
        if set(there) <= {"weight"} and self._is_dense(shape):
            return False
        if missing := [name for name in names if name not in there]:
            beside = f"; it has {', '.join(sorted(there))}" if there else ", and no dense weight of the layer"
            raise TrialFailed(f"{self.named}: no tensor {f'{shape.name}.{missing[0]}'!r}{beside}")
        return True

    def with_spare_bias(self, shape: LayerShape, roles: Mapping[str, Role]) -> dict[str, Role]:
        """`roles`, and the file's bias where the base model has none: of zeros, and its bytes count all the same."""
        spare = not shape.bias and f"{shape.name}.bias" in self.entries
        return {**roles, "bias": Role.META} if spare else dict(roles)

    def _is_dense(self, shape: LayerShape) -> bool:
        entry = self.entries.get(f"{shape.name}.weight")
        sizes = ((shape.out_features, shape.in_features), (shape.in_features, shape.out_features))  # GPT-2's way round
        return entry is not None and entry.dtype in FLOATS and entry.shape in sizes

    def check_names(self, layers: Sequence[LayerShape]) -> None:
        """Raises TrialFailed where tensors go by other names than the base model's, or blocks differ in number."""
        first = layers[0]
        if not any(name.startswith(f"{first.name}.") for name in self.entries):
            near = next((name for name in sorted(self.entries) if f".{first.kind}." in f".{name}"), None)
            inner = near is not None and first.name.endswith(near.partition(f".{first.kind}.")[0] + f".{first.kind}")
            hint = "; it was saved without the causal model around it: save that" if inner else ""
            theirs = f"the checkpoint's are called as {near!r}{hint}" if near else "nor any other layer of that kind"
            raise TrialFailed(f"{self.named}: no tensor of {first.name}; {theirs}")
        blocks, count = 1 + max(layer.block for layer in layers), self.config.get("num_hidden_layers")
        if isinstance(count, int) and count != blocks:
            raise TrialFailed(f"{self.named}: {count} blocks, {blocks} in the base model: another model's checkpoint")


class CheckpointFolder(CheckpointHeaders):
    """Read only; tensors are loaded when asked for. Raises TrialFailed for a folder that is no whole checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise TrialFailed(f"{path}: no such folder (looked from {Path.cwd()}); give that of a quantized checkpoint")
        if not (path / "config.json").is_file():
            raise TrialFailed(f"{path}: no config.json; give the folder of a quantized checkpoint")
        config = _json(path / "config.json")
        older = next((_json(path / name) for name in OLDER_CONFIGS if (path / name).is_file()), None)
        super().__init__(str(path), config, self._read_headers(), older)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Those that the index names, else all."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            found = sorted({self.path / str(name) for name in _json(index).get("weight_map", {}).values()})
        else:
            found = sorted(self.path.glob("*.safetensors"))
        if missing := [file for file in found if not file.is_file()]:
            raise TrialFailed(f"{missing[0]}: missing; {index.name} names it")
        if not found:
            pickled = sorted([*self.path.glob("*.bin"), *self.path.glob("*.pt")])
            hint = f" (only {pickled[0].name}, which is pickled: convert it to safetensors)" if pickled else ""
            raise TrialFailed(f"{self.path}: no *.safetensors{hint}")
        return tuple(found)

    def _read_headers(self) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        self.where: dict[str, Path] = {}
        for file in self.files:
            try:
                header = read_header(file)
            except SuiteError as error:
                raise TrialFailed(str(error)) from None
            end = 0
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if name in found:
                    raise TrialFailed(f"{self.path}: {name!r} is both in {self.where[name].name} and in {file.name}")
                first, last = entry["data_offsets"]
                found[name], self.where[name] = Entry(entry["dtype"], tuple(entry["shape"]), last - first), file
                end = max(end, last)
            with file.open("rb") as opened:
                whole = 8 + int.from_bytes(opened.read(8), "little") + end
            if (size := file.stat().st_size) != whole:
                raise TrialFailed(f"{file}: {size:,} bytes of {whole:,}: truncated or damaged; fetch it again")
        return found

    def tensor(self, name: str) -> Tensor:
        """Raises TrialFailed naming what is missing."""
        from safetensors import safe_open

        if name not in self.where:
            raise TrialFailed(f"{self.path}: no tensor {name!r}")
        with safe_open(self.where[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrialFailed(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise TrialFailed(f"{path}: not a JSON object")
    return found
