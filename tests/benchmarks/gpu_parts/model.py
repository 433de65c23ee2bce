"""A Llama of 7B shape with random weights, dense and packed: tokens a second, and memory at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts import formats
from gpu_parts.packed import Format, stored_bytes
from gpu_parts.part import Column, Item, Part, Row, Setting
from gpu_parts.timing import Run, alone, captured

FORMATS = ("dense", formats.FOLDED, "integer 4 bits", "AQLM 1x16")
_BATCHES = (1, 16)
_PROMPT, _CACHE = 2048, 512  # tokens of a prefill; places of the static cache, all of which attention reads
_TOKENS = 16  # decoded for one measurement
_SPARE = 16e9  # bytes left free when the number of blocks is chosen


def items(setting: Setting) -> Iterable[Item]:
    names = ("dense", "AQLM 1x16") if setting.small else FORMATS
    return [Item(name, partial(_model, setting, name)) for name in names]


def config(setting: Setting) -> Any:
    from transformers import LlamaConfig

    if setting.small:
        return LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=_blocks(setting),
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def _blocks(setting: Setting) -> int:
    """32, or as many as fit dense."""
    free = torch.cuda.mem_get_info(setting.device)[0] if setting.cuda else 0
    return max(1, min(32, int((free - _SPARE) / 405e6)))


@torch.inference_mode()
def _model(setting: Setting, name: str) -> list[Row]:
    dtype = torch.float16 if setting.cuda else torch.float32
    _reset_peak(setting)
    begun = time.perf_counter()
    model, linears = build(setting, name, dtype)
    if setting.cuda:
        torch.cuda.synchronize()
    common = {
        "format": name, "blocks": model.config.num_hidden_layers, "linear_bytes": linears,
        "build_seconds": time.perf_counter() - begun, "load_peak_gib": _peak(setting),
    }  # fmt: skip
    head = model.lm_head.weight.nbytes
    rows = []
    prompt = 8 if setting.small else _PROMPT
    for what, batch in (*(("decode", batch) for batch in _BATCHES), ("prefill", 1)):
        _reset_peak(setting)
        if what == "decode":
            seconds, how = decode(setting, model, batch)
            tokens, cache = batch, _cache_bytes(model.config, batch, dtype, setting)
        else:
            seconds, how = prefill(setting, model, prompt)
            tokens, cache = prompt, 0
        floor, limit = setting.ceilings.floor(linears + head + cache, 2.0 * tokens * _weights(model.config), "float16")
        rows.append(
            common | {
                "what": what if what == "decode" else f"prefill {prompt}", "batch": batch, "how": how,
                "ms": seconds * 1e3, "tokens_per_second": tokens / seconds, "peak_gib": _peak(setting),
                "floor_ms": floor * 1e3 if floor else None, "limit": limit,
                "fraction": floor / seconds if floor else None,
            }
        )  # fmt: skip
    return rows


def build(setting: Setting, name: str, dtype: torch.dtype) -> tuple[Any, int]:
    """The model on the device, made there weight by weight so that nothing dense is held beside what is packed; and
    the bytes of its linear layers."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = config(setting)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).to(dtype).eval()
    model.requires_grad_(False)
    kind = None if name == "dense" else formats.named(name)
    size = 0
    for place, block in enumerate(model.model.layers):
        for seed, path in enumerate(_linears(block)):
            size += _replace(setting, block, path, kind, dtype, 100 * place + seed)
    for module in model.modules():  # what remains: embeddings, norms, the head
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = setting.normal(*parameter.shape, dtype=dtype) * 0.02 + (parameter.ndim == 1)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(shape).to(setting.device)
    return model, size


def _linears(block: nn.Module) -> list[str]:
    return [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]


def _replace(setting: Setting, block: nn.Module, path: str, kind: Format | None, dtype: torch.dtype, seed: int) -> int:
    """Put a random layer in place of one that is still on the meta device. Returns the bytes of its weight."""
    parent, _, last = path.rpartition(".")
    old: Any = block.get_submodule(path)
    out, into = old.out_features, old.in_features
    if kind is None:
        weight = setting.normal(out, into, dtype=dtype, seed=seed).mul_(into**-0.5)
        old.weight = nn.Parameter(weight, requires_grad=False)
        return weight.nbytes
    packed = kind.make(setting, out, into, seed)
    setattr(block.get_submodule(parent), last, kind.build(packed, setting))
    return stored_bytes(packed)


