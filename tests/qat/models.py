"""A model with every kind of layer that quantization-aware training meets."""

import torch
from torch import nn


class Model(nn.Module):
    """Embedding, a block of two linear layers, a head whose weight may be the embedding's."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(80, 64)
        self.block = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64, bias=False))
        self.lm_head = nn.Linear(64, 80, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.block(self.embed(tokens)))


def tokens() -> torch.Tensor:
    return torch.randint(0, 80, (2, 7), generator=torch.Generator().manual_seed(1))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
