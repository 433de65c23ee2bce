"""Artifacts through `AutoModelForCausalLM.from_pretrained(FOLDER)`, once evenbits is imported.

transformers makes the model without weights, reads what lies outside the linear layers from the artifact as from any
checkpoint, and asks this quantizer for the rest: each layer computes from its packed form where its method can, else
on its restored weight, as `evenbits.load(FOLDER, weights="packed")` has it. A model stored whole is restored.
Registered by `evenbits.pretrained`. Imports no plugin and no other heavy module of evenbits before a model is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from evenbits.errors import ArtifactError, SuiteError
from evenbits.manifest import MANIFEST, QUANT_METHOD, read_manifest

if TYPE_CHECKING:
    from evenbits.artifact import Artifact
    from evenbits.packed import PackedLayerModule

WEIGHTS = ("packed", "restored", "approximate")
FILES = {"layers": "rest.safetensors", "whole": "whole.safetensors"}  # what transformers itself reads, by form


class EvenbitsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization_config of an artifact's config.json.

    weights: as in `evenbits.load`, but packed unless config.json says otherwise, or the config that is passed to
    `from_pretrained` (`config.quantization_config["weights"] = "restored"`). form: as in the manifest. A passed
    quantization_config counts only for an artifact that was written without one,
    `from_pretrained(FOLDER, quantization_config=EvenbitsConfig())`; for others transformers warns that it takes theirs.
    """

    def __init__(
        self,
        weights: Literal["packed", "restored", "approximate"] = "packed",
        form: Literal["layers", "whole"] = "layers",
        **kwargs: Any,
    ) -> None:
        """Raises SuiteError for other values, or keys that are not known."""
        kwargs.pop("quant_method", None)
        if kwargs:
            raise SuiteError(f"quantization_config of evenbits: {', '.join(sorted(kwargs))}: not known; known: weights")
        if weights not in WEIGHTS or form not in FILES:
            raise SuiteError(
                f"quantization_config of evenbits: weights must be one of {', '.join(WEIGHTS)} and form of "
                f"{', '.join(FILES)}, not {weights!r} and {form!r}"
            )
        self.quant_method = QUANT_METHOD
        self.weights, self.form = weights, form


