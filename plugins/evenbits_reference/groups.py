"""What an item is, and how items are put into groups that share their choices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evenbits_reference import world
from evenbits_reference.world import Kind, Pair, shuffle


@dataclass(frozen=True)
class Item:
    """context: ends before the blank, or holds it as "_" (WinoGrande); choices have neither space in front.

    pair: the held-out pair that the item is built around. group: items of one group share their choices.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    pair: Pair
    group: int


Question = tuple[str, str, Pair]  # context, right choice, held-out pair


def held_out(kind: Kind, first: str) -> list[str]:
    """Components on the right that are held out for the test with `first`."""
    return [right for _, left, right in world.pairs(kind, "test") if left == first]


def source(name: str) -> random.Random:
    return random.Random(f"evenbits reference items {world.VERSION} {name}")


def cut(sentence: str, words: int = 1) -> tuple[str, str]:
    """The sentence before its last words, and these with the full stop."""
    left, *right = sentence.rsplit(" ", words)
    return left, " ".join(right)


def in_groups(wanted: int, make: Callable[[int], Sequence[Question] | None]) -> Iterator[list[Question]]:
    """Groups whose right choices all differ; no item twice. `make` may give None where a draw does not work out."""
    seen: set[tuple[str, frozenset[str]]] = set()
    found = 0
    for attempt in range(200 * wanted):
        group = make(attempt)
        if group is None or len({answer for _, answer, _ in group}) < len(group):
            continue
        answers = frozenset(answer for _, answer, _ in group)
        keys = {(context, answers) for context, _, _ in group}
        if keys & seen:
            continue
        seen |= keys
        found += 1
        yield list(group)
        if found == wanted:
            return
    raise AssertionError(f"only {found} of {wanted} groups: too few held-out pairs")


def numbered(groups: Iterator[list[Question]], draw: random.Random) -> list[Item]:
    items = []
    for number, group in enumerate(groups):
        choices = tuple(shuffle(draw, [answer for _, answer, _ in group]))
        items += [Item(text, choices, choices.index(answer), pair, number) for text, answer, pair in group]
    return items
