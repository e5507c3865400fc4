"""Experts modules as users write them, for tests."""

import torch
from torch import nn


class Experts(nn.Module):
    """Two grouped GEMMs on [E, N, K] parameters, in bfloat16."""

    def __init__(self, experts: int = 4, dim: int = 32, hidden: int = 48, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.dtype = dtype
        self.up = nn.Parameter(torch.randn(experts, hidden, dim) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, dim, hidden) * 0.1)

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, weight, offs=offs)

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        h = self.multiply(x, self.up.to(self.dtype).transpose(-2, -1), offs).relu()
        return self.multiply(h, self.down.transpose(-2, -1).to(self.dtype), offs)


class BiasedExperts(Experts):
    """A bias per expert, added to the rows of its tokens."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        self.up_bias = nn.Parameter(torch.randn(self.up.shape[:2]))

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        counts = torch.diff(offs, prepend=offs.new_zeros(1))
        bias = self.up_bias.repeat_interleave(counts, dim=0, output_size=x.shape[0])
        h = self.multiply(x.bfloat16(), self.up.bfloat16().mT, offs) + bias.bfloat16()
        return self.multiply(h.relu(), self.down.bfloat16().mT, offs)


class ListedExperts(nn.Module):
    """Weights in a ParameterList, already [E, K, N]."""

    def __init__(self, experts: int = 4, dim: int = 32, hidden: int = 48):
        super().__init__()
        self.weights = nn.ParameterList(
            [torch.randn(experts, dim, hidden) * 0.1, torch.randn(experts, hidden, dim) * 0.1]
        )

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch._grouped_mm(x.bfloat16(), weight.bfloat16(), offs=offs)
        return x


class LoopedExperts(Experts):
    """No grouped GEMM: a loop over experts."""

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        parts = x.tensor_split(offs[:-1].tolist())
        return torch.cat(
            [(part @ up.T).relu() @ down.T for part, up, down in zip(parts, self.up, self.down, strict=True)]
        )


class MoE(nn.Module):
    """Top-1 routing over experts, with an output layer."""

    def __init__(self, experts: nn.Module, dim: int = 32):
        super().__init__()
        self.gate = nn.Linear(dim, 4, bias=False)
        self.experts = experts
        self.lm_head = nn.Linear(dim, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.gate(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        offs = torch.nn.functional.one_hot(chosen, 4).sum(0).cumsum(0).to(torch.int32)
        out = torch.zeros_like(x).index_copy(0, order, self.experts(x[order], offs).to(x.dtype))
        return self.lm_head(x + out * scores[:, None])


def rows(count: int = 20, dim: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of four experts, of which the second gets nothing."""
    return torch.randn(count, dim), torch.tensor([3, 3, 11, count], dtype=torch.int32)
