"""AutoAWQ: its search on the request's tokens, saved in its own layout; its layers run as they are in memory."""

from __future__ import annotations

from typing import Any

import torch

from contract import Request, main


def search_on_copies(quantizer: Any) -> None:
    """Make its search for scales on a CPU what it is on a GPU.

    Before each scale tried it puts back weights that it kept by `.cpu()`. That copies from a GPU; on a CPU it keeps the
    weights themselves, which the first scale has multiplied by then: all others are tried on those, and they stay.
    """
    search = quantizer._compute_best_scale

    def searched(self: Any, x: Any, w_mean: Any, x_mean: Any, module: Any, *rest: Any) -> Any:
        state = module.state_dict
        module.state_dict = lambda: {name: tensor.clone() for name, tensor in state().items()}
        try:
            return search(self, x, w_mean, x_mean, module, *rest)
        finally:
            del module.state_dict

    quantizer._compute_best_scale = searched


def work(request: Request) -> None:
    import awq.modules.linear.gemm as gemm
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    if request.tokens is None:
        raise ValueError("no calibration tokens; give the suite a [calibration] table")
    if request.device == "cpu":
        gemm.TRITON_AVAILABLE = False  # its kernels of Triton fail on a CPU; its plain path does not
        search_on_copies(AwqQuantizer)
    options = request.options
    model = AutoAWQForCausalLM.from_pretrained(
        request.model, device_map=request.device, torch_dtype=request.dtype, safetensors=True
    )
    config = {
        "zero_point": True, "q_group_size": -1 if options["group_size"] is None else options["group_size"],
        "w_bit": 4, "version": "GEMM",
    }  # fmt: skip
    model.quantize(
        None, quant_config=config, calib_data=request.tokens.tolist(), max_calib_samples=len(request.tokens),
        max_calib_seq_len=request.tokens.shape[1], duo_scaling=options["duo_scaling"], apply_clip=options["clip"],
    )  # fmt: skip
    model.save_quantized(str(request.output))
    # its own loading wants a kernel of Intel's on a CPU; what it packed is in memory all the same
    request.answer(
        request.probe(model.model.to(request.device), torch.float16), versions=["autoawq", "transformers", "torch"],
        forward="the layers in memory, as they were saved",
    )  # fmt: skip


if __name__ == "__main__":
    main(work)
