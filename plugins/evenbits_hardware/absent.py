"""Why a meter cannot be used here."""

from __future__ import annotations


class NoMeter(Exception):
    """A meter is not there, not readable, or does not move; the message says which and what would help."""
