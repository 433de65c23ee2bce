"""Runs rows of token trees through a causal model: log-probabilities of chosen tokens at chosen nodes.

A row is one batch entry: its nodes with their depths as position_ids, and a 4-D mask by which a node sees only its
ancestors and itself. Logits are made only where a request needs them. Whether a model honours mask and positions is for
`probe` to find out: one that does not (state-space models, ALiBi by place in the row, windows narrower than the text)
gives other scores packed than single.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenbits.errors import TrialFailed
from evenbits_lmeval.trie import Array, Layout, Prefixes, Row, cut_rows, lay_out, sort_prefixes

CHUNK_ELEMENTS = 1 << 24  # of float32 logits at a time when they are normalised: 64 MiB
# What a row costs beside its tokens in the linear layers, in tokens' worth, measured on a 50M Llama on two CPU cores:
# a fixed part (weights are read anew) and masked attention, which runs at 1 / 1.7 of the matrix products' speed.
FIXED_TOKENS = 15.0
ATTENTION_PENALTY = 1.7
# How far packed and single scores may be apart in the probe: the greatest difference of a token where arithmetic is
# exact enough, else the RMS over tokens against units in the last place of 1 and against what batching alone moves.
TOLERANCE_NATS = {torch.float32: 1e-4, torch.float64: 1e-6}
PROBE_TOKENS = 6  # at least, so that the sequences made of them differ
HALF_UNITS = 8
HALF_NOISES = 4
NO_NUMBER = "lm-eval: the model's log-probabilities are not numbers (NaN); another dtype helps where halves overflow"


@dataclass(frozen=True)
class Request:
    """Score `targets` as what follows each of the last len(targets) of `tokens`: 1 <= len(targets) <= len(tokens)."""

    tokens: Sequence[int] | Array
    targets: Sequence[int] | Array


@dataclass(frozen=True)
class Score:
    log_probability: float  # nats, summed over the targets
    greedy: bool  # whether each target is the model's likeliest token


@dataclass(frozen=True)
class Batch:
    rows: list[Row]
    length: int  # the longest row's


class TreeForward:
    """Scores requests by trees of their shared prefixes.

    batch_tokens: upper bound of the tokens of one forward pass, padding included; one longer request still has a pass
    of its own.
    """

    def __init__(self, model: torch.nn.Module, batch_tokens: int) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.device = next(model.parameters()).device
        self._accepts = _accepted(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, torch.nn.Module) else None

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], list[Score]]]:
        """Numbers of the requests scored by one forward pass, and their scores, pass after pass; every request once.

        Raises ValueError at a score that is not a number.
        """
        if not requests:
            return
        prefixes = sort_prefixes([request.tokens for request in requests])
        owners: list[list[int]] = [[] for _ in prefixes.sequences]
        for number, at in enumerate(prefixes.index.tolist()):
            owners[at].append(number)
        rows = cut_rows(prefixes, self.batch_tokens, FIXED_TOKENS, attention_share(self.model))
        for batch in join_rows(rows, self.batch_tokens):
            yield self._score_batch(batch, prefixes, owners, requests)

    def _score_batch(
        self, batch: Batch, prefixes: Prefixes, owners: list[list[int]], requests: Sequence[Request]
    ) -> tuple[list[int], list[Score]]:
        layouts = [lay_out(prefixes, row) for row in batch.rows]
        numbers: list[int] = []
        places: list[np.ndarray[Any, Any]] = []
        targets: list[np.ndarray[Any, Any]] = []
        for place, (row, layout) in enumerate(zip(batch.rows, layouts, strict=True)):
            for at, path in zip(range(row.first, row.last), layout.paths, strict=True):
                for number in owners[at]:
                    wanted = np.asarray(requests[number].targets, dtype=np.int64)
                    numbers.append(number)
                    targets.append(wanted)
                    places.append(path[len(path) - len(wanted) :] + place * batch.length)
        values, likeliest = self.log_probabilities(
            layouts, batch.length, np.concatenate(places), np.concatenate(targets)
        )
        if np.isnan(values).any():
            raise ValueError("log-probabilities are not numbers (NaN)")
        bounds = np.cumsum([0, *(len(wanted) for wanted in targets)])
        scores = [
            Score(float(values[low:high].sum()), bool(likeliest[low:high].all()))
            for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
        return numbers, scores

    def log_probabilities(
        self, layouts: Sequence[Layout], length: int, places: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Log-probability of targets[i] after places[i], and whether it is the likeliest token there.

        places: (n,) int64, row * length + node. Returns nats (n,) float64, computed in float32, and (n,) bool.
        """
        keep, which = np.unique(places, return_inverse=True)
        logits = self._logits(layouts, length, torch.from_numpy(keep).to(self.device))
        row = torch.from_numpy(which).to(self.device)
        target = torch.from_numpy(targets).to(self.device)
        picked = torch.empty(len(targets), dtype=torch.float32, device=self.device)
        likeliest = torch.empty(len(targets), dtype=torch.bool, device=self.device)
        size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        for low in range(0, len(logits), size):
            part = logits[low : low + size].log_softmax(-1, dtype=torch.float32)
            inside = ((row >= low) & (row < low + size)).nonzero().squeeze(1)
            here, wanted = row[inside] - low, target[inside]
            picked[inside] = part[here, wanted]
            likeliest[inside] = part.argmax(-1)[here] == wanted
        return picked.double().cpu().numpy(), likeliest.cpu().numpy()

    def _logits(self, layouts: Sequence[Layout], length: int, keep: Tensor) -> Tensor:
        """(len(keep), vocabulary) logits at the flat places `keep` of a batch of rows padded to `length`."""
        count = len(layouts)
        tokens = np.zeros((count, length), dtype=np.int64)
        depths = np.zeros((count, length), dtype=np.int64)
        mask = np.zeros((count, 1, length, length), dtype=bool)
        for place, layout in enumerate(layouts):
            size = len(layout.tokens)
            tokens[place, :size], depths[place, :size] = layout.tokens, layout.depths
            tokens[place, size:] = layout.tokens[0]
            layout.allow(mask[place, 0, :size, :size])
            padding = np.arange(size, length)
            mask[place, 0, padding, padding] = True  # a node that sees nothing would be NaN
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(tokens).to(self.device),
            "position_ids": torch.from_numpy(depths).to(self.device),
            "attention_mask": self._mask(torch.from_numpy(mask).to(self.device)),
            "use_cache": False,
        }
        missing = [name for name in ("position_ids", "attention_mask") if not self._accepts(name)]
        if missing:
            raise TypeError(f"the model's forward takes no {' and no '.join(missing)}")
        arguments = {name: value for name, value in arguments.items() if self._accepts(name)}
        with torch.inference_mode(), _only(self._head, keep, count * length):
            logits: Tensor = self.model(**arguments).logits
        flat = logits.reshape(-1, logits.shape[-1])
        return flat if len(flat) == len(keep) else flat[keep]  # all are there where no module of a head was called

    def _mask(self, allowed: Tensor) -> Tensor:
        """SDPA takes booleans whatever the dtype of the queries; other implementations add the mask to the scores."""
        config = getattr(self.model, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            return allowed
        dtype = _dtype(self.model)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )


def join_rows(rows: Sequence[Row], batch_tokens: int) -> list[Batch]:
    """Rows of like length together, the longest first, as many as fit in batch_tokens with padding; at least one."""
    batches: list[Batch] = []
    for row in sorted(rows, key=lambda row: (-row.size, row.first)):
        if batches and (len(batches[-1].rows) + 1) * batches[-1].length <= batch_tokens:
            batches[-1].rows.append(row)
        else:
            batches.append(Batch([row], row.size))
    return batches


def text_config(model: Any) -> Any:
    """The configuration of the language part, where a model has others too; None where it has none."""
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def attention_share(model: torch.nn.Module) -> float:
    """What attention over s tokens costs, over s^2, in tokens' worth of the linear layers: 4 d L FLOPs to 2 P."""
    config = text_config(model)
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    weights = sum(
        parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1 and "embed" not in name
    )
    return ATTENTION_PENALTY * 2 * width * layers / max(weights, 1)


def probe(forward: TreeForward, tokens: Sequence[int], row_tokens: int) -> str | None:
    """None when packed scores equal those of sequences alone, else why they cannot be trusted, with the difference.

    tokens: the longest sequence to be scored. row_tokens: the longest row to be packed: an attention that knows only
    places in the row may reach too short just there. Each compared sequence is scored at every position, alone as
    lm-eval does and packed: all in one row of that length, and a long and a short one as a batch with padding.
    Raises TrialFailed for a model whose scores alone are not numbers.
    """
    width = window(forward.model)
    if width is not None and len(tokens) > width:
        return f"the model's attention window ({width} tokens) is narrower than the longest request ({len(tokens)})"
    whole, short, others = _trials(forward.model, tokens, row_tokens)
    last = max(others)
    trials = [whole, last, short]
    alone = [_alone(forward, [trial])[0] for trial in trials]
    expected = torch.cat([*alone, alone[0], alone[2]])
    if expected.isnan().any():
        raise TrialFailed(NO_NUMBER)
    try:
        row = _packed(forward, [[*trials, *(other for other in others if other not in trials)]], trials)
        padded = _packed(forward, [[whole], [short]], trials)
    except Exception as error:  # whatever a model's code raises at a mask or positions that it does not know
        return failure(error)
    found = torch.cat([row, padded])
    apart = torch.where(found == expected, 0.0, (found - expected).abs())  # both may be -inf
    dtype = _dtype(forward.model)
    if dtype in TOLERANCE_NATS:
        difference, allowed, kind = float(apart.max()), TOLERANCE_NATS[dtype], "a token"
    else:
        batch = _alone(forward, [whole, short])  # what HFLM's own batches move
        noise = (torch.cat([alone[0], alone[2]]) - torch.cat(batch)).square().mean().sqrt()
        difference, kind = float(apart.square().mean().sqrt()), "a token (RMS)"
        allowed = max(HALF_UNITS * torch.finfo(dtype).eps, HALF_NOISES * float(noise))
    if difference <= allowed:
        return None
    return f"packed scores differ from single ones by {difference:.2g} nats {kind}, more than {allowed:.2g}"


