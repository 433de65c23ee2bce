"""What a suite may say about a corpus."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evenbits.compressor import Options


class TextOptions(Options):
    path: str | list[str] = Field(
        description="file, or files in order; .gz is unpacked; json, jsonl and parquet are rows"
    )
    split: str = Field(
        default="none",
        min_length=1,
        description='how a file becomes documents: "none", "lines", "blank-lines", or a separator such as '
        '"<|endoftext|>"; documents split at blank lines or a separator are stripped, empty ones dropped. '
        "Files of rows are split by row whatever this says",
    )
    join: str | None = Field(
        default=None,
        description='put between joined documents; by default "\\n" for lines, else "\\n\\n"',
    )
    field: str = Field(default="text", min_length=1, description="the field of a row that holds the text")
    straight_quotes: bool = Field(
        default=False, description="make curly quotes and apostrophes straight, for vocabularies that lack them"
    )
    sampling: Literal["even", "crop", "document", "blocks", "prompt"] = Field(
        default="even", description="how calibration samples are drawn from this text"
    )


class HubOptions(Options):
    """Shared by all data sets of the Hugging Face hub."""

    path: str | None = Field(
        default=None,
        description="local file or folder that stands in for the hub (json, jsonl, parquet, txt); in a folder, the "
        "split is found by file name",
    )
    revision: str | None = Field(default=None, min_length=1, description="commit of the data set; pinned where known")
    documents: int | None = Field(default=None, ge=1, description="only the first so many documents")
    join: str | None = Field(default=None, description="put between documents when they are joined")


class SplitOptions(HubOptions):
    split: Literal["train", "validation"] = Field(
        default="train", description="train for calibration, validation for perplexity"
    )


class WikitextOptions(HubOptions):
    split: Literal["train", "validation", "test"] = Field(
        default="test", description="test for perplexity, train for calibration"
    )
    form: Literal["rows", "pages", "lm-eval"] = Field(
        default="rows",
        description="what a document is. rows: a row, as the papers join them. pages: an article. lm-eval: an article "
        "detokenized as lm-eval's wikitext task scores it",
    )
