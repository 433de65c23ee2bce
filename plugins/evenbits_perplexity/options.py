"""What a suite may say about a perplexity: what changes the number is in its fingerprint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evenbits.compressor import Options
from evenbits.measure import Weights
from evenbits_perplexity.protocols import expand

PerUnit = Literal["word_perplexity", "byte_perplexity", "bits_per_byte"]


class PerplexityOptions(Options):
    protocol: Literal["wikitext2", "c4", "c4-new", "wikitext2-lm-eval"] | None = Field(
        default=None,
        description="a published protocol by name; sets corpus, windows, bos and the counts. wikitext2: the test rows "
        "joined by blank lines. c4: 256 random crops of validation documents. c4-new: the first 256 windows of the "
        "first 1100 validation documents. wikitext2-lm-eval: lm-eval's wikitext task",
    )
    path: str | None = Field(default=None, description="local copy of the protocol's data set")
    corpus: dict[str, Any] = Field(description='the text: {name = "...", and that corpus\'s options}')
    context: int | None = Field(
        default=None, ge=2, description="tokens per window; by default the model's max_position_embeddings"
    )
    windows: Literal["joined", "documents", "documents-first", "sampled", "rolling"] = Field(
        default="joined",
        description="joined: the whole text tokenised once, windows without overlap, tail dropped (the papers' rule). "
        "documents: each document by itself, all of it, neighbouring windows share one token. "
        "documents-first: only the first window of each document. "
        "sampled: random windows by the corpus's sampling rule, seed 0 (the papers' C4). "
        "rolling: as lm-eval: each document by itself behind a BOS (EOS where there is none), which is the first "
        "token's context; every token predicted once, the last window filled up with context from before",
    )
    bos: Literal["start", "window", "none"] = Field(
        default="start",
        description="start: where the tokenizer puts it by itself, once in front of the text (or of each document). "
        "window: in front of every window, which then holds one token less of the text. none: nowhere "
        "(under rolling, start and none are about the BOS that is itself predicted, behind the one in front)",
    )
    samples: int = Field(default=256, ge=1, description="number of windows under windows = sampled")
    max_windows: int | None = Field(default=None, ge=1, description="only the first so many windows")
    batch_size: int = Field(default=8, ge=1, description="windows per forward pass")
    per: tuple[PerUnit, ...] = Field(
        default=(),
        description="further measurements of the same losses, by word or byte of the text that was predicted; "
        "without this they stand in the details",
    )
    words: Literal["runs", "pieces"] = Field(
        default="runs",
        description="what a word is. runs: of characters that are not whitespace. pieces: what splitting each document "
        "at whitespace gives, empty pieces at its ends too (lm-eval's wikitext)",
    )
    units_of: dict[str, Any] | None = Field(
        default=None,
        description="corpus whose words and bytes are counted instead, document by document: for a text that was "
        "changed before it was scored",
    )
    memory: Literal["model", "block"] = Field(
        default="model",
        description="what is held in memory: the whole model, or one block at a time, read from what is stored. "
        "The figure is the same",
    )
    weights: Weights = Field(
        default="restored",
        description="restored: every layer on its restored dense weight. packed: each layer by its method's packed "
        "path where there is one, to see that a kernel gives the model's quality. approximate: by what the method "
        "offers as faster and near that, to see what it costs",
    )
    allow_other_counts: bool = Field(
        default=False,
        description="measure even where the text is not what its name says, or gives another number of tokens than "
        "the tokenizer is known to",
    )

    @model_validator(mode="before")
    @classmethod
    def _expands(cls, data: Any) -> Any:
        return expand(data) if isinstance(data, dict) else data

    @field_validator("corpus", "units_of")
    @classmethod
    def _names_a_corpus(cls, corpus: dict[str, Any] | None) -> dict[str, Any] | None:
        if corpus is not None and not isinstance(corpus.get("name"), str):
            raise ValueError('corpus needs a name, e.g. {name = "wikitext2"}')
        return corpus

    @model_validator(mode="after")
    def _rules_agree(self) -> PerplexityOptions:
        if self.windows == "sampled" and self.bos != "start":
            raise ValueError("windows = sampled draws as the papers do: bos can only be start")
        if self.windows == "rolling" and self.bos == "window":
            raise ValueError("windows = rolling has its own token in front: bos can only be start or none")
        if self.memory == "block" and self.context is None:
            raise ValueError("memory = block never opens the whole model: give context")
        if self.memory == "block" and self.weights != "restored":
            raise ValueError("memory = block restores the weights of a block at a time: weights can only be restored")
        whole = self.windows == "rolling" and self.max_windows is None  # every token of every document is predicted
        if not whole and (self.units_of is not None or self.words == "pieces"):
            raise ValueError(
                "units_of and words = pieces count whole documents: windows can only be rolling, without max_windows"
            )
        return self
