"""The form of keys and values that a layer is given, in words where it is wrong.

Is: shapes, dtypes and devices. Is not: their numbers, which the store looks at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cuda_store import DEVICE_TYPES
from .plan import DTYPE_NAMES


@dataclass(frozen=True)
class HeldForm:
    """What a layer's first keys and values have fixed; `batch` None: any, for there are no tokens."""

    device: torch.device
    dtype: torch.dtype
    batch: int | None
    heads: int
    key_dim: int
    value_dim: int


def form_problem(keys: torch.Tensor, values: torch.Tensor, held: HeldForm | None) -> str | None:
    """What is wrong with keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv]; None if nothing is."""
    for name, x in (("key_states", keys), ("value_states", values)):
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            return f"{name}: got {got}, expected a tensor [batch, num_key_value_heads, tokens, head_dim]"
        if x.device.type not in DEVICE_TYPES:
            return f"{name}: on device {x.device}, expected {' or '.join(DEVICE_TYPES)}"
        if held is not None and x.device != held.device:
            return f"{name}: on device {x.device}, expected {held.device} as the tokens stored before"
        if x.dtype not in DTYPE_NAMES:
            return f"{name}: dtype {x.dtype}, expected one of {', '.join(DTYPE_NAMES.values())}"
        if 0 in (x.shape[0], x.shape[1], x.shape[3]):
            return f"{name}: shape {tuple(x.shape)}, expected at least one sequence, head and channel"
    if keys.device != values.device:
        return f"value_states: on device {values.device}, expected {keys.device} as key_states"
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        return (
            f"value_states: {values.dtype} {tuple(values.shape)}, expected batch, heads, tokens and dtype of "
            f"key_states, {keys.dtype} {tuple(keys.shape)}"
        )
    if held is None:
        return None
    batch = held.batch or keys.shape[0]
    for name, x, head_dim in (("key_states", keys, held.key_dim), ("value_states", values, held.value_dim)):
        if (x.shape[0], x.shape[1], x.shape[3]) != (batch, held.heads, head_dim) or x.dtype != held.dtype:
            return (
                f"{name}: {x.dtype} {tuple(x.shape)}, expected {held.dtype} with batch {batch}, {held.heads} "
                f"heads and head_dim {head_dim} as the tokens stored before"
            )
    return None
