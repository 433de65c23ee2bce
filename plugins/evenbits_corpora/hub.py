"""Data sets of the Hugging Face hub at pinned revisions, or local files that stand in for them.

What stands in is read with the data set's own layout, so that a copy of its files gives the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from evenbits.errors import MissingExtra, SuiteError
from evenbits.measure import Text
from evenbits_corpora import texts
from evenbits_corpora.options import HubOptions, SplitOptions, WikitextOptions
from evenbits_corpora.wikipages import articles, detokenize

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One data set: where it lies, how a row becomes a document, how documents are joined and sampled.

    revision: None where no commit is known for certain; the suite must then give one.
    files: by split; read as they lie, which also works for repositories that only have a loading script.
    text_split: how a local plain text file becomes rows of {"text": ...}.
    """

    name: str
    summary: str
    repository: str
    revision: str | None
    join: str
    sampling: Literal["even", "crop", "document", "blocks", "prompt"]
    files: Mapping[str, str | tuple[str, ...]]
    format: Literal["json", "parquet"] = "json"
    options: type[HubOptions] = HubOptions
    document: Callable[[Row], str] = lambda row: texts.row_text(row, "text", "data set")
    text_split: Literal["lines", "blank-lines"] = "blank-lines"


def alpaca_document(row: Row) -> str:
    """Header, then the row's parts under their own heads; `input` only where there is one.

    Unlike Stanford's template, no introductory sentence stands in front: only the field layout is kept.
    """
    parts = [("Instruction", "instruction"), ("Input", "input"), ("Response", "output")]
    texts.row_text(row, "instruction", "alpaca")
    return "\n\n".join(f"### {head}:\n{row[key]}" for head, key in parts if row.get(key) or key == "output")


_REDPAJAMA_PARTS = (
    "arxiv", "book", "c4", "cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06", "github",
    "stackexchange", "wikipedia",
)  # fmt: skip

SOURCES: tuple[Source, ...] = (
    Source(
        name="wikitext2",
        summary="WikiText-2 raw: rows joined by a blank line, as in GPTQ's perplexity",
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        join="\n\n",
        sampling="crop",
        files={part: f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet" for part in ("train", "validation", "test")},
        format="parquet",
        options=WikitextOptions,
        text_split="lines",
    ),
    Source(
        name="c4",
        summary="C4: the one file of each split that the papers draw from",
        repository="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        join=" ",
        sampling="document",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        options=SplitOptions,
    ),
    Source(
        name="pile-val",
        summary="The Pile's validation split, AWQ's calibration data",
        repository="mit-han-lab/pile-val-backup",
        revision="2f5e46ae6a69cf0dce4b12f78241c408936ca0e4",
        join="\n\n",
        sampling="blocks",
        files={"all": "val.jsonl.zst"},
    ),
    Source(
        name="redpajama",
        summary="RedPajama's 1T sample, the calibration data of AQLM, QuIP# and QTIP",
        repository="togethercomputer/RedPajama-Data-1T-Sample",
        revision=None,
        join="\n\n",
        sampling="document",
        files={"all": tuple(f"{part}_sample.jsonl" for part in _REDPAJAMA_PARTS)},
    ),
    Source(
        name="alpaca",
        summary="Alpaca's instructions as prompts, LLM-Pruner's and PocketLLM's tuning data",
        repository="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        join="\n\n",
        sampling="prompt",
        files={"all": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"},
        format="parquet",
        document=alpaca_document,
    ),
    Source(
        name="bookcorpus",
        summary="BookCorpus sentences, LLM-Pruner's importance data",
        repository="bookcorpus/bookcorpus",
        revision=None,
        join="\n",
        sampling="prompt",
        files={"all": "**/*.parquet"},
        format="parquet",
        text_split="lines",
    ),
)


def read_hub(source: Source) -> Callable[[Any], Text]:
    """The reader of one data set: options -> Text.

    Raises SuiteError when the data set cannot be had (offline, unknown revision, missing file), MissingExtra
    without the `datasets` package, TrialFailed when there is no text.
    """

    def read(options: HubOptions) -> Text:
        split = getattr(options, "split", "all")
        join = source.join if options.join is None else options.join
        identity: dict[str, Any] = {"name": source.name, "split": split, "join": join}
        rows: Iterable[Row]
        if options.path is not None:
            files = _local_files(options.path, source.name, split)
            rows = _local_rows(files, source)
            identity |= {"files": [file.name for file in files], "sha256": [texts.hash_file(file) for file in files]}
        else:
            revision = options.revision or source.revision
            if revision is None:
                raise SuiteError(
                    f"corpus {source.name!r}: no revision of {source.repository} is pinned; "
                    "give revision = a commit, or path = a local copy"
                )
            rows = _hub_rows(source, split, revision)
            identity |= {"repository": source.repository, "revision": revision}
        found: Iterable[str] = (source.document(row) for row in rows)
        if isinstance(options, WikitextOptions) and options.form != "rows":
            found = articles(found)
            found = map(detokenize, found) if options.form == "lm-eval" else found
            identity["form"] = options.form
        documents = list(islice(found, options.documents))
        if options.documents is not None:
            identity["documents"] = options.documents
        texts.refuse_empty(documents, source.name, options.path or source.repository)
        return Text(documents, join, identity, source.sampling)

    return read


def hub_files(source: Source) -> Callable[[Any], list[Path]]:
    """The local files that stand in for the hub; none where the pinned revision says all."""

    def files(options: HubOptions) -> list[Path]:
        if options.path is None:
            return []
        return _local_files(options.path, source.name, getattr(options, "split", "all"))

    return files


def _local_files(name: str, corpus: str, split: str) -> list[Path]:
    path = texts.locate(name, corpus)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and texts.is_text(file))
    if split != "all":  # a folder may hold all splits, and calibrating on the test split must not happen by accident
        mark = "valid" if split == "validation" else split
        files = [file for file in files if mark in str(file.relative_to(path)).lower()]
    if not files:
        wanted = "" if split == "all" else f" of split {split!r}"
        raise SuiteError(f"corpus {corpus!r}: no json, jsonl, parquet or txt file{wanted} in {name}")
    return files


def _local_rows(files: Sequence[Path], source: Source) -> Iterable[Row]:
    for file in files:
        if texts.is_rows(file):
            yield from texts.read_rows(file)
        elif source.text_split == "blank-lines":
            yield from ({"text": part} for part in texts.split_documents(texts.read_file(file), "blank-lines"))
        else:
            # the data sets of lines keep each line's end, and have "" for a line of blanks
            lines = texts.split_documents(texts.read_file(file), "lines")
            yield from ({"text": f"{line}\n" if line.strip() else ""} for line in lines)


def _hub_rows(source: Source, split: str, revision: str) -> Iterable[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hub") from error
    names = source.files[split]
    root = f"hf://datasets/{source.repository}@{revision}"
    urls = [f"{root}/{name}" for name in ((names,) if isinstance(names, str) else names)]
    try:
        return datasets.load_dataset(source.format, data_files={"rows": urls}, split="rows")  # type: ignore[no-any-return]
    except Exception as error:  # the hub's client raises its own, requests' and the system's, by version and cause
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise SuiteError(
            f"corpus {source.name!r}: cannot read {source.repository} at {revision}: {type(error).__name__}: {why} "
            "(offline? give path = a local copy)"
        ) from error
