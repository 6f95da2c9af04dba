"""Writes rows.txt: packed bytes that the Rust and the Python implementation must both produce for ever.

One line is one case: the codec's options, `|`, and the hexadecimal bytes of rows 0, 1 and 2. Channel c of row r is
((7919 (c + 1) + 104729 r) mod 2003 - 1001) / 256, exact in float32; row 2 is divided by 4096. Run it only to add cases:
the bytes of an old case never change.
"""

from __future__ import annotations

from pathlib import Path

import torch

from skvq.reference import ReferenceCodec

TARGET = Path(__file__).with_name("rows.txt")
KEYS = (
    "format",
    "head_dim",
    "group_size",
    "metadata",
    "symmetric",
    "codebook",
    "rule",
    "rotation",
    "refinements",
    "unbiased",
)


def rows(head_dim: int) -> torch.Tensor:
    """Float32 [3, head_dim]."""
    c, r = torch.arange(1, head_dim + 1), torch.arange(3)[:, None]
    values = ((7919 * c + 104729 * r) % 2003 - 1001).float() / 256
    values[2] /= 4096
    return values


def rule_of(name: str) -> str:
    """The rule that goes with the default codebook of a format."""
    return "range" if name == "8" else "norm"


def cases() -> list[tuple[object, ...]]:
    """Every format and head size once, and every option of a codec in turn."""
    formats = ("8", "4", "3", "2", "1.6", "1.5")
    listed = {"8": "uniform"}
    found: list[tuple[object, ...]] = []
    for head_dim in (64, 80, 96, 112, 128, 192, 256):
        for name in formats:
            codebook = listed.get(name, "lloyd-max")
            rule = "range" if codebook == "uniform" else "norm"
            group = 128 if head_dim % 128 == 0 else head_dim
            found.append((name, head_dim, group, "e4m3", True, codebook, rule, "hadamard", 0, False))
    for name in formats:
        codebook = listed.get(name, "lloyd-max")
        found.append((name, 128, 32, "fp16", False, codebook, "norm", "identity", 1, False))
        found.append((name, 96, 32, "e4m3", False, codebook, "range", "hadamard", 0, False))
        if name not in listed and name != "1.5":
            found.append((name, 64, 32, "fp16", True, "uniform", "range", "identity", 2, False))
        found.append((name, 128, 64, "fp16", name != "3", codebook, rule_of(name), "hadamard", 1, True))
    return found


def main() -> None:
    """Writes the file beside this one."""
    lines = []
    for case in cases():
        codec = ReferenceCodec(**dict(zip(KEYS, case, strict=True)))  # type: ignore[arg-type]
        packed = codec.encode(rows(codec.head_dim))
        text = " ".join(bytes(row.tolist()).hex() for row in packed)
        lines.append(" ".join(str(value) for value in case) + " | " + text)
    TARGET.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
