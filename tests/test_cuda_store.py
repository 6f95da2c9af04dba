"""`_native.CudaLayer` under the emulated driver: its real launches, run by the host, against the store on the CPU.

Is: programs of appends, crops, gathers, copies and attention (cuda_store_cases.py), what is refused, that nothing waits
for the device, and that Rust and C++ agree on every parameter struct. Is not: about speed or real streams.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import Counter
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
    every = (cases.CASES | cases.REPLAYED).values()
    return build_driver(name for case in every for name in MOVING + instances(case))


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


REPLAYED = ["static", "parts", "padded", "other formats, two tiles", "no sinks, window of one"]
REPLAYED += ["blocks", "padded blocks", "queried, padded", "queried, alone", *cases.REPLAYED]


@pytest.mark.parametrize("name", REPLAYED)
def test_a_captured_step_of_launches_apart_is_replayed(driver: Path, nvrtc: str, name: str) -> None:
    printed, _ = run_code("cases.main_replay(nvrtc, rest[0])", driver, nvrtc, name, SKVQ_ONE_LAUNCH="0")
    assert printed == "equal\n"


@pytest.mark.parametrize("name", ["static", "parts", "blocks", "queried"])
def test_a_captured_step_of_one_launch_is_replayed(driver: Path, nvrtc: str, name: str) -> None:
    printed, seen = run_code("cases.main_replay(nvrtc, rest[0])", driver, nvrtc, name, FAKE_CUDA_LOG="1")
    assert printed == "equal\n"
    assert "4skvq11attend_once" in seen


def test_many_queries_have_a_kernel_of_their_own(driver: Path, nvrtc: str) -> None:
    _, seen = run_code(FEW_AND_MANY, driver, nvrtc, FAKE_CUDA_LOG="1")
    few, many = seen.split("few\n")[1].split("many\n")
    assert "attend_many" not in few
    assert many.count("attend_many") == 1
    assert "grid 1,4,2 block 256" in next(line for line in many.splitlines() if "attend_many" in line)


FEW_AND_MANY = """
import torch
pair = cases.Pair(cases.CASES["many queries"], nvrtc)
generator = torch.Generator().manual_seed(0)
pair.append(*pair.rows(generator, 120))
print("few", file=sys.stderr, flush=True)
pair.check_attention(generator, 1)
print("many", file=sys.stderr, flush=True)
pair.check_attention(generator, 67)
"""


def test_a_past_is_unpacked_in_pieces_for_many_queries(driver: Path, nvrtc: str) -> None:
    _, seen = run_code(IN_PIECES, driver, nvrtc, FAKE_CUDA_LOG="1")
    launches = seen.split("many\n")[1].splitlines()
    # Sinks, window and fresh rows; then three pieces of 512 rows at most, keys and values of which are unpacked. All of
    # that twice, as there is no room for the states of all queries.
    assert [len(kernel_launches(launches, kernel)) for kernel in ("attend_rows", "unpack", "mask_reach")] == [8, 12, 2]
    assert not kernel_launches(launches, "attend") + kernel_launches(launches, "plain")


IN_PIECES = """
import torch
pair = cases.Pair(cases.CASES["pieces of wide heads"], nvrtc)
generator = torch.Generator().manual_seed(0)
pair.append(*pair.rows(generator, 1200))
print("many", file=sys.stderr, flush=True)
mask = torch.ones(1, 1, 67, pair.cpu.length, dtype=torch.bool).tril(pair.cpu.length - 67)
pair.check_attention(generator, 67, mask=mask, both=False)
"""


@pytest.mark.parametrize("name", ["static", "blocks", "queried"])
def test_a_replayed_step_waits_for_nothing(driver: Path, nvrtc: str, name: str) -> None:
    _, seen = run_code(REPLAYS, driver, nvrtc, name, FAKE_CUDA_LOG="1", SKVQ_ONE_LAUNCH="0")
    assert "synchronize" not in seen.split("prompt\n")[1]
    recorded = seen.split("recorded\n")[1].splitlines()
    kernels = ["advance", "append_row", "fold", "plain", "attend", "unfold", "merge"]
    kernels += ["append_block"] if name != "static" else []
    kernels += ["query_squares", "query_factors"] if name == "queried" else []
    assert [len(kernel_launches(recorded, kernel)) for kernel in kernels] == [1] * len(kernels)
    assert len(recorded) == len(kernels)


REPLAYS = """
import torch
pair = cases.Pair(cases.CASES[rest[0]], nvrtc)
generator = torch.Generator().manual_seed(0)
pair.append(*pair.rows(generator, 60))
print("prompt", file=sys.stderr, flush=True)
pair.cuda.reserve(200)
step = cases.Step(pair, generator)
step.on_cuda()
pair.cuda.begin_capture()
print("recorded", file=sys.stderr, flush=True)
replay = cases.capture(step.on_cuda, pair.memory)
pair.cuda.end_capture()
for _ in range(5):
    replay()
