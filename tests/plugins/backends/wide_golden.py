"""Reads golden/wide/, which make_wide_golden.py makes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from evenbits.compressor import LayerShape, Role
from evenbits_backends.layout import recognise

GOLDEN = Path(__file__).parent / "golden" / "wide"
NARROW = LayerShape("model.layers.0.self_attn.k_proj", 0, "self_attn.k_proj", 32, 64)
WIDE = LayerShape("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", 64, 96)


class Kept(NamedTuple):
    """A layer of a library's file: what it decodes to here, the dense weight, the library's own outputs for probe."""

    restored: Tensor
    weight: Tensor
    probe: Tensor
    outputs: Tensor
    facts: dict[str, Any]


def read_golden(name: str, shape: LayerShape) -> Kept:
    """Decoded by the layout that the config is recognised as; the tensors' bytes must be those predicted."""
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layout, facts = recognise(config, name)
    stored, outputs = load_file(folder / "model.safetensors"), load_file(folder / "outputs.safetensors")
    roles = layout.roles(shape, facts)
    prefix = f"{shape.name}."
    assert {n.removeprefix(prefix) for n in stored if n.startswith(prefix)} == roles.keys(), "every tensor has a role"
    tensors = {role: stored[f"{shape.name}.{role}"] for role in roles}
    predicted, found = layout.role_bytes(shape, facts), taken(tensors, roles)
    if facts.get("double"):  # one number of bitsandbytes' JSON has more or fewer digits
        assert abs(predicted[Role.META] - found[Role.META]) <= 3
        predicted[Role.META] = found[Role.META]
    assert found == predicted
    restored = layout.decode(tensors, shape, facts)
    weight = load_file(GOLDEN / "dense.safetensors")[shape.name].float()
    return Kept(restored, weight, outputs[f"probe/{shape.in_features}"], outputs[shape.name], facts)


def taken(tensors: dict[str, Tensor], roles: dict[str, Role]) -> dict[Role, int]:
    count: Counter[Role] = Counter()
    for name, role in roles.items():
        count[role] += tensors[name].numel() * tensors[name].element_size()
    return dict(count)
