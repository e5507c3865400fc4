"""Permuting and padding of tokens: the definition, exact inverses, gradients without padding, torchao's signatures."""

import pytest
import torch

from aotrain.ops.permute import (
    apply_permutation,
    generate_permute_indices,
    pad_token_groups,
    padded_rows,
    permute,
    permute_and_pad,
    unpad_token_groups,
    unpermute,
    unpermute_indexed,
)
from aotrain.testing import assert_bitwise_equal

# [ranks, local experts]
COUNTS = [[3, 0, 5], [1, 2, 0]]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def expert_major(x: torch.Tensor, counts: list[list[int]], alignment: int, empty: int) -> torch.Tensor:
    """The definition: pieces of each rank and expert, joined by expert and padded with zeros."""
    flat = [count for row in counts for count in row]
    pieces = torch.split(x[: sum(flat)], flat)
    groups = []
    for expert in range(len(counts[0])):
        group = torch.cat([pieces[rank * len(counts[0]) + expert] for rank in range(len(counts))])
        size = max(-(-len(group) // alignment) * alignment, empty)
        groups.append(torch.nn.functional.pad(group, (0, 0, 0, size - len(group))))
    return torch.cat(groups)


def rows(num_rows: int, dtype: torch.dtype = torch.float32, columns: int = 5) -> torch.Tensor:
    return torch.randn(num_rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alignment", [1, 4, 32])
@pytest.mark.parametrize("surplus", [0, 3])
def test_permute_by_definition_and_back(dtype: torch.dtype, alignment: int, surplus: int) -> None:
    x = rows(11 + surplus, dtype)
    y, permutation = permute(x, torch.tensor(COUNTS).flatten(), 3, 2, alignment)
    want = expert_major(x, COUNTS, alignment, 0)
    assert y.shape[0] == padded_rows(11 + surplus, 3, alignment)
    assert_bitwise_equal(y[: len(want)], want)
    assert not y[len(want) :].any()
    assert permutation.offsets.tolist()[-1] == len(want)
    assert_bitwise_equal(unpermute(y, permutation)[:11], x[:11])
    assert not unpermute(y, permutation)[11:].any()


def test_the_gradient_of_padding_is_dropped() -> None:
    x = rows(13).requires_grad_()
    y, permutation = permute(x, torch.tensor(COUNTS).flatten(), 3, 2, 4)
    grad = torch.randn_like(y)
    real = permutation.indices >= 0
    grad[~real] = torch.nan  # what a grouped product may leave there
    y.backward(grad)
    want = torch.zeros(13, 5)
    want[permutation.indices[real].long()] = grad[real]
    assert_bitwise_equal(x.grad, want)


def test_unpermute_reads_no_padding_and_gives_it_no_gradient() -> None:
    _, permutation = permute(rows(11), torch.tensor(COUNTS).flatten(), 3, 2, 4)
    y = rows(len(permutation.indices))
    y[permutation.indices < 0] = torch.nan
    y.requires_grad_()
    x = unpermute(y, permutation)
    assert not x.isnan().any()
    x.sum().backward()
    assert_bitwise_equal(y.grad, (permutation.indices >= 0).float().unsqueeze(1).expand(-1, 5).contiguous())


def test_second_derivatives() -> None:
    x = rows(11).double().requires_grad_()
    counts = torch.tensor(COUNTS).flatten()
    permutation = permute(x, counts, 3, 2, 4)[1]
    assert torch.autograd.gradgradcheck(lambda x: apply_permutation(x, permutation) ** 3, (x,))
    assert torch.autograd.gradcheck(lambda x: unpermute(permute(x, counts, 3, 2, 4)[0], permutation), (x,))


def test_no_tokens() -> None:
    x = rows(0).requires_grad_()
    y, permutation = permute(x, torch.zeros(6, dtype=torch.int64), 3, 2, 4)
    assert y.shape == (12, 5)
    assert not y.any()
    assert permutation.offsets.tolist() == [0, 0, 0]
    unpermute(y, permutation).sum().backward()
    assert x.grad.shape == (0, 5)


def test_compiles_without_graph_breaks() -> None:
    def twice(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        y, permutation = permute(x, counts, 3, 2, 4)
        return unpermute(y * 2, permutation)

    x, compiled_x = rows(11).requires_grad_(), None
    compiled_x = x.detach().clone().requires_grad_()
    counts = torch.tensor(COUNTS).flatten()
    want = twice(x, counts)
    got = torch.compile(twice, backend="aot_eager", fullgraph=True)(compiled_x, counts)
    assert_bitwise_equal(got.detach(), want.detach())
    want.square().sum().backward()
    got.square().sum().backward()
    assert_bitwise_equal(compiled_x.grad, x.grad)


@pytest.mark.parametrize("alignment", [1, 4])
def test_permute_and_pad_is_what_torchtitan_consumes(alignment: int) -> None:
    x = rows(11).requires_grad_()
    shape, y, indices, sizes, offsets = permute_and_pad(x, torch.tensor(COUNTS).flatten(), 2, 3, alignment)
    want = expert_major(x.detach(), COUNTS, alignment, alignment)
    assert shape == (12, 5)
    assert_bitwise_equal(y.detach()[: len(want)], want)
    assert (offsets.tolist()[-1], sizes.sum().item()) == (len(want), len(want))
    # As TorchAOTokenDispatcher undoes it.
    back = y.new_empty(shape)
    back[indices, :] = y
    assert_bitwise_equal(back[:-1].detach(), x.detach())
    again = unpermute_indexed(y, indices, 11)
    assert_bitwise_equal(again.detach(), x.detach())
    grads = [torch.autograd.grad(result.square().sum(), x, retain_graph=True)[0] for result in (back[:-1], again)]
    assert_bitwise_equal(grads[0], grads[1])


def test_generate_permute_indices() -> None:
    counts = torch.tensor(COUNTS).flatten()
    indices, sizes, offsets = generate_permute_indices(counts, 3, 2, 32, 4)
    assert (sizes.tolist(), offsets.tolist()) == ([4, 4, 8], [4, 8, 16])
    assert indices.tolist() == [0, 1, 2, 8, 9, 10, -1, -1, 3, 4, 5, 6, 7, -1, -1, -1] + [-1] * 16
    _, _, _, want_sizes, want_offsets = permute_and_pad(rows(11), counts, 2, 3, 4)
    assert_bitwise_equal(sizes, want_sizes)
    assert_bitwise_equal(offsets, want_offsets)
    # An empty group takes one unit.
    assert generate_permute_indices(torch.zeros(2, dtype=torch.int32), 2, 1, 8, 4)[1].tolist() == [4, 4]


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0], [4, 4], [0, 1, 0]])
@pytest.mark.parametrize("surplus", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_pad_token_groups_and_back(sizes: list[int], surplus: int, dtype: torch.dtype) -> None:
    offs = torch.tensor(sizes).cumsum(0).to(dtype)
    num_rows = sum(sizes) + surplus
    x = rows(num_rows).requires_grad_()
    padded, starts, ends = pad_token_groups(x, offs, 4)
    want = expert_major(x.detach(), [sizes], 4, 0)
    assert padded.shape[0] == -(-(num_rows + 4 * len(sizes)) // 4) * 4
    assert_bitwise_equal(padded.detach()[: len(want)], want)
    assert (starts.dtype, ends.dtype) == (torch.int32, torch.int32)
    assert (ends - starts).tolist() == [-(-size // 4) * 4 for size in sizes]
    back = unpad_token_groups(padded, offs, starts, num_rows, 4)
    kept = x.detach().clone()
    kept[sum(sizes) :] = 0.0
    assert_bitwise_equal(back.detach(), kept)
    back.square().sum().backward()
    assert_bitwise_equal(x.grad, 2 * kept)


def test_errors() -> None:
    counts = torch.ones(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"want \[4\] for 2 ranks and 2 local experts"):
        permute(rows(6), counts, 2, 2)
    with pytest.raises(ValueError, match=r"want \[rows, columns\]"):
        permute(torch.ones(6), counts, 3, 2)
    with pytest.raises(ValueError, match=r"want \[4\]"):
        generate_permute_indices(counts, 2, 2, 8, 4)
