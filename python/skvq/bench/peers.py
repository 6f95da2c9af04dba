"""Who else computes decode attention on a GPU: torch's backends, flash-attn and FlashInfer in f16, BitDecoding, KIVI
and transformers' QuantizedCache in few bits.

Is: for each, how it is called on given keys and values without copies that its kernel does not need, or why it cannot
be. Is not: timed here, nor trusted: whoever times it compares its output first. Packages are imported when a benchmark
asks for them; their interfaces are those of their own sources and tests (docs/cuda.md says which versions), and a call
that fails is a reason in the report.
Shapes: query [B, Hq, L, D]; keys and values [B, Hkv, T, D], f16, contiguous; output [B, Hq, L, D]. Every query sees all
tokens. L is 1 but for chunks of a prompt.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Tensor]
FLASHINFER_PAGE = 16
_FLASHINFER_WORKSPACE = 128 << 20
_KIVI_GROUPS = {2: 32, 4: 128}  # bits: elements that share a scale
_BITDECODING_BITS, _BITDECODING_GROUP = (2, 4), 128  # rows or channels that share a scale, as its authors time it
_BITDECODING_CONTAINER = 16  # bits
_BITDECODING_BLOCK = 256  # rows that its kernel loads at once, whether they are there or not
_BITDECODING_WIDTH = 128  # the only head size, and f16 the only dtype, that it is compiled for
_CACHE_BACKENDS, _CACHE_BITS = ("quanto", "hqq"), 2
# Of keys: kernels of KIVI and quanto count elements in 32 bits, and a fault would end the process.
_COUNTED_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class Prepared:
    """A way to attend on given keys and values.

    Attributes:
        call: to the output [B, Hq, L, D].
        nbytes: that it holds of keys and values; None: both as they were given.
        packed_bytes: of those, codes with their scales; None: all.
        rows: to the keys and values [B, Hkv, T, D] that a call attends to, decoded; None: those that were given, or not
            known.
        captures: whether a call may be recorded in a CUDA graph.
    """

    call: Call
    nbytes: int | None = None
    packed_bytes: int | None = None
    rows: Callable[[], tuple[Tensor, Tensor]] | None = None
    captures: bool = True

    def __call__(self) -> Tensor:
        return self.call()


Prepare = Callable[[Tensor, Tensor, Tensor], Prepared]


@dataclass(frozen=True)
class Peer:
    """A way to attend.

    Attributes:
        name: as in reports.
        bits: of an element of keys and values, without scales.
        prepare: query, keys and values to a call; raises what the package raises if it cannot serve them.
    """

    name: str
    bits: int
    prepare: Prepare


def peers(group: int) -> Iterator[Peer]:
    """All of them, for `group` query heads of a kv head."""
    yield from _torch_peers(group)
    yield Peer("flash-attn with_kvcache", 16, _flash_attn("flash_attn"))
    yield Peer("flash-attn 3 with_kvcache", 16, _flash_attn("flash_attn_interface"))
    for name, tensor_cores in (("flashinfer", False), ("flashinfer tensor cores", True)):
        yield Peer(name, 16, _flashinfer(tensor_cores))
    for bits in _BITDECODING_BITS:
        yield Peer(f"bitdecoding {bits} bits", bits, _bitdecoding(bits))
    for bits in _KIVI_GROUPS:
        yield Peer(f"kivi {bits} bits", bits, _kivi(bits))
    for backend in _CACHE_BACKENDS:
        yield Peer(f"QuantizedCache {backend} {_CACHE_BITS} bits", _CACHE_BITS, _quantized_cache(backend))


# ---- f16 -------------------------------------------------------------------------------------------------------------


def _torch_peers(group: int) -> Iterator[Peer]:
    """Each backend of torch's attention, by `enable_gqa`, and with a group's queries as positions of one head, which
    for a decode step is the same and copies no keys.
    """
    from torch.nn.attention import SDPBackend

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name, None)
        if backend is None:
            continue
        short = name.removesuffix("_ATTENTION").lower()
        yield Peer(f"sdpa {short}", 16, _sdpa(backend, as_positions=True))
        if group > 1 and name != "MATH":  # which would copy the keys for every query
            yield Peer(f"sdpa {short} enable_gqa", 16, _sdpa(backend, as_positions=False))


def _as_positions(query: Tensor, kv_heads: int) -> Tensor:
    """[B, Hkv, group · L, D]."""
    return query.view(query.shape[0], kv_heads, -1, query.shape[3])


def _sdpa(backend: Any, *, as_positions: bool) -> Prepare:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Prepared:
        from torch.nn.attention import sdpa_kernel

        folded = _as_positions(query, keys.shape[1]) if as_positions else query

        def call() -> Tensor:
            with sdpa_kernel(backend):
                found = F.scaled_dot_product_attention(folded, keys, values, enable_gqa=not as_positions)
            return found.reshape(query.shape)

        return Prepared(call)

    return prepare


def _flash_attn(module: str) -> Prepare:
    """Versions 2 ("flash_attn") and 3 ("flash_attn_interface", for Hopper) are called alike."""

    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Prepared:
        attend = importlib.import_module(module).flash_attn_with_kvcache
        rows = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)  # [B, T, H, D]
        return Prepared(lambda: attend(*rows).transpose(1, 2))

    return prepare


def _flashinfer(tensor_cores: bool) -> Prepare:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Prepared:
        package = importlib.import_module("flashinfer")
        batch, heads, length, width = query.shape
        if batch == 1 and length > 1:
            many = query[0].transpose(0, 1).contiguous(), keys[0], values[0]
            call = package.single_prefill_with_kv_cache
            return Prepared(lambda: call(*many, causal=False, kv_layout="HND").transpose(0, 1)[None])
        _one_query(query)
        if batch == 1:
            options = {"kv_layout": "HND", "use_tensor_cores": tensor_cores}
            one = query[0, :, 0], keys[0], values[0]
            return Prepared(lambda: package.single_decode_with_kv_cache(*one, **options)[None, :, None])
        kv_heads, tokens = keys.shape[1], keys.shape[2]
        pages = -(-tokens // FLASHINFER_PAGE)
        paged = tuple(flashinfer_pages(rows) for rows in (keys, values))
        workspace = torch.zeros(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=query.device)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        numbers = {"dtype": torch.int32, "device": query.device}
        indptr = torch.arange(0, (batch + 1) * pages, pages, **numbers)  # type: ignore[call-overload]
        indices = torch.arange(batch * pages, **numbers)  # type: ignore[call-overload]
        last = torch.full((batch,), (tokens - 1) % FLASHINFER_PAGE + 1, **numbers)  # type: ignore[call-overload]
        wrapper.plan(indptr, indices, last, heads, kv_heads, width, FLASHINFER_PAGE, q_data_type=query.dtype)
        rows = query[:, :, 0].contiguous()
        # Replayed from a graph, its batched kernels read where nothing is (0.6.7 on an H100), which ends the process.
        return Prepared(lambda: wrapper.run(rows, paged)[:, :, None], captures=False)

    return prepare


def flashinfer_pages(rows: Tensor) -> Tensor:
    """Rows [B, H, T, D] as FlashInfer's pages [B · pages, H, 16, D], those of a sequence one behind the other."""
    batch, heads, tokens, width = rows.shape
    pages = -(-tokens // FLASHINFER_PAGE)
    whole = F.pad(rows, (0, 0, 0, pages * FLASHINFER_PAGE - tokens))
    split = whole.view(batch, heads, pages, FLASHINFER_PAGE, width)
    return split.transpose(1, 2).reshape(batch * pages, heads, FLASHINFER_PAGE, width)


# ---- few bits --------------------------------------------------------------------------------------------------------


def _bitdecoding(bits: int) -> Prepare:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Prepared:
        package = importlib.import_module("bit_decode")
        _one_query(query)
        if keys.shape[3] != _BITDECODING_WIDTH or keys.dtype != torch.float16:  # which it does not look at
            raise ValueError(f"{keys.dtype}, head size {keys.shape[3]}: expected float16 and {_BITDECODING_WIDTH}")
        group, tokens = _BITDECODING_GROUP, _whole_groups(keys, _BITDECODING_BLOCK)
        shapes = bitdecoding_shapes(keys.shape[0], tokens, keys.shape[1], keys.shape[3], bits, group)
        k_pack, k_params, v_pack, v_params = (
            torch.zeros(shape, dtype=torch.uint16 if index % 2 == 0 else torch.float32, device=keys.device)
            for index, shape in enumerate(shapes)
        )
        rows = [x[:, :, :tokens].transpose(1, 2).contiguous() for x in (keys, values)]
        options = {"quant_mode": "k-channel", "group_size": group, "num_bits": bits}
        starts = torch.arange(0, (keys.shape[0] + 1) * tokens, tokens, dtype=torch.int32, device=keys.device)
        package.kvcache_pack_int(
            rows[0], k_pack, k_params, rows[1], v_pack, v_params, cu_seqlens_k=starts, seqlen_k=tokens, **options
        )
        one, scale = query.transpose(1, 2).contiguous(), query.shape[3] ** -0.5

        def call() -> Tensor:
            found = package.fwd_kvcache_int(one, k_pack, k_params, v_pack, v_params, softmax_scale=scale, **options)
            output: Tensor = found[0] if isinstance(found, tuple) else found  # its branch for whole models has more
            return output.transpose(1, 2)

        return Prepared(call, nbytes=sum(x.nbytes for x in (k_pack, k_params, v_pack, v_params)))

    return prepare


def bitdecoding_shapes(
    batch: int, tokens: int, heads: int, width: int, bits: int, group: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of codes and parameters of keys (along tokens), then of values (along channels)."""
    held = _BITDECODING_CONTAINER // bits
    keys = (batch, tokens // held, heads, width), (batch, tokens // group, heads, width)
    return *keys, (batch, tokens, heads, width // held), (batch, width // group, heads, tokens)


def _kivi(bits: int) -> Prepare:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Prepared:
        pack = importlib.import_module("quant.new_pack").triton_quantize_and_pack_along_last_dim
        product = importlib.import_module("quant.matmul").cuda_bmm_fA_qB_outer
        _countable(keys)
        group = min(_KIVI_GROUPS[bits], keys.shape[3])
        tokens = _whole_groups(keys, group)
        packed_keys = pack(keys[:, :, :tokens].transpose(2, 3).contiguous(), group, bits)
        packed_values = pack(values[:, :, :tokens].contiguous(), group, bits)

        def call() -> Tensor:
            scores = product(group, query, *packed_keys, bits) / math.sqrt(query.shape[3])
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            output: Tensor = product(group, weights, *packed_values, bits)
            return output

        return Prepared(call, nbytes=sum(x.nbytes for x in (*packed_keys, *packed_values)))

    return prepare


def _quantized_cache(backend: str) -> Prepare:
    """A decode step with transformers' QuantizedCache, which attends to no packed bytes: the layer's own `update` with
    the new token, which unpacks the whole past and puts the rows that are not packed yet behind it, then attention.

    The layer has half of those rows, the mean over the steps between two packings. One step in `residual_length` also
    packs the whole past anew: that is not in the call.
    """

    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Prepared:
        from ..evaluate.memory import bytes_of_layer
        from ..evaluate.methods.stock import quantized_layer

        _one_query(query)
        tokens = keys.shape[2]
        if tokens < 2:
            raise ValueError(f"{tokens} tokens: expected at least 2, a past and the new one")
        if backend == "quanto":
            _countable(keys)
        layer = quantized_layer(backend, _CACHE_BITS)
        fresh = min(layer.residual_length // 2, tokens - 1)  # with the new one
        packed = tokens - fresh
        layer.update(keys[:, :, :packed].clone(), values[:, :, :packed].clone())  # a quantizer may work in place
        if fresh > 1:
            layer.update(keys[:, :, packed:-1], values[:, :, packed:-1])
        new = keys[:, :, -1:], values[:, :, -1:]
        nbytes = bytes_of_layer(layer)

        def rows() -> tuple[Tensor, Tensor]:
            # The copy takes what `update` replaces, so the layer is the same at every call.
            found: tuple[Tensor, Tensor] = copy.copy(layer).update(*new)
            return found

        folded = _as_positions(query, keys.shape[1])
        return Prepared(
            lambda: F.scaled_dot_product_attention(folded, *rows()).reshape(query.shape),
            nbytes=nbytes,
            packed_bytes=nbytes - layer.keys.nbytes - layer.values.nbytes,
            rows=rows,
            # quanto's kernel runs on the default stream whatever torch's is: a graph would be without it.
            captures=backend != "quanto",
        )

    return prepare


def _countable(keys: Tensor) -> None:
    if keys.numel() >= _COUNTED_ELEMENTS:
        raise ValueError(f"{keys.numel()} elements of keys: expected fewer than {_COUNTED_ELEMENTS}")


def _one_query(query: Tensor) -> None:
    if query.shape[2] != 1:
        raise ValueError(f"{query.shape[2]} queries: expected one, for a decode step")


def _whole_groups(rows: Tensor, size: int) -> int:
    """Tokens of whole groups; the rest, which these packages keep in f16, is left out."""
    tokens = rows.shape[2] // size * size
    if not tokens:
        raise ValueError(f"{rows.shape[2]} tokens: expected at least {size}, one group")
    return tokens
