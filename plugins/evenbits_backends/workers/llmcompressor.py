"""llm-compressor: one shot of a recipe on the request's tokens, saved packed, reloaded by transformers."""

from __future__ import annotations

from typing import Any

import torch

from contract import Request, main


def work(request: Request) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=request.dtype).to(request.device).eval()
    quantise(model, request)
    model.save_pretrained(request.output, save_compressed=True)
    del model
    saved = AutoModelForCausalLM.from_pretrained(request.output, dtype=request.dtype).to(request.device).eval()
    with torch.no_grad():
        saved(input_ids=torch.zeros(1, 1, dtype=torch.long, device=request.device))  # only now it unpacks its layers
    request.answer(
        request.probe(saved), versions=["llmcompressor", "compressed-tensors", "transformers", "torch"],
        forward="the saved checkpoint, reloaded by transformers with compressed-tensors",
    )  # fmt: skip


def quantise(model: Any, request: Request) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    if request.options["algorithm"] == "rtn":
        oneshot(model=model, recipe=recipe(model, request))
        return
    if request.tokens is None:
        raise ValueError("no calibration tokens; give the suite a [calibration] table")
    if not torch.accelerator.is_available():
        # its cache of activations pins memory also where there is no accelerator to pin it for, and fails
        torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    rows = request.tokens.tolist()
    given = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model, recipe=recipe(model, request), dataset=given, max_seq_length=request.tokens.shape[1],
        num_calibration_samples=len(rows), shuffle_calibration_samples=False,
    )  # fmt: skip


def recipe(model: Any, request: Request) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    options = request.options
    group = options["group_size"]
    weights = {
        "num_bits": options["bits"], "type": "int", "symmetric": options["symmetric"], "observer": options["observer"],
        "strategy": "channel" if group is None else "group", "group_size": group,
    }  # fmt: skip
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    common = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(set(linears) - set(request.layers)),
    }
    if options["algorithm"] == "rtn":
        return [QuantizationModifier(**common)]
    if options["algorithm"] == "awq":
        return [AWQModifier(n_grid=options["awq_grid"]), QuantizationModifier(**common)]
    order = "static" if options["act_order"] else None
    return [GPTQModifier(**common, dampening_frac=options["damping"], actorder=order)]


if __name__ == "__main__":
    main(work)
