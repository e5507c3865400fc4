"""docs/blackwell.md says what its model computes, and the model counts what the kernels move."""

from pathlib import Path

import torch

from benchmarks import blackwell
from tests.kernels.mx_host import BOTH, Host

DOC = Path(__file__).resolve().parent.parent / "docs" / "blackwell.md"


def test_the_tables_are_the_models():
    text = DOC.read_text()
    for line in blackwell.lines():
        assert line in text, line


def test_bytes_of_a_cast_are_those_that_the_kernel_moves():
    host = Host()
    x = torch.randn(256, 256).bfloat16()
    for element, kind in (("float8_e4m3fn", "mxfp8"), ("float4_e2m1fn", "mxfp4")):
        for blocks, way in ((BOTH[:1], "one direction"), (BOTH[1:], "one direction"), (BOTH, "both from one read")):
            _, traffic, _ = host.traced(x, element, blocks, True)
            moved = sum(t.bytes for name, t in traffic.items() if name == "read x" or name.startswith("write "))
            assert moved == x.numel() * blackwell.cast_bytes(f"{kind}, {way}")


def test_a_time_is_the_longer_of_memory_and_arithmetic():
    rate = blackwell.B200
    assert blackwell.Work(name="", bytes=rate.bandwidth * 1e12).microseconds == 1e6
    both = blackwell.Work(name="", bytes=rate.bandwidth * 1e12, flops=2e12 * rate.float8, peak=rate.float8)
    assert both.microseconds == 2e6
