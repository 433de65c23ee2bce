"""The byte-level BPE tokenizer of the reference model: 2,048 tokens, trained on the train split."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from evenbits_reference.documents import generate

VOCABULARY = 2048
BOS, EOS = "<s>", "</s>"
DOCUMENTS = 60_000  # of the train split; every word of the world is among them


@cache
def train_tokenizer(documents: int = DOCUMENTS, seed: int = 0) -> Any:
    """A fast tokenizer that puts <s> in front of each text. The same on every run."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(generate("train", documents=documents, seed=seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    train_tokenizer().save_pretrained(folder)
