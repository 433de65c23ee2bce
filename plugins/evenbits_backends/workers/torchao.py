"""torchao by transformers: weights rounded while they are loaded, saved, run as they are in memory."""

from __future__ import annotations

import json

import torch

from contract import Request, main


def work(request: Request) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from transformers import AutoModelForCausalLM, TorchAoConfig

    asked = request.options
    if asked["kernel"] == "int8":
        chosen = Int8WeightOnlyConfig()
    else:
        chosen = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{asked['bits']}"),
            granularity=PerAxis(0) if asked["group_size"] is None else PerGroup(asked["group_size"]),
            mapping_type=MappingType.SYMMETRIC if asked["symmetric"] else MappingType.ASYMMETRIC,
        )
    model = AutoModelForCausalLM.from_pretrained(
        request.model, quantization_config=TorchAoConfig(quant_type=chosen), dtype=request.dtype,
        device_map={"": request.device},
    ).eval()  # fmt: skip
    model.save_pretrained(request.output)
    path = request.output / "config.json"  # says nothing of the scales' dtype, which is the model's
    config = json.loads(path.read_text())
    config["quantization_config"]["scale_dtype"] = str(request.dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=1) + "\n")
    request.answer(request.probe(model), versions=["torchao", "transformers", "torch"])


if __name__ == "__main__":
    main(work)
