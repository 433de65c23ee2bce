"""Plugins that are broken, clash or misspell: one clear line each, and the rest works."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import PluginError, SuiteError
from evenbits.hookspecs import HOOKS, describe
from evenbits.plugins import load_plugins

HEAD = "from evenbits.hookspecs import hookimpl\nfrom evenbits.compressor import Compressor, Options\n"
METHOD = (
    HEAD
    + """
@hookimpl
def provide_compressors():
    return [Compressor(name="{name}", summary="", paper="", options=Options, make=None, predict=None, fit=None)]
"""
)
Make = Callable[..., EntryPoint]


class Distribution:
    version = "2.1"

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module and returns the entry point that an installed distribution would have."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def entry(name: str, source: str, *, module: str | None = None, distribution: str | None = None) -> EntryPoint:
        module = module or f"faulty_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        made.append(module)
        point = EntryPoint(name, module, "evenbits")
        vars(point)["dist"] = Distribution(distribution or f"dist-{name}")
        return point

    yield entry
    for module in made:
        sys.modules.pop(module, None)


def loaded(*entries: EntryPoint) -> Any:
    registry = load_plugins(entries)
    registry.collect_all()
    assert all("\n" not in problem for problem in registry.problems)
    return registry


def test_a_good_plugin(make: Make) -> None:
    registry = loaded(make("good", METHOD.format(name="good")))
    assert registry.problems == []
    provided = registry.find("compressors", "good", "method")
    assert (provided.package, provided.distribution) == ("faulty_good", "dist-good 2.1")
    assert registry.plugins[0].hooks == ("provide_compressors",)


@pytest.mark.parametrize(("source", "said"), [
    ("import no_such_module_here", "ModuleNotFoundError: No module named"),
    ("def broken(:", "SyntaxError"),
    ("raise SystemExit(5)", "SystemExit"),
    (HEAD, "implements no hook"),
    (METHOD.format(name="x").replace("provide_compressors", "provide_compresors"),
     'provide_compresors is not a hook; did you mean "provide_compressors"?'),
    (METHOD.format(name="x").replace("provide_compressors()", "provide_compressors(model)"), "provide_compressors"),
])  # fmt: skip
def test_a_plugin_that_cannot_be_loaded(make: Make, source: str, said: str) -> None:
    registry = loaded(make("bad", source), make("good", METHOD.format(name="good")))
    (problem,) = registry.problems
    assert problem.startswith("plugin bad (dist-bad 2.1) is left out: ")
    assert said in problem
    assert [info.status for info in registry.plugins] == ["broken", "ok"]
    assert set(registry.compressors) == {"good"}


@pytest.mark.parametrize(("body", "said"), [
    ("return [3]", "provide_compressors returned int, expected Compressor"),
    ("return None", "TypeError"),
    ("return Options()", "provide_compressors returned tuple, expected Compressor"),
    ("raise OSError('no\\nmatter')", "OSError: no matter"),
])  # fmt: skip
def test_a_hook_that_returns_something_else(make: Make, body: str, said: str) -> None:
    bad = HEAD + f"@hookimpl\ndef provide_compressors():\n    {body}\n"
    if "Options()" in body:
        bad = bad.replace("Options()", "{'a': 1}.items()")
    registry = loaded(make("bad", bad), make("good", METHOD.format(name="good")))
    (problem,) = registry.problems
    assert said in problem
    assert "bad (dist-bad 2.1)" in problem
    assert set(registry.compressors) == {"good"}


def test_two_plugins_with_one_method(make: Make) -> None:
    both = METHOD.format(name="same") + METHOD.format(name="own").replace(HEAD, "").replace(
        "@hookimpl\ndef provide_compressors", "def _more"
    )
    both = both.replace("fit=None)]\n", "fit=None), *_more()]\n", 1)
    registry = loaded(make("one", both), make("two", METHOD.format(name="same")))
    (problem,) = registry.problems
    assert "one (dist-one 2.1)" in problem
    assert "two (dist-two 2.1)" in problem
    assert set(registry.compressors) == {"own"}
    with pytest.raises(SuiteError, match=r"one \(dist-one 2.1\) and by two \(dist-two 2.1\)"):
        registry.find("compressors", "same", "method")


def test_three_plugins_with_one_method(make: Make) -> None:
    registry = loaded(*(make(name, METHOD.format(name="same")) for name in ("one", "two", "three")))
    assert registry.compressors == {}
    assert all(
        any(f"{name} (dist-{name}" in problem for problem in registry.problems) for name in ("one", "two", "three")
    )


def test_two_plugins_with_one_model_name(make: Make) -> None:
    source = HEAD + "from pathlib import Path\n@hookimpl\ndef provide_models():\n    return {{'m': Path('{0}')}}\n"
    registry = loaded(make("one", source.format("/one")), make("two", source.format("/two")))
    (problem,) = registry.problems
    assert "one (dist-one 2.1)" in problem
    assert "two (dist-two 2.1)" in problem
    assert registry.models == {}  # nobody measures the wrong one


def test_one_entry_point_name_twice(make: Make) -> None:
    one = make("same", METHOD.format(name="a"), module="faulty_a", distribution="dist-a")
    two = make("same", METHOD.format(name="b"), module="faulty_b", distribution="dist-b")
    registry = loaded(one, two, make("good", METHOD.format(name="good")))
    assert len(registry.problems) == 2
    assert "faulty_b of dist-b" in registry.problems[0]
    assert "faulty_a of dist-a" in registry.problems[1]
    assert set(registry.compressors) == {"good"}


def test_disabled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENBITS_DISABLE", "one, goood")
    one, two = make("one", METHOD.format(name="one")), make("good", METHOD.format(name="good"))
    registry = loaded(one, two)
    assert registry.problems == ["EVENBITS_DISABLE names 'goood', which is not installed; did you mean \"good\"?"]
    assert set(registry.compressors) == {"good"}
    with pytest.raises(SuiteError, match="disabled"):
        registry.find("compressors", "one", "method")


def test_disabling_ends_a_clash(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENBITS_DISABLE", "two")
    registry = loaded(make("one", METHOD.format(name="same")), make("two", METHOD.format(name="same")))
    assert registry.find("compressors", "same", "method").plugin.name == "one"


@pytest.mark.parametrize(("part", "value", "said"), [
    ("fit", "lambda budget, shapes, fixed: 1 / 0", "fit failed: ZeroDivisionError"),
    ("fit", "lambda budget, shapes, fixed: dict(fixed)", "fit returned dict"),
    ("predict", "lambda options, shapes: shapes.nothing", "predict failed: AttributeError"),
    ("predict", "lambda options, shapes: 3.5", "predict returned float"),
])  # fmt: skip
def test_planning_with_a_method_that_fails(
    make: Make, here: Any, suites: Any, part: str, value: str, said: str
) -> None:
    from evenbits.plan import make_plan

    others = {"fit": "lambda budget, shapes, fixed: Options()"}
    source = METHOD.format(name="bad")
    for name, text in {**others, part: value}.items():
        source = source.replace(f"{name}=None", f"{name}={text}")
    registry = load_plugins([*importlib.metadata.entry_points(group="evenbits"), make("bad", source)])
    suite = here.read(suites.text('["rtn"]', top="budgets = [4.5]"))
    suite = suite.model_copy(update={"methods": tuple(m.model_copy(update={"name": "bad"}) for m in suite.methods)})
    with pytest.raises(PluginError) as caught:
        make_plan(suite, registry)
    assert "bad (dist-bad 2.1)" in str(caught.value)
    assert said in str(caught.value)


def test_the_plugins_command(evenbits: Any, trouble_path: Path, tmp_path: Path) -> None:
    """A clash, a broken import and a disabled plugin, as `evenbits plugins` and other commands show them."""
    site = tmp_path / "site"
    for name, source in {"clash": METHOD.format(name="trouble"), "gone": "import no_such_module_here"}.items():
        info = site / f"{name}-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[evenbits]\n{name} = faulty_{name}\n")
        (site / f"faulty_{name}.py").write_text(source)
    evenbits.path = (trouble_path, site)
    evenbits.environment = {"EVENBITS_DISABLE": "mlflow"}
    shown = evenbits("plugins")
    assert shown.returncode == 0, shown.stderr
    text = shown.stdout
    assert "ok rtn (evenbits 0.1.0): provide_compressors" in text
    assert "disabled mlflow" in text
    assert "broken gone (gone 0.1): ModuleNotFoundError" in text
    assert 'method "trouble" is provided by clash (clash 0.1) and by trouble (evenbits-trouble 1.0)' in text
    assert "rtn " in text[text.index("compressors\n") :]
    assert "  trouble " not in text


def test_what_nothing_else_would_say(evenbits: Any, tmp_path: Path) -> None:
    """An entry point in a group of nearly the right name, and a plugin that imports torch to be listed."""
    site = tmp_path / "site"
    for name, group in {"astray": "evenbit", "slow": "evenbits", "other": "console_scripts"}.items():
        info = site / f"{name}-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = faulty_{name}\n")
        (site / f"faulty_{name}.py").write_text(METHOD.format(name=name) + "import torch\n" * (name == "slow"))
    (site / "torch.py").touch()  # the real one would do as well, in seconds
    evenbits.path = (site,)
    evenbits.environment = {"EVENBITS_DISABLE": "mlflow"}
    shown = evenbits("plugins").stdout
    assert "ok slow (slow 0.1): provide_compressors" in shown
    problems = [line.strip() for line in shown.partition("problems\n")[2].splitlines()]
    assert problems == [
        '"astray" of astray 0.1 is no plugin: its entry point stands in the group "evenbit"; did you mean "evenbits"?',
        "plugin slow (slow 0.1) imports torch when it is listed, so every command starts slowly: import it inside "
        "`make`",
    ]


def test_every_hook_is_described() -> None:
    assert {"provide_compressors", "load_model", "on_record", "extend_cli"} <= set(HOOKS)
    assert all(describe(name).strip() for name in HOOKS)
