"""Codebooks and decoders as they are stored, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from evenbits.compressor import PackedLayer
    from evenbits_pocketllm.settings import Settings


@dataclass(frozen=True)
class Coder:
    """codebook: (2^window_bits, latent) float32, None where it is computed. decoder: flat float32, or None."""

    codebook: Tensor | None
    decoder: Tensor | None


def store_codebook(packed: PackedLayer, codebook: Tensor, bits: int, suffix: str = "") -> None:
    """Add "codebook" in float16, or in int8 with "codebook_scale" (1,) float16."""
    from evenbits.maths import stored

    tensors, roles = stored.store_codebook(codebook, bits, suffix=suffix)
    packed.tensors.update(tensors)
    packed.roles.update(roles)


def store_decoder(packed: PackedLayer, decoder: Tensor, bits: int, suffix: str = "") -> None:
    """Add "decoder", flat, in float32 or float16."""
    from evenbits.compressor import Role
    from evenbits.maths.stored import LARGEST

    name = f"decoder{suffix}"
    packed.tensors[name] = decoder.float() if bits == 32 else decoder.clamp(-LARGEST, LARGEST).half()
    packed.roles[name] = Role.DECODER


def read_codebook(tensors: Mapping[str, Tensor], bits: int, suffix: str = "") -> Tensor:
    """(2^window_bits, latent) float32; differentiable in a float16 "codebook" and in "codebook_scale"."""
    from evenbits.maths import stored

    return stored.load_codebook(tensors, bits, suffix=suffix)


def tunable_names(options: Settings) -> tuple[str, ...]:
    """Which stored tensors gradients may reach, without the suffix of shared ones."""
    return (
        "row_scale" if options.scale_bits == 16 else "scale_frame",
        "codebook" if options.codebook_bits == 16 else "codebook_scale",
        "decoder",
    )
