"""Which of a kernel's configurations runs: timed once on a GPU, which is stood in for here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evenbits.kernels.launch import Config, Tuner

pytest.importorskip("triton", reason="pip install 'evenbits[kernels]' for the Triton kernels")
GPU = torch.device("cuda")
CONFIGS = (Config("first", {}), Config("large", {}), Config("fast", {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the configurations that were timed, in order; "fast" takes the least, "large" fits no GPU."""
    found: list[str] = []

    def do_bench(run: Callable[[], Any], **options: Any) -> float:
        run()
        return {"first": 2.0, "fast": 1.0}[found[-1]]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def launcher(launched: list[str]) -> Callable[[Config], None]:
    from triton.runtime.errors import OutOfResources

    def run(config: Config) -> None:
        launched.append(config.name)
        if config.name == "large":
            raise OutOfResources(300_000, 232_448, "shared memory")

    return run


def test_the_fastest_that_fits_is_kept(launched: list[str]) -> None:
    tuner, run = Tuner(), launcher(launched)
    assert tuner.choose("key", CONFIGS, run, GPU).name == "fast"
    assert tuner.times == {"key": {"first": 2.0, "fast": 1.0}}
    assert tuner.choose("key", CONFIGS, run, GPU).name == "fast"
    assert launched == ["first", "large", "fast"]
    with pytest.raises(RuntimeError, match="no configuration of 2 fits this GPU: large, large"):
        tuner.choose("other", [CONFIGS[1]] * 2, run, GPU)


def test_the_first_where_nothing_may_be_timed(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, run = Tuner(), launcher(launched)
    assert tuner.choose("key", CONFIGS, run, torch.device("cpu")).name == "first"
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuner.choose("key", CONFIGS, run, GPU).name == "first"
    assert launched == []
    assert tuner.choose("key", CONFIGS, run, GPU).name == "fast"  # what a capture took was not kept
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tuner.choose("key", CONFIGS, run, GPU).name == "first"  # nor does an earlier timing count any more
