"""Discover plugins, attribute what they provide, refuse clashes, survive the broken.

A plugin that cannot be imported, misspells a hook, or clashes with another is one line in `Registry.problems`;
all the others work.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pluggy

from evenbits import hookspecs
from evenbits.compressor import Compressor, Options, Recovery
from evenbits.errors import EvenbitsError, PluginError, SuiteError
from evenbits.measure import Corpus, Evaluator, Profiler

T = TypeVar("T")

DISABLE = "EVENBITS_DISABLE"
_BROUGHT_TORCH: set[str] = set()  # modules whose import did; the command line loads plugins twice, and told it once


@dataclass(frozen=True)
class PluginInfo:
    """One entry point: what it is, whence it comes, what it implements, and what is wrong with it."""

    name: str
    module: str
    distribution: str
    version: str
    status: Literal["ok", "disabled", "broken"]
    hooks: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def origin(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Provided(Generic[T]):
    """An object with the plugin it came from."""

    value: T
    plugin: PluginInfo

    @property
    def distribution(self) -> str:
        return f"{self.plugin.distribution} {self.plugin.version}"

    @property
    def package(self) -> str:
        return self.plugin.module


def _origin_of(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "?")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' where something is near, else what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(names)}" if names else "; none is installed"


def _check_hooks(module: Any) -> tuple[str, ...]:
    """Names of the hooks a module implements. Raises PluginError for a name that is no hook."""
    found = []
    for name in dir(module):
        value = getattr(module, name, None)
        if getattr(value, f"{hookspecs.NAMESPACE}_impl", None) is None:
            continue
        if name not in hookspecs.HOOKS:
            raise PluginError(f"{name} is not a hook{did_you_mean(name, hookspecs.HOOKS)}")
        found.append(name)
    if not found:
        raise PluginError("implements no hook (mark its functions with evenbits.hookspecs.hookimpl)")
    return tuple(found)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EvenbitsError) else f"{type(error).__name__}: {text}"


@dataclass
class Registry:
    """What is installed. Objects are collected when first asked for."""

    manager: pluggy.PluginManager
    plugins: list[PluginInfo] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def _each(self, hook: str) -> Iterator[tuple[PluginInfo, Callable[..., Any]]]:
        by_name = {info.name: info for info in self.plugins}
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            yield by_name[impl.plugin_name], impl.function

    def _collect(self, hook: str, kind: type[T], what: str) -> dict[str, Provided[T]]:
        """Objects by the name they bear."""

        def named(function: Callable[..., Any]) -> list[tuple[str, T]]:
            values = list(function())
            wrong = [value for value in values if not isinstance(value, kind)]
            if wrong:
                raise PluginError(f"{hook} returned {type(wrong[0]).__name__}, expected {kind.__name__}")
            return [(value.name, value) for value in values]

        return self._unique(hook, what, named)

    def _named(self, hook: str, what: str) -> dict[str, Provided[Any]]:
        """Objects by the name they are given under."""
        return self._unique(hook, what, lambda function: list(dict(function()).items()))

    def _unique(
        self, hook: str, what: str, named: Callable[[Callable[..., Any]], list[tuple[str, T]]]
    ) -> dict[str, Provided[T]]:
        """By name; of two with one name neither is taken, so that nobody measures the wrong one."""
        found: dict[str, Provided[T]] = {}
        clashing: set[str] = set()
        for info, function in self._each(hook):
            try:
                values = named(function)
            except Exception as error:
                self.problems.append(f"plugin {info.origin}: {_one_line(error)}; its {what}s are not available")
                continue
            for name, value in values:
                if name in found:
                    self._clash(what, name, found[name].plugin, info)
                    clashing.add(name)
                else:
                    found[name] = Provided(value, info)
        return {name: provided for name, provided in found.items() if name not in clashing}

    @cached_property
    def compressors(self) -> dict[str, Provided[Compressor]]:
        return self._collect("provide_compressors", Compressor, "method")

    @cached_property
    def recoveries(self) -> dict[str, Provided[Recovery]]:
        return self._collect("provide_recoveries", Recovery, "recovery stage")

    @cached_property
    def evaluators(self) -> dict[str, Provided[Evaluator]]:
        return self._collect("provide_evaluators", Evaluator, "evaluator")

    @cached_property
    def profilers(self) -> dict[str, Provided[Profiler]]:
        return self._collect("provide_profilers", Profiler, "profiler")

    @cached_property
    def corpora(self) -> dict[str, Provided[Corpus]]:
        return self._collect("provide_corpora", Corpus, "corpus")

    def _clash(self, what: str, name: str, one: PluginInfo, other: PluginInfo) -> None:
        self.problems.append(
            f'{what} "{name}" is provided by {one.origin} and by {other.origin}: neither is used; '
            f"disable one with {DISABLE}={one.name} or {DISABLE}={other.name}"
        )

    @cached_property
    def models(self) -> dict[str, Provided[Any]]:
        return self._named("provide_models", "model")

    @cached_property
    def executors(self) -> dict[str, Provided[Any]]:
        return self._named("provide_executors", "executor")

    @cached_property
    def options(self) -> dict[str, type[Options]]:
        """By plugin, for those that take options of their own."""
        found: dict[str, type[Options]] = {}
        for info, function in self._each("provide_options"):
            try:
                found[info.name] = function()
            except Exception as error:
                self.problems.append(f"plugin {info.origin}: provide_options: {_one_line(error)}")
        return found

    def collect_all(self) -> None:
        """Ask every plugin for everything, so that `problems` is complete."""
        for kind in (
            "compressors",
            "recoveries",
            "evaluators",
            "profilers",
            "corpora",
            "models",
            "executors",
            "options",
        ):
            getattr(self, kind)

    def find(self, kind: str, name: str, what: str) -> Provided[Any]:
        """Look up by name. Raises SuiteError with near names, or with the reason why its plugin is out."""
        table: Mapping[str, Provided[Any]] = getattr(self, kind)
        if name in table:
            return table[name]
        if why := self.why_out(name):
            raise SuiteError(f"{what} {name!r}: {why}")
        raise SuiteError(f"unknown {what} {name!r}{did_you_mean(name, table)}")

    def why_out(self, name: str) -> str | None:
        """Why nothing is to be had under this name though something bears it: a clash, a plugin disabled or broken."""
        named = (problem for problem in self.problems if f'"{name}"' in problem)
        out = (
            f"its plugin {info.origin} is {info.status}: {info.problem}"
            for info in self.plugins
            if info.name == name and info.status != "ok"
        )
        return next(named, None) or next(out, None)

    def packages_of(self, hook: str) -> list[str]:
        """The packages that implement a hook."""
        return [info.module for info, _ in self._each(hook)]

    def load_model(self, path: Path, dtype: str) -> Any:
        """The first plugin's model for this folder, or None where no plugin knows it."""
        return self.manager.hook.load_model(path=path, dtype=dtype)

    def announce(self, hook: str, notice: Callable[[str], None], **arguments: Any) -> None:
        """Call an event hook, implementation by implementation: one that fails is a notice, the others go on."""
        for info, function in self._each(hook):
            impl_arguments = {
                k: v
                for k, v in arguments.items()
                if k in function.__code__.co_varnames[: function.__code__.co_argcount]
            }
            try:
                function(**impl_arguments)
            except Exception as error:
                notice(f"plugin {info.origin}: {hook}: {_one_line(error)}")


