"""Random words as a corpus: what calibrated methods must be given, though here it tells them nothing."""

from __future__ import annotations

import hashlib

import numpy as np

from evenbits.measure import Text
from evenbits_synthetic.folder import words
from evenbits_synthetic.options import WordsOptions


def read_words(options: WordsOptions) -> Text:
    """One document. The same on every machine."""
    known = words()
    bits = np.random.PCG64(options.seed).random_raw(options.words)
    text = " ".join(known[number] for number in (bits >> np.uint64(32)) % np.uint64(len(known)))
    identity = {
        "name": "random-words",
        "words": options.words,
        "seed": options.seed,
        "join": "",
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    return Text([text], "", identity, "even")
