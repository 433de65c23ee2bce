"""Codebooks and decoders as they are stored, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evenbits.compressor import PackedLayer, Role
from evenbits_pocketllm.options import PocketOptions

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST = 2.0**-24  # of float16 above zero


@dataclass(frozen=True)
class Coder:
    """codebook: (2^window_bits, latent) float32, None where it is computed. decoder: flat float32, or None."""

    codebook: Tensor | None
    decoder: Tensor | None


def store_codebook(packed: PackedLayer, codebook: Tensor, bits: int, suffix: str = "") -> None:
    """Add "codebook" in float16, or in int8 with "codebook_scale" (1,) float16."""
    if bits == 16:
        _add(packed, f"codebook{suffix}", codebook.clamp(-_LARGEST, _LARGEST).half(), Role.CODEBOOK)
        return
    step = (codebook.abs().max() / 127).clamp(_SMALLEST, _LARGEST).half()
    whole = (codebook / step.float()).round().clamp(-127, 127).to(torch.int8)
    _add(packed, f"codebook{suffix}", whole, Role.CODEBOOK)
    _add(packed, f"codebook_scale{suffix}", step.reshape(1), Role.SCALE)


def store_decoder(packed: PackedLayer, decoder: Tensor, bits: int, suffix: str = "") -> None:
    """Add "decoder", flat, in float32 or float16."""
    stored = decoder.float() if bits == 32 else decoder.clamp(-_LARGEST, _LARGEST).half()
    _add(packed, f"decoder{suffix}", stored, Role.DECODER)


def read_codebook(tensors: Mapping[str, Tensor], bits: int, suffix: str = "") -> Tensor:
    """(2^window_bits, latent) float32; differentiable in a float16 "codebook" and in "codebook_scale"."""
    codebook = tensors[f"codebook{suffix}"].float()
    return codebook if bits == 16 else codebook * tensors[f"codebook_scale{suffix}"].float()


def tunable_names(options: PocketOptions) -> tuple[str, ...]:
    """Which stored tensors gradients may reach, without the suffix of shared ones."""
    return (
        "row_scale" if options.scale_bits == 16 else "scale_frame",
        "codebook" if options.codebook_bits == 16 else "codebook_scale",
        "decoder",
    )


def _add(packed: PackedLayer, name: str, tensor: Tensor, role: Role) -> None:
    packed.tensors[name], packed.roles[name] = tensor, role
