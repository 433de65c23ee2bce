"""The tensors of the gaussian model: independent draws of the standard normal, the same on every machine.

A draw is the normal quantile of 53 bits of PCG64. numpy promises that stream for good; of its normal generators it does
not. Quantiles may differ in their last bit of 53 between machines, which float32 all but never shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

VERSION = 1  # another one where the numbers that are drawn change

WIDTH = 384
"""All rows have as many weights, so that rows can stand for the model's items, and a scale a row costs 0.04 bits."""
HEADS = 6
WORDS = 256
SPECIAL = ("<unk>", "<s>")
VOCABULARY = len(SPECIAL) + WORDS

LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EMBEDDING = "model.embed_tokens.weight"

Array = np.ndarray[Any, np.dtype[np.float32]]


def names() -> tuple[str, ...]:
    """Of the linear layers' weights."""
    return tuple(f"model.layers.0.{kind}.weight" for kind in LINEAR)


def draw(name: str, rows: int, columns: int) -> Array:
    """(rows, columns) float32 draws that depend on the tensor's name and size alone."""
    from scipy.special import ndtri

    digest = hashlib.sha256(f"evenbits gaussian {VERSION} {name} {rows} {columns}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(rows * columns)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    drawn: Array = ndtri(uniform).astype(np.float32).reshape(rows, columns)
    return drawn


def linear(name: str) -> Array:
    """(out, in) of a linear layer."""
    return draw(name, WIDTH, WIDTH)


def embedding() -> Array:
    """(vocabulary, width). Nothing compresses it: it tells this model from others."""
    return draw(EMBEDDING, VOCABULARY, WIDTH)


def shapes() -> dict[str, int]:
    """What the tensors' sizes follow from."""
    return {"width": WIDTH, "vocabulary": VOCABULARY}


def tensors() -> Iterator[tuple[str, Array]]:
    """Everything that the checkpoint holds."""
    yield EMBEDDING, embedding()
    for name in names():
        yield name, linear(name)
    for norm in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        yield f"{norm}.weight", np.ones(WIDTH, dtype=np.float32)
