"""Errors a user can mend. Each message is one line that names the place (file:line where there is one) and the fix."""

from __future__ import annotations

from difflib import get_close_matches


class KeepsetError(Exception):
    """A mistake in the input or the set-up, told in one line; the command line prints it without a traceback."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        """Take the message; line breaks and terminal escapes that it quotes from a file become spaces."""
        super().__init__(message if message.isprintable() else "".join(c if c.isprintable() else " " for c in message))


class RecipeError(KeepsetError, ValueError):
    """The recipe or a command's options are wrong (exit code 2)."""


class PlanMismatch(KeepsetError):
    """The run folder was made by another recipe; continuing would mix two runs (exit code 3)."""

    exit_code = 3


class DataError(KeepsetError):
    """A data file is refused as a whole, or `strict: true` met a bad row (exit code 4)."""

    exit_code = 4


class ModelError(KeepsetError):
    """A model, tokenizer or adapter can't be loaded or can't be served (exit code 2)."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of what another library's error says, or the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest known word, or an empty string."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
