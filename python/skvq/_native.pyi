"""Packed rows, the layer store and attention on packed bytes, in Rust.

Tensors are any CPU objects with ``__dlpack__`` (torch, numpy, ...): read and written in place, never copied. The
interpreter is released while Rust works; nobody else may write to the tensors of a call meanwhile. Everything that is
refused raises :class:`SkvqError`, whose message names the argument, what was expected and what was found; nothing is
changed then.

B: batch, Hkv: key/value heads, Hq: query heads, n: new tokens, L: queries, T: stored tokens, D: channels of a head (Dk
of a key, Dv of a value).
"""

from collections.abc import Callable, Sequence
from os import PathLike
from types import ModuleType
from typing import Any, Protocol, final

from numpy.typing import NDArray

__version__: str
testing: ModuleType
"""Probes of the DLPack exchange and of CUDA, for the tests."""

class _Tensor(Protocol):
    """A CPU tensor that exports DLPack, without gradient, negative or conjugate bit."""

    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...

class SkvqError(ValueError):
    """An argument that skvq refuses; nothing was changed."""

@final
class OwnedTensor:
    """A compact CPU tensor in Rust's memory: ``torch.from_dlpack`` or ``numpy.asarray`` read it without a copy."""

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The same memory as a numpy array, unless another dtype or a copy is asked for."""
    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

@final
class Codec:
    """How the rows of one stream (the keys or the values of a layer) are packed. Immutable.

    Args:
        head_dim: channels of a row, a multiple of 16.
        format: ``"8"``, ``"4"``, ``"3"``, ``"2"`` bits, ``"1.6"`` (ternary), ``"1.5"`` (pairs), ``"raw"`` (the
            layer's dtype) or ``"parts"`` (behind a matrix, FORMAT.md §6).
        group_size: channels that share a scale: 32, 64, 128 or head_dim, a divisor of head_dim.
            None: 128 if that divides head_dim, else head_dim.
        metadata: dtype of scales and zero points, ``"e4m3"`` or ``"fp16"``.
        symmetric: a scale only; False adds a zero point.
        codebook: ``"uniform"``, ``"lloyd-max"``, ascending levels, or eight pairs for format ``"1.5"``.
            None: ``"uniform"`` for formats ``"8"`` and ``"2"``, else ``"lloyd-max"``.
        rule: the scale follows the group's ``"norm"`` or its ``"range"``.
        clip: factor on the scale (SKVQ's alpha).
        refinements: least-squares steps that refit the scale to the codes.
        unbiased: the stored scale makes <d, decoded d> = |d|^2 for every group d, instead of its squared error least.
        rotation: ``"hadamard"`` over the head, or ``"identity"``. None: ``"identity"`` for parts, else ``"hadamard"``.
        permutation: order of the channels after the rotation, one for all heads or one for each.
        block: 0: static shift and scale; else a multiple of 128: rows of a block that yields its own.
        block_shift: block statistics subtract the mean.
        scale_exponent: power of the standard deviation in block statistics, 0 to 1.
        query_exponent: power of 1 / (root mean square of the queries) in block statistics of keys, 0 to 1.
        shift: static shift, float32 ``[heads, D]``; not together with block.
        scale: static scale, float32 ``[heads, D]``; not together with block.
        parts: bits and width of every part, with format ``"parts"`` only: 1 to 5 bits, for the last also 0, widths
            that are multiples of 16 and add up to head_dim. Of the arguments above, head_dim, metadata, the name of a
            codebook, clip and shift go with parts.
        matrix: M, with which rows of parts are packed, float32 ``[heads, D, D]``.
        inverse: B, with which they are read, float32 ``[heads, D, D]``.
        shift_sine: shift turned by a quarter, float32 ``[heads, D]``: the mean turns with a row's position.
        frequencies: by which angle from row to row, float32 ``[D]``; together with shift_sine.
        noise: variance of every packed channel's error in units of the squared scale, float32 ``[D]``; attention takes
            what it does to scores off them.

    Raises:
        SkvqError: a value outside these, or a combination that FORMAT.md excludes.
    """

    def __new__(
        cls,
        *,
        head_dim: int,
        format: str,
        group_size: int | None = None,
        metadata: str = "e4m3",
        symmetric: bool = True,
        codebook: str | Sequence[float] | Sequence[tuple[float, float]] | None = None,
        rule: str = "norm",
        clip: float = 1.0,
        refinements: int = 0,
        unbiased: bool = False,
        rotation: str | None = None,
        permutation: Sequence[int] | Sequence[Sequence[int]] | None = None,
        block: int = 0,
        block_shift: bool = True,
        scale_exponent: float = 1.0,
        query_exponent: float = 0.0,
        shift: _Tensor | None = None,
        scale: _Tensor | None = None,
        parts: Sequence[tuple[int, int]] | None = None,
        matrix: _Tensor | None = None,
        inverse: _Tensor | None = None,
        shift_sine: _Tensor | None = None,
        frequencies: _Tensor | None = None,
        noise: _Tensor | None = None,
    ) -> Codec: ...
    def encode(
        self,
        rows: _Tensor,
        head: int = 0,
        statistics: tuple[_Tensor, _Tensor] | None = None,
        isa: str | None = None,
        position: int = 0,
    ) -> OwnedTensor:
        """Pack rows, float32 ``[N, D]``, into uint8 ``[N, row_bytes]``: the codes of each row, then its metadata.

        Args:
            rows: float32 ``[N, D]``.
            head: whose static shift, scale and permutation to use.
            statistics: shift and scale, float32 ``[D]`` each, for a codec with blocks (optional for a static one).
            isa: one of :func:`available_isas`, or ``"reference"`` for the plain implementation; None: the best.
            position: of the first row, for a mean that turns.

        Raises:
            SkvqError: format ``"raw"``, wrong shape or dtype, or statistics missing for a codec with blocks.
        """
    def decode(
        self,
        packed: _Tensor,
        head: int = 0,
        statistics: tuple[_Tensor, _Tensor] | None = None,
        position: int = 0,
    ) -> OwnedTensor:
        """The inverse of :meth:`encode`: uint8 ``[N, row_bytes]`` to float32 ``[N, D]``."""
    def block_statistics(self, rows: _Tensor, factors: _Tensor | None = None) -> tuple[OwnedTensor, OwnedTensor]:
        """Shift and scale, float32 ``[D]`` each, of a block of these rows, float32 ``[N, D]`` (FORMAT.md §4).

        `factors`, float32 ``[D]``, go into the scales: :meth:`Layer.query_factors`.
        """
    def levels(self) -> list[float] | list[tuple[float, float]]:
        """The codebook: levels, or pairs for format ``"1.5"``. Refused for parts, each of which has its own."""
    @property
    def head_dim(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row: codes and metadata."""
    @property
    def code_bytes(self) -> int: ...
    @property
    def metadata_bytes(self) -> int: ...
    @property
    def bits_per_element(self) -> float:
        """Bits of an element in a full page: codes, metadata and block statistics."""
    @property
    def block(self) -> int:
        """Rows of a block of statistics, 0 for static ones."""

@final
class Layer:
    """One attention layer's store for every (sequence, kv head): sinks, then the packed past, then the window.

    Tokens ``[0, sink_tokens)`` and the last ``window_tokens`` are held in ``dtype``, those between are packed. The
    first append fixes the batch size.

    Args:
        num_key_value_heads: Hkv.
        keys: codec of the keys.
        values: codec of the values.
        sinks: tokens at the start that are never packed.
        window: the most recent tokens that are not packed yet.
        dtype: of the model: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        nonfinite: ``"raise"`` refuses rows with a NaN or an infinity, ``"propagate"`` stores them to decode to NaN.
        isa: one of :func:`available_isas`; None: the best.

    Raises:
        SkvqError: codecs made for another number of heads, or a value outside these.
    """

    def __new__(
        cls,
        *,
        num_key_value_heads: int,
        keys: Codec,
        values: Codec,
        sinks: int,
        window: int,
        dtype: str,
        nonfinite: str = "raise",
        isa: str | None = None,
    ) -> Layer: ...
    def append(self, keys: _Tensor, values: _Tensor, query: _Tensor | None = None) -> None:
        """Store n new tokens: keys ``[B, Hkv, n, Dk]``, values ``[B, Hkv, n, Dv]`` in the layer's dtype, any strides.

        Rows that leave the window are packed, each once; with block statistics, not before its block's last is there.
        `query` ``[B, Hq, L, Dk]``: of the last L of these tokens, where it is known, as in `observe_queries`.

        Raises:
            SkvqError: wrong shape, dtype or batch size, or a NaN or an infinity under ``nonfinite="raise"``.
        """
    def check(self, keys: _Tensor, values: _Tensor) -> None:
        """Raise SkvqError where `append` would; nothing is stored."""
    def observe_queries(self, query: _Tensor) -> None:
        """Take note of the queries ``[B, Hq, L, Dk]`` of the last L tokens, while `wants_queries`.

        Raises:
            SkvqError: wrong shape, or more queries than tokens.
        """
    def query_factors(self, batch: int, head: int) -> OwnedTensor | None:
        """What queries have put on the scales of a head's channels, float32 ``[Dk]``; None before it is fixed."""
    @property
    def wants_queries(self) -> bool:
        """Whether queries still have a say in how keys are packed."""
    def set_padding(self, padding: Sequence[int]) -> None:
        """Before the first append: tokens of padding in front of each sequence that it will bring.

        Padding is stored as zeros, takes no place of a sink, has no part in block statistics and is seen by no query.
        Lasts until ``reset``; ``gather`` takes it along.

        Raises:
            SkvqError: the layer has tokens. A later append of another batch size is refused.
        """
    def score_noise(self, query: _Tensor, scale: float) -> float:
        """Mean variance of the error that packing made in the scores of packed keys, as the codec expects it.

        The last query of ``query`` ``[B, Hq, L, Dk]`` counts; 0 if no key is packed.

        Raises:
            SkvqError: another shape.
        """
    def attend(
        self,
        query: _Tensor,
        output: _Tensor,
        *,
        scale: float,
        mask: _Tensor | None = None,
        causal: bool = False,
        softcap: float | None = None,
        sink_logits: _Tensor | None = None,
        fresh_keys: _Tensor | None = None,
        fresh_values: _Tensor | None = None,
    ) -> None:
        """Write softmax(scale * q k^T + mask) v over all T stored tokens to ``output``.

        Args:
            query: ``[B, Hq, L, Dk]``, Hq a multiple of Hkv.
            output: ``[B, Hq, L, Dv]`` in the query's dtype, memory apart from all inputs.
            scale: factor on the scores.
            mask: ``[B or 1, Hq or 1, L or 1, T]``, bool (True: visible) or added to the scores.
            causal: query l sees the tokens up to T - L + l.
            softcap: scores become softcap * tanh(score / softcap), before the mask.
            sink_logits: float32 ``[Hq]``, one more score a head that takes part in the softmax and has no value.
            fresh_keys: ``[B, Hkv, n, Dk]``, the last append's rows in full precision, used in place of the stored ones.
            fresh_values: ``[B, Hkv, n, Dv]``, likewise; both or neither.

        Raises:
            SkvqError: wrong shape, dtype or strides, or an output that cannot be written.
        """
    def decode_keys(self, output: _Tensor) -> None:
        """Write all keys, decoded, to ``output`` ``[B, Hkv, T, Dk]`` in the layer's dtype."""
    def decode_values(self, output: _Tensor) -> None:
        """Write all values, decoded, to ``output`` ``[B, Hkv, T, Dv]`` in the layer's dtype."""
    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on; rows that were packed stay packed."""
    def gather(self, indices: Sequence[int]) -> None:
        """Make the batch its old rows ``indices``: reorder, select, repeat. Pages are copied only when written."""
    def reset(self) -> None:
        """Forget all tokens and the batch size."""
    def clone(self) -> Layer:
        """An independent layer that shares all pages until one of them is written."""
    @property
    def length(self) -> int:
        """T, the stored tokens of a sequence."""
    @property
    def batch_size(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of everything held; what sequences share counts once."""
    @property
    def bits_per_element(self) -> float:
        """8 * nbytes over the number of stored key and value elements."""
    @property
    def sink_tokens(self) -> int: ...
    @property
    def packed_tokens(self) -> int: ...
    @property
    def window_tokens(self) -> int:
        """Tokens in full precision at the end: the window, and rows that wait for the last row of their block."""
    @property
    def isa(self) -> str: ...
    @property
    def attend_seconds(self) -> float:
        """What the arithmetic of the last ``attend`` took, without the exchange of tensors; 0 before the first."""

def available_isas() -> list[str]:
    """Instruction sets of this processor that skvq has code for, best first: avx512, avx2, neon, portable."""

def num_threads() -> int:
    """Threads that share the work of one call."""

def set_num_threads(n: int) -> None:
    """Set :func:`num_threads`, at least 1."""

def weights_multiply(
    rows: _Tensor,
    codes: _Tensor,
    scales: _Tensor,
    zeros: _Tensor,
    output: _Tensor,
    *,
    bits: int,
    isa: str | None = None,
) -> None:
    """Write the product of rows of inputs with packed weights, ``scale * (code - zero)``, to ``output``.

    Args:
        rows: float32 [N, I]; made for few rows, work grows with N.
        codes: uint8 [O, bytes of a row]: I for 8 bits, 64 for every 128 inputs for 4; layout in src/backend/weights.rs.
        scales: float32 or bfloat16 [O, G], groups of I / G inputs, a multiple of 32.
        zeros: uint8 [O, G].
        output: float32 [N, O].
        bits: 4 or 8.
        isa: one of :func:`available_isas`; None: the best.

    All are contiguous.
    """

def weights_decode(
    codes: _Tensor,
    scales: _Tensor,
    zeros: _Tensor,
    output: _Tensor,
    *,
    bits: int,
    first: int = 0,
    isa: str | None = None,
) -> None:
    """Write the weights of n outputs from ``first`` on to ``output``, float32 [n, I]; the others as above."""

@final
class CompiledKernel:
    """A CUDA kernel compiled for one architecture."""

    @property
    def cubin(self) -> bytes:
        """What the driver loads."""
    @property
    def name(self) -> str:
        """The kernel's name in the cubin."""
    @property
    def log(self) -> str:
        """What the compiler said: warnings, registers, spills, shared memory."""
    @property
    def cached(self) -> bool:
        """It came from the disk cache."""

def cuda_status() -> dict[str, Any]:
    """Whether CUDA can be used, and on what; never raises for a machine without.

    Returns:
        ``usable``; ``reason``, which says what is missing and what to do, None if nothing is; ``driver_version``, the
        newest CUDA that the driver is made for, ``(major, minor)`` or None; ``devices``, each with ``name``, ``arch``
        (such as ``"sm_90a"``), ``multiprocessors``, ``shared_bytes_per_block`` and ``l2_bytes``.
    """

def cuda_nvrtc(nvrtc: str) -> tuple[tuple[int, int], list[str]]:
    """Version of the NVRTC at a path, ``(major, minor)``, and the architectures that it compiles the kernels for.

    Raises:
        SkvqError: it cannot be opened, or lacks a function.
    """

def cuda_compile(
    nvrtc: str, file: str, kernel: str, arguments: Sequence[str], arch: str, cache: str | PathLike[str] | None = None
) -> CompiledKernel:
    """Compile one kernel, or find it on disk.

    Args:
        nvrtc: path of libnvrtc.
        file: which of the embedded kernel files defines it.
        kernel: its name.
        arguments: of the template, as C++ text; empty for a kernel that is no template.
        arch: such as ``"sm_80"`` or ``"sm_90a"``.
        cache: directory for compiled kernels; None: ``$SKVQ_CACHE_DIR`` (empty: none), ``$XDG_CACHE_HOME/skvq`` or
            ``~/.cache/skvq``. One that cannot be read or written costs time and nothing else.

    Raises:
        SkvqError: the kernel does not compile (the message has the compiler's log), or NVRTC does not know the
            architecture.
    """

def cuda_compile_many(
    nvrtc: str,
    jobs: Sequence[tuple[tuple[str, str, Sequence[str]], str]],
    cache: str | PathLike[str] | None = None,
    done: Callable[[int], object] | None = None,
) -> list[CompiledKernel]:
    """Compile ((file, kernel, arguments), arch) for every job on all threads; ``done(i)`` tells that job i is finished.

    Raises:
        SkvqError: of the first job that failed, when all are finished.
    """

class _TorchTensor(Protocol):
    """A torch tensor on the layer's device."""

    def data_ptr(self) -> int: ...
    def get_device(self) -> int: ...
    def stride(self) -> tuple[int, ...]: ...

@final
class CudaLayer:
    """One attention layer's store on a GPU, as :class:`Layer` is on the CPU: the same regions, rows and attention.

    Every call puts its work on the stream that ``stream`` tells and returns; none waits but the constructor and
    those that say so. A layer and its clones are used on one stream, or on streams that the
    caller orders; it is torch's current stream, for which ``allocate`` lends. Tensors of a call must stay as they are
    until the stream is past it; torch sees to that for tensors that were made on this stream. Channels of a row must
    lie together.

    Args:
        num_key_value_heads: Hkv.
        keys: how keys are packed, head_dim at most 256.
        values: likewise. Where only one of both is packed, attention decodes it at every call.
        sinks: first tokens that stay as they are.
        window: last tokens that stay as they are, at least 1.
        dtype: of keys, values, queries and outputs: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        allocate: called with a number of bytes, returns a tensor of as many on the device, at a multiple of 256 bytes,
            such as ``functools.partial(torch.empty, dtype=torch.uint8, device="cuda")``. The layer keeps what it gets
            as long as it uses it.
        nvrtc: path of the compiler for kernels that are not compiled yet.
        stream: tells the number of torch's current stream on the device: ``torch.cuda.current_stream().cuda_stream``.
        device: its number, as torch counts.
        nonfinite: ``"propagate"``: a row with a NaN or an infinity decodes to NaN and is counted. ``"raise"`` is not
            supported: finding out would wait for the device.
        cache: directory of compiled kernels, as for :func:`cuda_compile`.
        host_memory: tensors are the CPU's, which an emulated driver takes for its own.
        workspace_bytes: that attention borrows at a time; queries that need more are taken in turns. None: 256 MiB.

    Raises:
        SkvqError: CUDA cannot be used, a kernel does not compile, or options that no kernel has.
    """

    def __new__(
        cls,
        *,
        num_key_value_heads: int,
        keys: Codec,
        values: Codec,
        sinks: int,
        window: int,
        dtype: str,
        allocate: Callable[[int], _TorchTensor],
        nvrtc: str,
        stream: Callable[[], int],
        device: int = 0,
        nonfinite: str = "propagate",
        cache: str | PathLike[str] | None = None,
        host_memory: bool = False,
        workspace_bytes: int | None = None,
    ) -> CudaLayer: ...
    def append(self, keys: _TorchTensor, values: _TorchTensor, query: _TorchTensor | None = None) -> None:
        """Store n tokens: keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv]; query as for :meth:`Layer.append`.

        Refused, it changes nothing. The token of a decode step may wait for its attention, which stores it in the same
        launch, or else for the next call of the layer, which stores it first: until then its tensors must not be
        written. The layer keeps them alive.
        """
    def check(self, keys: _TorchTensor, values: _TorchTensor) -> None:
        """Refuse what :meth:`append` would refuse."""
    def observe_queries(self, query: _TorchTensor) -> None:
        """As :meth:`Layer.observe_queries`."""
    def query_factors(self, batch: int, head: int) -> OwnedTensor | None:
        """As :meth:`Layer.query_factors`, within a step of fp16. Waits for the stream."""
    def score_noise(self, query: _TorchTensor, scale: float) -> float:
        """As :meth:`Layer.score_noise`. Waits for the stream."""
    @property
    def wants_queries(self) -> bool:
        """As :attr:`Layer.wants_queries`."""
    def attend(
        self,
        query: _TorchTensor,
        output: _TorchTensor,
        *,
        scale: float,
        mask: _TorchTensor | None = None,
        causal: bool = False,
        softcap: float | None = None,
        sink_logits: _TorchTensor | None = None,
        fresh_keys: _TorchTensor | None = None,
        fresh_values: _TorchTensor | None = None,
    ) -> None:
        """Attention over all T tokens, softmax(scale·q·kᵀ + mask)·v; a query that sees nothing gives zeros.

        Behind an append of one token the call may store it, too (:meth:`append`): a graph that is captured outside
        `begin_capture` must not hold this one.

        Args:
            query: [B, Hq, L, Dk].
            output: [B, Hq, L, Dv], written.
            scale: of the scores.
            mask: [B or 1, Hq or 1, L or 1, T], bool (True: seen) or float (added).
            causal: of the L queries, which are of the last L tokens, none sees tokens behind its own.
            softcap: scores become softcap·tanh(score / softcap).
            sink_logits: float32 [Hq], in the denominator of the softmax.
            fresh_keys: [B, Hkv, n, Dk], the last append's rows in full precision, used in place of the stored ones.
            fresh_values: [B, Hkv, n, Dv], likewise; both or neither.
        """
    def decode_keys(self, output: _TorchTensor) -> None:
        """Write all keys, decoded, to output [B, Hkv, T, Dk]."""
    def decode_values(self, output: _TorchTensor) -> None:
        """Write all values, decoded, to output [B, Hkv, T, Dv]."""
    def set_padding(self, padding: Sequence[int]) -> None:
        """As :meth:`Layer.set_padding`."""
    def crop(self, length: int) -> None:
        """As :meth:`Layer.crop`; what was reserved is given back."""
    def gather(self, indices: Sequence[int]) -> None:
        """As :meth:`Layer.gather`; sinks, window and tables are copied, pages are not."""
    def reserve(self, tokens: int) -> None:
        """Take pages, and statistics of blocks, for so many tokens in all, so that a step of one token can be captured
        and replayed.

        Raises:
            SkvqError: an empty layer, fewer tokens than there are, or raw rows.
        """
    @property
    def capacity(self) -> int | None:
        """Tokens that there are pages for; None in a layer that grows as it needs."""
    def begin_capture(self) -> None:
        """What follows is recorded by the caller's graph and does not run: one append of one token, then attention of
        single queries without a mask, then `observe_queries` of these while the layer wants them. Keys, values, queries
        and outputs stay where they are; kernels must have run before. The recorded launches read lengths on the device,
        and each replay adds a token.

        Raises:
            SkvqError: nothing is reserved or all of it is used, the window is not full, or a copy shares the last page.
        """
    def end_capture(self) -> None:
        """The layer holds what it held before, and a captured step may run at any time. Until `release_capture`
        the layer can neither be cropped, gathered, copied nor reset.

        Raises:
            SkvqError: nothing has attended to the token of the step, which is not to be replayed then.
        """
    def replayed(self, steps: int) -> None:
        """The captured step has run so many times since this was last called; before the first call nothing else is
        done with the layer. Raises SkvqError if there are no pages for as many tokens.
        """
    def release_capture(self) -> None:
        """No captured step will run any more."""
    def reset(self) -> None:
        """As :meth:`Layer.reset`."""
    def clone(self) -> CudaLayer:
        """An independent layer that shares all pages until one of them is written."""
    @property
    def one_launch(self) -> bool | None:
        """Whether attention of up to eight queries of a kv head is one launch and a merge, not one for each part of it.

        None: where that is expected to be faster: always, but for long pasts with matrices. Never where there are so
        many short splits that each has a warp of its own (long pasts with statistics of blocks). For new layers: what
        ``SKVQ_ONE_LAUNCH`` says in the environment, ``0`` or ``1``. Outputs differ by float noise. A captured step
        keeps what it was captured with.
        """
    @one_launch.setter
    def one_launch(self, one_launch: bool | None) -> None: ...
    def nonfinite_rows(self) -> int:
        """Packed rows of keys, and of values, that were not finite. Waits for the stream.

        Raises:
            SkvqError: a captured step was replayed more often than the layer was told, or than there is room for.
        """
    @property
    def length(self) -> int:
        """T."""
    @property
    def batch_size(self) -> int:
        """B, 0 before the first append."""
    @property
    def num_key_value_heads(self) -> int:
        """Hkv."""
    @property
    def nbytes(self) -> int:
        """Device memory held: pages with those that are free, sinks, window, tables, statistics."""
    @property
    def bits_per_element(self) -> float:
        """8 * nbytes over the number of stored key and value elements."""
    @property
    def sink_tokens(self) -> int:
        """Tokens that stay as they are in front."""
    @property
    def packed_tokens(self) -> int:
        """Packed tokens."""
    @property
    def window_tokens(self) -> int:
        """Tokens in full precision at the end."""
