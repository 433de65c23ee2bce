"""What runs while something is metered: a prefill, and the decoding of a few tokens on its KV cache.

What ran belongs in every fingerprint (device, threads, kernel), so that a method which runs on its restored dense
weights is never compared with a fused one, nor two machines with each other.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.environment import describe_environment
from evenbits.errors import TrialFailed
from evenbits.measure import Finding, ProfileSubject, Remark, Weights, facts_of
from evenbits.packed import kernels_of
from evenbits_hardware.options import WorkloadOptions


class Workload:
    """A prefill and the decoding that follows, timed step by step with greedy choice of the next token."""

    def __init__(self, model: nn.Module, prompt: Tensor, decode_tokens: int) -> None:
        """prompt: (batch, tokens) int64 on the model's device."""
        self.model = model
        self.prompt = prompt
        self.decode_tokens = decode_tokens
        self.device = prompt.device
        # serving needs the last position's logits only; all of them would bill a large vocabulary to the prefill
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def facts(self) -> dict[str, Any]:
        """What was asked of the model, for fingerprints."""
        return {
            "prompt_tokens": self.prompt.shape[1],
            "decode_tokens": self.decode_tokens,
            "batch_size": self.prompt.shape[0],
            "logits": "last" if self.last_only else "all",
        }

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, tokens: Tensor, cache: Any) -> tuple[float, Any]:
        extra = {"logits_to_keep": 1} if self.last_only else {}
        self.wait()
        start = time.perf_counter()
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **extra)
        self.wait()
        return time.perf_counter() - start, output

    def prefill(self) -> float:
        """Seconds of a prefill alone."""
        with torch.inference_mode():
            return self._timed(self.prompt, None)[0]

    def repeat(self) -> tuple[float, list[float]]:
        """Seconds of the prefill, and of each decoding step (which yields one token per sequence).

        Raises TrialFailed for a model that returns no KV cache.
        """
        with torch.inference_mode():
            prefill, output = self._timed(self.prompt, None)
            steps = []
            for _ in range(self.decode_tokens):
                cache = getattr(output, "past_key_values", None)
                if cache is None:
                    raise TrialFailed("the model returns no KV cache: decoding with a cache cannot be timed")
                following = output.logits[:, -1:].argmax(dim=-1)
                seconds, output = self._timed(following, cache)
                steps.append(seconds)
        return prefill, steps


def prepare(model: nn.Module, options: WorkloadOptions, batch_size: int, subject: ProfileSubject) -> Workload:
    """A workload of random ids: a matrix product takes as long whatever it is fed."""
    prompt, decode = fit_lengths(model, options.prompt_tokens, options.decode_tokens)
    generator = torch.Generator().manual_seed(subject.seed)
    ids = torch.randint(text_config(model).vocab_size, (batch_size, prompt), generator=generator)
    return Workload(model, ids.to(subject.device), decode)


def fit_lengths(model: nn.Module, prompt: int, decode: int) -> tuple[int, int]:
    """(prompt, decode) tokens that together fit the model's positions; the prompt keeps at least half of these."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is None:
        return prompt, decode
    if limit < 2:
        raise TrialFailed(f"the model has {limit} positions: too few for one prompt token and one decoded token")
    decode = min(decode, max(1, limit // 2))
    return min(prompt, limit - decode), decode


def text_config(model: nn.Module) -> Any:
    """The language model's own configuration, also where it is part of a larger one."""
    config: Any = model.config
    return config.get_text_config()


def was_cut(work: Workload, options: WorkloadOptions) -> bool:
    """Whether the model's context left no room for what the options ask."""
    return (work.prompt.shape[1], work.decode_tokens) != (options.prompt_tokens, options.decode_tokens)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(describe_environment()["processor"])


def open_subject(subject: ProfileSubject, weights: Weights) -> nn.Module:
    """The model in eval mode with its weights as asked for."""
    model, _ = subject.load() if weights == "restored" else subject.load(weights)
    opened: nn.Module = model.eval()
    return opened


def which_kernels(model: nn.Module, work: Workload) -> dict[str, Any]:
    """What computed the layers of a packed model in prefill and in decoding, for details; {} for any other model."""
    kernels = kernels_of(model)
    if kernels is None:
        return {}
    batch = work.prompt.shape[0]
    return {"kernels": kernels.facts({"prefill": work.prompt.numel(), "decode": batch})}


def left_dense(model: nn.Module) -> list[Finding]:
    """A remark where layers of a packed model ran on dense weights."""
    kernels = kernels_of(model)
    return [] if kernels is None or kernels.remark is None else [Remark(kernels.remark)]


def what_ran(profiler: str, subject: ProfileSubject, weights: Weights = "restored") -> Mapping[str, Any]:
    """Kernel, device and versions, for the fingerprints of all that depends on them; call it once the model is open.

    A subject that does not say which kernel runs its layers is refused: its figures could be taken for a fused path's.
    """
    facts = facts_of(subject, weights)
    if not facts.get("kernel"):
        raise TrialFailed(f"{profiler}: what is measured does not say which kernel runs its layers")
    return {
        "profiler": profiler,
        **facts,
        "device": subject.device.type,
        "device_name": device_name(subject.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def check_device(subject: ProfileSubject, profiler: str) -> None:
    """Raises TrialFailed on a device other than CPU and CUDA."""
    if subject.device.type not in {"cpu", "cuda"}:
        raise TrialFailed(f"the {profiler} profiler has no meter for device {subject.device}; use cpu or cuda")
