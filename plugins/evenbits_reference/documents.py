"""Texts of the world: stories, fact paragraphs, and short texts in the forms that the items ask in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from evenbits_reference import lexicon, world
from evenbits_reference import sentences as say
from evenbits_reference.scenes import (
    after_event,
    animal_facts,
    both_things,
    event_sentence,
    facts_of,
    needs,
    setting,
    story,
    told_trait,
    used,
)
from evenbits_reference.teller import Document, Teller
from evenbits_reference.world import Split


def animal_paragraph(teller: Teller) -> list[str]:
    animal, person = teller.lead("sight")
    return [teller.pick(say.SEEN).format(p=person, x=animal), *animal_facts(teller, animal, teller.pick((2, 3, 4, 5)))]


def profile(teller: Teller) -> list[str]:
    """A person's facts, and what follows from them."""
    trait, person = teller.lead("trait")
    told = [told_trait(teller, person, trait)]
    others = [name for name in teller.may("trait", 0, person) if name != trait]
    told += [told_trait(teller, person, name) for name in teller.some(others, teller.pick((1, 2, 3)), as_set=True)]
    teller.same_text(len(told))  # any of these could have been the first
    told += teller.some(facts_of(person), teller.pick((2, 3, 4)), as_set=True)
    return teller.some(told, len(told))


def short_profile(teller: Teller) -> list[str]:
    trait, person = teller.lead("trait")
    told = told_trait(teller, person, trait)
    fact = facts_of(person)[("job", "home", "pet").index(world.TRAITS[trait][0])]
    return [told, fact] if teller.pick((True, False)) else [fact, told]


def thing_report(teller: Teller) -> list[str]:
    """What a thing is made of and what happens to it."""
    event, thing = teller.lead("event")
    person = teller.pick(world.NAMES)
    told = [f"{person} had {world.a(thing)}."]
    told += teller.some(
        [say.MADE_OF.format(t=thing, v=world.MATERIAL[thing]), say.KEPT_IN.format(t=thing, v=world.ROOM[thing])],
        teller.pick((1, 2)),
    )
    told += [event_sentence(teller, event, person, thing), after_event(event, thing)]
    other = teller.partner("event", 0, thing)
    if other != event:
        told += [
            "Another time it went like this.",
            event_sentence(teller, other, person, thing),
            after_event(other, thing),
        ]
    return told


def tool_report(teller: Teller) -> list[str]:
    action, thing = teller.lead("action")
    person = teller.pick(world.NAMES)
    told = [used(teller, action, person, thing)]
    if teller.pick((True, False)):
        told.append(say.MADE_OF.format(t=thing, v=world.MATERIAL[thing]))
    other = teller.partner("action", 0, thing)
    if other != action:
        told.append(used(teller, other, person, thing))
        teller.same_text(2)  # either could have been the first
    return teller.some(told, len(told))


def two_tools(teller: Teller) -> list[str]:
    action, thing = teller.lead("action")
    person = teller.pick(world.NAMES)
    told = [used(teller, action, person, thing)]
    other = teller.partner("things", 1, thing)
    return [*told, used(teller, teller.partner("action", 0, other), person, other)]


def two_things(teller: Teller) -> list[str]:
    pair = teller.lead("things")
    told = [teller.pick(say.BESIDE).format(t=pair[0], u=pair[1])]
    facts = [say.MADE_OF.format(t=thing, v=world.MATERIAL[thing]) for thing in pair]
    facts += [say.KEPT_IN.format(t=thing, v=world.ROOM[thing]) for thing in pair]
    return told + teller.some(facts, teller.pick((2, 3, 4)))


def two_things_event(teller: Teller) -> list[str]:
    first, second = teller.lead("things")
    person = teller.pick(world.NAMES)
    told = both_things(teller, person, first, second)
    if teller.pick((True, False)):
        told += both_things(teller, person, first, second)
    return told


def two_animals(teller: Teller) -> list[str]:
    first, second = teller.lead("animals")
    told = [teller.pick(say.YARD).format(x=first, y=second)]
    for _ in range(teller.pick((2, 3, 4))):
        animal = teller.pick((first, second))
        told.append(
            say.animal_sentence(animal, teller.pick(lexicon.ANIMAL_FACTS)).replace(
                world.a(animal).capitalize(), f"The {animal}"
            )
        )
    return told


def two_people(teller: Teller) -> list[str]:
    first, second = teller.lead("people")
    told = [teller.pick(say.MET).format(p=first, q=second)]
    for _ in range(teller.pick((2, 3, 4))):
        person = teller.pick((first, second))
        if teller.pick((True, False)):
            told.append(told_trait(teller, person, teller.partner("trait", 0, person)))
        else:
            told.append(say.fact_sentence(person, teller.pick(tuple(say.FACT_SENTENCES))))
    return told


def job_paragraph(teller: Teller) -> list[str]:
    first, second = teller.lead("people")
    job = teller.pick(tuple(lexicon.JOBS))
    told = [teller.pick(say.ASKED).format(p=first, q=second, x=job)]
    facts = [
        text.format(x=world.a(job).capitalize(), v=say.job_value(job, name)) for name, text in say.JOB_SENTENCES.items()
    ]
    return told + teller.some(facts, teller.pick((2, 3, 4)))


def home_paragraph(teller: Teller) -> list[str]:
    first, second = teller.lead("people")
    home = teller.pick(tuple(lexicon.HOMES))
    told = [teller.pick(say.ASKED).format(p=first, q=second, x=home)]
    facts = [text.format(x=home, v=say.home_value(home, name)) for name, text in say.HOME_SENTENCES.items()]
    return told + teller.some(facts, teller.pick((2, 3, 4)))


def two_needs(teller: Teller) -> list[str]:
    first, second = teller.lead("people")
    told = [f"{first} and {second} were at the {teller.pick(tuple(lexicon.PLACES))}."]
    for person in (first, second):
        told += needs(teller, person)
    return told


def mishap(teller: Teller) -> list[str]:
    event, thing = teller.lead("event")
    person = teller.pick(world.NAMES)
    told = [setting(teller, person), event_sentence(teller, event, person, thing), after_event(event, thing)]
    if teller.pick((True, False)):
        other = teller.partner("things", 1, thing)
        event = teller.partner("event", 0, other)
        told += [event_sentence(teller, event, person, other), after_event(event, other)]
    return told


FORMS: tuple[tuple[Callable[[Teller], list[str]], float], ...] = (
    (story, 0.25),
    (animal_paragraph, 0.05),
    (profile, 0.16),
    (short_profile, 0.06),
    (thing_report, 0.06),
    (tool_report, 0.06),
    (two_tools, 0.05),
    (two_things, 0.03),
    (two_things_event, 0.06),
    (two_animals, 0.03),
    (two_people, 0.07),
    (job_paragraph, 0.02),
    (home_paragraph, 0.02),
    (two_needs, 0.03),
    (mishap, 0.05),
)


def tell(split: Split, seed: int, index: int) -> Document:
    """Document `index` of an endless, random-access sequence."""
    teller = Teller(split, f"{world.VERSION} {split} {seed} {index}")
    return teller.document(teller.weighted(FORMS)(teller))


def tell_all(split: Split, seed: int = 0) -> Iterator[Document]:
    """Endless."""
    index = 0
    while True:
        yield tell(split, seed, index)
        index += 1


def generate(split: Split, *, documents: int, seed: int = 0) -> Iterator[str]:
    """The first `documents` texts of a split."""
    return (tell(split, seed, index).text for index in range(documents))
