"""Models that evaluators and profilers are tried on, and what is watched meanwhile: the weights, the files, the
process, the network."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits.ledger import dense_ledger, measure_bits
from evenbits.measure import KERNEL_POLICY, Weights
from evenbits.models import guarded_randomness
from evenbits.record import ModelFacts
from evenbits.shapes import read_inventory
from evenbits.subject import MeasuredModel
from evenbits.testing.cases import random_state
from evenbits.testing.stand_ins import ROWS, with_stand_ins
from evenbits.testing.stored import compress_model, folder_digest
from evenbits.tiny import tiny_model

SEED = 3


def state_digest(model: nn.Module) -> str:
    """Of every parameter and buffer, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode() + str(tensor.dtype).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Watched(MeasuredModel):
    """Remembers every model that was opened, and what it was like."""

    loaded: list[tuple[nn.Module, str]] = field(default_factory=list)

    def load(self, weights: Weights = "restored") -> tuple[nn.Module, Any]:
        model, tokenizer = super().load(weights)
        self.loaded.append((model, state_digest(model)))
        return model, tokenizer

    def changed(self) -> list[str]:
        """What became of the models that were opened, in words."""
        found = []
        for model, before in self.loaded:
            if state_digest(model) != before:
                found.append("wrote into the model's weights")
            if model.training:
                found.append("left the model in training mode")
            if any(parameter.requires_grad for parameter in model.parameters()):
                found.append("left gradients on")
        return list(dict.fromkeys(found))


@dataclass
class Seen:
    """What a stage gave on one subject, or the error that ended it; and what it did beside."""

    findings: list[Any] = field(default_factory=list)
    error: Exception | SystemExit | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # the subject's, once the model was opened
    changed: list[str] = field(default_factory=list)
    process: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)


class Stand:
    """A tiny model, dense and compressed, in a folder of its own."""

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.folder = folder
        self.base = tiny_model(folder / "dense", "llama") if model is None else model
        self.registry = with_stand_ins()
        described = read_inventory(self.base)
        shapes, width = described.shapes("float32"), 4
        self.facts = ModelFacts(
            name="tiny", revision="none", dtype="float32", parameters=shapes.parameters, linear_weights=shapes.weights,
            stored_bits=8 * width, linear_bytes=shapes.weights * width,
            model_bytes=shapes.weights * width + shapes.rest_bytes,
        )  # fmt: skip
        self.compressed = folder / "compressed"
        compress_model(ROWS, ROWS.options(), self.base, self.compressed)

    def subject(self, which: str, device: str = "cpu") -> Watched:
        """which: "dense" or "compressed"."""
        artifact = which == "compressed"
        ledger = measure_bits(self.compressed, self.facts) if artifact else dense_ledger(self.facts)
        facts = {
            "model": self.facts.name, "revision": self.facts.revision, "dtype": self.facts.dtype,
            "kernel": KERNEL_POLICY["restored"], "device": device, "torch": torch.__version__,
            "transformers": version("transformers"),
        }  # fmt: skip
        sizes = {
            "linear": ledger.linear_bytes, "model": ledger.model_bytes,
            "dense_linear": self.facts.linear_bytes, "dense_model": self.facts.model_bytes,
        }  # fmt: skip
        return Watched(
            self.registry, self.compressed if artifact else self.base, artifact, "float32", torch.device(device), SEED,
            facts, sizes, 1 << 20 if artifact else None, None, 1.0 if artifact else None,
        )  # fmt: skip

    def measure(self, which: str, stage: Callable[[Any], Any], device: str = "cpu", outer: int = 0) -> Seen:
        """Run a stage as a trial would. outer: the global random state that the process happens to be in."""
        subject, seen = self.subject(which, device), Seen()
        files = {folder: folder_digest(folder) for folder in (self.base, self.compressed)}
        with guarded_randomness(outer), offline(seen.reached):
            before = process_state()
            random_before = random_state()
            try:
                with guarded_randomness(SEED):
                    seen.findings = list(stage(subject))
            except (Exception, SystemExit) as error:
                seen.error = error
            after = process_state()
            moved = [name for name in before if before[name] != after[name]]
            seen.process = [f"{name} from {before[name]} to {after[name]}" for name in moved]
            if random_state() != random_before:
                seen.process.append("the global random state")
            restore_process(before)
        seen.facts = dict(subject.facts)
        seen.changed = subject.changed()
        if any(folder_digest(folder) != digest for folder, digest in files.items()):
            seen.changed.append("changed files of the stored model")
        return seen


def process_state() -> dict[str, Any]:
    """What a stage may not leave otherwise than it was: the next one runs in the same process."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the working directory": Path.cwd(),
    }


def restore_process(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["torch's default dtype"])
    torch.set_grad_enabled(state["torch's grad mode"])
    torch.set_num_threads(state["torch's number of threads"])
    torch.use_deterministic_algorithms(state["torch's deterministic algorithms"])
    os.chdir(state["the working directory"])


@contextmanager
def offline(reached: list[str]) -> Iterator[None]:
    """No network inside: what is tried is refused, and noted in `reached`. This machine itself may be asked."""
    connect, connect_ex, resolve = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(host: Any) -> None:
        name = host[0] if isinstance(host, tuple) else host
        if isinstance(name, bytes):
            name = name.decode(errors="replace")
        if name in (None, "", "localhost", "::1") or str(name).startswith("127."):
            return
        reached.append(str(name))
        raise OSError(f"no network while a plugin is checked ({name})")

    def connected(self: socket.socket, address: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None):
            refuse(address)
        return connect(self, address)

    def connected_ex(self: socket.socket, address: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None):
            refuse(address)
        return connect_ex(self, address)

    def resolved(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return resolve(host, *args, **kwargs)

    replaced: Any = socket
    replaced.socket.connect, replaced.socket.connect_ex, replaced.getaddrinfo = connected, connected_ex, resolved
    try:
        yield
    finally:
        replaced.socket.connect, replaced.socket.connect_ex, replaced.getaddrinfo = connect, connect_ex, resolve
