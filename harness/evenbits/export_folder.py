"""The folder of an export: safetensors in shards, config, tokenizer; there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evenbits.errors import SuiteError

SHARD_BYTES = 4 << 30


class ExportFolder:
    """Written into a temporary neighbour of `folder`; `finish` renames it. Leaving the context early removes it."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Raises SuiteError where something is there already."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SuiteError(f"{folder}: there is something already; give --out a folder that is not there or empty")
        self.folder = folder
        self._place = folder.absolute()  # "." has no name
        self.path = self._place.parent / f".exporting-{self._place.name}-{os.getpid()}"
        self._limit = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._payload = 0

    def __enter__(self) -> ExportFolder:
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise SuiteError(f"{self.folder}: cannot be made ({error.strerror}); give --out another place") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises SuiteError for what the system refused, such as a full disk."""
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise SuiteError(f"{self.folder}: cannot be written ({' '.join(str(error).split())})") from error

    def add(self, name: str, tensor: Tensor) -> None:
        pending = sum(held.nbytes for held in self._pending.values())
        if self._pending and pending + tensor.nbytes > self._limit:
            self._flush()
        # a copy: what is read from a file is a view of it, and views of one storage would be refused
        self._pending[name] = tensor.detach().cpu().clone().contiguous()

    def _flush(self) -> None:
        if self._pending:
            self._payload += sum(held.nbytes for held in self._pending.values())
            save_file(self._pending, self.path / f"shard-{len(self._shards)}", metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending = {}

    def copy(self, source: Path) -> None:
        shutil.copyfile(source, self.path / source.name)

    def write_json(self, name: str, facts: Mapping[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")

    def finish(self) -> None:
        """Names the shards as transformers looks for them, and puts the folder in its place."""
        self._flush()
        count = len(self._shards)
        where: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self.path / f"shard-{index}").rename(self.path / file)
            where |= dict.fromkeys(names, file)
        if count > 1:
            self.write_json(
                "model.safetensors.index.json", {"metadata": {"total_size": self._payload}, "weight_map": where}
            )
        if self._place.is_dir():
            self._place.rmdir()  # empty
        self.path.rename(self._place)
