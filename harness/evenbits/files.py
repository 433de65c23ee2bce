"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# what a model folder may hold beside weights, config and tokenizer
NOT_WEIGHTS = (".md", ".gitattributes", "LICENSE")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary neighbour, flush to disk, rename. A full disk leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