pair.cuda.replayed(5)
"""


NOT_CAPTURED = """
import torch
def pair_of(name, prompt):
    pair = cases.Pair(cases.CASES[name], nvrtc)
    generator = torch.Generator().manual_seed(0)
    if prompt:
        pair.append(*pair.rows(generator, prompt))
    return pair, generator
refused = cases.refused
empty, _ = pair_of("static", 0)
refused(lambda: empty.cuda.reserve(100), "reserve: expected at least one token, found 0")
refused(empty.cuda.begin_capture, "begin_capture: expected a layer with reserve(tokens)")
kinds = {"raw": "raw rows of keys", "raw values": "raw rows of values"}
for name, what in kinds.items():
    refused(lambda: pair_of(name, 50)[0].cuda.reserve(100), f"reserve with {what} on a GPU is not supported")
short, generator = pair_of("static", 10)
refused(short.cuda.begin_capture, "expected a layer with reserve(tokens), found one that grows as it needs")
refused(lambda: short.cuda.reserve(10), "tokens: expected more than the 10 that there are, found 10")
refused(short.cuda.end_capture, "end_capture: expected begin_capture() before")
refused(lambda: short.cuda.replayed(1), "replayed: expected a captured step, found none")
short.cuda.reserve(40)
refused(short.cuda.begin_capture, "begin_capture: expected a full window, 23 tokens, found 10")
short.append(*short.rows(generator, 30))
refused(short.cuda.begin_capture, "begin_capture: expected fewer than the 40 reserved tokens, found 40")
short.cuda.reserve(60)
step = cases.Step(short, generator)
step.on_cuda()
step.on_others()
short.cuda.begin_capture()
refused(short.cuda.begin_capture, "begin_capture: expected end_capture() before")
two = short.rows(generator, 2)
refused(lambda: short.cuda.append(*two), "in a capture one append of one token, without queries, found 2 tokens")
mask = torch.zeros(1, 1, 1, 41)
refused(lambda: short.cuda.attend(step.query, step.found, scale=1.0, mask=mask), "without a mask, found a mask")
fresh = {"fresh_keys": step.keys, "fresh_values": step.values}
refused(lambda: short.cuda.attend(step.query, step.found, scale=1.0, **fresh), "found rows of the call itself")
refused(lambda: short.cuda.crop(5), "crop: expected one append and attention in a capture")
refused(lambda: short.cuda.decode_keys(two[0]), "decode: expected one append and attention in a capture")
cases.capture(step.on_cuda, short.memory)
refused(step.on_cuda, "found another one")
short.cuda.end_capture()
refused(lambda: short.cuda.attend(step.query, step.found, scale=1.0), "attend: expected replayed(steps) before")
short.cuda.replayed(0)
short.cuda.release_capture()
short.check(generator)
queried, generator = pair_of("queried", 60)
queried.cuda.reserve(80)
step = cases.Step(queried, generator)
queried.cuda.begin_capture()
two = queried.queries(generator, 2, 2)
expected = "in a capture queries of one token, behind its append"
refused(lambda: queried.cuda.observe_queries(step.query), f"{expected}, found none in front")
def observe():
    step.on_cuda()
    refused(lambda: queried.cuda.observe_queries(two), f"{expected}, found 2 tokens")
