"""Kernels are compiled once: by any NVRTC, for any architecture, into a cache on disk that nothing can break.

What the cache does is tested with a stand-in of NVRTC (stand_ins/nvrtc.c), compilation with every real one at hand: the
one that the search finds, and those whose paths `SKVQ_TEST_NVRTC` lists.
"""

import re
import shutil
import tempfile
from pathlib import Path

import pytest

from cuda_stand_ins import build_nvrtc, finish, nvrtc_choices, nvrtc_path, run, start
from skvq import _native
from skvq._native import CompiledKernel, SkvqError

FILE = "portable.cuh"
REAL = ("repack.cuh", "skvq::rows_to_page", ["skvq::Layout<skvq::keys, 128, 2, 128, 1, 1>"])
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@pytest.fixture
def nvrtc(tmp_path: Path) -> str:
    return build_nvrtc(tmp_path / "12.4")


def compile_fill(nvrtc: str, cache: Path | None, kernel: str = "fill", arch: str = "sm_80") -> CompiledKernel:
    return _native.cuda_compile(nvrtc, FILE, kernel, ["half", "2"], arch, cache)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.*"))


# ---- the disk cache --------------------------------------------------------------------------------------------------


def test_the_second_time_it_comes_from_disk(nvrtc: str, tmp_path: Path) -> None:
    first, second = compile_fill(nvrtc, tmp_path / "cache"), compile_fill(nvrtc, tmp_path / "cache")
    assert (first.cached, second.cached) == (False, True)
    assert first.cubin.startswith(b"\x7fELFfake --gpu-architecture=sm_80 fill<half, 2>")
    assert (first.cubin, first.name, first.log) == (second.cubin, second.name, second.log)
    assert (first.name, first.log) == ("lowered", "8 registers")
    [file] = files(tmp_path / "cache")
    assert file.parent == tmp_path / "cache" / "cubin"
    assert file.suffix == ".cubin"


def test_every_other_kernel_architecture_and_compiler_has_its_own_file(nvrtc: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert not compile_fill(nvrtc, cache).cached
    assert not compile_fill(nvrtc, cache, kernel="other").cached
    assert not compile_fill(nvrtc, cache, arch="sm_90a").cached
    assert not compile_fill(nvrtc, cache, arch="sm_90").cached
    for minor in (5, 6):
        assert not compile_fill(build_nvrtc(tmp_path / f"12.{minor}", 12, minor), cache).cached
    assert not compile_fill(build_nvrtc(tmp_path / "13.4", 13, 4), cache).cached
    assert len(files(cache)) == 7
    assert compile_fill(nvrtc, cache).cached


def test_another_path_of_the_same_compiler_is_no_other_compiler(nvrtc: str, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(nvrtc, tmp_path / "copy")
    compile_fill(nvrtc, tmp_path / "cache")
    assert compile_fill(copy, tmp_path / "cache").cached


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "foreign", "longer"])
def test_a_damaged_file_is_compiled_again_and_replaced(nvrtc: str, tmp_path: Path, damage: str) -> None:
    whole = compile_fill(nvrtc, tmp_path / "cache")
    [file] = files(tmp_path / "cache")
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "truncated": content[:middle],
        "empty": b"",
        "foreign": b"\x7fELF" + content,
        "longer": content + b"\0",
    }[damage]
    file.write_bytes(damaged)
    again = compile_fill(nvrtc, tmp_path / "cache")
    assert not again.cached
    assert again.cubin == whole.cubin
    assert file.read_bytes() == content
    assert compile_fill(nvrtc, tmp_path / "cache").cached


