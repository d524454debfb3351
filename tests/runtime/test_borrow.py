"""Outputs lent by DLPack: no copy, the right numbers to NumPy and torch, an end that is enforced."""

from __future__ import annotations

import ctypes
import gc
import threading

import numpy as np
import pytest

import ganexport
from ganexport.errors import UsageError
from ganexport.runtime import _dlpack
from ganexport.runtime._dlpack import CUDA, Borrowed, Place

BACKENDS = ["onnxruntime", "openvino"]


@pytest.fixture(params=BACKENDS)
def generator(artifact, request):
    with ganexport.load(artifact.path, request.param, settings={"threads": 1}) as loaded:
        yield loaded


def test_numpy_and_torch_read_them_where_they_lie(generator):
    torch = pytest.importorskip("torch")
    feeds = ganexport.latents(generator.spec, 3, 0, 5)
    wanted = generator.run(feeds)["image"]
    held = len(_dlpack._held)
    with generator.borrow(feeds) as lent:
        image = lent["image"]
        assert (image.shape, image.dtype, image.device) == (wanted.shape, "float32", "cpu")
        array, tensor = np.from_dlpack(image), torch.from_dlpack(image)
        np.testing.assert_array_equal(array, wanted)
        np.testing.assert_array_equal(tensor.numpy(), wanted)
        assert array.ctypes.data == tensor.data_ptr() == image._where.address
        assert len(_dlpack._held) == held + 2
        del array, tensor
    gc.collect()
    assert len(_dlpack._held) == held  # both consumers gave back


def test_openvino_lends_the_memory_that_its_next_run_writes(artifact):
    with ganexport.load(artifact.path, "openvino", settings={"threads": 1}) as generator:
        addresses = []
        for seed in (1, 2):
            with generator.borrow(ganexport.latents(generator.spec, seed, 0, 4)) as lent:
                addresses.append(np.from_dlpack(lent["image"]).ctypes.data)
        assert addresses[0] == addresses[1]


def test_after_the_block_nothing_is_lent(generator):
    with generator.borrow(ganexport.latents(generator.spec, 3)) as lent:
        image = lent["image"]
    for use in (image.__dlpack__, image.__dlpack_device__):
        with pytest.raises(UsageError, match="with block, which has ended"):
            use()


def test_what_would_need_a_copy_is_refused(generator):
    with generator.borrow(ganexport.latents(generator.spec, 3)) as lent:
        for wish in ({"copy": True}, {"dl_device": (CUDA, 0)}):
            with pytest.raises(BufferError, match="not copied"):
                lent["image"].__dlpack__(**wish)
        assert np.from_dlpack(lent["image"], copy=False).shape == (1, 3, 8, 8)


def test_bad_feeds_and_a_closed_generator_are_refused(generator):
    with pytest.raises(UsageError, match="NaN"), generator.borrow({"z": np.full((1, 16), np.nan, np.float32)}):
        pass
    generator.close()
    with pytest.raises(UsageError, match="closed"), generator.borrow(ganexport.latents(generator.spec, 3)):
        pass


def test_an_error_in_the_block_gives_the_runner_back(generator):
    feeds = ganexport.latents(generator.spec, 3)
    with pytest.raises(KeyError), generator.borrow(feeds) as lent:
        lent["nothing"]
    assert generator.run(feeds)["image"].shape == (1, 3, 8, 8)
    with generator.borrow(feeds) as lent:
        assert set(lent) == {"image"}


def test_threads_that_borrow_wait_for_each_other(generator):
    def work(seed: int) -> None:
        feeds = ganexport.latents(generator.spec, seed, 0, 3)
        for _ in range(20):
            with generator.borrow(feeds) as lent:
                made[seed].append(np.array(np.from_dlpack(lent["image"])))

    made: dict[int, list[np.ndarray]] = {seed: [] for seed in range(6)}
    threads = [threading.Thread(target=work, args=(seed,)) for seed in made]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for seed, arrays in made.items():
        wanted = generator.run(ganexport.latents(generator.spec, seed, 0, 3))["image"]
        assert len(arrays) == 20
        assert all(np.array_equal(array, wanted) for array in arrays)


def test_a_capsule_that_nobody_takes_lets_go(generator):
    held = len(_dlpack._held)
    with generator.borrow(ganexport.latents(generator.spec, 3)) as lent:
        capsule = lent["image"].__dlpack__()
        assert len(_dlpack._held) == held + 1
        del capsule
        assert len(_dlpack._held) == held


@pytest.mark.parametrize(
    ("dtype", "code", "bits"),
    [("float16", 2, 16), ("bfloat16", 4, 16), ("uint8", 1, 8), ("int64", 0, 64), ("bool", 6, 8)],
)
def test_the_structure_says_what_lies_on_a_gpu(dtype: str, code: int, bits: int):
    capsule = Borrowed(Place(0x7F00_0000_1000, (2, 3, 5), dtype, (CUDA, 1))).__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_dlpack._Managed)).contents.tensor
    assert (tensor.data, tensor.ndim, tensor.shape[:3], tensor.byte_offset) == (0x7F00_0000_1000, 3, [2, 3, 5], 0)
    assert (tensor.device.kind, tensor.device.index) == (2, 1)
    assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (code, bits, 1)
    assert not tensor.strides  # null: contiguous


def test_a_torch_module_lends_its_own_result():
    torch = pytest.importorskip("torch")
    from ganexport.runtime._torch import in_memory_runner
    from ganexport.spec import parse_input

    kept = torch.arange(32.0).reshape(2, 16)
    spec = ganexport.spec.GeneratorSpec(
        (parse_input("z=normal[batch,16]"),),
        (ganexport.spec.TensorSpec("out", "float32", ("batch", 16)),),
        (ganexport.spec.Dim("batch", 1, 2, 8),),
    )
    runner = in_memory_runner(torch, lambda z: kept[: len(z)], spec, "cpu", "eager")
    feeds = {"z": np.zeros((2, 16), np.float32)}
    with runner.borrow(feeds) as lent:
        assert torch.from_dlpack(lent["out"]).data_ptr() == kept.data_ptr()
    runner.run(feeds)["out"][:] = -1  # what run returns belongs to the caller
    assert kept.min() == 0
