"""Shapes from an outline are those of the files that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evenbits.shapes import read_inventory
from evenbits.suite_spec import ModelOutline

LLAMA2_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "dtype": "float16",
}  # fmt: skip
QWEN3_14B: dict[str, Any] = {
    "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 151936, "dtype": "bfloat16", "head_dim": 128, "qk_norm": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "parameters"), [(LLAMA2_7B, 6_738_415_616), (QWEN3_14B, 14_768_307_200)])
def test_parameters_of_the_papers_models(sizes: dict[str, Any], parameters: int) -> None:
    shapes = ModelOutline(**sizes).shapes("float32")
    assert shapes.parameters == parameters
    assert shapes.stored_bytes == 2 * parameters
    assert shapes.rest_bytes == 4 * (parameters - shapes.weights)


def test_an_outline_gives_what_the_files_give(tiny: Any) -> None:
    for dtype in ("float32", "bfloat16"):
        assert ModelOutline(**TINY).shapes(dtype) == read_inventory(tiny.model).shapes(dtype)


def test_heads_of_their_own_width_norms_and_a_tied_head(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {**TINY, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(**{name: value for name, value in sizes.items() if name != "dtype"}, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).to(torch.float16).save_pretrained(tmp_path)
    outline = ModelOutline(**{**sizes, "dtype": "float16", "tie_word_embeddings": True, "qk_norm": True})
    assert outline.shapes("float32") == read_inventory(tmp_path).shapes("float32")


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="hidden_size 32 is no multiple of num_attention_heads 5; give head_dim"):
        ModelOutline(**{**TINY, "num_attention_heads": 5})
