"""`evenbits check`: a line a check, and no plugin that takes it down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evenbits.commands_check import parsed, run_checks
from evenbits.errors import SuiteError
from evenbits.testing import checks

PLUGIN = """
import os
import tempfile
from evenbits.compressor import Compressor, Estimate, LayerCompressor, Options, PackedLayer, Refusal, Role
from evenbits.hookspecs import hookimpl

class Half(LayerCompressor):
    def compress(self, weight, layer, shared, generator):
        return PackedLayer({"values": weight.half()}, {"values": Role.CODE})
    def restore(self, packed, layer, shared):
        return packed.tensors["values"].float()
    def tunable(self, packed, shared):
        raise SystemExit(4)
    def linear(self, packed, layer, shared, device):
        tempfile.mkdtemp()
        os._exit(7)

def predict(options, shapes):
    return Estimate(16, 16, {Role.CODE: 2 * shapes.weights})

@hookimpl
def provide_compressors():
    return [Compressor("fatal", "half precision, and fatal", "", Options, lambda o: Half(), predict,
                       lambda b, s, f: Refusal("never"))]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds a plugin with the metadata an installation would have made."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "evenbits_fatal.py").write_text(PLUGIN)
    info = folder / "evenbits_fatal-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evenbits-fatal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evenbits]\nfatal = evenbits_fatal\n")
    return folder


def test_a_plugin_that_ends_its_process_is_a_failed_check(site: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(site), "EVENBITS_DISABLE": "mlflow", "COLUMNS": "200"}
    env["TMPDIR"] = str(tmp_path)
    command = [sys.executable, "-m", "evenbits.cli", "check", "fatal", "--device", "cpu"]
    done = subprocess.run(command, env=env, cwd=site, capture_output=True, text=True)
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1, done.stderr
    assert lines["determinism"].startswith("passed")
    assert lines["fit"].startswith("FAILED")
    assert lines["fit-edges"].startswith("skipped")
    assert "ended the interpreter (SystemExit 4)" in lines["tunable"]
    assert lines["linear"].startswith("FAILED")
    assert "exit code 7" in lines["linear"]
    assert lines["extremes"].startswith("passed")  # a fresh process went on after it
    assert lines["cuda"].startswith("skipped")
    assert lines["model"].startswith("passed")
    assert done.stdout.splitlines()[-1] == "fatal: 13 passed, 4 failed, 3 skipped"
    assert not list(tmp_path.iterdir())


def test_near_names_are_told() -> None:
    from evenbits.plugins import load_plugins
    from evenbits.testing.contract import find_target

    registry = load_plugins()
    for name, near in (("perplexety", "perplexity"), ("gtpq", "gptq"), ("distil", "distill"), ("hardwar", "hardware")):
        with pytest.raises(SuiteError, match=f'did you mean "{near}"'):
            find_target(name, registry)


REQUEST = {"options": {}, "exact": True, "model": None, "device": "cpu"}


def test_options_that_are_missing_are_one_line() -> None:
    with pytest.raises(SuiteError, match=r"lm-eval: options: tasks: Field required; .* --options tasks=VALUE"):
        list(run_checks({**REQUEST, "name": "lm-eval"}))


@pytest.mark.parametrize(("changes", "said"), [
    ({"name": "rtn", "model": "reference"}, "rtn: a method is tried on a tiny model of its own: name no model"),
    ({"name": "perplexity", "exact": False}, "perplexity: upper bounds and settings that `fit` chose are of methods"),
    ({"name": "perplexity", "model": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_what_would_mean_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    request: dict[str, Any] = {**REQUEST, **changes}
    model = None if request["model"] is None else Path(request["model"])
    with pytest.raises(SuiteError, match=said) as caught:
        checks(request["name"], exact=request["exact"], model=model)
    assert "\n" not in str(caught.value)


def test_options_on_the_command_line() -> None:
    given = ['{"bits": 3}', "corpus.name=text", "corpus.words=40", "names=[1, 2]", "axis=in", "deep.er.still=true"]
    assert parsed(given) == {
        "bits": 3,
        "corpus": {"name": "text", "words": 40},
        "names": [1, 2],
        "axis": "in",
        "deep": {"er": {"still": True}},
    }


@pytest.mark.parametrize("given", ["bits", "=3", "a..b=1", "{bits: 3}"])
def test_options_that_are_neither_json_nor_pairs(given: str) -> None:
    with pytest.raises(SuiteError, match="--options"):
        parsed([given])
    with pytest.raises(SuiteError, match="has a value already"):
        parsed(["a=1", "a.b=2"])
