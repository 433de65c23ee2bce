"""AutoRound on the request's tokens (without iterations: plain rounding), saved in its own format, reloaded."""

from __future__ import annotations

import torch

from contract import Request, main


def work(request: Request) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = request.options
    rows = [] if request.tokens is None else list(request.tokens)
    if asked["iters"] and not rows:
        raise ValueError("no calibration tokens; give the suite a [calibration] table, or iters = 0")
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=request.dtype)
    given = {}
    if rows:  # as dictionaries of one sample each: the library takes token ids as they are
        given = {
            "dataset": [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
            "nsamples": len(rows),
            "seqlen": len(rows[0]),
        }
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(request.model), bits=asked["bits"], sym=asked["symmetric"],
        group_size=-1 if asked["group_size"] is None else asked["group_size"], iters=asked["iters"],
        batch_size=min(8, len(rows) or 8), device_map=request.device, enable_torch_compile=False, seed=request.seed,
        **({} if asked["iters"] else {"disable_opt_rtn": True}), **given,
    )  # fmt: skip
    rounding.quantize()
    rounding.save_quantized(str(request.output), format="auto_round")
    saved = AutoModelForCausalLM.from_pretrained(
        str(request.output), dtype=request.dtype, device_map=request.device
    ).eval()
    request.answer(
        request.probe(saved), versions=["auto-round", "transformers", "torch"],
        forward="the saved checkpoint, reloaded by transformers",
    )  # fmt: skip


if __name__ == "__main__":
    main(work)
