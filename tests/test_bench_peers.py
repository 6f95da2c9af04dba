"""Other ways to attend in `skvq bench attend --device cuda`: how each is called, and which are left out.

Is: transformers' QuantizedCache as it is; flash-attn and BitDecoding through stand-ins that take what the authors' own
code takes, and nothing else; what lacks memory. Is not: a word on speed, nor that a kernel runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_models
from skvq.bench import contestants, peers
from skvq.bench.peers import Peer, Prepared
from skvq.evaluate.methods import stock
from skvq.evaluate.methods.stock import STOCK_OPTIONS, quantized_layer

BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


def rows(tokens: int, *, heads: tuple[int, int] = (2, 4), width: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    """Query [2, Hq, 1, D], keys and values [2, Hkv, T, D] in f16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, heads[1], 1, width), (2, heads[0], tokens, width), (2, heads[0], tokens, width))
    return tuple(torch.randn(size, generator=generator).half() for size in sizes)


def named(name: str) -> Peer:
    return next(peer for peer in peers.peers(2) if peer.name == name)


def cache_peer(backend: str) -> Peer:
    pytest.importorskip(BACKENDS[backend], reason=f"QuantizedCache needs {BACKENDS[backend]}, of the extra bench")
    return named(f"QuantizedCache {backend} 2 bits")


def clock(**device: Any) -> Any:
    """Of a device that captures nothing."""
    calls = {"synchronize": lambda: None, "free_bytes": lambda: None} | device
    return SimpleNamespace(device=SimpleNamespace(**calls), recorded=lambda work: (work, False))


def only(monkeypatch: pytest.MonkeyPatch, *found: Peer) -> None:
    """There are no other peers."""
    monkeypatch.setattr(contestants, "peers", lambda group: iter(found))


