"""How far the weights have moved, over how large they are: the distortion that rate-distortion theory bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, Subject
from evenbits.statistics import bootstrap_interval
from evenbits_synthetic import weights
from evenbits_synthetic.options import DistortionOptions


class DistortionEvaluator:
    def __init__(self, options: DistortionOptions) -> None:
        self.options = options

    def evaluate(self, subject: Subject) -> Sequence[Measurement]:
        """One measurement, "distortion": the sum of (w - w')^2 over that of w^2, over all linear layers.

        It sees what was stored alone: the dense weights are drawn again here. items: each row's squared error over the
        mean square of a row, so that their mean is the value; details["rows"]: rows of each layer, in order.
        low, high: 95 % bootstrap over rows. Raises TrialFailed for a model that is not the gaussian one, or whose
        layers changed their shapes.
        """
        model = subject.model
        _require_gaussian(model)
        held = dict(model.named_parameters())
        names = weights.names()
        tick = subject.progress(len(names), "distortion")
        errors, power = [], 0.0
        for name in names:
            restored = held.get(name)
            dense = weights.linear(name)
            if restored is None or tuple(restored.shape) != dense.shape:
                raise TrialFailed(
                    f"distortion: {name} is not {dense.shape[0]} x {dense.shape[1]} as in the gaussian model: "
                    "a method that removes rows or columns has none"
                )
            difference = restored.detach().to("cpu", torch.float64).numpy() - dense
            errors.append((difference**2).sum(axis=1))
            power += float((dense.astype(np.float64) ** 2).sum())
            tick(1)
        rows = np.concatenate(errors)
        items = rows * (len(rows) / power)
        low, high = bootstrap_interval(items)
        return [
            Measurement(
                name="distortion",
                value=float(items.mean()),
                unit="of the variance",
                better="lower",
                low=low,
                high=high,
                fingerprint={**subject.facts, "metric": "distortion", "draws": weights.VERSION},
                details={"rows": [len(part) for part in errors]},
                items=items,
            )
        ]


def _require_gaussian(model: Any) -> None:
    """By the embedding, which nothing compresses. Raises TrialFailed."""
    held = model.get_input_embeddings().weight.detach().to("cpu")
    known = torch.from_numpy(weights.embedding()).to(held.dtype)
    if held.shape != known.shape or not torch.equal(held, known):
        raise TrialFailed(
            'distortion: this is not the model "gaussian" of the synthetic plugin, and of no other it knows the weights'
        )
