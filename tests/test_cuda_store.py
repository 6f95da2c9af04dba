"""`_native.CudaLayer` under the emulated driver: its real launches, run by the host, against the store on the CPU.

Is: programs of appends, crops, gathers, copies and attention (cuda_store_cases.py), what is refused, that nothing waits
for the device, and that Rust and C++ agree on every parameter struct. Is not: about speed or real streams.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

import cuda_store_cases as cases
from cuda_kernel_driver import MOVING, build_driver, instances
from cuda_stand_ins import build_nvrtc, run
from skvq import _native

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "emu"))
import harness

pytestmark = [
    pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drivers are found through LD_LIBRARY_PATH"),
]


@pytest.fixture(scope="module")
def driver() -> Path:
    """The folder of a libcuda.so.1 with the kernels of all cases."""
    return build_driver(name for case in cases.CASES.values() for name in MOVING + instances(case))


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An NVRTC that compiles nothing and knows the names of the driver's kernels."""
    return build_nvrtc(tmp_path_factory.mktemp("nvrtc"), 12, 4, "-DEMULATED", "-ldl")


def run_code(code: str, driver: Path, nvrtc: str, *arguments: str, **environment: str) -> tuple[str, str]:
    code = f"import cuda_store_cases as cases, sys\nnvrtc, *rest = sys.argv[1:]\n{code}"
    return run(code, driver, [nvrtc, *arguments], SKVQ_CACHE_DIR="", **environment)


@pytest.mark.parametrize("name", cases.CASES)
def test_programs_leave_what_the_cpu_has(driver: Path, nvrtc: str, name: str) -> None:
    printed, _ = run_code("cases.main(nvrtc, rest[0])", driver, nvrtc, name)
    assert printed == "equal\n"


def test_splits_of_many_pages(driver: Path, nvrtc: str) -> None:
    for name in ("blocks", "long blocks"):
        printed, _ = run_code("cases.main(nvrtc, rest[0])", driver, nvrtc, name, FAKE_CUDA_MULTIPROCESSORS="1")
        assert printed == "equal\n"


MANY = """
import torch
pair = cases.Pair(cases.CASES["static"], nvrtc)
generator = torch.Generator().manual_seed(0)
pair.append(*pair.rows(generator, 140))
before = pair.cuda.nbytes
for layer in (pair.cpu, pair.cuda):
    layer.gather([0, 1] * 40)
assert pair.cuda.nbytes - before < 80 * 2 * 2 * 128 * 20 * 4
pair.append(*pair.rows(generator, 12))
pair.check(generator)
print("equal")
"""


def test_a_batch_of_many_copies(driver: Path, nvrtc: str) -> None:
    printed, _ = run_code(MANY, driver, nvrtc)
    assert printed == "equal\n"


FAILING = """
import torch
from skvq import SkvqError
for name in ("static", "parts", "blocks", "queried"):
    failed = 0
    for left in range(1, 30):
        pair = cases.Pair(cases.CASES[name], nvrtc)
        generator = torch.Generator().manual_seed(0)
        for count in (200, 150):
            rows = pair.rows(generator, count)
            if name == "queried":
                rows.append(pair.queries(generator, 2, 7))
            pair.cpu.append(*rows)
            pair.memory.left = left
            try:
                pair.cuda.append(*rows)
            except SkvqError as error:
                assert "no memory left" in str(error), error
                failed += 1
                pair.memory.left = -1
                pair.cuda.append(*rows)
            pair.memory.left = -1
        if left % 4 == 1:
            pair.check(generator)
    print(name, failed)
"""


def test_an_append_without_memory_changes_nothing(driver: Path, nvrtc: str) -> None:
    printed, _ = run_code(FAILING, driver, nvrtc)
    assert all(int(line.split()[1]) >= 10 for line in printed.splitlines()), printed
    assert len(printed.splitlines()) == 4


BROKEN = """
import torch
pair = cases.Pair(cases.CASES[rest[0]], nvrtc)
generator = torch.Generator().manual_seed(0)
keys, values = pair.rows(generator, 300)
keys[0, 1, 60, 3], values[0, 0, 250, 7], keys[0, 0, 295, 0] = torch.nan, torch.inf, torch.nan
pair.append(keys, values)
for side, options in (("keys", pair.case.keys), ("values", pair.case.values)):
    expected, found = torch.zeros(2, *keys.shape[:3], options["head_dim"], dtype=keys.dtype)
    getattr(pair.cpu, f"decode_{side}")(expected)
    getattr(pair.cuda, f"decode_{side}")(found)
    assert expected[0].isnan().any()
    assert torch.equal(expected.isnan(), found.isnan())
    assert float((expected - found).nan_to_num().float().abs().max()) < 0.1
pair.append(*(rows.nan_to_num(posinf=0.0) for rows in (keys, values)))
print(pair.cuda.nonfinite_rows())
"""


@pytest.mark.parametrize("name", ["static", "parts", "blocks"])
def test_rows_that_are_not_finite_are_kept_and_counted(driver: Path, nvrtc: str, name: str) -> None:
    printed, _ = run_code(BROKEN, driver, nvrtc, name)
    assert printed == "3\n"


