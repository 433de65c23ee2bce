"""Files of expected values: what they must say, and how a mistake in one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from evenbits.errors import SuiteError
from evenbits.published import Origin, published_path, read_published, suite_of

GOOD = """
title = "Table 1"
model = "Llama-2-7B"
[origin]
source = "Somebody, Table 1"
version = "v4"
context = 4096
era = "A"
trust = "V"
[[rows]]
method = "FP16"
label = "dense"
bits = 16
stage = "none"
tolerance = "dense"
values = { wikitext2_perplexity = 5.12, arc_easy_acc = 69.32 }
[[rows]]
method = "GPTQ"
label = "gptq"
at = 3
bits = 3
stage = "none"
tolerance = "scalar3"
context = 2048
trust = "V2"
values = { wikitext2_perplexity = 8.06 }
mixed = { bits = "nominal" }
[[orderings]]
claim = "GPTQ behind dense"
metric = "wikitext2_perplexity"
first = "dense"
behind = ["gptq@3"]
[[formulas]]
method = "gptq"
options = { bits = 3 }
printed = 3.0
"""


def test_a_row_has_its_own_origin_filled_up_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.published.toml").write_text(GOOD)
    found = read_published(tmp_path / "a.published.toml")
    dense, gptq = found.rows
    assert found.origin_of(dense) == Origin(source="Somebody, Table 1", version="v4", context=4096, era="A", trust="V")
    assert found.origin_of(gptq) == Origin(source="Somebody, Table 1", version="v4", context=2048, era="A", trust="V2")
    assert dense.values["arc_easy_acc"] == 69.32
    assert gptq.at == 3


def test_where_it_stands() -> None:
    suite = Path("suites/paper/aqlm.toml")
    assert published_path(suite) == Path("suites/paper/aqlm.published.toml")
    assert suite_of(published_path(suite)) == suite


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('trust = "V"\n', "", "FP16: no trust; give it here or under [origin]"),
        ('source = "Somebody, Table 1"\n', "", "FP16: no source"),
        ('tolerance = "dense"', 'tolerance = "tight"', "rows.0: tolerance 'tight': known are dense, rtn, scalar4"),
        ('era = "A"', 'era = "D"', "origin.era: Input should be 'A', 'B' or 'C'"),
        ('mixed = { bits = "nominal" }', 'mixed = { arc_acc = "?" }', "GPTQ: no value of 'arc_acc' in this row"),
        ('mixed = { bits = "nominal" }', 'average = "wikitext2_perplexity"', "average and average_of belong together"),
        ('behind = ["gptq@3"]', "behind = []", "orderings.0.behind"),
        ("at = 3", "att = 3", "rows.1.att: Extra inputs are not permitted"),
        ("[origin]", "[origin", "not TOML"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "a.published.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SuiteError) as error:
        read_published(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"none\.published\.toml: cannot be read"):
        read_published(tmp_path / "none.published.toml")


def test_rows_wanted_for_their_average_alone_are_printed_nowhere_else(tmp_path: Path) -> None:
    row = """[[averaged]]\nmethod = "Qwen3-8B"\nstage = "none"\ntolerance = "exact"
    values = { a_acc = 66.50, b_acc = 34.9, mean_acc = 50.7 }
    average_of = ["a_acc", "b_acc"]\naverage = "mean_acc"\n"""
    (tmp_path / "a.published.toml").write_text(GOOD + row)
    found = read_published(tmp_path / "a.published.toml")
    assert [one.method for one in found.averaged] == ["Qwen3-8B"]
    assert [found.averaged[0].decimals_of(name) for name in ("a_acc", "b_acc")] == [2, 1]
    assert "Qwen3-8B" not in [one.method for one in found.rows]
