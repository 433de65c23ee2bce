"""Training of PocketLLM's autoencoder: each step against the published one done naively, k-means as the special case
without networks, and anchors measured with the released code on real matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evenbits.errors import TrialFailed
from evenbits.maths.kmeans import kmeans
from evenbits.maths.nearest import nearest
from evenbits_pocketllm.autoencoder import START_ITERATIONS, Trained, fine_tune_decoder, train
from evenbits_pocketllm.codewords import codebook_gradient, means, replace, revive
from evenbits_pocketllm.decoding import decoder_network
from evenbits_pocketllm.layout import cut, order
from evenbits_pocketllm.network import decode, encode, initial
from evenbits_pocketllm.options import PocketOptions
from evenbits_pocketllm.pools import batches, steps_of
from evenbits_pocketllm.step import learning_rate

SMALL: dict[str, Any] = {
    "recipe": "paper", "axis": "in", "d": 2, "codebook_size": 16, "hidden": 8, "epochs": 4, "batch": 200,
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes: Any) -> PocketOptions:
    return PocketOptions.model_validate({**SMALL, **changes})


def gaussian(groups: int = 40, per_group: int = 20, d: int = 2, seed: int = 1) -> Tensor:
    return 0.3 * torch.randn(groups, per_group, d, generator=seeded(seed))


def mean_error(vectors: Tensor, trained: Trained, options: PocketOptions) -> float:
    """Squared error over squared sub-vectors, decoded anew from what would be stored."""
    network = decoder_network(options, vectors.shape[1] * options.d)
    decoded = decode(trained.codebook[trained.codes[0]], trained.decoder, network)
    return float((decoded - vectors).square().sum() / vectors.square().sum())


# the pieces


def test_replace_gives_codewords_and_passes_gradients_through() -> None:
    latents, codewords = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    passed = replace(latents, codewords)
    assert torch.equal(passed, codewords)
    weights = torch.randn(5, 3)
    (passed * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert latents.grad is not None
    assert torch.equal(latents.grad, weights)


def test_codebook_gradient_is_the_one_hot_formula_averaged_over_members() -> None:
    latents, codebook = torch.randn(50, 3, generator=seeded()), torch.randn(9, 3, generator=seeded(1))
    codebook[8] = 100
    codes = nearest(latents, codebook)
    leaf = codebook.clone().requires_grad_()
    one_hot = torch.nn.functional.one_hot(codes, 9).float()
    (0.4 * (one_hot @ leaf - latents).square().mean()).backward()  # type: ignore[no-untyped-call]
    counts = one_hot.sum(0)
    assert leaf.grad is not None
    gradient, found = codebook_gradient(latents, codebook, codes, 0.4)
    torch.testing.assert_close(gradient, leaf.grad / counts.clamp_min(1)[:, None])
    assert torch.equal(found, counts.long())
    assert gradient[8].tolist() == [0, 0, 0]


def test_means_and_revival() -> None:
    latents = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0], [0.0, 5.0]])
    codebook = torch.tensor([[0.0, 0.0], [70.0, 0.0], [0.0, 5.0], [80.0, 0.0]])
    codes = torch.tensor([0, 0, 2, 2])
    moved, counts = means(latents, codebook, codes)
    assert counts.tolist() == [2, 0, 2, 0]
    assert moved.tolist() == [[1, 0], [70, 0], [0, 7], [80, 0]]
    distances = (latents - codebook[codes]).square().sum(1)
    assert revive(codebook, counts, latents, distances).tolist() == [1, 3]
    assert codebook.tolist() == [[0, 0], [0, 9], [0, 5], [2, 0]]
    assert revive(codebook, torch.tensor([1, 0, 1, 1]), latents, torch.zeros(4)).tolist() == []


@pytest.mark.parametrize(
    ("per_group", "batch", "steps"),
    [(192, 16384, 9), (192, 2048, 72), (192, 2112, 70), (96, 2016, 37), (96, 10**9, 1), (192, 1, 768)],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_steps_take_every_group_once(per_group: int, batch: int, steps: int, shuffle: bool) -> None:
    """768 x 768 at d = 4 and a batch of 16,384: nine steps of 85 or 86 groups, as in the anchor."""
    pool = torch.arange(768.0)[:, None, None].expand(768, per_group, 1)
    options = small(batch=batch, shuffle=shuffle)
    assert steps_of(pool, options) == steps
    taken = [pool[part][:, 0, 0] for part in batches(pool, options, seeded())]
    assert len(taken) == steps
    assert {len(part) for part in taken} <= {768 // steps, -(-768 // steps)}
    together = torch.cat(taken)
    assert torch.equal(together.sort().values, torch.arange(768.0))
    assert torch.equal(together, torch.arange(768.0)) == (not shuffle)


def test_learning_rate() -> None:
    step, cosine, constant = (
        small(schedule=name, learning_rate=0.1, epochs=50) for name in ("step", "cosine", "constant")
    )
    assert [learning_rate(step, at) for at in (0, 14.9, 15, 45.5)] == pytest.approx([0.1, 0.1, 0.01, 1e-4])
    assert [learning_rate(cosine, at) for at in (0, 25, 50)] == pytest.approx([0.1, 0.05, 0])
    assert learning_rate(constant, 49) == 0.1


# training


@pytest.mark.parametrize("loss", ["rmse", "mse"])
@pytest.mark.parametrize("rln", ["row", "none"])
@pytest.mark.parametrize("latent", [2, 3])
def test_steps_are_the_published_ones(loss: Any, rln: Any, latent: int) -> None:
    """Against distances to all codewords, a one-hot matrix, two look-ups and autograd, over all of three epochs."""
    options = small(loss=loss, rln=rln, latent=latent, epochs=3, learning_rate=1e-3, vq_weight=0.7)
    vectors = gaussian()
    trained = train(vectors, options, seeded(5))
    assert trained.history == sorted(trained.history, reverse=True)  # so the last epoch is the best

    generator = seeded(5)
    network = decoder_network(options, 20 * latent)
    encoder = initial(network, generator, "encoder").requires_grad_()
    decoder = initial(network, generator, "decoder").requires_grad_()
    codebook = (torch.randn(16, latent, generator=generator) * 2 / math.sqrt(latent)).requires_grad_()
    optimizer = torch.optim.Adam([encoder, decoder, codebook], lr=1e-3)
    history = []
    for _ in range(3):
        errors = []
        for batch in torch.split(vectors, 10):
            latents = encode(batch, encoder, network)
            distances = (latents[:, :, None] - codebook).square().sum(-1)
            one_hot = torch.nn.functional.one_hot(distances.argmin(-1), 16).float()
            codewords = one_hot @ codebook
            through = latents + (codewords - latents).detach()
            error = (decode(through, decoder, network) - batch).square().mean()
            term = error.sqrt() if loss == "rmse" else error
            optimizer.zero_grad()
            total = term + 0.7 * (codewords - latents.detach()).square().mean()
            total.backward()  # type: ignore[no-untyped-call]
            assert codebook.grad is not None
            codebook.grad /= one_hot.flatten(0, 1).sum(0).clamp_min(1)[:, None]
            optimizer.step()
            errors.append(float(error.detach()))
        history.append(sum(errors) / len(errors))
    assert trained.history == pytest.approx(history, rel=1e-5)
    torch.testing.assert_close(trained.encoder, encoder.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained.decoder, decoder.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained.codebook, codebook.detach(), rtol=1e-3, atol=1e-4)


def test_result_is_consistent() -> None:
    vectors, options = gaussian(), small(epochs=10)
    trained = train(vectors, options, seeded())
    network = decoder_network(options, 40)
    latents = encode(vectors, trained.encoder, network)
    assert trained.codes[0].shape == (40, 20)
    assert torch.equal(trained.codes[0].flatten(), nearest(latents.flatten(0, 1), trained.codebook))
    assert trained.error == pytest.approx(mean_error(vectors, trained, options))
    assert trained.error < 0.5
    assert trained.dead == 16 - torch.unique(trained.codes[0]).numel()
    assert len(trained.history) == 10
    assert not any(part.requires_grad for part in (trained.codebook, trained.encoder, trained.decoder))


def test_best_epoch_is_kept() -> None:
    """A rate far too high: the error jumps about, and what is left is what training up to its least leaves."""
    options = small(schedule="constant", learning_rate=0.3, epochs=8)
    trained = train(gaussian(), options, seeded(2))
    best = int(np.argmin(trained.history))
    assert best < 7
    shorter = train(gaussian(), options.model_copy(update={"epochs": best + 1}), seeded(2))
    assert torch.equal(shorter.codebook, trained.codebook)
    assert torch.equal(shorter.decoder, trained.decoder)
    assert torch.equal(shorter.codes[0], trained.codes[0])


@pytest.mark.parametrize("changes", [{}, {"shuffle": True}, {"init": "kmeans", "revive": True}, {"decoder": "none"}])
def test_deterministic_by_generator_and_global_state_untouched(changes: dict[str, Any]) -> None:
    options = small(**({"rln": "none"} if "decoder" in changes else {}), **changes)
    before = torch.random.get_rng_state()
    first, second, other = (train(gaussian(), options, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.codebook, second.codebook)
    assert torch.equal(first.codes[0], second.codes[0])
    assert first.history == second.history
    assert not torch.equal(first.codebook, other.codebook)


def test_identity_networks_and_lloyd_steps_are_k_means() -> None:
    """Encoder and decoder fixed to identity, no normalisation, codewords moved by Lloyd's steps: the plain codebook."""
    vectors = gaussian(groups=100)
    options = small(decoder="none", rln="none", init="kmeans", epochs=0, closing_kmeans=7)
    trained = train(vectors, options, seeded(3))
    centres, codes = kmeans(vectors.flatten(0, 1), 16, START_ITERATIONS + 7, seeded(3))
    torch.testing.assert_close(trained.codebook, centres)
    assert torch.equal(trained.codes[0].flatten(), codes)
    error = (vectors.flatten(0, 1) - centres[codes]).square().sum() / vectors.square().sum()
    assert trained.error == pytest.approx(float(error), rel=1e-6)
    assert trained.decoder.numel() == trained.encoder.numel() == 0


