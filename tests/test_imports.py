"""Which module may import which, and that nothing heavy is imported before it is needed.

Imports inside functions and under TYPE_CHECKING count neither for the direction nor for torch: the first are
how heavy things are put off, the second do not run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "harness" / "evenbits"
PLUGINS = ROOT / "plugins"

# a module imports only from rows above its own, or from its own row; and never in a circle
ORDER = (
    ("errors", "__init__", "pretrained", "files", "environment", "provenance", "statistics", "devices"),
    ("significance", "steps"),
    ("compressor",),
    ("tune_options",),
    ("budget", "measure", "manifest"),
    ("shapes", "sampling", "hookspecs", "foreign"),
    ("integer", "vectors", "record"),
    ("maths",),
    ("kernels",),
    ("plugins", "ledger"),
    ("commands_new",),
    ("environment_files",),
    ("installed",),
    ("installing",),
    ("environments",),
    ("suite_spec",),
    ("suite_errors",),
    ("suite", "elsewhere", "published"),
    ("reproduced",),
    ("sources",),
    ("matching", "planned_model"),
    ("plan",),
    ("store", "job"),
    ("footprint",),
    ("scored_tokens",),
    ("effort",),
    ("plan_text",),
    ("findings",),
    ("models", "calibration", "fisher", "artifact", "tunable", "opened", "hidden"),
    ("block_pass", "blocks"),
    ("restoring",),
    ("driver", "recovery", "whole", "tuning", "weights", "streaming", "packed"),
    ("subject", "export_formats"),
    ("quantizer", "export_dense", "export_folder", "export_gptq", "export_compressed_tensors"),
    ("export",),
    ("tokens",),
    ("workers",),
    ("stages",),
    ("executor",),
    ("attempt",),
    ("run",),
    ("fingerprints",),
    ("rows",),
    ("verdict",),
    ("cells",),
    ("tables", "display", "named_trials"),
    ("markdown", "report_format", "plots_look", "layers"),
    ("reproduced_entries",),
    ("reproduced_cells",),
    ("reproduced_orderings",),
    ("reproduced_floors",),
    ("reproduction",),
    ("nights",),
    ("history",),
    ("plots_history", "commands_history"),
    ("commands_env",),
    (
        "plots",
        "report_csv",
        "report_text",
        "plots_layers",
        "plots_recovery",
        "report_layers",
        "report_samples",
        "report_protocols",
        "report_sheets",
    ),
    ("report_reproduction_data",),
    ("report_reproduction",),
    ("page_html",),
    ("page_entries",),
    ("page_plot",),
    ("page_leaderboard", "page_trials", "page_reproduction", "page_history"),
    ("page_sections",),
    ("page",),
    ("gate_snapshot", "gate_noise"),
    ("gate_baseline", "gate_causes"),
    ("gate_checks",),
    ("gate_quality", "gate_costs"),
    ("gate_front", "gate_layers"),
    ("report", "gate", "compare"),
    ("compare_text", "gate_text"),
    ("commands_gate", "commands_export"),
    ("tiny",),
    ("testing", "door"),
    ("commands_check",),
    ("cli", "__main__"),
)
RANK = {module: rank for rank, row in enumerate(ORDER) for module in row}

# the rest must start in a fraction of a second: listing, planning, reporting
TORCH = {
    "restoring",
    "models",
    "calibration",
    "fisher",
    "artifact",
    "driver",
    "recovery",
    "opened",
    "whole",
    "tunable",
    "tuning",
    "block_pass",
    "blocks",
    "hidden",
    "weights",
    "streaming",
    "packed",
    "subject",
    "quantizer",
    "export",
    "export_formats",
    "export_dense",
    "export_folder",
    "export_gptq",
    "export_compressed_tensors",
    "stages",
    "tokens",
    "door",
    "testing",
    "tiny",
    "maths",
    "kernels",
}
HEAVY = {
    "torch", "transformers", "safetensors", "faiss", "scipy", "mlflow", "datasets", "matplotlib", "pandas", "sklearn",
    "huggingface_hub", "tokenizers", "numba", "peft", "greenlet", "triton",
}  # fmt: skip


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def top_imports(path: Path, package: str) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of what importing `path` imports, relative ones resolved against `package`."""

    def walk(nodes: list[ast.stmt]) -> Iterator[tuple[str, int]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]]) if node.level else ""
                module = ".".join(filter(None, (base, node.module)))
                yield module, node.lineno
                # `from evenbits import plan` imports the module evenbits.plan
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            elif isinstance(node, ast.If):
                if "TYPE_CHECKING" not in ast.unparse(node.test):
                    yield from walk(node.body)
                yield from walk(node.orelse)
            elif isinstance(node, ast.Try | ast.With | ast.For | ast.While | ast.ClassDef):
                for part in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body)

    yield from walk(ast.parse(path.read_text(), str(path)).body)


