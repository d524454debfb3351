"""The versions of an artifact that a server holds: adopted only after a check, kept for rolling back.

Each version is a private copy, so that replacing or deleting the artifact on disk never pulls a
file from under a replica, and a replica that is restarted finds the version that serves.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from pathlib import Path

import msgspec

from ganexport.artifact import GOLDEN, MANIFEST, Artifact, write_atomic, writing
from ganexport.errors import ArtifactError, GanExportError, OutputError, UsageError
from ganexport.runtime._onnx_file import external_files
from ganexport.serving.loading import Checked

#: Versions kept on disk: the current one and those that can be rolled back to.
KEPT_VERSIONS = 3
#: File that remembers them.
SAVED = "versions.json"
_DIGEST = re.compile(r"[0-9a-f]{16}")


class Version(msgspec.Struct, frozen=True):
    """One adopted version.

    Attributes:
        digest: First 16 hexadecimal digits of the sha256 of the manifest (or of a lone .onnx and its weights).
        path: Of the private copy.
        adopted: Unix time.
        checked: What the check found.
    """

    digest: str
    path: str
    adopted: float
    checked: Checked


class _Saved(msgspec.Struct, frozen=True):
    """What a store remembers across restarts."""

    history: tuple[Version, ...] = ()
    withdrawn: str = ""


class VersionStore:
    """Adopts versions and says which one serves.

    Args:
        root: Folder for the copies; on a cluster one that every machine sees.
        check: Raises GanExportError when a version must not serve.
    """

    def __init__(self, root: Path, check: Callable[[Path], Awaitable[Checked]]) -> None:
        self.root = root
        self._check = check
        self._history: list[Version] = []
        self._withdrawn = ""

    @property
    def current(self) -> Version:
        """The version that serves.

        Raises:
            UsageError: None was adopted yet.
        """
        if not self._history:
            raise UsageError("no version was adopted yet")
        return self._history[-1]

    @property
    def history(self) -> tuple[Version, ...]:
        """Versions that can serve, the current one last."""
        return tuple(self._history)

    async def start(self, source: Path) -> tuple[Version, str | None]:
        """What serves first: what lies at ``source``, or else what served when the process before this one ended.

        A restart must not do what a reload would not: adopt a broken artifact, or one that was rolled back.

        Returns:
            The version, and why it is not the one at ``source``; None when it is.

        Raises:
            GanExportError: Why ``source`` was refused, when no earlier version can serve.
            OutputError: Another server uses the folder.
        """
        self._own()
        saved = self._saved()
        for version in saved.history:
            if Path(version.path).exists():
                self._history.append(version)
        self._withdrawn = saved.withdrawn
        try:
            return await self.adopt(source, starting=True), None
        except GanExportError as error:
            if not self._history:
                raise
            # Machines differ from one start to the next.
            checked = await self._check(Path(self.current.path))
            self._history[-1] = msgspec.structs.replace(self.current, checked=checked)
            return self.current, str(error)

    async def adopt(self, source: Path, *, starting: bool = False) -> Version:
        """Copy, check and make current what now lies at ``source``; on any error nothing changes.

        Args:
            source: An artifact's folder or a lone .onnx.
            starting: Nothing serves yet: also check what served before the process began, and refuse what
                was rolled back then.

        Raises:
            GanExportError: Why it was refused.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="incoming.", dir=self.root))
        try:
            digest, name = _copy(source, folder)
            if self._history and self.current.digest == digest and not starting:
                return self.current
            if digest == self._withdrawn and starting:
                raise UsageError(f"{source}: version {digest} was rolled back; replace it, or send SIGHUP to serve it")
            checked = await self._check(folder / name if name else folder)
            home = self.root / digest
            if starting:
                shutil.rmtree(home, ignore_errors=True)
            if not home.exists():
                with writing(home):
                    folder.rename(home)
            version = Version(digest, str(home / name if name else home), time.time(), checked)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._keep([v for v in self._history if v.digest != digest] + [version], withdrawn="")
        return version

    def roll_back(self) -> Version:
        """Make the version before the current one serve again; the current one is forgotten.

        Raises:
            UsageError: There is none before it.
        """
        if len(self._history) < 2:
            raise UsageError("there is no earlier version to roll back to")
        *earlier, withdrawn = self._history
        self._keep(earlier, withdrawn.digest)
        return self.current

    def _own(self) -> None:
        """Take the folder for this process alone, and sweep up what a killed one left half copied."""
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{self.root}: another server keeps its versions there; choose another --state") from None
        for folder in self.root.glob("incoming.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _saved(self) -> _Saved:
        path = self.root / SAVED
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Saved)
        except FileNotFoundError:
            return _Saved()
        except (OSError, msgspec.DecodeError) as error:
            raise OutputError(
                f"{path}: cannot be read ({error}); remove it to start without earlier versions"
            ) from None

    def _keep(self, history: list[Version], withdrawn: str) -> None:
        """Make these the versions, once that is written down, and remove copies that will not serve again.

        The one just rolled back stays: it may still have requests under way.
        """
        history = history[-KEPT_VERSIONS:]
        write_atomic(self.root / SAVED, msgspec.json.encode(_Saved(tuple(history), withdrawn)))
        self._history, self._withdrawn = history, withdrawn
        kept = {version.digest for version in history} | {withdrawn}
        for folder in self.root.iterdir():
            if _DIGEST.fullmatch(folder.name) and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def fingerprint(source: Path) -> tuple[tuple[int, int, int], ...] | None:
    """Changes when what lies at ``source`` is replaced; None while it, or weights of a lone .onnx, cannot be seen."""
    try:
        if source.is_dir():
            return (_stamp(source / MANIFEST),)
        own = _stamp(source)
        return own, *(_stamp(source.parent / name) for name in _weights(source, own))
    except OSError:
        return None


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=1)
def _weights(path: Path, _stamp: tuple[int, int, int]) -> list[str]:
    """Files beside an ONNX file that hold weights of it; none while it is half copied."""
    try:
        return external_files(path)
    except ArtifactError:
        return []


def _copy(source: Path, folder: Path) -> tuple[str, str]:
    """Copy an artifact's files, or a lone file; returns its digest and the lone file's name."""
    with writing(folder):
        if source.is_file():
            shutil.copyfile(source, folder / source.name)
            weights = external_files(folder / source.name)
            for name in weights:
                _copy_within(source.parent, folder, name, "weights of the ONNX file")
            return _digest(folder, source.name, *weights), source.name
    artifact = Artifact(source)
    names = [MANIFEST, *(name for f in artifact.manifest.files for name in (f.path, *f.companions))]
    if artifact.manifest.golden_sha256:
        names.append(GOLDEN)
    for name in names:
        _copy_within(source, folder, name, "named in the manifest")
    return _digest(folder, MANIFEST), ""


def _copy_within(source: Path, folder: Path, name: str, what: str) -> None:
    """One file of a folder, under the same name; nothing outside the folder is read."""
    origin, copy = source / name, folder / name
    if not origin.resolve().is_relative_to(source.resolve()):
        raise ArtifactError(f"{origin}: a link that leaves its folder")
    if not origin.is_file():
        raise ArtifactError(f"{origin}: {what}, but missing; convert again")
    with writing(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, copy)


def _digest(folder: Path, *names: str) -> str:
    """Of what the files hold, one after the other."""
    content = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as stream:
            hashlib.file_digest(stream, lambda: content)  # adds to it
    return content.hexdigest()[:16]
