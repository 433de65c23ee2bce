"""Logits of a stored model with one decoder block's weights in memory at a time, so that a model larger than the memory
can be measured. The numbers are those of the model held whole: its own forward pass runs, block after block.

Held at once: the weights of one block, or the table of the vocabulary where it is needed (embeddings first, head
last); norms and tables of positions; what compressed layers share; the hidden states of all batches, in memory or in
a file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from evenbits.errors import TrialFailed
from evenbits.hidden import HELD_BYTES, HiddenStates
from evenbits.models import guarded_randomness, load_config, torch_dtype
from evenbits.shapes import ARCHITECTURES, read_config
from evenbits.weights import StoredWeights


class _Reached(Exception):
    """Ends a forward pass that has come to where it was to go."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class BlockStream:
    """A model as `model`, its parameters without values but for those in use."""

    def __init__(
        self,
        weights: StoredWeights,
        folder: Path,
        dtype: str,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """folder: with the model's config. Reads no weights yet.

        Raises TrialFailed naming tensors that are missing or left over.
        """
        self._weights, self._device, self._held_bytes, self._where = weights, device, held_bytes, folder
        self.model = open_skeleton(folder, dtype, trust_remote_code=trust_remote_code)
        path = ARCHITECTURES[read_config(folder)["model_type"]].blocks
        self._blocks = list(self.model.get_submodule(path))
        self._embeddings: nn.Module = self.model.get_input_embeddings()
        self._places = places_of(self.model, weights.names, str(folder))
        self._empty = {name: getattr(*places[0]) for name, places in self._places.items()}
        self._wraps = False  # whether a block returns a tuple; seen at the first
        self._given: Tensor | None = None  # what the block at hand computes on, in place of what it is given
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        # rotary embeddings that grow with the text are put back before each block, to see it as the first block did
        inside = {module for block in self._blocks for module in block.modules()}
        self._fresh = {
            name: copy.deepcopy(module)
            for name, module in self.model.named_modules()
            if name and module not in inside and module._buffers and not any(True for _ in module.parameters())
        }

    @property
    def attention(self) -> str | None:
        """The attention implementation, as the model held whole would say."""
        found: str | None = getattr(self.model.config, "_attn_implementation", None)
        return found

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def logits(
        self, batches: Sequence[Tensor], advance: Callable[[int], None] = lambda blocks: None
    ) -> Iterator[Tensor]:
        """(B, T, vocab) for each batch (B, T) of token ids, in order, each as `model(input_ids=batch).logits`.

        All blocks are run before the first is yielded. `advance` is told of each block done. Nothing is left behind
        when the caller stops early. Raises ValueError for a batch that is not two-dimensional, TrialFailed as
        `check_batches`.
        """
        for index, batch in enumerate(batches):
            if batch.dim() != 2:
                raise ValueError(f"batch {index} has shape {tuple(batch.shape)}, expected (batch, length)")
        check_batches(self.model, batches)
        return self._logits(batches, advance)

    def _logits(self, batches: Sequence[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
        tables, head = self._own(self._embeddings), self._own(self.model.get_output_embeddings())
        inside = [self._own(block) for block in self._blocks]
        others = self._places.keys() - tables - head - set().union(*inside)
        with self._loaded(others), HiddenStates([b.shape for b in batches], self._device, self._held_bytes) as states:
            with self._loaded(tables), _forwards({self._blocks[0]: _stop}):
                for index, batch in enumerate(batches):
                    states[index] = self._reached(batch)
            for number, block in enumerate(self._blocks):
                self._renew()
                with self._loaded(inside[number]), _forwards(self._until(number, self._computes(block))):
                    for index, batch in enumerate(batches):
                        self._given = states[index]
                        states[index] = self._reached(batch)
                advance(1)
            self._renew()
            with self._loaded(head), _forwards(self._until(len(self._blocks) - 1, self._returns_given)):
                for index, batch in enumerate(batches):
                    self._given = states[index]
                    yield self._forward(batch).logits

    # -- one pass ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, batch: Tensor) -> Any:
        return self.model(input_ids=batch.to(self._device), use_cache=False)

    def _reached(self, batch: Tensor) -> Tensor:
        try:
            self._forward(batch)
        except _Reached as end:
            return end.states
        raise TrialFailed(f"{self._where}: the model's forward pass does not run its blocks in order")

    def _until(self, number: int, forward: Callable[..., Any]) -> dict[nn.Module, Callable[..., Any]]:
        """Forward passes in which no embedding is read, blocks hand on, and block `number` does `forward`."""
        found: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(self._blocks[:number], self._hand_on)
        return {self._embeddings: self._no_embedding, **found, self._blocks[number]: forward}

    def _no_embedding(self, ids: Tensor) -> Tensor:
        """A stand-in of the right shape that takes no memory; the block at hand does not look at it."""
        weight = self._embeddings.weight
        assert isinstance(weight, Tensor)
        return torch.zeros((), dtype=weight.dtype, device=self._device).expand(*ids.shape, weight.shape[1])

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        states = _states(args, kwargs)
        return (states,) if self._wraps else states

    def _computes(self, block: nn.Module) -> Callable[..., Any]:
        compute = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("hidden_states", None)
            output = compute(self._given, *args[1:], **kwargs)
            self._wraps = isinstance(output, tuple)
            raise _Reached(output[0] if self._wraps else output)

        return forward

    def _returns_given(self, *args: Any, **kwargs: Any) -> Any:
        return (self._given,) if self._wraps else self._given

    def _renew(self) -> None:
        for name, module in self._fresh.items():
            self.model.set_submodule(name, copy.deepcopy(module))

    # -- what is in memory ------------------------------------------------------------------------------------

    def _own(self, module: nn.Module) -> set[str]:
        """Stored names of a module's parameters."""
        own = {id(inner) for inner in module.modules()}
        return {name for name, places in self._places.items() if any(id(owner) in own for owner, _ in places)}

    @contextmanager
    def _loaded(self, names: Collection[str]) -> Iterator[None]:
        try:
            fill_places({name: self._places[name] for name in names}, self._weights, self._device, self._where)
            yield
        finally:
            for name in names:
                _set(self._places[name], self._empty[name])


def check_batches(model: Any, batches: Sequence[Tensor]) -> None:
    """Raises TrialFailed for token ids (B, T) that the model has no row for, or more of them than it has positions,
    where those are a table. Either would be an IndexError without a hint, and on a GPU the end of the process.
    """
    embeddings = model.get_input_embeddings()
    rows, largest = embeddings.weight.shape[0], max((int(batch.max()) for batch in batches), default=0)
    if largest >= rows:
        raise TrialFailed(
            f"the tokenizer gives token {largest}, and the model's vocabulary ends at {rows - 1}: not its own tokenizer"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    learned = any(isinstance(module, nn.Embedding) for module in model.modules() if module is not embeddings)
    longest = max((batch.shape[1] for batch in batches), default=0)
    if learned and positions is not None and longest > positions:
        raise TrialFailed(
            f"a text of {longest} tokens, and the model has {positions} positions: give a shorter context"
        )


def open_stored(
    weights: StoredWeights, folder: Path, dtype: str, device: torch.device, *, trust_remote_code: bool = False
) -> Any:
    """The whole model on `device`, in eval mode, without gradients; each tensor is read straight into its place, so
    that the model is in memory once.

    folder: with the model's config. Raises TrialFailed naming tensors that are missing or left over.
    """
    model = open_skeleton(folder, dtype, trust_remote_code=trust_remote_code)
    fill_places(places_of(model, weights.names, str(folder)), weights, device, folder)
    return model.to(device)


def open_skeleton(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder's config in eval mode, its parameters without values (device "meta"), its buffers real."""
    from transformers import AutoModelForCausalLM

    def forget(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        # one that is tied comes here twice and must stay one
        return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)

    config = load_config(folder, trust_remote_code=trust_remote_code)
    handle = register_module_parameter_registration_hook(forget)
    try:
        with guarded_randomness(0), warnings.catch_warnings():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype(dtype), trust_remote_code=trust_remote_code
            )
    finally:
        handle.remove()
    return model.eval().requires_grad_(False)


Places = list[tuple[nn.Module, str]]  # modules and attributes that hold one parameter: more than one where it is tied


def places_of(model: nn.Module, stored: Collection[str], where: str) -> dict[str, Places]:
    """Where the parameters are, by stored name. Raises TrialFailed naming tensors that are missing or left over."""
    groups: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            groups.setdefault(id(parameter), []).append((name, module, attribute))
    found: dict[str, Places] = {}
    wrong: list[str] = []
    for group in groups.values():
        names = [name for name, _, _ in group if name in stored]
        if names:
            found[names[0]] = [(module, attribute) for _, module, attribute in group]
        else:
            wrong.append(f"missing {group[0][0]}")
    known = {name for group in groups.values() for name, _, _ in group}
    wrong += [f"left over {name}" for name in sorted(set(stored) - known)]
    # buffers that are stored would have to be read too; no architecture of the table has any
    wrong += [f"unread buffer {name}" for name in sorted(model.state_dict().keys() - known)]
    if wrong:
        raise TrialFailed(
            f"{where}: stored tensors do not make the model: {', '.join(wrong[:3])} ({len(wrong)} in all)"
        )
    return found


def fill_places(places: Mapping[str, Places], weights: StoredWeights, device: torch.device, where: Path) -> None:
    """Read stored tensors into their places, as `places_of` gives them.

    Always copies: a view would keep the file's pages, and lie where matrix products may round otherwise.
    """
    for name, tensor in weights.read(sorted(places)):
        empty = getattr(*places[name][0])
        if tensor.shape != empty.shape:
            found, expected = tuple(tensor.shape), tuple(empty.shape)
            raise TrialFailed(f"{where}: {name} is stored as {found}, the model's config says {expected}")
        filled = torch.empty(empty.shape, dtype=empty.dtype, device=device).copy_(tensor)
        _set(places[name], nn.Parameter(filled, requires_grad=False))
        del tensor  # before the next one is read


def _set(places: Places, parameter: nn.Parameter) -> None:
    for module, attribute in places:
        module._parameters[attribute] = parameter


@contextmanager
def _forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, Tensor)
    return states


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(_states(args, kwargs))
