"""Writes parts.txt: packed bytes of rows of parts (src/FORMAT.md section 6), which Rust and Python must always produce.

One line is one case: head size, parts as BITSxWIDTH joined by commas, metadata, with /uniform behind it where levels
are evenly spaced, position of the first row, `|`, and the hexadecimal bytes of rows 0, 1 and 2 (those of make_rows.py).
All numbers are exact in float32 or rounded once:
M[j][c] = ((31 j + 17 c + j c) mod 101 - 50) / 64, shift μ_c = (13 c mod 29 - 14) / 8, shift_sine ν_c = μ of channel
c + D/2 mod D, frequencies θ_c = 1 / (1 + c mod D/2). Run it only to add cases: the bytes of an old case never change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from make_rows import rows

from skvq.reference import ReferenceCodec

TARGET = Path(__file__).with_name("parts.txt")
CASES = (
    (64, "4x16,3x16,1x16,0x16", "e4m3", 0),
    (64, "2x64", "fp16", 700),
    (80, "5x16,2x32,1x32", "e4m3", 255),
    (96, "3x48,1x48", "e4m3", 5000),
    (112, "5x16,3x16,2x32,0x48", "fp16", -3),
    (128, "4x32,3x32,1x32,0x32", "e4m3", 1000000),
    (192, "5x48,1x144", "e4m3", 12),
    (256, "4x64,2x128,0x64", "e4m3", 257),
    (128, "5x32,2x32,1x32,0x32", "e4m3/uniform", 4096),
    (80, "5x16,4x16,3x16,2x16,1x16", "fp16/uniform", 31),
)


def static(head_dim: int) -> dict[str, Any]:
    """Matrix, mean and frequencies of the cases; B is not used by an encoder."""
    j, c = torch.arange(head_dim)[:, None], torch.arange(head_dim)
    matrix = ((31 * j + 17 * c + j * c) % 101 - 50).float()[None] / 64
    shift = ((13 * c) % 29 - 14).float()[None] / 8
    frequencies = torch.ones(head_dim) / (1 + c % (head_dim // 2)).float()
    return {
        "matrix": matrix,
        "inverse": matrix.mT.contiguous(),
        "shift": shift,
        "shift_sine": shift.roll(-head_dim // 2, dims=-1),
        "frequencies": frequencies,
    }


def options(head_dim: int, parts: str, metadata: str) -> dict[str, Any]:
    """Keywords of a codec."""
    listed = [(int(x.split("x")[0]), int(x.split("x")[1])) for x in parts.split(",")]
    metadata, _, codebook = metadata.partition("/")
    named = {"codebook": codebook} if codebook else {}
    return {"head_dim": head_dim, "format": "parts", "parts": listed, "metadata": metadata} | named | static(head_dim)


def main() -> None:
    """Writes the file beside this one."""
    lines = []
    for head_dim, parts, metadata, position in CASES:
        codec = ReferenceCodec(**options(head_dim, parts, metadata))
        packed = codec.encode(rows(head_dim), position=position)
        text = " ".join(bytes(row.tolist()).hex() for row in packed)
        lines.append(f"{head_dim} {parts} {metadata} {position} | {text}")
    TARGET.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
