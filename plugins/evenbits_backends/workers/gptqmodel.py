"""GPTQModel: GPTQ (on CUDA also AWQ) on the request's tokens, saved, reloaded with its plain torch kernel."""

from __future__ import annotations

import os
from typing import Any

from contract import Request, main

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores or one its pools refuse to start, before any import


def work(request: Request) -> None:
    import torch._dynamo
    from gptqmodel import BACKEND, GPTQModel

    torch._dynamo.config.disable = True  # it compiles each layer's unpacking: minutes, and a compiler, for one forward

    if request.tokens is None:
        raise ValueError("no calibration tokens; give the suite a [calibration] table")
    model = GPTQModel.load(request.model, settings(request.options), device=request.device, dtype=request.dtype)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in request.tokens]
    model.quantize(rows, batch_size=8)
    model.save(str(request.output))
    del model
    awq = request.options["method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    # its torch kernel takes half precision only; float16 is what the scales are stored in
    saved = GPTQModel.load(str(request.output), device=request.device, dtype=torch.float16, backend=backend)
    request.answer(
        request.probe(saved.model, torch.float16 if awq else None), versions=["gptqmodel", "transformers", "torch"],
        forward="the saved checkpoint, reloaded by GPTQModel",
    )  # fmt: skip


def settings(options: dict[str, Any]) -> Any:
    from gptqmodel import QuantizeConfig

    common = {
        "bits": options["bits"],
        "group_size": -1 if options["group_size"] is None else options["group_size"],
        "sym": options["symmetric"],
    }
    if options["method"] == "awq":
        return QuantizeConfig(**common, method="awq", format="gemm")
    return QuantizeConfig(
        **common, desc_act=options["desc_act"], act_group_aware=options["act_group_aware"],
        damp_percent=options["damping"], mse=options["mse"],
    )  # fmt: skip


if __name__ == "__main__":
    main(work)
