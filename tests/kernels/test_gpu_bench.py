"""The GPU bench without a GPU: it runs through, notices what is wrong, outlives crashes, takes over what is there."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu.py"
PARTS = ("machine", "check", "search", "linear", "compress", "model")


@pytest.fixture(autouse=True)
def _parts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def start(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--small", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole small run."""
    out = tmp_path_factory.mktemp("bench") / "out"
    done = start(out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_a_small_run_fills_every_table(finished: Path) -> None:
    found = json.loads((finished / "gpu.json").read_text())
    assert tuple(found["parts"]) == PARTS
    for name, part in found["parts"].items():
        assert part["status"] == "done", (name, part["failures"])
        assert part["rows"], name
    rows = {name: [row for rows in part["rows"].values() for row in rows] for name, part in found["parts"].items()}
    assert {row["kind"] for row in rows["machine"]} >= {"copy", "read", "float16", "bfloat16", "tf32", "float32"}
    formats = {row["format"] for row in rows["linear"]}
    assert {"PocketLLM folded", "PocketLLM exact", "integer 4 bits", "AQLM 1x16"} <= formats
    for kind in formats:
        assert [row["rows"] for row in rows["linear"] if row["format"] == kind] == [1, 33]
    for row in rows["linear"]:
        assert min(row["us"], row["float16_us"], row["bfloat16_us"], row["floor_us"], row["held_bytes"]) > 0
        assert row["kernel"].startswith("triton"), row
    assert {(row["format"], row["what"], row["batch"]) for row in rows["model"]} >= {
        ("dense", "decode", 1), ("dense", "decode", 16), ("AQLM 1x16", "decode", 16), ("AQLM 1x16", "prefill 8", 1),
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["steps"] > 0 for row in rows["compress"])
    compared = [row for row in rows["check"] if "error" in row]
    assert {row["kernel"] for row in compared} >= {
        "integer", "codebook exact", "codebook int8", "PocketLLM exact", "PocketLLM unit", "search fma",
    }  # fmt: skip
    assert {row["dtype"] for row in compared} == {"float16", "bfloat16", "float32"}
    assert all(row["ok"] for row in compared)
    assert {"same", "over_cdist", "over_addmm", "limit"} <= set(rows["search"][0])
    assert all(row["limit"] for row in rows["search"])
    assert [goal["verdict"] for goal in found["goals"]] == ["met"] + ["not measured"] * 4


@pytest.mark.slow
def test_the_files_are_few_and_the_tables_are_tables(finished: Path) -> None:
    assert sorted(path.relative_to(finished).as_posix() for path in finished.rglob("*")) == ["gpu.json", "gpu.md"]
    text = (finished / "gpu.md").read_text()
    assert text.index("## Goals") < text.index("## What the machine can do")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 1 + len(PARTS)
    for table in tables:
        lines = table.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1, table
        assert re.fullmatch(r"[|:\- ]+", lines[1])
        assert len(lines) > 2, table
    assert "nan" not in text.lower().replace("filled with nan", "")


@pytest.mark.slow
def test_a_second_run_takes_over_what_is_finished(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    before = json.loads((finished / "gpu.json").read_text())
    assert gpu.bench(finished, ["machine", "model"], "cpu", True, 0.0) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said if "taken over" in line] == ["machine", "model"]
    after = json.loads((finished / "gpu.json").read_text())
    assert after["parts"] == before["parts"]
    assert after["goals"] == before["goals"]


def test_nothing_but_torch_triton_and_transformers_is_needed() -> None:
    """The machine with a GPU has no pydantic and none of these; all parts, and what their items import, must load."""
    code = f"""
import importlib, importlib.abc, sys
ABSENT = "pydantic faiss scipy numba pluggy typer rich mlflow lm_eval psutil datasets peft matplotlib pandas".split()

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

ours = {[str(ROOT), str(ROOT / "harness"), str(ROOT / "plugins")]!r}  # not all below: .venv may be
sys.path[:] = [path for path in sys.path if path not in ours]
sys.meta_path.insert(0, Absent())
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu
gpu.prepare("cpu")
from gpu_parts import NAMES, check_cases, forced, formats, goals, part, report, runner
for name in NAMES:
    part.load(name)
from evenbits.kernels import codebook, integer, nearest
from evenbits_pocketllm import captured, kernels, linear, network, settings
assert forced.all_kernels()
assert not [name for name in ABSENT if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def _setting() -> Any:
    import time

    from gpu_parts.part import Setting

    return Setting(torch.device("cpu"), True, time.monotonic() + 100)


def _compared(run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[dict[str, Any]]:
    """The rows that a product by `run` gets in the part "check"."""
    from gpu_parts.check import linear

    setting = _setting()
    weight = setting.normal(24, 40, seed=1).double()
    return linear(setting, "planted", "case", torch.float16, lambda inputs: run(inputs, weight), weight, [3])


def test_the_check_passes_what_is_right() -> None:
    (row,) = _compared(lambda inputs, weight: (inputs.float() @ weight.half().float().t()).half())
    assert row["ok"]
    assert 0 < row["error"] < row["tolerance"]


def _one_number_off(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found = (inputs.double() @ weight.t()).half()
    found[2, 17] += 0.2
    return found


def _one_number_unwritten(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    right = (inputs.double() @ weight.t()).half()
    found = torch.empty_like(right)
    found[:, :-1] = right[:, :-1]
    return found


_CALLS = itertools.count()


def _never_the_same(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    right = (inputs.double() @ weight.t()).half()
    right[0, 0] *= 1 + next(_CALLS) % 2 / 512  # within the tolerance, every other time
    return right


def _of_another_shape(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (inputs.double() @ weight.t()).half().t()


def _raises(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("planted")


@pytest.mark.parametrize("wrong", [_one_number_off, _one_number_unwritten, _never_the_same, _of_another_shape, _raises])
def test_the_check_catches_what_is_wrong(wrong: Callable[..., torch.Tensor]) -> None:
    from gpu_parts.goals import failures, goals
    from gpu_parts.runner import Result

    rows = _compared(wrong)
    result = Result("check", "done", rows={"planted": rows})
    assert [row["kernel"] for row in failures(result)] == ["planted"]
    assert goals({"check": result}, True)[0].met is False


def test_a_wrong_kernel_of_ours_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real road: a codebook layer through the interpreter, its launches a little off."""
    from gpu_parts.check import linear
    from gpu_parts.packed import codebook, dense

    from evenbits.kernels import codebook_launch
    from evenbits.kernels.codebook import CodebookLinear

    setting = _setting()
    weight = codebook(setting, 9, 13, bits=(5,), d=4)
    module = CodebookLinear(weight, backend="triton")
    (*_, row) = linear(setting, "codebook", "right", torch.float16, module, dense(weight), [2])
    assert row["ok"]
    assert row["ran"]
    right = codebook_launch.multiply

    def wrong(*arguments: Any) -> Any:
        out, config = right(*arguments)
        out[-1, -1] += 0.01 * out.abs().max()
        return out, config

    monkeypatch.setattr(codebook_launch, "multiply", wrong)
    (*_, row) = linear(setting, "codebook", "wrong", torch.float16, module, dense(weight), [2])
    assert not row["ok"]


def test_configurations_that_nothing_ran_are_named() -> None:
    from gpu_parts.goals import goals, unreached
    from gpu_parts.runner import Result

    rows: list[dict[str, Any]] = [{"exist": ["a / one", "a / two"]}, {"error": 0.0, "ok": True, "ran": ["a / one"]}]
    result = Result("check", "done", rows={"all": rows})
    assert unreached(result) == ["a / two"]
    assert goals({"check": result}, True)[0].met is False


CRASHING = '''
"""A part whose items fail in every way there is."""
import os, signal, time
from gpu_parts.part import Column, Item, Part

def fails():
    raise ValueError("planted error")

def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def says(word):
    return lambda: [{"word": word}]

RUNS = {"first": says("a"), "fails": fails, "crashes": crashes, "hangs": lambda: time.sleep(60), "last": says("b")}
PART = Part("crashing", "Crashing", "", 30, (Column("word", "word"),), lambda s: [Item(*pair) for pair in RUNS.items()],
            item_seconds=1.5)
'''
CHILD = f"""
import json, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu
gpu.prepare("cpu")
import gpu_parts
gpu_parts.__path__.append(sys.argv[1])
from gpu_parts import child
sys.exit(child.main(json.load(sys.stdin)))
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, tuple[str, ...]]:
    """A part, and the command of its processes."""
    import gpu_parts
    from gpu_parts.part import load

    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.setattr(gpu_parts, "__path__", [*gpu_parts.__path__, str(tmp_path)])
    part = load("crashing")
    monkeypatch.delitem(sys.modules, "gpu_parts.crashing")
    return part, (sys.executable, "-c", CHILD, str(tmp_path))


def test_a_crash_or_a_hang_costs_one_item(
    crashing: tuple[Any, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import runner
    from gpu_parts.part import Ceilings

    part, command = crashing
    kept: list[runner.Result] = []
    monkeypatch.setattr(runner, "_KEEP", 0.0)
    result = runner.run_part(part, None, Ceilings(), 60, "cpu", True, kept.append, command)
    assert result.rows == {"first": [{"word": "a"}], "last": [{"word": "b"}]}
    assert list(result.failures) == ["fails", "crashes", "hangs"]
    assert "planted error" in result.failures["fails"]
    assert "exit status -11" in result.failures["crashes"]
    assert "no end after" in result.failures["hangs"]
    assert result.status == "failed"
    # while the hung item still ran, all that was found before lay with the caller
    assert any(list(one.failures) == ["fails", "crashes"] and one.left_out == ["hangs", "last"] for one in kept)


def test_a_part_stops_when_its_time_is_out_and_goes_on_later(crashing: tuple[Any, tuple[str, ...]]) -> None:
    from gpu_parts import report, runner
    from gpu_parts.part import Ceilings

    part, command = crashing
    cut = runner.run_part(part, None, Ceilings(), 0.0, "cpu", True, command=command)
    assert not cut.rows
    assert not cut.failures
    assert cut.status == "partial"
    assert cut.left_out == ["first", "fails", "crashes", "hangs", "last"]
    kept = {name: [{"word": "kept"}] for name in cut.left_out[:-1]}
    before = runner.Result("crashing", "partial", rows=kept, left_out=["last"])
    assert "left out, time was out: last" in report.text(_facts(), [], {"crashing": part}, {"crashing": before})
    again = runner.run_part(part, before, Ceilings(), 60, "cpu", True, command=command)
    assert again.rows == kept | {"last": [{"word": "b"}]}
    assert again.status == "done"
    assert not again.left_out


def test_results_of_other_sources_are_set_aside(tmp_path: Path) -> None:
    from gpu_parts import runner

    rows: dict[str, list[dict[str, Any]]] = {
        "an item": [{"word": 'quotes " and @row 0@', "number": 1.5}, {"word": "b"}],
        "none": [],
    }
    result = runner.Result("check", "done", rows=rows)
    path = tmp_path / "gpu.json"
    assert runner.read(path, {"commit": "x"}) == {}
    runner.write(path, runner.dumped({"made_with": {"commit": "x"}, "parts": {"check": asdict(result)}}))
    assert runner.read(path, {"commit": "x"}) == {"check": result}
    assert runner.read(path, {"commit": "y"}) == {}
    assert [left.name for left in tmp_path.iterdir()] == ["gpu-before.json"]
    assert json.loads((tmp_path / "gpu-before.json").read_text())["parts"]["check"]["rows"] == rows


def _timed(kind: str, shape: str, rows: int, us: float) -> dict[str, Any]:
    return {"format": kind, "shape": shape, "rows": rows, "best_us": us, "over_float16": 100 / us}


def test_no_goal_is_met_by_what_is_absent() -> None:
    from gpu_parts.formats import EXACT, FOLDED
    from gpu_parts.goals import goals
    from gpu_parts.linear import SHAPES
    from gpu_parts.runner import Result

    shapes = [f"{out}x{into}" for out, into in SHAPES]

    def verdicts(linear: list[dict[str, Any]], compress: list[str]) -> list[str]:
        matrices = [{"matrix": shape, "block_seconds": 10.0} for shape in compress]
        results = {
            "linear": Result("linear", "done", rows={"all": linear}),
            "compress": Result("compress", "done", rows={"all": matrices}),
        }
        return [goal.verdict for goal in goals(results, False)]

    assert [goal.verdict for goal in goals({}, False)] == ["not measured"] * 5
    fast = [_timed(kind, shape, rows, 30.0) for shape in shapes for kind in (FOLDED, EXACT) for rows in (1, 2048)]
    matrices = ["4096x4096", "11008x4096", "4096x11008"]
    absent = ["not measured"] * 2
    assert verdicts(fast, matrices) == [*absent, "met", "met", "met"]
    assert verdicts(fast[:-2], matrices[:2]) == [*absent, "met", "not measured", "not measured"]
    assert verdicts(fast[:-4], matrices) == [*absent, "not measured", "not measured", "met"]
    slow = [_timed(FOLDED, shapes[0], 1, 60.0), _timed(FOLDED, shapes[0], 2048, 10.0)]
    slow.append(_timed(EXACT, shapes[0], 2048, 30.0))
    assert verdicts(slow, []) == [*absent, "not met", "not met", "not measured"]


def _facts() -> dict[str, Any]:
    made_with = dict.fromkeys("sources gpu driver torch cuda triton transformers python commit".split(), "unknown")
    return {"made_with": made_with | {"small": True}, "clocks": {}, "date": "", "seconds": 1.0, "command": ""}


@torch.inference_mode()
def test_a_static_cache_decodes_what_the_whole_sequence_does() -> None:
    from gpu_parts import model

    setting = _setting()
    llama, _ = model.build(setting, "dense", torch.float32)
    step, rewind = model.steps(setting, llama, 2)
    found = torch.cat([torch.ones(2, 1, dtype=torch.int64), *(step().clone() for _ in range(6))], 1)
    rewind()
    again = torch.cat([torch.ones(2, 1, dtype=torch.int64), *(step().clone() for _ in range(6))], 1)
    assert torch.equal(found, again)
    assert torch.equal(llama(input_ids=found, use_cache=False).logits.argmax(-1)[:, :-1], found[:, 1:])
    assert len(torch.unique(found[0])) > 2


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 12, 15, 16])
def test_torch_roads_read_bit_streams(width: int) -> None:
    from gpu_parts.torch_roads import codes_of

    from evenbits.maths.bitpack import pack

    codes = torch.randint(0, 1 << width, (77,), generator=torch.Generator().manual_seed(width))
    assert codes_of(pack(codes, width), width, 77).tolist() == codes.tolist()


@pytest.mark.parametrize("name", ["PocketLLM folded", "integer 3 bits", "AQLM 2x8", "VPTQ"])
def test_decoding_first_is_the_same_weight(name: str) -> None:
    from gpu_parts import formats
    from gpu_parts.packed import dense
    from gpu_parts.torch_roads import dequantize

    setting = _setting()
    weight = formats.named(name).make(setting, 24, 32, 7)
    exact = dense(weight)
    assert float((dequantize(weight, torch.float32) - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


def test_torch_searches_agree() -> None:
    from gpu_parts.torch_roads import by_addmm, by_cdist

    setting = _setting()
    vectors, centres = setting.normal(100, 4, seed=1), setting.normal(30, 4, seed=2)
    nearest = (vectors[:, None].double() - centres[None].double()).square().sum(2).argmin(1)
    assert torch.equal(by_cdist(vectors, centres, 33), nearest)
    assert torch.equal(by_addmm(vectors, centres, 33), nearest)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x", "--parts", "linear,nothing"], "no part nothing"),
        (["--out", "x", "--device", "cpu"], "goes with --small"),
        (["--device", "cpu", "--small"], "--out DIR is needed"),
    ],
)
def test_bad_words_are_refused(words: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert said in done.stderr
