"""What each number of a report means: the fields of its protocol, on what it ran, what was cut or could not be had."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evenbits.fingerprints import protocol_of
from evenbits.layers import every_row
from evenbits.markdown import plain
from evenbits.measure import KERNEL_POLICY, fingerprint_id
from evenbits.report_format import format_budget, format_bytes
from evenbits.rows import Column, Row
from evenbits.tables import ModelTable, Table

RESTORED, PACKED, NEAR = (KERNEL_POLICY[weights] for weights in ("restored", "packed", "approximate"))
Key = tuple[str, str]


def column_protocols(model: ModelTable) -> dict[Key, Mapping[str, Any]]:
    """Column key -> the fields of its fingerprint."""
    found: dict[Key, Mapping[str, Any]] = {}
    for row, _ in every_row(model):
        for record in row.records:
            for metric in record.metrics:
                fields = protocol_of(record, metric)
                found.setdefault((metric.name, fingerprint_id(fields)), fields)
    return found


def kernel_of(fields: Mapping[str, Any]) -> str:
    """What multiplied: a policy of `measure.KERNEL_POLICY`, a kernel's name, or "" where the protocol does not say."""
    return str(fields.get("kernel") or "")


def ran_lines(columns: Sequence[Column], protocols: Mapping[Key, Mapping[str, Any]]) -> Iterator[str]:
    """On what these costs were measured: one line for each kernel on each machine."""
    ran: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        fields = protocols.get(column.key, {})
        threads = fields.get("threads")
        machine = [fields.get("device"), fields.get("device_name"), _threads(threads)]
        where = ", ".join(str(part) for part in dict.fromkeys(machine) if part)
        ran.setdefault((kernel_of(fields), where), []).append(column.title)
    for (kernel, where), titles in ran.items():
        subject = "" if len(ran) == 1 else f"{', '.join(titles)}: "
        machine_text = f" ({where})" if where else ""
        if kernel == RESTORED:
            yield (
                f"{subject}ran on dense-restored weights{machine_text}: these times and energies say nothing about the "
                "method's speed on a fused kernel, and are not ranked."
            )
        elif kernel in (PACKED, NEAR):
            near = ", or from something near them that the method offers as faster," if kernel == NEAR else ""
            yield (
                f"{subject}ran from packed weights{near} where a method has a path for its layers, the dense model by "
                f"torch's matmul{machine_text}; what ran for each row stands in the notes. Not ranked."
            )
        elif kernel:
            yield f"{subject}ran with kernel {kernel}{machine_text}; not ranked."
        elif where:
            yield f"{subject}ran on {where}; not ranked."


def _threads(count: Any) -> str | None:
    return None if not count else "1 thread" if count == 1 else f"{count} threads"


def notes_of(model: ModelTable) -> Iterator[str]:
    """What computed packed layers, what was cut to the context, by column, and what could not be measured."""
    yield from _kernels_ran(model)
    titles = {column.key: column.title for column in model.columns}
    cut: dict[Key, list[int]] = {}
    remarks: Counter[str] = Counter()
    trials = 0
    for row, _ in every_row(model):
        for record in row.records:
            trials += 1
            remarks.update(dict.fromkeys(record.remarks, 1))
            for metric in record.metrics:
                count = metric.details.get("truncated")
                if isinstance(count, int) and count > 0:
                    cut.setdefault((metric.name, fingerprint_id(protocol_of(record, metric))), []).append(count)
    for key, counts in cut.items():
        low, high = min(counts), max(counts)
        items = f"{low}" if low == high else f"{low} to {high}"
        yield (
            f"{model.model.name}: {titles.get(key, key[0])}: {items} items did not fit in the context and were cut "
            f"({len(counts)} of {trials} trials)"
        )
    for remark, count in remarks.items():
        yield f"{model.model.name}: {remark.rstrip('.')} ({count} of {trials} trials)"


def _kernels_ran(model: ModelTable) -> Iterator[str]:
    """What ran for each row that was measured with packed weights; rows of which the same is to be said together."""
    rows: dict[str, list[str]] = {}
    for row, budget in every_row(model):
        said: dict[str, None] = {}
        held: dict[str, None] = {}
        for record in row.records:
            for metric in record.metrics:
                kernels = metric.details.get("kernels")
                said.update(dict.fromkeys(ran_words(kernels)))
                if isinstance(kernels, Mapping) and kernels.get("held_bytes") is not None:
                    held[format_bytes(kernels["held_bytes"])] = None
        if said:
            name = row.full_name + ("" if budget is None else f" @ {format_budget(budget)}")
            name += f" (holding {' or '.join(held)})" if held else ""
            rows.setdefault("; ".join(said), []).append(name)
    for text, names in rows.items():
        yield f"{model.model.name}: with packed weights, {', '.join(dict.fromkeys(names))}: {text}"


