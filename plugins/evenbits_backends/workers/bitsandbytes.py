"""bitsandbytes by transformers: loads in 4 bits, saves, then runs its layers."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import torch

from contract import Request, main


def work(request: Request) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=request.options["type"],
        bnb_4bit_use_double_quant=request.options["double_quant"],
        bnb_4bit_compute_dtype=request.dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        request.model, quantization_config=config, dtype=request.dtype, device_map={"": request.device}
    ).eval()
    model.save_pretrained(request.output)  # before any forward: on some CPUs that repacks a layer, its scales in bf16
    outputs, failed = {}, {}
    for name in request.layers:
        one = copy(request)
        one.layers = [name]
        try:
            outputs.update(one.probe(model))
        except (RuntimeError, AssertionError) as error:  # columns that its packing for CPUs does not take
            failed[name] = f"{type(error).__name__}: {error}"
            outputs[name] = dequantized(request, name)
            print(f"{name}: its own forward fails here ({failed[name]}); checked by its own dequantize", flush=True)
    request.answer(
        outputs, versions=["bitsandbytes", "transformers", "torch"], own_forward_failed=failed,
        checked_by_own_dequantize=sorted(failed),
    )  # fmt: skip


def dequantized(request: Request, name: str) -> torch.Tensor:
    """(rows, out) float32 by the library's own dequantize, of the layer as it was saved."""
    from bitsandbytes import functional
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(request.output).glob("*.safetensors")):
        with safe_open(file, framework="pt", device=request.device) as opened:
            names = [key for key in opened.keys() if key.startswith(f"{name}.weight")]  # noqa: SIM118 - only keys()
            found.update({key: opened.get_tensor(key) for key in names})
    packed = found.pop(f"{name}.weight")
    state = functional.QuantState.from_dict(
        {key.removeprefix(f"{name}.weight."): tensor for key, tensor in found.items()}, device=packed.device
    )
    weight = functional.dequantize_4bit(packed, state).float()
    return (request.probes[weight.shape[1]].to(weight.device) @ weight.T).cpu().contiguous()


if __name__ == "__main__":
    main(work)
