"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

# what a model folder may hold beside weights, config and tokenizer
NOT_WEIGHTS = (".md", ".gitattributes", "LICENSE")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary neighbour, flush to disk, rename. A full disk leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask: others may read results
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        name.replace(path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
