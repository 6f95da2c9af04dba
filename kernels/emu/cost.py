"""What the instructions of attention over whole pages predict: the tables of PAGES.md, printed.

A model, not a measurement. `tests/test_kernels_nvrtc.py` fails where the compiler makes more than is counted here.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_BLOCK = 16
# Of a row block, 8 queries, D = 128: instructions, those of the pipe of integers and bits, products of f16, of bytes.
COUNTED = {
    ("sm_80", "2 + 2 bits"): (161, 80, (9, 8)),
    ("sm_80", "2 bits + ternary"): (212, 84, (10, 8)),
    ("sm_90a", "2 + 2 bits"): (153, 80, (9, 8)),
    ("sm_90a", "2 bits + ternary"): (200, 86, (10, 8)),
}
# attend_many.cuh, 2 bits + ternary: all instructions of the loop over 64 rows; those that a warp executes where every
# query sees all rows, in the mean of warps that unpack keys and values; of integers and bits; matrix instructions.
MANY_COUNTED = {"sm_80": (3134, 722, 247, 128), "sm_90a": (2606, 704, 233, 128)}
# Of a row block and 16 queries by attend.cuh, which the store would take otherwise: all, of integers and bits, matrix.
SIXTEEN_COUNTED = {"sm_80": (260, 96, 36), "sm_90a": (247, 96, 36)}
# attend_once.cuh, a row block of layers whose mean turns in it, keys of 5, 2, 1, 0 bits with evenly spaced levels,
# ternary values (a fit to a prompt): all, of integers and bits, products of f16 and bytes.
TURNED_COUNTED = {"sm_80": (269, 96, 24), "sm_90a": (259, 96, 24)}
# attend_rows.cuh, heads of 128: of a warp for 64 rows and 32 queries, where all see all: instructions of scores, of
# weights, of products with values; matrix instructions. Maxima, copies of the next rows, jumps: some 240 beside them.
ROWS_COUNTED = {"sm_80": (676, 256), "sm_90a": (684, 256)}
ROWS_BESIDE, ROWS_WARPS = 240, 4
MANY_ROWS, MANY_QUERIES, MANY_WARPS = 64, 128, 8
# Bytes of a row's keys and values, one E4M3 scale each.
ROW_BYTES = {"2 + 2 bits": 33 + 33, "2 bits + ternary": 33 + 27}
F16_ROW_BYTES = 2 * 2 * 128
# Part of the peak that a copy reaches, and how much a test allows above the counts.
COPY, SLACK = 0.92, 1.03


@dataclass(frozen=True)
class Card:
    """A multiprocessor issues 4 warp instructions a clock, 2 of integers and bits; `products` of f16 sum in f32."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float
    products: int


CARDS = (
    Card("H100 SXM", "sm_90a", 132, 1.755, 3.35, 1024),
    Card("H200", "sm_90a", 132, 1.755, 4.8, 1024),
    Card("A100 80 GB", "sm_80", 108, 1.41, 2.04, 1024),
    Card("RTX 4090", "sm_80", 128, 2.52, 1.01, 256),
)


def clocks(card: Card, formats: str) -> dict[str, float]:
    """Clocks of a multiprocessor that a row block takes, by what may bound it."""
    # A product of bytes has twice as many terms at twice the rate.
    issued, alu, matrix = COUNTED[card.arch, formats]
    bytes_a_clock = COPY * card.terabytes * 1e3 / (card.multiprocessors * card.gigahertz)
    return {
        "bytes": ROW_BLOCK * ROW_BYTES[formats] / bytes_a_clock,
        "issue": issued / 4,
        "integers": alu / 2,
        "products": sum(matrix) * 2048 / card.products,
    }


def many_clocks(card: Card) -> dict[str, float]:
    """Clocks of a multiprocessor for 64 rows and 128 queries, by what may bound it."""
    _, issued, alu, matrix = MANY_COUNTED[card.arch]
    bytes_a_clock = COPY * card.terabytes * 1e3 / (card.multiprocessors * card.gigahertz)
    return {
        "bytes": MANY_ROWS * ROW_BYTES["2 bits + ternary"] / bytes_a_clock,
        "issue": MANY_WARPS * issued / 4,
        "integers": MANY_WARPS * alu / 2,
        "products": MANY_WARPS * matrix * 2048 / card.products,
    }


def sixteens_clocks(card: Card) -> dict[str, float]:
    """The same by the kernel of sixteen queries, eight times, each of which reads the bytes."""
    issued, alu, matrix = SIXTEEN_COUNTED[card.arch]
    calls = MANY_QUERIES / 16
    blocks = calls * MANY_ROWS / ROW_BLOCK
    return {
        "bytes": calls * many_clocks(card)["bytes"],
        "issue": blocks * issued / 4,
        "integers": blocks * alu / 2,
        "products": blocks * matrix * 2048 / card.products,
    }


def rows_clocks(card: Card) -> dict[str, float]:
    """The same of rows in the model's type, which blocks of queries read from the second-level cache."""
    issued, matrix = ROWS_COUNTED[card.arch]
    return {
        "issue": ROWS_WARPS * (issued + ROWS_BESIDE) / 4,
        "products": ROWS_WARPS * matrix * 2048 / card.products,
    }


def listed(of: dict[str, float]) -> str:
    """Clocks as cells of a table, what bounds them in bold."""
    return " | ".join(f"**{time:.0f}**" if time == max(of.values()) else f"{time:.0f}" for time in of.values())


def print_many() -> None:
    """The table of many queries: with all hidden behind the slowest, and with products that wait for all else."""
    columns = "bytes | issue | integers | products | products' share | of sixteen, bytes aside | in turn"
    print(f"\n| 128 queries, 64 rows | {columns} |\n|---|---|---|---|---|---|---|---|")
    for card in CARDS:
        of, sixteens = many_clocks(card), sixteens_clocks(card)
        slowest = max(of.values())
        times = listed(of)
        in_turn, sixteens_in_turn = (found["products"] + found["issue"] for found in (of, sixteens))
        del sixteens["bytes"]
        gains = f"{max(sixteens.values()) / slowest:.2f}x | {sixteens_in_turn / in_turn:.2f}x"
        print(f"| {card.name} | {times} | {of['products'] / in_turn:.0%} to {of['products'] / slowest:.0%} | {gains} |")


def print_rows() -> None:
    """The table of many queries over rows in the model's type."""
    print("\n| 128 queries, 64 rows | issue | products | products' share |\n|---|---|---|---|")
    for card in CARDS:
        of = rows_clocks(card)
        least, most = of["products"] / sum(of.values()), of["products"] / max(of.values())
        print(f"| {card.name} | {listed(of)} | {least:.0%} to {most:.0%} |")


def main() -> None:
    """Print a table of each format, and of many queries."""
    for formats, row_bytes in ROW_BYTES.items():
        print(
            f"\n| {formats} | bytes | issue | integers | products | TB/s | share of copy | against f16 at copy speed |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for card in CARDS:
            of = clocks(card, formats)
            slowest = max(of.values())
            share = of["bytes"] / slowest
            times = listed(of)
            rate, gain = share * COPY * card.terabytes, share * F16_ROW_BYTES / row_bytes
            print(f"| {card.name} | {times} | {rate:.2f} | {share:.0%} | {gain:.1f}x |")
    print_many()
    print_rows()


if __name__ == "__main__":
    main()
