"""LLM-Pruner: what belongs together goes together, the least important first; what is left is the rest of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evenbits.artifact import Artifact
from evenbits.budget import BitBudget
from evenbits.compressor import ModelShapes, Refusal, Role
from evenbits.driver import seeded_generator
from evenbits.errors import SuiteError, TrialFailed
from evenbits.ledger import measure_bits
from evenbits.models import open_model
from evenbits.plan import Plan, make_plan
from evenbits.planned_model import plan_model
from evenbits.plugins import load_plugins
from evenbits.shapes import LLAMA2_7B, QWEN3_14B, llama_shapes, read_inventory
from evenbits.sources import ModelSource
from evenbits.store import Results
from evenbits.suite import read_suite
from evenbits.testing import check_compressor, compress_model, tiny_model, tiny_text, tiny_tokens
from evenbits.whole import restore_whole
from evenbits_llm_pruner import provide_compressors
from evenbits_llm_pruner.compressor import LlmPruner
from evenbits_llm_pruner.importance import Gradients, aggregated, gradients, most_important, salience, unit_scores
from evenbits_llm_pruner.options import LlmPrunerOptions, by_block, damage, predict, shapes_after
from evenbits_llm_pruner.structures import Part, layout_of, units

(PRUNER,) = provide_compressors()
ARCHITECTURES = ("llama", "qwen3", "opt", "gpt2")
REFERENCE = llama_shapes(192, 512, 6, 64, 2048, dtype="bfloat16", head_dim=32)
BABY = llama_shapes(128, 352, 5, 64, 105, tied=True, dtype="float32", head_dim=16)


def prune(folder: Path, base: Path, *, dtype: str = "float32", seed: int = 0, **options: Any) -> Any:
    """The stored model, opened from its artifact alone."""
    given = LlmPrunerOptions(**{"stored_dtype": "float32", **options})
    tokens = tiny_tokens(base, 8, 24)
    compress_model(PRUNER, given, base, folder, tokens=tokens, dtype=dtype, seed=seed)
    return restore_whole(Artifact(folder), PRUNER.make(given))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).logits
    return found


# -- the model that is left -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_removed_is_the_model(tmp_path: Path, architecture: Any) -> None:
    base = tiny_model(tmp_path / "base", architecture, tied=architecture == "gpt2")
    tokens = tiny_tokens(base, 4, 16)
    dense = logits(open_model(base, "float32", "cpu"), tokens)
    assert torch.equal(logits(prune(tmp_path / "exact", base, ratio=0.0), tokens), dense)
    half = logits(prune(tmp_path / "half", base, ratio=0.0, stored_dtype="float16"), tokens)
    assert 0 < (half - dense).norm() < 2e-3 * dense.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options", [{"ratio": 0.4}, {"ratio": 1.0}, {"ratio": 0.3, "head_ratio": 0.0, "first_block": 1}]
)
def test_a_smaller_model_runs(tmp_path: Path, architecture: Any, options: dict[str, Any]) -> None:
    """The promised shapes and bytes, finite logits, and generation through its cache as without one."""
    base = tiny_model(tmp_path / "base", architecture)
    tokens = tiny_tokens(base, 4, 16)
    model = prune(tmp_path / "out", base, **options)
    given = LlmPrunerOptions(**{"stored_dtype": "float32", **options})
    planned = plan_model(ModelSource("tiny", base, "none"), "float32")
    inventory = read_inventory(base)
    for layer in shapes_after(given, planned.shapes).layers:
        module = model.get_submodule(layer.name)
        shape = (layer.out_features, layer.in_features)
        assert module.weight.shape == (shape[::-1] if inventory.architecture.transposed else shape)
        if module.bias is not None:
            assert module.bias.shape == shape[:1]
    ledger = measure_bits(tmp_path / "out", planned.facts)
    assert ledger.roles == {"kept": predict(given, planned.shapes).role_bytes[Role.KEPT]}
    assert bool(torch.isfinite(logits(model, tokens)).all())
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(input_ids=tokens[:2], use_cache=use, **more) for use in (True, False))
    assert cached.shape[1] > tokens.shape[1]
    assert torch.equal(cached, plain)


def zeroed(model: Any, kept: Mapping[str, list[tuple[Part, Tensor]]], transposed: bool) -> Any:
    """The dense model with everything that was removed set to zero."""
    for name, selections in kept.items():
        module = model.get_submodule(name)
        for part, index in selections:
            weight = module.weight.T if transposed else module.weight
            gone = torch.ones(weight.shape[0 if part.rows else 1], dtype=torch.bool)
            gone[index] = False
            zero(weight, getattr(module, "bias", None), part, gone)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("importance", ["first", "magnitude", "random"])
def test_the_smaller_model_is_the_dense_one_with_zeros(tmp_path: Path, architecture: Any, importance: Any) -> None:
    base = tiny_model(tmp_path / "base", architecture)
    tokens = tiny_tokens(base, 8, 24)
    options = LlmPrunerOptions(ratio=0.4, importance=importance, stored_dtype="float32")
    small = prune(tmp_path / "out", base, ratio=0.4, importance=importance)
    pruner, dense = LlmPruner(options), open_model(base, "float32", "cpu")
    kept = pruner.kept(dense, tokens, seeded_generator(0, "model"))
    assert len(kept) == len(read_inventory(base).layers)
    with torch.no_grad():
        zeroed(dense, kept, architecture == "gpt2")
    found, wanted = logits(small, tokens), logits(dense, tokens)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_half_precision(tmp_path: Path) -> None:
    """Evaluated and stored dtypes are apart, and a float16 model's gradients do not underflow."""
    base = tiny_model(tmp_path / "base")
    full = prune(tmp_path / "full", base, ratio=0.4)
    half = prune(tmp_path / "half", base, ratio=0.4, dtype="float16", stored_dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    stored = Artifact(tmp_path / "half")
    assert {stored.whole()[name].dtype for name in stored.manifest.whole} == {torch.bfloat16}
    for name, parameter in full.named_parameters():
        assert (half.get_parameter(name).float() - parameter).norm() < 1e-2 * parameter.norm()


# -- what goes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("importance", ["first", "second", "fisher", "magnitude"])
@pytest.mark.parametrize("aggregate", ["sum", "max", "product", "last"])
def test_what_is_dead_goes_first(tmp_path: Path, architecture: Any, importance: Any, aggregate: Any) -> None:
    """A head and some channels are planted that nothing reads and that write nothing: without them it computes the
    same."""
    base = tiny_model(tmp_path / "base", architecture)
    dense = open_model(base, "float32", "cpu")
    plant(dense, base)
    dense.save_pretrained(base)
    tokens = tiny_tokens(base, 8, 24)
    groups = 2 if architecture in ("llama", "qwen3") else 4
    options = {"importance": importance, "aggregate": aggregate, "ratio": 11 / 88, "head_ratio": 1 / groups}
    small = prune(tmp_path / "out", base, **options)
    found, wanted = logits(small, tokens), logits(dense, tokens)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
def plant(model: Any, base: Path) -> None:
    """Every block loses one head (a key-value head with its query heads) and eleven channels, by zeros."""
    inventory = read_inventory(base)
    shapes = inventory.shapes()
    for index, block in enumerate(by_block(shapes)):
        for structure in layout_of(block).structures:
            count = units(structure, block, shapes.head_dim)
            assert count is not None
            dead = torch.zeros(count, dtype=torch.bool)
            dead[[(index + 1) % count] if structure.heads else torch.arange(11) * 7 + index] = True
            for part in structure.parts:
                module = model.get_submodule(block[part.kind].name)
                weight = module.weight.T if inventory.architecture.transposed else module.weight
                width = part.size(block[part.kind]) // part.sections // count
                gone = dead.repeat_interleave(width).repeat(part.sections)
                zero(weight, getattr(module, "bias", None), part, gone)


def zero(weight: Tensor, bias: Tensor | None, part: Part, gone: Tensor) -> None:
    """weight: (out, in); what is in those columns reaches nothing, so a bias loses rows alone."""
    if not part.rows:
        weight[:, gone] = 0
        return
    weight[gone] = 0
    if bias is not None:
        bias[gone] = 0


def test_a_heads_query_heads_go_with_it(tmp_path: Path) -> None:
    """With 4 query heads on 2 key-value heads of width 12, what stays is rows 0-23 or 24-47 of q and 0-11 or 12-23 of
    k and v; and GPT-2's q, k and v lose the same heads of their one matrix."""
    base = tiny_model(tmp_path / "base")
    kept = LlmPruner(LlmPrunerOptions(ratio=0.5)).kept(
        open_model(base, "float32", "cpu"), tiny_tokens(base, 4, 24), torch.Generator()
    )
    rows = {name.rpartition(".")[2]: found[0][1].tolist() for name, found in kept.items() if ".0.self_attn" in name}
    first = rows["k_proj"][0] // 12
    assert rows["q_proj"] == rows["o_proj"] == list(range(24 * first, 24 * first + 24))
    assert rows["k_proj"] == rows["v_proj"] == list(range(12 * first, 12 * first + 12))
    base = tiny_model(tmp_path / "gpt2", "gpt2")
    kept = LlmPruner(LlmPrunerOptions(ratio=0.5)).kept(
        open_model(base, "float32", "cpu"), tiny_tokens(base, 4, 24), torch.Generator()
    )
    out = kept["transformer.h.0.attn.c_proj"][0][1]
    assert torch.equal(kept["transformer.h.0.attn.c_attn"][0][1], torch.cat((out, out + 48, out + 96)))


# -- importance -----------------------------------------------------------------------------------------------


def test_gradients_are_autograds(tmp_path: Path) -> None:
    """Against one backward pass of the batch, and one of each sample by torch.autograd.grad."""
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 5, 24)
    model = open_model(base, "float32", "cpu")
    weights = {name: parameter for name, parameter in model.named_parameters() if "proj" in name}
    found = gradients(model, weights, tokens, second=True)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(True)
    batch = model(input_ids=tokens, labels=tokens).loss
    for (name, weight), slow in zip(weights.items(), torch.autograd.grad(batch, list(weights.values())), strict=True):
        assert torch.allclose(found[name].mean, slow, atol=1e-6), name
        assert weight.shape == found[name].mean.shape
    squares = [torch.zeros_like(weight) for weight in weights.values()]
    for sample in tokens:
        loss = model(input_ids=sample[None], labels=sample[None]).loss
        for square, slow in zip(squares, torch.autograd.grad(loss, list(weights.values())), strict=True):
            square += slow**2 / len(tokens)
    for name, square in zip(weights, squares, strict=True):
        squared = found[name].squared
        assert squared is not None
        assert torch.allclose(squared, square, rtol=1e-4, atol=1e-9), name


