"""Who else computes decode attention on a GPU: torch's backends, flash-attn and FlashInfer in f16, BitDecoding and
KIVI in few bits.

Is: for each, how it is called on given keys and values without copies that its kernel does not need, or why it cannot
be. Is not: timed here, nor trusted: whoever times it compares its output first. Packages are imported when a benchmark
asks for them; their interfaces are those of their own pages and tests, and a call that fails is a reason in the report.
Shapes: query [B, Hq, L, D]; keys and values [B, Hkv, T, D], f16, contiguous; output [B, Hq, L, D]. Every query sees all
tokens. L is 1 but for chunks of a prompt.
"""

from __future__ import annotations

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
_LOW_BITS = {2: 32, 4: 128}  # bits: rows that share a scale, by their authors' defaults
_BITDECODING_CONTAINER = 16  # bits
_KIVI_ELEMENTS = 1 << 31  # of keys; its kernels count them in 32 bits, and a fault would end the process


@dataclass(frozen=True)
class Uncaptured:
    """A call that must not be recorded in a CUDA graph."""

    call: Call

    def __call__(self) -> Tensor:
        return self.call()


@dataclass(frozen=True)
class Peer:
    """A way to attend.

    Attributes:
        name: as in reports.
        bits: of an element of keys and values.
        prepare: query, keys and values to a call, or an `Uncaptured` one; raises what the package raises if it cannot
            serve them.
    """

    name: str
    bits: int
    prepare: Callable[[Tensor, Tensor, Tensor], Call]


def peers(group: int) -> Iterator[Peer]:
    """All of them, for `group` query heads of a kv head."""
    yield from _torch_peers(group)
    yield Peer("flash-attn with_kvcache", 16, _flash_attn)
    for name, tensor_cores in (("flashinfer", False), ("flashinfer tensor cores", True)):
        yield Peer(name, 16, _flashinfer(tensor_cores))
    for bits in _LOW_BITS:
        yield Peer(f"bitdecoding {bits} bits", bits, _bitdecoding(bits))
        yield Peer(f"kivi {bits} bits", bits, _kivi(bits))


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


def _sdpa(backend: Any, *, as_positions: bool) -> Callable[[Tensor, Tensor, Tensor], Call]:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Call:
        from torch.nn.attention import sdpa_kernel

        folded = query.view(query.shape[0], keys.shape[1], -1, query.shape[3]) if as_positions else query

        def call() -> Tensor:
            with sdpa_kernel(backend):
                found = F.scaled_dot_product_attention(folded, keys, values, enable_gqa=not as_positions)
            return found.reshape(query.shape)

        return call

    return prepare


def _flash_attn(query: Tensor, keys: Tensor, values: Tensor) -> Call:
    package = importlib.import_module("flash_attn")
    rows = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)  # [B, T, H, D]
    return lambda: package.flash_attn_with_kvcache(*rows).transpose(1, 2)


def _flashinfer(tensor_cores: bool) -> Callable[[Tensor, Tensor, Tensor], Call]:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Call:
        package = importlib.import_module("flashinfer")
        batch, heads, length, width = query.shape
        if batch == 1 and length > 1:
            many = query[0].transpose(0, 1).contiguous(), keys[0], values[0]
            call = package.single_prefill_with_kv_cache
            return lambda: call(*many, causal=False, kv_layout="HND").transpose(0, 1)[None]
        _one_query(query)
        if batch == 1:
            options = {"kv_layout": "HND", "use_tensor_cores": tensor_cores}
            one = query[0, :, 0], keys[0], values[0]
            return lambda: package.single_decode_with_kv_cache(*one, **options)[None, :, None]
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
        return Uncaptured(lambda: wrapper.run(rows, paged)[:, :, None])

    return prepare


def flashinfer_pages(rows: Tensor) -> Tensor:
    """Rows [B, H, T, D] as FlashInfer's pages [B · pages, H, 16, D], those of a sequence one behind the other."""
    batch, heads, tokens, width = rows.shape
    pages = -(-tokens // FLASHINFER_PAGE)
    whole = F.pad(rows, (0, 0, 0, pages * FLASHINFER_PAGE - tokens))
    split = whole.view(batch, heads, pages, FLASHINFER_PAGE, width)
    return split.transpose(1, 2).reshape(batch * pages, heads, FLASHINFER_PAGE, width)


# ---- few bits --------------------------------------------------------------------------------------------------------


def _bitdecoding(bits: int) -> Callable[[Tensor, Tensor, Tensor], Call]:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Call:
        package = importlib.import_module("bit_decode")
        _one_query(query)
        group, tokens = _LOW_BITS[bits], _whole_groups(keys, 128)
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
            output: Tensor = found[0] if isinstance(found, tuple) else found  # newer ones return more
            return output.transpose(1, 2)

        return call

    return prepare


def bitdecoding_shapes(
    batch: int, tokens: int, heads: int, width: int, bits: int, group: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of codes and parameters of keys (along tokens), then of values (along channels)."""
    held = _BITDECODING_CONTAINER // bits
    keys = (batch, tokens // held, heads, width), (batch, tokens // group, heads, width)
    return *keys, (batch, tokens, heads, width // held), (batch, width // group, heads, tokens)


def _kivi(bits: int) -> Callable[[Tensor, Tensor, Tensor], Call]:
    def prepare(query: Tensor, keys: Tensor, values: Tensor) -> Call:
        pack = importlib.import_module("quant.new_pack").triton_quantize_and_pack_along_last_dim
        product = importlib.import_module("quant.matmul").cuda_bmm_fA_qB_outer
        if keys.numel() >= _KIVI_ELEMENTS:
            raise ValueError(f"{keys.numel()} elements of keys: expected fewer than {_KIVI_ELEMENTS}")
        group = min(_LOW_BITS[bits], keys.shape[3])
        tokens = _whole_groups(keys, group)
        packed_keys = pack(keys[:, :, :tokens].transpose(2, 3).contiguous(), group, bits)
        packed_values = pack(values[:, :, :tokens].contiguous(), group, bits)

        def call() -> Tensor:
            scores = product(group, query, *packed_keys, bits) / math.sqrt(query.shape[3])
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            output: Tensor = product(group, weights, *packed_values, bits)
            return output

        return call

    return prepare


def _one_query(query: Tensor) -> None:
    if query.shape[2] != 1:
        raise ValueError(f"{query.shape[2]} queries: expected one, for a decode step")


def _whole_groups(rows: Tensor, size: int) -> int:
    """Tokens of whole groups; the rest, which these packages keep in f16, is left out."""
    tokens = rows.shape[2] // size * size
    if not tokens:
        raise ValueError(f"{rows.shape[2]} tokens: expected at least {size}, one group")
    return tokens
