"""The stages of trials that a plan made, with a recovery stage from a plugin, in this process."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from evenbits import stages
from evenbits.environment_files import Environment
from evenbits.environments import Made
from evenbits.job import Job, StageResult
from evenbits.manifest import MANIFEST, read_manifest
from evenbits.models import open_model
from evenbits.plan import Plan, Trial, make_plan
from evenbits.plugins import load_plugins
from evenbits.subject import load_artifact
from evenbits.suite import Suite, check_suite
from evenbits.suite_spec import Limits
from evenbits.testing import tiny_model, tiny_text, tiny_tokens

PLUGIN = '''
"""A recovery stage: a few Adam steps on the scales and an adapter, towards the dense model's logits."""

from evenbits.compressor import Options, Recovery, Role
from evenbits.hookspecs import hookimpl

LAYER = "model.layers.1.mlp.down_proj"


class Tune:
    def recover(self, work, generator):
        import torch
        from torch.nn.functional import kl_div, log_softmax

        a = torch.nn.Parameter(0.1 * torch.randn(2, 88, generator=generator))
        b = torch.nn.Parameter(torch.zeros(48, 2))
        work.add_adapter(LAYER, {"A": a, "B": b})
        dense = work.dense()
        with torch.no_grad():
            target = log_softmax(dense(input_ids=work.calibration).logits, dim=-1)
        optimiser = torch.optim.Adam([*work.parameters.values(), a, b], lr=3e-3)
        for _ in range(12):
            optimiser.zero_grad()
            found = log_softmax(work.model(input_ids=work.calibration).logits, dim=-1)
            kl_div(found.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean").backward()
            optimiser.step()


@hookimpl
def provide_recoveries():
    return [Recovery("tune", "", "", Options, lambda o: Tune(), lambda o, s: {Role.ADAPTER: 4 * 2 * (48 + 88)})]
'''


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    (tmp_path / "evenbits_toytune.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evenbits_toytune", raising=False)
    toy = EntryPoint("toytune", "evenbits_toytune", "evenbits")
    registry = load_plugins([*entry_points(group="evenbits"), toy])
    assert registry.problems == []
    monkeypatch.setattr(stages, "registry", lambda: registry)
    base = tiny_model(tmp_path / "base")
    texts = {}
    for name, seed in (("train", 1), ("test", 2)):
        path = tmp_path / f"{name}.txt"
        path.write_text(tiny_text(1500, seed))
        texts[name] = {"name": "text", "path": str(path)}
    options = {"bits": 2, "group_size": 16}
    suite = Suite.model_validate(
        {
            "name": "stages",
            "model": {"path": str(base)},
            "methods": [
                {"name": "rtn", "options": options, "budget": "free"},
                {"name": "rtn", "label": "tuned", "options": options, "budget": "free", "recovery": ["tune"]},
            ],
            "dense_recovery": [["tune"]],
            "evaluators": [{"name": "perplexity", "options": {"corpus": texts["test"], "context": 32}}],
            "calibration": {"corpus": texts["train"], "samples": 8, "length": 32, "allowed_overlap": 1.0},
        }
    )
    check_suite(suite, registry)
    return make_plan(suite, registry)


def run(trial: Trial, tmp_path: Path, stage: Any) -> StageResult:
    job = Job(stage, trial, tmp_path / "artifacts", tmp_path / "cache")
    seen: list[str] = []
    result = stages.run_stage(job, lambda done, total, what: seen.append(what))
    assert seen
    return result


def test_an_environment_is_made_beforehand(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something is left to compress; the worker has the threads of its stage, not a share of them."""
    environment = Environment("gauge", "evenbits_gauge", tmp_path / "gauge.txt", ())
    trial = replace(plan.trials[2], environment=environment, limits=Limits(workers=2))
    made: list[Environment] = []

    def make(asked: Environment, *, say: Any) -> Made:
        say("making it")
        made.append(asked)
        return Made(tmp_path)

    monkeypatch.setattr(stages, "make", make)
    job = Job("compress", trial, tmp_path / "artifacts", tmp_path / "cache")
    told: list[str] = []
    stages.prepare(job, lambda done, total, what: told.append(what))
    assert (made, told) == ([environment], ["environment gauge"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # what is left once the stage is limited
    launch = stages._launch(job, lambda *_: None)
    assert launch is not None
    assert launch.threads == 3
    folder = tmp_path / "artifacts" / trial.chain[0]
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()
    for later in (job, replace(job, stage="evaluate")):
        stages.prepare(later, lambda *_: None)
    assert len(made) == 2


def test_a_recovery_stage_follows_a_method_and_the_dense_model(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    dense, dense_tuned, rtn, tuned = plan.trials
    assert [len(trial.chain) for trial in plan.trials] == [0, 2, 1, 2]
    results = {}
    for trial in plan.trials:
        if trial.chain:
            run(trial, tmp_path, "compress")
        results[trial.id] = run(trial, tmp_path, "evaluate")
    for trial in (dense_tuned, tuned):
        manifest = read_manifest(tmp_path / "artifacts" / trial.chain[1])
        assert manifest.key == trial.chain[1]
        assert [stage["name"] for stage in manifest.recovery] == ["tune"]
        assert read_manifest(tmp_path / "artifacts" / trial.chain[0]).recovery == ()
    adapter = 4 * 2 * (48 + 88)
    ledgers = {trial.id: results[trial.id].ledger for trial in plan.trials}
    assert all(ledger is not None for ledger in ledgers.values())
    assert ledgers[tuned.id].roles["adapter"] == adapter  # type: ignore[union-attr]
    assert ledgers[tuned.id].linear_bytes == ledgers[rtn.id].linear_bytes + adapter  # type: ignore[union-attr]
    assert ledgers[dense_tuned.id].linear_bytes == ledgers[dense.id].linear_bytes + adapter  # type: ignore[union-attr]
    assert tuned.predicted is not None
    assert ledgers[tuned.id].bits.linear == pytest.approx(tuned.predicted.linear)  # type: ignore[union-attr]
    # the stage brings the model back towards dense; the dense model was already there
    model = plan.trials[0].model
    tokens = tiny_tokens(model.source.folder, 8, 32, seed=1)
    folders = [tmp_path / "artifacts" / str(trial.artifact) for trial in (rtn, tuned, dense_tuned)]
    with torch.no_grad():
        target = log_softmax(open_model(model.source.folder, "float32", "cpu")(input_ids=tokens).logits, dim=-1)
        off = []
        for folder in folders:
            found = log_softmax(load_artifact(folder, stages.registry())(input_ids=tokens).logits, dim=-1)
            off.append(float((target.exp() * (target - found)).sum(-1).mean()))
    assert off[1] < 0.9 * off[0]  # on text that it did not see
    assert off[2] < 0.01 * off[0]
    keys = {results[trial.id].metrics[0].fingerprint for trial in plan.trials}
    assert len(keys) == 1
    items = [results[trial.id].arrays()["items-perplexity.npy"] for trial in plan.trials]
    assert all(array.shape == items[0].shape for array in items)


def test_a_finished_artifact_is_not_made_again(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    trial = plan.trials[-1]
    run(trial, tmp_path, "compress")
    stamps = {key: (tmp_path / "artifacts" / key / MANIFEST).stat().st_mtime_ns for key in trial.chain}
    run(trial, tmp_path, "compress")
    assert stamps == {key: (tmp_path / "artifacts" / key / MANIFEST).stat().st_mtime_ns for key in trial.chain}
    first = run(trial, tmp_path, "evaluate").metrics[0]
    second = run(trial, tmp_path, "evaluate").metrics[0]
    assert first == second
