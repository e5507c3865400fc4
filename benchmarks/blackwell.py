"""What MX and NVFP4 operations must move and compute, and how long a B200 takes at its data sheet's rates: a model.

    python -m benchmarks.blackwell

Prints the tables of docs/blackwell.md. Nothing here is measured: no launch, no fill, no power limit, peak rates of
`aotrain/gpus.py`. A time is a lower bound that a kernel can be held against.
"""

from dataclasses import dataclass

from aotrain.gpus import GPUS

B200 = GPUS["B200"]
# Dense TFLOP/s of 4-bit floats, from the same brief as the other rates of B200; with sparsity 18000.
FLOAT4 = 9000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One operation.

    Attributes:
        name: of the operation and its shape.
        bytes: that go through memory at least once.
        flops: of the product; 0 for a cast.
        peak: TFLOP/s that the product can have.
        published: what torchao publishes for its kernel on a B200, microseconds.
    """

    name: str
    bytes: float
    flops: float = 0.0
    peak: float = 0.0
    published: float | None = None

    @property
    def microseconds(self) -> float:
        """At peak rate or full bandwidth, whichever takes longer."""
        compute = self.flops / (self.peak * 1e12) if self.flops else 0.0
        return 1e6 * max(compute, self.bytes / (B200.bandwidth * 1e12))


# Bytes of an operand's element in memory, its share of the scale included.
BF16, MXFP8, MXFP4, NVFP4 = 2.0, 1 + 1 / 32, 1 / 2 + 1 / 32, 1 / 2 + 1 / 16


def cast_bytes(name: str) -> float:
    """Bytes per element of a bfloat16 matrix that a cast moves."""
    return {
        "mxfp8, one direction": BF16 + MXFP8,
        "mxfp8, both from one read": BF16 + 2 * MXFP8,
        "mxfp8, both from two reads": 2 * (BF16 + MXFP8),
        "mxfp4, one direction": BF16 + MXFP4,
        "mxfp4, both from one read": BF16 + 2 * MXFP4,
        "nvfp4, one direction, amax of the matrix first": 2 * BF16 + NVFP4,
        "rearranging the scales of one direction afterwards": 2 / 32,
    }[name]


CASTS = (
    "mxfp8, one direction", "mxfp8, both from one read", "mxfp8, both from two reads", "mxfp4, one direction",
    "mxfp4, both from one read", "nvfp4, one direction, amax of the matrix first",
    "rearranging the scales of one direction afterwards",
)  # fmt: skip


def product(m: int, n: int, k: int, element: float, experts: int = 1) -> tuple[float, float]:
    """(bytes, flops) of [m, k] @ [experts, n, k].T, every row with one expert's weight, bfloat16 output."""
    return element * (m * k + experts * n * k) + BF16 * m * n, 2.0 * m * n * k


def weight_gradient(m: int, n: int, k: int, element: float, experts: int) -> tuple[float, float]:
    """(bytes, flops) of [m, n].T @ [m, k] per expert, bfloat16 output [experts, n, k]."""
    return element * m * (n + k) + BF16 * experts * n * k, 2.0 * m * n * k


def dense(tokens: int = 16384, n: int = 28672, k: int = 8192) -> list[Work]:
    """A feed-forward layer of Llama 3 70B."""
    rows = [Work(name=f"{name}, {tokens} x {k}", bytes=cast_bytes(name) * tokens * k) for name in CASTS[:-1]]
    kinds = (("bf16", BF16, B200.bf16), ("mxfp8", MXFP8, B200.float8), ("nvfp4", NVFP4, FLOAT4))
    for name, element, peak in kinds:
        moved, flops = product(tokens, n, k, element)
        rows.append(Work(name=f"{name} product, {tokens} x {n} x {k}", bytes=moved, flops=flops, peak=peak))
    return rows


def experts(tokens: int = 131072, n: int = 2048, k: int = 7168, count: int = 8) -> list[Work]:
    """Eight experts of DeepSeek-V3, the shape of torchao's table."""
    one = cast_bytes("mxfp8, one direction")
    tiles = cast_bytes("rearranging the scales of one direction afterwards")
    weight = count * n * k
    rows = [
        Work(name=f"x [{tokens}, {k}] along its rows", bytes=one * tokens * k, published=580.6),
        Work(name="its scales into tiles, a kernel of its own", bytes=tiles * tokens * k, published=198.7),
        Work(name=f"x [{tokens}, {k}] along its columns", bytes=one * tokens * k, published=670.7),
        Work(name=f"grad_out [{tokens}, {n}] along its rows", bytes=one * tokens * n, published=166.0),
        Work(name=f"grad_out [{tokens}, {n}] along its columns", bytes=one * tokens * n, published=191.7),
        Work(name="both of grad_out, one read: here, with tiles", bytes=(BF16 + 2 * MXFP8) * tokens * n),
        Work(name=f"weight [{count}, {n}, {k}] along one dimension", bytes=one * weight, published=76.8),
        Work(name=f"weight [{count}, {n}, {k}] along both, one read", bytes=(BF16 + 2 * MXFP8) * weight),
    ]
    for name, (moved, flops), published in (
        ("output, 2-D by 3-D", product(tokens, n, k, MXFP8, count), 1838.1),
        ("grad_input, 2-D by 3-D", product(tokens, k, n, MXFP8, count), 1838.1),
        ("grad_weight, 2-D by 2-D", weight_gradient(tokens, n, k, MXFP8, count), 2412.4),
    ):
        rows.append(Work(name=name, bytes=moved, flops=flops, peak=B200.float8, published=published))
    return rows


def lines() -> list[str]:
    """The tables of docs/blackwell.md, one row a line."""
    rows = ["| cast of bfloat16 | bytes per element |", "|---|---|"]
    rows += [f"| {name} | {cast_bytes(name):.3f} |" for name in CASTS]
    rows += ["", "| dense | GB | TFLOP | B200, modelled us |", "|---|---|---|---|"]
    rows += [f"| {w.name} | {w.bytes / 1e9:.3f} | {w.flops / 1e12:.2f} | {w.microseconds:.0f} |" for w in dense()]
    rows += [
        "",
        "| experts | GB | TFLOP | B200, modelled us | torchao's kernel, published us |",
        "|---|---|---|---|---|",
    ]
    for w in experts():
        published = "" if w.published is None else f"{w.published:.0f}"
        rows.append(f"| {w.name} | {w.bytes / 1e9:.3f} | {w.flops / 1e12:.2f} | {w.microseconds:.0f} | {published} |")
    return rows


if __name__ == "__main__":
    print("\n".join(lines()))
