"""Ours: search all indices for the decoder at hand, fit the decoder to what its codewords stand for, and again.

Lloyd's algorithm, with the exact trellis search in place of the nearest codeword and a network in place of the table
of means; without a network it is Lloyd's algorithm itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits.errors import TrialFailed
from evenbits.maths.nearest import nearest
from evenbits.maths.trellis import Trellis, states
from evenbits_pocketllm.codewords import member_sums
from evenbits_pocketllm.computed import computed_codewords
from evenbits_pocketllm.cost import latent_numbers
from evenbits_pocketllm.decoding import decoder_network, decoder_table, symbol_numbers
from evenbits_pocketllm.network import initial

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Settings

_SMALL = 0.2
_STEPS = 60  # Adam steps of the decoder between two searches
_SHORT = 96  # sub-vectors of a line up to which a second pass round it pays (maths.trellis)
_DISTANCES = 1 << 22  # float32 distances at a time


@dataclass
class Fitted:
    """codebook: (2^window_bits, latent) float32, None where it is computed; decoder: flat float32, or None."""

    codebook: Tensor | None
    decoder: Tensor | None
    history: list[float]  # mean squared error before each fit


class Searcher:
    """Exact search of indices for one decoded table (2^window_bits, d)."""

    def __init__(self, table: Tensor, options: Settings) -> None:
        """Raises TrialFailed for a table that is not finite."""
        if not bool(torch.isfinite(table).all()):
            raise TrialFailed("the decoder's output is no longer finite; lower learning_rate")
        self.table, self.options = table, options
        self._trellis = Trellis(table, options.index_bits) if options.windowed else None

    def states(self, indices: Tensor) -> Tensor:
        """Row of the table that each index (n, chunks) of a line stands for."""
        if self._trellis is None:
            return indices
        return states(indices, self.options.index_bits, self.options.window_bits)

    def __call__(self, lines: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """lines (n, chunks, d), weights (1 or n, chunks, d) -> indices (n, chunks), and what they decode to."""
        if self._trellis is not None:
            indices = self._trellis.search(lines, weights, passes=2 if lines.shape[1] <= _SHORT else 1)
        elif weights is None or self.options.d == 1:
            indices = nearest(lines.flatten(0, 1), self.table).reshape(lines.shape[:2])
        else:
            indices = _nearest_weighted(lines, weights.expand_as(lines), self.table)
        return indices, self.table[self.states(indices)]


def _nearest_weighted(lines: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """argmin over k of sum_i w_i (x_i - t_ki)^2, (n, chunks); in parts, since all distances do not fit."""
    flat, weight = lines.flatten(0, 1), weights.flatten(0, 1)
    found = torch.empty(flat.shape[0], dtype=torch.int64, device=flat.device)
    step = max(1, _DISTANCES // table.shape[0])
    for start in range(0, flat.shape[0], step):
        part = slice(start, start + step)
        distances = weight[part] @ table.square().t() - 2 * (weight[part] * flat[part]) @ table.t()
        found[part] = distances.argmin(1)
    return found.reshape(lines.shape[:2])


def fit_alternating(lines: Tensor, options: Settings, generator: torch.Generator) -> Fitted:
    """Decoder (and stored codebook, if it is learned) for lines (n, chunks, d) of sub-vectors, in float32.

    Rounds: `options.epochs`. The decoder starts as the identity on its first d inputs, with small random units beside;
    a learned codebook starts as standard normal deviates, uniform ones, or (init = kmeans) random sub-vectors, to which
    Lloyd's steps are what the rounds are. Raises TrialFailed for a decoder that is no longer finite.
    """
    codebook = None if options.codebook == "computed" else _start(lines, options, generator)
    words = computed_codewords(options.window_bits, latent_numbers(options)) if codebook is None else codebook
    words = words.to(lines.device)
    decoder = _identity(options, generator).to(lines.device) if options.decoder == "mlp" else None
    history: list[float] = []
    if decoder is None:
        for _ in range(options.epochs if codebook is not None else 0):
            mass, means, error = _assign(lines, words, options)
            history.append(error)
            words = torch.where((mass > 0)[:, None], means, words)
        return Fitted(None if codebook is None else words, None, history)
    learned = [decoder.requires_grad_()] + ([words.clone().requires_grad_()] if codebook is not None else [])
    optimiser = torch.optim.Adam(learned, lr=options.learning_rate)
    for turn in range(options.epochs):
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * _rate(options.schedule, turn, options.epochs)
        current = learned[1] if codebook is not None else words
        with torch.no_grad():
            table = decoder_table(options, current, decoder)
        mass, means, error = _assign(lines, table, options)
        history.append(error)
        share = (mass / mass.sum())[:, None]
        with torch.enable_grad():
            for _ in range(_STEPS):
                optimiser.zero_grad()
                loss = (share * (decoder_table(options, current, decoder) - means).square()).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return Fitted(None if codebook is None else learned[1].detach(), decoder.detach(), history)


def _assign(lines: Tensor, table: Tensor, options: Settings) -> tuple[Tensor, Tensor, float]:
    """Members and their mean for each state of the window, and the mean squared error of what was found."""
    searcher = Searcher(table, options)
    indices, decoded = searcher(lines)
    state = searcher.states(indices).flatten()
    count = table.shape[0]
    mass = torch.bincount(state, minlength=count).to(lines.dtype)
    sums = member_sums(lines.flatten(0, 1), state, count)
    return mass, sums / mass.clamp_min(1)[:, None], float((lines - decoded).square().mean())


def _rate(schedule: str, turn: int, turns: int) -> float:
    """Share of the learning rate in a round; a cosine ends above zero, so that the last round still counts."""
    if schedule == "cosine":
        return max(0.02, 0.5 + 0.5 * math.cos(math.pi * turn / turns))
    return 0.1 ** (turn // 15) if schedule == "step" else 1.0


def _start(lines: Tensor, options: Settings, generator: torch.Generator) -> Tensor:
    shape = (1 << options.window_bits, latent_numbers(options))
    if options.init == "kmeans":
        picked = torch.randint(lines.shape[0] * lines.shape[1], (shape[0],), generator=generator)
        return lines.flatten(0, 1)[picked.to(lines.device)].clone()
    made = torch.rand(shape, generator=generator) if options.init == "uniform" else None
    return (torch.randn(shape, generator=generator) if made is None else made).to(lines.device)


def _identity(options: Settings, generator: torch.Generator) -> Tensor:
    """Flat parameters of a decoder that returns its first d inputs, but for small random terms; then the latents.

    x = gelu(x) - gelu(-x), so two hidden numbers of the last unit carry each output exactly; the others start small.
    """
    network = decoder_network(options, 0)
    flat = initial(network, generator, "decoder")
    parts = network.views(flat)
    for unit in range(1, network.units):
        parts[f"unit{unit}.out.weight"].mul_(_SMALL)
        parts[f"unit{unit}.out.bias"].zero_()
    enter, leave = parts["unit0.in.weight"], parts["unit0.out.weight"]
    leave.mul_(_SMALL)
    parts["unit0.out.bias"].zero_()
    for k in range(min(options.d, network.inputs, network.hidden // 2)):
        pair = slice(2 * k, 2 * k + 2)
        enter[pair] = 0.0
        parts["unit0.in.bias"][pair] = 0.0
        leave[:, pair] = 0.0
        enter[pair, k] = torch.tensor([1.0, -1.0])
        leave[k, pair] = torch.tensor([1.0, -1.0])
    latents = 0.5 * torch.randn(symbol_numbers(options), generator=generator)
    return torch.cat([flat, latents])
