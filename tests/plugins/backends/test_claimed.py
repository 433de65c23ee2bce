"""Bits that names and configs claim."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.plugins.backends.small_checkpoints import AQLM, vptq_config
from tests.plugins.backends.wide_golden import GOLDEN

from evenbits_backends.claimed import bits_in_config, bits_in_name


@pytest.mark.parametrize(("name", "bits"), [
    ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", 4),
    ("ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf", 2),
    ("org/Llama-2-7b-AQLM-1x12g8", 1.5),
    ("VPTQ-community/Meta-Llama-3.1-70B-Instruct-v8-k65536-256-woft", 3),
    ("VPTQ-community/Qwen2.5-32B-Instruct-v8-k65536-0-woft", 2),
    ("unsloth/llama-3-8b-bnb-4bit", 4),
    ("gptq-4bit-128g-actorder_True", 4),
    ("RedHatAI/Qwen3-4B-quantized.w4a16", 4),
    ("RedHatAI/Llama-3.1-8B-FP8-dynamic", 8),
    ("folder/babyllama-w3g64", 3),
    ("model-2.5bpw/", 2.5),
    ("/cache/models--org--Foo-3bit-gptq/snapshots/0123456789abcdef0123456789abcdef01234567", 3),
    ("TheBloke/Llama-2-7B-GPTQ", None),
    ("Qwen/Qwen3-4B-AWQ", None),
    ("org/Llama-AQLM-2x8-64bit", None),
    ("some-3bit-folder/checkpoint", None),
])  # fmt: skip
def test_names(name: str, bits: float | None) -> None:
    assert bits_in_name(name) == bits


def torchao(name: str) -> dict[str, Any]:
    config = json.loads((GOLDEN / f"torchao-{name}" / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]
    return found


@pytest.mark.parametrize(("config", "bits"), [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4),
    ({"quant_method": "awq", "w_bit": 3}, 3),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
    ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
    (AQLM, 3),
    (vptq_config({"a": (22, 20), "b": (8, 8)}), 2),
    ({"quant_method": "vptq"}, None),
    (torchao("int8"), 8),
    (torchao("intx3"), 3),  # of which each code takes a byte
    ({"quant_method": "fp8"}, None),
])  # fmt: skip
def test_configs(config: dict[str, Any], bits: float | None) -> None:
    assert bits_in_config(config) == bits
