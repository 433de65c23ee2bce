"""What a plan says of bytes, against what the driver writes."""

from __future__ import annotations

from typing import Any

import pytest

from evenbits.effort import Estimator
from evenbits.footprint import compress_memory, disk, downloads, moment_bytes, needs_of, shown_bytes
from evenbits.plan import Plan, Trial
from evenbits.planned_model import PlannedModel
from evenbits.plugins import load_plugins
from evenbits.shapes import LLAMA2_7B
from evenbits.store import Results, size_of

CALIBRATED = '[{ name = "rtn", budget = "free" }, { name = "llm-codebook", budget = "free", options.d = 2 }]'


def test_moments_of_llama_2_7b() -> None:
    """Four a block: q, k and v read one input, gate and up another."""
    assert moment_bytes(LLAMA2_7B) == 32 * 4 * (3 * 4096**2 + 11008**2)


def test_what_a_run_writes_and_what_is_left_after_it(here: Any, suites: Any) -> None:
    text = suites.text(CALIBRATED.replace("options.d = 2", "options = { d = 2, codebook_size = 16 }"))
    plan, store, registry = here.plan(text), Results(here.folder / "results"), load_plugins()
    artifacts, moments, records = disk(plan, registry, store)
    assert (artifacts.what, records.bytes) == ("2 artifacts", None)
    here.run(text)
    payload = sum(size_of(file) for file in store.artifacts.rglob("*.safetensors"))
    assert artifacts.bytes is not None
    assert moments.bytes is not None
    assert payload == pytest.approx(artifacts.bytes, rel=0.2)  # a file of tiny layers is a good part header
    cached = sum(size_of(file) for file in (store.cache / "moments").rglob("*.safetensors"))
    assert cached == pytest.approx(moments.bytes, rel=0.2)
    after = disk(plan, registry, store)
    assert [(amount.what, amount.bytes) for amount in after] == [("0 artifacts", 0), ("records", 0)]
    # nor does it take time: only measuring anew does, where another evaluator is asked for
    assert not any(Estimator(plan, registry, store, "cpu").effort().stages.values())
    other = here.plan(text.replace("options.context = 32", "options.context = 16"))
    effort = Estimator(other, registry, store, "cpu").effort()
    assert ([trial.label for trial, _ in effort.evaluate], effort.compress) == (["dense", "rtn", "llm-codebook"], ())


def test_data_sets_of_the_hub_are_named(here: Any, suites: Any, tiny: Any) -> None:
    text = suites.text('[{ name = "gptq", budget = "free" }]')
    assert [(amount.what, amount.bytes) for amount in downloads(here.plan(text), load_plugins())] == [("model tiny", 0)]
    text = text.replace(f'{{ name = "text", path = "{tiny.train}" }}', '"c4"')
    text += '[[evaluators]]\nname = "lm-eval"\noptions.tasks = ["piqa"]\n'
    found = downloads(here.plan(text), load_plugins())
    assert [(amount.what, amount.bytes) for amount in found[1:]] == [
        ("c4 (train)", None), ("piqa", None)
    ]  # fmt: skip


def planned(here: Any, suites: Any, methods: str) -> Plan:
    plan: Plan = here.plan(suites.text(methods))
    return plan


def test_memory_of_a_method_with_statistics(here: Any, suites: Any) -> None:
    """The whole model is open, and hidden states wait three times; without statistics there is one layer."""
    from dataclasses import replace

    registry = load_plugins()
    methods = '[{ name = "rtn", budget = "free" }, { name = "gptq", budget = "free" }]'
    free, gptq = (_wide(trial, replace) for trial in planned(here, suites, methods).trials[1:])
    small, large = (compress_memory(trial, needs_of(trial, registry)) for trial in (free, gptq))
    layer = 4 * 11008 * 4096
    assert small.bytes == 8 * layer + 200_000_000
    states = 3 * 4 * 32 * 4096 * 2  # 4 samples of 32 tokens at two bytes
    moments = 4 * (3 * 4096**2 + 11008**2)
    assert large.bytes is not None
    assert large.bytes > 12 * layer + states + moments + gptq.model.facts.model_bytes
    assert "model 13.5 GB" in large.why


def _wide(trial: Trial, replace: Any) -> Trial:
    """The trial on Llama-2-7B."""
    model: PlannedModel = trial.model
    facts = model.facts.model_copy(update={"model_bytes": 2 * LLAMA2_7B.parameters, "dtype": "float16"})
    wide: Trial = replace(trial, model=replace(model, shapes=LLAMA2_7B, dtype="float16", facts=facts))
    return wide


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (999_700, "1,000 kB"), (13_476_831_232, "13.5 GB")],
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert shown_bytes(count) == text
