"""Train adapters with PEFT's own LoRA layers on a stored model, and hand them over with their scale folded in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.compressor import TunableModel
from evenbits.errors import MissingExtra, TrialFailed
from evenbits.models import guarded_randomness
from evenbits_lora.options import LoraOptions, select
from evenbits_lora.train import train

ADAPTER = "evenbits"


class LoraStage:
    """Low-rank updates beside frozen weights (arXiv:2106.09685), by PEFT.

    The base stays as it is stored. For the training it is decoded once, to frozen nn.Linear layers of the evaluated
    dtype, which PEFT wraps in its own way; what is stored is not touched. Decoding at each call would save nothing,
    since backward needs the decoded weight of every layer at the same time.
    """

    def __init__(self, options: LoraOptions) -> None:
        self.options = options

    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        """Raises SuiteError for an unknown target, MissingExtra without PEFT, TrialFailed for a layer that has an
        adapter already and where the loss is no longer finite."""
        targets = [layer.name for layer in select(self.options, work.shapes)]
        for name in targets:
            if name in work.adapters:
                raise TrialFailed(f"{name}: has an adapter from a stage before; merge that one, or leave it out here")
        teacher = work.dense() if self.options.loss == "distill" else None
        # PEFT and dropout draw from the global generators: seed those from the stage's own, and put them back
        drawn = int(torch.randint(2**62, (1,), generator=generator))
        with guarded_randomness(drawn), frozen_linears(work):
            layers = add_lora(work.model, targets, self.options)
            train(work.model, list(layers.values()), work.calibration, teacher, self.options, generator)
            trained = {name: factors(layer) for name, layer in layers.items()}
        for name, (a, b) in trained.items():
            work.add_adapter(name, {"A": a, "B": b}, dtype=self.options.dtype)
        if self.options.merge:
            work.merge_adapters(targets)


@contextmanager
def frozen_linears(work: TunableModel) -> Iterator[None]:
    """Inside, the model's linear layers are nn.Linear modules that hold what is restored, without gradients.

    PEFT chooses its LoRA layer by the class of what it wraps, and nn.Linear is what it knows; the rows of every
    weight are outputs, in GPT-2 too. What was there comes back after, whatever has been put around the stand-ins.
    """
    originals = {shape.name: work.model.get_submodule(shape.name) for shape in work.shapes}
    dtype = next(work.model.parameters()).dtype
    for shape in work.shapes:
        bias = getattr(originals[shape.name], "bias", None)
        with torch.no_grad():
            weight = work.restore(shape.name).to(dtype)
        # on "meta" nothing is allocated and nothing drawn at random for what is replaced at once
        linear = nn.Linear(shape.in_features, shape.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = bias
        put(work.model, shape.name, linear)
    try:
        yield
    finally:
        for name, module in originals.items():
            put(work.model, name, module)
        if hasattr(work.model, "peft_config"):
            del work.model.peft_config  # PEFT's mark that it is at work in this model


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def add_lora(model: nn.Module, targets: list[str], options: LoraOptions) -> Mapping[str, Any]:
    """PEFT's LoRA layers around the named modules: A as nn.Linear starts, B zero, both float32. The rest is frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("peft", "lora") from error
    # PEFT's annotation asks for a whole alpha; it is only ever divided
    scale: dict[str, Any] = {"r": options.r, "lora_alpha": options.alpha}
    config = LoraConfig(**scale, lora_dropout=options.dropout, target_modules=targets, bias="none")
    inject_adapter_in_model(config, model, ADAPTER)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    for layer in layers.values():
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()
        layer.lora_dropout.train()  # the model's own dropout stays off: what is trained is what is evaluated
    return layers


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """(A (r, in), B (out, r)) float32 of a PEFT layer, its scale alpha / r in B, so that the update is B A."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return a.detach().clone(), b.detach() * layer.scaling[ADAPTER]
