"""A worker process seen from the measuring one: start, ask, put to sleep, stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ganexport.measure.candidate import Candidate
from ganexport.measure.protocol import ConnectionClosedError, NoAnswerError, receive, send

_ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT = 120.0


class CandidateFailedError(Exception):
    """A candidate could not do what it was asked.

    Attributes:
        kind: "out of memory", "refused", "unavailable", "failed", "crashed" or "no answer".
        alive: Whether its process can still be asked.
    """

    def __init__(self, kind: str, reason: str, *, alive: bool) -> None:
        super().__init__(reason)
        self.kind = kind
        self.alive = alive


class WorkerProcess:
    """One candidate's process.

    A worker that is not on turn is stopped (SIGSTOP), so that its spinning threads cannot disturb
    the one that is. Use as a context manager: the process is gone afterwards, whatever happened.

    Args:
        candidate: What it will hold.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        variables = {**os.environ, **candidate.variables, "PYTHONPATH": os.pathsep.join(paths)}
        self.started_ns = time.perf_counter_ns()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ganexport.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=variables,
            start_new_session=True,  # Ctrl-C reaches the measuring process alone
        )
        if candidate.cores:  # at once, before any library counts the cores or starts a thread
            os.sched_setaffinity(self._process.pid, candidate.cores)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands = self._process.stdin.fileno()
        self._answers = self._process.stdout.fileno()
        self._paused = False
        self._ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, command: str, timeout: float = 600.0, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            CandidateFailedError: The answer is a failure, the process is gone or the time is over.
        """
        self.resume()
        try:
            if not self._ready:
                receive(self._answers, START_TIMEOUT)
                self._ready = True
            send(self._commands, {"do": command, **arguments})
            answer = receive(self._answers, timeout)
        except ConnectionClosedError:
            raise self._gone() from None
        except NoAnswerError:
            self.kill()
            raise CandidateFailedError(
                "no answer", f"no answer to {command!r} within {timeout:.0f} s", alive=False
            ) from None
        if "error" in answer:
            raise CandidateFailedError(answer["error"], answer["reason"], alive=True)
        return answer

    def pause(self) -> None:
        """Stop its threads; the next :meth:`ask` wakes them."""
        if hasattr(signal, "SIGSTOP") and self._process.poll() is None:
            os.kill(self.pid, signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        """Let its threads run again."""
        if self._paused and self._process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def kill(self) -> None:
        """End the process at once; calling twice is fine."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._errors.close()

    def _gone(self) -> CandidateFailedError:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = 0
        said = self._last_words()
        self.kill()
        if code == -signal.SIGKILL:
            return CandidateFailedError("crashed", "killed (SIGKILL), most likely out of memory", alive=False)
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        return CandidateFailedError("crashed", f"{how}{': ' + said if said else ''}", alive=False)

    def _last_words(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines()]
        return next((line[:200] for line in reversed(lines) if line), "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
