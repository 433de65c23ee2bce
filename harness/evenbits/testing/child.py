"""The process that `evenbits check` runs checks in: a plugin that takes it down is a failed check of its parent's.

One argument, JSON: name, options, exact, model, device, and `done`, how many checks are over. Prints an event a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from evenbits.errors import EvenbitsError
from evenbits.testing.contract import NotApplicable, checks


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a plugin prints is no event

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    model = None if request["model"] is None else Path(request["model"])
    try:
        found = checks(
            request["name"], request["options"], exact=request["exact"], model=model, device=request["device"]
        )
    except EvenbitsError as error:
        tell(error=str(error))
        return
    tell(checks=[(check.name, check.says) for check in found])
    for index, check in enumerate(found[request["done"] :], request["done"]):
        tell(begin=index)
        clock = time.perf_counter()
        try:
            check.run()
            status, message = "passed", ""
        except NotApplicable as reason:
            status, message = "skipped", str(reason)
        except AssertionError as error:
            status, message = "failed", str(error) or "an assertion without a message"
        except Exception as error:
            from evenbits.testing.compressors import told

            status, message = "failed", f"{check.name}: ends in {told(error)}"
        tell(end=index, status=status, message=" ".join(message.split()), seconds=time.perf_counter() - clock)


if __name__ == "__main__":
    main()
