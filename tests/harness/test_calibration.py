"""Calibration: batches, blocks run one by one, second moments and their cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from evenbits import calibration
from evenbits.calibration import BlockRunner, DenseMoments, SecondMoment, batches_of, block_moments
from evenbits.errors import TrialFailed
from evenbits.models import open_model
from evenbits.shapes import read_inventory
from evenbits.testing import ModelKind, tiny_model, tiny_tokens

ARCHITECTURES: tuple[ModelKind, ...] = ("llama", "qwen3", "opt", "gpt2")


@given(samples=st.integers(1, 40), length=st.integers(1, 20000))
def test_batches_hold_all_tokens_in_order(samples: int, length: int) -> None:
    tokens = torch.arange(samples)[:, None].expand(samples, length)
    batches = batches_of(tokens)
    assert torch.equal(torch.cat([batch[:, 0] for batch in batches]), torch.arange(samples))
    assert all(batch.numel() <= max(length, calibration.TOKENS_AT_A_TIME) for batch in batches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_by_block_is_the_whole_model(
    tmp_path: Path, architecture: ModelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TOKENS_AT_A_TIME", 64)
    base = tiny_model(tmp_path / "base", architecture, blocks=3)
    tokens = tiny_tokens(base, 5, 32)
    model = open_model(base, "float32", "cpu")
    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    runner = BlockRunner(model, read_inventory(base).architecture, tokens)
    assert len(runner.blocks) == 3
    hidden = runner.hidden
    assert [states.shape[0] for states in hidden] == [2, 2, 1]
    for index in range(3):
        assert torch.allclose(torch.cat(hidden), expected[index], atol=1e-5), f"input of block {index}"
        hidden = runner.run_all(index, hidden)
    assert all(not block._forward_pre_hooks for block in runner.blocks)


def test_the_mean_does_not_depend_on_the_batches() -> None:
    rows = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    whole, parts = SecondMoment(), SecondMoment()
    whole.add(rows)
    for part in (rows[:1], rows[1:30], rows[30:].reshape(2, 15, 7)):
        parts.add(part)
    assert parts.rows == 60
    assert torch.allclose(whole.mean(), parts.mean(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(whole.mean().double(), rows.double().T @ rows.double() / 60, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    rows = torch.ones(2000, 3, dtype=torch.bfloat16)
    moment = SecondMoment()
    for part in (rows[start : start + 10] for start in range(0, 2000, 10)):
        moment.add(part)
    assert moment.mean().dtype == torch.float32
    assert torch.equal(moment.mean(), torch.ones(3, 3))


def opener(base: Path, tokens: torch.Tensor, opened: list[int]) -> Any:
    def open_runner() -> BlockRunner:
        opened.append(1)
        return BlockRunner(open_model(base, "float32", "cpu"), read_inventory(base).architecture, tokens)

    return open_runner


def test_dense_moments_are_computed_once_and_read_again(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base)
    inventory = read_inventory(base)
    opened: list[int] = []
    first = DenseMoments(tmp_path / "cache", opener(base, tokens, opened), inventory)
    names = [layer.name for layer, _ in inventory.layers]
    found = {name: first.get(name) for name in names}
    assert opened == [1]
    again = DenseMoments(tmp_path / "cache", opener(base, tokens, opened), inventory)
    for name in names:
        assert torch.equal(again.get(name), found[name])
    assert opened == [1]
    assert not list((tmp_path / "cache").glob(".*"))


def test_layers_of_one_input_are_stored_once(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    inventory = read_inventory(base)
    moments = DenseMoments(tmp_path / "cache", opener(base, tiny_tokens(base), []), inventory)
    query, key, up, gate = (
        moments.get(f"model.layers.1.{kind}")
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj")
    )
    assert torch.equal(query, key)
    assert torch.equal(up, gate)
    assert not torch.equal(query, up)
    with safe_open(tmp_path / "cache" / "block-0001.safetensors", framework="pt") as file:
        assert len(file.keys()) == 4  # qkv, o, gate and up, down
        assert file.metadata()["model.layers.1.self_attn.v_proj"] == "model.layers.1.self_attn.q_proj"


def test_a_cache_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens, inventory = tiny_tokens(base), read_inventory(base)
    opened: list[int] = []
    moments = DenseMoments(tmp_path / "cache", opener(base, tokens, opened), inventory)
    expected = moments.get("model.layers.1.mlp.down_proj")
    (tmp_path / "cache" / "block-0001.safetensors").unlink()
    assert torch.equal(moments.get("model.layers.1.mlp.down_proj"), expected)
    assert opened == [1, 1]


def test_moments_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    model = open_model(base, "float32", "cpu")
    inventory = read_inventory(base)
    runner = BlockRunner(model, inventory.architecture, tiny_tokens(base))
    hidden = [torch.full_like(states, float("inf")) for states in runner.hidden]
    modules: dict[str, nn.Module] = {n: model.get_submodule(n) for n in ["model.layers.0.mlp.up_proj"]}
    with pytest.raises(TrialFailed, match=r"^model\.layers\.0\.mlp\.up_proj: its inputs .* not finite"):
        block_moments(runner, 0, hidden, modules)
    assert not modules["model.layers.0.mlp.up_proj"]._forward_pre_hooks
