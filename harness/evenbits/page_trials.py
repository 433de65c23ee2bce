"""Everything known of one row of the leaderboard: bytes, bits, layers, options, seeds, and how to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evenbits.fingerprints import protocol_of
from evenbits.layers import LayerCell, short_kinds
from evenbits.measure import fingerprint_id
from evenbits.page_entries import (
    MARK_WORDS,
    Entry,
    Shown,
    budget_words,
    interval_text,
    number_text,
    share_text,
)
from evenbits.page_html import MINUS, NONE, Child, Html, facts, fold, hidden, join, table, tag
from evenbits.record import Record
from evenbits.report_format import format_bytes, format_number
from evenbits.report_layers import bits_range
from evenbits.rows import dense_bits, why

BAR = 120  # px of a share of 1


class Environments:
    """Each environment once, whatever the number of trials that ran in it."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}

    def id_of(self, environment: Mapping[str, Any]) -> str:
        return self.ids.setdefault(json.dumps(environment, sort_keys=True), f"e-{len(self.ids)}")

    def html(self) -> list[Html]:
        return [_environment(name, json.loads(raw)) for raw, name in self.ids.items()]


def article(shown: Shown, entry: Entry, environments: Environments, command: str) -> Html:
    """command: the run's, without seeds; `--seed N` is added to it."""
    row = entry.row
    where = budget_words(row.budget) if entry.group != "dense" else "uncompressed"
    if entry.group == "outside":
        where += ", outside the window"
    tags = [shown.name, where, *([f"after {row.stage}"] if row.recovery else [])]
    name = join([row.name, *(f" + {stage}" for stage in row.recovery)])
    parts: list[Html | None] = [
        tag("h3", name, id=f"t-{entry.id}-name"),
        tag("p", *(tag("span", one, class_="chip") for one in tags), class_="chips"),
        tag("p", row.settings, class_="settings") if row.settings else None,
        tag("div", _part("Bits", *_bits(row.records)), _part("Bytes by role", *_ledger(row.records)), class_="pair"),
        _part("Measured", _measured(shown, entry)),
        _layers(shown, entry),
        _samples(entry),
        _part("Options", _options(row.records[0])),
        _part("Seeds, time and memory", _runs(row.records, environments)),
        _remarks(row.records),
        _part("Make it again", _again(row.records, command)),
    ]
    return tag("article", *parts, id=f"t-{entry.id}", class_="trial", aria_labelledby=f"t-{entry.id}-name")


def _part(title: str, *children: Child) -> Html:
    return tag("section", tag("h4", title), *children)


def _bits(records: Sequence[Record]) -> Iterator[Html]:
    lines = []
    for name, what in (
        ("linear", "all bytes of the linear layers, per weight"),
        ("model", "all bytes of the model, per parameter"),
        ("paper", "by the method's own formula, or claimed by a published checkpoint"),
        ("index", "codes alone"),
    ):
        measured = [getattr(r.ledger.bits if r.ledger is not None else dense_bits(r.model), name) for r in records]
        predicted = [None if r.predicted is None else getattr(r.predicted, name) for r in records]
        foretold = [value for value in predicted if value is not None]
        heading = join([name, tag("span", what, class_="note")])
        lines.append([heading, _mean(measured), _mean(foretold) if foretold else NONE])
    yield table("The four bit numbers", ("bits", "measured", "predicted"), lines, seen=False)
    if stored := [record.ledger.bits for record in records if record.ledger is not None]:
        yield tag("p", _gap([bits.linear for bits in stored], [bits.paper for bits in stored]), class_="quiet")


def _gap(linear: Sequence[float], paper: Sequence[float]) -> str:
    """In words, so that a number that leaves something out is not taken for what is stored."""
    found, said = sum(linear) / len(linear), sum(paper) / len(paper)
    apart = f"{abs(found - said):.3f}"
    if float(apart) == 0 or said <= 0:
        return f"Its files take {found:.3f} bits a weight, and paper bits say {said:.3f}."
    more = "more" if found > said else "fewer"
    return f"Its files take {apart} bits a weight ({abs(found / said - 1):.1%}) {more} than paper bits say."


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}"


