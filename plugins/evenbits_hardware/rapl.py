"""The processor's own energy counters (RAPL) as Linux shows them under /sys/class/powercap, Intel's and AMD's alike.

Only whole packages are read: their cores and memory controllers are parts of them and would be counted twice, and
"psys" is the whole machine once more.

Source: Linux, Documentation/power/powercap/powercap.rst (energy_uj in microjoules, max_energy_range_uj where it wraps).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from evenbits_hardware.absent import NoMeter

POWERCAP = Path("/sys/class/powercap")
ZONE = re.compile(r"intel-rapl:\d+")  # not intel-rapl:0:1, a part of a package, nor intel-rapl-mmio:0, the same again


@dataclass(frozen=True)
class Package:
    """One processor package. wraps: joules after which its counter begins anew."""

    name: str
    counter: Path
    wraps: float

    def joules(self) -> float:
        """Raises NoMeter where the counter may not be read (by root alone since Linux 5.10)."""
        try:
            return int(self.counter.read_text()) / 1e6
        except PermissionError:
            raise NoMeter(
                f"RAPL: {self.counter} may not be read by this user; an administrator can allow it: "
                f"chmod a+r {self.counter}"
            ) from None
        except (OSError, ValueError) as error:
            raise NoMeter(f"RAPL: {self.counter} cannot be read ({error})") from None


def packages() -> list[Package]:
    """All packages of this machine. Raises NoMeter where there is none or one cannot be read."""
    found = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if ZONE.fullmatch(zone.name) and name.startswith("package"):
                wraps = int((zone / "max_energy_range_uj").read_text()) / 1e6
                found.append(Package(name, zone / "energy_uj", wraps))
        except (OSError, ValueError) as error:
            raise NoMeter(f"RAPL: {zone} cannot be read ({error})") from None
    if not found:
        raise NoMeter(f"RAPL: no processor package under {POWERCAP} (virtual machines rarely show one)")
    for package in found:
        package.joules()
    return found