def ran_words(kernels: Any) -> Iterator[str]:
    """The details of a measurement with packed weights (`evenbits.packed.LayerKernels.facts`), in words."""
    if not isinstance(kernels, Mapping):
        return
    if whole := kernels.get("whole"):
        yield str(whole)
    for phase, found in (kernels.get("phases") or {}).items():
        each = [_ran_words(one) for one in found["ran"]]
        yield f"{phase} of {found['rows']} {'row' if found['rows'] == 1 else 'rows'}: {', '.join(each)}"
    for reason, layers in (kernels.get("why_dense") or {}).items():
        yield f"{layers} layers on dense weights ({reason})"


def _ran_words(one: Mapping[str, Any]) -> str:
    near = ""
    if one.get("decibels"):
        low, high = (f"{value:.0f}" for value in one["decibels"])
        near = f", its error {low if low == high else f'{low} to {high}'} dB below the weight"
    config = f" {one['config']}" if one["config"] else ""
    return f"{one['layers']} layers by {one['kernel']}{config} ({one['reason']}{near})"


def all_dense(row: Row, column: Column) -> bool:
    """Whether a number of packed weights was measured with none: every layer ran on a dense weight after all."""
    found = [
        metric.details.get("kernels")
        for record in row.records
        for metric in record.metrics
        if (metric.name, fingerprint_id(protocol_of(record, metric))) == column.key
    ]
    return bool(found) and all(
        isinstance(kernels, Mapping) and not kernels.get("packed_layers") and bool(kernels.get("dense_layers"))
        for kernels in found
    )


def protocols_markdown(table: Table) -> list[str]:
    """Paragraphs: for every column the id of its fingerprint and its fields; none where there are no columns.

    What most columns of a model have, and all that have it alike, stands once; so does what those of one evaluator
    have in common.
    """
    parts = [
        "## Protocols",
        "A number is compared only with numbers of the same protocol. The id stands in report.csv beside the number.",
    ]
    for model in table.models:
        found = column_protocols(model)
        columns = [column for column in model.columns if column.key in found]
        if not columns:
            continue
        flat = {column.key: readable(found[column.key]) for column in columns}
        common = _common(list(flat.values()))
        parts.append(f"### {plain(model.model.name)}")
        if common:
            parts.append(f"Unless a column says otherwise: {_listed(common)}.")
        by_evaluator: dict[str, dict[str, list[Column]]] = {}
        for column in columns:
            evaluator = flat[column.key].get("evaluator", "")
            by_evaluator.setdefault(evaluator, {}).setdefault(column.protocol, []).append(column)
        lines = []
        for evaluator, protocols in by_evaluator.items():
            alike = dict(common)
            if len(protocols) > 1:
                own = _common([flat[same[0].key] for same in protocols.values()])
                alike |= own
                said = {k: v for k, v in own.items() if common.get(k) != v and k != "evaluator"}
                lines += [f"- {plain(evaluator)}: {_listed(said)}"] if said else []
            for identity, same in protocols.items():
                names = ", ".join(plain(column.title) for column in same)
                rest = {k: v for k, v in flat[same[0].key].items() if alike.get(k.rsplit("*.", 1)[-1]) != v}
                lines.append(f"- {names} (`{identity}`): {_listed(rest) or 'nothing more'}")
        parts.append("\n".join(lines))
    return parts if len(parts) > 2 else []


def readable(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names with their values as text. Of a list of tables what all agree on stands once, as "tasks.*.bos";
    what differs stands as one list, "tasks.*.task=a, b, c"."""
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= readable(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
            each = [readable(one) for one in value]
            for name in dict.fromkeys(name for one in each for name in one):
                texts = [one.get(name, "(absent)") for one in each]
                flat[f"{prefix}{key}.*.{name}"] = texts[0] if len(set(texts)) == 1 else ", ".join(texts)
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return flat


def _common(flat: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Fields that two thirds of the columns have, and all that have them alike."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for one in flat for name in one):
        texts = [one[name] for one in flat if name in one]
        if len(texts) > 1 and 3 * len(texts) >= 2 * len(flat) and len(set(texts)) == 1:
            found[name] = texts[0]
    return found


def _listed(fields: Mapping[str, str]) -> str:
    return "; ".join(f"{plain(name)} = {plain(value) or '(empty)'}" for name, value in fields.items())
