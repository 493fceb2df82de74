"""What other libraries raise, in our sentences: one place, asked at every border.

A border is where code that is not ours is called: files, JSON, zstd, torch, transformers. What comes
out of it says one of three things. The machine lacks something (memory, space, files that may be
open): then no input is to blame, the remedy is the machine's, and the same command may get past it
later. Or an input holds what it should not: the border knows which, and says so. Anything else is a
mistake of ours, which the command line tells as such.

    try:
        model = kind.from_pretrained(folder)
    except Exception as error:
        raise blamed(error, CheckpointError(f"{folder} cannot be loaded ...")) from error

Libraries are told by the names of their errors, so that none is imported here.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltafold.errors import (
    DeltafoldError,
    DeviceError,
    OutOfMemoryError,
    StorageError,
    UnexpectedError,
    UsageError,
)

_MEMORY = re.compile(
    r"(?:out of|not enough|insufficient) memory|(?:can'?t|cannot|could not|unable to|failed to) allocate"
    r"|bad_alloc|_ALLOC_FAILED|allocation error",
    re.I,
)
_GPU = re.compile(r"\bCUDA\b|\bHIP\b|\bGPU\b|CUBLAS|CUSOLVER|CUDNN", re.I)
_GPU_NUMBER = re.compile(r"\bGPU (\d+)")
_THREADS = re.compile(r"can'?t start new thread", re.I)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_CAUSES = 8  # a chain of errors is followed so far


def shortage(error: BaseException, path: object = None) -> DeltafoldError | None:
    """What the machine lacks, as a sentence, if that is what an error or one of its causes says.

    `path` is what was being written, for a disk that is full.
    """
    for each in _chain(error):
        if isinstance(each, DeltafoldError):
            return each if each.passing else None
        if (found := _lacking(each, path)) is not None:
            return found
    return None


def blamed(error: BaseException, otherwise: DeltafoldError) -> DeltafoldError:
    """What to raise for an error that came over a border: ours as it is, what the machine lacks, or
    `otherwise`, which names the input that is to blame."""
    if isinstance(error, DeltafoldError):
        return error
    found = shortage(error)
    if found is None and isinstance(error, OSError):
        otherwise.passing = True  # a share that is away today is there tomorrow
    return found or otherwise


def unread(error: OSError, path: object, kind: type[DeltafoldError]) -> DeltafoldError:
    """For a file that is there and cannot be read: what it holds is not to blame."""
    return blamed(error, kind(f"{path} cannot be read ({_words(error)}); check it."))


def unwritten(error: OSError, path: object) -> DeltafoldError:
    """For a file that cannot be written."""
    return shortage(error, path) or StorageError(
        f"{path} cannot be written ({_words(error)}); choose another output."
    )


@contextmanager
def reading(path: object, kind: type[DeltafoldError]) -> Iterator[None]:
    """What the system says while a file is read becomes one sentence of this kind."""
    try:
        yield
    except OSError as error:
        raise unread(error, error.filename or path, kind) from error


@contextmanager
def in_sentences() -> Iterator[None]:
    """For a whole verb: what no border inside has caught, if it is known what it says."""
    try:
        yield
    except DeltafoldError:
        raise
    except Exception as error:
        if (found := _known(error)) is None:
            raise
        raise found from error


def told(error: Exception) -> DeltafoldError:
    """For the command line: whatever was raised, as a sentence; a mistake of ours with its place."""
    if isinstance(error, DeltafoldError):
        return error
    return _known(error) or UnexpectedError(
        f"A mistake in deltafold itself ({_words(error)}, {_place(error)}); please report it. "
        "DELTAFOLD_TRACEBACK=1 in the environment shows more."
    )


def _known(error: Exception) -> DeltafoldError | None:
    """What an error says that names its own remedy, whatever was being done."""
    if (found := shortage(error)) is not None:
        return found
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        name = error.object.encode("utf-8", "backslashreplace").decode()
        return UsageError(
            f"A name is not UTF-8, so it can be neither stored nor shown ({name[:200]}); rename the "
            "file or folder."
        )
    if isinstance(error, OSError):
        path = error.filename if error.filename is not None else "A file"
        return blamed(error, StorageError(f"{path} cannot be used ({_words(error)}); check it."))
    if isinstance(error, RecursionError):
        return UsageError(
            "An input is nested too deeply to be read; put a proper one in its place."
        )
    return None


def _lacking(error: BaseException, path: object) -> DeltafoldError | None:
    if isinstance(error, OSError):
        if error.errno in _FULL:
            what = path if path is not None else error.filename
            return StorageError(
                f"No space left{f' while writing {what}' if what is not None else ''}; free some and "
                "run the same command again: it goes on where it stopped."
            )
        if error.errno in _TOO_MANY:
            return StorageError(
                "Too many files are open at once; raise the limit (ulimit -n) or give fewer "
                "--workers, and run the same command again."
            )
        if error.errno != errno.ENOMEM and not _MEMORY.search(str(error)):
            return None
    elif isinstance(error, RuntimeError) and _THREADS.search(str(error)):
        return OutOfMemoryError(
            "No further thread can be started here; give fewer --workers, or raise the limit "
            "(ulimit -u)."
        )
    elif not isinstance(error, MemoryError) and not (
        _is_of_a_library(error) and _MEMORY.search(str(error))
    ):
        return None
    return _no_memory(str(error))


def _is_of_a_library(error: BaseException) -> bool:
    """torch raises RuntimeError and its own, zstandard and safetensors their own."""
    return isinstance(error, RuntimeError) or type(error).__name__ in (
        "ZstdError",
        "SafetensorError",
        "OutOfMemoryError",
    )


def _no_memory(text: str) -> DeltafoldError:
    if _GPU.search(text):
        number = _GPU_NUMBER.search(text)
        return gpu_full(f"cuda:{number[1]}" if number else "The GPU")
    return OutOfMemoryError(
        "Out of memory; give a smaller --memory or fewer --workers, or use a larger machine."
    )


def gpu_full(name: str) -> DeviceError:
    """For a GPU whose memory runs out."""
    return DeviceError(
        f"{name} has too little memory free for this model, beside what else runs there; "
        "give a smaller --memory, fewer --workers or --device cpu."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    for _ in range(_CAUSES):
        if at is None:
            return
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or first_line(error))


def _place(error: BaseException) -> str:
    """The last of our lines that an error passed."""
    own = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(own) and frame.filename != __file__:
            return f"{Path(frame.filename).relative_to(own).as_posix()}, line {frame.lineno}"
    return f"Python {sys.version.split()[0]}"
