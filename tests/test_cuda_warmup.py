"""`skvq warmup`: which kernels a model needs, and that they are compiled ahead, once."""

from pathlib import Path
from typing import Any

import pytest

from cuda_stand_ins import build_nvrtc, nvrtc_choices, nvrtc_path, run
from skvq import SkvqError, StreamOptions, _native, cli, warmup
from skvq.config import BITS
from skvq.warmup import AttentionShape, attention_shapes, kernel_instances, layout
from tiny_models import CONFIGS

PARTS = ((4, 16), (2, 32), (1, 48), (0, 32))


EVEN = f"128, 0, 128, 1, 1, {0x10_19_12_0C:d}ull, 1"


@pytest.mark.parametrize(
    ("stream", "head_dim", "options", "expected"),
    [
        ("keys", 128, StreamOptions(bits=2), "skvq::keys, 128, 2, 128, 1, 1"),
        ("values", 128, StreamOptions(bits=1.6), "skvq::values, 128, 16, 128, 1, 1"),
        ("values", 256, StreamOptions(bits=1.5, group_size=64), "skvq::values, 256, 15, 64, 1, 1"),
        ("keys", 80, StreamOptions(bits=8, symmetric=False), "skvq::keys, 80, 8, 80, 0, 2"),
        ("keys", 128, StreamOptions(parts=PARTS), f"skvq::keys, 128, 0, 128, 1, 1, {0x10_19_12_0C:d}ull"),
        ("keys", 128, StreamOptions(parts=PARTS, codebook="uniform"), f"skvq::keys, {EVEN}"),
        ("values", 128, StreamOptions(parts=PARTS, codebook="uniform"), f"skvq::values, {EVEN}"),
        ("values", 128, StreamOptions(bits=2), "skvq::values, 128, 2, 128, 1, 1, 0ull, 1"),
        ("values", 128, StreamOptions(bits=2, codebook="lloyd-max"), "skvq::values, 128, 2, 128, 1, 1"),
        ("values", 128, StreamOptions(bits=2, group_size=64), "skvq::values, 128, 2, 64, 1, 1"),
        ("values", 128, StreamOptions(bits=2, symmetric=False), "skvq::values, 128, 2, 128, 0, 1"),
    ],
)
def test_layouts(stream: str, head_dim: int, options: StreamOptions, expected: str) -> None:
    assert layout(stream, head_dim, options.resolved()) == f"skvq::Layout<{expected}>"


def test_more_parts_than_a_layout_can_name_are_refused() -> None:
    with pytest.raises(SkvqError, match="keys: 9 parts: expected at most 8 on a GPU"):
        layout("keys", 144, StreamOptions(parts=((2, 16),) * 9).resolved())


@pytest.fixture(params=nvrtc_choices())
def nvrtc(request: pytest.FixtureRequest) -> str:
    return nvrtc_path(request.param)


ALL_LAYOUTS = [StreamOptions(bits=bits) for bits in BITS if bits < 16]
ALL_LAYOUTS += [StreamOptions(bits=2, group_size=32, symmetric=False, metadata="fp16"), StreamOptions(parts=PARTS)]
ALL_LAYOUTS += [StreamOptions(parts=PARTS, codebook="uniform")]


def test_all_layouts_compile(nvrtc: str, tmp_path: Path) -> None:
    raw = StreamOptions(bits=16).resolved()
    shapes = [AttentionShape(128, "float16", 4, options.resolved(), raw) for options in ALL_LAYOUTS]
    instances = [x for shape in shapes for x in kernel_instances(shape) if x.file == "repack.cuh"]
    assert len(instances) == 2 * len(ALL_LAYOUTS)
    compiled = _native.cuda_compile_many(nvrtc, [(x.parts, "sm_80") for x in instances], tmp_path)
    assert len({kernel.name for kernel in compiled}) == len(instances)


@pytest.mark.parametrize("turning", [False, True])
def test_all_kernels_of_a_shape_compile(nvrtc: str, tmp_path: Path, turning: bool) -> None:
    keys = StreamOptions(parts=((3, 16), (1, 48))) if turning else StreamOptions(bits=2, block=128, query_exponent=0.5)
    values = StreamOptions(bits=1.6)
    shape = AttentionShape(64, "bfloat16", 8, keys.resolved(), values.resolved(), turning)
    instances = kernel_instances(shape)
    names = ["rows_to_page", "page_to_rows", "encode", "decode", "unpack"] * 2
    names += ["scale_squares"] if turning else ["block_statistics", "scale_squares", "query_squares", "query_factors"]
    names += ["append_row", *([] if turning else ["append_block"]), "fold", "attend_once"]
    names += ["attend", *([] if turning else ["attend_apart"])] * 2
    names += ["attend_many", "unfold", "mask_shows"]
    names += ["turning", "fold_turned"] if turning else []
    names += ["plain", "attend_rows", "mask_reach", "merge"]
    names += ["copy_rows"] * 3 + ["clear_rows", "advance"] + ["poke"] * 2
    assert [x.kernel for x in instances] == [f"skvq::{name}" for name in names]
    # In a process of its own first: a compiler that crashes, as NVRTC before 12.9 does at some C++, takes it along.
    jobs = [(x.parts, "sm_90a") for x in instances]
    run(f"from skvq import _native\n_native.cuda_compile_many({nvrtc!r}, {jobs!r}, {str(tmp_path)!r})")
    compiled = _native.cuda_compile_many(nvrtc, jobs, tmp_path)
    assert all(kernel.cached for kernel in compiled)
    assert all("0 bytes spill stores" in kernel.log for kernel in compiled)


