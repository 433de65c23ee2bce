"""Three sets of defaults over the same options. What the paper leaves open is named in results/JOURNAL.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# what the text of arXiv:2511.17637 says: lines along the outputs, normalisation without parameters of its own, RMSE
PAPER: Mapping[str, Any] = {
    "axis": "out", "d": 8, "codebook_size": 1 << 15, "hidden": 16, "units": 3, "rln": "row", "affine": False,
    "decoder_bits": 32, "codebook_bits": 16, "scope": "matrix", "decoder_scope": "matrix",
    "training": "autoencoder", "loss": "rmse", "vq_weight": 0.5, "init": "normal", "learning_rate": 1.6e-2,
    "schedule": "step", "epochs": 50, "batch": 16384, "search": "encoder",
}  # fmt: skip

# what the released code does: lines along the inputs, its groups across rows, gains and biases, MSE
CODE: Mapping[str, Any] = {
    **PAPER, "axis": "in", "d": 4, "rln": "code", "affine": True, "loss": "mse", "vq_weight": 0.4,
}  # fmt: skip

# ours: codewords computed from a window of indices, one small decoder for the model, exact search, error feedback
EVENBITS: Mapping[str, Any] = {
    "axis": "out", "d": 1, "codebook_size": 4, "state_bits": 12, "codebook": "computed", "latent": 2,
    "symbols": 2, "symbol_latent": 2, "hidden": 16, "units": 3, "rln": "none",
    "decoder_bits": 16, "scope": "model", "decoder_scope": "model", "row_scales": True, "refit_scales": True,
    "training": "alternating", "learning_rate": 5e-3, "schedule": "cosine", "epochs": 25, "search": "weights",
    "feedback": True, "train_vectors": 1 << 17,
}  # fmt: skip

RECIPES: Mapping[str, Mapping[str, Any]] = {"paper": PAPER, "code": CODE, "evenbits": EVENBITS}
