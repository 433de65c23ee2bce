"""What papers print: expected values beside a suite (NAME.published.toml beside NAME.toml), each with where it stands.

A file of expected values says of every number its source, the paper's version, the context and the era of lm-eval it
was measured in, how far methods were tuned, how far the number can be trusted, and how near a reproduction should come.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evenbits.errors import SuiteError
from evenbits.suite_spec import ModelOutline

ENDING = ".published.toml"

Trust = Literal["V", "V2", "S", "R", "X", "C"]
TRUST: Mapping[Trust, str] = {
    "V": "read in a primary source",
    "V2": "quoted in another paper or repository",
    "S": "a secondary note only",
    "R": "recalled, not confirmed",
    "X": "its source contradicts itself",
    "C": "own arithmetic",
}
NEVER_GATE: frozenset[Trust] = frozenset({"S", "R", "X"})


@dataclass(frozen=True)
class Tolerance:
    """How near a reproduction comes where nothing is wrong.

    perplexity: absolute. relative: of the published perplexity, where there is no absolute one. accuracy: in points of
    100. bits: absolute, of the printed average. times_dense: no value is expected at all, only a perplexity of more
    than so many times the dense model's. advisory: what lies outside is said, and never gates.
    """

    words: str
    perplexity: float | None = None
    relative: float | None = None
    accuracy: float = 0.5
    bits: float = 0.02
    times_dense: float | None = None
    advisory: bool = False


# up to "tuned" from what the papers say of their own noise (QuIP#, AQLM over calibration draws), the rest by own choice
TOLERANCES: Mapping[str, Tolerance] = {
    "dense": Tolerance("dense model: 0.01 in perplexity, half a point a task", perplexity=0.01),
    "rtn": Tolerance("deterministic: 0.01 in perplexity, half a point a task", perplexity=0.01),
    "scalar4": Tolerance("GPTQ or AWQ at 4 bits: 0.03 in perplexity", perplexity=0.03, accuracy=1.0),
    "scalar3": Tolerance("GPTQ or AWQ at 3 bits: 0.10 in perplexity", perplexity=0.10, accuracy=1.0),
    "scalar2": Tolerance("GPTQ or AWQ at 2 bits: no stable value", times_dense=3.0, advisory=True),
    "codebook": Tolerance("codebooks without tuning: 3 % in perplexity", relative=0.03, accuracy=1.0),
    "tuned": Tolerance("after tuning: 5 % in perplexity, advisory", relative=0.05, accuracy=1.5, advisory=True),
    "exact": Tolerance("arithmetic", perplexity=0.005, accuracy=0.005, bits=0.005),
    "distortion": Tolerance("scalars on Gaussian data: 1 % of the distortion, for the sample", relative=0.01),
    "vectors": Tolerance("k-means of Gaussian vectors: 3 %, for the sample and the start", relative=0.03),
    "trellis": Tolerance("trellis codes on Gaussian data: 6 %, for tied ends and learned codewords", relative=0.06),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(_Frozen):
    """Where numbers stand. A row's own origin goes before the file's."""

    source: str | None = Field(default=None, description="paper and table, or repository and commit")
    version: str | None = Field(default=None, description="of the paper, e.g. v4")
    context: int | None = Field(default=None, ge=2, description="tokens per window of its perplexities")
    era: Literal["A", "B", "C"] | None = Field(default=None, description="of lm-eval, for its accuracies")
    trust: Trust | None = None


class PublishedRow(Origin):
    """A row of the printed table.

    method: as printed. label: the suite's entry that reproduces it, with "+STAGE" for each recovery stage where it
    also stands without; "dense" for the model itself; None where no plugin does it. at: that entry's budget, where it
    stands at several. values: metric, as records name it -> as printed, accuracies in per cent; "METRIC vs dense" is
    the share of the dense model's number, in per cent. decimals: metric -> how many are printed, a last 0 counted;
    `read_published` reads them off the file.
    """

    method: str
    label: str | None = None
    at: float | None = None
    bits: float | None = Field(default=None, description="average bits as printed")
    stage: str = Field(description='how far it was tuned: "none", "block", "layer", "e2e", "block+e2e", "lora" ...')
    tolerance: str
    values: dict[str, float] = {}
    average_of: tuple[str, ...] = Field(
        default=(), description="metrics whose mean the value `average` is printed as; re-computed from the same row"
    )
    average: str | None = Field(default=None, description="the metric that is their mean")
    mixed: dict[str, str] = Field(
        default={}, description='metric, or "bits" -> what is mixed or wrong there; such a cell never gates'
    )
    note: str = ""
    decimals: dict[str, int] = Field(default={}, exclude=True)

    def decimals_of(self, metric: str) -> int:
        return self.decimals.get(metric, decimals_of(self.values[metric]))

    @model_validator(mode="after")
    def _known(self) -> PublishedRow:
        if self.tolerance not in TOLERANCES:
            raise ValueError(f"tolerance {self.tolerance!r}: known are {', '.join(TOLERANCES)}")
        printed = {*self.values, *(("bits",) if self.bits is not None else ())}
        named = [*self.mixed, *(name for name in (*self.average_of, self.average) if name is not None)]
        missing = [name for name in named if name not in printed]
        if missing:
            raise ValueError(f"{self.method}: no value of {missing[0]!r} in this row")
        if bool(self.average_of) != (self.average is not None):
            raise ValueError(f"{self.method}: average and average_of belong together")
        return self


class Ordering(Origin):
    """A claim of the paper in one metric: `first` stands ahead of every one of `behind`.

    Names are "LABEL" or "LABEL@BUDGET" of the suite's entries, or "dense". at_least: equal is enough.
    """

    claim: str
    metric: str
    first: str
    behind: tuple[str, ...] = Field(min_length=1)
    at_least: bool = False
    note: str = ""


class Formula(Origin):
    """Bits that a paper's formula gives on a model's shapes, and what is printed for it; needs no run.

    method, options: of a plugin here, whose `predict` computes them on the file's outline, else on the suite's.
    """

    method: str
    options: dict[str, Any] = {}
    printed: float
    bits: Literal["paper", "linear"] = Field(
        default="paper", description="paper: by the method's own formula; linear: by all that is stored here"
    )
    tolerance: float = Field(default=0.005, description="absolute, in bits")
    note: str = ""


class Floor(Origin):
    """A bound of theory: no entry's `metric` lies below base ** -bits, at the bits of all that it stores for the linear
    layers. Its index bits bound nothing: scales, codebooks and outliers tell of the weights, too."""

    claim: str
    metric: str
    base: float = Field(default=4.0, gt=1)
    note: str = ""


class Published(_Frozen):
    """A file of expected values.

    model: what the printed numbers are of, as the suite calls it. outline: the sizes of the model that the formulas are
    of, where that is not the suite's. averaged: rows of which nothing is wanted but that their average is computed
    again. averages_of: names of files beside this one, whose rows with an average `read_published` adds to these.
    """

    title: str
    model: str
    outline: ModelOutline | None = None
    origin: Origin
    notes: tuple[str, ...] = Field(default=(), description="what the source mixes, shown with the table")
    rows: tuple[PublishedRow, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    formulas: tuple[Formula, ...] = ()
    floors: tuple[Floor, ...] = ()
    averages_of: tuple[str, ...] = ()
    averaged: tuple[PublishedRow, ...] = ()

    def origin_of(self, part: Origin) -> Origin:
        """The part's own, filled up from the file's."""
        own = {name: getattr(part, name) for name in Origin.model_fields if getattr(part, name) is not None}
        return self.origin.model_copy(update=own)


def published_path(suite: Path) -> Path:
    """Where the expected values of a suite stand."""
    return suite.with_name(suite.name.removesuffix(".toml") + ENDING)


def suite_of(published: Path) -> Path:
    """The suite beside which a file of expected values stands."""
    return published.with_name(published.name.removesuffix(ENDING) + ".toml")


def read_published(path: Path) -> Published:
    """Raises SuiteError: file, key, and what is wrong."""
    found = _read_one(path)
    rows: dict[str, PublishedRow] = {}
    for name in found.averages_of:
        other = _read_one(path.with_name(name))
        for row in other.rows:
            if row.average is not None:
                filled = row.model_copy(update=other.origin_of(row).model_dump())
                printed = {metric: row.values[metric] for metric in (*row.average_of, row.average)}
                rows.setdefault(f"{filled.source} {printed}", filled)  # some tables are quoted in several files
    return found.model_copy(update={"averaged": (*found.averaged, *rows.values())})


def decimals_of(written: float | str) -> int:
    exponent = Decimal(str(written)).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _read_one(path: Path) -> Published:
    try:
        text = path.read_text()
        found = Published.model_validate(tomllib.loads(text))
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SuiteError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    written = tomllib.loads(text, parse_float=str)  # as a float 7.20 is 7.2
    found = found.model_copy(
        update={
            name: tuple(
                row.model_copy(update={"decimals": {key: decimals_of(value) for key, value in as_written.items()}})
                for row, as_written in zip(rows, (one.get("values", {}) for one in written.get(name, ())), strict=True)
            )
            for name, rows in (("rows", found.rows), ("averaged", found.averaged))
        }
    )
    parts: list[PublishedRow | Ordering | Formula | Floor] = [
        *found.rows,
        *found.averaged,
        *found.orderings,
        *found.formulas,
        *found.floors,
    ]
    for part in parts:
        origin = found.origin_of(part)
        for name in ("source", "trust"):
            if getattr(origin, name) is None:
                what = part.claim if isinstance(part, Ordering | Floor) else part.method
                raise SuiteError(f"{path}: {what}: no {name}; give it here or under [origin]")
    return found
