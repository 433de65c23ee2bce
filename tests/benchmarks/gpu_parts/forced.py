"""Every configuration in turn, whatever the tuner would take; which kernels ran; and memory poisoned before."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from evenbits.kernels.launch import TUNER, Kernel
from gpu_parts.facts import ROOT


def all_kernels() -> list[Kernel]:
    """Of the harness' and of PocketLLM's `gpu` folders."""
    found: list[Kernel] = []
    for root, folder in (("harness", "evenbits/kernels/gpu"), ("plugins", "evenbits_pocketllm/gpu")):
        for path in sorted((ROOT / root / folder).glob("*.py")):
            if path.name != "__init__.py":
                found += getattr(importlib.import_module(f"{folder.replace('/', '.')}.{path.stem}"), "KERNELS", ())
    return found


def names(kernels: list[Kernel]) -> list[str]:
    """Every "kernel / configuration"."""
    return [f"{kernel.name} / {config.name}" for kernel in kernels for config in kernel.configs]


class Launches:
    """What was launched while `watched`: "kernel / configuration", in order of first launch."""

    def __init__(self) -> None:
        self.ran: dict[str, None] = {}

    @contextmanager
    def watched(self) -> Iterator[Launches]:
        kernels: dict[int, list[Kernel]] = {}
        for kernel in all_kernels():
            kernels.setdefault(id(kernel.function), []).append(kernel)
        with ExitStack() as undo:
            for same in kernels.values():
                function = same[0].function
                function.run = self._spy(function.run, same)
                undo.callback(delattr, function, "run")  # the class's own shows again
            yield self

    def _spy(self, run: Any, kernels: list[Kernel]) -> Any:
        def spied(*arguments: Any, **named: Any) -> Any:
            for kernel in kernels:
                self.ran |= dict.fromkeys(f"{kernel.name} / {name}" for name in _matching(kernel, named))
            return run(*arguments, **named)

        return spied


def _matching(kernel: Kernel, named: dict[str, Any]) -> list[str]:
    """The configurations that a launch with these arguments is of."""
    found = []
    for config in kernel.configs:
        wanted = dict(config.tiles) | {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if all(named.get(key, value) == value for key, value in wanted.items()):
            found.append(config.name)
    return found


@contextmanager
def forced(place: int) -> Iterator[list[int]]:
    """Where kernels have a choice they take configuration number `place`, or their last one. Yields a list, which
    fills with how many they had to choose from."""
    offered: list[int] = []

    def choose(key: Any, configs: Any, run: Any, device: Any) -> Any:
        offered.append(len(configs))
        return configs[min(place, len(configs) - 1)]

    TUNER.choose = choose  # type: ignore[method-assign]
    try:
        yield offered
    finally:
        del TUNER.choose


@contextmanager
def poisoned() -> Iterator[None]:
    """All memory that torch hands out uninitialised holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert bool(torch.isnan(torch.empty(1)).item()), "torch does not fill uninitialised memory"
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def no_room(error: BaseException) -> bool:
    """Whether a configuration needs more registers or shared memory than this GPU has."""
    return type(error).__name__ == "OutOfResources"


def variants(run: Callable[[], object]) -> list[tuple[str, Callable[[], object]]]:
    """A run for each configuration that its kernels may choose, labelled with what it launches: "8-rows".

    Runs each once; configurations that this GPU has no room for are left out.
    """
    found: list[tuple[str, Callable[[], object]]] = []
    place, most = 0, 1
    while place < most:

        def one(place: int = place) -> object:
            with forced(place):
                return run()

        launches = Launches()
        try:
            with forced(place) as offered, launches.watched():
                run()
        except Exception as error:
            if not no_room(error):
                raise
        else:
            found.append((label(launches, most > 1 or max(offered, default=1) > 1), one))
        most = max(most, *offered) if offered else most
        place += 1
    return found


def label(launches: Launches, several: bool) -> str:
    """The configurations that ran, of kernels that have a choice, or of all where none has."""
    kernels = {kernel.name: len(kernel.configs) for kernel in all_kernels()}
    pairs = [name.split(" / ") for name in launches.ran]
    shown = [config for kernel, config in pairs if not several or kernels[kernel] > 1]
    return " + ".join(dict.fromkeys(shown)) or "no Triton kernel"