def test_first_order_foresees_a_small_change(tmp_path: Path) -> None:
    """A channel scaled by 1 - 0.001 changes the loss by a thousandth of its signed first-order importance."""
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 4, 24)
    model = open_model(base, "float64", "cpu")
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    values = salience(weight, gradients(model, {name: weight}, tokens, second=False)[name], "first")

    def loss() -> float:
        return float(functional.cross_entropy(logits(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    before = loss()
    for channel in (0, 17, 40):
        kept = weight.data[:, channel].clone()
        weight.data[:, channel] *= 1 - 1e-3
        assert before - loss() == pytest.approx(1e-3 * float(values[:, channel].sum()), rel=0.02, abs=1e-8)
        weight.data[:, channel] = kept


def test_second_order_adds_the_squared_gradient() -> None:
    """-dL = w g - w^2 F / 2 when a weight goes from w to 0; magnitude is the square."""
    weight, gradient, fisher = torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0.1, 4.0]])
    assert salience(weight, Gradients(gradient, None), "first").tolist() == [[1, -3]]
    second = salience(weight, Gradients(gradient, fisher), "second")
    assert torch.allclose(second, torch.tensor([[1 - 0.2, -3 - 18.0]]))
    assert torch.allclose(salience(weight, Gradients(gradient, fisher), "fisher"), torch.tensor([[0.2, 18.0]]))
    assert salience(weight, None, "magnitude").tolist() == [[4, 9]]