def _ledger(records: Sequence[Record]) -> Iterator[Html]:
    """Of the first seed; of others too where their bytes differ."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        raw = "dense" if record.ledger is None else record.ledger.model_dump_json()
        groups.setdefault(raw, []).append(record)
    for number, same in enumerate(groups.values()):
        seeds = "" if len(groups) == 1 else f"seed {', '.join(str(r.seed) for r in same)}"
        one = _ledger_table(same[0])
        yield one if number == 0 and not seeds else fold(seeds, one, open=number == 0)
    left = records[0].ledger.left_dense if records[0].ledger is not None else ()
    if left:
        yield fold(f"{len(left)} layers left dense", tag("p", ", ".join(left)))


def _ledger_table(record: Record) -> Html:
    model, ledger = record.model, record.ledger
    if ledger is None:
        parts = {
            "linear layers": model.linear_bytes,
            "outside the linear layers": model.model_bytes - model.linear_bytes,
        }
        inside, total = 1, model.model_bytes
    else:
        parts = dict(ledger.roles)
        inside, total = len(parts), ledger.model_bytes
        rest = ledger.linear_bytes - sum(parts.values())
        if rest > 0:
            parts["in the linear layers, without a role"] = rest
            inside += 1
        parts["outside the linear layers"] = ledger.rest_bytes
        headers = total - ledger.linear_bytes - ledger.rest_bytes
        if headers > 0:
            parts["file headers"] = headers
    lines: list[list[Child]] = []
    for number, (name, size) in enumerate(parts.items()):
        bits = f"{8 * size / model.linear_weights:.4f}" if number < inside else NONE
        lines.append([name, f"{size:,}", bits, _bar(size / total if total else 0.0)])
    lines.append([tag("strong", "whole model"), f"{total:,}", NONE, ""])
    header = ("role", "bytes", join(["bits", hidden(" per linear weight")]), "share")
    return table("Bytes on disk by role", header, lines, seen=False)


def _bar(share: float) -> Html:
    width = round(BAR * share, 1)
    bar = tag("svg", tag("rect", class_="rail", width=BAR, height=8, rx=2), tag("rect", width=width, height=8, rx=2),
              viewBox=f"0 0 {BAR} 8", class_="share", aria_hidden="true")  # fmt: skip
    return join([bar, tag("span", f"{share:.1%}")])


def _measured(shown: Shown, entry: Entry) -> Html:
    row = entry.row
    lines: list[list[Child]] = []
    under: dict[str, list[str]] = {}
    for column in shown.table.columns:
        cell = row.cells.get(column.key)
        if cell is None:
            continue
        mark = entry.mark(column)
        ratio = ""
        if column.quality and not (row.method == "dense" and not row.recovery):
            found = shown.table.recovery(row, column)
            if found is not None:
                ratio = share_text(found.value)
                if found.low is not None and found.high is not None:
                    ratio += f" [{share_text(found.low)}, {share_text(found.high)}]"
        seeds = ", ".join(number_text(v, column) for v in cell.by_seed) if len(cell.by_seed) > 1 else ""
        unit = "" if column.unit in ("", "1", column.name) else column.unit
        lines.append([
            join([column.title, tag("span", unit, class_="note") if unit else None]),
            number_text(cell.value, column), interval_text(cell.low, cell.high, column), ratio,
            *([seeds] if len(row.records) > 1 else []), MARK_WORDS.get(mark, ""), tag("code", column.protocol),
        ])  # fmt: skip
        under.setdefault(column.protocol, []).append(column.title)
    if not lines:
        return tag("p", "Nothing was measured.", class_="quiet")
    more = ["by seed"] if len(row.records) > 1 else []
    header = ["metric", "value", "95 % interval", "vs dense", *more, "standing", "protocol"]
    links = [
        tag("li", tag("a", f"protocol {identity}: {', '.join(titles)}", href=f"#p-{identity}", class_="pull"))
        for identity, titles in under.items()
    ]
    numbers = table("Every number", header, lines, words=(len(header) - 2, len(header) - 1), seen=False)
    return join([numbers, tag("ul", *links, class_="pulls")])


def _layers(shown: Shown, entry: Entry) -> Html | None:
    """Means by kind of layer; the script adds the map of all layers with its table."""
    found = shown.layers.get(entry.id)
    if found is None:
        return None
    kinds = short_kinds(list(dict.fromkeys(cell.place.kind for cell in found.cells)))
    by_kind: dict[str, list[LayerCell]] = {}
    for cell in found.cells:
        by_kind.setdefault(cell.place.kind, []).append(cell)
    lines = []
    for kind, cells in by_kind.items():
        lines.append([kinds[kind], str(len(cells)), _known([c.error for c in cells if not c.left_dense]),
                      _known([c.calibrated for c in cells if not c.left_dense]), bits_range(cells)])  # fmt: skip
    means = table("Mean error by kind of layer", ("kind", "layers", "error", "calibrated error", "bits"), lines)
    about = tag(
        "p",
        f"Error: |W {MINUS} W'|² / |W|² of a layer's weights. Calibrated: weighted by the layer's inputs; it is what "
        "the layer's output loses.",
        class_="quiet",
    )
    return _part("Error of the layers", about, tag("div", class_="map", data_entry=entry.id), means)


def _known(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return format_number(sum(known) / len(known)) if known else NONE


def _samples(entry: Entry) -> Html | None:
    """The script puts this row's continuations here, beside the dense model's, from the section that has them all."""
    if not any(record.samples for record in entry.row.records):
        return None
    link = tag("a", "What the models write", href="#samples")
    return _part("What it writes", tag("div", link, class_="written", data_entry=entry.id))


def _options(record: Record) -> Html:
    parts: list[Child] = [_listed(record.options) if record.options else tag("p", "No options.", class_="quiet")]
    for stage, options in zip(record.recovery, record.recovery_options, strict=False):
        parts.append(fold(f"recovery: {stage}", _listed(options)))
    if record.calibration is not None:
        parts.append(fold("calibration text", _listed(record.calibration)))
    return join(parts)


def _listed(values: Mapping[str, Any]) -> Html:
    return facts((name, _value(value)) for name, value in values.items())


def _value(value: Any) -> Child:
    if isinstance(value, str):
        return value or "(empty)"
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _runs(records: Sequence[Record], environments: Environments) -> Html:
    stages = list(dict.fromkeys(stage for r in records for stage in (*r.seconds, *r.peaks)))
    header = ["seed", "trial", *(f"{stage}: time" for stage in stages), *(f"{stage}: peak" for stage in stages)]
    header += ["finished", "environment"]
    lines: list[list[Child]] = []
    ran: dict[str, Html] = {}
    for record in records:
        line: list[Child] = [str(record.seed), tag("code", record.trial)]
        line += [_seconds(record.seconds.get(stage)) for stage in stages]
        line += [format_bytes(peak) if (peak := record.peaks.get(stage)) is not None else NONE for stage in stages]
        name = environments.id_of(record.environment)
        line += [_moment(record.finished), str(number := int(name[2:]) + 1)]
        lines.append(line)
        ran[name] = tag("li", tag("a", f"environment {number}", href=f"#{name}", class_="pull"))
    chains = [
        ("artifacts", join((tag("code", one) for one in (*dict.fromkeys([*r.chain, r.artifact or ""]),) if one), ", "))
        for r in records
        if r.artifact
    ]
    libraries = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r.made_with.items()) for r in records if r.made_with)
    made = [("compressed with", text) for text in libraries]
    found = facts([("distribution", records[0].distribution or NONE), *made, *chains])
    times = table("By seed", header, lines, words=(1,), seen=False)
    return join([times, found, tag("ul", *ran.values(), class_="pulls")])


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f} s" if value < 100 else f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def _moment(iso: str) -> str:
    return iso[:16].replace("T", " ") or NONE


def _remarks(records: Sequence[Record]) -> Html | None:
    lines = [f"seed {r.seed}: {remark}" if len(records) > 1 else remark for r in records for remark in r.remarks]
    lines += [why(record) for record in records if why(record)]
    return _part("Remarks", tag("ul", *(tag("li", line) for line in lines))) if lines else None


def _again(records: Sequence[Record], command: str) -> Html:
    """The commit, where the run knew it, and the command for exactly these seeds."""
    lines: list[str] = []
    notes: list[str] = []
    for record in records:
        git, versions = record.environment.get("git"), record.environment.get("versions", {})
        if isinstance(git, Mapping) and git.get("commit"):
            lines.append(f"git checkout {shlex.quote(str(git['commit']))}")
            if git.get("dirty"):
                notes.append("The checkout had changes that are not in this commit.")
        elif versions.get("evenbits"):
            lines.append(f"pip install {shlex.quote('evenbits==' + str(versions['evenbits']))}")
    lines = list(dict.fromkeys(lines))
    if len(lines) > 1:
        notes.append("Its seeds ran at different commits.")
        lines = lines[:1]
    lines.append(f"{command} {' '.join(f'--seed {record.seed}' for record in records)}")
    notes.append("It makes every row of the suite at " + ("these seeds." if len(records) > 1 else "this seed."))
    said = [tag("p", note, class_="quiet") for note in dict.fromkeys(notes)]
    code = tag("code", "\n".join(lines))
    return join([tag("pre", code, class_="command", tabindex=0, role="region", aria_label="Command"), *said])


def _environment(name: str, environment: Mapping[str, Any]) -> Html:
    pairs: list[tuple[Child, Child]] = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            pairs += [(f"{key}: {inner}", _value(own)) for inner, own in value.items()]
        elif key == "memory_bytes" and isinstance(value, int):
            pairs.append(("memory", format_bytes(value)))
        else:
            pairs.append((key, _value(value)))
    body = facts(pairs) if pairs else tag("p", "Not recorded.", class_="quiet")
    return fold(f"environment {int(name[2:]) + 1}", tag("div", body), id=name)


def protocols_used(shown: Sequence[Shown]) -> dict[str, tuple[Mapping[str, Any], list[str]]]:
    """Id of each protocol -> its fields in full, and the columns measured under it."""
    found: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for one in shown:
        titles = {column.key: column.title for column in one.table.columns}
        for entry in one.entries:
            for record in entry.row.records:
                for metric in record.metrics:
                    fields = protocol_of(record, metric)
                    identity = fingerprint_id(fields)
                    names = found.setdefault(identity, (fields, []))[1]
                    title = titles.get((metric.name, identity), metric.name)
                    if title not in names:
                        names.append(title)
    return found
