"""A quantized model as a checkpoint of Hugging Face: compressed-tensors' `pack-quantized`, nothing of skvq in it.

Is: `model.safetensors` (in parts of 5 GB at most), `config.json` with its quantization_config, the generation
configuration, tokenizer files. Is not: how such weights run (running.py), or the plan of the cache, which lies beside.

Two entries work around what compressed-tensors 0.18 to 0.20 do with zero points. Left compressed, an asymmetric layer
does not load there (its zero points are expected unpacked), so `dequantize` asks transformers to unpack while loading.
That unpacking computes in the type of the scales, so these are float32, though their values are exact in bfloat16: the
weights are the same in every dtype and on every way of loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from .grid import WeightOptions

QUANT_METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_PACKED = "weight_packed"


def quantization_config(options: WeightOptions, left: list[str]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json.

    Args:
        options: of the grid.
        left: full names of linear layers that are not quantized.
    """
    arguments = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": options.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": left,
        "dequantize": True,
        "config_groups": {"group_0": group | {"format": FORMAT}},
    }


def write_checkpoint(
    model: Any, tensors: dict[str, Tensor], options: WeightOptions, directory: Path, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Write the checkpoint.

    Args:
        model: the model that was quantized; its other weights are written as they are, in `dtype`.
        tensors: of the quantized layers, by full names, as `Reconstruction.tensors`.
        options: of the grid.
        directory: made if it is missing; files of a former checkpoint are replaced.
        dtype: of what is not quantized. The scales are float32 in any case.

    Returns:
        Bytes of all tensors.

    Raises:
        SkvqError: `tensors` is empty, or names a layer that the model does not have.
    """
    from huggingface_hub import save_torch_state_dict

    names = {name.removesuffix(f".{_PACKED}") for name in tensors if name.endswith(_PACKED)}
    modules = dict(model.named_modules())
    unknown = sorted(names - set(modules))
    if unknown or not names:
        raise SkvqError(f"tensors: {unknown[0] if unknown else 'none'}: expected linear layers of the model")
    directory.mkdir(parents=True, exist_ok=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = dict(tensors)
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") in names or name in tied:
            continue
        state[name] = value.detach().to(dtype) if value.is_floating_point() else value.detach()
    save_torch_state_dict(state, str(directory), metadata={"format": "pt"})
    left = sorted(name for name, module in modules.items() if isinstance(module, torch.nn.Linear) and name not in names)
    config = model.config.to_dict()
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(options, left)
    config["architectures"] = [type(model).__name__]
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    return sum(x.numel() * x.element_size() for x in state.values())
