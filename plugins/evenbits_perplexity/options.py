"""What a suite may say about a perplexity: each of these changes the number, so each is in its fingerprint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evenbits.compressor import Options


class PerplexityOptions(Options):
    corpus: dict[str, Any] = Field(description='the text: {name = "...", and that corpus\'s options}')
    context: int | None = Field(
        default=None, ge=2, description="tokens per window; by default the model's max_position_embeddings"
    )
    windows: Literal["joined", "documents", "documents-first", "sampled"] = Field(
        default="joined",
        description="joined: the whole text tokenised once, windows without overlap, tail dropped (the papers' rule). "
        "documents: each document by itself, all of it, neighbouring windows share one token. "
        "documents-first: only the first window of each document. "
        "sampled: random windows by the corpus's sampling rule, seed 0 (the papers' C4)",
    )
    bos: Literal["start", "window", "none"] = Field(
        default="start",
        description="start: where the tokenizer puts it by itself, once in front of the text (or of each document). "
        "window: in front of every window, which then holds one token less of the text. none: nowhere",
    )
    samples: int = Field(default=256, ge=1, description="number of windows under windows = sampled")
    max_windows: int | None = Field(default=None, ge=1, description="only the first so many windows")
    batch_size: int = Field(default=8, ge=1, description="windows per forward pass")

    @field_validator("corpus")
    @classmethod
    def _names_a_corpus(cls, corpus: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(corpus.get("name"), str):
            raise ValueError('corpus needs a name, e.g. {name = "wikitext2"}')
        return corpus

    @model_validator(mode="after")
    def _rules_agree(self) -> PerplexityOptions:
        if self.windows == "sampled" and self.bos != "start":
            raise ValueError("windows = sampled draws as the papers do: bos can only be start")
        return self
