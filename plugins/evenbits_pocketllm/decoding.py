"""A decoder without normalisation as one table: what each value of the window of indices decodes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits_pocketllm.computed import computed_codewords, symbol_windows
from evenbits_pocketllm.cost import input_numbers, latent_numbers
from evenbits_pocketllm.network import Network, decode

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Settings


def decoder_network(options: Settings, width: int) -> Network:
    """The decoder's shape; width: numbers that are normalised together (0 without rln)."""
    return Network(input_numbers(options), options.d, options.hidden, options.units, options.rln, options.affine, width)


def symbol_numbers(options: Settings) -> int:
    """Learned latents of single indices; they stand behind the network's parameters in the stored decoder."""
    return options.codebook_size * options.symbol_latent if options.symbols else 0


def codewords(options: Settings, stored: Tensor | None, device: torch.device) -> Tensor:
    """(2^window_bits, latent) float32."""
    if options.codebook == "computed":
        return computed_codewords(options.window_bits, latent_numbers(options)).to(device)
    assert stored is not None
    return stored


def decoder_table(options: Settings, codebook: Tensor, decoder: Tensor | None) -> Tensor:
    """(2^window_bits, d) float32: every codeword decoded; differentiable in both arguments.

    codebook: (2^window_bits, latent) float32. decoder: flat float32, the network's parameters and after them the
    learned latents of indices; None where codewords are the sub-vectors. Needs rln = none.
    """
    if decoder is None:
        return codebook
    latents = codebook
    if options.symbols:
        learned = decoder[decoder.numel() - symbol_numbers(options) :].reshape(options.codebook_size, -1)
        windows = symbol_windows(options.window_bits, options.index_bits, options.symbols).to(decoder.device)
        latents = torch.cat([codebook, learned[windows].flatten(1)], 1)
    network = decoder_network(options, 0)
    return decode(latents[None], decoder[: network.parameters], network)[0]
