"""An artifact: a folder of standard files with ``manifest.json`` beside them.

The files stay untouched by us, so that trtexec, Triton, netron and any ONNX tool read them.
Everything we know about them is in the manifest: the generator's spec, each file's sha256,
what it needs to run, where it came from and the parity certificate.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ganexport.errors import ArtifactError, GanExportError, IntegrityError, OutputError
from ganexport.parity import Certificate
from ganexport.spec import GeneratorSpec

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
#: Name of the golden inputs and reference outputs inside an artifact (numpy .npz, no pickles).
GOLDEN = "golden.npz"
#: Preference of :func:`ganexport.load` when no backend is named: the first that runs here.
FORMATS = ("trt", "onnx", "openvino", "torchscript", "aoti")
MANIFEST_LIMIT = 16 << 20
#: Key of ``requires`` that says how wide int8 weights are, "7 bits" or "8 bits"; the latter overflow in some engines
#: on a processor without VNNI.
INT8_WEIGHTS = "int8_weights"


class ArtifactFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One runnable file (or its companions) of an artifact.

    Attributes:
        path: Relative to the artifact, always with forward slashes, inside the artifact.
        format: "onnx", "trt", "openvino", "torchscript", "aoti".
        precision: "fp32", "fp16", "bf16", "int8", or "tf32": numbers in fp32, products on CUDA in TF32.
        sha256: Hexadecimal digest of the content.
        bytes: Size of the file.
        requires: What a machine needs to run it: library versions, "flavour" of TensorRT,
            "compute_capability", "platform", width of int8 weights.
        companions: sha256 by path of files that belong to it (external weights, OpenVINO's .bin).
        settings: How the runtime should run it ("backend", "device", threads, provider options), as measured.
        passes: Named rewrites applied on the way, in order.
        certificate: Parity against the source; None when the check was refused or impossible.
    """

    path: str
    format: str
    precision: str
    sha256: str
    bytes: int
    requires: dict[str, str] = {}
    companions: dict[str, str] = {}
    settings: dict[str, Any] = {}
    passes: tuple[str, ...] = ()
    certificate: Certificate | None = None


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the weights came from.

    Attributes:
        source: A run's recipe name, ``package.module:factory``, or a file name; never a machine's path.
        weights_sha256: Digest of the tensors (name, dtype, shape, bytes) in name order.
        recipe: The resolved recipe as a nested mapping, when a run of ours was exported.
        step: Training step of the checkpoint.
        versions: Versions of ganexport, torch, onnx, … at export.
    """

    source: str
    weights_sha256: str = ""
    recipe: dict[str, Any] = {}
    step: int | None = None
    versions: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of ``manifest.json``.

    Attributes:
        schema_version: :data:`SCHEMA_VERSION` of the writer.
        spec: The generator's inputs, outputs and dimensions.
        files: The runnable files.
        provenance: Where the weights came from.
        golden_sha256: Digest of :data:`GOLDEN`, empty when there is none.
        report: Anything measured on the way (candidates of ``--to auto``, …).
    """

    schema_version: int
    spec: GeneratorSpec
    files: tuple[ArtifactFile, ...]
    provenance: Provenance
    golden_sha256: str = ""
    report: dict[str, Any] = {}


