"""codecarbon's estimate: power by the processor's model and load, not measured where no counter can be read.

It is held to this machine: no network, no files, none of the user's settings that would send a result anywhere.
Source: codecarbon, `OfflineEmissionsTracker` (start_task, stop_task give kWh of one stretch).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from evenbits.errors import MissingExtra
from evenbits_hardware.absent import NoMeter

JOULES_PER_KWH = 3.6e6
TELEMETRY = "CODECARBON_TELEMETRY_LEVEL"  # newer versions send what the machine is unless told not to
QUIET: dict[str, Any] = {
    "country_iso_code": "USA",  # asked for, and without effect on energy
    "measure_power_secs": 1,
    "tracking_mode": "machine",
    "log_level": "error",
    "emissions_endpoint": False,
    "allow_multiple_runs": True,  # else a lock file
    "pue": 1.0,
}
OUTPUTS = ("save_to_file", "save_to_api", "save_to_logger", "save_to_prometheus", "save_to_logfire")  # before 3.3


class Codecarbon:
    """A meter whose reading is known only at the end of a stretch. Raises NoMeter where codecarbon does not start."""

    name = "codecarbon"
    kind = "estimate"
    scope = "whole machine: processors, memory, GPUs"
    period: float | None = 1.0  # it looks at the load once a second

    def __init__(self) -> None:
        try:
            module = importlib.import_module("codecarbon")
        except ImportError:
            raise NoMeter(str(MissingExtra("codecarbon", "energy"))) from None
        logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it speaks before it has read its log level
        tracker = module.OfflineEmissionsTracker
        accepted = {name for owner in tracker.__mro__ for name in inspect.signature(owner.__init__).parameters}
        quiet: dict[str, Any] = {"output_methods": []}
        settings = QUIET | (quiet if "output_methods" in accepted else dict.fromkeys(OUTPUTS, False))
        if "telemetry_level" in accepted:
            settings["telemetry_level"] = "disabled"
        before = os.environ.get(TELEMETRY)
        os.environ[TELEMETRY] = "disabled"
        try:
            self._tracker = tracker(**settings)
        except Exception as error:
            raise NoMeter(f"codecarbon does not start ({type(error).__name__}: {error})") from None
        finally:
            if before is None:
                del os.environ[TELEMETRY]
            else:
                os.environ[TELEMETRY] = before
        self.parts: dict[str, float] = {}

    @property
    def facts(self) -> dict[str, Any]:
        try:
            return {"codecarbon": version("codecarbon")}
        except PackageNotFoundError:
            return {"codecarbon": "unknown"}

    def begin(self) -> None:
        self._tracker.start_task()

    def look(self) -> float | None:
        return None

    def end(self) -> float:
        """Joules since `begin`; `stop` is never called, which would persist and send."""
        try:
            data = self._tracker.stop_task()
        except Exception as error:  # it hides what went wrong when it was made, and stumbles here
            raise NoMeter(f"codecarbon gave no estimate ({type(error).__name__}: {error})") from None
        if data is None or not data.energy_consumed > 0:
            raise NoMeter("codecarbon gave no estimate")
        self.parts = {
            f"{part}_joules": float(getattr(data, f"{part}_energy")) * JOULES_PER_KWH for part in ("cpu", "gpu", "ram")
        }
        return float(data.energy_consumed) * JOULES_PER_KWH
