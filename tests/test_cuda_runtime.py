"""Where NVRTC is looked for: the override, what the process has loaded, wheels, folders; and the error without any."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from skvq import SkvqError, cuda_runtime
from skvq.cuda_runtime import KernelInstance, best_fit, find_nvrtc, major_version


@pytest.fixture(autouse=True)
def fresh_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SKVQ_NVRTC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    cuda_runtime._search.cache_clear()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine where nothing is found but what a test puts into this folder of packages."""
    for place in ("_loaded", "_folders", "_in_library_cache"):
        monkeypatch.setattr(cuda_runtime, place, lambda: iter(()))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def put(folder: Path, *names: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [str(folder / name) for name in names]


def set_torch_version(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    torch = ModuleType("torch")
    torch.version = ModuleType("version")  # type: ignore[attr-defined]
    torch.version.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)


@pytest.mark.parametrize(
    ("name", "major"),
    [
        ("libnvrtc.so.13", 13),
        ("libnvrtc.so.12.4.127", 12),
        ("libnvrtc-b51b459d.so.12", 12),
        ("libnvrtc-builtins.so.13.0", None),
        ("libnvrtc.alt.so.12", None),
        ("libnvrtc.so", None),
        ("libcuda.so.1", None),
    ],
)
def test_libraries_are_known_by_their_names(name: str, major: int | None) -> None:
    assert major_version(f"/somewhere/{name}") == major


def test_the_version_of_torch_comes_first_then_the_order() -> None:
    paths = ["/a/libnvrtc.so.11.2", "/b/libnvrtc.so.13", "/c/libnvrtc.so.12", "/d/libnvrtc.so.12"]
    assert best_fit(paths, 12) == "/c/libnvrtc.so.12"
    assert best_fit(paths, 14) == best_fit(paths, None) == "/b/libnvrtc.so.13"
    assert best_fit(paths[:1], 11) is None


def test_the_override_wins_and_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = put(tmp_path, "my-nvrtc.so")
    monkeypatch.setenv("SKVQ_NVRTC", path)
    assert find_nvrtc() == path
    monkeypatch.setenv("SKVQ_NVRTC", str(tmp_path / "gone.so"))
    with pytest.raises(SkvqError, match=r"SKVQ_NVRTC=.*gone\.so: no such file, expected the path of libnvrtc"):
        find_nvrtc()


def test_without_any_the_error_says_how_to_get_one(bare: Path) -> None:
    put(bare / "nvidia" / "cu11" / "lib", "libnvrtc.so.11.2")  # too old to count
    with pytest.raises(SkvqError, match="no NVRTC found") as caught:
        find_nvrtc()
    assert "pip install nvidia-cuda-nvrtc-cu12" in str(caught.value)
    assert "SKVQ_NVRTC" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("nvidia/cu13/lib", "libnvrtc.so.13"),
        ("nvidia/cuda_nvrtc/lib", "libnvrtc.so.12"),
        ("torch/lib", "libnvrtc-b51b459d.so.12"),
    ],
)
def test_wheels(bare: Path, folder: str, name: str) -> None:
    put(bare / folder, name.replace("libnvrtc", "libnvrtc-builtins"))
    [path] = put(bare / folder, name)
    assert find_nvrtc() == path


def test_of_two_wheels_the_one_of_torchs_version(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [new] = put(bare / "nvidia" / "cu13" / "lib", "libnvrtc.so.13")
    [old] = put(bare / "nvidia" / "cuda_nvrtc" / "lib", "libnvrtc.so.12")
    for version, path in (("12.8", old), ("13.2", new), (None, new)):
        set_torch_version(monkeypatch, version)
        cuda_runtime._search.cache_clear()
        assert find_nvrtc() == path


def test_a_toolkit_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("_loaded", "_in_library_cache"):
        monkeypatch.setattr(cuda_runtime, place, lambda: iter(()))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    set_torch_version(monkeypatch, None)
    put(tmp_path / "lib64", "libnvrtc.so", "libnvrtc-builtins.so.12.4")
    paths = put(tmp_path / "lib64", "libnvrtc.so.12", "libnvrtc.so.12.4.127")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvrtc() == paths[0]


def test_the_librarys_cache_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "ldconfig"
    command.write_text(
        "#!/bin/sh\necho '	libnvrtc.so.12 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvrtc.so.12'\n"
        "echo '	libnvrtc-builtins.so.12.4 (libc6,x86-64) => /usr/lib/libnvrtc-builtins.so.12.4'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert list(cuda_runtime._in_library_cache()) == ["/usr/lib/x86_64-linux-gnu/libnvrtc.so.12"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps is Linux's")
def test_a_library_that_is_loaded_is_seen() -> None:
    try:
        path = find_nvrtc()
    except SkvqError:
        pytest.skip("no NVRTC here")
    from skvq import _native

    _native.cuda_nvrtc(path)
    assert os.path.realpath(path) in [os.path.realpath(loaded) for loaded in cuda_runtime._loaded()]


def test_an_instance_shows_as_its_expression() -> None:
    instance = KernelInstance("a.cuh", "skvq::fill", ("half", "128"))
    assert str(instance) == "skvq::fill<half, 128>"
    assert instance.parts == ("a.cuh", "skvq::fill", ["half", "128"])
    assert str(KernelInstance("a.cuh", "skvq::fill")) == "skvq::fill"
