"""The errors a user can cause or meet. Each message is one line: what, where, what would do instead."""

from __future__ import annotations


class EvenbitsError(Exception):
    """Base of the known errors: the command line prints them as one line and exits 2."""


class SuiteError(EvenbitsError):
    """A suite, or what it names (model, method, corpus, option), is wrong or missing."""


class PluginError(EvenbitsError):
    """A plugin cannot be loaded, clashes with another, or broke its contract."""


class MissingExtra(EvenbitsError):
    """An optional dependency is absent; the message names the pip line that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed: pip install "evenbits[{extra}]"')


class ArtifactError(EvenbitsError):
    """An artifact, record or results folder is damaged, locked, or of a schema this version cannot read."""


class TrialFailed(EvenbitsError):
    """A trial cannot be carried out on this input; it becomes a failed record and the run goes on."""
