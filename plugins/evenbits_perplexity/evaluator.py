"""Perplexity as GPTQ and its successors measure it (arXiv:2210.17323, section 4), with every convention recorded.

Where BOS stands moves the number as much as four-bit quantisation does, so nothing here is left implicit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from evenbits.errors import TrialFailed
from evenbits.measure import Finding, Measurement, Remark, Subject, Text, facts_of
from evenbits.packed import kernels_of
from evenbits.sampling import tokenizer_identity
from evenbits.statistics import bootstrap_interval
from evenbits_perplexity import counts
from evenbits_perplexity.losses import FloatArray, batch_inputs, model_logits, order_batches, sum_losses
from evenbits_perplexity.options import PerplexityOptions
from evenbits_perplexity.windows import Cut, cut_windows, prefix_token

LARGEST_LOSS = 709.0  # exp of more is infinite in float64, which no record can hold


class PerplexityEvaluator:
    def __init__(self, options: PerplexityOptions) -> None:
        self.options = options

    def evaluate(self, subject: Subject) -> Sequence[Finding]:
        """One measurement, "perplexity", and those of the option `per`; a remark where layers of a packed model ran
        on dense weights.

        items: per window, the loss in nats per token (float64), or per word, per byte, or in bits per byte. Under
        windows = documents or rolling, whose windows differ in length, each is weighted by its share of the
        predictions, so that the plain mean of the items is always the loss of which the perplexity is the exp.
        details["weights"]: predictions of each window, where they differ.
        low, high: 95 % bootstrap over windows, the loss itself where there is only one; per word and per
        byte, words and bytes per token are taken as facts of the text.
        Raises TrialFailed when the text is shorter than a window or not what its name says, or at the first window
        whose loss is not finite.
        """
        options = self.options
        text = subject.corpus(options.corpus)
        context = options.context or _model_context(self._model(subject))
        text_counts = counts.count_text(text) if options.allow_other_counts else counts.check_text(text)
        cut = cut_windows(text, subject.tokenizer, context, options)
        known = {}
        if options.windows == "joined" and (family := counts.known_tokens(text, subject.tokenizer)) is not None:
            if not options.allow_other_counts:
                counts.check_tokens(family, cut.tokens, cut.special, context)
            known = {"known": {"tokenizer": family.name, "tokens": family.tokens + cut.special}}
        units = self._units(subject, text, cut)
        sums, logits_dtype = self._losses(subject, cut, context)
        predicted = np.array([window.predicted for window in cut.windows], dtype=np.float64)
        predictions = int(predicted.sum())
        loss = float(sums.sum() / predictions)
        items = sums * (len(sums) / predictions)
        low, high = bootstrap_interval(items, weights=predicted) if len(items) > 1 else (loss, loss)
        low = max(low, 0.0)  # of two or three windows the interval may reach further than any loss
        if loss > LARGEST_LOSS:
            raise TrialFailed(f"perplexity overflows a float: mean loss {loss:.1f} nats/token")
        sizes = {"tokens": cut.tokens, "windows": len(cut.windows), "predictions": predictions}
        fingerprint = self._fingerprint(subject, text, cut, context)
        fingerprint |= {**sizes, "text": text_counts, "logits_dtype": logits_dtype}
        found = Measurement(
            name="perplexity",
            value=math.exp(loss),
            unit="perplexity",
            better="lower",
            low=math.exp(low),
            high=_exp(high),
            fingerprint={**fingerprint, "metric": "perplexity"},
            details={
                "loss": loss,
                "loss_unit": "nats/token",
                "batch_size": options.batch_size,
                "memory": options.memory,
                **({"protocol": options.protocol} if options.protocol else {}),
                **({"passed_over": cut.even_draws} if options.windows == "sampled" else {}),
                **sizes,
                **known,
                "text": text_counts,
                **_per_units(float(sums.sum()), units),
                **self._kernels(subject, cut, context),
                **({} if len(set(predicted)) == 1 else {"weights": predicted.astype(int).tolist()}),
            },
            items=items,
        )
        per = [self._per(name, found, units, loss, low, high) for name in options.per]
        return [found, *per, *self._remarks(subject)]

    def _model(self, subject: Subject) -> Any:
        weights = self.options.weights
        return subject.model if weights == "restored" else subject.opened(weights)

    def _kernels(self, subject: Subject, cut: Cut, context: int) -> dict[str, Any]:
        """What computed the layers of a packed model, at the rows of the largest batch."""
        kernels = kernels_of(self._model(subject)) if self.options.weights != "restored" else None
        if kernels is None:
            return {}
        batches = order_batches(cut.windows, self.options.batch_size)
        rows = max(batch_inputs(cut.windows, batch, context).numel() for batch in batches)
        return {"kernels": kernels.facts({"batch": rows})}

    def _remarks(self, subject: Subject) -> list[Finding]:
        kernels = kernels_of(self._model(subject)) if self.options.weights != "restored" else None
        return [] if kernels is None or kernels.remark is None else [Remark(kernels.remark)]

    def _losses(self, subject: Subject, cut: Cut, context: int) -> tuple[FloatArray, str]:
        batches = order_batches(cut.windows, self.options.batch_size)
        inputs = [batch_inputs(cut.windows, batch, context) for batch in batches]
        logits: Iterable[Tensor]
        if self.options.memory == "block":
            stream = getattr(subject, "stream_logits", None)
            if stream is None:
                raise TrialFailed("memory = block: this model cannot be streamed; leave memory out")
            logits = stream(inputs)
        else:
            logits = model_logits(self._model(subject), inputs, subject.device)
        return sum_losses(cut.windows, batches, logits, subject.progress(len(cut.windows), "perplexity"))

    def _units(self, subject: Subject, text: Text, cut: Cut) -> dict[str, int] | None:
        """Words and bytes of what was predicted; None where the tokenizer cannot say. Raises TrialFailed then if a
        measurement asks for them."""
        options = self.options
        if options.units_of is not None or options.words == "pieces":
            whole = text if options.units_of is None else subject.corpus(options.units_of)
            if len(whole.documents) != len(text.documents):
                raise TrialFailed(
                    f"units_of has {len(whole.documents)} documents and the corpus {len(text.documents)}: "
                    "they must be the same ones"
                )
            words = re.compile(r"\s+").split if options.words == "pieces" else str.split
            return {
                "words": sum(len(words(document)) for document in whole.documents),
                "bytes": sum(len(document.encode("utf-8", "surrogatepass")) for document in whole.documents),
            }
        if any(window.bytes is None for window in cut.windows):
            if options.per:
                raise TrialFailed(
                    f"{options.per[0]} needs to know which text a token stands for, and this tokenizer does not say "
                    "(not a fast one, or sampling = blocks): leave per out"
                )
            return None
        units = {
            "words": sum(window.words or 0 for window in cut.windows),
            "bytes": sum(window.bytes or 0 for window in cut.windows),
        }
        if options.per and not all(units.values()):
            raise TrialFailed(f"{options.per[0]}: no word or no byte was predicted")
        return units

    def _per(
        self, name: str, found: Measurement, units: dict[str, int] | None, loss: float, low: float, high: float
    ) -> Measurement:
        assert units is not None
        assert found.items is not None
        unit = "words" if name == "word_perplexity" else "bytes"
        share = found.details["predictions"] / units[unit]  # tokens per word or byte
        if name == "bits_per_byte":
            share /= math.log(2)
        if loss * share > LARGEST_LOSS and name != "bits_per_byte":
            raise TrialFailed(f"{name} overflows a float: {loss * share:.1f} nats per {unit.removesuffix('s')}")
        of = float if name == "bits_per_byte" else _exp
        rule: dict[str, Any] = {"words_rule": self.options.words} if unit == "words" else {}
        if self.options.units_of is not None:
            rule["units_of"] = {key: value for key, value in self.options.units_of.items() if key != "path"}
        return Measurement(
            name=name,
            value=of(loss * share),
            unit="bits/byte" if name == "bits_per_byte" else "perplexity",
            better="lower",
            low=of(low * share),
            high=of(high * share),
            fingerprint={**found.fingerprint, "metric": name, **rule, unit: units[unit]},
            details={**found.details},
            items=found.items * share,
        )

    def _fingerprint(self, subject: Subject, text: Text, cut: Cut, context: int) -> dict[str, Any]:
        options, tokenizer = self.options, subject.tokenizer
        fingerprint = {
            **facts_of(subject, options.weights),
            "corpus": dict(text.identity),
            "tokenizer": tokenizer_identity(tokenizer),
            "bos": options.bos,
            "begins_with_bos": cut.windows[0].tokens[0] == tokenizer.bos_token_id,
            "context": context,
            "windows_rule": options.windows,
            "loss_dtype": "float32 per token, float64 sums",
        }
        if options.windows == "rolling":
            fingerprint["in_front"] = prefix_token(tokenizer)[0]
        if options.windows == "sampled":
            fingerprint["sampling"] = {"rule": text.sampling, "seed": 0}
        return fingerprint


def _exp(nats: float) -> float:
    """The largest float stands for all beyond it."""
    return math.exp(min(nats, LARGEST_LOSS))


def _per_units(nats: float, units: dict[str, int] | None) -> dict[str, Any]:
    """What stands in the details; perplexities that no float can hold are left out."""
    if units is None or not all(units.values()):
        return {}
    per: dict[str, Any] = {"predicted": units, "bits_per_byte": nats / units["bytes"] / math.log(2)}
    for name, unit in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
        if nats / units[unit] < LARGEST_LOSS:
            per[name] = math.exp(nats / units[unit])
    return per


def _model_context(model: Any) -> int:
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(context, int):
        raise TrialFailed("the model's config has no max_position_embeddings: give context")
    return context
