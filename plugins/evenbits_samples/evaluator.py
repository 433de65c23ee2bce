"""Greedy continuations of prompts, one prompt at a time with a KV cache.

Greedy, so that the text depends on the weights alone and a difference from the dense model is the compressor's doing.
Unlike `generate` of transformers, which fills up batches and reads sampling defaults from the model's files, nothing
here pads or depends on a generation config but for the tokens that end a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from evenbits.errors import TrialFailed
from evenbits.measure import Sample, Subject
from evenbits.sampling import encode
from evenbits_samples.options import SamplesOptions


class SamplesEvaluator:
    def __init__(self, options: SamplesOptions) -> None:
        self.options = options

    def evaluate(self, subject: Subject) -> Sequence[Sample]:
        """One sample a prompt, in order. details: tokens of prompt and continuation, why it stopped, and the mean
        log-probability (nats) that the model gave the tokens it wrote.

        stopped: "end of text" (an EOS, or a BOS, with which models that never saw an EOS begin the next document),
        "length" (new_tokens) or "context" (the model's). Raises TrialFailed for a prompt that fills the context, a
        corpus with too few documents of that length, and logits that are not finite.
        """
        prompts = list(self._prompts(subject))
        tick = subject.progress(len(prompts), "samples")
        samples = []
        for number, (prompt, ids) in enumerate(prompts, 1):
            samples.append(self._continue(subject, prompt, ids, number))
            tick(1)
        return samples

    def _prompts(self, subject: Subject) -> Iterable[tuple[str, list[int]]]:
        options, tokenizer = self.options, subject.tokenizer
        for prompt in options.prompts:
            yield prompt, _without_end(encode(tokenizer, prompt), tokenizer)
        if options.corpus is None:
            return
        text = subject.corpus(options.corpus)
        found = 0
        for document in text.documents:
            if found == options.count:
                return
            ids = _without_end(encode(tokenizer, document), tokenizer)
            if len(ids) > options.prompt_tokens:
                found += 1
                start = ids[: options.prompt_tokens]
                yield tokenizer.decode(start, skip_special_tokens=True, clean_up_tokenization_spaces=False), start
        if found < options.count:
            raise TrialFailed(
                f"samples: corpus {text.identity.get('name', '?')!r} has {found} documents of more than "
                f"{options.prompt_tokens} tokens, not {options.count}; lower count or prompt_tokens"
            )

    def _continue(self, subject: Subject, prompt: str, ids: list[int], number: int) -> Sample:
        model, tokenizer, wanted = subject.model, subject.tokenizer, self.options.new_tokens
        context = _context(model)
        if not ids:
            raise TrialFailed(f"samples: prompt {number} has no tokens")
        if context is not None and len(ids) >= context:
            raise TrialFailed(
                f"samples: prompt {number} has {len(ids)} tokens, the model's context {context}; give a shorter one"
            )
        room = wanted if context is None else min(wanted, context - len(ids))
        new, scores, ended = greedy(model, ids, room, end_tokens(model, tokenizer), subject.device, number)
        stopped = "end of text" if ended else "length" if room == wanted else "context"
        details: dict[str, Any] = {"decoding": "greedy", "prompt_tokens": len(ids), "new_tokens": wanted}
        details |= {"tokens": len(new), "stopped": stopped}
        if scores:
            details["mean_logprob"] = sum(scores) / len(scores)
        return Sample(prompt=prompt, text=_text(tokenizer, ids, new), details=details)


@torch.no_grad()
def greedy(
    model: Any, ids: Sequence[int], new_tokens: int, ends: frozenset[int], device: torch.device, number: int = 1
) -> tuple[list[int], list[float], bool]:
    """The most probable token each time (the first of equals), up to `new_tokens` or a token of `ends`, left out.

    Returns the tokens, their log-probabilities in nats (float32 softmax), and whether a token of `ends` came.
    A model that returns no KV cache is fed the whole text at each step. Raises TrialFailed for logits not finite.
    """
    model.eval()
    everything, cache = list(ids), None
    new: list[int] = []
    scores: list[float] = []
    while len(new) < new_tokens:
        fed = everything if cache is None else everything[-1:]
        output = model(input_ids=torch.tensor([fed], device=device), past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        scored = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
        if not bool(torch.isfinite(scored).any()) or bool(scored.isnan().any()):
            raise TrialFailed(f"samples: logits are not finite at token {len(new) + 1} after prompt {number}")
        token = int(scored.argmax())
        if token in ends:
            return new, scores, True
        new.append(token)
        everything.append(token)
        scores.append(float(scored[token]))
    return new, scores, False


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """EOS by the tokenizer, the config and the generation config (a number or several), and BOS."""
    given = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        given += eos if isinstance(eos, list | tuple) else [eos]
    return frozenset(int(token) for token in given if token is not None)


def _context(model: Any) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers put an EOS behind every text: what follows it would be another text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _text(tokenizer: Any, ids: Sequence[int], new: Sequence[int]) -> str:
    """What was written, with its leading space: tokenizers drop it from the start of what they decode."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = decode(ids), decode([*ids, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)
