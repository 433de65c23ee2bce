"""The pytest plugin in a session of its own: its fixtures, named contract tests, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# by module, and the entry point off: the same whether or not this checkout is installed with it
LOADED = ("-p", "no:evenbits", "-p", "evenbits.testing.pytest_plugin")

TESTS = '''
from pathlib import Path

from evenbits.compressor import Compressor, Estimate, LayerCompressor, Options, PackedLayer, Refusal, Role
from evenbits.testing import contract_tests


class Half(LayerCompressor):
    def compress(self, weight, layer, shared, generator):
        weight[0] = 0
        return PackedLayer({"values": weight.half()}, {"values": Role.CODE})

    def restore(self, packed, layer, shared):
        return packed.tensors["values"].float()


def predict(options, shapes):
    return Estimate(16, 16, {Role.CODE: 2 * shapes.weights})


test_half = contract_tests(
    Compressor("half", "half precision", "", Options, lambda o: Half(), predict, lambda b, s, f: Refusal("no")),
    fitted=False, device="cpu",
)

SUITE = """
name = "mine"
model = { path = "$model" }
dtype = "float32"
methods = ["rtn"]
budgets = [{ centre = 4.2, window = 0.4 }]
[[evaluators]]
name = "perplexity"
options = { corpus = { name = "text", path = "$text" }, context = 64, max_windows = 2 }
"""


def test_fixtures(evenbits_tiny_model, evenbits_tiny_text, evenbits_results, evenbits_run):
    folder = evenbits_tiny_model("qwen3", blocks=1)
    assert (folder / "config.json").is_file()
    assert evenbits_tiny_model("qwen3", blocks=1) == folder != evenbits_tiny_model()
    assert len(evenbits_tiny_text.read_text().split()) == 4000
    assert not list(evenbits_results.iterdir())
    records = evenbits_run(SUITE)
    assert [record.status for record in records] == ["done"] * len(records)
    assert {record.method for record in records} == {"dense", "rtn"}
    assert (evenbits_results / "runs" / "mine").is_dir()
'''


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "EVENBITS_DISABLE": "mlflow", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", *LOADED, "-p", "no:cacheprovider", "--strict-markers", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_third_partys_tests(tmp_path: Path) -> None:
    (tmp_path / "test_half.py").write_text(TESTS)
    done = pytest_run(tmp_path, "-rA", "-q", "-W", "error")
    lines = done.stdout.splitlines()
    failed = {line.split("[")[1].split("]")[0] for line in lines if line.startswith("FAILED") and "[" in line}
    passed = {line.split("[")[1].split("]")[0] for line in lines if line.startswith("PASSED") and "[" in line}
    assert failed == {"weights"}, done.stdout
    assert {"determinism", "round-trip", "predict", "model"} <= passed
    assert "half: compress wrote into its weight: work on a copy" in done.stdout
    assert any(line.startswith("PASSED") and "test_fixtures" in line for line in lines), done.stdout
    assert any(line.startswith("SKIPPED") and 'left out by device = "cpu"' in line for line in lines)


def test_the_fixtures_are_documented(tmp_path: Path) -> None:
    done = pytest_run(tmp_path, "--fixtures", "-q")
    for name in ("evenbits_tiny_model", "evenbits_tiny_text", "evenbits_results", "evenbits_run"):
        assert f"\n{name}" in done.stdout
    names = [line.split()[0] for line in done.stdout.splitlines() if "evenbits/testing/pytest_plugin.py" in line]
    assert names
    assert all(name.startswith("evenbits_") for name in names)


def test_the_start_is_light() -> None:
    code = "import sys, evenbits.testing.pytest_plugin; from evenbits.testing import contract_tests, checks; "
    code += "checks('rtn'), checks('distill'), checks('hardware'); print('torch' in sys.modules)"
    env = {**os.environ, "EVENBITS_DISABLE": "mlflow"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_package_names_the_plugin(root: Path) -> None:
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["pytest11"] == {"evenbits": "evenbits.testing.pytest_plugin"}


def test_an_unknown_name_says_what_is_near() -> None:
    from evenbits.errors import SuiteError
    from evenbits.testing import contract_tests

    with pytest.raises(SuiteError, match='did you mean "rtn"'):
        contract_tests("rtm")