def steps(setting: Setting, model: Any, batch: int) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A greedy step of one token for each of the batch, which returns the tokens (batch, 1) it found, always in the
    same memory; and what takes all back to the first token, 1. Nothing in a step waits for the device."""
    from transformers import StaticCache

    places = 16 if setting.small else _CACHE
    cache = StaticCache(config=model.config, max_cache_len=places)
    token = torch.ones(batch, 1, dtype=torch.int64, device=setting.device)
    position = torch.zeros(1, 1, dtype=torch.int64, device=setting.device)
    place = torch.arange(places, device=setting.device)

    def step() -> Tensor:
        # the mask is made here, on the device: what transformers makes of a cache may wait for it
        mask = (place <= position)[None, None].expand(batch, 1, 1, places)
        logits = model(
            input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)
        return token

    def rewind() -> None:
        token.fill_(1)
        position.zero_()
        for layer in cache.layers:
            layer.cumulative_length.zero_()

    step()  # the cache takes its memory, kernels are compiled and tuned
    rewind()
    return step, rewind


def decode(setting: Setting, model: Any, batch: int) -> tuple[float, str]:
    """Seconds a step, and how: a CUDA graph of the step where it can be captured."""
    tokens = 2 if setting.small else _TOKENS
    step, rewind = steps(setting, model, batch)
    run, note = captured(setting, step)
    how = "static cache, a CUDA graph a token" if run else f"static cache, no graph ({note})"

    def many(one: Callable[[], object] = run or step) -> None:
        rewind()
        for _ in range(tokens):
            one()

    return alone(setting, many, calls=tokens, seconds=1.0).seconds, how


def prefill(setting: Setting, model: Any, prompt: int) -> tuple[float, str]:
    """Seconds of one prompt, logits of its last token alone."""
    generator = setting.generator(5)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=generator, device=setting.device)
    run: Run = partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
    return alone(setting, run, seconds=1.0).seconds, "called from Python, no cache"


def _weights(shape: Any) -> int:
    """Of all linear layers of the blocks."""
    return int(shape.num_hidden_layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size))


def _cache_bytes(shape: Any, batch: int, dtype: torch.dtype, setting: Setting) -> int:
    places = 16 if setting.small else _CACHE
    return int(2 * shape.num_hidden_layers * batch * places * shape.hidden_size * dtype.itemsize)


def _reset_peak(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(setting: Setting) -> float | None:
    """GiB of torch's allocations at most since the last reset."""
    return torch.cuda.max_memory_allocated() / 2**30 if setting.cuda else None


PART = Part(
    "model",
    "A Llama of 7B shape",
    "transformers' LlamaForCausalLM with random weights, float16, its linear layers dense or packed; embeddings "
    f"and head stay dense. Decoding: greedy, {_TOKENS} tokens from an empty static cache of {_CACHE} places, all "
    "of which attention reads. Prefill: one prompt, logits of its last token. Memory: torch's allocations at "
    "most, while building (weights are made on the GPU one by one) and while running. The floor: bytes of "
    "linear layers, head and cache over the measured copy, or the linear layers' operations over the measured "
    "float16 matrix product.",
    95,
    (
        Column("format", "linear layers"),
        Column("blocks", "blocks", "d"),
        Column("what", "what"),
        Column("batch", "batch", "d"),
        Column("ms", "ms", ".4g"),
        Column("tokens_per_second", "tokens/s", ",.4g"),
        Column("floor_ms", "floor ms", ".3g"),
        Column("limit", "limit"),
        Column("fraction", "of floor", ".0%"),
        Column("load_peak_gib", "GiB building", ".2f"),
        Column("peak_gib", "GiB running", ".2f"),
        Column("how", "how"),
    ),
    items,
    item_seconds=90,
)