STEPS = """
import torch
pair = cases.Pair(cases.CASES[rest[0]], nvrtc)
generator = torch.Generator().manual_seed(0)
print("made", file=sys.stderr, flush=True)
pair.append(*pair.rows(generator, 150))
for _ in range(3):
    pair.append(*pair.rows(generator, 1))
    pair.check_attention(generator, 1)
"""


@pytest.mark.parametrize("name", ["static", "parts", "blocks"])
def test_nothing_waits_for_the_device(driver: Path, nvrtc: str, name: str) -> None:
    _, seen = run_code(STEPS, driver, nvrtc, name, FAKE_CUDA_LOG="1")
    before, after = seen.split("made\n")
    assert "synchronize" in before
    assert "synchronize" not in after
    launches = [line for line in after.splitlines() if line.startswith("launch")]
    assert launches
    assert all(line.endswith("stream 0x3") for line in launches)
    assert len(launches) <= 60


REFUSALS = """
import torch
from skvq import SkvqError, _native
case = cases.CASES["static"]
memory = cases.Memory()
def layer(keys=case.keys, values=case.values, nonfinite="propagate", **more):
    arguments = dict(num_key_value_heads=2, sinks=3, window=20, dtype="float32") | more
    return _native.CudaLayer(
        keys=_native.Codec(**keys), values=_native.Codec(**values), nonfinite=nonfinite, nvrtc=nvrtc,
        allocate=memory.allocate, **{"stream": lambda: 3, "host_memory": True, **arguments}
    )
def tell(call):
    try:
        call()
    except SkvqError as error:
        print(error)
    else:
        print("nothing")
tell(lambda: layer(nonfinite="raise"))
from parts_examples import codec_options
tell(lambda: layer(codec_options(64, 1, heads=2), {"head_dim": 64, "format": "raw"}))
tell(lambda: layer(values={"head_dim": 64, "format": "2", "block": 128, "query_exponent": 0.5}))
made = layer()
rows = torch.zeros(2, 2, 30, 64)
tell(lambda: made.append(rows, rows[:, :, 1:]))
tell(lambda: made.append(rows.half(), rows))
tell(lambda: made.append(rows.mT.contiguous().mT, rows))
tell(lambda: layer(host_memory=False).append(rows, rows))
def attend(query, **more):
    made.attend(query, torch.empty_like(query), scale=1.0, **more)
tell(lambda: attend(rows[:, :, :1]))
made.append(rows, rows)
tell(lambda: attend(rows[:, :1, :1]))
tell(lambda: attend(rows[:, :, :1], fresh_keys=rows))
tell(lambda: attend(rows[:, :, :1], fresh_keys=rows, fresh_values=rows[:, :, 1:]))
tell(lambda: made.observe_queries(rows[:, :1, :1]))
tell(lambda: made.append(rows, rows, rows.repeat(1, 1, 2, 1)))
tell(lambda: made.crop(31))
tell(lambda: made.gather([2]))
rows[1, 0, 5, 7] = torch.nan
made.append(rows, rows)
print(made.nonfinite_rows(), made.length, made.nbytes > 0, repr(made)[:35])
"""


def test_what_is_refused_says_why(driver: Path, nvrtc: str) -> None:
    printed, _ = run_code(REFUSALS, driver, nvrtc)
    lines = printed.splitlines()
    expected = [
        'nonfinite "raise" on a GPU is not supported',
        "keys with noise beside raw values on a GPU is not supported",
        "values: expected query_exponent 0: queries meet keys only",
        "values: expected shape [2, …, 30, …] as keys have",
        "keys: expected dtype float32, found float16",
        "keys: expected channels that lie together",
        "keys: expected a tensor on cuda:0, found one on cpu",
        "attend: expected at least one token, found 0",
        "query: expected a multiple of 2 heads",
        "fresh_keys and fresh_values: expected both or neither",
        "fresh_values: expected shape [2, 2, 1..=30, 64]",
        "query: expected shape [2, a multiple of 2, 1 to 30 tokens, 64]",
        "query: expected shape [2, a multiple of 2, 1 to 30 tokens, 64]",
        "length: expected at most 30, found 31",
        "indices: expected rows of the batch, 0..2, found 2",
    ]
    for line, beginning in zip(lines, expected, strict=False):
        assert line.startswith(beginning), line
    assert lines[len(expected) :] == ["2 60 True CudaLayer(device=0, batch_size=2, n"]


def test_rust_and_cpp_agree_on_parameters(tmp_path: Path) -> None:
    structs = _native.testing.cuda_parameters()
    assert len(structs) >= 15
    numbers = [
        number
        for name, _, fields in structs
        for number in [f"sizeof(skvq::{name})", *(f"__builtin_offsetof(skvq::{name}, {field})" for field, _ in fields)]
    ]
    text = f'#include "params.cuh"\nextern "C" const long layouts[] = {{{", ".join(numbers)}}};\n'
    library = ctypes.CDLL(str(harness.build("layouts.so", {"layouts.cpp": text})))
    found = list((ctypes.c_long * len(numbers)).in_dll(library, "layouts"))
    assert found == [number for _, size, fields in structs for number in [size, *(offset for _, offset in fields)]]
    for name, _, fields in structs:
        assert [field for field, _ in fields] == [field for field, _ in harness.PARAMS[name]._fields_], name
