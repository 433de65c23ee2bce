"""Installing an environment: uv where there is one, else venv and pip; torch for the CPU where that is what there is.

uv does not read pip's configuration, which knows where a wheel of torch for the CPU lies: it is fetched with pip,
and both are pointed to it. Without that, a pin such as torch==2.13.0 would bring gigabytes of CUDA to a machine
that has no GPU. PIP_NO_INDEX and UV_OFFLINE hold for both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from packaging.specifiers import SpecifierSet

from evenbits.devices import cuda_devices
from evenbits.environment_files import Environment
from evenbits.errors import TrialFailed

CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, as its installation page names it
VERSION = "import platform; print(platform.python_version())"
REASON_CHARACTERS = 300
# started instead of a program that must not outlive this process: asks the system to be killed with it (Linux), then
# becomes that program. PR_SET_PDEATHSIG is 1; it outlasts exec
TETHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


def tethered(command: Sequence[str]) -> list[str]:
    """The command, killed when this process is (Linux); elsewhere it ends with the process group alone."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), *command]


def find_uv() -> list[str] | None:
    """How to call uv: beside this interpreter, on PATH, or as a module."""
    beside = Path(sys.executable).parent / "uv"
    if found := (str(beside) if beside.is_file() else shutil.which("uv")):
        return [found]
    return [sys.executable, "-m", "uv"] if find_spec("uv") else None


