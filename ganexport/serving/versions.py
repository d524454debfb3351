"""The versions of an artifact that a server holds: adopted only after a check, kept for rolling back.

Each version is a private copy, so that replacing or deleting the artifact on disk never pulls a
file from under a replica, and a replica that is restarted finds the version that serves.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from ganexport.artifact import GOLDEN, MANIFEST, Artifact, writing
from ganexport.errors import ArtifactError, UsageError
from ganexport.serving.loading import Checked

#: Versions kept on disk: the current one and those that can be rolled back to.
KEPT_VERSIONS = 3


class Version(msgspec.Struct, frozen=True):
    """One adopted version.

    Attributes:
        digest: First 16 hexadecimal digits of the sha256 of the manifest (or of a lone .onnx).
        path: Of the private copy.
        adopted: Unix time.
        checked: What the check found.
    """

    digest: str
    path: str
    adopted: float
    checked: Checked


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

    async def adopt(self, source: Path) -> Version:
        """Copy, check and make current what now lies at ``source``; on any error nothing changes.

        Raises:
            GanExportError: Why it was refused.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="incoming.", dir=self.root))
        try:
            digest, name = _copy(source, folder)
            if self._history and self.current.digest == digest:
                return self.current
            checked = await self._check(folder / name if name else folder)
            home = self.root / digest
            if not home.exists():
                folder.rename(home)
            version = Version(digest, str(home / name if name else home), time.time(), checked)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._history = [v for v in self._history if v.digest != digest] + [version]
        self._forget()
        return version

    def roll_back(self) -> Version:
        """Make the version before the current one serve again; the current one is forgotten.

        Raises:
            UsageError: There is none before it.
        """
        if len(self._history) < 2:
            raise UsageError("there is no earlier version to roll back to")
        self._history.pop()
        return self.current

    def _forget(self) -> None:
        for old in self._history[:-KEPT_VERSIONS]:
            shutil.rmtree(self.root / old.digest, ignore_errors=True)
        self._history = self._history[-KEPT_VERSIONS:]


def fingerprint(source: Path) -> tuple[int, int, int] | None:
    """Changes when what lies at ``source`` is replaced; None while nothing is there."""
    path = source / MANIFEST if source.is_dir() else source
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _copy(source: Path, folder: Path) -> tuple[str, str]:
    """Copy an artifact's files, or a lone file; returns its digest and the lone file's name."""
    with writing(folder):
        if source.is_file():
            shutil.copyfile(source, folder / source.name)
            return _digest((folder / source.name).read_bytes()), source.name
    artifact = Artifact(source)
    names = [MANIFEST, *(name for f in artifact.manifest.files for name in (f.path, *f.companions))]
    if artifact.manifest.golden_sha256:
        names.append(GOLDEN)
    for name in names:
        origin, copy = source / name, folder / name
        if not origin.resolve().is_relative_to(source.resolve()):
            raise ArtifactError(f"{origin}: a link that leaves the artifact")
        if not origin.is_file():
            raise ArtifactError(f"{origin}: named in the manifest but missing; convert again")
        with writing(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, copy)
    return _digest((folder / MANIFEST).read_bytes()), ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
