"""A task's items from their requests to lm-eval's metric of each: built, checked, scored, and what was scored kept."""

from __future__ import annotations

import hashlib
import json
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evenbits.errors import EvenbitsError, SuiteError, TrialFailed
from evenbits_lmeval.options import LmEvalOptions
from evenbits_lmeval.sets import check_count

CHOSEN = ("multiple_choice", "loglikelihood")  # output types whose requests are a context and a continuation


UNKNOWN: list[int] = []
"""As the right choices: what the target means only the task's own process_results knows."""


@dataclass(frozen=True)
class Lengths:
    """Of one request, in tokens. context includes what stands in front of it; cut: lost on the left."""

    context: int
    continuation: int
    cut: int


@dataclass
class Items:
    """One task's items in their order, and after `score` what became of them.

    requests[i]: lm-eval's instances of item i. lengths[i]: of these, for output types in CHOSEN.
    choices[i], gold[i]: of multiple choice, the texts and the right one's index (several indices: a list).
    values[metric, filter][i]: lm-eval's metric of item i; an item may lack one.
    """

    name: str
    task: Any
    docs: list[Any]
    requests: list[list[Any]]
    choices: list[list[str]] = field(default_factory=list)
    gold: list[int | list[int]] = field(default_factory=list)
    lengths: list[list[Lengths]] = field(default_factory=list)
    values: dict[tuple[str, str], dict[int, Any]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.task.OUTPUT_TYPE)

    @property
    def flat(self) -> Iterator[Any]:
        for several in self.requests:
            yield from several

    @property
    def hashes(self) -> list[str]:
        """sha256 of each item's content, as in lm-eval's sample logs (`doc_hash`)."""
        from lm_eval.utils import handle_non_serializable

        dumps = (json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False) for doc in self.docs)
        return [hashlib.sha256(text.encode()).hexdigest() for text in dumps]

    @property
    def identity(self) -> str:
        """sha256 of what is asked and what is right, item by item: the same for the hub's rows and for local ones."""
        digest = hashlib.sha256()
        for index, (doc, requests) in enumerate(zip(self.docs, self.requests, strict=True)):
            gold = self.gold[index] if self.gold else UNKNOWN
            right = gold if gold != UNKNOWN else str(self.task.doc_to_target(doc))
            asked = [[request.args for request in requests], right]
            digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def build(name: str, task: Any, options: LmEvalOptions) -> Items:
    """The requests of the first `limit` items, checked before any is scored.

    Raises SuiteError naming task and row for a choice or a target that is empty, a label out of range, a field that is
    not there, and for a number of rows that is not the known one.
    """
    check_count(name, len(task.eval_docs), options, f"task {name}")
    try:
        task.build_all_requests(limit=options.limit)
    except Exception as error:
        raise _unbuilt(name, task, error) from error
    by_item: dict[int, list[Any]] = defaultdict(list)
    for request in task.instances:
        by_item[request.doc_id].append(request)
    docs = [doc for _, doc in task.doc_iterator(limit=options.limit)]
    items = Items(name, task, docs, [sorted(by_item[i], key=lambda request: request.idx) for i in range(len(docs))])
    for row, (doc, requests) in enumerate(zip(items.docs, items.requests, strict=True), start=1):
        try:
            _check(items, doc, requests)
        except ValueError as error:
            raise SuiteError(f"lm-eval: task {name}, row {row}{_file(task)}: {error}") from None
    return items


def _check(items: Items, doc: Any, requests: Sequence[Any]) -> None:
    """Notes the item's choices and labels. Raises ValueError for what cannot be scored."""
    task = items.task
    if items.kind not in CHOSEN:
        return
    if items.kind == "loglikelihood":
        if not requests[0].args[1].strip():
            raise ValueError("the target is empty")
        return
    for index, request in enumerate(requests):
        if not request.args[1].strip():
            raise ValueError(f"choice {index} is empty")
    choices = list(task.doc_to_choice(doc))
    if not choices:
        raise ValueError("there are no choices")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise ValueError(f"choice {index} is {choice!r}, expected text")
    items.choices.append(choices)
    try:
        items.gold.append(_gold(task, doc, choices))
    except ValueError:
        if task.get_config("process_results") is None:
            raise
        items.gold.append(UNKNOWN)


