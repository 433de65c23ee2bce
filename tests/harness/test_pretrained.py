"""Artifacts by transformers' from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.harness import exported
from tests.harness.exported import TOKENS, logits, make_artifact

from evenbits import artifact as writing
from evenbits import load
from evenbits import plugins as plugins_module
from evenbits.artifact import Artifact
from evenbits.errors import ArtifactError, SuiteError
from evenbits.packed import kernels_of
from evenbits.testing import manifest_facts, tiny_model

RTN4 = {"bits": 4, "group_size": 32, "symmetric": False}


def from_pretrained(folder: Path, **given: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **given)


@pytest.mark.parametrize(
    ("method", "options", "changes"),
    [
        ("rtn", RTN4, {"tied": True}),
        ("rtn", RTN4, {"kind": "gpt2", "dtype": "bfloat16", "adapters": True}),
        ("gptq", {"bits": 3, "group_size": 16, "act_order": True}, {"kind": "opt"}),
        ("kmeans", {}, {"kind": "qwen3", "dtype": "float16"}),
    ],
    ids=lambda one: str(one).replace(" ", ""),
)
def test_layers_compute_from_their_packed_form(
    tmp_path: Path, method: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = make_artifact(tmp_path, method, options, **changes)
    model = from_pretrained(folder)
    expected = load(folder, weights="packed")
    assert str(model.dtype).removeprefix("torch.") == changes.get("dtype", "float32")
    assert torch.equal(logits(model), logits(expected))
    found, known = kernels_of(model), kernels_of(expected)
    assert found is not None
    assert known is not None
    assert found.packed.keys() == known.packed.keys() == {layer.name for layer in Artifact(folder).layers}
    assert found.held_bytes == known.held_bytes
    assert not model.training
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **asked), expected.generate(TOKENS, **asked))


def test_layers_without_a_packed_form_are_restored(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path, "sparsegpt", {"bits": 4, "group_size": 32}, kind="gpt2")
    model = from_pretrained(folder)
    assert torch.equal(logits(model), logits(load(folder)))
    found = kernels_of(model)
    assert found is not None
    assert found.remark is not None
    assert found.remark.startswith("8 of 8 layers ran on dense weights: no fused path for a mask")
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_restored_weights_may_be_asked_for(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = make_artifact(tmp_path, "rtn", RTN4, dtype="bfloat16")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["weights"] = "restored"
    model = from_pretrained(folder, config=config)
    assert torch.equal(logits(model), logits(load(folder)))
    assert {type(module).__name__ for module in model.model.layers[0].mlp.children()} >= {"Linear"}
    config.quantization_config["weights"] = "fused"
    with pytest.raises(SuiteError, match=r"weights must be one of packed, restored, approximate .* not 'fused'"):
        from_pretrained(folder, config=config)
    wide = from_pretrained(folder, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.isfinite(logits(wide)).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_stored_whole(tmp_path: Path, kind: Any) -> None:
    options = {"ratio": 0.4, "importance": "magnitude", "stored_dtype": "float16"}
    folder = make_artifact(tmp_path, "llm-pruner", options, kind=kind)
    model = from_pretrained(folder)
    assert torch.equal(logits(model), logits(load(folder)))
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **asked), load(folder).generate(TOKENS, **asked))
    narrow = from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    expected = load(folder)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits(narrow), logits(expected))


def test_what_evenbits_opens_itself_is_an_ordinary_model(tmp_path: Path) -> None:
    """The entries for from_pretrained stay out of models that the harness makes, which may be saved."""
    folder = make_artifact(tmp_path, "rtn", RTN4, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "evenbits", "form": "layers"}
    assert config["dtype"] == "bfloat16"
    assert "config.json" in Artifact(folder).manifest.files  # hashed as any file
    model = load(folder)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_an_artifact_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenbits.quantizer import EvenbitsConfig

    monkeypatch.setattr(writing, "artifact_config", lambda text, dtype, form: text)
    folder = make_artifact(tmp_path, "rtn", RTN4)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        from_pretrained(folder)
    model = from_pretrained(folder, quantization_config=EvenbitsConfig(weights="restored"))
    assert torch.equal(logits(model), logits(load(folder)))


def test_what_goes_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_artifact(tmp_path, "rtn", RTN4)
    model = from_pretrained(folder)
    with pytest.raises(SuiteError, match=r"^save_pretrained cannot write .* copy the folder .*--format dense`$"):
        model.save_pretrained(tmp_path / "saved")
    for devices in ({"model": "cpu", "lm_head": "cuda:0"}, {"": "disk"}, "meta"):
        with pytest.raises(SuiteError, match="one device"):
            from_pretrained(folder, device_map=devices)
    with monkeypatch.context() as patched:
        lacking = plugins_module.load_plugins()
        del lacking.compressors["rtn"]
        patched.setattr(plugins_module, "load_plugins", lambda: lacking)
        with pytest.raises(SuiteError, match=r"install the plugin of method 'rtn', which restores it$"):
            from_pretrained(folder)
    block = folder / "blocks" / "block-0001.safetensors"
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"block-0001\.safetensors: sha256 differs"):
        from_pretrained(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json, so no whole artifact"):
        from_pretrained(folder)


def test_code_of_its_own_runs_where_it_was_allowed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers knows the model type, so it asks nobody about the code that lies beside."""
    base = tiny_model(tmp_path / "base-llama-False", "llama", hidden=64, intermediate=128)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    facts = {"trust_remote_code": True}
    monkeypatch.setattr(exported, "manifest_facts", lambda *given: {**manifest_facts(*given), **facts})
    folder = make_artifact(tmp_path, "llm-pruner", {"ratio": 0.4, "importance": "magnitude"})
    with pytest.raises(ArtifactError, match="runs code of its own; allow it by trust_remote_code"):
        from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("method", "options"), [("rtn", RTN4), ("llm-pruner", {"importance": "magnitude"})])
def test_another_class_than_the_language_model(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    from transformers import AutoModel

    folder = make_artifact(tmp_path, method, options)
    with pytest.raises(SuiteError, match=r"^LlamaModel has other modules .*: AutoModelForCausalLM opens it$"):
        AutoModel.from_pretrained(folder)


def test_before_evenbits_is_imported(tmp_path: Path) -> None:
    """transformers alone refuses rather than draw the layers at random; importing evenbits then is not too late."""
    folder = make_artifact(tmp_path, "rtn", RTN4)
    code = f"""
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r})
except OSError as error:
    print("refused:", error)
import evenbits
print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, name = done.stdout.strip().splitlines()
    assert refused.startswith("refused: Error no file named model.safetensors")
    assert "Unknown quantization type, got evenbits" in done.stderr
    assert name == "LlamaForCausalLM"


def test_importing_evenbits_imports_nothing_heavy_and_waits_once() -> None:
    code = """
import sys, importlib, evenbits
from evenbits.pretrained import watch_transformers
assert not {"torch", "transformers"} & sys.modules.keys()
before = list(sys.meta_path)
watch_transformers()
assert sys.meta_path == before
import transformers.quantizers.auto as auto
assert len(sys.meta_path) < len(before) or sys.meta_path[0] is not before[0]
assert auto.AUTO_QUANTIZER_MAPPING["evenbits"].__module__ == "evenbits.quantizer"
importlib.reload(auto)  # notebooks do that
watch_transformers()
assert "evenbits" in auto.AUTO_QUANTIZER_MAPPING
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