class EvenbitsQuantizer(HfQuantizer):  # type: ignore[misc]
    """One artifact being opened. One device: layers of several are refused."""

    requires_calibration = False
    quantization_config: EvenbitsConfig

    def __init__(self, quantization_config: EvenbitsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._artifact: Artifact | None = None
        self._compressor: Any = None
        self._layers: dict[str, tuple[nn.Module, PackedLayerModule]] = {}  # as transformers made it, and in its place
        self._whole: dict[str, Tensor] = {}

    # -- what transformers asks before it reads ---------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises SuiteError for more than one device, and for what is none."""
        given = kwargs.get("device_map")
        devices = {str(device) for device in (given.values() if isinstance(given, dict) else [given])}
        if len(devices) > 1 or devices & {"disk", "meta"}:
            raise SuiteError("an evenbits artifact is opened on one device; give device_map='cpu' or one GPU")

    def update_device_map(self, device_map: Any) -> Any:
        """What would split the model is one device: the sizes that it goes by are not those of packed layers."""
        if isinstance(device_map, str) and device_map in {"auto", "balanced", "balanced_low_0", "sequential"}:
            return {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Names the file to read; transformers shows the config here before it looks for a checkpoint, and that the
        config says so already in the folder would let a transformers without evenbits read it and draw all linear
        layers at random."""
        config.transformers_weights = FILES[self.quantization_config.form]
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """As above, where transformers is older than 5.18 or so."""
        return self.update_attn_implementation(config)

    # -- while it reads ---------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Open the artifact, and take the linear layers out of what transformers fills or draws at random.

        Raises ArtifactError for a damaged artifact, or one with code of its own that is not allowed to run; SuiteError
        where the method's plugin is missing, or another class than the language model is asked for.
        """
        from evenbits.compressor import LayerCompressor
        from evenbits.packed import stand_in
        from evenbits.plugins import load_plugins
        from evenbits.subject import open_artifact

        (file,) = kwargs["checkpoint_files"]
        folder = Path(file).parent
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(f"{folder}: no {MANIFEST}, so no whole artifact; download all of its folder")
        registry, manifest = load_plugins(), read_manifest(folder)
        if manifest.method not in {"dense", *registry.compressors}:
            known = f" ({manifest.distribution})" if manifest.distribution else ""
            raise SuiteError(f"{folder}: install the plugin of method {manifest.method!r}{known}, which restores it")
        # a folder can bring code beside a model type that transformers knows: it made the model without that code then,
        # and has asked nobody
        allowed = type(model).__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
        self._artifact, self._compressor = open_artifact(folder, registry, trust_remote_code=allowed)
        del model.config.transformers_weights
        with torch.device("cpu"):
            if isinstance(self._compressor, LayerCompressor):
                for layer in self._artifact.layers:
                    _require_causal(model, _has(model, layer.name))
                    self._layers[layer.name] = model.get_submodule(layer.name), stand_in(model, layer.name)
                    _nothing_to_draw(model, layer.name)
            else:
                self._take_whole(model)
        return model

    def _take_whole(self, model: Any) -> None:
        """Modules of the shapes that the method left, in the dtype asked for; values are put in afterwards."""
        from evenbits.whole import restore_whole

        assert self._artifact is not None
        restored = restore_whole(self._artifact, self._compressor)
        _require_causal(model, dict(model.named_children()).keys() == dict(restored.named_children()).keys())
        for parameter in restored.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(model.dtype)
        self._whole = _tensors(restored)  # transformers empties buffers that no checkpoint holds
        for name, child in restored.named_children():
            setattr(model, name, child)
        # a method's own tensors need not be named as the modules are
        model._keys_to_ignore_on_load_missing = {".*"}
        model._keys_to_ignore_on_load_unexpected = {".*"}

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from evenbits.packed import STORED_DENSE, LayerKernels, attach_kernels, make_paths, owned_pair, whole_reason

        artifact, config = self._artifact, self.quantization_config
        assert artifact is not None
        device = model.device
        if not self._layers:
            for name, tensor in _tensors(model).items():
                tensor.copy_(self._whole[name])
            self._whole = {}
            return attach_kernels(model, LayerKernels(whole=whole_reason(artifact.manifest.method)))
        packed: dict[str, nn.Module] = {}
        dense = dict.fromkeys(self._layers, STORED_DENSE if config.weights == "packed" else "restored, as asked for")
        if config.weights != "restored":
            make = self._compressor.linear if config.weights == "packed" else self._compressor.approximate_linear
            packed, dense = make_paths(artifact, make, device, lambda layers: None)
        for name, path in packed.items():
            adapter = artifact.adapter(name)
            self._layers[name][1].install(path, None if adapter is None else owned_pair(adapter, device))
        self._fill(model, dense, device)
        self._layers = {}
        return attach_kernels(model.eval(), LayerKernels(packed, dense))

    def _fill(self, model: Any, dense: dict[str, str], device: torch.device) -> None:
        """Put back transformers' own modules, with restored weights."""
        from evenbits.weights import ArtifactWeights

        assert self._artifact is not None
        weights = ArtifactWeights(self._artifact, self._compressor)
        for key, weight in weights.read([f"{name}.weight" for name in dense]):
            name = key.removesuffix(".weight")
            module, place = self._layers[name]
            held: Any = module
            filled = torch.empty(weight.shape, dtype=held.weight.dtype, device=device).copy_(weight)
            held.weight, held.bias = nn.Parameter(filled, requires_grad=False), place.bias
            model.set_submodule(name, module.train(model.training))

    # -- what transformers asks of the open model -------------------------------------------------------------

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Asked by save_pretrained. Raises SuiteError: the artifact is what is saved."""
        folder = "" if self._artifact is None else f" {self._artifact.folder}"
        raise SuiteError(
            f"save_pretrained cannot write a model opened from an artifact: copy the folder{folder}, or write plain "
            "weights by `evenbits export --format dense`"
        )

    @property
    def is_trainable(self) -> bool:
        return False


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones under each of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _require_causal(model: nn.Module, fits: bool) -> None:
    if not fits:
        raise SuiteError(
            f"{type(model).__name__} has other modules than the artifact's model: AutoModelForCausalLM opens it"
        )


def _nothing_to_draw(model: nn.Module, layer: str) -> None:
    """GPT-2's modules draw the weights of layers inside them; transformers passes over what is marked so."""
    parts = layer.split(".")
    for depth in range(1, len(parts)):
        model.get_submodule(".".join(parts[:depth]))._is_hf_initialized = True  # type: ignore[assignment]


def register() -> None:
    """Tell transformers; a second call changes nothing."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(EvenbitsConfig)
        auto.register_quantizer(QUANT_METHOD)(EvenbitsQuantizer)
