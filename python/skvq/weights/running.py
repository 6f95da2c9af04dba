"""How packed weights run: `load` gives a checkpoint's linear layers to a backend.

| backend | a linear layer | for |
|---|---|---|
| `packed` | our own product on the CPU, codes stay packed (product.py) | all bits, decoding and prompts |
| `int4pack` | torch's int4 product, codes stay packed | 4 bits, on a GPU; on the CPU for comparison |
| `dequantized` | the weights in the model's dtype | groups that are no multiple of 32 |

torch's product computes (code − 8) · scale + zero in bfloat16, for which it has vector code; inputs of another dtype
are rounded to bfloat16 on the way in. Many rows at once (prompts) take the same way on the CPU; on a GPU, where that
product is slow at them, the weights of a layer are unpacked for each call. `skvq bench weights` compares.
Is not: a format. Any `pack-quantized` checkpoint with groups, asymmetric or symmetric, is taken, without the package
compressed-tensors. (Left compressed by transformers, such layers unpack at their first call and stay so.)
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._native import SkvqError
from .blocks import replace_module
from .checkpoint import FORMAT, QUANT_METHOD
from .grid import QuantizedWeight
from .head import HEAD_BITS, quantize_head
from .packing import unpack, unpacked_weight
from .product import PackedLinear, PackedWeight

BACKENDS = ("auto", "packed", "int4pack", "dequantized")
PACKED, PARTS = ".weight_packed", ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INT4_GROUPS = (32, 64, 128, 256)  # that torch's product knows
INT4_OUTPUTS = {"cpu": 16, "cuda": 8}  # what the number of outputs must be a multiple of
INNER_TILES = (8, 4, 2)  # of torch's layout on a GPU: the first whose 16-fold divides the inputs
MANY_ROWS = 256  # from which on a GPU unpacks; 512 take 0.64 ms packed, 0.09 in bfloat16 (H100, 4096 × 4096)
CPU = torch.device("cpu")


class Int4Linear(nn.Module):
    """A linear layer on torch's int4 product: input [..., I], output [..., O] in the input's dtype."""

    packed: Tensor
    grid: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device = CPU) -> None:
        """Stays on the device. Raises SkvqError if torch's product does not know this shape, group size or device."""
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.group_size = weight.group_size
        if not self.serves(weight, device):
            raise SkvqError(
                f"int4pack: {self.out_features} outputs in groups of {self.group_size} on {device}: expected a "
                f"multiple of {INT4_OUTPUTS['cpu']} outputs on the CPU or of {INT4_OUTPUTS['cuda']} on a GPU, and "
                f"groups of {', '.join(map(str, INT4_GROUPS))}"
            )
        weight = weight.to(device)
        zeros = (8.0 - weight.zero.float()) * weight.scale
        grid = torch.stack([weight.scale, zeros], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("packed", _int4_codes(weight.codes))
        self.register_buffer("grid", grid.to(torch.bfloat16))  # [G, O, 2]
        self.register_buffer("bias", None if bias is None else bias.detach().to(device))

    @staticmethod
    def serves(weight: QuantizedWeight, device: torch.device = CPU) -> bool:
        """Whether torch's product knows its shape and group size on the device."""
        step = INT4_OUTPUTS.get(device.type)
        return step is not None and weight.group_size in INT4_GROUPS and weight.codes.shape[0] % step == 0

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        on_cpu, operations = hidden.device.type == "cpu", torch.ops.aten
        if not on_cpu and rows.shape[0] >= MANY_ROWS and knows_layout(hidden.device, self.in_features):
            made = rows @ self._unpacked().mT
        else:
            multiply = operations._weight_int4pack_mm_for_cpu if on_cpu else operations._weight_int4pack_mm
            made = multiply(rows, self.packed, self.group_size, self.grid)
        made = made.to(hidden.dtype).unflatten(0, hidden.shape[:-1])
        return made if self.bias is None else made + self.bias

    def _unpacked(self) -> Tensor:
        """bfloat16 [O, I]."""
        scale, zero = (x.mT[..., None] for x in self.grid.unbind(-1))
        codes = unpacked_codes(self.packed).to(torch.bfloat16)
        return codes.unflatten(1, (-1, self.group_size)).sub_(8.0).mul_(scale).add_(zero).flatten(1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


def _int4_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [O, I] in torch's layout of their device, which takes them as int32 or in pairs."""
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    tiles = next(x for x in INNER_TILES if codes.shape[1] % (16 * x) == 0)
    pairs = codes[:, 0::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


@lru_cache
def knows_layout(device: torch.device, inputs: int) -> bool:
    """Whether `unpacked_codes` is right for weights of so many inputs on a GPU: the layout is torch's own matter, and
    another version may have another one. Found out once.
    """
    codes = torch.randint(16, (16, inputs), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)
    return torch.equal(unpacked_codes(_int4_codes(codes)), codes)


def unpacked_codes(packed: Tensor) -> Tensor:
    """Codes uint8 [O, I] of torch's layout on a GPU, int32 [O / 8, I / (16 · tiles), 32 lanes, tiles / 2].

    Lane 4n + q has of output n of a tile, in each word, channels 2q, 2q + 1 and 8 + 2q, 8 + 2q + 1 of two steps of 16:
    byte 2·p + s the channels with parity p of step s, its lower half those below 8.
    """
    outer, steps, _, words = packed.shape
    parts = packed.view(torch.uint8).view(outer, steps, 8, 4, words, 2, 2)  # output, q, word, p, s
    halves = torch.stack([parts & 15, parts >> 4], dim=-1)
    return halves.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(outer * 8, -1)


def _linear(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    outputs, inputs = weight.codes.shape
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.dequantize().to(dtype), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    head_bits: int = 16,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> Any:
    """A causal language model from a `pack-quantized` checkpoint, in eval mode.

    Args:
        directory: of the checkpoint, or a hub id of one.
        dtype: of activations and of what is not quantized; None: what is fastest on this processor, bfloat16 on a GPU.
        backend: one of those at the head of this file; "auto" takes "packed" for layers that it serves, on a GPU
            "int4pack", and "dequantized" for the others.
        head_bits: of the output layer and the embedding, which checkpoints keep in 16 bits: 8, 6 and 4 round them when
            they are loaded, with a scale for each row, for 128 or for 32 inputs. What that costs: docs/weights.md.
        attention: transformers' attention implementation.
        device: where the model is put, "cpu" or a GPU; our own product ("packed", and `head_bits`) is for the CPU.

    Raises:
        SkvqError: an unknown backend or number of bits, a checkpoint of another format, or a layer that the named
            backend does not serve, or not on this device.
    """
    import transformers

    from ..models import fast_dtype

    if backend not in BACKENDS:
        raise SkvqError(f"backend={backend!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    if head_bits not in HEAD_BITS:
        raise SkvqError(f"head_bits={head_bits!r}: expected one of {', '.join(map(str, HEAD_BITS))}")
    place = torch.device(device)
    if place.type != "cpu" and (backend == "packed" or head_bits != 16):
        given = f"backend={backend!r}" if backend == "packed" else f"head_bits={head_bits!r}"
        raise SkvqError(f"{given}: our own product, which is for the CPU, expected another on {place}")
    folder = _folder(directory)
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    bits = checkpoint_bits(getattr(config, "quantization_config", None), str(directory))
    del config.quantization_config
    stored = read_folder(folder)
    names = sorted(name.removesuffix(PACKED) for name in stored if name.endswith(PACKED))
    held = {
        name: {part: stored.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in stored} for name in names
    }
    for name in names:
        # The shape is what loading needs; the memory of one number is enough.
        stored[f"{name}.weight"] = torch.zeros(1).expand(*(int(x) for x in held[name]["weight_shape"]))
    dtype = dtype or (getattr(torch, fast_dtype()) if place.type == "cpu" else torch.bfloat16)
    family: Any = getattr(transformers, config.architectures[0])
    model = family.from_pretrained(None, config=config, state_dict=stored, dtype=dtype, attn_implementation=attention)
    model.eval().requires_grad_(False)
    for name in names:
        made = _layer(name, _weight(held.pop(name), bits), bits, model.get_submodule(name).bias, backend, dtype, place)
        replace_module(model, name, made)
    if head_bits != 16:
        quantize_head(model, head_bits)
    return model.to(place)


def _folder(directory: str | Path) -> Path:
    if Path(directory).is_dir():
        return Path(directory)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(directory)))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a checkpoint. Raises SkvqError if there are none."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.is_file():
        files = [folder / x for x in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    if not files:
        raise SkvqError(f"{folder}: no .safetensors file, expected a checkpoint")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_linears(folder: Path, part: str) -> tuple[dict[str, QuantizedWeight], int]:
    """The packed weights of a checkpoint whose names contain `part`, without a model around them, and their bits."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    bits = checkpoint_bits(getattr(config, "quantization_config", None), str(folder))
    stored = read_folder(folder)
    names = sorted(x.removesuffix(PACKED) for x in stored if x.endswith(PACKED) and part in x)
    parts = {name: {x: stored[f"{name}.{x}"] for x in PARTS if f"{name}.{x}" in stored} for name in names}
    return {name: _weight(held, bits) for name, held in parts.items()}, bits


def checkpoint_bits(found: Any, name: str) -> int:
    """Bits of the layers of the checkpoint `name` with this quantization_config. Raises SkvqError if it is another
    format, or layers differ.
    """
    values = found if isinstance(found, dict) else (found.to_dict() if found is not None else {})
    groups = list((values.get("config_groups") or {}).values())
    if str(values.get("quant_method")) != QUANT_METHOD or values.get("format") != FORMAT or len(groups) != 1:
        raise SkvqError(
            f"{name}: quantization_config has method {values.get('quant_method')!r}, format "
            f"{values.get('format')!r} and {len(groups)} groups: expected {QUANT_METHOD!r}, {FORMAT!r} and 1"
        )
    return int(groups[0]["weights"]["num_bits"])


def _weight(parts: dict[str, Tensor], bits: int) -> QuantizedWeight:
    shape = parts["weight_shape"].tolist()
    if "weight_zero_point" in parts:
        packed, scale, zero = (parts[x] for x in ("weight_packed", "weight_scale", "weight_zero_point"))
        return unpacked_weight(packed, scale, zero, (shape[0], shape[1]), bits)
    scale = parts["weight_scale"].float()
    middle = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight(unpack(parts["weight_packed"], bits, shape[1]), scale, middle)


def _layer(
    name: str,
    weight: QuantizedWeight,
    bits: int,
    bias: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    if backend == "int4pack" and bits != 4:
        raise SkvqError(f"backend='int4pack': {name} has {bits} bits, expected 4, or the backend 'dequantized'")
    on_gpu = device.type != "cpu"
    if backend == "int4pack" or (backend == "auto" and on_gpu and bits == 4 and Int4Linear.serves(weight, device)):
        return Int4Linear(weight, bias, device)
    if backend == "packed" or (backend == "auto" and not on_gpu and PackedWeight.serves(weight)):
        return PackedLinear(PackedWeight(weight, bits), bias)
    return _linear(weight, bias, dtype).to(device)
