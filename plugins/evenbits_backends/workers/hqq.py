"""HQQ by its native interface (transformers' own does not take it any more), saved by its `save_to_safetensors`."""

from __future__ import annotations

import json

import torch

from contract import Request, main


def work(request: Request) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=request.dtype).eval()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # its saving refuses tensors that share memory
    chosen = BaseQuantizeConfig(nbits=request.options["bits"], group_size=request.options["group_size"], axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=chosen, compute_dtype=request.dtype, device=request.device)
    for name in request.layers:
        layer = model.get_submodule(name)
        layer.in_features = layer.meta["shape"][1]
    # one file whatever the number of blocks: its splitting forgets to name the first of several files' tensors
    AutoHQQHFModel.save_to_safetensors(model, str(request.output), num_blocks_per_file=10**6, verbose=False)
    path = request.output / "config.json"  # the library leaves its settings out: they stand in every layer's tensors
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "hqq",
        "quant_config": chosen,
        "compute_dtype": str(request.dtype).removeprefix("torch."),
    }
    path.write_text(json.dumps(config, indent=1) + "\n")
    request.answer(request.probe(model), versions=["hqq", "transformers", "torch"])


if __name__ == "__main__":
    main(work)