def test_scores_of_units_against_a_loop() -> None:
    values = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    for part, count in ((Part("q"), 3), (Part("o", rows=False), 5), (Part("qkv", sections=3), 2)):
        for per in ("element", "vector"):
            slow = torch.zeros(count, dtype=torch.float64)
            size = 12 if part.rows else 10
            for place in range(size):
                vector = values[place] if part.rows else values[:, place]
                owner = place % (size // part.sections) // (size // part.sections // count)
                slow[owner] += float(vector.abs().sum()) if per == "element" else abs(float(vector.sum()))
            assert torch.allclose(unit_scores(values, part, count, per), slow, rtol=1e-5)


def test_aggregates() -> None:
    scores = [torch.tensor(row, dtype=torch.float64) for row in ([1, 4, 2, 0], [3, 1, 2, 9], [2, 2, 3, 1])]
    assert aggregated(scores, "sum").tolist() == [6, 7, 7, 10]
    assert aggregated(scores, "max").tolist() == [3, 4, 3, 9]
    assert aggregated(scores, "last").tolist() == [2, 2, 3, 1]
    assert torch.allclose(aggregated(scores, "product").exp(), torch.tensor([6, 8, 12, 0], dtype=torch.float64))
    assert most_important(aggregated(scores, "sum"), 2).tolist() == [1, 3]  # the earlier one of two equals
    assert most_important(aggregated(scores, "product"), 3).tolist() == [0, 1, 2]


def test_measures_differ_and_the_lot_depends_on_the_seed(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    tokens = tiny_tokens(base, 8, 24)

    def chosen(seed: int = 0, order: Any = None, **options: Any) -> list[int]:
        pruner, model = LlmPruner(LlmPrunerOptions(ratio=0.5, **options)), open_model(base, "float32", "cpu")
        given = tokens if order is None else tokens[order]
        kept = pruner.kept(model, given, torch.Generator().manual_seed(seed))
        return [place for name in sorted(kept) for place in kept[name][0][1].tolist()]

    measures = [chosen(importance=name) for name in ("first", "fisher", "magnitude", "random")]
    measures += [chosen(per="vector"), chosen(aggregate="last")]
    assert all(one != other for i, one in enumerate(measures) for other in measures[:i])
    assert chosen(seed=1) == measures[0]
    assert chosen(seed=1, importance="random") != measures[3] == chosen(importance="random")
    # whatever the order of the samples; and only as many of them as asked for
    assert chosen(order=torch.tensor([5, 2, 7, 0, 3, 1, 6, 4])) == measures[0]
    assert chosen(order=torch.arange(4)) == chosen(samples=4) != measures[0]


# -- bits -----------------------------------------------------------------------------------------------------


def test_the_contract() -> None:
    assert check_compressor(PRUNER) == []


def test_the_papers_setting() -> None:
    """25 % of the groups in blocks 4 to 29 of Llama-7B are about a fifth of the parameters (section 4.1)."""
    options = LlmPrunerOptions(ratio=0.25, first_block=4, last_block=29)
    estimate = predict(options, LLAMA2_7B)
    share = estimate.role_bytes[Role.KEPT] / 2 / LLAMA2_7B.weights
    assert share == pytest.approx(1 - 0.25 * 26 / 32, abs=1e-4)
    assert estimate.paper_bits == pytest.approx(16 * share)
    assert estimate.linear_bits(LLAMA2_7B) == pytest.approx(16 * share)
    removed = (1 - share) * LLAMA2_7B.weights / LLAMA2_7B.parameters
    assert removed == pytest.approx(0.20, abs=0.01)


@pytest.mark.parametrize("shapes", [REFERENCE, BABY, LLAMA2_7B, QWEN3_14B], ids=["reference", "baby", "7B", "14B"])
def test_settings_are_found(shapes: ModelShapes) -> None:
    previous = None
    for centre, window in ((2.05, 0.05), (2.46, 0.045), (3.05, 0.05), (4.46, 0.05), (8, 0.1), (9, 0.1), (12, 0.1)):
        budget = BitBudget(centre, window)
        options = PRUNER.fit(budget, shapes, {})
        assert isinstance(options, LlmPrunerOptions), options
        assert predict(options, shapes).linear_bits(shapes) in budget
        assert previous is None or damage(options, shapes) < previous
        previous = damage(options, shapes)
    pinned = PRUNER.fit(BitBudget(8, 0.2), shapes, {"head_ratio": 0.5, "first_block": 1})
    assert isinstance(pinned, LlmPrunerOptions)
    assert (pinned.head_ratio, pinned.first_block) == (0.5, 1)
    wide = PRUNER.fit(BitBudget(32, 0.1), shapes, {"stored_dtype": "float32"})
    assert isinstance(wide, LlmPrunerOptions)
    assert damage(wide, shapes) == 0


def test_refusals_say_what_is_near() -> None:
    few = llama_shapes(64, 8, 2, 32, 100, head_dim=16)  # a channel is 0.3 bit
    refused = PRUNER.fit(BitBudget(15.5, 0.001), few, {})
    assert isinstance(refused, Refusal)
    assert "nearest: 15." in refused.reason
    phi = tuple(layer for layer in LLAMA2_7B.layers if layer.kind != "mlp.gate_proj")
    refused = PRUNER.fit(BitBudget(8, 0.1), ModelShapes(phi, 1, 0), {})
    assert isinstance(refused, Refusal)
    assert "it is for Llama, Mistral, Qwen2, Qwen3 and Gemma, OPT, GPT-2" in refused.reason
    with pytest.raises(SuiteError, match=r"blocks 4 to 29 are to be pruned; the model has 0 to 5"):
        predict(LlmPrunerOptions(first_block=4, last_block=29), REFERENCE)
    blind = ModelShapes(REFERENCE.layers, REFERENCE.parameters, REFERENCE.rest_bytes)
    with pytest.raises(SuiteError, match="width of a head is not known here; give head_ratio = 0"):
        predict(LlmPrunerOptions(), blind)
    found = PRUNER.fit(BitBudget(8, 0.1), blind, {})
    assert isinstance(found, LlmPrunerOptions)
    assert found.head_ratio == 0
    with pytest.raises(SuiteError, match=r"^option ratio: "):
        PRUNER.fit(BitBudget(8, 0.1), REFERENCE, {"ratio": 1.5})


@pytest.mark.parametrize(("fixed", "pruned"), [({"first_block": 5}, [5]), ({"last_block": 0}, [0])])
def test_one_end_of_the_range_may_be_given(fixed: dict[str, int], pruned: list[int]) -> None:
    """Where ranges that `fit` tries would end before they start."""
    found = PRUNER.fit(BitBudget(14.5, 0.1), REFERENCE, fixed)
    assert isinstance(found, LlmPrunerOptions)
    assert list(found.blocks(6)) == pruned
    with pytest.raises(SuiteError, match=r"blocks 6 to 5 are to be pruned; the model has 0 to 5"):
        PRUNER.fit(BitBudget(14.5, 0.1), REFERENCE, {"first_block": 6})


def test_it_says_what_it_needs(tmp_path: Path) -> None:
    assert [PRUNER.needs_of(LlmPrunerOptions(importance=name)).statistics for name in ("first", "random")] == [
        "inputs",
        "none",
    ]
    base = tiny_model(tmp_path / "base")
    with pytest.raises(TrialFailed, match="importance 'first' needs calibration data"):
        compress_model(PRUNER, LlmPrunerOptions(), base, tmp_path / "none")
    model = open_model(base, "float32", "cpu")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(base)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.mlp\.up_proj: its weights are not finite in float16"):
        compress_model(PRUNER, LlmPrunerOptions(ratio=0.0), base, tmp_path / "large", tokens=tiny_tokens(base, 2, 16))


# -- recovery -------------------------------------------------------------------------------------------------

SUITE = """
name = "pruned"
model = {{ path = "{model}", name = "tiny" }}
dtype = "float32"
budgets = [{{ centre = 9.5, window = 0.2 }}]
methods = [
    {{ name = "llm-pruner", label = "pruned", budget = "free", options = {half} }},
    {{ name = "llm-pruner", label = "beside", budget = "free", options = {half}, recovery = [{{ name = "lora", options = {lora} }}] }},
    {{ name = "llm-pruner", label = "merged", budget = "free", options = {half}, recovery = [{{ name = "lora", options = {merge} }}] }},
    {{ name = "llm-pruner", label = "norms", budget = "free", options = {half}, recovery = [{{ name = "distill", options = {{ epochs = 2 }} }}] }},
    {{ name = "llm-pruner", label = "fitted", recovery = [{{ name = "lora", options = {lora} }}] }},
    {{ name = "llm-pruner", label = "fitted, merged", recovery = [{{ name = "lora", options = {merge} }}] }},
    {{ name = "llm-pruner", label = "too large", recovery = [{{ name = "lora", options = {{ r = 40 }} }}] }},
]

[calibration]
corpus = {{ name = "text", path = "{train}" }}
samples = 16
length = 32

[[evaluators]]
name = "perplexity"
options.corpus = {{ name = "text", path = "{test}" }}
options.context = 32
"""  # noqa: E501


ADAPTED = """
name = "adapted"
model = {{ path = "{model}", name = "tiny" }}
budgets = [{{ centre = 6, window = 0.3 }}, {{ centre = 12, window = 0.3 }}, {{ centre = 17, window = 0.3 }}]
methods = [{{ name = "llm-pruner", recovery = [{{ name = "lora", options = {{ r = {rank} }} }}] }}]
calibration = {{ corpus = {{ name = "text", path = "{text}" }}, samples = 8, length = 32 }}
evaluators = [{{ name = "perplexity", options = {{ corpus = {{ name = "text", path = "{text}" }}, context = 32 }} }}]
"""


def test_adapters_leave_room_for_each_other_and_for_the_weights(tmp_path: Path) -> None:
    """From almost all bytes for adapters to more than the dense model has at 16 bits; a refusal says what both take."""
    registry, model = load_plugins(), tiny_model(tmp_path / "model", "qwen3")
    (tmp_path / "text").write_text(tiny_text(2000))

    def planned(rank: int) -> Plan:
        (tmp_path / "suite.toml").write_text(ADAPTED.format(model=model, text=tmp_path / "text", rank=rank))
        return make_plan(read_suite(tmp_path / "suite.toml", registry), registry)

    found = planned(8)
    assert not found.skips
    budgeted = [(trial.budget, trial.predicted) for trial in found.trials if trial.budget is not None]
    assert len(budgeted) == 3
    assert all(predicted is not None and predicted.linear in budget for budget, predicted in budgeted)
    refused = [skip.reason for skip in planned(40).skips]
    assert refused[0].startswith("no setting together with the recovery stages within 6 +- 0.3 linear bits; nearest: ")


def test_a_suite_with_recovery(tmp_path: Path) -> None:
    """Adapters are billed on the smaller layers, merged at no cost, and `fit` leaves room for them."""
    pytest.importorskip("peft", reason='needs pip install "evenbits[lora]"')
    model = tiny_model(tmp_path / "model", "qwen3")
    words = tiny_text(6000).split()
    paths = {"model": model, "train": tmp_path / "train.txt", "test": tmp_path / "test.txt"}
    for name, part in (("train", words[:3000]), ("test", words[3000:])):
        paths[name].write_text(" ".join(part))
    lora = "r = 2, lr = 1e-2, batch_size = 4"
    options = {"half": "{ ratio = 0.4 }", "lora": f"{{ {lora} }}", "merge": f"{{ {lora}, merge = true }}"}
    (tmp_path / "suite.toml").write_text(SUITE.format(**paths, **options))
    command = [sys.executable, "-m", "evenbits.cli", "run", "suite.toml", "--results", "results", "--no-report"]
    environment = {**os.environ, "EVENBITS_DISABLE": "mlflow"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    records: dict[str, Any] = {record.label: record for record in Results(tmp_path / "results").records("pruned")[0]}
    skipped = records.pop("too large")
    assert skipped.status == "skipped"
    assert "the recovery stage alone takes" in skipped.reason or "no setting" in skipped.reason
    del records["dense"]
    assert {record.status for record in records.values()} == {"done"}, done.stdout
    for record in records.values():
        assert record.ledger.bits.linear == record.predicted.linear
        assert record.ledger.bits.paper == record.predicted.paper
    shapes = read_inventory(model).shapes("float32")
    after = shapes_after(LlmPrunerOptions(ratio=0.4), shapes)
    numbers = sum(2 * (layer.out_features + layer.in_features) for layer in after.layers)
    pruned, beside, merged, norms = (records[name] for name in ("pruned", "beside", "merged", "norms"))
    assert beside.ledger.roles == {**pruned.ledger.roles, "adapter": 2 * numbers}
    assert merged.ledger.roles == norms.ledger.roles == pruned.ledger.roles
    for name in ("fitted", "fitted, merged"):
        assert records[name].within_budget is True
    assert records["fitted"].options["ratio"] > records["fitted, merged"].options["ratio"]
    perplexity = {name: record.metrics[0].value for name, record in records.items()}
    assert perplexity["beside"] < 0.8 * perplexity["pruned"]
    assert perplexity["merged"] == pytest.approx(perplexity["beside"], rel=1e-2)
    assert perplexity["norms"] < perplexity["pruned"]
