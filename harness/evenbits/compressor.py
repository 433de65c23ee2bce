"""What a compressor or a recovery stage declares, and what flows through one. Imports no torch.

A plugin returns light descriptors (`Compressor`, `Recovery`); whatever is heavy is imported inside `make`.
Three forms, the smallest that fits: `LayerCompressor`, `BlockCompressor`, `ModelCompressor`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from evenbits.budget import BitBudget


class Role(StrEnum):
    """What a stored tensor is for; the ledger bills bytes by role."""

    CODE = "code"
    SCALE = "scale"
    ZERO = "zero"
    CODEBOOK = "codebook"
    DECODER = "decoder"
    MASK = "mask"
    SIGN = "sign"
    KEPT = "kept"
    ADAPTER = "adapter"
    DENSE = "dense"
    META = "meta"  # small facts in a file's header; billed like all else


class Options(BaseModel):
    """Base of every options model: frozen, unknown keys refused, each field documented by `Field(description=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def shown(self) -> tuple[str, ...]:
        """Names of the options that a table shows: all, unless a method has too many to read."""
        return tuple(type(self).model_fields)


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something cannot be had: a budget nothing fits, a fused path that does not exist."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One linear layer of a block: y = x W^T (+ bias), W of shape (out_features, in_features)."""

    name: str  # module path, e.g. "model.layers.0.self_attn.q_proj"
    block: int  # which decoder block, from 0
    kind: str  # path inside the block, e.g. "self_attn.q_proj"
    out_features: int
    in_features: int
    dtype: str = "float16"  # as stored in the checkpoint: float16, bfloat16, float32
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    def is_called(self, target: str) -> bool:
        """Whether `target` is its kind, the kind's last part, or its whole name."""
        return target in (self.kind, self.name) or self.kind.endswith(f".{target}")


@dataclass(frozen=True)
class ModelShapes:
    """The linear layers of a model's blocks, and the size of all the rest; known from file headers alone."""

    layers: tuple[LayerShape, ...]
    parameters: int  # of the whole model, tied tensors once
    rest_bytes: int  # of every tensor outside `layers` (biases included), at the dtype it is evaluated in
    stored_bytes: int = 0  # of the whole dense model as its checkpoint stores it
    head_dim: int | None = None  # width of an attention head, where it is known
    dtype: str = ""  # what the model is evaluated in, "" for the stored one: what a layer left dense is billed at
    partial: bool = False  # whether layers that a recovery stage makes dense again are left out

    @property
    def weights(self) -> int:
        """Number of weights in the linear layers of the blocks."""
        return sum(layer.weights for layer in self.layers)

    def of_kind(self, kind: str) -> tuple[LayerShape, ...]:
        return tuple(layer for layer in self.layers if layer.kind == kind)


@dataclass(frozen=True)
class Estimate:
    """What options will cost on given shapes, before anything runs.

    index_bits, paper_bits: bits per linear weight; paper_bits follows the method's own paper formula.
    role_bytes: exact payload on disk for all linear layers, shared parts once.
    """

    index_bits: float
    paper_bits: float
    role_bytes: Mapping[Role, int]

    @property
    def linear_bytes(self) -> int:
        return sum(self.role_bytes.values())

    def linear_bits(self, shapes: ModelShapes) -> float:
        return 8 * self.linear_bytes / shapes.weights

    def model_bits(self, shapes: ModelShapes) -> float:
        """All payload bytes over all parameters; file headers are only known once written."""
        return 8 * (self.linear_bytes + shapes.rest_bytes) / shapes.parameters


@dataclass(frozen=True, slots=True)
class Needs:
    """What the harness must supply.

    statistics    none | tokens: the calibration tokens, for a program that runs the model on its own |
                  second_moment: (in, in) mean of x x^T of each layer's input | inputs: the rows x themselves |
                  fisher: (out, in) mean squared gradient of the loss, always the dense model's; the last two come with
                  the second moment
    sequential    statistics come through the blocks already compressed; else those of the dense model, cached
    within_block  with `sequential`: refresh statistics inside a block too, group by group (qkv, o, gate/up, down);
                  a block compressor is then told no statistics beforehand, and asks `Block.refresh` for them
    gradients     the driver must keep autograd on
    device        any | cuda
    environment   name of an isolated environment, or None for this one
    """

    statistics: Literal["none", "tokens", "second_moment", "inputs", "fisher"] = "none"
    sequential: bool = False
    within_block: bool = False
    gradients: bool = False
    device: Literal["any", "cuda"] = "any"
    environment: str | None = None


def meta_bytes(meta: Mapping[str, Any]) -> int:
    """Bytes of a layer's meta as JSON, 0 where there is none."""
    return len(json.dumps(meta, sort_keys=True).encode()) if meta else 0


@dataclass
class PackedLayer:
    """What is stored for one layer, or for what layers share: tensors with the role each is billed under.

    meta: small JSON facts that `restore` needs; kept in the file's header, and billed as they are written there.
    """

    tensors: dict[str, Tensor]
    roles: dict[str, Role]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tensors.keys() != self.roles.keys():
            odd = sorted(self.tensors.keys() ^ self.roles.keys())
            raise ValueError(f"every tensor needs exactly one role; wrong for: {', '.join(odd)}")

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + meta_bytes(self.meta)


Shared = PackedLayer


@dataclass(frozen=True)
class Layer:
    """What a compressor is told about the layer at hand."""

    shape: LayerShape
    second_moment: Tensor | None = None  # (in, in) float32, mean of x x^T over calibration tokens
    inputs: Tensor | None = None  # (tokens, in)
    budget: BitBudget | None = None  # for methods whose bits depend on the data
    # (out, in) float32, mean over calibration samples of the squared gradient of the dense model's mean next-token loss
    fisher: Tensor | None = None

    @property
    def name(self) -> str:
        return self.shape.name


class Survey(Protocol):
    """All weights of the model, one at a time; may be walked again and again."""

    shapes: ModelShapes

    def __iter__(self) -> Iterator[tuple[LayerShape, Tensor]]: ...

    def second_moment(self, name: str) -> Tensor:
        """(in, in) float32 of the dense model's inputs to layer `name`; TrialFailed without calibration."""
        ...

    def fisher(self, name: str) -> Tensor:
        """(out, in) float32 mean squared gradient of the dense model's loss; TrialFailed without calibration."""
        ...


class LayerCompressor:
    """One matrix at a time. Subclass and write `compress` and `restore`; the rest has defaults."""

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        """What many layers share, stored and billed once."""
        return None

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """weight: (out, in) float32. The result's tensors are what is written to disk, as they are."""
        raise NotImplementedError

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        """(out, in) float32: the reference decode, a pure function; differentiable in `tunable(packed)`."""
        raise NotImplementedError

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        """Which of the packed tensors a recovery stage may train."""
        return {}

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """A module that computes from the packed form, or why there is none."""
        return Refusal("no fused path: the layer runs on its restored dense weight")

    def approximate_linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """As `linear`, or a faster module that computes with something near what is stored and says how near."""
        return self.linear(packed, layer, shared, device)


@dataclass
class Block:
    """A decoder block at hand: the module, its layers, and how to run it on hidden states.

    run      hidden (rows, length, width) of any number of rows -> hidden
    weight   a layer's name -> its (out, in) weight in the module as it is now, float32
    install  puts a weight (out, in) into the module, in the module's dtype
    refresh  layers' names -> the same layers with statistics through the block as it is now
    groups   layers' names in the order in which their inputs become known: q k v, o, gate and up, down
    """

    index: int
    module: nn.Module
    layers: Sequence[Layer]
    run: Callable[[Tensor], Tensor]
    weight: Callable[[str], Tensor]
    install: Callable[[str, Tensor], None]
    refresh: Callable[[Sequence[str]], list[Layer]]
    groups: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Fold:
    """What is stored stands for diag(rows) W diag(columns): W and the layers around it were rescaled so that the block
    computes the same. rows: (out,), columns: (in,), or None for ones."""

    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class BlockResult:
    """Packed layers by name; other tensors of the block (norms, biases) that changed, by full name; and the layers
    whose weights were rescaled, so that errors are those of the weights they stand for."""

    layers: dict[str, PackedLayer]
    changed: dict[str, Tensor] = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)


class BlockCompressor(LayerCompressor):
    """Needs a block's output, or changes its other tensors."""

    def compress_block(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        shared: Shared | None,
        generator: torch.Generator,
    ) -> BlockResult:
        """inputs: hidden states through the compressed blocks; targets: the dense block's outputs on these inputs."""
        raise NotImplementedError


class TensorWriter(Protocol):
    """Where a model compressor puts what it stores."""

    def write(self, name: str, tensor: Tensor, role: Role | None, *, weights: int = 0) -> None:
        """role: what it is billed under; None for what is no part of the linear layers (embeddings, norms).
        weights: how many linear weights of the dense model it stands for; over all tensors they must be all."""
        ...

    def meta(self, facts: Mapping[str, Any]) -> None: ...


class TensorReader(Protocol):
    @property
    def config(self) -> Any:
        """The transformers config of the model."""
        ...

    def tensors(self) -> Mapping[str, Tensor]: ...

    def meta(self) -> Mapping[str, Any]: ...


class ModelCompressor(Protocol):
    """Changes shapes, or calls another library on the whole model."""

    def compress(
        self, model: nn.Module, calibration: Tensor | None, writer: TensorWriter, generator: torch.Generator
    ) -> None: ...

    def restore(self, reader: TensorReader) -> nn.Module: ...


AnyCompressor = LayerCompressor | BlockCompressor | ModelCompressor


@dataclass(frozen=True)
class Compressor:
    """A compression method as its plugin declares it.

    needs     constant, or a function of the options
    predict   (options, shapes) -> Estimate, exact to the byte wherever bits do not depend on the data
    fit       (budget, shapes, fixed) -> options | Refusal; `fixed` are the options the suite pinned
    make      options -> the compressor object; heavy imports happen here
    stochastic whether the result depends on the seed (beyond the calibration draw)
    fetches   options -> what it will download when it compresses: (what, bytes, or None where nobody knows)
    shapes_after for a model compressor that stores smaller weights as they are: (options, shapes) -> the linear layers
              that a recovery stage meets; adapters are billed on these, and merged into them without a byte more
    """

    name: str
    summary: str
    paper: str
    options: type[Options]
    make: Callable[[Any], AnyCompressor]
    predict: Callable[[Any, ModelShapes], Estimate]
    fit: Callable[[BitBudget, ModelShapes, Mapping[str, Any]], Options | Refusal]
    needs: Needs | Callable[[Any], Needs] = Needs()
    stochastic: bool = False
    shapes_after: Callable[[Any, ModelShapes], ModelShapes] | None = None
    fetches: Callable[[Any], Sequence[tuple[str, int | None]]] = lambda options: ()

    def needs_of(self, options: Options) -> Needs:
        return self.needs if isinstance(self.needs, Needs) else self.needs(options)


class TunableModel(Protocol):
    """A stored model opened for a recovery stage: gradients flow through `restore` into `parameters`."""

    model: nn.Module
    tokenizer: Any
    parameters: dict[str, nn.Parameter]  # "layer/tensor" or "shared/tensor" -> parameter
    adapters: dict[str, tuple[nn.Parameter, nn.Parameter]]  # A, B by layer, from stages before and from this one
    calibration: Tensor  # (samples, length) token ids

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The linear layers of the blocks; each is a module of that path in `model` that restores its weight."""
        ...

    def restore(self, layer: str) -> Tensor:
        """(out, in) float32: the weight as it stands now, its adapter added."""
        ...

    def dense(self) -> nn.Module:
        """The uncompressed model, opened on demand."""
        ...

    def rest(self) -> Mapping[str, nn.Parameter]:
        """Tensors outside the linear layers (norms, biases, embeddings), by name."""
        ...

    def add_adapter(self, layer: str, tensors: Mapping[str, Tensor], dtype: str | None = None) -> None:
        """Low-rank update B A of one layer ("A": (r, in), "B": (out, r)); billed as adapter, and stored in `dtype`
        (float16, bfloat16, float32; None: the evaluated one)."""
        ...

    def merge_adapters(self, layers: Iterable[str]) -> None:
        """Add the adapters of these layers to their weights, which are stored and billed dense from then on."""
        ...


class RecoveryStage(Protocol):
    def recover(self, work: TunableModel, generator: torch.Generator) -> None:
        """Train in place; what was changed is written back in the dtypes it was stored in."""
        ...


@dataclass(frozen=True)
class Recovery:
    """A stage after any compressor.

    predict   (options, shapes) -> the bytes it adds by role, so that `fit` can leave room
    dense     (options, shapes) -> names of the layers that it stores dense: `predict` then counts all their bytes
    libraries distributions whose version may change what it does, beside those that every trial depends on
    """

    name: str
    summary: str
    paper: str
    options: type[Options]
    make: Callable[[Any], RecoveryStage]
    predict: Callable[[Any, ModelShapes], Mapping[Role, int]]
    needs: Needs = Needs()
    dense: Callable[[Any, ModelShapes], Collection[str]] = lambda options, shapes: ()
    libraries: tuple[str, ...] = ()


def average_bits(bits: Iterable[tuple[float, int]]) -> float:
    """Mean of bits per weight over (bits, weights) pairs, weighted by weights."""
    pairs = list(bits)
    return sum(b * n for b, n in pairs) / sum(n for _, n in pairs)
