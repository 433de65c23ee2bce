"""Make transformers know artifacts once both are imported, whichever comes first; imports neither it nor torch.

transformers has a door for this: `register_quantizer`. It can only be called once transformers' own table of
quantizers is there, and importing evenbits must not bring that in: it takes seconds. So a finder waits for the table's
module to be imported, registers then, and is gone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

TABLE = "transformers.quantizers.auto"


class _Waiting(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                del loader.exec_module  # the class's own is there again
                execute(module)
                _register()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from evenbits.quantizer import register
    except ImportError as error:  # transformers without this door: it must still be importable
        warnings.warn(f"from_pretrained cannot open evenbits artifacts with this transformers ({error})", stacklevel=2)
    else:
        register()


def watch_transformers() -> None:
    """Register at once where transformers' table of quantizers is imported, else as soon as it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