def test_identity_networks_trained_by_gradient_come_near_k_means() -> None:
    vectors = gaussian(groups=100)
    options = small(decoder="none", rln="none", init="uniform", revive=True, epochs=60, learning_rate=0.02)
    centres, codes = kmeans(vectors.flatten(0, 1), 16, 50, seeded(3))
    best = float((vectors.flatten(0, 1) - centres[codes]).square().sum() / vectors.square().sum())
    assert 0.97 * best < train(vectors, options, seeded(3)).error < 1.1 * best


def test_closing_k_means_brings_codewords_nearer_to_their_latents() -> None:
    vectors, options = gaussian(), small(epochs=3)

    def distance(trained: Trained) -> float:
        latents = encode(vectors, trained.encoder, decoder_network(options, 40))
        return float((latents - trained.codebook[trained.codes[0]]).square().mean())

    plain = train(vectors, options, seeded())
    closed = train(vectors, small(epochs=3, closing_kmeans=10), seeded())
    assert torch.equal(closed.encoder, plain.encoder)
    assert torch.equal(closed.decoder, plain.decoder)
    assert distance(closed) < 0.95 * distance(plain)


def test_revival_leaves_fewer_dead_codewords() -> None:
    """Start values in [0, 1) for latents around zero: most codewords are never the nearest."""
    changes = {"codebook_size": 128, "init": "uniform", "epochs": 8}
    plain = train(gaussian(), small(**changes), seeded())
    revived = train(gaussian(), small(**changes, revive=True), seeded())
    assert plain.dead > 80
    assert revived.dead < 50
    assert revived.error < plain.error


