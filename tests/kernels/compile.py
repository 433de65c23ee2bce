"""Compile every Triton kernel ahead of time, without a GPU, for each architecture; report registers and spills.

    python tests/kernels/compile.py --out results/bench        writes kernels.json and kernels.md
    python tests/kernels/compile.py --only nearest --arch 90   some of them, printed
    python tests/kernels/compile.py --brief                    every configuration and every case once, as in CI

A process of its own: Triton reads TRITON_INTERPRET when it is imported, and the tests' own process interprets.
Exits 1 when a kernel does not compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90)
WARP = 32


class Job(NamedTuple):
    """One compilation."""

    module: str
    kernel: str
    case: str
    config: str
    arch: int


@dataclass(frozen=True)
class Compiled:
    """What the assembler said of one kernel; error: the compiler's message, None when it compiled."""

    kernel: str
    case: str
    config: str
    arch: int
    registers: int = 0
    spilled_bytes: int = 0  # stores and loads
    stack_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = ""  # the matrix instruction: wgmma, mma, or "" for none
    seconds: float = 0.0
    error: str | None = None


def modules() -> Iterator[str]:
    """Dotted names of all Triton sources: the `gpu` packages of the harness and of every plugin."""
    for root, pattern in (("harness", "evenbits/kernels/gpu/*.py"), ("plugins", "*/gpu/*.py")):
        for path in sorted((ROOT / root).glob(pattern)):
            if path.name != "__init__.py":
                yield ".".join(path.relative_to(ROOT / root).with_suffix("").parts)


def jobs(only: str | None, architectures: Sequence[int], *, brief: bool = False) -> list[Job]:
    """All that must compile. brief: of each kernel only as much that every configuration and every case is there."""
    found = []
    for module in modules():
        for kernel in importlib.import_module(module).KERNELS:
            if only and only not in kernel.name:
                continue
            seen: set[str] = set()
            for case in kernel.cases:
                allowed = [config.name for config in kernel.configs if not case.configs or config.name in case.configs]
                fresh = [name for name in allowed if name not in seen] or allowed[:1]
                seen.update(fresh)
                names = fresh if brief else allowed
                found += [Job(module, kernel.name, case.name, name, arch) for name in names for arch in architectures]
    return found


def compile_one(job: Job) -> Compiled:
    module, name, case_name, config_name, arch = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = next(k for k in importlib.import_module(module).KERNELS if k.name == name)
    case = next(c for c in kernel.cases if c.name == case_name)
    config = kernel.config(config_name)
    constants = {**case.constants, **config.tiles}
    order = list(kernel.function.arg_names)
    try:
        if lacking := [arg for arg in order if arg not in case.types and arg not in constants]:
            raise ValueError(f"case {case_name!r} gives no type and no value to {', '.join(lacking)}")
        signature = {arg: case.types.get(arg, "constexpr") for arg in order}
        aligned = case.aligned or tuple(arg for arg, kind in case.types.items() if kind.startswith("*"))
        source = ASTSource(
            fn=kernel.function,
            signature=signature,
            constexprs={(order.index(arg),): value for arg, value in constants.items() if arg in order},
            attrs={(order.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
        )
        begun = time.perf_counter()
        done = triton.compile(
            source,
            target=GPUTarget("cuda", arch, WARP),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        seconds = time.perf_counter() - begun
    except Exception as error:  # the compiler raises many kinds; each is a row of the table
        text = " ".join(str(error).split())
        return Compiled(name, case_name, config_name, arch, error=f"{type(error).__name__}: {text[:300]}")
    ptx = done.asm["ptx"]
    registers, stack = _resources(done.asm["cubin"])
    spilled = _spilled(ptx, arch) if stack else 0
    matrix = "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else ""
    return Compiled(
        name, case_name, config_name, arch, registers, spilled, stack, int(done.metadata.shared), matrix, seconds
    )


def _tool(name: str) -> str:
    """One of the programs that Triton brings."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack: whatever spills lies there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,), (stack,) = (re.findall(rf"{name}:(\d+)", said) for name in ("REG", "STACK"))
    return int(registers), int(stack)


def _spilled(ptx: str, arch: int) -> int:
    """Bytes spilled, stores and loads, by the assembler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        command = [_tool("ptxas"), "-v", f"--gpu-name={target}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))


def table(found: Sequence[Compiled]) -> str:
    lines = [
        "| kernel | case | configuration | sm | registers | spilled bytes | shared bytes | matrix unit |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | :-- |",
    ]
    for row in found:
        if row.error is not None:
            lines.append(f"| {row.kernel} | {row.case} | {row.config} | {row.arch} | {row.error} | | | |")
        else:
            lines.append(
                f"| {row.kernel} | {row.case} | {row.config} | {row.arch} | {row.registers} | {row.spilled_bytes} "
                f"| {row.shared_bytes:,} | {row.matrix} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md; else the table is printed")
    parser.add_argument("--only", help="kernels whose name holds this")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--brief", action="store_true", help="every configuration and every case once")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    todo = jobs(arguments.only, arguments.arch, brief=arguments.brief)
    if not todo:
        parser.error(f"no kernel's name holds {arguments.only!r}")
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = list(pool.map(compile_one, todo, chunksize=4))
    if arguments.out is None:
        print(table(found))
    else:
        write(found, arguments.out)
    failed = [row for row in found if row.error]
    print(f"{len(found)} compiled, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def write(found: Sequence[Compiled], out: Path) -> None:
    from datetime import UTC, datetime

    import triton

    from evenbits.environment import describe_environment

    facts: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "triton": triton.__version__,
        "commit": (describe_environment()["git"] or {}).get("commit"),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps({**facts, "kernels": [asdict(row) for row in found]}, indent=1))
    (out / "kernels.md").write_text(
        f"# Kernels, compiled ahead of time\n\n{facts['date']}, Triton {facts['triton']}. "
        "Written by `python tests/kernels/compile.py --out results/bench`; no GPU took part. "
        "Registers a thread and spilled bytes are the assembler's.\n\n" + table(found) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
