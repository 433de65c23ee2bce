"""Suites with mistakes: one line that names file, line, key and what is near; nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evenbits.errors import EvenbitsError, SuiteError
from evenbits.plugins import load_plugins
from evenbits.suite import ModelSpec, Suite, locate, read_suite

BUDGETS = "budgets = [4.5]"


def refused(here: Any, text: str, *, plan: bool = False) -> str:
    """The one line that a suite is refused with."""
    with pytest.raises(SuiteError) as caught:
        here.plan(text) if plan else here.read(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.parametrize(("old", "new", "at", "said"), [
    ("samples = 4", "sampels = 4", "sampels", 'calibration.sampels: unknown key; did you mean "samples"?'),
    ('dtype = "float32"', 'dtipe = "float32"', "dtipe", 'dtipe: unknown key; did you mean "dtype"?'),
    ("samples = 4", 'samples = "four"', "samples", "calibration.samples: "),
    ("samples = 4", "samples = 0", "samples", "(got 0)"),
    ('dtype = "float32"', 'dtype = "float8"', "dtype", "(got 'float8')"),
    ('"rtn"', '"rtm"', "rtm", "unknown method 'rtm'; did you mean \"rtn\"?"),
    ('"rtn"', '{ name = "rtn", options.bots = 3 }', "bots", 'options.bots: unknown option; did you mean "bits"?'),
    (
        '"rtn"',
        '{ name = "aqlm", options.tuning.epoch = 3 }',
        "epoch",
        'options.tuning.epoch: unknown option; did you mean "epochs"?',
    ),
    ('"rtn"', '{ name = "rtn", options.bits = "x" }', "bits", "options.bits: "),
    ('"rtn"', '{ name = "rtn", options.bits = 99 }', "bits", "(got 99)"),
    ('"rtn"', '{ name = "rtn", recovery = ["lara"] }', "lara", "unknown recovery stage 'lara'"),
    ('name = "perplexity"', 'name = "perplexety"', "perplexety", 'did you mean "perplexity"?'),
    ("options.context = 32", "options.contxt = 32", "contxt", 'unknown option; did you mean "context"?'),
    ("budgets = [4.5]", 'budgets = [4.5, "x"]', "budgets", "budgets.1"),
    ("budgets = [4.5]", "budgets = [{ centre = 1, window = 2 }]", "budgets", "window"),
    ("budgets = [4.5]", "budgets = [0.04]", "budgets", "window"),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = []", "seeds", "seeds: "),
    ("budgets = [4.5]", 'budgets = [4.5]\nexecutor = "slrum"', "executor", "unknown executor 'slrum'"),
    ("budgets = [4.5]", "budgets = [4.5]\nplugins.hardwear.x = 1", "hardwear", 'did you mean "hardware"?'),
    ("budgets = [4.5]", "", "", "no budgets"),
    ("budgets = [4.5]", 'budgets = ["4.25"]', "budgets",
     "budgets.0: expected a number of bits, or a table with centre and window (got '4.25')"),
    ("budgets = [4.5]", 'budgets = "4.25"', "budgets", "budgets: expected a list (got '4.25')"),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = 3", "seeds", "seeds: expected a list (got 3)"),
    ("budgets = [4.5]", "budgets = [4.5]\nplugins = 3", "plugins", "plugins: expected a table (got 3)"),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = [0, -1]", "seeds", "seeds.1: "),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = [9223372036854775807, 9223372036854775808]", "seeds", "seeds.1: "),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = [true]", "seeds", "seeds.0: "),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = [1.0]", "seeds", "seeds.0: "),
    ("budgets = [4.5]", "budgets = [4.5]\nseeds = [3, 0, 3]", "seeds", "seeds: the same seed twice in [3, 0, 3]"),
    ("budgets = [4.5]", 'budgets = [4.5]\nprofilers = ["hardware", "hardware"]', "profilers",
     "profilers.1: profiler 'hardware' stands here twice"),
    ('["rtn"]', "[3]", "methods", "methods.0: expected a name, or a table with name and options (got 3)"),
    ('"rtn"', '{ name = "rtn", label = "a\\nb" }', "a\\nb", "methods.0.label: a label is one line"),
    ('"rtn"', '{ name = "rtn", label = "" }', "label", "methods.0.label: a label is one line"),
    ('"rtn"', '{ name = "rtn", label = " " }', "label", "methods.0.label: a label is one line"),
    ('"rtn"', '{ name = "rtn", label = "dense" }', "label", "methods.0.label: this label is the uncompressed model's"),
    ('"rtn"', '{ name = "rtn", budget = 4 }', "methods",
     "methods.0.budget: 4 is the centre of no budget of this suite; its centres: 4.5"),
    ('"rtn"', '{ name = "rtn", budget = "fitt" }', "methods", 'methods.0.budget: expected "fit", "free", or the'),
    ('"rtn"', '{ name = "rtn", budget = [] }', "methods", 'methods.0.budget: expected "fit", "free", or the centre'),
    ('"rtn"', '{ name = "rtn", budget = [4.5, 4.5] }', "methods", "methods.0.budget: the same centre twice"),
    ('"rtn"', '{ name = "rtn", sizes.bots = 3 }', "methods", 'unknown option; did you mean "bits"?'),
    ('"rtn"', '{ name = "rtn", options.bits = 3, sizes.bits = 3 }', "methods", "bits stands in options and in sizes"),
    ('"rtn"', '{ name = "rtn", sizes.bits = 3, budget = "free" }', "methods", '"free" fits nothing: give options'),
    ("budgets = [4.5]", "budgets = [4.5]\nelsewhere.window = 4.5", "elsewhere",
     "elsewhere.window: 4.5 is not below the smallest centre, 4.5"),
    ("budgets = [4.5]", "budgets = [4.5]\nelsewhere.windows = 1", "elsewhere", 'did you mean "window"?'),
    ("budgets = [4.5]", 'budgets = [4.5]\nelsewhere.context = 3', "elsewhere", "elsewhere.context: "),
    ('name = "tiny" }', 'name = "tiny", outline.hidden = 3 }', "hidden", 'did you mean "hidden_size"?'),
    ('name = "tiny" }', 'name = "tiny", outline = 3 }', "outline", "expected a table with the sizes of the model's"),
    ('"rtn"', '"rtn", { name = "rtn", options.bits = 3 }', "methods", "methods.1: another entry with other settings"),
    ('"rtn"', '"rtn", { name = "gptq", label = "rtn" }', "methods", "is called 'rtn' too; give one a label"),
])  # fmt: skip
def test_mistakes(here: Any, suites: Any, old: str, new: str, at: str, said: str) -> None:
    text = suites.text('["rtn"]', top=BUDGETS)
    assert old in text
    text = text.replace(old, new, 1)
    message = refused(here, text)
    assert said in message
    path = here.folder / "suite.toml"
    assert message.startswith(f"{path}:{line_of(text, at)}: " if at else f"{path}: "), message


def test_mistakes_in_an_evaluators_corpus(here: Any, suites: Any) -> None:
    """Found before anything runs, like those in the calibration's."""
    text = suites.text('["rtn"]', top=BUDGETS)
    line = line_of(text, "options.corpus")
    for old, new, said in (
        ('"text"', '"txet"', "unknown corpus 'txet'; did you mean \"text\"?"),
        ("path", "pth", 'options.pth: unknown option; did you mean "path"?'),
        (", path", ', split = "lines" } #', "options.path: Field required"),
    ):
        start = text.index("options.corpus")
        message = refused(here, text[:start] + text[start:].replace(old, new, 1))
        assert message.startswith(f"{here.folder / 'suite.toml'}:{line}: evaluators.0.options.corpus: "), message
        assert said in message


