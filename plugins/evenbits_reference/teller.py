"""A random source that keeps account: what was chosen, at which probability, and which pairs were told."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from evenbits_reference import world
from evenbits_reference.world import COMPONENTS, Kind, Pair, Split

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One text.

    pairs: every combination that it tells, the one it is built around first.
    nats: -log of the probability of the choices that were made, as if no pair were held out. Different choices may
    give the same text, so this bounds the text's own information from above.
    """

    text: str
    pairs: tuple[Pair, ...]
    nats: float


@cache
def _candidates(split: Split, kind: Kind, side: int, other: str) -> tuple[str, ...]:
    """Components on `side` that may be told with `other` in a text of `split`."""
    fits = world.allowed(split)
    names = COMPONENTS[kind][side]
    return tuple(x for x in names if fits(world.pair(kind, *((x, other) if side == 0 else (other, x)))))


class Teller:
    def __init__(self, split: Split, seed: str) -> None:
        self.split = split
        self.random = random.Random(seed)
        self.nats = 0.0
        self.pairs: list[Pair] = []
        self._fits = world.allowed(split)

    def pick(self, options: Sequence[T], out_of: int | None = None) -> T:
        """Uniform; `out_of` is how many there would be if nothing were held out."""
        chosen, cost = self.draw(options, out_of)
        self.nats += cost
        return chosen

    def draw(self, options: Sequence[T], out_of: int | None = None) -> tuple[T, float]:
        """As `pick`, but the price is handed over, to be added if what was drawn is told."""
        return world.choose(self.random, options), math.log(out_of or len(options))

    def same_text(self, ways: int) -> None:
        """The text could have come about in so many ways, equally likely if nothing were held out."""
        self.nats -= math.log(ways)

    def weighted(self, options: Sequence[tuple[T, float]]) -> T:
        """(option, share) with shares that add up to one."""
        at = self.random.random()
        chosen, cost = options[-1]
        for option, share in options:
            at -= share
            if at < 0:
                chosen, cost = option, share
                break
        self.nats -= math.log(cost)
        return chosen

    def some(self, options: Sequence[T], count: int, *, as_set: bool = False) -> list[T]:
        """`count` different ones in random order; `as_set`: the order does not show in the text and costs nothing."""
        rest = list(options)
        taken = []
        for _ in range(min(count, len(rest))):
            index = int(self.random.random() * len(rest))
            self.nats += math.log(len(rest))
            taken.append(rest.pop(index))
        if as_set:
            self.same_text(math.factorial(len(taken)))
        return taken

    def lead(self, kind: Kind) -> tuple[str, str]:
        """The pair that the text is built around: one of its split's own. Unordered pairs come either way round."""
        made = self.pick(world.pairs(kind, self.split), world.total(kind))
        self.pairs.append(made)
        left, right = COMPONENTS[kind]
        if left is right and self.pick((True, False)):
            return made[2], made[1]
        return made[1], made[2]

    def told(self, kind: Kind, first: str, second: str) -> None:
        made = world.pair(kind, first, second)
        assert self._fits(made), f"a text of {self.split} tells {made}"
        if made not in self.pairs:
            self.pairs.append(made)

    def partner(self, kind: Kind, side: int, other: str) -> str:
        """A component that may be told with `other`, and the pair is told."""
        names = COMPONENTS[kind]
        found = self.pick(self.may(kind, side, other), len(names[side]) - (names[0] is names[1]))
        self.told(kind, *((found, other) if side == 0 else (other, found)))
        return found

    def may(self, kind: Kind, side: int, other: str) -> tuple[str, ...]:
        return _candidates(self.split, kind, side, other)

    def fitting(self, options: Sequence[T], fits: Callable[[T], bool]) -> T:
        """One of those that fit, at the price of one of all.

        Raises IndexError when none fits.
        """
        return self.pick([option for option in options if fits(option)], len(options))

    def document(self, sentences: Sequence[str]) -> Document:
        return Document(" ".join(sentences), tuple(self.pairs), self.nats)