def test_a_model_has_one_shape_for_equal_layers() -> None:
    [shape] = attention_shapes(CONFIGS["llama"](), dtype="float16")
    assert (shape.head_dim, shape.dtype, shape.queries_per_head) == (16, "float16", 2)
    assert (shape.keys.bits, shape.values.bits) == (2, 1.6)
    assert len(attention_shapes(CONFIGS["gemma3"]())) == 1  # sliding layers are not packed


def test_the_dtype_is_the_configurations_unless_named() -> None:
    config = CONFIGS["llama"]()
    assert attention_shapes(config)[0].dtype == "float32"
    config.dtype = "bfloat16"
    assert attention_shapes(config)[0].dtype == "bfloat16"
    config.dtype = "float64"
    with pytest.raises(SkvqError, match="config: dtype float64: expected one of float16, bfloat16, float32"):
        attention_shapes(config)


def test_rows_that_are_not_packed_need_no_packed_kernels() -> None:
    raw, packed = StreamOptions(bits=16).resolved(), StreamOptions(bits=2).resolved()
    plain = ["skvq::plain<skvq::Half, 64, 64>", "skvq::attend_rows<skvq::Half, 64, 64>"]
    plain += ["skvq::mask_reach<skvq::i32>", "skvq::merge<skvq::Half, 64>"]
    found = kernel_instances(AttentionShape(64, "float16", 1, raw, raw))
    assert [str(x) for x in found[:4]] == plain
    assert {x.file for x in found[4:]} == {"rows.cuh"}
    found = kernel_instances(AttentionShape(64, "float16", 1, raw, packed))
    assert str(found[0]) == "skvq::rows_to_page<skvq::Layout<skvq::values, 64, 2, 64, 1, 1, 0ull, 1>>"
    assert [str(x) for x in found[5:9]] == plain


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that compiles nothing, an empty cache, and a model of which there is only the configuration."""
    monkeypatch.setenv("SKVQ_NVRTC", build_nvrtc(tmp_path))
    monkeypatch.setenv("SKVQ_CACHE_DIR", str(tmp_path / "cache"))
    CONFIGS["llama"]().save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_command_compiles_once(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["warmup", str(stand_in / "model"), "--arch", "sm_80", "sm_90a", "sm_80", "--dtype", "float16"]
    count = len(kernel_instances(attention_shapes(CONFIGS["llama"](), dtype="float16")[0]))
    for expected in (f"{2 * count} compiled, 0 were there already", f"0 compiled, {2 * count} were there already"):
        assert cli.main(line) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith(f"{count} kernels for sm_80, sm_90a by NVRTC 12.4 (")
        assert expected in printed.out
        assert f"{2 * count}/{2 * count}" in printed.err
    assert len(list((stand_in / "cache" / "cubin").glob("*.cubin"))) == 2 * count


def test_a_plan_decides_the_formats(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skvq.config import SkvqConfig
    from skvq.plan import StreamPlan
    from skvq.plan_file import QuantizationPlan

    config = CONFIGS["llama"]()
    streams = {
        index: (StreamPlan(StreamOptions(bits=bits)), StreamPlan(StreamOptions(bits=1.5)))
        for index, bits in enumerate((4, 2, 4))
    }
    plan = QuantizationPlan.for_model(config, SkvqConfig(), streams, method="test")
    plan.save(stand_in / "plan.safetensors")
    shapes = attention_shapes(config, stand_in / "plan.safetensors")
    assert [(shape.keys.bits, shape.values.bits) for shape in shapes] == [(4, 1.5), (2, 1.5)]
    with pytest.raises(SkvqError, match=r"plan\.safetensors: the plan"):
        attention_shapes(CONFIGS["qwen3"](), stand_in / "plan.safetensors")


def test_without_a_gpu_the_architecture_must_be_named(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status: dict[str, Any] = {"usable": False, "reason": "CUDA cannot be used: no driver", "devices": []}
    monkeypatch.setattr(warmup, "cuda_status", lambda: status)
    assert cli.main(["warmup", str(stand_in / "model")]) == 1
    assert "no driver; to compile for another machine, name its architecture: --arch" in capsys.readouterr().err
    devices = [{"arch": "sm_90a"}, {"arch": "sm_80"}, {"arch": "sm_90a"}]
    status |= {"usable": True, "reason": None, "devices": devices}
    assert warmup.local_architectures() == ["sm_90a", "sm_80"]


def test_wrong_architectures_are_refused(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", str(stand_in / "model"), "--arch", "hopper"]) == 1
    assert "skvq: arch: expected a name such as sm_80, sm_90a or sm_120a" in capsys.readouterr().err