class _Version(msgspec.Struct):
    schema_version: int


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def decode_manifest(text: bytes, where: str) -> Manifest:
    """Parse and check a manifest.

    Raises:
        ArtifactError: Not JSON, not a manifest, of a newer schema, or with a path that leaves the artifact.
    """
    if len(text) > MANIFEST_LIMIT:
        raise ArtifactError(f"{where}: {len(text)} bytes is too large for a manifest")
    try:
        version = msgspec.json.decode(text, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise ArtifactError(
                f"{where}: written by a newer ganexport (schema {version}, this one reads up to "
                f"{SCHEMA_VERSION}): upgrade ganexport"
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where}: not a valid manifest: {error}") from None
    except GanExportError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{where}: {error}") from None
    if version < 1:
        raise ArtifactError(f"{where}: schema version {version} does not exist")
    for file in manifest.files:
        for path in (file.path, *file.companions):
            _check_inside(path, where)
    return manifest


def _check_inside(path: str, where: str) -> None:
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts or ":" in parts[0]:
        raise ArtifactError(f"{where}: file path {path!r} leaves the artifact")


class Artifact:
    """An artifact on disk, opened for reading; nothing is loaded until asked for.

    Args:
        path: The artifact's folder.

    Raises:
        ArtifactError: No folder there, no manifest in it, or a manifest that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ArtifactError(f"{self.path}: no such file or folder")
        if not self.path.is_dir():
            raise ArtifactError(f"{self.path}: not an artifact (a folder with {MANIFEST})")
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise ArtifactError(
                f"{self.path}: no {MANIFEST} in it, so it is not an artifact; make one with: ganexport convert"
            )
        try:
            text = manifest.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{manifest}: {error.strerror}") from None
        self.manifest = decode_manifest(text, str(manifest))

    @property
    def spec(self) -> GeneratorSpec:
        """The generator's spec."""
        return self.manifest.spec

    def find(self, format: str, precision: str | None = None) -> ArtifactFile:  # noqa: A002 - the field's word
        """The file of this format (and precision; fp32 first when not said).

        Raises:
            ArtifactError: There is none; those that are there are named.
        """
        found = [f for f in self.manifest.files if f.format == format and precision in (None, f.precision)]
        if not found:
            present = ", ".join(f"{f.format} {f.precision}" for f in self.manifest.files) or "nothing"
            wanted = f"{format} {precision}" if precision else format
            raise ArtifactError(
                f"{self.path}: holds no {wanted}, only {present}; add it with: ganexport convert --to {format}"
            )
        return min(found, key=lambda f: f.precision != "fp32")

    def verified_path(self, file: ArtifactFile) -> Path:
        """Absolute path of a file, after its content (and its companions') matched the manifest.

        Raises:
            ArtifactError: The file is missing.
            IntegrityError: Its sha256 is not the manifest's.
        """
        self._check(file.path, file.sha256)
        for path, digest in file.companions.items():
            self._check(path, digest)
        return self.path / file.path

    def bytes_of(self, file: ArtifactFile) -> int:
        """Bytes on disk of a file and its companions (OpenVINO's weights lie in a .bin); missing ones count nothing."""
        paths = [self.path / name for name in file.companions]
        return file.bytes + sum(path.stat().st_size for path in paths if path.is_file())

    def golden_path(self) -> Path | None:
        """Path of the golden inputs and outputs after a hash check; None when the artifact has none."""
        if not self.manifest.golden_sha256:
            return None
        self._check(GOLDEN, self.manifest.golden_sha256)
        return self.path / GOLDEN

    def _check(self, relative: str, digest: str) -> None:
        path = self.path / relative
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
            present = path.is_file()
            actual = sha256_file(path) if inside and present else ""
        except OSError as error:  # unreadable, or a name longer than the system takes
            raise ArtifactError(f"{str(path)[:300]}: {error.strerror}") from None
        if not inside:
            raise ArtifactError(f"{path}: a link that leaves the artifact")
        if not present:
            raise ArtifactError(f"{path}: named in the manifest but missing; convert again")
        if actual != digest:
            raise IntegrityError(
                f"{path}: its sha256 is {actual[:12]}…, the manifest says {digest[:12]}…: "
                "the file was changed or damaged; convert again"
            )


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn an OSError of writing ``destination`` into one clear line.

    Raises:
        OutputError: Disk full, no permission, or whatever the system said.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{destination}: the disk is full; free some space or write elsewhere") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"{destination}: not writable here; choose another output") from None
        raise OutputError(f"{destination}: {error.strerror or error}") from None


def write_atomic(destination: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{destination.name}.", dir=destination.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(destination)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


def _strangers(folder: Path) -> list[str]:
    """Files in an artifact's folder that its manifest does not name, hidden ones aside; none where it is unreadable."""
    try:
        manifest = Artifact(folder).manifest
    except GanExportError:
        return []
    own = {MANIFEST, GOLDEN} | {name for file in manifest.files for name in (file.path, *file.companions)}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in own and not name.rpartition("/")[2].startswith("."))


class ArtifactWriter:
    """Collect an artifact's files in a hidden folder and publish them at once.

    Use as a context manager: write files into :attr:`folder`, then call :meth:`publish`. Leaving
    the block without publishing removes everything.

    Args:
        destination: The artifact's folder; it may exist when it is an artifact (it is replaced
            as a whole) or empty. What a link leads to is replaced, not the link.

    Raises:
        OutputError: The destination is something else, cannot be replaced as a whole, or its parent
            is not writable.
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        self.destination = Path(destination)
        with writing(self.destination):
            self._place = self.destination.resolve()
            if self._place.exists() and not self._replaceable():
                raise OutputError(f"{self.destination}: exists and is not an artifact; choose another output")
            if self._place == Path.cwd() or self._place.is_mount():
                where = "the current directory" if self._place == Path.cwd() else "a mount point"
                raise OutputError(f"{self.destination}: is {where}, which cannot be replaced; name a folder inside it")
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self._place.name}.", dir=self._place.parent))

    def _replaceable(self) -> bool:
        if not self._place.is_dir():
            return False
        if not (self._place / MANIFEST).is_file():
            return not any(self._place.iterdir())
        if others := _strangers(self._place):
            raise OutputError(
                f"{self.destination}: holds {others[0]}, which is no part of the artifact and would be lost; move "
                "it away, or choose another output"
            )
        return True

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def replaces(self, source: str) -> str:
        """The source of the artifact that stands in the place, where it is another; empty otherwise."""
        try:
            before = Artifact(self._place).manifest.provenance.source
        except ArtifactError:
            return ""
        return before if before != source else ""

    def describe(self, path: str, format: str, precision: str, **fields: Any) -> ArtifactFile:  # noqa: A002
        """The manifest's entry of a file that now lies in :attr:`folder` (hash and size are read off it)."""
        file = self.folder / path
        companions = {name: sha256_file(self.folder / name) for name in fields.pop("companions", ())}
        return ArtifactFile(
            path, format, precision, sha256_file(file), file.stat().st_size, companions=companions, **fields
        )

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest and make the whole folder visible under its name.

        Raises:
            OutputError: The disk is full or the destination cannot be replaced.
        """
        with writing(self.destination):
            golden = self.folder / GOLDEN
            if golden.is_file():
                manifest = msgspec.structs.replace(manifest, golden_sha256=sha256_file(golden))
            text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
            (self.folder / MANIFEST).write_bytes(text + b"\n")
            for path in self.folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
            self.folder.chmod(0o755)
            self._swap()
        return Artifact(self.destination)

    def _swap(self) -> None:
        """Put the folder in its place: there is an artifact under that name at any moment, the old or the new."""
        if not self._place.exists():
            self.folder.rename(self._place)
            return
        if _exchange(self.folder, self._place):
            return  # the old one is removed on leaving
        old = Path(tempfile.mkdtemp(prefix=f".{self._place.name}.old.", dir=self.folder.parent))
        try:
            self._place.rename(old / "artifact")
            self.folder.rename(self._place)
        finally:
            if (old / "artifact").exists() and not self._place.exists():
                (old / "artifact").rename(self._place)
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step (Linux's renameat2); False where that does not exist."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
