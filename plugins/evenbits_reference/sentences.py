"""The sentences that stories, fact paragraphs and items share. A blank is always the end, or just before it."""

from __future__ import annotations

from evenbits_reference import lexicon, materials, world

# {v}: what is asked for; {x}: the animal, the job, the home; {p}: the person
ANIMAL_SENTENCES = {
    "sound": "{x} can {v}.",
    "food": "{x} likes to eat {v}.",
    "bed": "{x} sleeps in the {v}.",
    "cover": "{x} is covered with {v}.",
    "young": "{x} has young ones that are called {v}.",
    "gait": "{x} likes most of all to {v}.",
}
JOB_SENTENCES = {
    "workplace": "{x} works at the {v}.",
    "equipment": "{x} always needs the {v}.",
    "product": "{x} is asked for {v}.",
    "clothes": "{x} wears the {v}.",
}
HOME_SENTENCES = {
    "view": "Who lives near the {x} sees the {v}.",
    "noise": "Who lives near the {x} hears the {v}.",
    "plant": "Who lives near the {x} grows {v}.",
    "way": "Who lives near the {x} travels by {v}.",
}
TRAIT_SENTENCES = {
    "pet sound": ("The pet of {p} can {v}.", "When {p} comes home, the pet starts to {v}."),
    "pet food": ("The pet of {p} likes to eat {v}.", "Every day {p} gives the pet some {v}."),
    "pet bed": ("The pet of {p} sleeps in the {v}.", "At night {p} finds the pet in the {v}."),
    "pet cover": ("The pet of {p} is covered with {v}.", "When {p} pats the pet, the hand feels {v}."),
    "pet young": ("The pet of {p} was once one of the {v}.", "Soon {p} will see the pet with the {v}."),
    "job workplace": ("Every morning {p} goes to the {v}.", "All day {p} works at the {v}."),
    "job equipment": ("At work {p} always needs the {v}.", "In the work of {p} nothing is done without the {v}."),
    "job product": ("People come to {p} for {v}.", "Everybody asks {p} for {v}."),
    "job clothes": ("For the work {p} puts on the {v}.", "At work {p} wears the {v}."),
    "home view": ("From the window {p} sees the {v}.", "In the distance {p} looks at the {v}."),
    "home noise": ("In the evening {p} hears the {v}.", "At home {p} listens to the {v}."),
    "home plant": ("At the door of {p} there grow {v}.", "In the spring {p} plants {v}."),
    "home way": ("To come to town, {p} takes the {v}.", "When {p} is in a hurry, there is always the {v}."),
}
FACT_SENTENCES = {
    "instrument": "{p} plays the {v}.",
    "month": "{p} was born in {v}.",
    "dish": "{p} likes best to eat {v}.",
}
MADE_OF = "The {t} is made of {v}."
KEPT_IN = "The {t} is kept in the {v}."
USED = ("To {goal}, {p} used the {v}.", "To {goal}, {p} asked for the {v}.")
SEEN = ("{p} looked at the {x}.", "{p} stood near the {x}.", "{p} had a picture of the {x}.")
ASKED = ("{p} asked {q} about the {x}.", "{p} told {q} about the {x}.")
MET = ("{p} and {q} sat together.", "{p} wrote to {q}.", "{p} and {q} went for a walk.")
YARD = ("The {x} and the {y} were in the yard.", "The {x} ran after the {y}.")
BESIDE = ("The {t} lay beside the {u}.", "The {t} stood behind the {u}.")
SETTING = ("{time} {p} was at the {place}.", "{time} {p} came to the {place}.")


def fact_sentence(person: str, fact: str) -> str:
    return FACT_SENTENCES[fact].format(p=person, v=getattr(world.PEOPLE[person], fact))


def goal(action: str, thing: str) -> str:
    """A verb phrase without "to"."""
    return materials.ACTIONS[action][0].format(t=thing)


def animal_value(animal: str, fact: str) -> str:
    return lexicon.ANIMALS[animal][lexicon.ANIMAL_FACTS.index(fact)]


def job_value(job: str, fact: str) -> str:
    return lexicon.JOBS[job][lexicon.JOB_FACTS.index(fact)]


def home_value(home: str, fact: str) -> str:
    return lexicon.HOMES[home][lexicon.HOME_FACTS.index(fact)]


def young(value: str) -> str:
    """Plural of a young one: calf, calves; pup, pups."""
    irregular = {"calf": "calves", "puppy": "puppies", "bunny": "bunnies"}
    return irregular.get(value) or (f"{value}es" if value.endswith("ch") else f"{value}s")


def animal_sentence(animal: str, fact: str) -> str:
    value = animal_value(animal, fact)
    subject = world.a(animal)
    return ANIMAL_SENTENCES[fact].format(
        x=subject[0].upper() + subject[1:], v=young(value) if fact == "young" else value
    )


def trait_value(person: str, trait: str) -> str:
    value = world.trait(person, trait)
    return young(value) if trait == "pet young" else value


def trait_sentence(person: str, trait: str, form: int) -> str:
    return TRAIT_SENTENCES[trait][form].format(p=person, v=trait_value(person, trait))