def owner(path: Path) -> str:
    """The name in ORDER that a harness file belongs to: its module, or the subpackage that holds it."""
    return path.relative_to(HARNESS).with_suffix("").parts[0]


def package_of(path: Path, root: Path) -> str:
    return ".".join(path.parent.relative_to(root).parts)


def harness_target(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "evenbits" or len(parts) < 2:
        return None
    return parts[1] if (HARNESS / f"{parts[1]}.py").exists() or (HARNESS / parts[1]).is_dir() else None


@pytest.mark.parametrize("path", sources(HARNESS), ids=lambda path: path.relative_to(HARNESS).as_posix())
def test_harness_imports_point_one_way(path: Path) -> None:
    name = owner(path)
    assert name in RANK, f"{name} has no place in ORDER of {Path(__file__).name}: add it where its imports allow"
    for module, line in top_imports(path, package_of(path, ROOT / "harness")):
        assert not module.startswith("evenbits_"), f"{path.name}:{line} imports the plugin {module}"
        target = harness_target(module)
        if target is not None and target != name:
            assert target in RANK, f"{target} has no place in ORDER of {Path(__file__).name}"
            assert RANK[target] <= RANK[name], f"{path.name}:{line}: {name} must not import {target}, which is above it"


def test_harness_imports_have_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources(HARNESS):
        found = {harness_target(module) for module, _ in top_imports(path, package_of(path, ROOT / "harness"))}
        graph.setdefault(owner(path), set()).update(target for target in found if target not in {None, owner(path)})
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", sources(HARNESS), ids=lambda path: path.relative_to(HARNESS).as_posix())
def test_torch_stays_where_it_is_needed(path: Path) -> None:
    if owner(path) in TORCH:
        return
    for module, line in top_imports(path, package_of(path, ROOT / "harness")):
        assert module.split(".")[0] not in HEAVY, f"{path.name}:{line} imports {module} at module level"
        assert harness_target(module) not in TORCH, f"{path.name}:{line} imports {module}, which imports torch"


@pytest.mark.parametrize("path", sources(PLUGINS), ids=lambda path: path.relative_to(PLUGINS).as_posix())
def test_plugins_do_not_know_each_other(path: Path) -> None:
    own = path.relative_to(PLUGINS).parts[0]
    # also inside functions: a plugin that needs another would break where that one is not installed
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            root = module.split(".")[0]
            assert not root.startswith("evenbits_") or root == own, f"{own}/{path.name} imports {module}"
            private = [part for part in module.split(".") if part.startswith("_") and part != "__future__"]
            assert root != "evenbits" or not private, f"{own}/{path.name} imports the private {module}"


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_starts_light() -> None:
    """numpy is allowed: records hold arrays, and it costs a tenth of a second where torch costs two."""
    assert not loaded_after("import evenbits.cli") & HEAVY


def test_discovery_starts_light() -> None:
    folders = sorted(path.parent.name for path in PLUGINS.glob("*/__init__.py"))
    assert folders
    assert not loaded_after(f"import {', '.join(folders)}") & (HEAVY | {"numpy"})


def test_listing_what_plugins_provide_stays_light() -> None:
    """The hooks are called whenever plugins are listed or a suite is planned."""
    code = """
import importlib, pathlib
from evenbits.hookspecs import HOOKS
for name in {folders!r}:
    module = importlib.import_module(name)
    for hook in HOOKS:
        if hook.startswith("provide_") and hasattr(module, hook):
            getattr(module, hook)()
"""
    folders = sorted(path.parent.name for path in PLUGINS.glob("*/__init__.py"))
    assert not loaded_after(code.format(folders=folders)) & HEAVY


def test_identifying_code_does_not_run_it() -> None:
    """A plan digests the source of modules that import torch: it must read them, not import them."""
    roots = ", ".join(repr(f"evenbits.{name}") for name in sorted(TORCH) if list(HARNESS.glob(f"{name}*")))
    statement = f"from evenbits.provenance import source_digest; source_digest({roots}, 'evenbits_hardware')"
    assert not loaded_after(statement) & HEAVY


@pytest.mark.parametrize(
    "source", ["import torch", "if True:\n    import torch", "try:\n    import torch\nfinally: ..."]
)
def test_the_walk_sees_what_runs_at_import(source: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(source)
    assert "torch" in dict(top_imports(tmp_path / "m.py", "evenbits"))


@pytest.mark.parametrize("source", ["def f():\n    import torch", "if TYPE_CHECKING:\n    import torch"])
def test_the_walk_leaves_out_what_does_not(source: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(source)
    assert "torch" not in dict(top_imports(tmp_path / "m.py", "evenbits"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [("from . import plan", "evenbits.plan"), ("from .maths import grid", "evenbits.maths.grid")],
)
def test_the_walk_resolves_relative_imports(source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(source)
    assert expected in dict(top_imports(tmp_path / "m.py", "evenbits"))