cases.capture(observe, queried.memory)
queried.cuda.end_capture()
refused(lambda: queried.cuda.observe_queries(step.query), "observe_queries: expected replayed(steps) before")
refused(lambda: queried.cuda.replayed(21), "steps: expected at most 20, for 80 tokens, found 21")
queried.cuda.replayed(0)
queried.cuda.release_capture()
queried.check(generator)
alone, generator = pair_of("static", 60)
alone.cuda.reserve(80)
step = cases.Step(alone, generator)
step.on_cuda()
step.on_others()
alone.cuda.begin_capture()
cases.capture(lambda: alone.cuda.append(step.keys, step.values), alone.memory)
refused(alone.cuda.end_capture, "end_capture: expected attention behind the append, found none")
alone.cuda.replayed(0)
alone.cuda.begin_capture()
cases.capture(step.on_cuda, alone.memory)
alone.cuda.end_capture()
alone.cuda.replayed(0)
alone.cuda.one_launch = False
alone.cuda.begin_capture()
refused(step.on_cuda, "a capture: expected a step with the launches of the one that was captured before")
alone.cuda.end_capture()
alone.cuda.replayed(0)
alone.cuda.release_capture()
alone.check(generator)
print("refused")
"""


def test_what_cannot_be_captured_says_why(driver: Path, nvrtc: str) -> None:
    printed, _ = run_code(NOT_CAPTURED, driver, nvrtc)
    assert printed == "refused\n"


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
pair.append(*pair.rows(generator, int(rest[1])))
for _ in range(3):
    pair.append(*pair.rows(generator, 1))
    pair.check_attention(generator, 1, both=False)
"""


def kernel_launches(launches: list[str], kernel: str) -> list[str]:
    return [line for line in launches if f"4skvq{len(kernel)}{kernel}" in line]


@pytest.mark.parametrize("name", ["static", "parts", "blocks"])
def test_nothing_waits_for_the_device(driver: Path, nvrtc: str, name: str) -> None:
    _, seen = run_code(STEPS, driver, nvrtc, name, "150", FAKE_CUDA_LOG="1", SKVQ_ONE_LAUNCH="0")
    before, after = seen.split("made\n")
    assert "synchronize" in before
    assert "synchronize" not in after
    launches = [line for line in after.splitlines() if line.startswith("launch")]
    assert launches
    assert all(line.endswith("stream 0x3") for line in launches)
    # Of a call of attention all but the first, and but those whose blocks would crowd.
    apart = name == "parts"
    for kernel, early in (
        ("fold", False),
        ("turning", True),
        ("plain", True),
        ("attend", not apart),
        ("unfold", not apart),
        ("merge", True),
    ):
        found = kernel_launches(launches, kernel)
        assert found or kernel == "turning"
        assert all((" early " in line) == early for line in found)
    assert not any(" early " in line for line in launches if "append" in line or "poke" in line)
    assert len(launches) <= 60


@pytest.mark.parametrize("name", ["static", "parts", "parts, float32", "parts, some channels turn", "blocks"])
def test_attention_of_few_queries_in_one_launch(driver: Path, nvrtc: str, name: str) -> None:
    _, seen = run_code(STEPS, driver, nvrtc, name, "150", FAKE_CUDA_LOG="1")
    launches = seen.split("made\n")[1].splitlines()
    for kernel in ("fold", "attend", "unfold"):
        assert not kernel_launches(launches, kernel)
    # Rows in the model's type alone have no other kernel.
    once, merges = (kernel_launches(launches, kernel) for kernel in ("attend_once", "merge"))
    assert once
    assert len(kernel_launches(launches, "plain")) == len(merges)
    # The mean of parts turns in that launch, unless rows are of f32 or wide.
    before = name in ("parts, float32", "parts, some channels turn")
    assert len(kernel_launches(launches, "turning")) == (len(once) if before else 0)
    assert not any(" early " in line for line in once)
    assert all(" early " in line for line in merges)


ENTERING = """
import torch
pair = cases.Pair(cases.CASES[rest[0]], nvrtc)
generator = torch.Generator().manual_seed(0)
pair.append(*pair.rows(generator, 60))
for index in range(140):
    print("step", index, file=sys.stderr, flush=True)
    pair.decode_steps(generator, 1, index)
    print("checks", file=sys.stderr, flush=True)
    if index % 20 == 19:
        pair.check(generator)
"""