def _disabled() -> set[str]:
    return {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}


def _misspelt_groups(installed: Any) -> Iterator[str]:
    """Entry points that were meant for evenbits: their group is nearly its name, which nothing else would say."""
    for group in sorted(installed.groups):
        if group != hookspecs.NAMESPACE and difflib.get_close_matches(group, [hookspecs.NAMESPACE], cutoff=0.75):
            for entry in installed.select(group=group):
                distribution, version = _origin_of(entry)
                yield (
                    f'"{entry.name}" of {distribution} {version} is no plugin: its entry point stands in the group '
                    f'"{group}"; did you mean "{hookspecs.NAMESPACE}"?'
                )


def load_plugins(entries: Iterable[EntryPoint] | None = None) -> Registry:
    """Load every entry point of the group "evenbits" (or those given), in order of name."""
    manager = pluggy.PluginManager(hookspecs.NAMESPACE)
    manager.add_hookspecs(hookspecs)
    registry = Registry(manager)
    if entries is None:
        installed: Any = entry_points()  # of two classes, by Python's version
        entries = installed.select(group=hookspecs.NAMESPACE)
        registry.problems += _misspelt_groups(installed)
    found = sorted(entries, key=lambda entry: entry.name)
    disabled = _disabled()
    names = [entry.name for entry in found]
    for entry in found:
        distribution, version = _origin_of(entry)
        info: dict[str, Any] = {"name": entry.name, "module": entry.module}
        info |= {"distribution": distribution, "version": version}
        if entry.name in disabled:
            registry.plugins.append(PluginInfo(**info, status="disabled", problem=f"by {DISABLE}"))
            continue
        try:
            if names.count(entry.name) > 1:
                others = [f"{e.module} of {_origin_of(e)[0]}" for e in found if e.name == entry.name and e != entry]
                raise PluginError(f"another plugin has this name ({', '.join(others)}): neither is loaded")
            light = "torch" not in sys.modules
            module = entry.load()
            if light and "torch" in sys.modules:
                _BROUGHT_TORCH.add(entry.module)
            if entry.module in _BROUGHT_TORCH:
                slow = f"plugin {entry.name} ({distribution} {version}) imports torch when it is listed"
                registry.problems.append(f"{slow}, so every command starts slowly: import it inside `make`")
            hooks = _check_hooks(module)
            manager.register(module, entry.name)
        except (Exception, SystemExit) as error:  # a module that exits when imported takes nobody with it
            if manager.has_plugin(entry.name):
                manager.unregister(name=entry.name)
            problem = _one_line(error)
            broken = PluginInfo(**info, status="broken", problem=problem)
            registry.plugins.append(broken)
            registry.problems.append(f"plugin {broken.origin} is left out: {problem}")
        else:
            registry.plugins.append(PluginInfo(**info, status="ok", hooks=hooks))
    for name in sorted(disabled - set(names)):
        registry.problems.append(f"{DISABLE} names {name!r}, which is not installed{did_you_mean(name, names)}")
    return registry
