"""Training of encoder, codebook and decoder together, as PocketLLM (arXiv:2511.17637) does, by gradient.

The encoder turns sub-vectors into latents, each is replaced by its nearest codeword, and the decoder turns codewords
into weights. The gradient of the reconstruction passes the replacement unchanged; codewords follow the mean of their
latents. One exact look-up a step, and no tensor of all distances: what the released code holds of these (twice) is
what makes it slow and large. Unlike the released code, no epoch is passed over for an error above a fixed number.
On a CUDA device steps are replayed as graphs (`captured`); their results are read once an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits.errors import TrialFailed
from evenbits.maths.kmeans import kmeans
from evenbits.maths.nearest import nearest, squared_distances
from evenbits_pocketllm.captured import Runner
from evenbits_pocketllm.codewords import means, revive
from evenbits_pocketllm.cost import latent_numbers
from evenbits_pocketllm.decoding import decoder_network
from evenbits_pocketllm.network import Network, decode, encode, initial
from evenbits_pocketllm.pools import batches, by_matrix, pieces, pooled, steps_of
from evenbits_pocketllm.step import Met, Step, adam_rates, learning_rate, loss

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Settings

START_ITERATIONS = 10  # Lloyd's steps of init = kmeans
_DIVERGED = "the {}'s error is no longer finite in epoch {}; lower learning_rate"


@dataclass
class Trained:
    """What training leaves; float32 on the device of the vectors."""

    codebook: Tensor  # (K, latent)
    decoder: Tensor  # flat; of no length for decoder = none
    encoder: Tensor  # flat, likewise
    codes: tuple[Tensor, ...]  # (groups, per_group) int64 of each matrix: the nearest codeword of its latents
    error: float  # squared error over squared sub-vectors, of all matrices together, padding included
    dead: int  # codewords that no code names
    history: list[float]  # mean squared error of each epoch, as seen while training
    road: str  # how steps were run: as CUDA graphs, or one by one and why


def train(vectors_by_matrix: Sequence[Tensor] | Tensor, options: Settings, generator: torch.Generator) -> Trained:
    """Fit encoder, codebook and decoder to the sub-vectors of one matrix, or of several that share all three.

    vectors_by_matrix: (groups, per_group, d) float32 each, on one device; the generator is on the CPU. Groups of a
    step are all of one length: matrices of equal length are pooled, pools follow each other or, with shuffle, take
    turns at random. `batch` is met as nearly as whole groups in steps of even size allow. The epoch of least mean
    squared error is kept, as it stood at its end; closing_kmeans then moves the codewords alone.
    Deterministic for a generator state on the CPU; global random state is neither read nor changed.
    Raises TrialFailed for vectors or errors that are not finite, affine gains over groups of unlike length, and
    init = kmeans with fewer vectors than codewords. Vectors of zeros come out as zeros.
    """
    matrices = [vectors_by_matrix] if isinstance(vectors_by_matrix, Tensor) else list(vectors_by_matrix)
    pools = pooled(matrices, options)
    training = _Training(pools, options, generator)
    training.run()
    latents = training.latents()
    codebook, codes = _lloyd(latents, training.codebook, options)
    decoder = training.decoder
    energy = sum(float(pool.square().sum(dtype=torch.float64)) for pool in pools.values())
    if not energy:  # zeros are decoded exactly, which steps of a gradient only come near
        codebook, decoder = torch.zeros_like(codebook), torch.zeros_like(decoder)
    error = _squared_error(pools, codes, codebook, decoder, training.network)
    return Trained(
        codebook=codebook,
        decoder=decoder,
        encoder=training.encoder,
        codes=by_matrix(codes, matrices, pools),
        error=error / energy if energy else error,
        dead=int((torch.bincount(codes, minlength=len(codebook)) == 0).sum()),
        history=training.history,
        road=training.road,
    )


def fine_tune_decoder(
    vectors: Tensor,
    codes: Tensor,
    codebook: Tensor,
    decoder: Tensor,
    options: Settings,
    generator: torch.Generator,
) -> Tensor:
    """A decoder refitted to one matrix, whose codes and codebook stay: flat float32, as `decoder`.

    vectors (groups, per_group, d), codes (groups, per_group), codebook (K, latent). Loss, schedule, epochs and batch
    are those of the options. The best of the start and of each epoch's end is returned, by the error of all vectors.
    Raises TrialFailed for an error that is not finite.
    """
    network = _network(options, vectors.shape[1])
    if network is None:
        return decoder.detach().clone()
    pool, codewords = {vectors.shape[1]: vectors}, codebook.detach().float()
    flat = decoder.detach().float().clone().requires_grad_()
    best = flat.detach().clone()
    least = _squared_error(pool, codes.flatten(), codewords, best, network)
    optimizer = torch.optim.Adam([flat], lr=options.learning_rate)
    steps = steps_of(vectors, options)
    for epoch in range(options.epochs):
        for step, picked in enumerate(batches(vectors, options, generator)):
            _set_rate(optimizer, options, epoch + step / steps)
            error = (decode(codewords[codes[picked]], flat, network) - vectors[picked]).square().mean()
            optimizer.zero_grad()
            loss(error, options).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = _squared_error(pool, codes.flatten(), codewords, flat.detach(), network)
        if not math.isfinite(found):
            raise TrialFailed(_DIVERGED.format("decoder", epoch + 1))
        if found < least:
            best, least = flat.detach().clone(), found
    return best


class _Training:
    """Parameters of one training, and its epochs."""

    def __init__(self, pools: dict[int, Tensor], options: Settings, generator: torch.Generator) -> None:
        self.pools, self.options, self.generator = pools, options, generator
        self.network = _network(options, next(iter(pools)))
        device = next(iter(pools.values())).device
        flat = [torch.empty(0), torch.empty(0)]
        if self.network is not None:
            flat = [initial(self.network, generator, kind) for kind in ("encoder", "decoder")]
        self.encoder, self.decoder = (part.to(device) for part in flat)
        self.codebook = self._first_codebook().to(device)
        self.history: list[float] = []
        self.road = "no step"

    def run(self) -> None:
        """All epochs; leaves the parameters of the best one."""
        options, least = self.options, math.inf
        steps = sum(steps_of(pool, options) for pool in self.pools.values())
        step = Step(self.encoder, self.decoder, self.codebook, self.network, options)
        runner = Runner(step, self.codebook.device, options.epochs * steps)
        best = step.copy()
        with runner.running():
            for epoch in range(options.epochs):
                step.start_epoch()
                rates = adam_rates(options, epoch, steps).to(self.codebook.device)
                met = [runner(batch, rate) for batch, rate in zip(self._epoch(), rates, strict=True)]
                error = float(step.squared_error) / sum(pool.numel() for pool in self.pools.values())
                if not math.isfinite(error):
                    raise TrialFailed(_DIVERGED.format("autoencoder", epoch + 1))
                self.history.append(error)
                if error < least:
                    least, best = error, step.copy()
                if options.revive and epoch + 1 < options.epochs:
                    _revive(step, [part for part in met if part is not None])
        self.encoder, self.decoder, self.codebook = best
        self.road = runner.road

    def latents(self) -> Tensor:
        """(n, latent) of all sub-vectors, pool by pool."""
        with torch.no_grad():
            parts = [self._encode(part) for pool in self.pools.values() for part in pieces(pool)]
        return torch.cat([part.flatten(0, 1) for part in parts])

    def _encode(self, vectors: Tensor) -> Tensor:
        return vectors if self.network is None else encode(vectors, self.encoder, self.network)

    def _epoch(self) -> Iterator[Tensor]:
        """The batches of an epoch, (groups of the step, per_group, d)."""
        steps = [(pool, part) for pool in self.pools.values() for part in batches(pool, self.options, self.generator)]
        turns: Sequence[int] = range(len(steps))
        if self.options.shuffle and len(self.pools) > 1:
            turns = torch.randperm(len(steps), generator=self.generator).tolist()
        for turn in turns:
            pool, part = steps[turn]
            yield pool[part]

    def _first_codebook(self) -> Tensor:
        options = self.options
        shape = (options.codebook_size, latent_numbers(options))
        if options.init == "normal":
            return torch.randn(shape, generator=self.generator) * (2 / math.sqrt(shape[1]))
        if options.init == "uniform":
            return torch.rand(shape, generator=self.generator)
        latents = self.latents()
        if len(latents) < shape[0]:
            raise TrialFailed(f"{shape[0]} codewords for {len(latents)} sub-vectors; take fewer or share them")
        return kmeans(latents, shape[0], START_ITERATIONS, self.generator)[0]


def _revive(step: Step, met: list[Met]) -> None:
    """Codewords without a vector in the epoch start again, with no memory of Adam's, at the worst latents."""
    latents, distances = torch.cat([part.latents for part in met]), torch.cat([part.distances for part in met])
    step.forget(revive(step.codebook, step.counts, latents, distances))


