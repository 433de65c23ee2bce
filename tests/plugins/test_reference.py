"""The embedded reference: its world, its splits, its items, its model."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evenbits.measure import Text
from evenbits.sampling import overlap
from evenbits_reference import FOLDER, lexicon, materials, provide_corpora, provide_models, world
from evenbits_reference import sentences as say
from evenbits_reference.documents import FORMS, generate, tell
from evenbits_reference.families import FAMILIES, lines
from evenbits_reference.groups import Item
from evenbits_reference.world import SPLITS, Split

CARD = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")


def figure(label: str) -> float:
    """The number that the model card's table gives in the row of `label`."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", CARD, re.M)
    return float(row.split("|")[0].strip().rstrip("%"))


def read(**options: Any) -> Text:
    (corpus,) = provide_corpora()
    return corpus.read(corpus.options(**options))


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    return {name: make() for name, make in FAMILIES.items()}


# the world


def test_texts_are_the_same_on_every_run() -> None:
    """Pinned: what the committed model was trained on, and the perplexity that records hold, must not drift."""
    assert read(split="train", documents=500).identity["sha256"] == "8abe91efcfc7b2d0"
    assert read(split="test", documents=500).identity["sha256"] == "763c97cc63497b2c"


def test_a_document_does_not_depend_on_the_ones_before() -> None:
    assert list(generate("train", documents=40, seed=3))[-1] == tell("train", 3, 39).text
    assert tell("train", 3, 39) != tell("train", 4, 39)
    assert tell("train", 3, 39) != tell("validation", 3, 39)


def test_shares_of_the_forms_add_up() -> None:
    assert sum(share for _, share in FORMS) == pytest.approx(1)


def test_there_are_one_to_two_thousand_words() -> None:
    words = {word for text in generate("train", documents=20_000) for word in re.findall(r"[a-z]+", text.lower())}
    assert 1000 <= len(words) <= 2000
    assert {thing for things in materials.THINGS_OF.values() for thing in things} <= words
    assert {part.lower() for name in world.NAMES for part in name.split()} <= words


def test_the_word_for_a_thing_means_nothing_else() -> None:
    used: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, str):
            used.update(re.findall(r"[a-z]+", value.lower()))
        elif isinstance(value, dict):
            walk(list(value.items()))
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)

    for module in (lexicon, materials, say):
        for name, value in vars(module).items():
            if name.isupper() and name != "THINGS_OF":
                walk(value)
    assert not used & set(world.THINGS)
    assert len(world.THINGS) == len(set(world.THINGS)) == sum(map(len, materials.THINGS_OF.values()))


@pytest.mark.parametrize("kind", world.COMPONENTS)
def test_each_component_keeps_most_of_its_pairs_in_train(kind: world.Kind) -> None:
    """Else a held-out pair could not be worked out from its parts."""
    told: Counter[str] = Counter(name for _, *both in world.pairs(kind, "train") for name in both)
    every: Counter[str] = Counter(name for split in SPLITS for _, *both in world.pairs(kind, split) for name in both)
    for name, count in every.items():
        assert told[name] >= 0.6 * count


def test_every_rule_is_told_in_train() -> None:
    told = {
        (key, world.MATERIAL[thing]) for kind in ("event", "action") for _, key, thing in world.pairs(kind, "train")
    }
    assert told == {
        (key, material) for key in (*materials.EVENTS, *materials.ACTIONS) for material in materials.THINGS_OF
    }


