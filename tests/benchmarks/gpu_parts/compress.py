"""PocketLLM's training by the paper's recipe: seconds for each matrix of a Llama-2-7B block, and for the model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from gpu_parts.part import Column, Item, Part, Row, Setting

BLOCKS = 32
# (out, in) and how many of them a block has
SHAPES = (((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1))
_EPOCHS = (2, 6)  # timed; a quarter of the difference is an epoch, and all are 50 times that


def items(setting: Setting) -> Iterable[Item]:
    shapes = (((32, 24), 4), ((24, 32), 1)) if setting.small else SHAPES
    for (out, into), count in shapes:
        yield Item(f"{out}x{into}", partial(_matrix, setting, out, into, count))


def _matrix(setting: Setting, out: int, into: int, count: int) -> list[Row]:
    from evenbits_pocketllm.captured import time_training
    from evenbits_pocketllm.settings import recipe

    # one scale a row, divided out before training, costs nothing here: the weights are random and of one deviation
    plain = recipe("paper", codebook_size=16, batch=32) if setting.small else recipe("paper")
    epochs = (1, 8) if setting.small else _EPOCHS
    found = time_training(out, into, plain, device=setting.device, epochs=epochs)
    pairs = found.vectors_per_step * found.codewords
    operations = 2.0 * plain.d * pairs  # of the search of a step, the one thing that is not small
    peak = setting.ceilings.float32
    floor = found.steps * operations / peak if peak else None
    return [
        {
            "matrix": f"{out}x{into}", "count": count, "steps": found.steps, "epochs": found.epochs,
            "step_us": found.seconds_per_step * 1e6, "search_us": found.search_seconds * 1e6,
            "fixed_seconds": found.fixed_seconds,
            "epoch_seconds": found.epoch_seconds, "seconds": found.seconds, "block_seconds": count * found.seconds,
            "floor_seconds": floor, "fraction": floor / found.seconds if floor else None, "road": found.road,
            "timed_epochs": f"{epochs[0]} and {epochs[1]}",
        }
    ]  # fmt: skip


PART = Part(
    "compress",
    "Compressing Llama-2-7B by PocketLLM",
    "The paper's recipe, d = 8, K = 2^15, 50 epochs in steps of about 16,384 sub-vectors, on random matrices. "
    f"Trained and timed are {_EPOCHS[0]} and {_EPOCHS[1]} epochs; **the rest is extrapolated**: seconds = start "
    "and end + 50 times an epoch. A block is the sum over its seven matrices, the model 32 blocks, one after "
    "the other; reading, writing and packing are not in it. The floor is the search's multiplications and "
    "additions at the measured float32 matrix product rate.",
    45,
    (
        Column("matrix", "matrix"),
        Column("count", "a block has", "d"),
        Column("steps", "steps", ",d"),
        Column("step_us", "µs a step", ".4g"),
        Column("search_us", "of it the search", ".4g"),
        Column("epoch_seconds", "s an epoch", ".3g"),
        Column("fixed_seconds", "s start and end", ".3g"),
        Column("seconds", "s a matrix", ".4g"),
        Column("block_seconds", "s a block", ".4g"),
        Column("floor_seconds", "floor s a matrix", ".3g"),
        Column("fraction", "of floor", ".0%"),
        Column("road", "steps"),
    ),
    items,
)
