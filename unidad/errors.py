"""The errors a person caused or can mend. The command line prints them as one sentence and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; the message says what was wrong, where, and what to do next."""


class SettingsError(UserError):
    """A setting is unknown or out of range."""


class DataError(UserError):
    """A picture or a folder of pictures cannot be used."""


class ModelError(UserError):
    """A model folder is missing, damaged, or of a kind that cannot be used here."""


class CheckpointError(UserError):
    """A run folder or checkpoint is missing, damaged, or belongs to another run."""


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer."""


class NonFiniteError(Exception):
    """A loss or gradient became NaN or infinite; the update was not applied."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
