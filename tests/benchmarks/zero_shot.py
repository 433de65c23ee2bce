"""How fast zero-shot items are scored, by token trees against lm-eval's HFLM, and that both say the same.

    python tests/benchmarks/zero_shot.py --out results/bench [--data DIR] [--items 40] [--agree 0]

Speed: a random 50M Llama (hidden 512, 8 layers, feed-forward 3072, vocabulary 4096 untied) with the tokenizer of
stories260K, the first --items items of each of the five sets, context 256 and 512. A round scores each set by HFLM at
every batch size (the two fastest only, after the first round), each time with the trees right after; a ratio is that of
medians over the rounds. Agreement: stories260K on whole sets (or --agree items of each, none if negative), every score.
Writes zero_shot.json and zero_shot.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.models import load_tokenizer, open_model
from evenbits_lmeval.loading import loaded_tasks
from evenbits_lmeval.options import FIVE, LmEvalOptions
from evenbits_lmeval.scorer import make_scorer
from evenbits_lmeval.scoring import Items, build
from evenbits_lmeval.trie import sort_prefixes

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZES = (1, 4, 8, 16, 32)
CONTEXTS = (256, 512)
GOAL_NATS = 1e-4
NOISE_REQUESTS = 800  # of each set that HFLM scores at a second batch size, to show its own noise
GOALS = {"arc_easy": 2.3, "arc_challenge": 2.3, "hellaswag": 1.8, "winogrande": 1.4, "piqa": 1.2, "all five": 2.0}


def read_tasks(data: Path, limit: int | None) -> dict[str, Items]:
    """The five sets' requests as lm-eval's tasks make them."""
    options = LmEvalOptions.model_validate({"tasks": FIVE, "data": str(data / "tasks"), "limit": limit})
    with loaded_tasks(options) as loaded:
        return {name: build(name, task, options) for name, task in loaded.tasks.items()}


def leave_out(items: Items, scorer: Any) -> int:
    """Drop items with a continuation longer than the context, at which HFLM ends in an AssertionError; how many."""
    fits = [
        all(len(scorer._encode_pair(*request.args)[1]) <= scorer.max_length for request in requests)
        for requests in items.requests
    ]
    items.docs = [doc for doc, fit in zip(items.docs, fits, strict=True) if fit]
    items.requests = [requests for requests, fit in zip(items.requests, fits, strict=True) if fit]
    return fits.count(False)


def accuracies(items: Items, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """acc and acc_norm by lm-eval's own metrics."""
    each = iter(answers)
    found = [
        items.task.process_results(doc, [next(each) for _ in requests])
        for doc, requests in zip(items.docs, items.requests, strict=True)
    ]
    return {
        metric: statistics.mean(float(one[metric]) for one in found)
        for metric in ("acc", "acc_norm")
        if metric in found[0]
    }


def count_tokens(scorer: Any, asked: Sequence[Any]) -> tuple[int, int]:
    """Tokens HFLM encodes without padding, and nodes of one tree over all requests, as truncated."""
    inputs = []
    for context, continuation in (instance.args for instance in asked):
        before, after = scorer._encode_pair(context, continuation)
        inputs.append([*before, *after][-(scorer.max_length + 1) :][:-1])
    return sum(map(len, inputs)), sort_prefixes(inputs).nodes