# several matrices


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rln", ["row", "none"])
def test_matrices_share_codebook_and_networks(shuffle: bool, rln: Any) -> None:
    """Matrices of unlike length in one training; each one's codes are those of its own latents, in its order."""
    matrices = [gaussian(10, 20, seed=1), gaussian(30, 7, seed=2), gaussian(15, 20, seed=3)]
    options = small(rln=rln, shuffle=shuffle)
    trained = train(matrices, options, seeded())
    error = 0.0
    for vectors, codes in zip(matrices, trained.codes, strict=True):
        network = decoder_network(options, 2 * vectors.shape[1])
        latents = encode(vectors, trained.encoder, network)
        assert torch.equal(codes, nearest(latents.flatten(0, 1), trained.codebook).view(vectors.shape[:2]))
        error += float((decode(trained.codebook[codes], trained.decoder, network) - vectors).square().sum())
    assert trained.error == pytest.approx(error / sum(float(v.square().sum()) for v in matrices), rel=1e-5)


def test_one_matrix_in_a_list_is_that_matrix() -> None:
    alone, listed = train(gaussian(), small(), seeded()), train([gaussian()], small(), seeded())
    assert torch.equal(alone.codebook, listed.codebook)
    halves = train([gaussian()[:10], gaussian()[10:]], small(), seeded())
    assert torch.equal(torch.cat(halves.codes), alone.codes[0])


def test_affine_gains_need_groups_of_one_length() -> None:
    matrices = [gaussian(10, 20), gaussian(30, 7)]
    with pytest.raises(TrialFailed, match="groups of 7, 20 sub-vectors"):
        train(matrices, small(affine=True), seeded())
    alone = [vectors.reshape(-1, 1, 2) for vectors in matrices]
    trained = train(alone, small(affine=True, rln="layernorm"), seeded())
    assert trained.decoder.numel() == decoder_network(small(), 2).mlp_parameters + 2 * 3 * 2


