"""Quantized all-to-all on gloo: what arrives is what the definition gives of what was sent; bytes; gradients."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from aotrain.formats import Scaling, fake_quantize, quantize
from aotrain.ops.mxfp8_expert_parallel import a2a_combine_hp_fwd_mxfp8_bwd, a2a_dispatch_mxfp8_fwd_hp_bwd
from aotrain.ops.quantized_all_to_all import (
    FLOAT8_ROWS,
    MXFP8_ROWS,
    all_to_all_combine,
    all_to_all_dispatch,
    all_to_all_dispatch_quantized,
    dequantize_rows,
)
from aotrain.testing import adversarial_matrix, assert_bitwise_equal
from tests.distributed.ranks import run_ranks

# Rows from each rank (row) to each rank (column).
SPLITS = {
    2: [[[3, 5], [2, 4]], [[0, 7], [0, 0]], [[0, 0], [0, 0]]],
    4: [[[1, 2, 3, 0], [0, 0, 0, 0], [5, 0, 1, 1], [2, 2, 2, 2]], [[0, 3, 0, 0]] * 4],
}
PAYLOADS = [None, MXFP8_ROWS, FLOAT8_ROWS]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def pieces(splits: list[list[int]], columns: int, dtype: torch.dtype, seed: int) -> list[list[torch.Tensor]]:
    """[from rank][to rank] rows, the same on every rank."""
    total = sum(map(sum, splits))
    rows = iter(adversarial_matrix(total, columns, dtype, seed).split([count for row in splits for count in row]))
    return [[next(rows) for _ in row] for row in splits]


def rounded(x: torch.Tensor, scaling: Scaling | None) -> torch.Tensor:
    return x if scaling is None else fake_quantize(x, scaling)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes handed to each collective."""
    sizes, original = [], collectives.all_to_all_single

    def counting(x: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(x.numel() * x.element_size())
        return original(x, *args)

    collectives.all_to_all_single = counting
    try:
        yield sizes
    finally:
        collectives.all_to_all_single = original


def check_case(rank: int, splits: list[list[int]], columns: int, dtype: torch.dtype, forward, backward) -> None:
    send, receive = splits[rank], [row[rank] for row in splits]
    x = torch.cat(pieces(splits, columns, dtype, 0)[rank]).requires_grad_()
    width = {None: columns * dtype.itemsize, FLOAT8_ROWS: -(-(columns + 4) // 16) * 16}
    width[MXFP8_ROWS] = -(-(columns + -(-columns // 32)) // 16) * 16
    with counted_bytes() as sizes:
        y = all_to_all_dispatch(x, receive, send, forward=forward, backward=backward)
        assert sizes == [sum(send) * width[forward]]
        want = torch.cat([row[rank] for row in pieces(splits, columns, dtype, 0)])
        assert_bitwise_equal(y.detach(), rounded(want, forward))
        # Gradients travel the other way.
        transposed = [list(column) for column in zip(*splits, strict=True)]
        y.backward(torch.cat(pieces(transposed, columns, dtype, 1)[rank]))
        assert sizes[1:] == [sum(receive) * width[backward]]
    want = torch.cat([row[rank] for row in pieces(transposed, columns, dtype, 1)])
    assert_bitwise_equal(x.grad, rounded(want, backward))


def all_cases(rank: int, world_size: int) -> int:
    cases = 0
    for splits in SPLITS[world_size]:
        for forward, backward in itertools.product(PAYLOADS, PAYLOADS):
            check_case(rank, splits, 70, torch.bfloat16, forward, backward)
        for columns, dtype in itertools.product((64, 50, 7), DTYPES):
            check_case(rank, splits, columns, dtype, MXFP8_ROWS, FLOAT8_ROWS)
            cases += 1
    return cases


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_bytes_and_gradients(world_size: int) -> None:
    assert run_ranks(all_cases, world_size) == [9 * len(SPLITS[world_size])] * world_size


def defaults_codes_and_groups(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    splits = SPLITS[2][0]
    send, receive = splits[rank], [row[rank] for row in splits]
    sent = torch.cat([row[rank] for row in pieces(splits, 70, torch.bfloat16, 0)])
    x = torch.cat(pieces(splits, 70, torch.bfloat16, 0)[rank]).requires_grad_()

    rows = all_to_all_dispatch_quantized(x, receive, send)
    want = quantize(sent, MXFP8_ROWS)
    assert_bitwise_equal(rows.q.data, want.data)
    assert_bitwise_equal(rows.q.scale, want.scale)
    assert not rows.q.data.requires_grad
    assert_bitwise_equal(dequantize_rows(rows).detach(), fake_quantize(sent, MXFP8_ROWS))

    # Defaults: dispatch quantized forward only, combine backward only.
    grad = torch.randn(sum(receive), 70).bfloat16()
    dispatched = all_to_all_dispatch(x, receive, send)
    assert_bitwise_equal(dispatched.detach(), fake_quantize(sent, MXFP8_ROWS))
    combined = all_to_all_combine(dispatched.detach().requires_grad_(), send, receive)
    assert_bitwise_equal(combined.detach(), fake_quantize(x.detach(), MXFP8_ROWS))
    dispatched.backward(grad, retain_graph=True)
    assert_bitwise_equal(x.grad, all_to_all_dispatch(grad, send, receive, forward=None))

    y = sent.clone().requires_grad_()
    grad = torch.randn(sum(send), 70).bfloat16()
    all_to_all_combine(y, send, receive).backward(grad)
    assert_bitwise_equal(y.grad, all_to_all_dispatch(grad, receive, send, forward=MXFP8_ROWS))

    # torchao's names do the same.
    assert_bitwise_equal(a2a_dispatch_mxfp8_fwd_hp_bwd(x, receive, send).q.data, rows.q.data)
    for payload in (MXFP8_ROWS, None):
        y.grad = None
        a2a_combine_hp_fwd_mxfp8_bwd(y, send, receive, mxfp8_bwd=payload is not None).backward(grad)
        assert_bitwise_equal(y.grad, all_to_all_dispatch(grad, receive, send, forward=payload))

    # Every way to name the group.
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    for group in (dist.group.WORLD, mesh, mesh.get_group().group_name):
        assert_bitwise_equal(all_to_all_dispatch(x, receive, send, group).detach(), dispatched.detach())

    def both_ways(x: torch.Tensor) -> torch.Tensor:
        return all_to_all_combine(all_to_all_dispatch(x, receive, send) * 2, send, receive)

    results = {}
    for name, function in (("eager", both_ways), ("compiled", torch.compile(both_ways, backend="aot_eager"))):
        x.grad = None
        result = function(x)
        result.backward(torch.ones_like(result))
        results[f"{name}.output"], results[f"{name}.grad"] = result.detach(), x.grad
    return results


def test_defaults_codes_groups_and_compile() -> None:
    for results in run_ranks(defaults_codes_and_groups, 2):
        assert_bitwise_equal(results["compiled.output"], results["eager.output"])
        assert_bitwise_equal(results["compiled.grad"], results["eager.grad"])
