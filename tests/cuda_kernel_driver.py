"""A libcuda.so.1 that runs the kernels of a store in the emulator, and which kernels those are.

Is: what tests of `CudaLayer` and of the cache on it link. Is not: a list that the store reads; a kernel that is missing
here is an error of the emulated driver there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import cuda_store_cases as cases
from skvq.reference import ReferenceCodec

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness

HEADERS = [
    "rows.cuh",
    "append.cuh",
    "append_block.cuh",
    "encode.cuh",
    "decode.cuh",
    "statistics.cuh",
    "queries.cuh",
    "noise.cuh",
    "attend.cuh",
    "attend_many.cuh",
    "attend_once.cuh",
    "attend_rows.cuh",
    "merge.cuh",
    "plain.cuh",
    "reach.cuh",
    "turning.cuh",
    "unpack.cuh",
]


def instances(case: cases.Case) -> list[str]:
    """The kernels that a layer of a case asks for."""
    element, names = harness.DTYPES[cases.DTYPES[case.dtype]], []
    width_k, width_v = case.keys["head_dim"], case.values["head_dim"]
    packed = []
    for side, options in (("keys", case.keys), ("values", case.values)):
        if options["format"] != "raw":
            packed.append(harness.PageFormat.of(side, ReferenceCodec(**options)).expression)
            names += [f"encode<{element}, {packed[-1]}>", f"decode<{element}, {packed[-1]}>"]
        if options.get("block"):
            names.append(f"block_statistics<{element}, {options['head_dim']}>")
    if case.keys["format"] != "raw":
        names.append(f"scale_squares<{packed[0]}>")
    if "query_exponent" in case.keys:
        names += [f"query_squares<{element}, {width_k}>", f"query_factors<{width_k}>"]
    if len(packed) == 2:
        takes_many = case.many and max(width_k, width_v) <= 192
        lengths = (1, 2, 3) if takes_many or not case.many else (1, 2, 3, -(-case.many // case.group))
        tiles = sorted({min(2, -(-case.group * length // 8)) for length in lengths})
        names += [f"append_row<{element}, {', '.join(packed)}>", f"fold<{element}, {packed[0]}>"]
        names += [*(f"attend<{', '.join(packed)}, {count}>" for count in tiles)]
        if case.keys.get("block") or case.values.get("block"):
            names.append(f"append_block<{element}, {', '.join(packed)}>")
            names += [*(f"attend_apart<{', '.join(packed)}, {count}>" for count in tiles)]
        names += [f"attend_once<{element}, {', '.join(packed)}>"] if 1 in tiles else []
        names += [f"attend_many<{', '.join(packed)}>"] if takes_many else []
        names.append(f"unfold<{width_v}>")
        if "shift_sine" in case.keys:
            names.append(f"turning<{element}, {width_k}>")
            names += [f"fold_turned<{element}, {width_k}>"] if takes_many and width_k <= 128 else []
    if case.many and case.dtype != "float32":
        names += [f"unpack<{element}, {rows}>" for rows in packed]
        names += [f"attend_rows<{element}, {width_k}, {width_v}>", "mask_reach<skvq::i32>"]
    return [
        f"skvq::{name}" for name in [*names, f"plain<{element}, {width_k}, {width_v}>", f"merge<{element}, {width_v}>"]
    ]


MOVING = [f"skvq::copy_rows<skvq::{word}>" for word in ("u16", "u32", "U32x4")]
MOVING += [
    "skvq::clear_rows<skvq::u16>",
    "skvq::advance<skvq::i32>",
    "skvq::mask_shows<skvq::i32>",
    *(f"skvq::poke<skvq::{words}>" for words in ("FewWords", "ManyWords")),
]


def build_driver(names: Iterable[str]) -> Path:
    """Its folder, for LD_LIBRARY_PATH. Skips the test with a torch whose own CUDA library would use the driver too."""
    if torch.version.cuda is not None and not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        # There `__dlpack_device__` asks whether memory is pinned, and CUDA's runtime finds functions missing.
        pytest.skip(f"torch {torch.__version__} would call the stand-in of libcuda through CUDA's runtime")
    wanted = list(dict.fromkeys(names))
    units = {f"unit{index}.cpp": harness.unit_of(wanted[index::4], HEADERS) for index in range(4)}
    units["driver.cpp"] = '#define EMULATED_INSTANCES "registry.hpp"\n#include "emu/fake_cuda.cpp"\n'
    units["entry.cpp"] = '#include "emu/entry.cpp"\n'
    library: Path = harness.build("libcuda.so.1", units, link=("-shared", "-Wl,-soname,libcuda.so.1"))
    return library.parent
