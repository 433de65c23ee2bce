"""Runs the items of one part in this process, and writes down after each what was found: a crash loses one item."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from gpu_parts.part import Ceilings, Part, Setting, load
from gpu_parts.runner import write

POISONED = 3  # exit status: the CUDA context is lost, what remains must run in another process


def run(part: Part, setting: Setting, path: Path, shard: tuple[int, int], skip: frozenset[str]) -> int:
    """Run every item of this shard that is not in `skip`; shard: its number, of how many. Returns 0, or POISONED.

    The state at `path`: rows by item, failures by item, at (the item that runs now), and whether all is through. Items
    that the deadline forestalls have neither rows nor a failure.
    """
    number, shards = shard
    parent = os.getppid()
    items = [item for place, item in enumerate(part.items(setting)) if place % shards == number]
    state: dict[str, Any] = {"rows": {}, "failures": {}, "at": None, "finished": False}
    for item in items:
        # with the parent gone nobody reads what comes
        if item.name in skip or setting.remaining() <= 0 or os.getppid() != parent:
            continue
        state["at"] = item.name
        write(path, json.dumps(state))
        begun = time.perf_counter()
        try:
            rows = list(item.run())
            if setting.cuda:
                torch.cuda.synchronize()
            state["rows"][item.name] = rows
        except Exception as error:  # whatever a kernel does is a failed item, with its name
            state["failures"][item.name] = describe(error)
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            if setting.cuda and _poisoned():
                state["at"] = None
                write(path, json.dumps(state))
                return POISONED
        state["at"] = None
        print(f"  {part.name}: {item.name}  {time.perf_counter() - begun:.1f} s", flush=True)
        _free(setting)
    write(path, json.dumps(state | {"finished": True}))
    return 0


def describe(error: BaseException) -> str:
    """One line: kind, message, and the innermost place of ours."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "evenbits" in frame.filename or "gpu_parts" in frame.filename] or frames
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {text[:300]}{place}"


def _poisoned() -> bool:
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def _free(setting: Setting) -> None:
    if setting.cuda:
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: dict[str, Any]) -> int:
    """arguments: the runner's, as JSON on standard input."""
    setting = Setting(
        torch.device(arguments["device"]),
        arguments["small"],
        time.monotonic() + arguments["seconds"],
        Ceilings(**arguments["ceilings"]),
    )
    torch.manual_seed(0)
    if not setting.cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shard = arguments["shard"], arguments["shards"]
    return run(load(arguments["part"]), setting, Path(arguments["state"]), shard, frozenset(arguments["skip"]))
