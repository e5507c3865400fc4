"""Layout of optimizer state: which moments are quantized, and the plain tensors that hold them.

A quantized moment of a parameter [d0, d1, ...], with rows of R = d1 * d2 * ... elements, is two plain tensors:

    {name}_codes  uint8    [d0, d1, ...]           the parameter's own shape
    {name}_scale  float32  [d0, ceil(R / block)]   largest magnitude of each block

Blocks lie along rows and never cross dimension 0; the last block of a row is shorter when `block` does not divide R.
Any split along dimension 0 therefore cuts codes and scales at the same rows, so a checkpoint moves between world sizes
without touching a value. Where `block` divides R, this is the flat block order of other 8-bit optimizers.

Which moments are quantized depends only on the *global* shape and sharding of the parameter, so all ranks, and all
world sizes, agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.formats.codebook import decode_dynamic, encode_dynamic
from aotrain.formats.scaling import AMAX_MIN, block_amax, expand_blocks
from aotrain.optim.sharding import even_inner_shards, local_of, shard_like

MIN_QUANTIZED_NUMEL = 4096
# Each block of a row carries a 4-byte scale: below this row length that overhead is over 6 % of the codes.
MIN_QUANTIZED_ROW = 64


def is_quantized(param: torch.Tensor) -> bool:
    """Whether the moments of this parameter are stored in 8 bits.

    Vectors (norms, biases), matrices of fewer than 4096 elements and rows shorter than 64 stay in float32: they are a
    negligible share of the memory and the most sensitive to rounding.
    """
    if param.ndim < 2 or param.numel() < MIN_QUANTIZED_NUMEL:
        return False
    return row_length(param.shape) >= MIN_QUANTIZED_ROW and even_inner_shards(param)


def row_length(shape: Sequence[int]) -> int:
    """Elements per index of dimension 0."""
    return math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Float32Moment:
    """A moment stored as one float32 tensor of the parameter's shape."""

    name: str

    @property
    def keys(self) -> tuple[str, ...]:
        """State keys of this moment."""
        return (self.name,)

    def init(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Zero state; sharded like the parameter."""
        return {self.name: torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)}

    def read(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """This rank's values, float32, in the local shape of the parameter."""
        return local_of(state[self.name])

    def write(self, state: dict[str, torch.Tensor], value: torch.Tensor) -> None:
        """Store float32 values of the local shape."""
        local_of(state[self.name]).copy_(value)


@dataclass(frozen=True, slots=True)
class Dynamic8bitMoment:
    """A moment stored as 8-bit dynamic codes with a float32 scale per block.

    Attributes:
        name: prefix of the state keys.
        signed: whether values can be negative (first moment) or not (second moment).
        block_size: elements per scale along a row.
    """

    name: str
    signed: bool
    block_size: int

    @property
    def keys(self) -> tuple[str, ...]:
        """State keys of this moment."""
        return (f"{self.name}_codes", f"{self.name}_scale")

    def init(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """State that decodes to zero; both tensors sharded like the parameter."""
        local = local_of(param)
        zeros = torch.zeros(local.shape, dtype=torch.float32, device=local.device)
        codes, scale = self._encode(zeros)
        codes_key, scale_key = self.keys
        return {codes_key: shard_like(param, codes), scale_key: shard_like(param, scale)}

    def read(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """This rank's values, float32, in the local shape of the parameter."""
        codes, scale = (local_of(state[key]) for key in self.keys)
        rows = decode_dynamic(codes, self.signed).view(codes.shape[0], row_length(codes.shape))
        return (rows * expand_blocks(scale, rows.shape, (1, self.block_size))).view(codes.shape)

    def write(self, state: dict[str, torch.Tensor], value: torch.Tensor) -> None:
        """Quantize and store float32 values of the local shape."""
        for key, encoded in zip(self.keys, self._encode(value), strict=True):
            local_of(state[key]).copy_(encoded)

    def _encode(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = value.reshape(value.shape[0], row_length(value.shape))
        block = (1, self.block_size)
        scale = block_amax(rows, block).clamp(min=AMAX_MIN)  # [d0, ceil(R / block)]
        codes = encode_dynamic(rows / expand_blocks(scale, rows.shape, block), self.signed)
        return codes.view(value.shape), scale


Moment = Float32Moment | Dynamic8bitMoment


def adam_moments(param: torch.Tensor, *, block_size: int, amsgrad: bool) -> tuple[Moment, ...]:
    """The moments Adam keeps for this parameter: exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq."""
    signed_by_name = {"exp_avg": True, "exp_avg_sq": False}
    if amsgrad:
        signed_by_name["max_exp_avg_sq"] = False
    if is_quantized(param):
        return tuple(Dynamic8bitMoment(name, signed, block_size) for name, signed in signed_by_name.items())
    return tuple(Float32Moment(name) for name in signed_by_name)
