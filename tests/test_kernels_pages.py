"""Pages of the device: every format's rows go in and come out unchanged, and fragments have the levels of their codes.

The kernels run in the host emulator; the oracle is skvq.reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from parts_examples import PARTS
from skvq.reference import ReferenceCodec
from skvq.reference_codes import EVEN_STEPS

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness
from harness import PageFormat

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler")

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
EXTRA = {
    "2": {"group_size": 32, "symmetric": False, "metadata": "fp16"},
    "1.6": {"group_size": 64, "metadata": "fp16"},
    "1.5": {"group_size": 32},
}


def codecs() -> list[ReferenceCodec]:
    """Formats whose bytes depend on the head size at every one of them, more groups and numbers at some."""
    made = []
    for head_dim in HEAD_DIMS:
        for name in ("2", "1.6", "1.5", "3", "4", "8") if head_dim in (64, 80) else ("1.6", "1.5", "3"):
            extra = EXTRA.get(name, {}) if head_dim in (64, 128) else {}
            made.append(ReferenceCodec(head_dim=head_dim, format=name, **extra))
        for parts in PARTS[head_dim][: 2 if head_dim == 128 else 1]:
            matrix = torch.eye(head_dim)[None]
            made.append(ReferenceCodec(head_dim=head_dim, format="parts", parts=parts, matrix=matrix, inverse=matrix))
    return made


CASES = [(stream, codec) for index, codec in enumerate(codecs()) for stream in (("keys", "values")[index % 2],)]
CASES += [(stream, ReferenceCodec(head_dim=128, format=name)) for stream in ("keys", "values") for name in ("2", "4")]


def even(head_dim: int, parts: tuple[tuple[int, int], ...]) -> ReferenceCodec:
    matrix = torch.eye(head_dim)[None]
    static = {"matrix": matrix, "inverse": matrix}
    return ReferenceCodec(head_dim=head_dim, format="parts", parts=parts, codebook="uniform", **static)


# Evenly spaced levels have an order of their own, with every number of places in the last word.
EVEN = [even(head_dim, parts) for head_dim, lists in PARTS.items() for parts in lists]
CASES += [
    (stream, codec)
    for codec in (*EVEN, even(128, ((5, 32), (2, 32), (1, 32), (0, 32))))
    for stream in ("keys", "values")
]
CASES += [("values", ReferenceCodec(head_dim=head_dim, format="2")) for head_dim in (*HEAD_DIMS, 48)]
KERNEL_NAMES = ("rows_to_page", "page_to_rows", "fragments_to_rows", "sizes_of_layout")


@pytest.fixture(scope="module")
def kernels() -> harness.Kernels:
    formats = [PageFormat.of(stream, codec).expression for stream, codec in CASES]
    instances = [f"skvq::{kernel}<{layout}>" for layout in formats for kernel in KERNEL_NAMES]
    return harness.Kernels([*instances, "skvq::widened_e4m3<32>"], ["repack.cuh", "emu/fragments.cuh"], ("-O0",))


def random_rows(codec: ReferenceCodec, count: int) -> torch.Tensor:
    """Packed rows with every code and random numbers."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, codec.head_dim, generator=generator) * torch.rand(count, 1, generator=generator)
    return codec.encode(rows)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_rows_go_in_and_come_out(kernels: harness.Kernels, case: int) -> None:
    stream, codec = CASES[case]
    page_format, count = PageFormat.of(stream, codec), 150
    packed = random_rows(codec, count)
    pages, table = harness.repack(kernels, page_format, packed, codec.code_bytes)
    found = harness.unpack(kernels, page_format, table, count, codec.code_bytes, codec.row_bytes)
    assert torch.equal(found, packed)

    sizes = torch.zeros(5, dtype=torch.int32)
    name = page_format.expression
    kernels.launch(f"skvq::sizes_of_layout<{name}>", (1,), 32, harness.params("SizesParams", sizes=sizes))
    expected = [page_format.page_bytes, page_format.lane_bytes]
    assert sizes.tolist()[:2] == expected
    assert sizes.tolist()[3:] == [codec.code_bytes, codec.metadata_bytes]
    padded = {"1.6": (64, 112, 192), "1.5": (80, 112)}.get(codec.format, ())
    slack = page_format.page_bytes - 128 * codec.row_bytes
    assert slack == (128 if codec.head_dim in padded else 0)

    channels = codec.coder.coded(torch.zeros(codec.head_dim)).numel()
    levels = torch.zeros(160, channels, dtype=torch.float16)
    arguments = harness.params("FragmentParams", pages=table, levels=levels, table=harness.level_table(codec))
    kernels.launch(f"skvq::fragments_to_rows<{name}>", (-(-count // 16),), 32, arguments)
    codes = codec.coder.unpack(packed[:, : codec.code_bytes], codec.head_dim)
    if codec.format == "1.5":
        codes = codes.unflatten(-1, (-1, codec.group_size // 2))
    exact = codec.coder.values(codes)
    exact = exact.flatten(1)[:, : levels.shape[1]]
    if page_format.even and page_format.parts:
        bits = torch.tensor([bits for bits, width in page_format.parts if bits for _ in range(width)])
        steps = torch.tensor([EVEN_STEPS[2**x] for x in bits.tolist()])
        # Of keys in units of a part's step, which queries have; of values each is rounded before the product.
        exact = (codes - (2**bits - 1) / 2) * (1 if stream == "keys" else steps.to(torch.float16))
    assert torch.equal(levels[:count], exact.to(torch.float16))
    assert pages.shape[-1] >= page_format.page_bytes


def test_all_e4m3_numbers_are_widened(kernels: harness.Kernels) -> None:
    found = torch.zeros(256)
    kernels.launch("skvq::widened_e4m3<32>", (1,), 32, harness.params("WidenedParams", numbers=found))
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(), exact.nan_to_num())
