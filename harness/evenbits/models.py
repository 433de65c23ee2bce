"""Open base models and walk their linear layers, a block at a time."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from evenbits.errors import TrialFailed
from evenbits.manifest import base_config
from evenbits.shapes import Architecture, Inventory, StoredTensor

Loader = Callable[[Path, str], nn.Module | None]


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextmanager
def guarded_randomness(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators inside, and put them back as they were after."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def read_tensor(tensor: StoredTensor) -> Tensor:
    """One tensor from its checkpoint file, as stored."""
    with safe_open(tensor.file, framework="pt") as opened:
        return opened.get_tensor(tensor.key)  # type: ignore[no-any-return]


def read_weight(tensor: StoredTensor, architecture: Architecture) -> Tensor:
    """(out, in) float32, whatever way round the checkpoint stores it."""
    weight = read_tensor(tensor).to(torch.float32)
    return weight.T.contiguous() if architecture.transposed else weight


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TrialFailed(f"{folder}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from None


def open_model(
    folder: Path,
    dtype: str,
    device: str | torch.device,
    *,
    trust_remote_code: bool = False,
    loader: Loader | None = None,
) -> Any:
    """The dense model in eval mode, at `dtype`, without gradients. `loader` (the plugins' load_model) goes first."""
    model = loader(folder, dtype) if loader is not None else None
    if model is None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype(dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        )
    return model.to(device).eval().requires_grad_(False)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model or an artifact."""
    from transformers import AutoConfig

    return base_config(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def build_model(folder: Path, state: Mapping[str, Tensor], dtype: str, *, trust_remote_code: bool = False) -> Any:
    """A model from its config and a complete state; every weight comes from `state` or from a tied one.

    Raises TrialFailed naming tensors that are missing or left over: nothing is initialised at random.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    with guarded_randomness(0), warnings.catch_warnings():
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), trust_remote_code=trust_remote_code)
    return fill_model(model, state, str(folder))


def fill_model(model: Any, state: Mapping[str, Tensor], where: str) -> Any:
    """Load a complete state into a model, tied weights once, and put it in eval mode without gradients.

    Raises TrialFailed, with `where`, naming tensors that are missing or left over.
    """
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    tensors = model.state_dict()
    filled = {tensor.data_ptr() for name, tensor in tensors.items() if name in state}
    lacking = sorted(name for name in missing if tensors[name].data_ptr() not in filled)  # a tied one is filled
    if lacking or unexpected:
        names = [*(f"missing {name}" for name in lacking), *(f"left over {name}" for name in unexpected)]
        raise TrialFailed(
            f"{where}: stored tensors do not make the model: {', '.join(names[:3])} ({len(names)} in all)"
        )
    model.tie_weights()
    return model.eval().requires_grad_(False)


def get_weight(module: nn.Module, architecture: Architecture) -> Tensor:
    """(out, in) float32 copy of a module's weight as it is now."""
    held = module.weight
    assert isinstance(held, Tensor)
    weight = held.detach().to(torch.float32, copy=True)
    return weight.T.contiguous() if architecture.transposed else weight


@torch.no_grad()
def set_weight(module: nn.Module, weight: Tensor, architecture: Architecture) -> None:
    """weight: (out, in), any float dtype; cast to the module's."""
    target = module.weight
    assert isinstance(target, Tensor)
    target.copy_(weight.T if architecture.transposed else weight)


def check_coverage(model: nn.Module, inventory: Inventory) -> None:
    """Refuse a model whose blocks hold linear layers that the inventory does not know.

    Raises TrialFailed naming the first: they would silently stay dense.
    """
    known = {layer.name for layer, _ in inventory.layers}
    blocks = inventory.architecture.blocks + "."
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.startswith(blocks) and isinstance(weight, Tensor) and weight.dim() >= 2 and name not in known:
            raise TrialFailed(f"{name} ({type(module).__name__}) is not understood and would stay dense")