def test_a_token_enters_with_its_attention(driver: Path, nvrtc: str) -> None:
    for name, enters in (("static", True), ("parts", True), ("parts, float32", False), ("blocks", False)):
        _, seen = run_code(ENTERING, driver, nvrtc, name, FAKE_CUDA_LOG="1")
        kinds: Counter[tuple[str, ...]] = Counter()
        for step in seen.split("step ")[1:]:
            lines = [line for line in step.split("checks")[0].splitlines() if line.startswith("launch")]
            found = (re.match(r"launch _ZN4skvq(\d+)(\w+)", line) for line in lines)
            names = (name[2][: int(name[1])] for name in found if name)
            kinds[tuple(name for name in names if name != "mask_shows")] += 1
        # A second reader of the same token has a launch of its own.
        assert (kinds["attend_once",] + kinds["attend_once", "attend_once"] >= 80) == enters, (name, kinds)
        assert (kinds[()] >= 10) == (enters or name == "parts, float32"), (name, kinds)  # of tokens that nobody reads


@pytest.mark.parametrize(("name", "once"), [("static", True), ("parts", True), ("parts, float32", False)])
def test_many_blocks_do_not_each_multiply_with_a_matrix(driver: Path, nvrtc: str, name: str, once: bool) -> None:
    _, seen = run_code(STEPS, driver, nvrtc, name, "150", FAKE_CUDA_LOG="1", FAKE_CUDA_MULTIPROCESSORS="1")
    launches = seen.split("made\n")[1].splitlines()
    assert bool(kernel_launches(launches, "attend_once")) == once
    assert bool(kernel_launches(launches, "fold")) != once


LONG = """
import torch
pair = cases.Pair(cases.CASES["static"], nvrtc)
generator = torch.Generator().manual_seed(0)
pair.append(*pair.rows(generator, 3000))
print("made", file=sys.stderr, flush=True)
pair.check_attention(generator, 1, both=False)
"""


@pytest.mark.parametrize(("resident", "splits"), [("4", 1), ("3", 3), ("2", 1)])
def test_splits_fill_the_blocks_that_fit(driver: Path, nvrtc: str, resident: str, splits: int) -> None:
    # Four of (kv head, sequence), one multiprocessor.
    options = {"FAKE_CUDA_LOG": "1", "FAKE_CUDA_MULTIPROCESSORS": "1", "FAKE_CUDA_RESIDENT": resident}
    _, seen = run_code(LONG, driver, nvrtc, **options)
    (launch,) = kernel_launches(seen.split("made\n")[1].splitlines(), "attend_once")
    rows = re.search(r"grid 2,2,(\d+)", launch)
    assert rows
    assert int(rows[1]) - 2 == splits, launch  # beside sinks and window


@pytest.mark.parametrize("setting", [{"SKVQ_OVERLAP": "0"}, {"FAKE_CUDA_CAPABILITY": "80"}], ids=["asked", "sm_80"])
def test_launches_that_are_kept_apart(driver: Path, nvrtc: str, setting: dict[str, str]) -> None:
    options = {"FAKE_CUDA_LOG": "1", "SKVQ_ONE_LAUNCH": "0", **setting}
    _, seen = run_code(STEPS, driver, nvrtc, "static", "150", **options)
    assert "4skvq5merge" in seen
    assert " early " not in seen


@pytest.mark.parametrize("name", ["blocks", "blocks of values"])
def test_where_there_are_many_blocks_of_statistics_launches_wait(driver: Path, nvrtc: str, name: str) -> None:
    options = {"FAKE_CUDA_LOG": "1", "FAKE_CUDA_MULTIPROCESSORS": "1", "SKVQ_ONE_LAUNCH": "0"}
    _, seen = run_code(STEPS, driver, nvrtc, name, "400", **options)
    launches = seen.split("made\n")[1].splitlines()
    for kernel, early in (("fold", False), ("plain", True), ("attend", False), ("unfold", False), ("merge", False)):
        found = kernel_launches(launches, kernel)
        assert found
        assert all((" early " in line) == early for line in found)


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
