"""The DLPack exchange both ways: values, lifetimes, and what is refused rather than read or written wrongly."""

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from skvq import _native
from skvq._native import SkvqError, testing


class Without:
    """A tensor that offers only the `__dlpack__` of older libraries: no exchange table, no `max_version`."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers, exact in every dtype, all different enough for a sum to tell views apart."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 37 % 101 - 50).reshape(shape).to(dtype)


def refused(message: str) -> Any:
    return pytest.raises(SkvqError, match=message)


# ---- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_where_they_are(dtype: torch.dtype) -> None:
    tensor = numbers(2, 3, 4, 5, dtype=dtype)
    seen = testing.inspect(tensor)
    assert seen["pointer"] == tensor.data_ptr()
    assert seen["shape"] == [2, 3, 4, 5]
    assert seen["strides"] == [60, 20, 5, 1]
    assert seen["dtype"] == str(dtype).removeprefix("torch.")
    assert testing.sum_f64(tensor) == tensor.double().sum().item()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed heads": lambda t: t.transpose(1, 2),
    "transposed channels": lambda t: t.transpose(2, 3),
    "every other token": lambda t: t[:, :, 1::2],
    "every third channel": lambda t: t[..., 1::3],
    "one head, expanded": lambda t: t[:, :1].expand(-1, 3, -1, -1),
    "one channel": lambda t: t[..., 3:4],
    "an offset": lambda t: t[1:, 2:, 3:, 1:],
    "reversed by copy": lambda t: t.flip(2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views(view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    tensor = view(numbers(2, 3, 4, 8, dtype=dtype))
    assert testing.inspect(tensor)["pointer"] == tensor.data_ptr()
    assert testing.sum_f64(tensor) == tensor.double().sum().item()


def test_numpy_and_negative_strides() -> None:
    array = numbers(2, 3, 4, 6).numpy()
    for view in (array, array[:, :, ::-1], array[..., ::-2], array[::-1, ::-1, 1:, 1:]):
        assert testing.inspect(view)["pointer"] == view.ctypes.data
        assert testing.sum_f64(view) == view.sum()


def test_the_door_of_older_libraries() -> None:
    tensor = numbers(1, 2, 3, 4)
    seen = testing.inspect(Without(tensor))
    assert seen["pointer"] == tensor.data_ptr()
    assert not seen["versioned"]
    assert testing.sum_f64(Without(tensor)) == tensor.sum().item()


@pytest.mark.parametrize("view", [v for k, v in VIEWS.items() if "expanded" not in k])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writes_land_in_the_view_and_nowhere_else(
    view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    tensor, expected = torch.zeros(2, 3, 4, 8, dtype=dtype), torch.zeros(2, 3, 4, 8, dtype=dtype)
    target = view(tensor)
    testing.fill(target, 2.7)
    view(expected).fill_(2.7)
    assert torch.equal(target, torch.full_like(target, 2.7))
    if target.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    assert testing.sum_f64(torch.zeros(shape)) == 0
    assert testing.sum_f64(np.zeros(shape, np.float32)) == 0
    testing.fill(torch.zeros(shape), 1.0)


def test_masks() -> None:
    additive = numbers(2, 1, 3, 4, dtype=torch.bfloat16)
    assert testing.sum_mask(additive) == additive.double().sum().item()
    assert testing.sum_mask(additive.transpose(2, 3)) == additive.double().sum().item()
    visible = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    assert testing.sum_mask(visible) == 0
    visible[1, 0, 2, 3] = False
    assert testing.sum_mask(visible) == -np.inf
    with refused("mask: expected dtype bool, float32, float16 or bfloat16, found int64"):
        testing.sum_mask(visible.long())


# ---- what is refused


def lazily_negative() -> torch.Tensor:
    return numbers(1, 1, 2, 4).to(torch.complex64).mul(1j).conj().imag


def misaligned() -> np.ndarray:
    return np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float32).reshape(1, 1, 2, 4)


class Wrapper(torch.Tensor):
    """A tensor subclass without memory of its own."""

    @staticmethod
    def __new__(cls) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, (1, 1, 2, 4), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor without memory")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "negative bit": (lazily_negative, r"call \.resolve_neg\(\) first"),
    "conjugate bit": (lambda: torch.zeros(1, 1, 2, 4, dtype=torch.complex64).conj(), r"call \.resolve_conj\(\) first"),
    "requires grad": (lambda: torch.zeros(1, 1, 2, 4, requires_grad=True), r"call \.detach\(\) first"),
    "complex": (lambda: torch.zeros(1, 1, 2, 4, dtype=torch.complex64), "found complex64"),
    "float64": (lambda: torch.zeros(1, 1, 2, 4, dtype=torch.float64), "found float64"),
    "int8": (lambda: torch.zeros(1, 1, 2, 4, dtype=torch.int8), "found int8"),
    "float8": (
        lambda: torch.zeros(1, 1, 2, 4, dtype=torch.float8_e4m3fn),
        "found DLPack type code 10 of 8 bits|float8",
    ),
    "rank 3": (lambda: torch.zeros(1, 2, 4), r"expected shape \[batch, heads, tokens, channels\], found \[1, 2, 4\]"),
    "rank 0": (lambda: torch.tensor(1.0), r"found \[\]"),
    "meta": (lambda: torch.zeros(1, 1, 2, 4, device="meta"), "meta"),
    "sparse": (lambda: torch.zeros(1, 1, 2, 4).to_sparse(), "expected a CPU tensor that exports DLPack"),
    "no memory": (Wrapper, "null|without memory"),
    "byte order": (lambda: np.zeros((1, 1, 2, 4), ">f4"), "native byte order"),
    "misaligned": (misaligned, "expected memory aligned to 4 bytes"),
    "capsule": (lambda: torch.zeros(1, 1, 2, 4).__dlpack__(), "PyCapsule"),
    "list": (lambda: [[[[1.0]]]], "'list' object has no attribute '__dlpack__'"),
    "None": (lambda: None, "NoneType"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_for_reading_and_writing(make: Callable[[], Any], message: str) -> None:
    tensor = make()
    with refused(f"^tensor: .*({message})"):
        testing.sum_f64(tensor)
    with refused(f"^tensor: .*({message})"):
        testing.fill(tensor, 1.0)


def test_resolved_views_are_read() -> None:
    negative = lazily_negative()
    assert negative.is_neg()
    assert testing.sum_f64(negative.resolve_neg()) == negative.sum().item()


def test_read_only_tensors_are_read_but_not_written() -> None:
    array = np.ones((1, 1, 2, 4), np.float32)
    array.setflags(write=False)
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1):  # older numpy cannot export them at all
        assert testing.sum_f64(array) == 8
    with refused("^tensor: .*read-?only"):
        testing.fill(array, 2.0)
    assert (array == 1).all()


def test_overlapping_outputs_are_refused() -> None:
    base = torch.zeros(2, 3, 4, 8)
    for view in (base[:, :1].expand(-1, 3, -1, -1), base.as_strided((1, 1, 3, 8), (0, 0, 4, 1))):
        with refused("^tensor: expected memory in which every element is written once"):
            testing.fill(view, 1.0)
    assert not base.any()


def test_inputs_and_outputs_of_a_call_are_apart() -> None:
    base = torch.zeros(1, 1, 6, 8)
    output = base[:, :, :3]
    for other in (base[:, :, 3:], base[:, :, 3:].numpy()[:, :, ::-1], base[:, :, 1:1], torch.zeros(1, 1, 3, 8)):
        testing.fill(output, 1.0, other)
    for other in (base, base[:, :, 2:], base.numpy()[:, :, 2::-1], base.transpose(2, 3)):
        with refused("^tensor: expected memory apart from that of apart_from, found overlapping memory"):
            testing.fill(output, 2.0, other)
    assert (output == 1).all()


# ---- lifetimes


def test_references_are_given_back() -> None:
    tensor = numbers(1, 2, 3, 4)
    for owner in (tensor, tensor.numpy().copy(), Without(tensor)):
        before = sys.getrefcount(owner)
        for _ in range(10):
            testing.sum_f64(owner)
            testing.fill(owner, 1.0)
        gc.collect()
        assert sys.getrefcount(owner) == before


def test_references_are_given_back_after_a_refusal() -> None:
    for owner in (torch.zeros(1, 2, 3, 4, dtype=torch.float64), np.zeros((2, 3)), Without(torch.zeros(2))):
        before = sys.getrefcount(owner)
        for _ in range(10):
            with refused("^tensor: "):
                testing.sum_f64(owner)
        gc.collect()
        assert sys.getrefcount(owner) == before


def test_a_consumed_tensor_keeps_its_buffer_alive() -> None:
    gc.collect()
    base = testing.live_buffers()
    made = testing.make_tensor([2, 3], "float32", 1.5)
    tensor, array = torch.from_dlpack(made), np.asarray(made)
    assert testing.live_buffers() == base + 1
    del made
    gc.collect()
    assert testing.live_buffers() == base + 1
    tensor.fill_(3.0)
    assert (array == 3.0).all()  # the same memory
    del tensor
    gc.collect()
    assert testing.live_buffers() == base + 1
    del array
    gc.collect()
    assert testing.live_buffers() == base


@pytest.mark.parametrize("version", [None, (1, 0), (1, 3), (9, 9)])
def test_an_unused_capsule_frees_its_buffer(version: tuple[int, int] | None) -> None:
    base = testing.live_buffers()
    capsule = testing.make_tensor([5], "float16", 0.0).__dlpack__(max_version=version)
    assert ("dltensor_versioned" in repr(capsule)) == (version is not None)
    assert testing.live_buffers() == base + 1
    del capsule
    assert testing.live_buffers() == base


def test_made_tensors() -> None:
    made = testing.make_tensor([3, 4], "bfloat16", -0.5)
    assert made.shape == (3, 4)
    assert made.__dlpack_device__() == (1, 0)
    tensor = torch.from_dlpack(made)
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, torch.full((3, 4), -0.5, dtype=torch.bfloat16))
    assert tensor.data_ptr() % 64 == 0
    assert testing.sum_f64(testing.make_tensor([1, 1, 3, 4], "bfloat16", -0.5)) == -6.0  # out and in again
    assert torch.from_dlpack(testing.make_tensor([0, 4], "float32", 1.0)).shape == (0, 4)
    assert torch.from_dlpack(testing.make_tensor([], "float32", 2.0)).item() == 2.0
    with pytest.raises(BufferError):
        made.__dlpack__(max_version=(1, 3), copy=True)


def test_as_numpy_array() -> None:
    made = testing.make_tensor([2, 2], "float32", 2.0)
    view = np.asarray(made)
    view[0, 0] = 7.0
    assert np.asarray(made)[0, 0] == 7.0
    assert np.asarray(made, dtype=np.float64).dtype == np.float64
    copy = np.array(made, copy=True)
    copy[0, 0] = 8.0
    assert np.asarray(made)[0, 0] == 7.0


def test_a_foreign_thread_may_drop_an_import() -> None:
    tensor, array = numbers(1, 2, 3, 4), numbers(1, 2, 3, 4).numpy().copy()
    base, before = testing.live_buffers(), (sys.getrefcount(tensor), sys.getrefcount(array))
    for _ in range(200):
        testing.drop_elsewhere(tensor)
        testing.drop_elsewhere(array)
        testing.drop_elsewhere(testing.make_tensor([1, 1, 1, 1], "float32", 0.0))
    assert (sys.getrefcount(tensor), sys.getrefcount(array)) == before
    assert testing.live_buffers() == base


def test_no_leak() -> None:
    process = psutil.Process()
    big = numbers(1, 2, 64, 64)

    def loop(rounds: int) -> None:
        for _ in range(rounds):
            made = testing.make_tensor([1, 1, 256, 64], "float32", 1.0)
            testing.sum_f64(torch.from_dlpack(made))
            testing.fill(np.asarray(made), 2.0)
            made.__dlpack__()
            testing.sum_f64(Without(big[:, :, :2]))
            for wrong in (big.double()[:, :, :1], torch.zeros(3)):
                with pytest.raises(SkvqError):
                    testing.sum_f64(wrong)

    base = testing.live_buffers()
    loop(300)
    gc.collect()
    before = process.memory_info().rss
    loop(3000)  # a leak of one buffer a round would be 190 MiB, of one handle a round about 1 MiB
    gc.collect()
    assert testing.live_buffers() == base
    assert process.memory_info().rss - before < 8 * 2**20


def steps_during(call: Callable[[], object]) -> int:
    """How often another thread of Python comes to its turn meanwhile."""
    started, steps = threading.Event(), [0]
    stop = threading.Event()

    def count() -> None:
        started.set()
        while not stop.is_set():
            steps[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    before = steps[0]
    call()
    during = steps[0] - before
    stop.set()
    thread.join()
    return during


def test_the_interpreter_is_released() -> None:
    tensor = torch.ones(1, 1, 200_000, 128)
    assert steps_during(lambda: testing.sum_f64(tensor)) > 10


def test_the_interpreter_is_released_while_a_layer_packs_and_attends() -> None:
    codec = {"codebook": "lloyd-max", "rule": "norm", "head_dim": 128}
    layer = _native.Layer(
        num_key_value_heads=2,
        keys=_native.Codec(format="2", **codec),
        values=_native.Codec(format="1.6", **codec),
        sinks=5,
        window=128,
        dtype="float32",
    )
    rows, query = torch.randn(1, 2, 50_000, 128), torch.randn(1, 8, 64, 128)
    output = torch.empty_like(query)
    assert steps_during(lambda: layer.append(rows, rows)) > 10
    assert steps_during(lambda: layer.attend(query, output, scale=0.1, causal=True)) > 10


def test_threads_import_the_same_tensor() -> None:
    tensor = numbers(2, 2, 64, 32)
    expected, before = tensor.sum().item(), sys.getrefcount(tensor)
    sums: list[float] = []
    threads = [
        threading.Thread(target=lambda: sums.extend(testing.sum_f64(tensor) for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [expected] * 200
    assert sys.getrefcount(tensor) <= before + len(threads)  # the closures may not be collected yet
    del threads, thread
    gc.collect()
    assert sys.getrefcount(tensor) == before