def _gold(task: Any, doc: Any, choices: list[str]) -> int | list[int]:
    """The right choice's index, several where any of them is right. Raises ValueError where lm-eval finds none."""
    given = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    many = isinstance(given, list | tuple)
    if many and not given:
        raise ValueError("no choice is right")
    if many != bool(task.multiple_target) and not task.multiple_input:  # lm-eval goes by the first item
        kinds = ("a list", "one") if many else ("one", "a list")
        raise ValueError(f"the label is {given!r}, {kinds[0]}, and the first item's is {kinds[1]}")
    gold: list[int] = []
    for label in given if many else [given]:
        if isinstance(label, str):
            if many:
                raise ValueError(f"the labels are {given!r}, expected numbers from 0 to {len(choices) - 1}")
            if label not in choices:
                raise ValueError(f"the label {label!r} is none of the choices")
            gold.append(choices.index(label))
            continue
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < len(choices):
            raise ValueError(f"the label is {label!r}, expected 0 to {len(choices) - 1}")
        gold.append(number)
    return gold if many else gold[0]


def _unbuilt(name: str, task: Any, error: Exception) -> EvenbitsError:
    """Where lm-eval could not make a request: it does not say at which item."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for row, doc in enumerate(task.eval_docs, start=1):
        try:
            task.doc_to_text(doc)
            task.doc_to_target(doc)
            if task.get_config("doc_to_choice") is not None:
                task.doc_to_choice(doc)
        except Exception:
            return SuiteError(f"lm-eval: task {name}, row {row}{_file(task)}: no request can be made of it ({said})")
    return TrialFailed(f"lm-eval: task {name}: its requests cannot be made ({said})")


def _file(task: Any) -> str:
    """ " of FILE" where a folder's task reads one local file."""
    given = (task.get_config("dataset_kwargs") or {}).get("data_files")
    files = list(given.values()) if isinstance(given, Mapping) else [given]
    return f" of {files[0]}" if len(files) == 1 and isinstance(files[0], str) else ""


def score(lm: Any, items: Items, advance: Callable[[int], None]) -> None:
    """Have the model answer the requests, and lm-eval make its metrics of the answers.

    lm: from make_scorer. advance: told of written answers; of what is scored the scorer reports itself.
    Raises TrialFailed where lm-eval yields no metric, or fails to.
    """
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for request in items.flat:
        by_kind[request.request_type].extend([request] * request.repeats)
    lengths: list[Lengths] = []
    for kind, requests in by_kind.items():
        if kind == "loglikelihood":
            with _listening(lm, lengths):
                answers = lm.loglikelihood(requests, disable_tqdm=True)
        else:
            answers = getattr(lm, kind)(requests, disable_tqdm=True)
            if kind == "generate_until":
                advance(len(requests))
        for request, answer in zip(requests, answers, strict=True):
            request.resps.append(answer)
    if items.kind in CHOSEN:
        each = iter(lengths[:: items.requests[0][0].repeats])
        items.lengths = [[next(each) for _ in several] for several in items.requests]
    items.task.apply_filters()
    values: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for name in items.requests[0][0].filtered_resps:
        for index, (doc, requests) in enumerate(zip(items.docs, items.requests, strict=True)):
            try:
                found = items.task.process_results(doc, [request.filtered_resps[name] for request in requests])
            except Exception as error:  # a task's own functions may raise anything
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise TrialFailed(
                    f"lm-eval: task {items.name}, row {index + 1}{_file(items.task)}: "
                    f"no metric can be made of the answers ({said})"
                ) from error
            for metric, value in found.items():
                values[metric, name][index] = value
    if not values:
        raise TrialFailed(f"lm-eval: task {items.name!r} yields no metric")
    items.values = dict(values)


class _listening:
    """While open, lengths of the scorer's encoded requests are added to a list, in the order of the requests."""

    def __init__(self, lm: Any, lengths: list[Lengths]) -> None:
        self.lm = lm
        self.lengths = lengths

    def __enter__(self) -> None:
        scored = self.lm._loglikelihood_tokens

        def listening(requests: Sequence[Any], *given: Any, **named: Any) -> Any:
            window = self.lm.max_length + 1  # the last token is only a target
            for _, context, continuation in requests:
                cut = max(0, len(context) + len(continuation) - window)
                self.lengths.append(Lengths(len(context), len(continuation), cut))
            return scored(requests, *given, **named)

        self.lm._loglikelihood_tokens = listening

    def __exit__(self, *_: object) -> None:
        del self.lm._loglikelihood_tokens  # the instance's: the class's own is there again