def test_a_pair_belongs_to_one_split() -> None:
    for kind in world.COMPONENTS:
        parts = [world.pairs(kind, split) for split in SPLITS]
        assert len({pair for part in parts for pair in part}) == world.total(kind) == sum(map(len, parts))
        assert world.total(kind) > 300
        assert len(parts[2]) / world.total(kind) == pytest.approx(0.14, abs=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_is_built_around_a_pair_of_its_split(split: Split) -> None:
    """And tells beside it only pairs of the same split or of train."""
    for index in range(2000):
        document = tell(split, 1, index)
        assert world.split_of(document.pairs[0]) == split
        assert {world.split_of(pair) for pair in document.pairs} <= {split, "train"}


def together(text: str) -> set[world.Pair]:
    """The pairs of things, people, animals and sights whose words stand in one text, whatever the text says it tells.

    A person and the own pet is no pair; neither are the animals of a text that only says what pets people have.
    """
    words = set(re.findall(r"\b[a-z]+", text))
    people = sorted(set(re.findall(_NAME, text)))
    pets = set(re.findall(r"has an? (\w+) as a pet", text))
    animals = sorted(words & set(world.ANIMALS) - pets)
    pairs: set[world.Pair] = {("things", *both) for both in combinations(sorted(words & set(world.THINGS)), 2)}
    pairs |= {("people", *both) for both in combinations(people, 2)}
    pairs |= {("animals", *both) for both in combinations(animals, 2)}
    if len(people) == 1:  # with two, the text does not show who sees what
        pairs |= {("sight", animal, people[0]) for animal in animals}
    return pairs


_NAME = re.compile("|".join(sorted(world.NAMES)))


def test_no_train_text_holds_the_words_of_a_held_out_pair() -> None:
    for text in generate("train", documents=5000, seed=2):
        for pair in together(text):
            assert world.split_of(pair) == "train", (pair, text)


def test_what_is_told_is_what_the_choices_cost() -> None:
    """Nats are positive, and a longer text costs more on the whole."""
    told = [tell("train", 0, index) for index in range(500)]
    assert min(document.nats for document in told) > 8  # at least a form, a pair and a sentence form
    told.sort(key=lambda document: len(document.text))
    assert sum(d.nats for d in told[:100]) < sum(d.nats for d in told[-100:]) / 2


def test_held_out_choices_cost_as_if_nothing_were_held_out() -> None:
    costs = [sum(tell(split, 0, index).nats for index in range(3000)) / 3000 for split in SPLITS]
    assert max(costs) / min(costs) < 1.05


# the corpus


def test_calibration_text_is_not_test_text() -> None:
    train, test = read(split="train", documents=1500), read(split="test", documents=1500)
    assert overlap(train.documents, test.joined()) < 0.03
    assert train.identity != test.identity


def test_corpus_options() -> None:
    assert len(read().documents) == 2000
    assert read(documents=5).documents == read(documents=9).documents[:5]
    assert read(documents=5, seed=1).documents != read(documents=5).documents
    with pytest.raises(ValidationError, match="split"):
        read(split="all")


# the items


def test_committed_items_are_those_that_the_world_gives() -> None:
    for name in FAMILIES:
        assert (FOLDER / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8") == lines(name), (
            "python -m evenbits_reference.families"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_items_are_about_held_out_pairs(items: dict[str, list[Item]], name: str) -> None:
    assert len(items[name]) >= 400
    assert len({(item.context, item.choices) for item in items[name]}) == len(items[name])
    for item in items[name]:
        assert world.split_of(item.pair) == "test"
        told = " ".join((item.context, *item.choices))
        if item.pair[0] in {"sight", "things", "people", "animals"}:
            assert item.pair[1] in told
        assert item.pair[2] in told


@pytest.mark.parametrize("name", FAMILIES)
def test_in_a_group_each_choice_is_right_once(items: dict[str, list[Item]], name: str) -> None:
    groups: dict[int, list[Item]] = defaultdict(list)
    for item in items[name]:
        groups[item.group].append(item)
    for group in groups.values():
        assert len({item.choices for item in group}) == 1
        assert sorted(item.answer for item in group) == list(range(len(group[0].choices)))
        assert len(set(group[0].choices)) == len(group[0].choices)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def best(item: Item, score: Callable[[str], float]) -> int:
    values = [score(choice) for choice in item.choices]
    return values.index(max(values))


def by_prior(items: Sequence[Item]) -> Callable[[Item], int]:
    """The choice that is most often the answer elsewhere: of all other items, as often as it stands there."""
    right = Counter(item.choices[item.answer] for item in items)
    shown = Counter(choice for item in items for choice in item.choices)

    def pick(item: Item) -> int:
        own = item.choices[item.answer]
        return best(item, lambda choice: (right[choice] - (choice == own)) / max(1, shown[choice] - 1))

    return pick


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("baseline", ["longest", "shortest", "first", "last", "overlap", "little overlap", "recent"])
def test_what_reads_no_meaning_is_at_chance(items: dict[str, list[Item]], name: str, baseline: str) -> None:
    picks: dict[str, Callable[[Item], int]] = {
        "longest": lambda item: best(item, len),
        "shortest": lambda item: best(item, lambda choice: -len(choice)),
        "first": lambda item: 0,
        "last": lambda item: len(item.choices) - 1,
        "overlap": lambda item: best(item, lambda choice: len(words_of(choice) & words_of(item.context))),
        "little overlap": lambda item: best(item, lambda choice: -len(words_of(choice) & words_of(item.context))),
        "recent": lambda item: best(item, lambda choice: item.context.rfind(choice)),
    }
    chance = 1 / len(items[name][0].choices)
    found = sum(picks[baseline](item) == item.answer for item in items[name]) / len(items[name])
    assert found == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_alone_tell_nothing(items: dict[str, list[Item]], name: str) -> None:
    """Every string is the answer exactly as often as its share of the places, so that no prior over strings helps."""
    size = len(items[name][0].choices)
    right = Counter(item.choices[item.answer] for item in items[name])
    shown = Counter(choice for item in items[name] for choice in item.choices)
    assert all(right[choice] * size == count for choice, count in shown.items())
    pick = by_prior(items[name])
    assert sum(pick(item) == item.answer for item in items[name]) / len(items[name]) <= 1 / size + 0.05


def test_lm_eval_reads_the_items(items: dict[str, list[Item]]) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    manager = tasks.TaskManager(include_path=str(FOLDER / "tasks"), include_defaults=False)
    names = [f"reference_{name}" for name in FAMILIES]
    assert sorted(manager.all_tasks) == sorted(names)
    found = manager.load(names)["tasks"]
    for name in FAMILIES:
        task, item = found[f"reference_{name}"], items[name][1]
        documents = list(task.eval_docs)
        assert len(documents) == len(items[name])
        task.build_all_requests(limit=2, rank=0, world_size=1)
        asked = [instance.args for instance in task.instances if instance.doc_id == 1]
        from evenbits_reference.score import candidates

        assert asked == candidates(item)


# the model


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(provide_models()["reference"], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(provide_models()["reference"])


def test_the_model_is_small_and_bf16(model: Any) -> None:
    from safetensors import safe_open

    folder = provide_models()["reference"]
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, framework="pt") as opened:
        kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  (not a dict)
    assert kinds == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (192, 6, 2048)
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    linear = [module for name, module in model.named_modules() if "layers" in name and hasattr(module, "in_features")]
    assert {module.in_features % 64 for module in linear} == {0}


def test_the_tokenizer_is_the_one_trained_on_the_world(tokenizer: Any) -> None:
    from evenbits_reference.tokenizing import train_tokenizer

    again = train_tokenizer()
    assert len(tokenizer) == 2048
    assert again.get_vocab() == tokenizer.get_vocab()
    text = tell("test", 0, 0).text
    ids = tokenizer(text)["input_ids"]
    assert ids == again(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_joined_texts_begin_with_a_start_token(tokenizer: Any) -> None:
    text = read(documents=7)
    ids = tokenizer(text.joined())["input_ids"]
    assert ids == [token for document in text.documents for token in tokenizer(document)["input_ids"]]


def test_perplexity_is_what_the_card_says(model: Any, tokenizer: Any) -> None:
    from evenbits_reference.score import losses

    found = losses(model, tokenizer, "test", 400)
    assert found["perplexity"] == pytest.approx(figure("perplexity, test, 400 texts"), rel=0.01)
    assert found["generator_perplexity"] == pytest.approx(figure("generator, test, 400 texts"), rel=0.001)
    assert found["perplexity"] < 1.15 * found["generator_perplexity"]


@pytest.mark.parametrize("name", FAMILIES)
def test_accuracy_is_what_the_card_says(model: Any, tokenizer: Any, items: dict[str, list[Item]], name: str) -> None:
    from evenbits_reference.score import right

    chosen = [item for item in items[name] if item.group % 2 == 0]
    accuracy = sum(right(model, tokenizer, chosen)) / len(chosen)
    assert accuracy == pytest.approx(figure(f"reference_{name}") / 100, abs=0.06)
    assert accuracy > (0.85 if name != "arc_challenge" else 0.40)


def test_the_log_says_how_the_model_was_made() -> None:
    rows = [json.loads(row) for row in (FOLDER / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["command"].startswith("python -m evenbits_reference.train")
    assert rows[0]["seed"] == 0
    assert rows[-1]["spent"] == 1.0
    assert rows[-1]["validation_loss"] < rows[1]["validation_loss"]


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps, or a stop after three and the same command again: the same weights."""
    torch = pytest.importorskip("torch")
    from evenbits_reference import train

    monkeypatch.setattr(train, "CHUNK", 10)
    monkeypatch.setattr(train, "validation", lambda model, tokenizer: {})

    def run(name: str) -> None:
        train.train(tmp_path / name, None, 5 * 512, seed=1, batch=512, save_every=0.0)

    run("whole")
    save = train.save_checkpoint

    def save_and_stop(path: Path, model: Any, optimizer: Any, progress: train.Progress) -> None:
        save(path, model, optimizer, progress)
        if progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(train, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    run("stopped")
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped")]
    assert [state["progress"]["step"] for state in states] == [5, 5]
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], tensor, rtol=0, atol=0)
    rows = [json.loads(row) for row in (tmp_path / "stopped" / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5]  # each run begins with a row on how it was made