# ---- transformers' QuantizedCache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantized_cache_attends_to_what_a_model_would_get(backend: str) -> None:
    """The same as a cache that gets a prompt and then token by token, to the last bit."""
    peer = cache_peer(backend)
    from transformers import QuantizedCache

    query, keys, values = rows(300)
    prepared = peer.prepare(query, keys, values)
    config = tiny_models.build("llama").config
    cache = QuantizedCache(backend, config, **(STOCK_OPTIONS[backend] | {"nbits": 2}))
    cache.update(keys[:, :, :236], values[:, :, :236], 0)
    for token in range(236, 300):
        expected = cache.update(keys[:, :, token : token + 1], values[:, :, token : token + 1], 0)
    assert prepared.rows is not None
    for found, wanted, given in zip(prepared.rows(), expected, (keys, values), strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(found[:, :, 236:], given[:, :, 236:])
        assert not torch.equal(found[:, :, :236], given[:, :, :236])
    output = prepared()
    assert output.shape == query.shape
    assert torch.equal(output, prepared())  # nothing has grown
    assert contestants.error_of(output, contestants.exact_outputs(query, *expected)) < contestants.ERROR


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_bytes_of_a_quantized_cache(backend: str, tokens: int) -> None:
    prepared = cache_peer(backend).prepare(*rows(tokens))
    packed = max(1, tokens - 64)
    assert prepared.packed_bytes == 2 * 2 * 2 * packed * 64 * (2 + 32 / 64) / 8
    assert prepared.nbytes == prepared.packed_bytes + 2 * 2 * 2 * (tokens - 1 - packed) * 64 * 2
    assert prepared.rows is not None
    assert prepared.rows()[0].shape == (2, 2, tokens, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_rows_stay_as_they_are(backend: str) -> None:
    """In a layout in which a part of them needs no copy to be contiguous, and in a dtype that needs none either."""
    query, keys, values = (x[:1, :1].float() for x in rows(300))
    before = keys.clone(), values.clone()
    cache_peer(backend).prepare(query, keys, values)()
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_only_what_runs_on_torchs_stream_is_captured() -> None:
    assert cache_peer("hqq").prepare(*rows(100)).captures
    assert not cache_peer("quanto").prepare(*rows(100)).captures


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_quantized_cache_is_not_for(backend: str) -> None:
    peer = cache_peer(backend)
    query, keys, values = rows(100)
    with pytest.raises(ValueError, match="3 queries: expected one"):
        peer.prepare(query.expand(-1, -1, 3, -1), keys, values)
    with pytest.raises(ValueError, match="1 tokens: expected at least 2"):
        peer.prepare(query, keys[:, :, :1], values[:, :, :1])


@pytest.mark.parametrize("name", ["QuantizedCache quanto 2 bits", "kivi 2 bits"])
def test_more_elements_than_a_kernel_counts_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("quant", "quant.new_pack", "quant.matmul"):
        monkeypatch.setitem(
            sys.modules,
            module,
            SimpleNamespace(triton_quantize_and_pack_along_last_dim=None, cuda_bmm_fA_qB_outer=None),
        )
    many = torch.zeros(1, dtype=torch.float16).expand(1, 1, 1 << 25, 64)
    with pytest.raises(ValueError, match="2147483648 elements of keys: expected fewer than 2147483648"):
        named(name).prepare(torch.zeros(1, 1, 1, 64).half(), many, many)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_backend_is_a_reason(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    from transformers import cache_utils

    asked = {"quanto": ("is_optimum_quanto_available", "is_quanto_greater"), "hqq": ("is_hqq_available",)}[backend]
    # Older versions of transformers ask for the version alone.
    name = next(name for name in asked if hasattr(cache_utils, name))
    monkeypatch.setattr(cache_utils, name, lambda *_, **__: False)
    peer = named(f"QuantizedCache {backend} 2 bits")
    only(monkeypatch, peer)
    running, left_out = contestants.others(clock(), *rows(100))
    assert running == []
    assert [x.name for x in left_out] == [peer.name]
    assert left_out[0].reason.startswith("ImportError: You need ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_does_not_fit_is_a_reason(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    peer, freed = cache_peer(backend), list[str]()

    class Full:
        residual_length = 128

        def update(self, keys: Tensor, values: Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB\nand more")

    monkeypatch.setattr(stock, "quantized_layer", lambda backend, bits: Full())
    only(monkeypatch, peer, named("sdpa math"))
    running, left_out = contestants.others(clock(free_bytes=lambda: freed.append("freed")), *rows(100))
    assert [x.name for x in running] == ["sdpa math"]
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB"
    assert left_out == [contestants.LeftOut(peer.name, reason)]
    assert freed


def test_bits_and_backends_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="backend='fp8': expected one of 'quanto', 'hqq'"):
        quantized_layer("fp8", 8)
    pytest.importorskip("hqq")
    with pytest.raises(ValueError, match="`nbits` for `HQQ` backend"):
        quantized_layer("hqq", 5)


# ---- contestants -----------------------------------------------------------------------------------------------------


def test_what_lacks_memory_beside_the_others_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that had enough when it was alone."""
    query, keys, values = rows(50)
    exact, calls = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), list[str]()

    def thirsty() -> Tensor:
        calls.append("call")
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return exact

    prepare: Callable[[Callable[[], Tensor]], peers.Prepare]
    prepare = lambda call: lambda *given: Prepared(call, captures=False)  # noqa: E731
    only(monkeypatch, Peer("thirsty", 16, prepare(thirsty)), Peer("modest", 16, prepare(lambda: exact)))
    running, left_out = contestants.others(clock(), query, keys, values)
    assert [(x.name, x.passed, x.own_rows, x.graph) for x in running] == [("modest", True, False, False)]
    assert left_out == [contestants.LeftOut("thirsty", "OutOfMemoryError: CUDA out of memory")]
    assert running[0].nbytes == running[0].packed_bytes == keys.nbytes + values.nbytes


def test_an_output_is_held_to_the_rows_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in few bits is right if it is attention to its own rows; where those are not known, if it is a number."""
    query, keys, values = rows(50)
    own = (keys + 1).contiguous(), (values * 2).contiguous()
    output = F.scaled_dot_product_attention(query, *own, enable_gqa=True)
    ways = {
        "right": Prepared(lambda: output, nbytes=10, packed_bytes=8, rows=lambda: own),
        "wrong": Prepared(lambda: output.flip(1), rows=lambda: own),
        "of unknown rows": Prepared(lambda: output),
        "no number": Prepared(lambda: output * math.nan),
    }
    only(monkeypatch, *(Peer(name, 2, lambda *given, way=way: way) for name, way in ways.items()))
    running, _ = contestants.others(clock(), query, keys, values)
    found = {x.name: (x.passed, x.own_rows) for x in running}
    expected = {"right": (True, True), "wrong": (False, True)}
    assert found == expected | {"of unknown rows": (True, False), "no number": (False, False)}
    assert (running[0].kind, running[0].nbytes, running[0].packed_bytes) == ("low-bit", 10, 8)


# ---- interfaces of others --------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, L, Hq, D] of q likewise, k and v [B, T, Hkv, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "module"),
    [("flash-attn with_kvcache", "flash_attn"), ("flash-attn 3 with_kvcache", "flash_attn_interface")],
)
@pytest.mark.parametrize("length", [1, 5])
def test_flash_attn_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch, name: str, module: str, length: int) -> None:
    """Every query sees all tokens: without `causal` that is so; rows need be contiguous in the last dimension only."""

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, softmax_scale: float | None = None, causal: bool = False
    ) -> Tensor:
        assert q.shape[0::3] == k_cache.shape[0::3]  # batch and head size
        assert k_cache.shape == v_cache.shape
        assert q.shape[1] == length
        assert {x.stride(-1) for x in (q, k_cache, v_cache)} == {1}
        assert not causal
        return attention(q, k_cache, v_cache, softmax_scale or q.shape[3] ** -0.5)

    stand_in: Any = ModuleType(module)
    stand_in.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, module, stand_in)
    query, keys, values = rows(50)
    query = torch.randn(2, 4, length, 64).half()
    found = named(name).prepare(query, keys, values)()
    expected = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert torch.allclose(found, expected, atol=2e-3)


