"""The closed world: its facts, drawn once by a fixed seed, and which combinations each split may tell.

A *pair* is a combination of two components of one kind, such as ("event", "pond", "vase"). Every pair belongs to
one split. Each component, and each rule that decides what a pair leads to, occurs in the train split; a pair of
another split never does. What a held-out pair leads to must therefore be worked out from the parts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

from evenbits_reference import lexicon, materials

VERSION = 1
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Kind = Literal["event", "action", "trait", "sight", "things", "people", "animals"]
Pair = tuple[Kind, str, str]
T = TypeVar("T")

HELD_OUT: dict[Split, float] = {"validation": 0.06, "test": 0.14}  # shares of the pairs of each kind


@dataclass(frozen=True)
class Person:
    name: str  # first and last; both occur with others, so that only together they tell who it is
    pronoun: str  # she, he
    job: str
    home: str
    pet: str
    instrument: str
    month: str
    dish: str


# trait -> what a person has that decides it, and its row in that one's table
TRAITS: dict[str, tuple[str, int]] = {
    **{f"pet {name}": ("pet", index) for index, name in enumerate(lexicon.ANIMAL_FACTS[:5])},
    **{f"job {name}": ("job", index) for index, name in enumerate(lexicon.JOB_FACTS)},
    **{f"home {name}": ("home", index) for index, name in enumerate(lexicon.HOME_FACTS)},
}
_TABLES = {"pet": lexicon.ANIMALS, "job": lexicon.JOBS, "home": lexicon.HOMES}

MATERIAL = {thing: material for material, things in materials.THINGS_OF.items() for thing in things}
THINGS = tuple(MATERIAL)


def choose(random: random.Random, options: Sequence[T]) -> T:
    """Uniform. Only `random()` is drawn from: of the generator's methods it alone is the same in every Python."""
    return options[int(random.random() * len(options))]


def shuffle(random: random.Random, options: Sequence[T]) -> list[T]:
    """A uniform permutation, drawn as in `choose`."""
    rest = list(options)
    for last in range(len(rest) - 1, 0, -1):
        other = int(random.random() * (last + 1))
        rest[last], rest[other] = rest[other], rest[last]
    return rest


def _people() -> dict[str, Person]:
    draw = random.Random("evenbits reference world, people")
    first = [(name, "she") for name in lexicon.SHE] + [(name, "he") for name in lexicon.HE]
    names = [
        (f"{name} {last}", pronoun)
        for index, (name, pronoun) in enumerate(first)
        for last in shuffle(draw, lexicon.SURNAMES)[: 3 if index % 5 < 3 else 2]
    ]

    def dealt(values: Sequence[str]) -> list[str]:
        """Every value about equally often, in random order."""
        return shuffle(draw, [values[index % len(values)] for index in range(len(names))])

    columns = [
        dealt(values)
        for values in (
            list(lexicon.JOBS),
            list(lexicon.HOMES),
            lexicon.PETS,
            lexicon.INSTRUMENTS,
            lexicon.MONTHS,
            lexicon.DISHES,
        )
    ]
    rows = zip(names, *columns, strict=True)
    return {name: Person(name, pronoun, *facts) for (name, pronoun), *facts in rows}


PEOPLE = _people()
NAMES = tuple(PEOPLE)
ANIMALS = tuple(lexicon.ANIMALS)
ROOM = {thing: choose(random.Random(f"evenbits reference world, room of {thing}"), materials.ROOMS) for thing in THINGS}


def outcome(event: str, thing: str) -> str:
    """What the thing does, as a verb phrase."""
    return _RULES[event][MATERIAL[thing]]


def tool(action: str, thing: str) -> str:
    return _RULES[action][MATERIAL[thing]]


def trait(person: str, name: str) -> str:
    """One fact about a person's pet, job or home: two facts joined."""
    owner, row = TRAITS[name]
    return _TABLES[owner][getattr(PEOPLE[person], owner)][row]


def _rules() -> dict[str, dict[str, str]]:
    tables = {event: table for event, (_, table) in materials.EVENTS.items()}
    tables |= {action: table for action, (_, table) in materials.ACTIONS.items()}
    rules = {}
    for key, table in tables.items():
        rules[key] = {material: result for result, materials in table.items() for material in materials.split()}
        missing = set(materials.THINGS_OF) - set(rules[key])
        assert not missing, f"{key} says nothing of {missing}"
    return rules


_RULES = _rules()

# kind -> components on both sides; the same list twice means unordered pairs of different ones
COMPONENTS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "event": (tuple(materials.EVENTS), THINGS),
    "action": (tuple(materials.ACTIONS), THINGS),
    "trait": (tuple(TRAITS), NAMES),
    "sight": (ANIMALS, NAMES),
    "things": (THINGS, THINGS),
    "people": (NAMES, NAMES),
    "animals": (ANIMALS, ANIMALS),
}


def pair(kind: Kind, first: str, second: str) -> Pair:
    """In the order of the table; unordered kinds are sorted."""
    left, right = COMPONENTS[kind]
    if left is right and second < first:
        first, second = second, first
    return kind, first, second


def exists(made: Pair) -> bool:
    """A person's own pet is no sight: it is a fact that every split tells."""
    kind, first, second = made
    return first != second and not (kind == "sight" and PEOPLE[second].pet == first)


@cache
def pairs(kind: Kind, split: Split) -> tuple[Pair, ...]:
    """All pairs of a kind that belong to a split.

    Rows are dealt one by one, so that every component on the right keeps most of its pairs in train.
    """
    left, right = COMPONENTS[kind]
    found: dict[Split, list[Pair]] = {name: [] for name in SPLITS}
    debt = dict.fromkeys(HELD_OUT, 0.0)
    for second in right:
        draw = random.Random(f"evenbits reference world, {kind} {second}")
        row = [first for first in left if exists((kind, first, second)) and (left is not right or first < second)]
        row = shuffle(draw, row)
        for name, share in HELD_OUT.items():
            debt[name] += share * len(row)
            count = int(debt[name])
            debt[name] -= count
            found[name] += [(kind, first, second) for first in row[:count]]
            row = row[count:]
        found["train"] += [(kind, first, second) for first in row]
    return tuple(found[split])


@cache
def _split_of() -> dict[Pair, Split]:
    return {made: split for kind in COMPONENTS for split in SPLITS for made in pairs(kind, split)}


def split_of(made: Pair) -> Split:
    """Raises KeyError for what is no pair, such as a person and the own pet."""
    return _split_of()[made]


def total(kind: Kind) -> int:
    return sum(len(pairs(kind, split)) for split in SPLITS)


def allowed(split: Split) -> Callable[[Pair], bool]:
    """Whether a text of `split` may tell a pair that it is not built around: its own, and those of train."""
    known, usable = _split_of(), {"train", split}
    return lambda made: known.get(made) in usable


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
