"""The closed world as a corpus for calibration and for perplexity."""

from __future__ import annotations

import hashlib

from evenbits.measure import Text
from evenbits_reference import world
from evenbits_reference.documents import generate
from evenbits_reference.options import ReferenceOptions

JOIN = "<s>"  # between two texts the model was trained to read its start token, which the tokenizer takes from this


def read_reference(options: ReferenceOptions) -> Text:
    """The first texts of a split. The same on every machine; the hash in the identity is of what was told."""
    documents = list(generate(options.split, documents=options.documents, seed=options.seed))
    identity = {
        "name": "reference",
        "world": world.VERSION,
        "split": options.split,
        "documents": options.documents,
        "seed": options.seed,
        "join": JOIN,
        "sha256": hashlib.sha256(JOIN.join(documents).encode()).hexdigest()[:16],
    }
    return Text(documents, JOIN, identity, "even")
