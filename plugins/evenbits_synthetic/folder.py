"""The gaussian model as a Hugging Face folder, written where it is first asked for."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evenbits.errors import SuiteError
from evenbits_synthetic import weights

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": weights.WIDTH,
    "intermediate_size": weights.WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": weights.HEADS,
    "num_key_value_heads": weights.HEADS,
    "head_dim": weights.WIDTH // weights.HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": weights.VOCABULARY,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}


def words() -> list[str]:
    """The vocabulary but for the special tokens."""
    return [f"w{number}" for number in range(weights.WORDS)]


def _tokenizer() -> dict[str, Any]:
    """One token a word, <s> in front."""
    special = [
        {"id": number, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for number, token in enumerate(weights.SPECIAL)
    ]  # fmt: skip
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate((*weights.SPECIAL, *words()))},
            "unk_token": "<unk>",
        },
    }


TOKENIZER_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "unk_token": "<unk>",
    "model_max_length": 2048,
}


def _texts() -> dict[str, str]:
    """The folder's files but for the weights."""
    files = {"config.json": CONFIG, "tokenizer.json": _tokenizer(), "tokenizer_config.json": TOKENIZER_CONFIG}
    return {name: json.dumps(content, indent=1, sort_keys=True) + "\n" for name, content in files.items()}


def cache_folder() -> Path:
    """Where it lies: a folder of this version's name in the user's cache ($XDG_CACHE_HOME, else ~/.cache)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        root = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise SuiteError("model gaussian: no home folder; set XDG_CACHE_HOME to a folder with 5 MB of room") from None
    texts = json.dumps([weights.VERSION, weights.shapes(), _texts()], sort_keys=True)
    return root / "evenbits" / f"gaussian-{hashlib.sha256(texts.encode()).hexdigest()[:12]}"


def write_folder(folder: Path) -> Path:
    """Write the model unless it is there, whole or not at all: of two processes at once, one folder stays.

    Raises SuiteError where the place cannot be written, or the folder has lost files since.
    """
    if folder.is_dir():
        for name in (*_texts(), "model.safetensors"):
            if not (folder / name).is_file():
                raise SuiteError(f"model gaussian: {folder} has no {name}; remove that folder, and it is written again")
        return folder
    from safetensors.numpy import save_file

    making = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        making.mkdir(parents=True)
        for name, text in _texts().items():
            (making / name).write_text(text)
        save_file(dict(weights.tensors()), making / "model.safetensors", {"format": "pt"})
        making.rename(folder)  # fails where another process was first: its folder holds the same
    except OSError as error:
        if not folder.is_dir():
            raise SuiteError(
                f"model gaussian: {folder} cannot be written ({error.strerror}); "
                "set XDG_CACHE_HOME to a folder with 5 MB of room"
            ) from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


class GaussianFolder(os.PathLike[str]):
    """Its path, when somebody asks for it; until then nothing is made, for plugins are listed often."""

    def __fspath__(self) -> str:
        return str(write_folder(cache_folder()))

    def __str__(self) -> str:
        return "drawn when first used"
