"""The faults of tests/regressions.py still fit the source they are planted into; the script itself runs for long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tests.regressions import PLANTS, Plant


@pytest.mark.parametrize("fault", PLANTS, ids=lambda fault: fault.name)
def test_the_text_to_change_is_there_once(fault: Plant, root: Path) -> None:
    for edit in fault.edits:
        text = (root / edit.file).read_text()
        assert text.count(edit.old) == 1, f"{edit.file}: {edit.old!r}"
        changed = text.replace(edit.old, edit.new)
        assert changed != text
        if edit.file.endswith(".py"):
            ast.parse(changed)
