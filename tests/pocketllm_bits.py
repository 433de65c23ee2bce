"""Print what PocketLLM's settings cost on real shapes, next to what its paper counts: results/pocketllm_bits.md.

    python tests/pocketllm_bits.py > results/pocketllm_bits.md

Arithmetic on shapes alone, by the same `predict` that plans a run; no model is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from evenbits.compressor import LayerShape, ModelShapes, Role
from evenbits.shapes import LLAMA2_7B, QWEN3_14B
from evenbits_pocketllm.cost import affine_numbers, decoder_numbers, mlp_numbers, predict
from evenbits_pocketllm.options import Part, PocketOptions

SETTINGS = ((8, 15), (4, 15), (4, 16), (4, 12), (8, 16), (8, 12))
FIRST, LAST = 3, 2  # blocks that the released code leaves dense at either end
MODELS = (("Llama-2-7B", LLAMA2_7B), ("Qwen3-14B", QWEN3_14B))


def one_matrix(out_features: int, in_features: int) -> ModelShapes:
    """A model of a single linear layer and nothing else."""
    layer = LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", out_features, in_features)
    return ModelShapes((layer,), layer.weights, 0)


def one_block(shapes: ModelShapes) -> tuple[LayerShape, ...]:
    return tuple(layer for layer in shapes.layers if layer.block == 0)


def affine_bits(shapes: ModelShapes, bits: int) -> float:
    """Bits per weight of the released code's gains and biases, in so many bits each, over a block."""
    settings = PocketOptions(recipe="code")
    layers = one_block(shapes)
    return bits * sum(affine_numbers(settings, [layer]) for layer in layers) / sum(layer.weights for layer in layers)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "| :-- " + "| --: " * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def matrices() -> Iterator[list[str]]:
    for d, bits in SETTINGS:
        options = PocketOptions(recipe="paper", d=d, codebook_size=1 << bits)
        square, wide = (predict(options, one_matrix(*size)).paper_bits for size in ((4096, 4096), (11008, 4096)))
        whole = predict(options, LLAMA2_7B)
        figures = [f"{found:.4f}" for found in (square, wide, whole.paper_bits, whole.linear_bits(LLAMA2_7B))]
        yield [f"d={d}, K=2^{bits}", *figures, f"{32 / whole.paper_bits:.2f}x"]


def models() -> Iterator[list[str]]:
    for name, shapes in MODELS:
        blocks = max(layer.block for layer in shapes.layers) + 1
        skipped = Part(blocks=(*range(FIRST), *range(blocks - LAST, blocks)), skip=True)
        for d in (8, 4):
            for which, parts in (("all", ()), (f"{FIRST}-{blocks - LAST - 1}", (skipped,))):
                options = PocketOptions(recipe="paper", d=d, codebook_size=1 << 15, parts=parts)
                found = predict(options, shapes)
                total = found.linear_bytes + shapes.rest_bytes
                figures = [found.paper_bits, found.linear_bits(shapes), found.model_bits(shapes)]
                sizes = [f"{total / 1e9:.2f} GB", f"{shapes.stored_bytes / total:.2f}x"]
                yield [f"{name}, d={d}, blocks {which}", *(f"{bits:.4f}" for bits in figures), *sizes]


def worked_example() -> Iterator[str]:
    options, shapes = PocketOptions(recipe="paper"), one_matrix(11008, 4096)
    found = predict(options, shapes)
    book = 8 * found.role_bytes[Role.CODEBOOK]
    decoder = 32 * mlp_numbers(options)[0]
    paper = found.paper_bits * shapes.weights
    rounded = 32 * 45.1e6 / (book + 15 * 5.6e6 + decoder)
    yield f"- The paper's formula: {book:,} + 15 x {shapes.weights // 8:,} + {decoder:,} = {paper:,.0f} bits,"
    yield f"  {found.paper_bits:.4f} a weight, **{32 / found.paper_bits:.2f}x** against fp32."
    yield f"- With 45.1M weights and 5.6M indices, both rounded, it is {rounded:.2f}x: the 16.4x that the paper prints."
    yield f"- On disk, all {decoder_numbers(options, shapes.layers)} numbers of the decoder billed:"
    yield (
        f"  {found.linear_bytes:,} bytes, {found.linear_bits(shapes):.4f} bits a weight, "
        f"{4 * shapes.weights / found.linear_bytes:.2f}x."
    )


def decoders() -> Iterator[list[str]]:
    for d in (8, 4):
        options = PocketOptions(recipe="code", d=d)
        weights, biases = mlp_numbers(options)
        affine = sorted({affine_numbers(options, [layer]) for layer in one_block(LLAMA2_7B)})
        yield [f"d={d}, hidden 16, 3 units", *map(str, (weights, weights + biases)), *(f"{n:,}" for n in affine)]


PAGE = """\
# What PocketLLM's settings cost

Written by `python tests/pocketllm_bits.py > results/pocketllm_bits.md`: arithmetic on shapes alone.
"Paper" is the formula of arXiv:2511.17637, 16 K d + log2(K) N / d + 32 x MLP weights for a matrix of N
weights, averaged over what is compressed. "Linear" is every byte stored for the linear layers of the blocks,
over all their weights; layers left dense count at their stored 16 bits. Each matrix has a codebook and a
decoder of its own.

## Settings on Llama-2-7B

{settings}

d=8, K=2^15 is the paper's 2.02; its 2.98 and 3.98 are none of these.

## The paper's worked example: `up` of Llama-2-7B at d=8, K=2^15

{example}

## Decoder

{decoders}

The paper counts the MLP weights. The released code also trains a gain and a bias for every number that is
normalised: {fp32:.4f} bit a weight over a block in fp32, {fp16:.4f} in fp16, if they are stored.

## Whole models at K=2^15

The released code leaves the first three blocks and the last two of a Llama dense; the paper's average does not
count them. "Model" is all payload over all parameters, embedding and head in 16 bits.

{models}"""


def page() -> str:
    per_matrix = (
        "setting",
        "4096x4096, paper",
        "11008x4096, paper",
        "all seven, paper",
        "linear",
        "paper against fp32",
    )
    per_decoder = ("decoder of one matrix", "MLP weights", "with biases", "gains and biases, 4096 wide", "11008 wide")
    whole = ("shapes and settings", "paper", "linear", "model", "size", "against 16 bits")
    return PAGE.format(
        settings="\n".join(table(per_matrix, matrices())),
        example="\n".join(worked_example()),
        decoders="\n".join(table(per_decoder, decoders())),
        fp32=affine_bits(LLAMA2_7B, 32),
        fp16=affine_bits(LLAMA2_7B, 16),
        models="\n".join(table(whole, models())),
    )


if __name__ == "__main__":
    print(page())