class Installer:
    """Makes one virtual environment at `folder`. wheels: where torch for the CPU is kept for all."""

    def __init__(
        self, environment: Environment, folder: Path, python: Path, wheels: Path, tool: str | None, cuda_torch: bool
    ) -> None:
        uv = find_uv() if tool != "pip" else None
        if tool == "uv" and uv is None:
            raise TrialFailed('uv is not here: pip install "evenbits[environments]", or leave it to pip')
        self.uv = uv or []
        self.tool = "uv" if uv else "pip"
        self.environment = environment
        self.folder, self.python, self.wheels = folder, python, wheels
        self.cuda_torch = cuda_torch
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.write_text("")

    def install(self, say: Callable[[str], None]) -> None:
        """Raises TrialFailed with the last that the installer said."""
        self._run(self._venv(), "cannot make a virtual environment")
        version = self._run([str(self.python), "-c", VERSION], "its Python does not run").strip().splitlines()[-1]
        asked = self._cpu_torch(version)
        if asked is not None:
            say(f"with torch {asked}: no CUDA device is here")
        requirements = ["-r", str(self.environment.file)]
        if not any(not line.startswith("-") for line in self.environment.requirements):
            return  # pip and uv refuse an empty file
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            if asked is not None:
                constraints.write(f"torch=={asked}\n")
                constraints.flush()
                requirements += ["--find-links", str(self.wheels), "--constraint", constraints.name]
            if self.uv:
                # compiled now, as pip does: a trial's compress time is not to hold it
                command = [*self.uv, "pip", "install", "--compile-bytecode", "--python", str(self.python)]
                command += self._uv_sources()
            else:
                offline = ["--no-index"] if os.environ.get("UV_OFFLINE") else []
                command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off", *offline]
            self._run([*command, *requirements], "cannot be installed")

    def tool_version(self) -> str:
        """Such as "uv 0.13.9" or "pip 24.0"."""
        command = [*self.uv, "--version"] if self.uv else [str(self.python), "-m", "pip", "--version"]
        return " ".join(self._run(command, "does not run").strip().splitlines()[-1].split()[:2])

    # -- the interpreter ----------------------------------------------------------------------------------------

    def _venv(self) -> list[str]:
        """This interpreter wherever it will do, for its pip knows the wheels of its own kind."""
        asked = self.environment.python
        here = ".".join(map(str, sys.version_info[:3]))
        fits = SpecifierSet(asked).contains(here, prereleases=True)
        if self.uv:
            python = sys.executable if fits else asked
            return [*self.uv, "venv", "--no-project", "--python", python, str(self.folder)]
        if fits:
            return [sys.executable, "-m", "venv", str(self.folder)]
        for minor in range(30, 8, -1):
            found = shutil.which(f"python3.{minor}")
            if found and SpecifierSet(asked).contains(f"3.{minor}.99"):
                return [found, "-m", "venv", str(self.folder)]
        raise self._failed(f"needs Python {asked}, and here is {here}; install one, or uv, which fetches it")

    # -- torch --------------------------------------------------------------------------------------------------

    def _cpu_torch(self, python: str) -> str | None:
        """The version of torch for the CPU that now lies in `wheels`; None where the pin is to be taken as it is."""
        pin = self.environment.pins().get("torch")
        if pin is None or self.cuda_torch or sys.platform != "linux" or cuda_devices():
            return None
        version = next((one.version for one in pin.specifier), None)
        if version is None or ("+" in version and not version.endswith("+cpu")):
            return None
        asked = version.removesuffix("+cpu") + "+cpu"
        tag = "cp" + "".join(python.split(".")[:2])
        if any(self.wheels.glob(f"torch-{asked}-{tag}-*.whl")):
            return asked
        if find_spec("pip") is None:
            raise self._failed(f"torch {asked} is fetched with pip, and pip is not here: python -m ensurepip")
        self.wheels.mkdir(parents=True, exist_ok=True)
        offline = bool(os.environ.get("PIP_NO_INDEX") or os.environ.get("UV_OFFLINE"))
        here = ".".join(python.split(".")[:2]) == "{}.{}".format(*sys.version_info)
        with tempfile.TemporaryDirectory(dir=self.wheels, prefix=".fetching-") as fetched:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--progress-bar=off",
            ]
            command += ["--dest", fetched, *([] if here else ["--python-version", python])]
            command += ["--no-index"] if offline else []
            try:
                self._run([*command, f"torch=={asked}"], "")
            except TrialFailed:
                if offline:
                    raise self._no_torch(asked) from None
                try:
                    self._run([*command, "--retries", "1", "--index-url", CPU_INDEX, f"torch=={asked}"], "")
                except TrialFailed:
                    raise self._no_torch(asked) from None
            for wheel in Path(fetched).glob("*.whl"):
                wheel.replace(self.wheels / wheel.name)
        return asked

    def _no_torch(self, asked: str) -> TrialFailed:
        return self._failed(
            f"pip finds no torch {asked}, and torch for CUDA takes gigabytes that no GPU here would use; tell pip "
            f"where it lies (PIP_FIND_LINKS), or take it as it is: evenbits env create --cuda-torch; log: {self.log}"
        )

    # -- running ------------------------------------------------------------------------------------------------

    @staticmethod
    def _uv_sources() -> list[str]:
        """What pip's variables say, for uv reads only its own."""
        found = ["--no-index"] if os.environ.get("PIP_NO_INDEX") else []
        for place in os.environ.get("PIP_FIND_LINKS", "").split():
            found += ["--find-links", place]
        return found

    def _run(self, command: Sequence[str], failing: str) -> str:
        """Its output, kept in the log. Raises TrialFailed: `failing`, and why."""
        elsewhere = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "UV_SYSTEM_PYTHON", "UV_CONSTRAINT", "PIP_CONSTRAINT")
        leading = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UV_PROJECT", "__PYVENV_LAUNCHER__")
        env = {name: value for name, value in os.environ.items() if name not in (*elsewhere, *leading)}
        env |= {"NO_COLOR": "1", "COLUMNS": "1000", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        env |= {"PYTHONNOUSERSITE": "1", "UV_NO_PROGRESS": "1"}
        begin = self.log.stat().st_size
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                tethered(command), cwd=self.folder.parent, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                code = process.wait()
            finally:
                if process.poll() is None:  # this process was interrupted
                    process.kill()
                    process.wait()
        with self.log.open("rb") as file:
            file.seek(begin)
            output = file.read().decode(errors="replace").partition("\n")[2]
        if code != 0:
            raise self._failed(f"{failing}: {reason_in(output) or f'exit code {code}'}; log: {self.log}")
        return output

    def _failed(self, reason: str) -> TrialFailed:
        return TrialFailed(f"environment {self.environment.name!r} {reason}")


def reason_in(output: str) -> str:
    """The one line that says why uv or pip gave up: its last error, with the causes that uv puts below."""
    lines = [line.strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith("[notice]")]
    starts = [index for index, line in enumerate(lines) if re.match(r"(error|ERROR):|\u00d7", line)]
    if not starts:
        return lines[-1][:REASON_CHARACTERS] if lines else ""
    told: list[str] = []
    for line in lines[starts[-1] :]:
        if re.match(r"hint:|╰.*hint:", line):
            break
        told.append(re.sub(r"^(error:|ERROR:|cause:|\u00d7|[│├╰][─▶> ]*)\s*", "", line))
    if lines[starts[-1]].startswith("ERROR:"):  # pip's is one line; what comes after is no cause
        told = told[:1]
    text = "; ".join(part.rstrip(".") for part in told if part)
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."
