"""Low-bit weights: quantization block by block (WKVQuant), checkpoints that transformers loads, and how they run.

Names are imported when first used: the command line lists its commands without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .channels import ChannelOptions
    from .grid import WeightOptions
    from .quantize import QuantizeOptions, quantize_model
    from .reconstruction import Reconstruction, ReconstructOptions, reconstruct
    from .running import load

__all__ = [
    "ChannelOptions",
    "QuantizeOptions",
    "ReconstructOptions",
    "Reconstruction",
    "WeightOptions",
    "load",
    "quantize_model",
    "reconstruct",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "channels": ("ChannelOptions",),
        "grid": ("WeightOptions",),
        "quantize": ("QuantizeOptions", "quantize_model"),
        "running": ("load",),
        "reconstruction": ("ReconstructOptions", "Reconstruction", "reconstruct"),
    },
)