def test_the_line_of_an_option_of_a_corpus(here: Any, suites: Any) -> None:
    """Its options stand beside its name, whichever table it is."""
    text = suites.text('["rtn"]', top=BUDGETS)
    inline = next(line for line in text.splitlines() if line.startswith("options.corpus"))
    table = f'[evaluators.options.corpus]\nname = "text"\npath = "{here.folder}"\nsplt = "lines"\n'
    text = text.replace(inline + "\n", "") + table
    assert f":{line_of(text, 'splt')}: evaluators.0.options.corpus: options.splt" in refused(here, text)


def test_two_evaluators_of_one_name(here: Any, suites: Any) -> None:
    text = suites.text('["rtn"]', top=BUDGETS)
    table = text[text.index("[[evaluators]]") :]
    text += table
    line = len(text.splitlines()) - len(table.splitlines()) + 1
    message = refused(here, text)
    assert message.startswith(f"{here.folder / 'suite.toml'}:{line}: evaluators.1: evaluator 'perplexity' ")


def test_entries_that_tables_tell_apart(here: Any, suites: Any) -> None:
    entries = (
        '"rtn"',
        '"rtn"',  # the same settings: one entry
        '{ name = "rtn", budget = "free", options.bits = 3 }',
        '{ name = "rtn", label = "rtn-3", options.bits = 3 }',
    )
    assert len(here.read(suites.text(f"[{', '.join(entries)}]", top=BUDGETS)).methods) == 4


