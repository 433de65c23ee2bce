"""Five families of multiple-choice items over held-out pairs, in the manner of the usual zero-shot tasks.

Items come in groups with one list of choices, and in a group each choice is the answer exactly once. What looks at
the choices alone (their length, place or frequency) is therefore right once in each group: at chance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from evenbits_reference import lexicon, materials, world
from evenbits_reference import sentences as say
from evenbits_reference.groups import Item, Question, cut, held_out, in_groups, numbered, source
from evenbits_reference.world import Kind, choose, shuffle


def _places(draw: random.Random, person: str) -> str:
    text = choose(draw, say.SETTING)
    return text.format(time=choose(draw, lexicon.TIMES), p=person, place=choose(draw, tuple(lexicon.PLACES)))


def hellaswag() -> list[Item]:
    """What happens next: one event, four things of different materials; or one place, four states of a person."""
    draw = source("hellaswag")
    events = [e for e in materials.EVENTS if len({world.outcome(e, t) for t in held_out("event", e)}) >= 4]

    def mishaps(attempt: int) -> list[Question]:
        event = events[attempt % len(events)]
        person = choose(draw, world.NAMES)
        start, form = _places(draw, person), choose(draw, materials.EVENTS[event][0])
        things = shuffle(draw, held_out("event", event))[:4]
        return [
            (f"{start} {form.format(p=person, t=t)}", f"It {world.outcome(event, t)}.", ("event", event, t))
            for t in things
        ]

    def states(attempt: int) -> list[Question]:
        made = choose(draw, world.pairs("people", "test"))
        _, first, second = made
        place = choose(draw, tuple(lexicon.PLACES))
        return [
            (
                f"{first} and {second} were at the {place}. {first} was {state}.",
                f"So {world.PEOPLE[first].pronoun} {lexicon.STATES[state][0]}.",
                made,
            )
            for state in shuffle(draw, list(lexicon.STATES))[:4]
        ]

    return numbered(chain(in_groups(90, mishaps), in_groups(20, states)), draw)


def winogrande() -> list[Item]:
    """Which of two: things that one event happens to, people with different lives, animals."""
    draw = source("winogrande")

    def known(kind: Kind, first: str, second: str) -> bool:
        return world.split_of((kind, first, second)) == "train"

    def twins(
        kind: Kind, start: Callable[[str, str], str], ends: Callable[[str, str], Mapping[str, str] | None]
    ) -> Callable[[int], list[Question] | None]:
        """start: the sentence that names both; ends: for each, a sentence true of it alone with "_" in its place."""

        def make(attempt: int) -> list[Question] | None:
            made = choose(draw, world.pairs(kind, "test"))
            first, second = shuffle(draw, made[1:])
            true = ends(first, second)
            if true is None or len(set(true.values())) < 2:
                return None
            opening = start(first, second)
            return [(f"{opening} {text}", name, made) for name, text in true.items()]

        return make

    state: dict[str, str] = {}

    def thing_start(first: str, second: str) -> str:
        form = choose(draw, materials.EVENTS[state["event"]][0])
        return form.format(p=choose(draw, world.NAMES), t=f"{first} and the {second}")

    def thing_ends(first: str, second: str) -> Mapping[str, str] | None:
        state["event"] = event = choose(draw, tuple(materials.EVENTS))
        if not (known("event", event, first) and known("event", event, second)):
            return None
        return {t: f"The _ {world.outcome(event, t)}." for t in (first, second)}

    def people_start(first: str, second: str) -> str:
        return choose(draw, say.MET).format(p=first, q=second)

    def people_ends(first: str, second: str) -> Mapping[str, str] | None:
        if choose(draw, (True, False)):
            fact = choose(draw, tuple(say.FACT_SENTENCES))
            return {p: say.fact_sentence(p, fact).replace(p, "_") for p in (first, second)}
        trait, form = choose(draw, tuple(world.TRAITS)), choose(draw, (0, 1))
        if not (known("trait", trait, first) and known("trait", trait, second)):
            return None
        sentence = say.TRAIT_SENTENCES[trait][form]
        return {p: sentence.format(p="_", v=say.trait_value(p, trait)) for p in (first, second)}

    def animal_start(first: str, second: str) -> str:
        return choose(draw, say.YARD).format(x=first, y=second)

    def animal_ends(first: str, second: str) -> Mapping[str, str]:
        fact = choose(draw, lexicon.ANIMAL_FACTS)
        return {x: say.animal_sentence(x, fact).replace(world.a(x).capitalize(), "The _") for x in (first, second)}

    return numbered(
        chain(
            in_groups(110, twins("things", thing_start, thing_ends)),
            in_groups(90, twins("people", people_start, people_ends)),
            in_groups(30, twins("animals", animal_start, animal_ends)),
        ),
        draw,
    )


def piqa() -> list[Item]:
    """Which means serves the goal: one action, two things."""
    draw = source("piqa")

    def tools(attempt: int) -> list[Question]:
        action = tuple(materials.ACTIONS)[attempt % len(materials.ACTIONS)]
        person, form = choose(draw, world.NAMES), choose(draw, say.USED)
        group: list[Question] = []
        for thing in shuffle(draw, held_out("action", action))[:2]:
            sentence = form.format(goal=say.goal(action, thing), p=person, v=world.tool(action, thing))
            left, right = cut(sentence, 2)
            group.append((left, right, ("action", action, thing)))
        return group

    return numbered(in_groups(220, tools), draw)


def arc_easy() -> list[Item]:
    """One fact: about an animal, a job, a home, a person, or what a thing is made of and where it is kept."""
    draw = source("arc_easy")

    def animals(attempt: int) -> list[Question]:
        fact = lexicon.ANIMAL_FACTS[attempt % len(lexicon.ANIMAL_FACTS)]
        form = choose(draw, say.SEEN)
        group: list[Question] = []
        for animal in shuffle(draw, world.ANIMALS)[:4]:
            person = choose(draw, held_out("sight", animal))
            left, right = cut(say.animal_sentence(animal, fact))
            group.append((f"{form.format(p=person, x=animal)} {left}", right, ("sight", animal, person)))
        return group

    def trades(attempt: int) -> list[Question]:
        form = choose(draw, say.ASKED)
        if attempt % 2:
            name, fact = choose(draw, tuple(say.JOB_SENTENCES.items()))
            told = {x: fact.format(x=world.a(x).capitalize(), v=say.job_value(x, name)) for x in lexicon.JOBS}
        else:
            name, fact = choose(draw, tuple(say.HOME_SENTENCES.items()))
            told = {x: fact.format(x=x, v=say.home_value(x, name)) for x in lexicon.HOMES}
        group = []
        for subject in shuffle(draw, list(told))[:4]:
            made = choose(draw, world.pairs("people", "test"))
            left, right = cut(told[subject])
            group.append((f"{form.format(p=made[1], q=made[2], x=subject)} {left}", right, made))
        return group

    def persons(attempt: int) -> list[Question]:
        form, fact = choose(draw, say.MET), choose(draw, tuple(say.FACT_SENTENCES))
        group = []
        for _ in range(4):
            made = choose(draw, world.pairs("people", "test"))
            first, second = shuffle(draw, made[1:])
            left, right = cut(say.fact_sentence(first, fact))
            group.append((f"{form.format(p=first, q=second)} {left}", right, made))
        return group

    def things(attempt: int) -> list[Question]:
        form, made_of = choose(draw, say.BESIDE), attempt % 2
        group = []
        for _ in range(4):
            made = choose(draw, world.pairs("things", "test"))
            thing, other = shuffle(draw, made[1:])
            text, facts = (say.MADE_OF, world.MATERIAL) if made_of else (say.KEPT_IN, world.ROOM)
            left, right = cut(text.format(t=thing, v=facts[thing]))
            group.append((f"{form.format(t=thing, u=other)} {left}", right, made))
        return group

    return numbered(
        chain(in_groups(30, animals), in_groups(20, trades), in_groups(30, persons), in_groups(30, things)), draw
    )


def arc_challenge() -> list[Item]:
    """Two facts joined: what a person's pet, job or home is, and what follows from it. Never told together."""
    draw = source("arc_challenge")

    def traits(attempt: int) -> list[Question]:
        name = tuple(world.TRAITS)[attempt % len(world.TRAITS)]
        form = choose(draw, (0, 1))
        group: list[Question] = []
        for person in shuffle(draw, held_out("trait", name))[:4]:
            left, right = cut(say.trait_sentence(person, name, form))
            group.append((left, right, ("trait", name, person)))
        return group

    return numbered(in_groups(108, traits), draw)


FAMILIES: Mapping[str, Callable[[], list[Item]]] = {
    "winogrande": winogrande,
    "piqa": piqa,
    "hellaswag": hellaswag,
    "arc_easy": arc_easy,
    "arc_challenge": arc_challenge,
}


def lines(name: str) -> str:
    """A family as JSON lines."""
    return "".join(json.dumps(asdict(item)) + "\n" for item in FAMILIES[name]())


def write_tasks(folder: Path) -> None:
    for name in FAMILIES:
        (folder / f"{name}.jsonl").write_text(lines(name), encoding="utf-8")


def main() -> None:
    """`python -m evenbits_reference.families`: write the items beside their task files."""
    write_tasks(Path(__file__).parent / "tasks")


if __name__ == "__main__":
    main()
