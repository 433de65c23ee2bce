"""AutoGPTQ (CUDA only): GPTQ on the request's tokens, saved, reloaded with its plain torch layers."""

from __future__ import annotations

import torch

from contract import Request, main


def work(request: Request) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    if request.tokens is None:
        raise ValueError("no calibration tokens; give the suite a [calibration] table")
    options = request.options
    config = BaseQuantizeConfig(
        bits=options["bits"],
        group_size=-1 if options["group_size"] is None else options["group_size"],
        desc_act=options["desc_act"],
        static_groups=options["static_groups"],
        sym=options["symmetric"],
        damp_percent=options["damping"],
    )
    model = AutoGPTQForCausalLM.from_pretrained(request.model, config, torch_dtype=request.dtype)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in request.tokens]
    model.quantize(rows, batch_size=8, use_triton=False)
    model.save_quantized(str(request.output), use_safetensors=True)
    del model
    saved = AutoGPTQForCausalLM.from_quantized(
        str(request.output), device=f"{request.device}:0", use_safetensors=True, use_triton=False, disable_exllama=True,
        disable_exllamav2=True, inject_fused_attention=False, inject_fused_mlp=False,
    )  # fmt: skip
    request.answer(
        request.probe(saved.model, torch.float16), versions=["auto-gptq", "transformers", "torch"],
        forward="the saved checkpoint, reloaded by AutoGPTQ",
    )  # fmt: skip


if __name__ == "__main__":
    main(work)
