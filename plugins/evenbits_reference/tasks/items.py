"""What the task files read their items with: the JSON lines beside this file, wherever the package lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def read(family: str, **_: Any) -> Any:
    """{"test": the items of a family}, as lm-eval's `custom_dataset` wants it."""
    from datasets import Dataset, DatasetDict

    lines = (FOLDER / f"{family}.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))


def blank_prefixes(item: dict[str, Any]) -> list[str]:
    """WinoGrande's partial scoring: the text up to the blank, with each choice in it ..."""
    return [item["context"].partition("_")[0] + choice for choice in item["choices"]]


def blank_suffix(item: dict[str, Any]) -> str:
    """... and what follows, whose likelihood is compared."""
    return str(item["context"].partition("_")[2].strip())
