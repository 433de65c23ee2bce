"""The parts of a text, each of a sentence or a few, and the stories that are put together from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evenbits_reference import lexicon, materials, world
from evenbits_reference import sentences as say
from evenbits_reference.teller import Teller
from evenbits_reference.world import Kind


def facts_of(person: str) -> list[str]:
    """What a person is, where they live, what pet they have; and what follows from none of these."""
    known = world.PEOPLE[person]
    return [
        f"{person} is {world.a(known.job)}.",
        f"{person} lives near the {known.home}.",
        f"{person} has {world.a(known.pet)} as a pet.",
        *(say.fact_sentence(person, fact) for fact in say.FACT_SENTENCES),
    ]


def setting(teller: Teller, person: str) -> str:
    return teller.pick(say.SETTING).format(
        time=teller.pick(lexicon.TIMES), p=person, place=teller.pick(tuple(lexicon.PLACES))
    )


def event_sentence(teller: Teller, event: str, person: str, thing: str) -> str:
    """thing: a noun, or two as "cup and the hat". Says nothing of what comes of it."""
    return teller.pick(materials.EVENTS[event][0]).format(p=person, t=thing)


def after_event(event: str, thing: str) -> str:
    return f"It {world.outcome(event, thing)}."


def both_things(teller: Teller, person: str, first: str, second: str) -> list[str]:
    """One event that happens to two things, and what becomes of each."""
    fits = set(teller.may("event", 0, first)) & set(teller.may("event", 0, second))
    event = teller.fitting(tuple(materials.EVENTS), lambda name: name in fits)
    for thing in (first, second):
        teller.told("event", event, thing)
    told = [event_sentence(teller, event, person, f"{first} and the {second}")]
    return told + [f"The {thing} {world.outcome(event, thing)}." for thing in teller.some((first, second), 2)]


def used(teller: Teller, action: str, person: str, thing: str) -> str:
    goal = say.goal(action, thing)
    return teller.pick(say.USED).format(goal=goal, p=person, v=world.tool(action, thing))


def told_trait(teller: Teller, person: str, trait: str) -> str:
    teller.told("trait", trait, person)
    return say.trait_sentence(person, trait, teller.pick((0, 1)))


def animal_facts(teller: Teller, animal: str, count: int) -> list[str]:
    return [say.animal_sentence(animal, fact) for fact in teller.some(lexicon.ANIMAL_FACTS, count)]


def needs(teller: Teller, person: str) -> list[str]:
    """A state, what is done about it, and sometimes why."""
    state = teller.pick(tuple(lexicon.STATES))
    deed, reason = lexicon.STATES[state]
    told = [f"{person} was {state}.", f"So {world.PEOPLE[person].pronoun} {deed}."]
    return [*told, f"{reason.capitalize()}."] if teller.pick((True, False)) else told


class Cast:
    """Who and what a story may be about. Any two of one kind may be told together; who is told is paid for."""

    def __init__(self, teller: Teller, drawn: dict[str, tuple[str, float]]) -> None:
        self._teller = teller
        self._drawn = drawn

    def _take(self, part: str) -> str:
        name, cost = self._drawn[part]
        self._teller.nats += cost
        self._drawn[part] = name, 0.0
        return name

    @property
    def person(self) -> str:
        return self._take("person")

    @property
    def friend(self) -> str:
        return self._take("friend")

    @property
    def thing(self) -> str:
        return self._take("thing")

    @property
    def other(self) -> str:
        return self._take("other")

    @property
    def animal(self) -> str:
        return self._take("animal")


# which place in the cast the two components of a kind take
_PARTS: dict[Kind, tuple[str | None, str]] = {
    "event": (None, "thing"),
    "action": (None, "thing"),
    "trait": (None, "person"),
    "sight": ("animal", "person"),
    "things": ("thing", "other"),
    "people": ("person", "friend"),
}


def _cast(teller: Teller, kind: Kind, pair: tuple[str, str]) -> Cast:
    drawn = {part: (name, 0.0) for part, name in zip(_PARTS[kind], pair, strict=True) if part is not None}

    def draw(part: str, options: Sequence[str], out_of: int) -> str:
        if part not in drawn:
            drawn[part] = teller.draw(options, out_of)
        return drawn[part][0]

    person = draw("person", world.NAMES, len(world.NAMES))
    thing = draw("thing", world.THINGS, len(world.THINGS))
    draw("friend", teller.may("people", 1, person), len(world.NAMES) - 1)
    draw("other", teller.may("things", 1, thing), len(world.THINGS) - 1)
    draw("animal", teller.may("sight", 0, person), len(world.ANIMALS) - 1)
    return Cast(teller, drawn)


def _mishap(teller: Teller, cast: Cast, event: str | None = None) -> list[str]:
    event = event or teller.partner("event", 0, cast.thing)
    size = teller.pick(lexicon.SIZES)
    owned = f"There was {world.a(size)} {teller.pick(lexicon.COLORS)} {cast.thing}."
    return [owned, event_sentence(teller, event, cast.person, cast.thing), after_event(event, cast.thing)]


def _work(teller: Teller, cast: Cast, action: str | None = None) -> list[str]:
    action = action or teller.partner("action", 0, cast.thing)
    kept = say.KEPT_IN.format(t=cast.thing, v=world.ROOM[cast.thing])
    return [kept, used(teller, action, cast.person, cast.thing)]


def _habit(teller: Teller, cast: Cast, trait: str | None = None) -> list[str]:
    return [told_trait(teller, cast.person, trait or teller.partner("trait", 0, cast.person))]


def _sight(teller: Teller, cast: Cast) -> list[str]:
    teller.told("sight", cast.animal, cast.person)
    return [teller.pick(say.SEEN).format(p=cast.person, x=cast.animal), *animal_facts(teller, cast.animal, 1)]


def _both(teller: Teller, cast: Cast) -> list[str]:
    teller.told("things", cast.thing, cast.other)
    return both_things(teller, cast.person, cast.thing, cast.other)


def _meeting(teller: Teller, cast: Cast) -> list[str]:
    teller.told("people", cast.person, cast.friend)
    mood = teller.pick(lexicon.MOODS)
    return [
        teller.pick(say.MET).format(p=cast.person, q=cast.friend),
        f"{cast.friend} was {mood}.",
        told_trait(teller, cast.friend, teller.partner("trait", 0, cast.friend)),
    ]


def _need(teller: Teller, cast: Cast) -> list[str]:
    return needs(teller, cast.person)


def _outing(teller: Teller, cast: Cast) -> list[str]:
    place = teller.pick(tuple(lexicon.PLACES))
    seen, done = lexicon.PLACES[place]
    pronoun = world.PEOPLE[cast.person].pronoun.capitalize()
    return [f"{cast.person} went to the {place} and saw {seen}.", f"{pronoun} liked to {done}."]


Scene = Callable[[Teller, Cast], list[str]]
_OWN: dict[Kind, Callable[..., list[str]]] = {
    "event": _mishap,
    "action": _work,
    "trait": _habit,
    "sight": _sight,
    "things": _both,
    "people": _meeting,
}


def story(teller: Teller) -> list[str]:
    """Weather, a person, two to four scenes, an end."""
    kind = teller.pick(tuple(_OWN))
    pair = teller.lead(kind)
    cast = _cast(teller, kind, pair)
    own = _OWN[kind](teller, cast, pair[0]) if _PARTS[kind][0] is None else _OWN[kind](teller, cast)
    chosen: list[Scene] = [scene for key, scene in _OWN.items() if key != kind] + [_need, _outing]
    others = teller.some(chosen, teller.pick((1, 2, 3)), as_set=True)
    teller.same_text(1 + sum(scene in _OWN.values() for scene in others))  # the story could be built around any of them
    parts = [own, *(scene(teller, cast) for scene in others)]
    start = [setting(teller, cast.person)]
    if teller.pick((True, False)):
        start.append(teller.pick(lexicon.WEATHER))
    start.append(teller.pick(facts_of(cast.person)))
    told = [sentence for part in teller.some(parts, len(parts)) for sentence in part]
    return [*start, *told, teller.pick(lexicon.ENDINGS)]
