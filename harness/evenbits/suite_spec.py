"""What a suite may say, as frozen models: what to compare, on what, measured how. Reads nothing, decides nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evenbits.budget import BitBudget, default_window
from evenbits.compressor import ModelShapes
from evenbits.shapes import WIDTHS, llama_shapes

SUITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # it names a folder


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelOutline(_Frozen):
    """A Llama-like model by the numbers of its config: its shapes are known before a file of it is there.

    dtype: of its files. head_dim: by default hidden_size / num_attention_heads. qk_norm: whether each block has a norm
    of head_dim weights for queries and one for keys (Qwen3).
    """

    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    tie_word_embeddings: bool = False
    dtype: Literal["float32", "float16", "bfloat16"]
    head_dim: int | None = Field(default=None, ge=1)
    qk_norm: bool = False

    @model_validator(mode="after")
    def _whole_heads(self) -> ModelOutline:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}; "
                "give head_dim"
            )
        return self

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def shapes(self, dtype: str | None = None) -> ModelShapes:
        """As `Inventory.shapes` reads them off the files. `dtype`: what the model is evaluated in; None: the stored."""
        linear = llama_shapes(
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_key_value_heads * self.head,
            self.vocab_size,
            tied=self.tie_word_embeddings,
            dtype=self.dtype,
            attention=self.num_attention_heads * self.head,
            head_dim=self.head,
        )
        norms = 2 * self.head * self.num_hidden_layers if self.qk_norm else 0
        parameters = linear.parameters + norms
        return replace(
            linear,
            parameters=parameters,
            rest_bytes=(parameters - linear.weights) * WIDTHS[dtype or self.dtype],
            stored_bytes=parameters * WIDTHS[self.dtype],
            dtype=dtype or "",
        )


class ModelSpec(_Frozen):
    """A model: a name that a plugin provides, a local folder, or a hub id at a pinned revision."""

    name: str | None = None
    path: str | None = None
    id: str | None = None
    revision: str | None = Field(default=None, description="commit hash of 40 hex digits, required with `id`")
    trust_remote_code: bool = False
    outline: ModelOutline | None = Field(
        default=None,
        description="its sizes, to plan with before its files are there, and checked against them",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if self.path is None and self.id is None and self.name is None:
            raise ValueError("a model needs a name, a path, or an id with a revision")
        if self.path is not None and self.id is not None:
            raise ValueError("a model is a path or an id, not both")
        if self.id is not None and self.revision is None:
            raise ValueError("a hub model needs its revision (a commit hash), or the run cannot be repeated")
        if self.id is not None and not re.fullmatch(r"[0-9a-f]{40}", str(self.revision)):
            raise ValueError(f"revision {self.revision!r} is no commit hash of 40 hex digits; branches and tags move")
        return self

    @property
    def shown(self) -> str:
        """The name that tables show."""
        return self.name or self.id or Path(str(self.path)).resolve().name


class BudgetSpec(_Frozen):
    centre: float = Field(gt=0, le=32)
    window: float | None = Field(default=None, ge=0)
    on: Literal["linear", "model"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"centre": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _window_below_centre(self) -> BudgetSpec:
        self.budget()  # raises ValueError
        return self

    def budget(self) -> BitBudget:
        window = default_window(self.centre) if self.window is None else self.window
        return BitBudget(self.centre, window, self.on)


class StageSpec(_Frozen):
    """Something a plugin provides, with its options: an evaluator, a profiler, a recovery stage.

    label: stands in front of an evaluator's or profiler's metric names, so that one may be used twice.
    """

    name: str
    options: dict[str, Any] = {}
    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class MethodSpec(_Frozen):
    """A method in the suite.

    budget: "fit" takes every budget of the suite, a number or a list of numbers those with these centres; "free" runs
    the method once with its options as they are, outside all budgets.
    sizes: options that make up its size on the suite's own model; on another (`--model`) they are left to its `fit`.
    """

    name: str
    label: str | None = None
    options: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    recovery: tuple[StageSpec, ...] = ()
    budget: Literal["fit", "free"] | tuple[float, ...] = "fit"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _centres(cls, value: Any) -> Any:
        centres = list(value) if isinstance(value, list | tuple) else [value]
        if value in ("fit", "free"):
            return value
        if not centres or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in centres):
            raise ValueError('expected "fit", "free", or the centre of one of the suite\'s budgets, or a list of these')
        if len(set(centres)) < len(centres):
            raise ValueError(f"the same centre twice in {centres}")
        return tuple(float(one) for one in centres)

    @model_validator(mode="after")
    def _sizes_are_apart(self) -> MethodSpec:
        if self.sizes and self.budget == "free":
            raise ValueError('`sizes` are left to `fit` on another model, and "free" fits nothing: give options')
        if twice := sorted(self.sizes.keys() & self.options.keys()):
            raise ValueError(f"{twice[0]} stands in options and in sizes; it is one or the other")
        return self

    @field_validator("label")
    @classmethod
    def _fits_a_table(cls, label: str | None) -> str | None:
        if label is not None and (label != label.strip() or not label or not label.isprintable()):
            raise ValueError("a label is one line of printable text, without blanks around it")
        if label == "dense":
            raise ValueError("this label is the uncompressed model's")
        return label

    @property
    def shown(self) -> str:
        """The name that tables show."""
        return self.label or self.name

    @property
    def given(self) -> dict[str, Any]:
        """All options that the suite fixes."""
        return {**self.options, **self.sizes}

    def budgets(self, suite: Sequence[BudgetSpec]) -> list[BitBudget | None]:
        """Those of the suite's budgets that it runs under, in their order; None stands for outside all of them."""
        if self.budget == "free":
            return [None]
        return [spec.budget() for spec in suite if self.budget == "fit" or spec.centre in self.budget]


