"""Outputs where the engine left them, lent out by DLPack without a copy and without torch.

DLPack's C structures, version 0.x (the capsule named "dltensor", which every consumer takes):
https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any, NamedTuple

import numpy as np

from ganexport.errors import UsageError
from ganexport.runtime.base import Array

CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
_NAME = b"dltensor"
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Dtype(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


#: What a consumer holds, by a number of its own, until it says that it is done.
_held: dict[int, Any] = {}
_numbers = itertools.count(1)


@ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
def _release(managed: Any) -> None:
    _held.pop(managed.contents.context, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _forget(capsule: int) -> None:
    """A capsule that nobody consumed: its name is still the first one."""
    if _is_valid(capsule, _NAME):
        _release(ctypes.cast(_pointer(capsule, _NAME), ctypes.POINTER(_Managed)))


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Place(NamedTuple):
    """Where an output lies.

    Attributes:
        address: Of the first element; contiguous in row-major order.
        shape: Its sizes.
        dtype: "float32", "bfloat16", …
        device: (:data:`CPU` or :data:`CUDA`, number).
        owner: Kept alive with it.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    owner: Any = None


def place(array: Array) -> Place:
    """Of a host array."""
    array = np.ascontiguousarray(array)
    return Place(array.ctypes.data, array.shape, str(array.dtype), (CPU, 0), array)


class Borrowed:
    """One output of an engine, in the engine's own memory: for ``torch.from_dlpack``, ``numpy.from_dlpack`` and others.

    Valid inside the ``with`` block that lent it, and only there.

    Attributes:
        shape: Its sizes.
        dtype: "float32", …
        device: "cpu" or "cuda:0".
    """

    def __init__(self, where: Place) -> None:
        self._where: Place | None = where
        self.shape, self.dtype = where.shape, where.dtype
        kind, index = where.device
        self.device = "cpu" if kind == CPU else f"cuda:{index}"

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kind, number), as DLPack counts them."""
        return self._place().device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule. The engine was waited for, so that any stream may read at once.

        Raises:
            BufferError: A copy, or another device, is asked for.
            UsageError: The block that lent it has ended.
        """
        del stream, max_version  # the oldest capsule is the one that every version takes
        where = self._place()
        if copy or dl_device not in (None, where.device):
            raise BufferError("this output is lent where it lies and not copied: copy it after from_dlpack")
        sizes = (ctypes.c_int64 * len(where.shape))(*where.shape)
        managed = _Managed()
        tensor = managed.tensor
        tensor.data, tensor.device, tensor.ndim = where.address, _Device(*where.device), len(where.shape)
        name = where.dtype.rstrip("0123456789")
        bits = 8 if name == "bool" else int(where.dtype[len(name) :])
        tensor.dtype = _Dtype(_CODES[name], bits, 1)
        tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
        managed.context = next(_numbers)
        managed.deleter = ctypes.cast(_release, ctypes.c_void_p)
        _held[managed.context] = (managed, sizes, where.owner)
        return _new(ctypes.addressof(managed), _NAME, ctypes.cast(_forget, ctypes.c_void_p))

    def _place(self) -> Place:
        if self._where is None:
            raise UsageError("this output was lent until the end of its with block, which has ended: copy it inside")
        return self._where

    def end(self) -> None:
        """Nothing may ask for it any more."""
        self._where = None