# refitting


@pytest.mark.parametrize("loss", ["rmse", "mse"])
def test_fine_tuning_a_decoder_to_one_matrix_lowers_its_error(loss: Any) -> None:
    matrices = [gaussian(seed=1), 3 * gaussian(seed=2) + 0.1]
    options = small(rln="none", loss=loss, epochs=6)
    trained = train(matrices, options, seeded())
    network = decoder_network(options, 0)
    for vectors, codes in zip(matrices, trained.codes, strict=True):
        kept = (trained.codebook.clone(), trained.decoder.clone())
        tuned = fine_tune_decoder(vectors, codes, trained.codebook, trained.decoder, options, seeded())
        assert torch.equal(trained.codebook, kept[0])
        assert torch.equal(trained.decoder, kept[1])
        assert not tuned.requires_grad
        before, after = (
            float((decode(trained.codebook[codes], flat, network) - vectors).square().mean())
            for flat in (trained.decoder, tuned)
        )
        assert after < 0.99 * before


def test_fine_tuning_never_ends_worse() -> None:
    options = small(epochs=2)
    trained = train(gaussian(), options, seeded())
    wild = options.model_copy(update={"learning_rate": 10.0})
    tuned = fine_tune_decoder(gaussian(), trained.codes[0], trained.codebook, trained.decoder, wild, seeded())
    assert torch.equal(tuned, trained.decoder)
    none = small(decoder="none", rln="none")
    empty = torch.empty(0)
    assert torch.equal(fine_tune_decoder(gaussian(), trained.codes[0], trained.codebook, empty, none, seeded()), empty)


def test_bad_input_is_refused() -> None:
    vectors = gaussian(2, 4)
    with pytest.raises(TrialFailed, match="16 codewords for 8 sub-vectors"):
        train(vectors, small(init="kmeans"), seeded())
    with pytest.raises(TrialFailed, match="no longer finite in epoch"):
        train(vectors, small(learning_rate=1e30), seeded())
    with pytest.raises(ValueError, match="per_group, 2"):
        train(gaussian(2, 4, d=3), small(), seeded())
    vectors[1, 2, 0] = math.nan
    with pytest.raises(TrialFailed, match="not finite"):
        train(vectors, small(), seeded())


# anchors, measured with the released code on the same matrices: 50 epochs at a rate of 1.6e-2 each


def gpt2(data: Path, name: str, options: PocketOptions) -> Tensor:
    raw = np.fromfile(data / "models" / "gpt2_attention" / f"decoder{name}.w.dat", ">f4")
    weight = torch.from_numpy(raw.astype(np.float32).reshape(768, 768).T.copy())  # stored (in, out)
    return order(cut(weight, options.axis, options.d), options.rln)


@pytest.mark.slow
def test_anchor_of_the_released_code_at_a_small_batch(data: Path) -> None:
    """Released code: 0.1127, 0.1123 and 0.1154, no dead codeword. Ours: 0.1118, 0.1130 and 0.1124 (seeds 0 to 2). The
    bounds leave room for other seeds and processors: a rounding of floats changes the path of training."""
    options = PocketOptions(recipe="code", codebook_size=256, batch=2112)
    trained = train(gpt2(data, "6.query", options), options, seeded())
    assert 0.108 < trained.error < 0.121
    assert trained.dead == 0


@pytest.mark.slow
def test_anchor_of_the_released_code_at_its_own_batch(data: Path) -> None:
    """Released code: 0.3034, 0.3180 and 0.3106. Ours: 0.3207, 0.3214 and 0.3116, of nine seeds 0.309 to 0.339, once
    0.409 and 0.537. What is lost is one of the four directions of the sub-vectors, about a quarter of their squares:
    codewords lie in a space of three dimensions (in two at 0.537), which is tested."""
    options = PocketOptions(recipe="code", codebook_size=256, batch=16512)
    vectors = gpt2(data, "6.query", options)
    trained = train(vectors, options, seeded())
    assert 0.28 < trained.error < 0.36
    decoded = decode(trained.codebook[trained.codes[0]], trained.decoder, decoder_network(options, 768))
    spread, whole = (torch.linalg.eigvalsh(part.flatten(0, 1).T.cov()) for part in (decoded, vectors))
    assert spread[0] < 0.05 * whole[0]
    assert spread[-1] > 0.8 * whole[-1]
