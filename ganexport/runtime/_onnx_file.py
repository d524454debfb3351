"""The few facts about an ONNX file that no runtime tells, read off its protobuf encoding without the onnx package.

Only what is needed is decoded: the metadata, and which operator makes each output. Field numbers
are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ganexport.errors import ArtifactError

#: Operators that move values about without changing them.
_PASS_THROUGH = ("Identity", "Reshape", "Transpose", "DepthToSpace", "Squeeze", "Unsqueeze", "Flatten", "Cast")

_Field = tuple[int, memoryview | int]
_Read = TypeVar("_Read")


def metadata_and_producers(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The metadata of an ONNX file, and the operator that makes the values of each graph output.

    Raises:
        ArtifactError: Not a protobuf file.
    """
    return _mapped(path, _read_model)


def _mapped(path: Path, read: Callable[[memoryview], _Read]) -> _Read:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                return read(view)
            finally:
                view.release()
    except (ValueError, IndexError, OverflowError, BufferError) as error:
        raise ArtifactError(f"{path}: not an ONNX file ({error})") from None
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None


def external_files(path: Path) -> list[str]:
    """Names of the files, beside an ONNX file, that hold weights of it.

    Raises:
        ArtifactError: Not a protobuf file.
    """
    names = _mapped(path, _external_files)
    if any("\0" in name for name in names):
        raise ArtifactError(f"{path}: not an ONNX file (a file name with a zero byte)")
    return names


def _external_files(view: memoryview) -> list[str]:
    names: dict[str, None] = {}
    graphs = (value for number, value in _fields(view) if number == 7)
    tensors = (t for graph in graphs for number, t in _fields(_message(graph)) if number == 5)
    for tensor in tensors:
        entries = (value for number, value in _fields(_message(tensor)) if number == 13)
        for entry in entries:
            pair = {number: _text(_message(content)) for number, content in _fields(_message(entry))}
            if pair.get(1) == "location":
                names[pair.get(2, "")] = None
    return list(names)


def _message(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number in place of a message")
    return value


def _read_model(view: memoryview) -> tuple[dict[str, str], dict[str, str]]:
    metadata: dict[str, str] = {}
    producers: dict[str, str] = {}
    for number, value in _fields(view):
        if number == 14 and isinstance(value, memoryview):  # metadata_props
            entry = {field: _text(content) for field, content in _fields(value) if isinstance(content, memoryview)}
            metadata[entry.get(1, "")] = entry.get(2, "")
        elif number == 7 and isinstance(value, memoryview):  # graph
            producers = _output_producers(value)
    return metadata, producers


def _output_producers(graph: memoryview) -> dict[str, str]:
    made_by: dict[str, tuple[str, str]] = {}  # value → (operator, its first input)
    outputs: list[str] = []
    for number, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == 1:  # node
            inputs: list[str] = []
            results: list[str] = []
            operator = ""
            for field, content in _fields(value):
                if field in (1, 2, 4) and isinstance(content, memoryview):
                    text = _text(content)
                    if field == 4:
                        operator = text
                    else:
                        (inputs if field == 1 else results).append(text)
            for result in results:
                made_by[result] = (operator, inputs[0] if inputs else "")
        elif number == 12:  # output
            outputs += [_text(c) for field, c in _fields(value) if field == 1 and isinstance(c, memoryview)]
    return {name: _follow(name, made_by) for name in outputs}


def _follow(name: str, made_by: dict[str, tuple[str, str]]) -> str:
    for _ in range(len(made_by) + 1):
        operator, source = made_by.get(name, ("", ""))
        if operator not in _PASS_THROUGH:
            return operator
        name = source
    return ""


def _fields(view: memoryview) -> Iterator[_Field]:
    """(field number, content) of a protobuf message, in order."""
    position, end = 0, len(view)
    while position < end:
        key, position = _varint(view, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(view, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(view, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if size > end - position:
            raise ValueError("a field is longer than the file")
        yield number, view[position : position + size]
        position += size


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is too long")


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8", "replace")
