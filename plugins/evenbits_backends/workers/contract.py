"""The worker's side of `evenbits.foreign`: run as `python WORKER FOLDER` where no evenbits is installed.

Needs torch and safetensors alone. A worker is:

    from contract import Request, main

    def work(request: Request) -> None:
        ...
        request.answer(probes=request.probe(model), versions=["gptqmodel", "transformers", "torch"])

    if __name__ == "__main__":
        main(work)
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Request:
    """What is asked (request.json, tensors.safetensors), and where to put what comes of it.

    tokens: (samples, length) int64, or None; output: the checkpoint goes there.
    """

    def __init__(self, folder: Path) -> None:
        asked = json.loads((folder / "request.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        self.folder, self.output = folder, folder / "output"
        self.model: str = asked["model"]
        self.dtype: torch.dtype = getattr(torch, asked["dtype"])
        self.device: str = asked["device"]
        self.seed: int = asked["seed"]
        self.layers: list[str] = asked["layers"]
        self.options: dict[str, Any] = asked["options"]
        self.tokens: torch.Tensor | None = tensors.get("tokens")
        self.probes = {int(name.split("/")[1]): t for name, t in tensors.items() if name.startswith("probe/")}

    @torch.no_grad()
    def probe(self, model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """(rows, out) float32 of every linear layer's own forward; dtype: what its inputs are given in."""
        found = {}
        for name in self.layers:
            layer = model.get_submodule(name)
            width = next(w for w in (getattr(layer, "in_features", None), getattr(layer, "infeatures", None)) if w)
            inputs = self.probes[width].to(self.device, dtype or self.dtype)
            bias = getattr(layer, "bias", None)
            outputs = layer(inputs).float()
            found[name] = (outputs if bias is None else outputs - bias.float()).cpu().contiguous()
        return found

    def answer(self, probes: Mapping[str, torch.Tensor], versions: Iterable[str], **facts: Any) -> None:
        """The last word: outputs of the library's own layers, and the versions of what decided the result."""
        save_file(dict(probes), self.folder / "probes.safetensors")
        found = {name: version(name) for name in versions}
        (self.folder / "result.json").write_text(json.dumps({"versions": found, **facts}, indent=1) + "\n")


def main(work: Callable[[Request], None]) -> None:
    """Exit 1 with one line of reason in error.json where `work` raises."""
    folder = Path(sys.argv[1])
    # workers bear their libraries' names, which must be found elsewhere from here on
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    try:
        request = Request(folder)
        torch.manual_seed(request.seed)
        work(request)
    except Exception as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        (folder / "error.json").write_text(json.dumps({"message": line}) + "\n")
        sys.exit(1)
