"""What a suite may say about sample continuations."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from evenbits.compressor import Options


class SamplesOptions(Options):
    """Prompts are given as they are, or are the beginnings of a corpus's documents."""

    prompts: tuple[str, ...] = Field(default=(), description="texts to be continued")
    corpus: dict[str, Any] | None = Field(
        default=None, description='instead of prompts: {name = "...", and that corpus\'s options}'
    )
    count: int = Field(default=4, ge=1, description="of a corpus: how many documents, the first that are long enough")
    prompt_tokens: int = Field(
        default=32, ge=1, description="of a corpus: tokens of a document that are the prompt, BOS counted"
    )
    new_tokens: int = Field(default=64, ge=1, description="tokens to write at most; end of text or of context ends it")

    @model_validator(mode="after")
    def _one_source(self) -> SamplesOptions:
        if bool(self.prompts) == (self.corpus is not None):
            raise ValueError('give either prompts = ["..."] or corpus = {name = "..."}')
        if self.corpus is not None and not isinstance(self.corpus.get("name"), str):
            raise ValueError('corpus needs a name, e.g. {name = "wikitext2"}')
        empty = [number for number, prompt in enumerate(self.prompts, 1) if not prompt.strip()]
        if empty:
            raise ValueError(f"prompt {empty[0]} is empty; give at least one word")
        twice = [prompt for prompt in self.prompts if self.prompts.count(prompt) > 1]
        if twice:
            raise ValueError(f"prompt {twice[0]!r} is given twice")
        return self