class StandInBitDecoding(ModuleType):
    """Takes what BitDecoding's main branch takes, and attends to the rows it was given to pack."""

    def __init__(self, several: bool) -> None:
        super().__init__("bit_decode")
        self.several = several

    def kvcache_pack_int(
        self,
        k_cache: Tensor,
        k_pack: Tensor,
        k_params: Tensor,
        v_cache: Tensor,
        v_pack: Tensor,
        v_params: Tensor,
        opt_block_table: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqlen_k: int = 0,
        quant_mode: str = "k-channel",
        group_size: int = 128,
        num_bits: int = 4,
    ) -> None:
        batch, tokens, heads, width = k_cache.shape
        assert (width, k_cache.dtype, tokens % 256) == (128, torch.float16, 0)
        assert v_cache.shape == k_cache.shape
        assert k_cache.is_contiguous()
        assert v_cache.is_contiguous()
        assert cu_seqlens_k is not None
        assert cu_seqlens_k.tolist() == [tokens * index for index in range(batch + 1)]
        assert cu_seqlens_k.dtype == torch.int32
        assert (seqlen_k, quant_mode, opt_block_table) == (tokens, "k-channel", None)
        held = 16 // num_bits
        assert k_pack.shape == (batch, tokens // held, heads, width)
        assert v_pack.shape == (batch, tokens, heads, width // held)
        assert k_params.shape == (batch, tokens // group_size, heads, width)
        assert v_params.shape == (batch, width // group_size, heads, tokens)
        assert {k_pack.dtype, v_pack.dtype} == {torch.uint16}
        assert {k_params.dtype, v_params.dtype} == {torch.float32}
        self.packed = (k_pack, k_params, v_pack, v_params), group_size, num_bits
        self.rows = k_cache, v_cache

    def fwd_kvcache_int(
        self,
        q: Tensor,
        k_pack: Tensor,
        k_params: Tensor,
        v_pack: Tensor,
        v_params: Tensor,
        opt_block_table: Tensor | None = None,
        softmax_scale: float = 1.0,
        quant_mode: str = "k-channel",
        group_size: int = 128,
        num_bits: int = 4,
    ) -> Any:
        given = (k_pack, k_params, v_pack, v_params)
        assert all(x is y for x, y in zip(given, self.packed[0], strict=True))
        assert self.packed[1:] == (group_size, num_bits)
        assert (quant_mode, opt_block_table) == ("k-channel", None)
        assert q.shape[1] == 1
        found = attention(q, *self.rows, softmax_scale)
        return (found, *given) if self.several else found


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("several", [False, True])
def test_bitdecoding_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch, bits: int, several: bool) -> None:
    monkeypatch.setitem(sys.modules, "bit_decode", StandInBitDecoding(several))
    query, keys, values = rows(600, width=128)
    peer = named(f"bitdecoding {bits} bits")
    prepared = peer.prepare(query, keys, values)
    expected = F.scaled_dot_product_attention(query, keys[:, :, :512], values[:, :, :512], enable_gqa=True)
    assert torch.allclose(prepared(), expected, atol=2e-3)
    # Codes, and in 32 bits a scale and a zero point of 128 elements.
    assert prepared.nbytes == 2 * 2 * 2 * 512 * 128 * (bits + 32 / 128) / 8
    for width, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        wrong = tuple(x[..., :width].to(dtype) for x in (query, keys, values))
        with pytest.raises(ValueError, match=rf"{dtype}, head size {width}: expected float16 and 128"):
            peer.prepare(*wrong)
    with pytest.raises(ValueError, match="255 tokens: expected at least 256, one group"):
        peer.prepare(query, keys[:, :, :255], values[:, :, :255])


def test_rows_lie_in_the_pages_of_flashinfer() -> None:
    rows = torch.randn(2, 3, 50, 8)
    pages = peers.flashinfer_pages(rows)
    assert pages.shape == (2 * 4, 3, 16, 8)
    assert pages.is_contiguous()
    for batch, head, row in ((0, 0, 0), (1, 2, 49), (0, 1, 17)):
        assert torch.equal(pages[batch * 4 + row // 16, head, row % 16], rows[batch, head, row])
    assert not pages[3, :, 2:].any()


def test_bits_of_bitdecoding() -> None:
    for bits, group in ((2, 32), (4, 128)):
        codes, scales, value_codes, value_scales = peers.bitdecoding_shapes(2, 256, 8, 128, bits, group)
        elements = 2 * 256 * 8 * 128
        for shape in (codes, value_codes):
            assert math.prod(shape) * 16 == elements * bits
        for shape in (scales, value_scales):
            assert math.prod(shape) == elements // group


def test_torch_attends_alike_in_all_its_ways() -> None:
    query, keys, values = (torch.randn(2, heads, n, 64) for heads, n in ((4, 1), (2, 40), (2, 40)))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    compared = 0
    for peer in peers.peers(2):
        if not peer.name.startswith("sdpa"):
            continue
        try:
            found = peer.prepare(query, keys, values)()
        except RuntimeError:  # a backend that a CPU does not have
            continue
        assert torch.allclose(found, expected, atol=1e-5)
        compared += 1
    assert compared
    assert {peer.bits for peer in peers.peers(1)} == {16, 2, 4}