def timed(model: Any, asked: list[Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, spent = time.perf_counter(), time.process_time()
    model.loglikelihood(asked, disable_tqdm=True)
    return time.perf_counter() - wall, time.process_time() - spent


def measure_speed(data: Path, items: int, rounds: int, context: int, batch_tokens: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, intermediate_size=3072, num_attention_heads=8, vocab_size=4096,
        tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokenizer = load_tokenizer(data / "models" / "stories260K")
    hflm = {
        f"hflm {size}": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=context)
        for size in BATCH_SIZES
    }
    tree = make_scorer(model, tokenizer, device="cpu", max_length=context, batch_tokens=batch_tokens, kind="tree")
    asked: dict[str, list[Any]] = {}
    counts: dict[str, int] = {}
    for name, task in read_tasks(data, items).items():
        leave_out(task, tree)
        asked[name] = list(task.flat)
        counts[name] = len(task.docs)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in asked}
    best: dict[str, str] = {}
    for number in range(rounds):
        for name in asked:
            # after the first round only the two fastest batch sizes go on
            for kind in hflm if not number else sorted(hflm, key=lambda kind: found[name][kind][0][1])[:2]:
                found[name].setdefault(kind, []).append(timed(hflm[kind], asked[name]))
                found[name].setdefault("tree", []).append(timed(tree, asked[name]))
    rows = {}
    for name in asked:
        medians = {
            kind: [statistics.median(one[at] for one in times) for at in (0, 1)] for kind, times in found[name].items()
        }
        best[name] = min((kind for kind in medians if kind != "tree"), key=lambda kind: medians[kind][0])
        tokens, nodes = count_tokens(tree, asked[name])
        rows[name] = {
            "items": counts[name],
            "requests": len(asked[name]),
            "tokens": tokens,
            "nodes": nodes,
            "bound": tokens / nodes,
            "best_hflm": best[name],
            "seconds": {kind: {"wall": value[0], "cpu": value[1]} for kind, value in medians.items()},
        }
    return {"context": context, "batch_tokens": tree.policy["batch_tokens"], "sets": _with_ratios(rows)}


def _with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    counts = ("items", "requests", "tokens", "nodes")
    totals: dict[str, Any] = {key: sum(row[key] for row in rows.values()) for key in counts}
    totals["bound"] = totals["tokens"] / totals["nodes"]
    totals["best_hflm"] = "each set's"
    totals["seconds"] = {
        kind: {
            clock: sum(row["seconds"][row["best_hflm"] if kind == "best" else kind][clock] for row in rows.values())
            for clock in ("wall", "cpu")
        }
        for kind in ("best", "tree")
    }
    rows = {**rows, "all five": totals}
    for row in rows.values():
        slow = row["seconds"]["best" if row is totals else row["best_hflm"]]
        fast = row["seconds"]["tree"]
        row["ratio"] = {clock: slow[clock] / fast[clock] for clock in ("wall", "cpu")}
        row["items_per_second"] = {"hflm": row["items"] / slow["wall"], "tree": row["items"] / fast["wall"]}
    return rows


def measure_agreement(data: Path, count: int) -> dict[str, Any]:
    """stories260K: the greatest difference of a score, greedy flags that differ, and accuracies by both."""
    folder = data / "models" / "stories260K"
    tokenizer = load_tokenizer(folder)
    model = open_model(folder, "float32", "cpu")
    tree = make_scorer(model, tokenizer, device="cpu", kind="tree")
    hflm, single = (HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in (8, 1))
    rows = {}
    for name, items in read_tasks(data, count or None).items():
        dropped = leave_out(items, tree)
        asked = list(items.flat)
        cut = tree.truncated
        ours = tree.loglikelihood(asked, disable_tqdm=True)
        theirs = hflm.loglikelihood(asked, disable_tqdm=True)
        few = single.loglikelihood(asked[:NOISE_REQUESTS], disable_tqdm=True)
        rows[name] = {
            "items": len(items.docs),
            "items_left_out": dropped,
            "requests": len(asked),
            "truncated": tree.truncated - cut,
            "greatest_difference_nats": max(_apart(ours, theirs)),
            "over_goal": sum(nats > GOAL_NATS for nats in _apart(ours, theirs)),
            "hflm_batch_1_to_8_nats": max(_apart(few, theirs[:NOISE_REQUESTS])),
            "greatest_score_nats": max(abs(score) for score, _ in theirs),
            "greedy_differs": sum(one[1] != other[1] for one, other in zip(ours, theirs, strict=True)),
            "tree": accuracies(items, ours),
            "hflm": accuracies(items, theirs),
        }
        print(name, rows[name], flush=True)
    return rows


def _apart(some: Sequence[tuple[float, bool]], others: Sequence[tuple[float, bool]]) -> list[float]:
    return [abs(one[0] - other[0]) for one, other in zip(some, others, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--items", type=int, default=40, help="items of each set for speed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--agree", type=int, default=0, help="items of each set for agreement; 0: all")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    speed = [
        measure_speed(arguments.data, arguments.items, arguments.rounds, context, arguments.batch_tokens)
        for context in arguments.contexts
    ]
    agreement = measure_agreement(arguments.data, arguments.agree) if arguments.agree >= 0 else {}
    environment = describe_environment()
    versions = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment,
        "versions": versions,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "speed": speed,
        "agreement": agreement,
    }
    text = as_markdown(record)
    write_atomically(arguments.out / "zero_shot.json", json.dumps(record, indent=1).encode())
    write_atomically(arguments.out / "zero_shot.md", text.encode())
    print(text)


def as_markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    lines = [
        "# Zero-shot scoring: token trees against lm-eval's HFLM",
        "",
        f"{record['date']}, commit {git['commit'][:12]}{' (modified)' if git['dirty'] else ''}, "
        f"{environment['processor']}, {environment['cores']} cores, {record['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + ".",
        "Written by `python tests/benchmarks/zero_shot.py --out results/bench`.",
        "",
        "Random 50M Llama, float32, tokenizer of stories260K. HFLM at its fastest of batch sizes "
        f"{', '.join(map(str, BATCH_SIZES))}; bound: tokens HFLM encodes without padding over nodes of one tree.",
    ]
    for part in record["speed"]:
        lines += [
            "",
            f"## Context {part['context']}, {part['batch_tokens']} tokens a pass",
            "",
            "| set | items | HFLM at its best | HFLM, items/s | trees, items/s | times as fast | by CPU time | bound "
            "| goal |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in part["sets"].items():
            rate = row["items_per_second"]
            lines.append(
                f"| {name} | {row['items']} | {row['best_hflm']} | {rate['hflm']:.2f} | {rate['tree']:.2f} | "
                f"{row['ratio']['wall']:.2f} | {row['ratio']['cpu']:.2f} | {row['bound']:.2f} | {GOALS[name]:.1f} |"
            )
    if record["agreement"]:
        lines += [
            "",
            "## stories260K, float32: do both say the same?",
            "",
            "Differences are of whole scores, in nats; HFLM's own is between batch size 1 and 8, over the first "
            f"{NOISE_REQUESTS} requests. Left out: items with a choice longer than the context, at which HFLM stops.",
            "",
            "| set | items | left out | requests | cut | greatest score | greatest difference | over 1e-4 "
            "| HFLM's own | greedy differs | acc, trees / HFLM | acc_norm, trees / HFLM |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in record["agreement"].items():
            both = [
                f"{row['tree'][metric]:.4f} / {row['hflm'][metric]:.4f}" if metric in row["tree"] else "-"
                for metric in ("acc", "acc_norm")
            ]
            counts = " | ".join(str(row[key]) for key in ("items", "items_left_out", "requests", "truncated"))
            nats = f"{row['greatest_difference_nats']:.1e} | {row['over_goal']} | {row['hflm_batch_1_to_8_nats']:.1e}"
            lines.append(
                f"| {name} | {counts} | {row['greatest_score_nats']:.0f} | {nats} | {row['greedy_differs']} | "
                f"{both[0]} | {both[1]} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