def test_a_directory_that_cannot_be_written_costs_time_only(nvrtc: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a directory should be")
    for _ in range(2):
        assert not compile_fill(nvrtc, tmp_path / "file").cached
        assert not compile_fill(nvrtc, Path("/proc/none/such")).cached


def test_a_read_only_directory_costs_time_only(nvrtc: str) -> None:
    code = f"""
        import os, sys
        from skvq import _native

        def cached(kernel):
            return _native.cuda_compile({nvrtc!r}, "portable.cuh", kernel, [], "sm_80", sys.argv[1]).cached

        cached("one")
        folder = os.path.join(sys.argv[1], "cubin")
        for path in (folder, sys.argv[1]):
            os.chmod(path, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # the superuser may write everywhere
        print(cached("one"), cached("two"), cached("two"), len(os.listdir(folder)))
    """
    # Not in pytest's own folder, which others may not enter.
    with tempfile.TemporaryDirectory() as cache:
        assert run(code, arguments=[cache])[0] == "True False False 1\n"
        Path(cache, "cubin").chmod(0o755)


CODE = """
    import sys
    from skvq import _native
    print(_native.cuda_compile({nvrtc!r}, "portable.cuh", "fill", ["half", "2"], "sm_80").cached)
"""


def test_the_directory_is_chosen_by_the_environment(
    nvrtc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SKVQ_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    code = CODE.format(nvrtc=nvrtc)
    assert [run(code)[0], run(code)[0]] == ["False\n", "False\n"]  # nowhere to keep it
    places = {
        "home/.cache/skvq": {"HOME": str(tmp_path / "home")},
        "xdg/skvq": {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "xdg")},
        "own": {"HOME": str(tmp_path / "home"), "SKVQ_CACHE_DIR": str(tmp_path / "own")},
    }
    for folder, environment in places.items():
        assert [run(code, **environment)[0] for _ in range(2)] == ["False\n", "True\n"]
        assert len(files(tmp_path / folder / "cubin")) == 1
    off = {"HOME": str(tmp_path / "home"), "SKVQ_CACHE_DIR": ""}
    assert run(code, **off)[0] == "False\n"


def test_processes_share_a_directory(nvrtc: str, tmp_path: Path) -> None:
    code = f"""
        from skvq import _native
        jobs = [(("portable.cuh", f"kernel{{i}}", []), "sm_80") for i in range(50)]
        print(len(_native.cuda_compile_many({nvrtc!r}, jobs, {str(tmp_path / "cache")!r})))
    """
    processes = [start(code) for _ in range(3)]
    assert [finish(process)[0] for process in processes] == ["50\n"] * 3
    assert len(files(tmp_path / "cache")) == 50
    assert {file.suffix for file in files(tmp_path / "cache")} == {".cubin"}


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_many_kernels_come_in_order_and_report_each(nvrtc: str, tmp_path: Path) -> None:
    jobs = [((FILE, f"kernel{i}", ["1"]), arch) for i in range(20) for arch in ("sm_80", "sm_90a")]
    finished: list[int] = []
    compiled = _native.cuda_compile_many(nvrtc, jobs, tmp_path / "cache", finished.append)
    assert sorted(finished) == list(range(40))
    for ((_, kernel, _), arch), result in zip(jobs, compiled, strict=True):
        assert result.cubin.startswith(f"\x7fELFfake --gpu-architecture={arch} {kernel}<1>".encode())
    assert all(kernel.cached for kernel in _native.cuda_compile_many(nvrtc, jobs, tmp_path / "cache"))


def test_one_that_fails_is_raised_when_all_are_finished(nvrtc: str, tmp_path: Path) -> None:
    jobs = [((FILE, kernel, []), "sm_80") for kernel in ("a", "broken", "b")]
    finished: list[int] = []
    with pytest.raises(SkvqError, match="kernel broken does not compile"):
        _native.cuda_compile_many(nvrtc, jobs, tmp_path / "cache", finished.append)
    assert sorted(finished) == [0, 1, 2]
    assert len(files(tmp_path / "cache")) == 2
    with pytest.raises(SkvqError, match="arch: expected a name such as sm_80"):
        _native.cuda_compile_many(nvrtc, [((FILE, "a", []), "90")])
    assert _native.cuda_compile_many(nvrtc, []) == []


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_name_what_was_wrong(nvrtc: str, tmp_path: Path) -> None:
    def message(*arguments: object) -> str:
        with pytest.raises(SkvqError) as caught:
            _native.cuda_compile(*arguments)  # type: ignore[arg-type]
        return str(caught.value)

    broken = message(nvrtc, FILE, "broken", ["half"], "sm_90a", tmp_path)
    assert broken.startswith("kernel broken<half> does not compile with --gpu-architecture=sm_90a ")
    assert broken.endswith(":\nline 1: something is undefined")
    invalid = message(nvrtc, FILE, "invalid", [], "sm_90a", tmp_path)
    assert "nvrtcCompileProgram of the CUDA compiler" in invalid
    assert "NVRTC_ERROR_INVALID_OPTION (5)" in invalid
    assert files(tmp_path / "cubin") == []  # nothing that failed is kept
    assert message(nvrtc, "none.cuh", "fill", [], "sm_80").startswith("file: expected one of the kernel files ")
    assert message(nvrtc, FILE, "fill", [], "sm_75").endswith("the kernels need 8.0 or newer")
    assert message(nvrtc, FILE, "fill", [], "compute_80").startswith("arch: expected a name such as sm_80")
    assert message(nvrtc, FILE, "a\0b", [], "sm_80").startswith("expression: expected text without a zero byte")
    unknown = message(nvrtc, FILE, "fill", [], "sm_120a")
    assert unknown == f"sm_120a is not supported: NVRTC 12.4 ({nvrtc}) compiles for sm_75, sm_80, sm_90"
    missing = str(tmp_path / "libnvrtc.so.12")
    assert message(missing, FILE, "fill", [], "sm_80").startswith(f"dlopen of the CUDA compiler {missing}: ")
    old = build_nvrtc(tmp_path / "lacking", 12, 0, "-DWITHOUT_LOWERED_NAME")
    assert message(old, FILE, "fill", [], "sm_80") == (
        f"dlsym of the CUDA compiler {old}: it lacks nvrtcGetLoweredName"
    )
    older = build_nvrtc(tmp_path / "11.8", 11, 8)
    refused = f"nvrtcVersion of the CUDA compiler {older}: found NVRTC 11.8, expected 12.0 or newer"
    assert message(older, FILE, "fill", [], "sm_80", tmp_path) == refused
    with pytest.raises(SkvqError, match=re.escape(refused)):
        _native.cuda_nvrtc(older)


def test_what_a_compiler_serves(nvrtc: str) -> None:
    assert _native.cuda_nvrtc(nvrtc) == ((12, 4), ["sm_80", "sm_90a"])


# ---- real compilers --------------------------------------------------------------------------------------------------


@pytest.fixture(params=nvrtc_choices())
def real(request: pytest.FixtureRequest) -> str:
    return nvrtc_path(request.param)


def test_a_kernel_compiles_for_every_architecture(real: str, tmp_path: Path) -> None:
    served = _native.cuda_nvrtc(real)[1]
    jobs = [(REAL, arch) for arch in ARCHITECTURES if arch in served]
    assert "sm_80" in served
    assert "sm_90a" in served
    for kernel in _native.cuda_compile_many(real, jobs, tmp_path):
        assert kernel.cubin.startswith(b"\x7fELF")
        assert kernel.name.startswith("_ZN4skvq12rows_to_pageINS_6LayoutILi0ELi128ELi2ELi128E")
        assert "registers" in kernel.log
        assert "0 bytes spill stores" in kernel.log
    assert all(kernel.cached for kernel in _native.cuda_compile_many(real, jobs, tmp_path))


def test_python_reads_text_afterwards_as_before(real: str) -> None:
    """NVRTC before 12.6 changes the locale of the thread that it runs in."""
    code = f"""
        from locale import CODESET, nl_langinfo
        from skvq import _native
        before = nl_langinfo(CODESET)
        kernel = _native.cuda_compile({real!r}, *{REAL!r}, "sm_80")
        print(before, nl_langinfo(CODESET), kernel.cached)
    """
    assert run(code, SKVQ_CACHE_DIR="", LC_ALL="C.UTF-8")[0] == "UTF-8 UTF-8 False\n"


def test_the_compiler_says_what_is_wrong_with_an_instance(real: str, tmp_path: Path) -> None:
    with pytest.raises(SkvqError, match='identifier "nothing" is undefined'):
        _native.cuda_compile(real, "repack.cuh", "nothing", ["1"], "sm_80", tmp_path)
    with pytest.raises(SkvqError, match="head sizes are multiples of 16"):
        _native.cuda_compile(
            real, "repack.cuh", "skvq::rows_to_page", ["skvq::Layout<skvq::keys, 40, 2, 40, 1, 1>"], "sm_80"
        )
    assert files(tmp_path) == []
