"""Draw calibration tokens once, pin them, and refuse calibration text that holds the test text.

Both the tokens and the overlap are kept in the results folder's cache: every calibrated trial asks for the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenbits.errors import TrialFailed
from evenbits.files import write_atomically
from evenbits.measure import Text
from evenbits.models import load_tokenizer
from evenbits.plan import Trial, content_hash
from evenbits.plugins import Registry
from evenbits.provenance import source_digest
from evenbits.sampling import overlap, sample_windows, tokenizer_identity
from evenbits.subject import read_corpus
from evenbits.suite import check_options


def calibration_tokens(trial: Trial, registry: Registry, cache: Path) -> tuple[Tensor | None, dict[str, Any] | None]:
    """(samples, length) int64 token ids, and the facts that pin them; None and None for a data-free trial.

    Raises TrialFailed when the text is too short, or shares more with a test text than the suite allows.
    """
    calibration = trial.calibration
    if calibration is None:
        return None, None
    text = read_corpus(registry, calibration["corpus"])
    tokenizer = load_tokenizer(trial.model.source.folder, trust_remote_code=trial.model.source.trust_remote_code)
    tokens = _draw(calibration, text, tokenizer, cache)
    facts: dict[str, Any] = {
        "corpus": dict(text.identity),
        "tokenizer": tokenizer_identity(tokenizer),
        "samples": tokens.shape[0],
        "length": tokens.shape[1],
        "tokens": tokens.numel(),
        "sampling": calibration["sampling"] or text.sampling,
        "seed": calibration["seed"],
        "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
    }
    windows = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens.tolist()]
    _refuse_overlap(trial, registry, windows, facts["sha256"] + facts["tokenizer"]["sha256"], cache)
    return tokens, facts


def _draw(calibration: Mapping[str, Any], text: Text, tokenizer: Any, cache: Path) -> Tensor:
    draw = {key: calibration[key] for key in ("samples", "length", "seed", "sampling")}
    facts = {**draw, "corpus": dict(text.identity), "tokenizer": tokenizer_identity(tokenizer), "rule": text.sampling}
    path = cache / "tokens" / f"{content_hash({**facts, 'digest': source_digest('evenbits.sampling')})}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    windows = sample_windows(text, tokenizer, draw["samples"], draw["length"], draw["seed"], draw["sampling"])
    tokens = np.asarray(windows, dtype=np.int64)
    buffer = io.BytesIO()
    np.save(buffer, tokens, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    return torch.from_numpy(tokens)


def _refuse_overlap(trial: Trial, registry: Registry, windows: Sequence[str], key: str, cache: Path) -> None:
    """windows: the calibration samples as text. Only what is used counts, not the whole corpus."""
    for stage in trial.evaluators:
        evaluator = registry.find("evaluators", stage.name, "evaluator").value
        for reference in evaluator.corpora(check_options(evaluator.options, stage.options, stage.name)):
            share = _overlap(windows, key, read_corpus(registry, reference), cache)
            if share > trial.allowed_overlap:
                raise TrialFailed(
                    f"calibration holds {share:.1%} of the 13-word sequences of the test text of {stage.name} "
                    f"(allowed {trial.allowed_overlap:.1%}): use other text, or raise calibration.allowed_overlap"
                )


def _overlap(windows: Sequence[str], key: str, test: Text, cache: Path) -> float:
    facts = {"tokens": key, "test": dict(test.identity), "digest": source_digest("evenbits.sampling")}
    path = cache / "overlap" / f"{content_hash(facts)}.json"
    if path.is_file():
        return float(json.loads(path.read_text()))
    share = overlap(windows, test.joined())
    write_atomically(path, json.dumps(share).encode())
    return share
