"""A quantized checkpoint that somebody published: evaluated as it is, billed from its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from evenbits.budget import BitBudget, pinned
from evenbits.compressor import Compressor, Estimate, ModelShapes, Options, Refusal, Role, meta_bytes
from evenbits.errors import SuiteError, TrialFailed
from evenbits.shapes import WIDTHS
from evenbits_backends.claimed import bits_in_config, bits_in_name
from evenbits_backends.layout import recognise

if TYPE_CHECKING:
    from evenbits_backends.published import Published
    from evenbits_backends.reading import CheckpointHeaders


class CheckpointOptions(Options):
    path: str | None = Field(default=None, description="its folder: config.json and *.safetensors")
    id: str | None = Field(default=None, description="or its repository on the hub, with `revision`")
    revision: str | None = Field(default=None, description="commit hash of 40 hex digits, required with `id`")
    claimed: float | None = Field(
        default=None,
        gt=0,
        le=32,
        description="bits a weight that it is said to have, shown as paper bits; by default those in its name, else in "
        "its config, else those of its codes",
    )
    content: str | None = Field(
        default=None,
        pattern="^sha256:[0-9a-f]{16}$",
        description="digest of the files under `path`, filled in where a suite is read: other files are another trial",
    )

    def shown(self) -> tuple[str, ...]:
        return ("claimed", "path" if self.id is None else "id")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        """Nothing on disk is read where `content` is there: an artifact opens without the checkpoint it came from."""
        if not isinstance(given, Mapping):
            return given
        path, repository = given.get("path"), given.get("id")
        if (path is None) == (repository is None):
            raise ValueError("give either path, a folder, or id and revision, a repository on the hub")
        if repository is not None and not re.fullmatch(r"[0-9a-f]{40}", str(given.get("revision"))):
            said = repr(given.get("revision"))
            raise ValueError(f"revision {said} is no commit hash of 40 hex digits; branches and tags move")
        filled = dict(given)
        if isinstance(path, str) and given.get("content") is None:
            from evenbits_backends.located import content_of

            try:
                filled["content"] = content_of(Path(path))
            except TrialFailed as error:
                raise ValueError(str(error)) from None
        if given.get("claimed") is None:
            filled["claimed"] = bits_in_name(str(Path(path).resolve()) if isinstance(path, str) else str(repository))
        return filled


def headers(options: CheckpointOptions) -> CheckpointHeaders:
    """Of the folder, or of the repository in the cache or on the hub.

    Raises TrialFailed where nothing can be known of it, or it is not what it was when the suite was read.
    """
    from evenbits_backends.located import content_of, remote_headers, snapshot
    from evenbits_backends.reading import CheckpointFolder

    if options.path is not None:
        path = Path(options.path)
        if (found := content_of(path)) != options.content:
            raise TrialFailed(f"{path}: its files are not those of content = {options.content!r}, but {found!r}")
        return CheckpointFolder(path)
    repository, revision = str(options.id), str(options.revision)
    folder = snapshot(repository, revision)
    return remote_headers(repository, revision) if folder is None else CheckpointFolder(folder)


def _estimate(options: CheckpointOptions, shapes: ModelShapes) -> Estimate:
    read = headers(options)
    layout, facts = recognise(read.quantization, read.named)
    read.check_names(shapes.layers)
    counted = {Role.META: meta_bytes({"layout": layout.name, **facts})}
    compressed = 0
    for layer in shapes.layers:
        roles = layout.roles(layer, facts)
        if not read.packed(layer, roles):
            counted[Role.DENSE] = counted.get(Role.DENSE, 0) + layer.weights * WIDTHS[shapes.dtype or layer.dtype]
            continue
        compressed += layer.weights
        for name, role in read.with_spare_bias(layer, roles).items():
            counted[role] = counted.get(role, 0) + read.entries[f"{layer.name}.{name}"].nbytes
    index = 8 * counted.get(Role.CODE, 0) / compressed if compressed else 0.0
    claimed = options.claimed or bits_in_config(read.quantization) or index
    return Estimate(index_bits=index, paper_bits=claimed, role_bytes=counted)


def predict(options: CheckpointOptions, shapes: ModelShapes) -> Estimate:
    """From headers alone; paper_bits: what it claims. Raises SuiteError for one unreadable, or of another model."""
    try:
        return _estimate(options, shapes)
    except TrialFailed as error:
        raise SuiteError(f"method checkpoint: {error}") from None


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> CheckpointOptions | Refusal:
    """The checkpoint where its bits lie in the budget: there is nothing to choose."""
    options = pinned(CheckpointOptions, fixed)
    try:
        bits = budget.bits(_estimate(options, shapes), shapes)
    except TrialFailed as error:
        return Refusal(str(error))
    if bits in budget:
        return options
    return Refusal(f'its files take {bits:.3f} bits, outside {budget}; budget = "free" takes it as it is')


def fetches(options: CheckpointOptions) -> Sequence[tuple[str, int | None]]:
    """A repository that is not in the hub's cache; its configs and tokenizer are not counted."""
    from evenbits_backends.located import remote_headers, snapshot

    if options.id is None or snapshot(options.id, str(options.revision)) is not None:
        return ()
    entries = remote_headers(options.id, str(options.revision)).entries
    return ((f"checkpoint {options.id}", sum(entry.nbytes for entry in entries.values())),)


def make(options: CheckpointOptions) -> Published:
    from evenbits_backends.published import Published

    return Published(options)


def descriptor() -> Compressor:
    return Compressor(
        name="checkpoint",
        summary="a quantized checkpoint as published: GPTQ, AWQ, AQLM, VPTQ, compressed-tensors, bitsandbytes layouts",
        paper="",
        options=CheckpointOptions,
        make=make,
        predict=predict,
        fit=fit,
        fetches=fetches,
    )
