"""Trials are known by what determines their result, and by nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from evenbits import provenance
from evenbits.environment import package_version

ENTRIES = """[
    { name = "rtn", budget = "free", options.bits = 3 },
    { name = "gptq", budget = "free" },
    { name = "kmeans", budget = "free" },
    { name = "trouble", budget = "free" },
]"""
ALL = {"dense", "rtn", "gptq", "kmeans", "trouble"}


@pytest.fixture(autouse=True)
def _no_cached_digests() -> None:
    for cached in vars(provenance).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def changed(here: Any, before: str, after: str, what: str = "id") -> set[str]:
    """Labels of the trials (or artifacts) that differ between two suites."""
    one, two = ({trial.label: getattr(trial, what) for trial in here.plan(text).trials} for text in (before, after))
    assert one.keys() == two.keys() == ALL
    return {label for label in one if one[label] != two[label]}


@pytest.mark.parametrize(("old", "new", "trials", "artifacts"), [
    ("options.bits = 3", "options.bits = 4", {"rtn"}, {"rtn"}),
    ("samples = 4", "samples = 5", {"gptq"}, {"gptq"}),
    ("options.context = 32", "options.context = 16", ALL, set()),
    ("seeds = [0]", "seeds = [7]", ALL, {"rtn", "gptq", "kmeans", "trouble"}),
    ('dtype = "float32"', 'dtype = "bfloat16"', ALL, ALL - {"dense"}),
    ('name = "tiny"\nmodel', 'name = "other"\nmodel', set(), set()),
    ('name = "tiny"\nmodel', 'name = "tiny"\ndescription = "words"\nmodel', set(), set()),
    ("seeds = [0]", "seeds = [0]\nlimits = { workers = 3, timeout_seconds = 9 }", set(), set()),
])  # fmt: skip
def test_what_changes_a_trial(
    here: Any, suites: Any, old: str, new: str, trials: set[str], artifacts: set[str]
) -> None:
    text = suites.text(ENTRIES, top="seeds = [0]")
    assert old in text
    assert changed(here, text, text.replace(old, new, 1)) == trials
    assert changed(here, text, text.replace(old, new, 1), "artifact") == artifacts


def test_where_the_model_lies_changes_nothing(here: Any, suites: Any, own_model: Path) -> None:
    assert changed(here, suites.text(ENTRIES), suites.text(ENTRIES, model=own_model)) == set()
    (own_model / "README.md").write_text("words")
    assert changed(here, suites.text(ENTRIES), suites.text(ENTRIES, model=own_model)) == set()


def test_one_bit_of_the_model_changes_every_trial(here: Any, suites: Any, own_model: Path) -> None:
    file = own_model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert changed(here, suites.text(ENTRIES), suites.text(ENTRIES, model=own_model)) == ALL
    assert changed(here, suites.text(ENTRIES), suites.text(ENTRIES, model=own_model), "artifact") == ALL - {"dense"}


def test_where_a_protocols_text_lies_changes_nothing(here: Any, suites: Any, tiny: Any) -> None:
    """An option of the evaluator's that becomes part of a corpus is known by what the text says, too."""
    texts = [here.folder / name / "wiki.test.txt" for name in ("one", "two")]
    suite = suites.text(ENTRIES)
    corpus = f'options.corpus = {{ name = "text", path = "{tiny.test}" }}'
    assert corpus in suite
    for path in texts:
        path.parent.mkdir()
        shutil.copy(tiny.test, path)
    first, second = (
        suite.replace(corpus, f'options.protocol = "wikitext2"\noptions.path = "{path}"') for path in texts
    )
    assert changed(here, first, second) == set()
    assert changed(here, suite, first) == ALL


def test_what_the_texts_say_changes_trials(here: Any, suites: Any, tiny: Any) -> None:
    for path, trials, artifacts in ((tiny.train, {"gptq"}, {"gptq"}), (tiny.test, ALL, set())):
        copy = here.folder / path.name
        shutil.copy(path, copy)
        text = suites.text(ENTRIES).replace(str(path), str(copy))
        first = {trial.label: trial for trial in here.plan(text).trials}
        copy.write_text(copy.read_text() + " w1")
        second = {trial.label: trial for trial in here.plan(text).trials}
        assert {name for name in first if first[name].id != second[name].id} == trials
        assert {name for name in first if first[name].artifact != second[name].artifact} == artifacts


def test_the_source_of_a_plugin_changes_its_trials(
    here: Any, suites: Any, trouble_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids() -> dict[str, str]:
        return {trial.label: trial.artifact for trial in here.plan(suites.text(ENTRIES)).trials}

    module = trouble_path / "evenbits_trouble.py"
    source = module.read_text()
    before = ids()
    try:
        module.write_text(source + "\n# a change\n")
        for cached in vars(provenance).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        after = ids()
    finally:
        module.write_text(source)
    assert {label for label in before if before[label] != after[label]} == {"trouble"}


def test_seeds_count_only_where_they_matter(here: Any, suites: Any) -> None:
    plan = here.plan(suites.text(ENTRIES, top="seeds = [0, 1, 2]"))
    counts = {label: sum(trial.label == label for trial in plan.trials) for label in ALL}
    assert counts == {"dense": 1, "rtn": 1, "trouble": 1, "gptq": 3, "kmeans": 3}
    assert len({trial.id for trial in plan.trials}) == len(plan.trials)


def test_the_same_entry_twice_is_one_trial(here: Any, suites: Any) -> None:
    entry = '{ name = "rtn", budget = "free" }'
    assert len(here.plan(suites.text(f"[{entry}, {entry}]", top="seeds = [3]")).trials) == 2


def test_a_thousand_trials(here: Any, suites: Any) -> None:
    plan = here.plan(suites.text('["gptq"]', top=f"budgets = [4.5]\nseeds = {list(range(1000))}"))
    assert len(plan.trials) == len({trial.id for trial in plan.trials}) == len(set(plan.order)) == 1001


def test_predictions_need_no_torch(here: Any, suites: Any) -> None:
    import subprocess
    import sys

    (here.folder / "suite.toml").write_text(suites.text())
    code = (
        "import sys; from pathlib import Path; from evenbits.plugins import load_plugins;"
        "from evenbits.suite import read_suite; from evenbits.plan import make_plan; r = load_plugins();"
        f"p = make_plan(read_suite(Path({str(here.folder / 'suite.toml')!r}), r), r);"
        "assert len(p.trials) == 5; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_version_of_an_evaluators_library_changes_trials(
    here: Any, suites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = """[[evaluators]]
name = "lm-eval"
options = { folder = "package:evenbits_reference/tasks", tasks = ["reference_piqa"] }"""
    text = suites.text(ENTRIES, tables=table)
    first = {trial.label: trial.id for trial in here.plan(text).trials}
    versions = {"lm-eval": "0.0.1"}
    monkeypatch.setattr("evenbits.plan.package_version", lambda name: versions.get(name, package_version(name)))
    assert all(first[trial.label] != trial.id for trial in here.plan(text).trials)
    versions = {"peft": "0.0.1"}  # which nothing here asks
    assert {trial.label: trial.id for trial in here.plan(text).trials} == first
