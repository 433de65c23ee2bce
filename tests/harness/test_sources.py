"""A hub model that is not here yet: planned from its outline, and checked against its files once they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import SuiteError

REVISION = "0123456789abcdef" * 2 + "01234567"
OUTLINE = (
    "hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 2, "
    'num_key_value_heads = 2, vocab_size = 64, dtype = "float32"'
)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub's cache, empty so far, will keep the model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "models--org--tiny" / "snapshots" / REVISION


def text(suites: Any, outline: str = OUTLINE) -> str:
    """The tiny suite on a model of the hub."""
    written: str = suites.text()
    line = next(line for line in written.splitlines() if line.startswith("model = "))
    inner = f", outline = {{ {outline} }}" if outline else ""
    return written.replace(line, f'model = {{ id = "org/tiny", revision = "{REVISION}"{inner} }}')


def test_planned_from_the_outline_as_from_the_files(here: Any, suites: Any, tiny: Any, snapshot: Path) -> None:
    before = here.plan(text(suites))
    assert all(not trial.model.source.present for trial in before.trials)
    assert all(trial.predicted_bytes for trial in before.trials if trial.method != "dense")
    assert before.trials[0].model.source.folder == snapshot
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny.model / name, snapshot)
    assert here.plan(text(suites)).order == before.order  # a snapshot without weights is not the model
    shutil.copytree(tiny.model, snapshot, dirs_exist_ok=True)
    after = here.plan(text(suites))
    assert all(trial.model.source.present for trial in after.trials)
    assert after.order == before.order
    assert [trial.predicted for trial in after.trials] == [trial.predicted for trial in before.trials]


@pytest.mark.parametrize(("old", "new", "said"), [
    ("intermediate_size = 64", "intermediate_size = 48",
     "model.layers.0.mlp.gate_proj is 48 x 32 float32 in the outline, 64 x 32 float32 in the files"),
    ("num_hidden_layers = 2", "num_hidden_layers = 3", "model.layers.2.self_attn.q_proj is 32 x 32 float32 in the "
     "outline, not there in the files"),
    ("num_hidden_layers = 2", "num_hidden_layers = 1", "the files have 7 linear layers more"),
    ('"float32"', '"float16"', "32 x 32 float16 in the outline, 32 x 32 float32 in the files"),
    ("vocab_size = 64", "vocab_size = 65", "13,0"),
])  # fmt: skip
def test_an_outline_of_another_model(
    here: Any, suites: Any, tiny: Any, snapshot: Path, old: str, new: str, said: str
) -> None:
    shutil.copytree(tiny.model, snapshot)
    with pytest.raises(SuiteError) as caught:
        here.plan(text(suites, OUTLINE.replace(old, new)))
    message = str(caught.value)
    assert message.startswith("model org/tiny: its outline does not describe its files: ")
    assert "\n" not in message
    assert said in message or "parameters in the outline" in message


def test_without_files_a_run_says_so(here: Any, suites: Any, snapshot: Path) -> None:
    from evenbits.plan import make_plan
    from evenbits.plugins import load_plugins

    with pytest.raises(SuiteError, match=r"org/tiny at .* is not in the local cache; the hub cannot be reached"):
        make_plan(here.read(text(suites)), load_plugins(), download=True)
    with pytest.raises(SuiteError, match=r"is not in the local cache; `evenbits run` downloads it"):
        here.plan(text(suites, outline=""))