def _network(options: Settings, per_group: int) -> Network | None:
    """The decoder, and so the encoder, for groups of so many sub-vectors."""
    if options.symbols:
        raise ValueError("latents of single indices have no encoder")
    if options.decoder == "none":
        return None
    together = 1 if options.rln == "layernorm" else per_group
    return decoder_network(options, together * latent_numbers(options))


def _lloyd(latents: Tensor, codebook: Tensor, options: Settings) -> tuple[Tensor, Tensor]:
    """The closing k-means: codebook and codes (n,) after its steps, of which there may be none."""
    codes = nearest(latents, codebook)
    for _ in range(options.closing_kmeans):
        codebook, counts = means(latents, codebook, codes)
        if options.revive and bool((counts == 0).any()):
            revive(codebook, counts, latents, squared_distances(latents, codebook, codes))
        codes = nearest(latents, codebook)
    return codebook, codes


def _set_rate(optimizer: torch.optim.Optimizer, options: Settings, passed: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(options, passed)


def _squared_error(
    pools: dict[int, Tensor], codes: Tensor, codebook: Tensor, decoder: Tensor, network: Network | None
) -> float:
    """Sum over all sub-vectors; codes (n,), pool by pool."""
    total, start = 0.0, 0
    with torch.no_grad():
        for piece in (part for pool in pools.values() for part in pieces(pool)):
            count = piece.shape[0] * piece.shape[1]
            found = codebook[codes[start : start + count]].view(*piece.shape[:2], -1)
            start += count
            decoded = found if network is None else decode(found, decoder, network)
            total += float((decoded - piece).square().sum(dtype=torch.float64))
    return total
