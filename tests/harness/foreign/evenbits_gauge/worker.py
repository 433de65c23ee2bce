"""Eight bits a weight with a scale a row. Its environment has no torch: safetensors are read and written here."""

import array
import json
import os
import struct
import sys
import time
from importlib.metadata import version
from pathlib import Path

import gauge


def tensors(file):
    """name -> (dtype, shape, bytes)."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: (one["dtype"], one["shape"], body[slice(*one["data_offsets"])])
        for name, one in header.items()
        if name != "__metadata__"
    }


def write(file, found):
    header, body = {}, b""
    for name, (dtype, shape, data) in found.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def main():
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "request.json").read_text())
    print("gauging with", os.environ["GAUGE_STEPS"], "steps", flush=True)
    if asked["options"]["what"] == "raise":
        (folder / "error.json").write_text(json.dumps({"message": "ValueError: the gauge is\n stuck"}))
        sys.exit(1)
    if asked["options"]["what"] == "sleep":
        time.sleep(600)
    dtype, shape, _ = tensors(folder / "tensors.safetensors")["tokens"]
    assert (dtype, shape) == ("I64", [4, 32])
    dense, found = tensors(Path(asked["model"]) / "model.safetensors"), {}
    for layer in asked["layers"]:
        dtype, (rows, columns), data = dense[f"{layer}.weight"]
        assert dtype == "F32"
        values = array.array("f", data)
        codes, scales = array.array("b"), array.array("f")
        for row in range(rows):
            one = values[row * columns : (row + 1) * columns]
            scale = max(map(abs, one)) / gauge.LEVELS
            scales.append(scale)
            codes.extend(round(value / scale) for value in one)
        found[f"{layer}.code"] = ("I8", [rows, columns], codes.tobytes())
        found[f"{layer}.scale"] = ("F32", [rows], scales.tobytes())
    write(folder / "output" / "rows.safetensors", found)
    (folder / "result.json").write_text(json.dumps({"versions": {"gauge": version("gauge")}}))


main()
