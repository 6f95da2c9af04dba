"""On a real GPU: kernels run in torch's context, on its streams, on its memory, and under graph capture.

Is: what only a device can show of loading and launching. Is not: what kernels compute, beyond a round trip.
"""

import struct
from pathlib import Path

import pytest
import torch

from skvq import _native
from skvq.cuda_runtime import find_nvrtc

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and torch built for CUDA")

LAYOUT = "skvq::Layout<skvq::keys, 128, 2, 128, 1, 1>"
ROWS, CODE_BYTES, NUMBER_BYTES, PAGE_BYTES = 150, 32, 1, 4224


class RoundTrip:
    """Random rows to pages and back, as two launches on torch's current stream."""

    def __init__(self, device: torch.device, cache: Path) -> None:
        self.device, self.cache, self.nvrtc = device, cache, find_nvrtc()
        self.rows = [self.random(CODE_BYTES), self.random(NUMBER_BYTES)]
        self.back = [torch.zeros_like(rows) for rows in self.rows]
        self.pages = torch.zeros(2, PAGE_BYTES, dtype=torch.uint8, device=device)
        self.table = torch.tensor([page.data_ptr() for page in self.pages], device=device)

    def random(self, width: int) -> torch.Tensor:
        return torch.randint(0, 256, (ROWS, width), dtype=torch.uint8, device=self.device)

    def launch(self) -> None:
        for kernel, rows in (("rows_to_page", self.rows), ("page_to_rows", self.back)):
            addresses = [tensor.data_ptr() for tensor in (*rows, self.table)]
            _native.testing.cuda_launch(
                self.nvrtc,
                ("repack.cuh", f"skvq::{kernel}", [LAYOUT]),
                struct.pack("<QQQii", *addresses, ROWS, 0),
                device=self.device.index,
                grid=(10, 1, 1),
                block=(128, 1, 1),
                shared_bytes=0,
                stream=torch.cuda.current_stream(self.device).cuda_stream,
                cache=self.cache,
            )

    def check(self) -> None:
        torch.cuda.synchronize(self.device)
        for rows, back in zip(self.rows, self.back, strict=True):
            assert torch.equal(rows, back)


@pytest.fixture(params=range(torch.cuda.device_count()), ids=lambda index: f"cuda:{index}")
def round_trip(request: pytest.FixtureRequest, tmp_path: Path) -> RoundTrip:
    return RoundTrip(torch.device("cuda", request.param), tmp_path)


def test_devices_are_those_of_torch() -> None:
    status = _native.cuda_status()
    assert status["usable"]
    for index, device in enumerate(status["devices"]):
        properties = torch.cuda.get_device_properties(index)
        assert device["name"] == properties.name
        assert device["multiprocessors"] == properties.multi_processor_count
        assert device["arch"].rstrip("a") == f"sm_{properties.major}{properties.minor}"


def test_on_torchs_current_stream(round_trip: RoundTrip) -> None:
    current = torch.cuda.current_device()
    round_trip.launch()
    round_trip.check()
    assert torch.cuda.current_device() == current


def test_on_another_stream_in_its_order(round_trip: RoundTrip) -> None:
    stream = torch.cuda.Stream(round_trip.device)
    stream.wait_stream(torch.cuda.current_stream(round_trip.device))
    with torch.cuda.stream(stream):
        for rows in round_trip.rows:
            torch.cuda._sleep(10_000_000)
            rows.random_(0, 256)
        round_trip.launch()
    round_trip.check()


def test_in_a_captured_graph(round_trip: RoundTrip) -> None:
    round_trip.launch()  # loads the kernels, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(round_trip.device), torch.cuda.graph(graph):
        round_trip.launch()
    for rows in round_trip.rows:
        rows.copy_(round_trip.random(rows.shape[1]))
    graph.replay()
    round_trip.check()
