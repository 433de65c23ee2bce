"""Small random models with a tokenizer, built in code: for tests that need a model and no download."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evenbits.models import guarded_randomness

ModelKind = Literal["llama", "gpt2", "qwen3", "opt"]

_WORDS = [
    "the",
    "a",
    "one",
    "two",
    "red",
    "blue",
    "small",
    "old",
    "happy",
    "quiet",
    "dog",
    "cat",
    "bird",
    "tree",
    "house",
    "river",
    "friend",
    "story",
    "saw",
    "found",
    "likes",
    "made",
    "took",
    "gave",
    "and",
    "then",
    "but",
    "so",
    "there",
    "here",
    "today",
    "again",
    ".",
]


def tiny_text(words: int = 2000, seed: int = 0) -> str:
    """Made-up sentences over 33 words, a few of them likelier after each other, so that there is something to learn."""
    draw = random.Random(seed)
    follows = {word: draw.sample(_WORDS, 4) for word in _WORDS}
    word, text = "the", []
    for _ in range(words):
        word = draw.choice(follows[word]) if draw.random() < 0.8 else draw.choice(_WORDS)
        text.append(word)
    return " ".join(text)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *_WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_model(
    folder: Path,
    architecture: ModelKind = "llama",
    seed: int = 0,
    *,
    dtype: str = "float32",
    tied: bool = False,
    blocks: int = 2,
    hidden: int = 48,
    intermediate: int = 88,
) -> Path:
    """Write a random model with its tokenizer to `folder`, and return it; no download.

    Weights have deviation 0.15, so that logits depend on every layer; norms and biases are random too.
    """
    import transformers

    tokenizer = _tokenizer()
    shared = {
        "vocab_size": len(tokenizer), "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": None, "initializer_range": 0.15,
    }  # fmt: skip
    wide = {
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "num_hidden_layers": blocks,
        "max_position_embeddings": 128,
    }
    config: Any
    if architecture == "llama":
        config = transformers.LlamaConfig(**shared, **wide, intermediate_size=intermediate, num_key_value_heads=2)
    elif architecture == "qwen3":
        config = transformers.Qwen3Config(
            **shared, **wide, intermediate_size=intermediate, num_key_value_heads=2, head_dim=16
        )
    elif architecture == "opt":
        del shared["initializer_range"]
        config = transformers.OPTConfig(
            **shared, **wide, ffn_dim=intermediate, word_embed_proj_dim=hidden, init_std=0.15, dropout=0.0
        )
    else:
        config = transformers.GPT2Config(
            **shared, n_embd=hidden, n_head=4, n_layer=blocks, n_positions=128, n_inner=intermediate
        )
    with guarded_randomness(seed):
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokens(folder: Path, samples: int = 8, length: int = 32, seed: int = 0) -> Tensor:
    """(samples, length) int64 token ids of `tiny_text`."""
    from evenbits.models import load_tokenizer

    ids = load_tokenizer(folder)(tiny_text(samples * length, seed))["input_ids"][: samples * length]
    return torch.tensor(ids, dtype=torch.long).view(samples, length)
