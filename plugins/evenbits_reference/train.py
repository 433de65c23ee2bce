"""Train the reference model: `python -m evenbits_reference.train --out FOLDER --minutes 60 --seed 0`.

The stream never repeats: each document is told once. The learning rate follows the share of the budget that is
spent, in minutes or in tokens, so that a run always ends at zero. A stopped run goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from evenbits_reference import world
from evenbits_reference.documents import tell, tell_all
from evenbits_reference.tokenizing import VOCABULARY, save_tokenizer, train_tokenizer

CONTEXT = 256
ARCHITECTURE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHUNK = 5_000  # documents told at a time
WARMUP, DECAY_FROM = 0.02, 0.3  # shares of the budget
LONG_FROM = 0.6  # before, rows are half as long: cheaper, and most texts are shorter than that


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    document: int = 0  # told so far
    held: int = 0  # tokens of them that no step has seen yet
    seconds: float = 0.0
    spent: float = 0.0  # share of the budget


class Stream:
    """Endless token ids of the train split, each document after a <s>."""

    def __init__(self, tokenizer: Any, seed: int, document: int, held: int) -> None:
        """Start at `document`, with the last `held` tokens of those before it still to be read."""
        self._tokenizer = tokenizer
        self._seed = seed
        self._rest = np.empty(0, dtype=np.int64)
        self.document = document
        while len(self._rest) < held:
            self._rest = np.concatenate([self._told(self.document - CHUNK), self._rest])
            self.document -= CHUNK
        self.document = document
        self._rest = self._rest[len(self._rest) - held :]

    @property
    def held(self) -> int:
        return len(self._rest)

    def _told(self, first: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        texts = [tell("train", self._seed, first + index).text for index in range(CHUNK)]
        return np.concatenate(self._tokenizer(texts)["input_ids"]).astype(np.int64)

    def take(self, count: int) -> Tensor:
        while len(self._rest) < count:
            self._rest = np.concatenate([self._rest, self._told(self.document)])
            self.document += CHUNK
        taken, self._rest = self._rest[:count], self._rest[count:]
        return torch.from_numpy(taken)


def learning_rate(spent: float) -> float:
    """Share of the highest rate: a short rise, a plateau, and straight down to zero."""
    if spent < WARMUP:
        return spent / WARMUP
    return min(1.0, max(0.0, (1 - spent) / (1 - DECAY_FROM)))


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def step_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """rows: (batch, length) token ids. Mean loss over positions 2..length."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validation(model: nn.Module, tokenizer: Any, documents: int = 300) -> dict[str, float]:
    """Loss per token over the first validation documents, and the generator's own figure for them."""
    told = list(islice(tell_all("validation"), documents))
    loss, count = 0.0, 0
    for document in sorted(told, key=lambda document: len(document.text)):
        ids = torch.tensor([tokenizer(document.text)["input_ids"][:CONTEXT]])
        loss += float(step_loss(model, ids)) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return {"validation_loss": loss / count, "generator_nats": sum(d.nats for d in told) / count}


def save_checkpoint(path: Path, model: nn.Module, optimizer: list[torch.optim.Optimizer], progress: Progress) -> None:
    temporary = path.with_suffix(".new")
    state = {"model": model.state_dict(), "optimizer": [o.state_dict() for o in optimizer], "progress": vars(progress)}
    torch.save(state, temporary)
    temporary.replace(path)


def export(model: Any, folder: Path) -> None:
    """Weights in bf16, config and tokenizer, as transformers reads them."""
    copy = transformers.LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.config.dtype = torch.bfloat16
    copy.save_pretrained(folder)
    save_tokenizer(folder)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "world": str(world.VERSION),
    }


def build(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**ARCHITECTURE, initializer_range=0.04, attn_implementation="eager")
    )


def train(out: Path, minutes: float | None, tokens: int | None, seed: int, batch: int, save_every: float) -> None:
    """batch: tokens a step. Exactly one of minutes and tokens is the budget."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.pt", out / "train.jsonl"
    tokenizer = train_tokenizer()
    model = build(seed)
    optimizer = optimizers(model)
    base = [[group["lr"] for group in each.param_groups] for each in optimizer]
    progress = Progress()
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for each, saved in zip(optimizer, state["optimizer"], strict=True):
            each.load_state_dict(saved)
        progress = Progress(**state["progress"])
    stream = Stream(tokenizer, seed, progress.document, progress.held)

    def write(**row: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    command = shlex.join(["python", "-m", "evenbits_reference.train", *sys.argv[1:]])
    write(command=command, seed=seed, architecture=ARCHITECTURE, versions=versions(), **vars(progress))
    last = saved_at = time.monotonic()
    losses: list[float] = []
    since = progress.tokens
    while progress.spent < 1:
        for each, rates in zip(optimizer, base, strict=True):
            for group, rate in zip(each.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(progress.spent)
        length = CONTEXT if progress.spent >= LONG_FROM else CONTEXT // 2
        loss = step_loss(model, stream.take(batch // length * length).view(-1, length))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizer:
            each.step()
            each.zero_grad()
        now = time.monotonic()
        progress.step += 1
        progress.tokens += batch // length * length
        progress.seconds += now - last
        last = now
        progress.document, progress.held = stream.document, stream.held
        share = progress.seconds / (60 * minutes) if minutes is not None else progress.tokens / (tokens or 1)
        progress.spent = min(1.0, share)
        losses.append(float(loss.detach()))
        if now - saved_at > 60 * save_every or progress.spent >= 1:
            speed = (progress.tokens - since) / (now - saved_at)
            measured = validation(model, tokenizer)
            write(**vars(progress), loss=sum(losses) / len(losses), tokens_per_second=speed, **measured)
            save_checkpoint(checkpoint, model, optimizer, progress)
            losses, since, saved_at = [], progress.tokens, time.monotonic()
    export(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=2.0, help="minutes")
    chosen = parser.parse_args()
    if (chosen.minutes is None) == (chosen.tokens is None):
        parser.error("give --minutes or --tokens")
    torch.set_num_threads(chosen.threads)
    train(chosen.out, chosen.minutes, chosen.tokens, chosen.seed, chosen.batch, chosen.save_every)


if __name__ == "__main__":
    main()