def test_two_models_of_one_name(here: Any, suites: Any) -> None:
    text = suites.text('["rtn"]', top=BUDGETS)
    line = next(line for line in text.splitlines() if line.startswith("model = "))
    for models in (
        '[{ path = "a", name = "m" }, { path = "b", name = "m" }]',
        '[{ path = "a/m" }, { path = "b/m" }]',
        '["m", { path = "b", name = "m" }]',
    ):
        message = refused(here, text.replace(line, f"model = {models}"))
        assert message.endswith(": model.1: two models are called 'm'; give one another name"), message
    assert len(here.read(text.replace(line, 'model = [{ path = "a/m" }, { path = "b/m", name = "n" }]')).model) == 2


@pytest.mark.parametrize("revision", ["main", "v1.0", "0123abc", "A" * 40, "0" * 41])
def test_a_revision_that_is_no_commit(revision: str) -> None:
    with pytest.raises(ValidationError, match=r"is no commit hash of 40 hex digits; branches and tags move"):
        ModelSpec(id="org/name", revision=revision)
    assert ModelSpec(id="org/name", revision="0123456789abcdef" * 2 + "01234567").shown == "org/name"


def test_undefined_variable(here: Any, suites: Any) -> None:
    text = suites.text().replace("samples = 4", 'sampling = "${EVENBITS_NO_SUCH}"')
    line = line_of(text, "NO_SUCH")
    assert refused(here, text) == (
        f"{here.folder / 'suite.toml'}:{line}: calibration.sampling: environment variable EVENBITS_NO_SUCH is not set"
    )