def _trials(
    model: torch.nn.Module, tokens: Sequence[int], row_tokens: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """The sequence, a short one that shares nothing with it, and others that share its first half.

    But for the short one, all as one tree have row_tokens nodes or more.
    """
    whole = list(tokens) if len(tokens) >= PROBE_TOKENS else (list(tokens) * PROBE_TOKENS)[:PROBE_TOKENS]
    half = len(whole) // 2
    own = len(whole) - 1 - half  # the last token is only a target
    config = text_config(model)
    vocabulary = int(getattr(config, "vocab_size", 0)) or max(whole) + 1
    others = [
        [*whole[:half], number % vocabulary, number // vocabulary % vocabulary, *whole[half + 2 :][::-1]]
        for number in range(max(1, -(-(row_tokens - half) // own) - 1))
    ]
    short = [1 if whole[0] == 0 else 0, *whole[::-1][: max(1, len(whole) // 6 - 1)]]
    return whole, short, others


def failure(error: Exception) -> str:
    return f"packed sequences fail: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def window(model: torch.nn.Module) -> int | None:
    """The narrowest attention window or chunk that the configuration speaks of, in tokens; a packed row ignores it."""
    config = text_config(model)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    widths = [width for width in found if isinstance(width, int) and width > 0]
    return min(widths, default=None)


def _alone(forward: TreeForward, trials: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probability of each token but the first, the trials as one batch padded on the right: lm-eval's own way."""
    longest = max(map(len, trials)) - 1
    padded = [[*trial[:-1], *[trial[0]] * (longest + 1 - len(trial))] for trial in trials]
    with torch.inference_mode():
        logits = forward.model(torch.tensor(padded, device=forward.device)).logits
    found = []
    for trial, rows in zip(trials, logits, strict=True):
        targets = torch.tensor(list(trial[1:]), device=rows.device)
        logs = [
            part.log_softmax(-1, dtype=torch.float32).gather(1, wanted[:, None])
            for part, wanted in zip(torch.split(rows[: len(targets)], 256), torch.split(targets, 256), strict=True)
        ]
        found.append(torch.cat(logs).squeeze(1).double().cpu())
    return found


def _packed(forward: TreeForward, rows: Sequence[Sequence[list[int]]], compared: Sequence[list[int]]) -> Tensor:
    """As of `_alone`, for those of each row that are compared. Each row is one tree, all are one batch."""
    trees = [sort_prefixes([trial[:-1] for trial in row]) for row in rows]
    layouts = [lay_out(tree, Row(0, len(tree.sequences), tree.nodes)) for tree in trees]
    length = max(tree.nodes for tree in trees)
    places, targets = [], []
    for number, (row, tree, layout) in enumerate(zip(rows, trees, layouts, strict=True)):
        for trial, at in zip(row, tree.index.tolist(), strict=True):
            if trial in compared:
                places.append(layout.paths[at] + number * length)
                targets.append(np.asarray(trial[1:], dtype=np.int64))
    values, _ = forward.log_probabilities(layouts, length, np.concatenate(places), np.concatenate(targets))
    return torch.from_numpy(values)


def _accepted(model: torch.nn.Module) -> Any:
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return lambda name: name in parameters or anything


@contextmanager
def _only(head: torch.nn.Module | None, keep: Tensor, places: int) -> Iterator[None]:
    """Let the model's head see only the hidden states at the flat places `keep`, as one row."""
    if head is None:
        yield
        return

    def choose(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        if hidden.shape[:-1].numel() != places:
            raise ValueError(f"the head is given {tuple(hidden.shape)}, not the states of {places} tokens")
        return (hidden.reshape(-1, hidden.shape[-1])[keep.to(hidden.device)][None], *arguments[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