class CalibrationSpec(_Frozen):
    corpus: dict[str, Any]
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=2048, ge=2, description="tokens in a sample")
    sampling: Literal["even", "crop", "document", "blocks", "prompt"] | None = Field(
        default=None, description="how samples are drawn; None: as the papers do for this corpus"
    )
    allowed_overlap: float = Field(
        default=0.05, ge=0, le=1, description="share of the test text's 13-word sequences that calibration may hold"
    )

    @field_validator("corpus", mode="before")
    @classmethod
    def _corpus_from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Limits(_Frozen):
    """For one stage of one trial; what making a library's environment takes is no part of it."""

    timeout_seconds: float | None = Field(default=None, gt=0)
    memory_gib: float | None = Field(default=None, gt=0, description="resident memory of the child process")
    workers: int = Field(default=1, ge=1, description="trials at a time; profilers always run alone")
    threads: int | None = Field(default=None, ge=1, description="torch threads of a child; None: cores / workers")


class ElsewhereSpec(_Frozen):
    """What gives way where `--model` runs the suite on another model than its own."""

    window: float | None = Field(default=None, gt=0, description="half-width of every budget, where it is wider")
    context: Literal["model"] | None = Field(
        default=None,
        description="model: contexts of evaluators and the length of calibration samples are cut to what the model has",
    )


class Suite(_Frozen):
    """What to compare, on what, measured how."""

    name: str = Field(pattern=SUITE_NAME)
    description: str = ""
    model: tuple[ModelSpec, ...] = Field(min_length=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = Field(default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**63)], ...] = Field(default=(0,), min_length=1)
    budgets: tuple[BudgetSpec, ...] = ()
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    evaluators: tuple[StageSpec, ...] = ()
    profilers: tuple[StageSpec, ...] = ()
    calibration: CalibrationSpec | None = None
    dense_recovery: tuple[tuple[StageSpec, ...], ...] = Field(
        default=(), description="recovery stages that are also applied to the dense model"
    )
    executor: str = "local"
    limits: Limits = Limits()
    plugins: dict[str, dict[str, Any]] = {}
    elsewhere: ElsewhereSpec | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"the same seed twice in {list(seeds)}")
        return seeds

    @model_validator(mode="after")
    def _fit_needs_budgets(self) -> Suite:
        if not self.budgets and any(method.budget == "fit" for method in self.methods):
            raise ValueError('no budgets: give some, or run a method with its own options by `budget = "free"`')
        return self