def test_variables_and_defaults(here: Any, suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENBITS_SAMPLING", "crop")
    text = suites.text().replace("samples = 4", 'sampling = "${EVENBITS_SAMPLING}"')
    read = here.read(text.replace('name = "tiny"\n', 'name = "${EVENBITS_NO_SUCH:-tiny}"\n', 1))
    assert (read.name, read.calibration.sampling) == ("tiny", "crop")


def test_what_an_empty_variable_leaves_out(here: Any, suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key as if it were not there; with a default, or beside other text, the string stays."""
    text = suites.text().replace("samples = 4", 'samples = 4\nsampling = "${EVENBITS_SAMPLING:-}"')
    text = text.replace('name = "tiny"\n', 'name = "tiny"\ndescription = "a ${EVENBITS_SAMPLING:-}"\n', 1)
    for value in ("", None):
        monkeypatch.delenv("EVENBITS_SAMPLING", raising=False)
        if value is not None:
            monkeypatch.setenv("EVENBITS_SAMPLING", value)
        assert (here.read(text).calibration.sampling, here.read(text).description) == (None, "a ")
    monkeypatch.setenv("EVENBITS_SAMPLING", "crop")
    assert (here.read(text).calibration.sampling, here.read(text).description) == ("crop", "a crop")


def test_methods_under_some_budgets(here: Any, suites: Any) -> None:
    """Settings of one label may differ between budgets, and `sizes` are options on the suite's own model."""
    methods = """[
        { name = "rtn", sizes = { bits = 3 }, budget = 3.5 },
        { name = "rtn", sizes = { bits = 5 }, budget = [5.5] },
        { name = "gptq", budget = [5.5, 4.5] },
        { name = "nf4", budget = 4.5 },
    ]"""
    top = "budgets = [{ centre = 3.5, window = 1 }, { centre = 4.5, window = 1 }, { centre = 5.5, window = 1 }]"
    plan = here.plan(suites.text(methods, top=top))
    assert [(t.label, t.budget and t.budget.centre) for t in plan.trials] == [
        ("dense", None), ("rtn", 3.5), ("rtn", 5.5), ("gptq", 4.5), ("gptq", 5.5), ("nf4", 4.5)
    ]  # fmt: skip
    assert [t.options["bits"] for t in plan.trials if t.label == "rtn"] == [3, 5]
    clash = methods.replace("budget = [5.5] }", "budget = [5.5, 3.5] }")
    assert "another entry with other settings is called 'rtn' too" in refused(here, suites.text(clash, top=top))


def test_not_toml_not_text_not_there(here: Any, tmp_path: Path) -> None:
    assert "not TOML" in refused(here, "name = \n")
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    for file in (path, tmp_path / "none.toml", tmp_path):
        with pytest.raises(SuiteError, match=str(file)):
            read_suite(file, load_plugins())


def test_line_of_nested_tables() -> None:
    text = '[[evaluators]]\nname = "a"\n\n[[evaluators]]\nname = "b"\n[evaluators.options]\ncontext = 3\n'
    assert locate(text, ("evaluators", 0, "name")) == 2
    assert locate(text, ("evaluators", 1, "name")) == 5
    assert locate(text, ("evaluators", 1, "options", "context")) == 7


def test_the_suites_of_the_repository_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENBITS_DISABLE", "mlflow")
    for path in sorted((root / "suites").rglob("*.toml")):
        if path.name.endswith(".published.toml"):
            continue  # what papers printed, beside the suite of that name
        suite = read_suite(path, load_plugins())
        assert isinstance(suite, Suite)


# -- models -----------------------------------------------------------------------------------------------------


def test_missing_model_folder(here: Any, suites: Any) -> None:
    message = refused(here, suites.text(model=here.folder / "nowhere"), plan=True)
    assert str(here.folder / "nowhere") in message
    assert "does not exist" in message


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_unknown_architecture(here: Any, suites: Any, own_model: Path) -> None:
    change_config(own_model, model_type="lama")
    assert "architecture 'lama' is not understood" in refused(here, suites.text(model=own_model), plan=True)


def test_model_without_linear_layers(here: Any, suites: Any, own_model: Path) -> None:
    change_tensors(own_model, lambda tensors: {k: v for k, v in tensors.items() if "proj" not in k})
    assert "no linear layer" in refused(here, suites.text(model=own_model), plan=True)


def test_weight_that_the_table_does_not_know(here: Any, suites: Any, own_model: Path) -> None:
    name = "model.layers.1.self_attn.extra.weight"
    change_tensors(own_model, lambda tensors: {**tensors, name: tensors["lm_head.weight"].clone()})
    message = refused(here, suites.text(model=own_model), plan=True)
    assert name in message
    assert "would stay dense" in message


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "dtype"])
def test_model_with_broken_files(here: Any, suites: Any, own_model: Path, broken: str) -> None:
    if broken == "dtype":
        data = (own_model / "model.safetensors").read_bytes()
        (own_model / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F99"'))
    else:
        (own_model / broken).write_text("{")
    assert str(own_model) in refused(here, suites.text(model=own_model), plan=True)


def test_model_without_weights(here: Any, suites: Any, own_model: Path) -> None:
    (own_model / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(here, suites.text(model=own_model), plan=True)


def test_missing_text(here: Any, suites: Any, tiny: Any) -> None:
    text = suites.text().replace(str(tiny.test), str(here.folder / "none.txt"))
    with pytest.raises(EvenbitsError, match=r"none\.txt"):
        here.plan(text)


def test_budget_that_nothing_fits(here: Any, suites: Any) -> None:
    plan = here.plan(suites.text('["nf4", "rtn"]', top="budgets = [{ centre = 3.5, window = 0.1 }]"))
    assert [trial.label for trial in plan.trials] == ["dense", "rtn"]
    (skip,) = plan.skips
    assert skip.reason.startswith("no setting within 3.5 +- 0.1 linear bits; nearest: ")
    assert set(plan.order) == {trial.id for trial in plan.trials} | {skip.id}


def test_method_without_its_calibration(here: Any, suites: Any) -> None:
    text = suites.text('["gptq"]', top=BUDGETS)
    start, end = text.index("[calibration]"), text.index("[[evaluators]]")
    plan = here.plan(text[:start] + text[end:])
    assert [skip.reason for skip in plan.skips] == ["needs calibration data; give the suite a [calibration] table"]


def test_entries_that_are_skipped_for_one_reason(here: Any, suites: Any) -> None:
    """Each is listed once, however alike they are."""
    plan = here.plan(suites.text('["nf4", "nf4"]', top="budgets = [{ centre = 3, window = 0.1 }]"))
    assert len(plan.order) == len(set(plan.order))
    assert len(plan.skips) == 1
