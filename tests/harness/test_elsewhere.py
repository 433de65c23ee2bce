"""A suite on another model than its own: what gives way, what does not, and that it is said."""

from __future__ import annotations

from typing import Any

from evenbits.elsewhere import elsewhere
from evenbits.suite_spec import MethodSpec, Suite

FACTS: dict[str, Any] = {
    "name": "paper",
    "model": "m",
    "dtype": "float16",
    "device": "cuda",
    "budgets": [2.0, {"centre": 4.0, "window": 0.5, "on": "model"}],
    "methods": [
        {"name": "aqlm", "options": {"rounds": 2}, "sizes": {"codebooks": 2}, "budget": 2},
        {"name": "gptq", "budget": [4.0]},
    ],
    "evaluators": [
        {"name": "perplexity", "options": {"context": 4096, "batch_size": 4096}},
        {"name": "lm-eval", "options": {"max_length": 128}},
        {"name": "perplexity", "label": "own"},
    ],
    "calibration": {"corpus": "c4", "samples": 128, "length": 2048},
}
TABLE = {"window": 0.3, "context": "model"}
CONFIG = {"max_position_embeddings": 256}


def suite(**changes: Any) -> Suite:
    return Suite.model_validate({**FACTS, **changes})


def test_what_the_table_names_gives_way() -> None:
    found = elsewhere(suite(elsewhere=TABLE), CONFIG, cuda=False)
    assert found.said == (
        "elsewhere: sizes of 1 method left to fit, windows +-0.3, context 4096 -> 256, "
        "calibration length 2048 -> 256, device cuda -> cpu, dtype float16 -> the model's own"
    )
    assert [spec.budget().window for spec in found.suite.budgets] == [0.3, 0.5]
    assert [spec.on for spec in found.suite.budgets] == ["linear", "model"]
    assert [stage.options for stage in found.suite.evaluators] == [
        {"context": 256, "batch_size": 4096}, {"max_length": 128}, {}
    ]  # fmt: skip
    calibration = found.suite.calibration
    assert calibration is not None
    assert (calibration.samples, calibration.length) == (128, 256)
    assert found.suite.methods == (
        MethodSpec(name="aqlm", options={"rounds": 2}, budget=(2.0,)), MethodSpec(name="gptq", budget=(4.0,))
    )  # fmt: skip
    assert (found.suite.device, found.suite.dtype) == ("cpu", "auto")


def test_a_suite_without_the_table_loses_its_sizes_alone() -> None:
    found = elsewhere(suite(), CONFIG, cuda=False)
    assert found.said == "elsewhere: sizes of 1 method left to fit"
    assert found.suite == suite(methods=[{"name": "aqlm", "options": {"rounds": 2}, "budget": 2}, FACTS["methods"][1]])
    plain = suite(methods=["rtn"])
    unchanged = elsewhere(plain, CONFIG, cuda=False)
    assert (unchanged.suite, unchanged.said) == (plain, None)


def test_what_fits_stays() -> None:
    found = elsewhere(suite(elsewhere=TABLE, methods=["rtn"], budgets=[{"centre": 4, "window": 0.4}]),
                      {"max_position_embeddings": 4096}, cuda=True)  # fmt: skip
    assert found.said is None
    assert (found.suite.device, found.suite.dtype) == ("cuda", "float16")


def test_a_config_that_does_not_tell_its_context() -> None:
    found = elsewhere(suite(elsewhere=TABLE), {}, cuda=True)
    assert "contexts as they are, for the model's config has no max_position_embeddings" in found.changes
    assert found.suite.evaluators == suite().evaluators
    assert elsewhere(suite(elsewhere=TABLE), {"n_positions": 64}, cuda=True).suite.evaluators[1].options == {
        "max_length": 64
    }
