"""`skvq warmup`: compiles the CUDA kernels that a model needs ahead of their first use.

Is: which kernels those are, from the model's configuration and the plan alone, and their compilation for any number of
architectures, on a machine with or without a GPU. Is not: the model's weights, which nothing here reads. What is made
lies in the disk cache, where a process that generates finds it (`$SKVQ_CACHE_DIR`, by default `~/.cache/skvq`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._native import SkvqError, cuda_compile_many, cuda_nvrtc, cuda_status
from .cuda_runtime import KernelInstance, find_nvrtc

if TYPE_CHECKING:
    from .config import StreamOptions

_ELEMENTS = {"float16": "skvq::Half", "bfloat16": "skvq::BFloat", "float32": "float"}
_FORMATS = {"8": 8, "4": 4, "3": 3, "2": 2, "1.6": 16, "1.5": 15, "parts": 0}  # as in kernels/layout.cuh
_MOST_PARTS = 8
_REPACKING = ("skvq::rows_to_page", "skvq::page_to_rows")  # between the rows of src/FORMAT.md and a device's pages
QUERY_TILE = 8  # queries of a kv head, of kernels/state.cuh
_MOST_TILES = 2  # of a block of attention in src/cuda/store/attend.rs
_MOST_MANY_WIDTH = 192  # of attend_many.cuh
_MOST_TURNED_WIDTH = 128  # of turned.cuh
_MOVING = [("copy_rows", word) for word in ("U32x4", "u32", "u16")]
_MOVING += [("clear_rows", "u16"), ("advance", "i32"), ("poke", "FewWords"), ("poke", "ManyWords")]


@dataclass(frozen=True)
class AttentionShape:
    """What of a packed layer decides which kernels serve it.

    Attributes:
        head_dim: D.
        dtype: of the model, "float16", "bfloat16" or "float32".
        queries_per_head: query heads of a key/value head.
        keys: how rows of keys are packed.
        values: likewise.
        turning: the mean of the keys turns with their position.
    """

    head_dim: int
    dtype: str
    queries_per_head: int
    keys: StreamOptions
    values: StreamOptions
    turning: bool = False


@dataclass(frozen=True)
class WarmupOptions:
    """What to compile for.

    Attributes:
        model: a directory or hub id; None: the packaged model.
        arch: such as "sm_90a"; none: those of this machine's devices.
        plan: of a calibrated cache; None: the default options.
        dtype: of the model when it runs; None: the configuration's.
    """

    model: str | None = None
    arch: Sequence[str] = field(default=())
    plan: Path | None = None
    dtype: str | None = None


def layout(stream: str, head_dim: int, options: StreamOptions) -> str:
    """`skvq::Layout` of kernels/layout.cuh: where the codes of packed rows lie, as a template argument.

    Args:
        stream: "keys" or "values".
        head_dim: D.
        options: packed ones, without None.
    """
    packed = 0
    if options.parts is None:
        group = options.group_size or (128 if head_dim % 128 == 0 else head_dim)
        of_two = stream == "values" and options.bits == 2 and options.symmetric and group == head_dim
    else:
        if len(options.parts) > _MOST_PARTS:
            raise SkvqError(f"{stream}: {len(options.parts)} parts: expected at most {_MOST_PARTS} on a GPU")
        group = head_dim
        # A byte for each part: its bits in the low three, its width / 16 in the high five bits.
        packed = sum((bits | width // 16 << 3) << 8 * index for index, (bits, width) in enumerate(options.parts))
    # Evenly spaced levels of parts, or of values of two bits, are in an order of their own.
    even = options.codebook == "uniform" and (options.parts is not None or of_two)
    parts = (f"{packed}ull", "1") if even else (f"{packed}ull",) if packed else ()
    number_bytes = 2 if options.metadata == "fp16" else 1
    arguments = (f"skvq::{stream}", head_dim, _FORMATS[options.format], group, int(options.symmetric), number_bytes)
    return f"skvq::Layout<{', '.join(map(str, arguments + parts))}>"


def kernel_instances(shape: AttentionShape) -> list[KernelInstance]:
    """The kernels that a layer of this shape runs: for packing, reading and moving rows, for attention of one token and
    of several, and for repacking rows of src/FORMAT.md.

    Attention on packed bytes has kernels where keys and values are both packed.
    """
    element, width = _ELEMENTS[shape.dtype], str(shape.head_dim)
    layouts = {
        stream: layout(stream, shape.head_dim, options)
        for stream, options in (("keys", shape.keys), ("values", shape.values))
        if options.is_packed
    }
    found, half = [], shape.dtype != "float32"
    for rows in layouts.values():
        found += [KernelInstance("repack.cuh", name, (rows,)) for name in _REPACKING]
        found.append(KernelInstance("encode.cuh", "skvq::encode", (element, rows)))
        found.append(KernelInstance("decode.cuh", "skvq::decode", (element, rows)))
        found += [KernelInstance("unpack.cuh", "skvq::unpack", (element, rows))] if half else []
    if shape.keys.block or shape.values.block:
        found.append(KernelInstance("statistics.cuh", "skvq::block_statistics", (element, width)))
    if "keys" in layouts:
        found.append(KernelInstance("noise.cuh", "skvq::scale_squares", (layouts["keys"],)))
    if shape.keys.query_exponent:
        found.append(KernelInstance("queries.cuh", "skvq::query_squares", (element, width)))
        found.append(KernelInstance("queries.cuh", "skvq::query_factors", (width,)))
    if len(layouts) == 2:
        found.append(KernelInstance("append.cuh", "skvq::append_row", (element, *layouts.values())))
        if shape.keys.block or shape.values.block:
            found.append(KernelInstance("append_block.cuh", "skvq::append_block", (element, *layouts.values())))
        least = min(_MOST_TILES, -(-shape.queries_per_head // QUERY_TILE))
        found.append(KernelInstance("attend.cuh", "skvq::fold", (element, layouts["keys"])))
        if least == 1:
            found.append(KernelInstance("attend_once.cuh", "skvq::attend_once", (element, *layouts.values())))
        for tiles in range(least, _MOST_TILES + 1):
            names = ("attend", "attend_apart") if shape.keys.block or shape.values.block else ("attend",)
            found += [KernelInstance("attend.cuh", f"skvq::{name}", (*layouts.values(), str(tiles))) for name in names]
        if shape.head_dim <= _MOST_MANY_WIDTH:
            found.append(KernelInstance("attend_many.cuh", "skvq::attend_many", tuple(layouts.values())))
        found.append(KernelInstance("merge.cuh", "skvq::unfold", (width,)))
        found.append(KernelInstance("reach.cuh", "skvq::mask_shows", ("skvq::i32",)))
        if shape.turning:
            found.append(KernelInstance("turning.cuh", "skvq::turning", (element, width)))
            if half and shape.head_dim <= _MOST_TURNED_WIDTH:
                found.append(KernelInstance("turned.cuh", "skvq::fold_turned", (element, width)))
    found.append(KernelInstance("plain.cuh", "skvq::plain", (element, width, width)))
    if half:
        found.append(KernelInstance("attend_rows.cuh", "skvq::attend_rows", (element, width, width)))
        found.append(KernelInstance("reach.cuh", "skvq::mask_reach", ("skvq::i32",)))
    found.append(KernelInstance("merge.cuh", "skvq::merge", (element, width)))
    found += [KernelInstance("rows.cuh", f"skvq::{name}", (f"skvq::{word}",)) for name, word in _MOVING]
    return found


def attention_shapes(config: Any, plan: Path | None = None, dtype: str | None = None) -> list[AttentionShape]:
    """The shapes of all layers that a cache packs, each once, in the order of the layers.

    Without a plan these are the default's, before and after a fit to the prompt, whose parts are known ahead where
    heads have four of them.

    Raises:
        SkvqError: the plan was made for another model, or the configuration does not say a layer's shape.
    """
    from .calibrate.fitted_options import fitted_key_options, fitted_value_options
    from .config import SkvqConfig
    from .model_layers import head_dim_of, kv_heads, packed_layers
    from .plan import LayerPlan
    from .plan_file import QuantizationPlan

    plans: Any = None
    if plan is not None:
        loaded = QuantizationPlan.load(plan)
        loaded.check(config, f"{plan}: the plan")
        plans = loaded.layers
    default = LayerPlan.from_config(SkvqConfig())
    shapes: dict[AttentionShape, None] = {}
    for index, layer in packed_layers(config).items():
        head_dim, heads, queries = head_dim_of(layer), kv_heads(layer), getattr(layer, "num_attention_heads", None)
        if not head_dim or not heads or not isinstance(queries, int):
            raise SkvqError(f"config: layer {index}: expected head_dim, num_key_value_heads and num_attention_heads")
        packing = default if plans is None else plans[index]
        wanted = [(packing.keys.options, packing.values.options, packing.keys.shift_sine is not None)]
        if plans is None and (fitted := fitted_key_options(packing.keys.options, head_dim)) is not None:
            wanted.append((fitted, fitted_value_options(packing.values.options), True))
        for keys, values, turning in wanted:
            shape = AttentionShape(
                head_dim=head_dim,
                dtype=dtype or _dtype_name(config),
                queries_per_head=queries // heads,
                keys=keys.resolved(),
                values=values.resolved(),
                turning=turning,
            )
            shapes[shape] = None
    return list(shapes)


def _dtype_name(config: Any) -> str:
    """The dtype that transformers loads the model in by default; float32 where the configuration names none."""
    named = getattr(config, "dtype", None)
    name = str(named).removeprefix("torch.") if named is not None else "float32"
    if name not in _ELEMENTS:
        raise SkvqError(f"config: dtype {name}: expected one of {', '.join(_ELEMENTS)}, or one that --dtype names")
    return name


def local_architectures() -> list[str]:
    """Of this machine's devices, each once.

    Raises:
        SkvqError: CUDA cannot be used here; the message says why.
    """
    status = cuda_status()
    if not status["usable"]:
        raise SkvqError(f"{status['reason']}; to compile for another machine, name its architecture: --arch sm_90a")
    return list(dict.fromkeys(device["arch"] for device in status["devices"]))


def run_warmup(options: WarmupOptions) -> None:
    """Compiles what the model needs, with a progress bar; prints what was done."""
    from transformers import AutoConfig

    from .evaluate.progress import progress_bar
    from .models import demo_model_directory

    nvrtc = find_nvrtc()
    (major, minor), _ = cuda_nvrtc(nvrtc)
    architectures = list(dict.fromkeys(options.arch)) or local_architectures()
    config = AutoConfig.from_pretrained(options.model or str(demo_model_directory()))
    shapes = attention_shapes(config, options.plan, options.dtype)
    instances = dict.fromkeys(instance for shape in shapes for instance in kernel_instances(shape))
    jobs = [(instance.parts, arch) for arch in architectures for instance in instances]
    print(f"{len(instances)} kernels for {', '.join(architectures)} by NVRTC {major}.{minor} ({nvrtc})")
    with progress_bar(len(jobs), "kernel") as advance:
        compiled = cuda_compile_many(nvrtc, jobs, done=lambda _: advance(1, None))
    cached = sum(kernel.cached for kernel in compiled)
    size = sum(len(kernel.cubin) for kernel in compiled)
    print(f"{len(jobs) - cached} compiled, {cached} were there already, {size / 1024:.0f} KiB")
