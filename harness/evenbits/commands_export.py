"""`evenbits export`: an artifact as a folder that other programs read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ExportFormat(StrEnum):
    DENSE = "dense"
    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"


def export(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="folder of an artifact, a trial's id or its beginning, or SUITE.toml:LABEL[@BUDGET]/SEED",
        ),
    ],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="dense: plain weights, any method; the others: the integer codes as they are"),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new folder")],
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="results folder")] = Path("results"),
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="open a model that runs code of its own")
    ] = False,
) -> None:
    """Write an artifact as a folder that transformers, compressed-tensors or GPTQModel reads without evenbits."""
    from evenbits.export import export as write
    from evenbits.plugins import load_plugins

    folder = find_artifact(artifact, results)
    done = write(folder, form.value, out, load_plugins(), trust_remote_code=trust_remote_code)
    before, after = done.before, done.after
    typer.echo(f"wrote {done.folder}: {done.method} as {done.form}")
    for what, size in (("artifact", before), ("export", after)):
        typer.echo(
            f"  {what:8}  {size.linear_bits:7.4g} bits per linear weight, {size.model_bits:7.4g} per parameter, "
            f"{size.model_bytes:,} bytes"
        )
    if done.difference:
        typer.echo(
            f"  codes and scales are the artifact's; computed in {done.read_dtype}, as readers do, a layer's weights "
            f"are off by up to {100 * done.difference:.2g} % of their size"
        )
    else:
        typer.echo("  read back, its weights are the artifact's, bit for bit")


def find_artifact(name: str, results: Path) -> Path:
    """The folder of an artifact that a name on the command line stands for.

    Raises SuiteError where it stands for several trials, or for one that has no artifact (any more).
    """
    from evenbits.errors import SuiteError
    from evenbits.manifest import MANIFEST
    from evenbits.named_trials import find_trials
    from evenbits.store import Results

    if (Path(name) / MANIFEST).is_file():
        return Path(name)
    store = Results(results)
    records = find_trials(name, store).records
    if len(records) > 1:
        seeds = ", ".join(str(record.seed) for record in records)
        raise SuiteError(
            f"{name}: trials of seeds {seeds}; export one of them: add /SEED, as in {name}/{records[0].seed}"
        )
    (record,) = records
    key = record.chain[-1] if record.chain else record.artifact
    if key is None:
        raise SuiteError(f"{name}: the uncompressed model, which has no artifact: its own folder is what to use")
    if not store.has_artifact(key):
        raise SuiteError(
            f"{name}: its artifact {key} is not in {store.artifacts}; run the suite again with these --results, or "
            "give the artifact's folder"
        )
    return store.artifacts / key
