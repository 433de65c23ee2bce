"""Models stored whole, as plain transformers folders where the architecture's config can say their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evenbits.artifact import Artifact
from evenbits.errors import ArtifactError
from evenbits.models import load_config
from evenbits.shapes import ARCHITECTURES
from evenbits.whole import restore_whole


def whole_state(artifact: Artifact, compressor: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The restored model's tensors, tied ones once, and what its config must say otherwise than the base model's.

    Raises ArtifactError where no config gives a model of these shapes.
    """
    model = restore_whole(artifact, compressor)
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            state[name] = tensor
            seen.add(tensor.data_ptr())
    config = load_config(artifact.folder, trust_remote_code=artifact.manifest.trust_remote_code)
    changes = _changes(config, state)
    for name, value in changes.items():
        setattr(config, name, value)
    _check(artifact, config, model.state_dict())
    return state, changes


def _changes(config: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Widths of Llama's family as the first block has them; that of others is left as it is."""
    first = f"{ARCHITECTURES[config.model_type].blocks}.0"
    found: dict[str, Any] = {}
    query, key = (state.get(f"{first}.self_attn.{kind}_proj.weight") for kind in "qk")
    heads = getattr(config, "num_attention_heads", None)
    if query is not None and key is not None and heads and hasattr(config, "num_key_value_heads"):
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        found["num_attention_heads"], found["num_key_value_heads"] = query.shape[0] // width, key.shape[0] // width
        found["head_dim"] = width
    gate = state.get(f"{first}.mlp.gate_proj.weight")
    if gate is not None:
        found["intermediate_size"] = gate.shape[0]
    return {name: value for name, value in found.items() if getattr(config, name, None) != value}


def _check(artifact: Artifact, config: Any, state: Mapping[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(
            config, trust_remote_code=artifact.manifest.trust_remote_code
        ).state_dict()
    wrong = [name for name in {**made, **state} if name not in made or name not in state]
    wrong += [name for name in made if name in state and made[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        stored, expected = (tuple(one[name].shape) if name in one else "not there" for one in (state, made))
        raise ArtifactError(
            f"{artifact.folder}: no config of model type {config.model_type!r} can say its shapes: {name} is {stored}, "
            f"the config makes it {expected}; open the artifact itself, by evenbits.load or, once evenbits is "
            "imported, by from_pretrained"
        )
