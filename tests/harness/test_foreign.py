"""What a worker is given, and what it leaves where it ends well and yet is of no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from evenbits.artifact import ArtifactWriter
from evenbits.compressor import Needs
from evenbits.driver import Driver, Work
from evenbits.errors import TrialFailed
from evenbits.foreign import Bench, Checkpoint, CheckpointCompressor
from evenbits.testing import tiny_model, tiny_tokens


class Asking(CheckpointCompressor):
    """Comes to the worker and no further. result: what the worker leaves as result.json."""

    def __init__(self, result: str) -> None:
        self.result = result
        self.request: dict[str, Any] = {}
        self.given: dict[str, tuple[int, ...]] = {}

    def open(self, bench: Bench) -> Checkpoint:
        bench.run(Path("worker.py"), {"bits": 4}, {"probe": torch.zeros(2, 3)})
        raise TrialFailed("it ended well")

    def launch(self, worker: Path, folder: Path) -> None:
        self.request = json.loads((folder / "request.json").read_text())
        with safe_open(folder / "tensors.safetensors", framework="pt") as opened:
            self.given = {name: tuple(opened.get_tensor(name).shape) for name in opened.keys()}  # noqa: SIM118
        (folder / "output" / "model").touch()
        if self.result:
            (folder / "result.json").write_text(self.result)


def run(model: Path, folder: Path, asking: Asking, needs: Needs) -> str:
    work = Work(
        model, "float32", torch.device("cpu"), asking, needs, None, 3, tiny_tokens(model, 2, 8), None,
        launch=asking.launch,
    )  # fmt: skip
    with pytest.raises(TrialFailed) as told, ArtifactWriter(folder / "artifact") as writer:
        Driver(work, writer).run()
    assert not list(folder.iterdir())  # nothing of it is left
    return str(told.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("foreign"), "llama", blocks=1)


def test_a_worker_gets_the_tokens_that_its_method_is_known_by(model: Path, tmp_path: Path) -> None:
    """A recovery stage after it may have drawn some: the artifact's key says nothing of them."""
    asking = Asking("{}")
    assert run(model, tmp_path, asking, Needs("tokens")) == "it ended well"
    assert asking.given == {"tokens": (2, 8), "probe": (2, 3)}
    assert (asking.request["seed"], asking.request["options"]) == (3, {"bits": 4})
    assert run(model, tmp_path, asking, Needs()) == "it ended well"
    assert asking.given == {"probe": (2, 3)}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("", "worker.py: ended without a checkpoint in output/ or without result.json"),
        ("{", "worker.py: its result.json is no JSON"),
        ("[]", 'worker.py: its result.json is no object with "versions" by distribution'),
        ('{"versions": "7.6.0"}', 'worker.py: its result.json is no object with "versions" by distribution'),
        ('{"versions": {"torch": 2}}', 'worker.py: its result.json is no object with "versions" by distribution'),
    ],
)
def test_facts_that_do_not_read_are_one_line(result: str, message: str, model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path, Asking(result), Needs()).startswith(message)
