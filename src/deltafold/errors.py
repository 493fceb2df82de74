"""One small tree of errors.

Each message is one sentence that names the thing (tensor, file, setting) and the remedy.
The command line prints it and exits with `exit_code`; nothing else is shown to the user.
"""

from __future__ import annotations

import platform


class DeltafoldError(Exception):
    """Anything that the user can put right. `str(error)` is the sentence shown.

    `passing` says that the machine is to blame, not what was given: the same command may get past it
    later, so unfinished work stays, and nothing takes it for an answer.
    """

    exit_code = 1
    passing = False

    def __str__(self) -> str:
        """One line, whatever the names in it are made of: no line feed, nothing that steers a terminal."""
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__()
        )


class UsageError(DeltafoldError):
    """A setting that cannot be: an unknown method, two budgets at once, an output that exists."""

    exit_code = 2


class CheckpointError(DeltafoldError):
    """A checkpoint that cannot be read: missing shard, truncated file, malformed header."""


class MismatchError(DeltafoldError):
    """Two things that do not belong together: architectures, shapes, another base."""


class ArchiveError(DeltafoldError):
    """An archive that cannot be trusted: flipped bit, newer format, edited manifest."""


class NonFiniteError(DeltafoldError):
    """NaN or infinity in a weight."""


class BudgetError(UsageError):
    """A budget that no setting of the method can meet; the message gives the smallest possible."""


class ResumeError(DeltafoldError):
    """Unfinished work under the output's name was begun with other inputs or settings."""


class StorageError(DeltafoldError):
    """The disk is full, read-only or out of reach."""

    passing = True


class OutOfMemoryError(DeltafoldError):
    """The machine has too little memory for what runs at once."""

    passing = True


class DeviceError(DeltafoldError):
    """A GPU that cannot do the work: its memory runs out."""

    passing = True


class ClusterError(DeltafoldError):
    """A cluster that cannot do its part: none answers, a machine lacks a file, all are lost."""

    passing = True


class HubError(DeltafoldError):
    """The Hugging Face Hub does not take or give something: no login, no right, no network."""


class UnexpectedError(DeltafoldError):
    """A mistake in deltafold: what was raised is nothing that it knows of."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h
    passing = True


class DeltafoldWarning(UserWarning):
    """Something worth a line on the terminal that does not stop the work."""


class StorageWarning(UserWarning):
    """Work or a cache that is damaged and made again, or a file that could not be written afterwards."""


def not_shared(path: object) -> ClusterError:
    """For a machine of a cluster that does not see the files of the machine that gave the task."""
    return ClusterError(
        f"{path} is missing on the machine {platform.node()}, or differs there; put it on a file "
        "system that all machines of the cluster share, under the same path."
    )


def nearest(word: str, known: list[str]) -> str:
    """`", did you mean 'x'?"`-style hint for an unknown `word`; always lists what is known."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
