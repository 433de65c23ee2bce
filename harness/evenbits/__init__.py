"""Compare compressors of language models at even bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evenbits.pretrained import watch_transformers

if TYPE_CHECKING:
    from evenbits.door import CompressedWeight, compress_weight, load

__version__ = "0.1.0"
__all__ = ["CompressedWeight", "__version__", "compress_weight", "load"]

watch_transformers()  # so that transformers' from_pretrained opens artifacts


def __getattr__(name: str) -> Any:
    """Bring in torch only when the Python door is used."""
    if name in {"CompressedWeight", "compress_weight", "load"}:
        from evenbits import door

        return getattr(door, name)
    raise AttributeError(f"module 'evenbits' has no attribute {name!r}")
