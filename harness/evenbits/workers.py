"""Running a worker (see `evenbits.foreign`) in an environment, from inside a stage.

It belongs to the stage's process group and dies with it: by a limit of time or memory, or because evenbits was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from evenbits.environment_files import Environment
from evenbits.environments import Made, locked
from evenbits.errors import TrialFailed
from evenbits.foreign import ERROR
from evenbits.installed import clean_variables
from evenbits.installing import tethered

LOOK_SECONDS = 0.1  # between two looks at what it wrote and how much memory it has
MESSAGE_CHARACTERS = 500
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


class WorkerLaunch:
    """A `Launch`. threads: as many as the stage may use. peak_bytes: resident, of the worker and what it started."""

    def __init__(self, environment: Environment, made: Made, threads: int) -> None:
        self.environment, self.made, self.threads = environment, made, threads
        self.peak_bytes = 0

    def __call__(self, worker: Path, folder: Path) -> None:
        """Run `worker` on `folder` to its end; what it prints goes to this process's output.

        Raises TrialFailed with the reason it left, how it was killed, or the last line it wrote.
        """
        command = tethered([str(self.made.python), str(worker.resolve()), str(folder.resolve())])
        output = folder / "output.log"
        with locked(self.made.folder, shared=True), output.open("wb") as sink, output.open("rb") as source:
            process = subprocess.Popen(
                command, cwd=folder, env=self.variables(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
            try:
                while process.poll() is None:
                    time.sleep(LOOK_SECONDS)
                    self._weigh(process.pid)
                    _pass_on(source.read())
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                _pass_on(source.read())
        if process.returncode != 0:
            raise TrialFailed(f"{worker.stem} in environment {self.environment.name!r}: {self._why(process, folder)}")

    def variables(self) -> dict[str, str]:
        """Those of this process without its Python's, with the limits of threads and those that are declared."""
        env = {name: value for name, value in clean_variables().items() if not name.startswith("PYTHON")}
        env |= dict.fromkeys(THREADS, str(self.threads))
        env |= {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        env["PYTHONHASHSEED"] = "0"  # a library that walks a set gives the same result twice
        env["PATH"] = os.pathsep.join([str(self.made.python.parent), env.get("PATH", os.defpath)])
        return env | dict(self.environment.variables)

    def _weigh(self, pid: int) -> None:
        import psutil

        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            self.peak_bytes = max(self.peak_bytes, sum(one.memory_info().rss for one in family))
        except psutil.Error:
            return

    @staticmethod
    def _why(process: subprocess.Popen[bytes], folder: Path) -> str:
        try:
            told = json.loads((folder / ERROR).read_text())["message"]
        except (OSError, ValueError, KeyError, TypeError):
            told = None
        if told:
            return _cut(" ".join(str(told).split()))
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            return f"killed by {name}" + (" (often the system, out of memory)" if name == "SIGKILL" else "")
        lines = (folder / "output.log").read_text(errors="replace").replace("\r", "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return _cut(f"exit code {process.returncode}: {last}")


def _pass_on(data: bytes) -> None:
    """To the descriptor, which is the stage's log, after what Python still holds back."""
    sys.stdout.flush()
    while data:
        data = data[os.write(1, data) :]


def _cut(text: str) -> str:
    return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 3] + "..."
