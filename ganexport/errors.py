"""Every error a user can cause, each with the exit code the command line gives it.

A message is one line that says what is wrong, where, and what to do about it.
Library callers catch :class:`GanExportError`; the command line turns it into
``error: <message>`` and :attr:`GanExportError.exit_code`.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException, so that no ``except Exception`` on the way swallows it."""


#: What a person or a supervisor stops work with.
STOPS = (KeyboardInterrupt, Terminated)


def stop_name(stop: BaseException) -> str:
    """The signal as people call it."""
    return "SIGTERM" if isinstance(stop, Terminated) else "Ctrl-C"


class GanExportError(Exception):
    """Base of all errors raised on purpose by ganexport.

    Args:
        message: One line: what is wrong, where, and what to do.
    """

    exit_code: int = EXIT_USAGE


class UsageError(GanExportError):
    """An option, argument or combination of them that cannot be meant."""


class DataError(GanExportError):
    """A data file or folder that is missing, corrupt or of the wrong kind."""


class MixedSizesError(DataError):
    """A folder of pictures of several sizes, where nothing says which one they are to have."""


class ArtifactError(GanExportError):
    """An artifact, manifest, ONNX file or engine that cannot be used as it is."""


class IntegrityError(ArtifactError):
    """A file whose content is not what its manifest says (it is never loaded)."""


class CheckpointError(GanExportError):
    """A checkpoint or weights file that is missing, corrupt, unsafe or does not fit."""


class RecipeError(GanExportError):
    """A recipe with unknown keys, wrong types or values out of range (all named at once)."""


class MissingDependencyError(GanExportError):
    """A package that this action needs is not installed; the message says how to install it."""


class BackendUnavailableError(GanExportError):
    """A backend, device or kernel that this machine cannot run; the message keeps the reason."""


class ExportError(GanExportError):
    """A generator that cannot be exported as asked; the message names the cause and the fix."""


class OutputError(GanExportError):
    """An output that cannot be written: not writable, exists already, or the disk is full."""


class CheckFailedError(GanExportError):
    """A check ran and failed: the answer is no, as opposed to a question that made no sense."""

    exit_code = EXIT_CHECK_FAILED


class ParityError(CheckFailedError):
    """A candidate's outputs are outside the tolerance against the reference."""


class DivergenceError(CheckFailedError):
    """Training stopped on NaN, infinity, an exploding loss or a collapsed critic."""


class RegressionError(CheckFailedError):
    """A benchmark comparison found a slowdown beyond the accepted one."""


class InterruptedBySignalError(GanExportError):
    """Work stopped by SIGINT or SIGTERM after leaving everything resumable."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, message: str, *, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known name closest to ``name`` in spelling, or None when none is near."""
    import difflib

    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_name(kind: str, name: str, known: list[str] | tuple[str, ...]) -> UsageError:
    """A refusal of an unknown name that lists the known ones and the nearest."""
    guess = nearest(name, known)
    did_you_mean = f" Did you mean {guess!r}?" if guess else ""
    return UsageError(f"unknown {kind} {name!r}.{did_you_mean} Known: {', '.join(sorted(known))}")
