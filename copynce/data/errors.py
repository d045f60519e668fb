"""The error of bad data."""

from __future__ import annotations


class DataError(ValueError):
    """A problem in the user's data; the message names the file, what was expected and what was found."""
