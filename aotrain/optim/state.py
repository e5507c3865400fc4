"""Layout of optimizer state: which moments are quantized, and the plain tensors that hold them.

A quantized moment of a parameter [d0, d1, ...], with rows of R = d1 * d2 * ... elements, is two plain tensors:

    {name}_codes  uint8    [d0, d1, ...]          the parameter's own shape; 4 bits: [d0, ceil(R / 2)]
    {name}_scale  float32  [d0, ceil(R / block)]  largest magnitude of each block; float8: divided by 448

Blocks lie along rows and never cross dimension 0; the last block of a row is shorter when `block` does not divide R.
Any split along dimension 0 therefore cuts codes and scales at the same rows, so a checkpoint moves between world sizes
without touching a value. Where `block` divides R, this is the flat block order of other 8-bit optimizers.

Which moments are quantized depends only on the *global* shape and sharding of the parameter, so all ranks, and all
world sizes, agree.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aotrain.formats import FLOAT8_E4M3, decode_elements, round_nearest
from aotrain.formats.codebook import decode_dynamic, encode_dynamic, pack_nibbles, unpack_nibbles
from aotrain.formats.scaling import AMAX_MIN, block_amax, expand_blocks
from aotrain.optim.sharding import even_inner_shards, is_flattened, local_of, shard_like

MIN_QUANTIZED_NUMEL = 4096
# Each block of a row carries a 4-byte scale: below this row length that overhead is over 6 % of the codes.
MIN_QUANTIZED_ROW = 64


def is_quantized(param: torch.Tensor) -> bool:
    """Whether the moments of this parameter are stored in a low-bit format, if its group asks for one.

    Vectors (norms, biases), matrices of fewer than 4096 elements and rows shorter than 64 stay in float32: they are a
    negligible share of the memory and the most sensitive to rounding. So do all parameters under FSDP1, which cuts them
    anywhere: a rank's piece has no rows, and FSDP1 gathers only state of the parameter's own shape.
    """
    if param.ndim < 2 or param.numel() < MIN_QUANTIZED_NUMEL or is_flattened(param):
        return False
    return row_length(param.shape) >= MIN_QUANTIZED_ROW and even_inner_shards(param)


def row_length(shape: Sequence[int]) -> int:
    """Elements per index of dimension 0."""
    return math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Float32Moment:
    """A moment stored as one float32 tensor of the parameter's shape."""

    kernel_format: ClassVar[str] = "float32"

    name: str

    @property
    def keys(self) -> tuple[str, ...]:
        """State keys of this moment."""
        return (self.name,)

    def init(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Zero state; sharded like the parameter."""
        return {self.name: torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)}

    def read(self, state: dict[str, torch.Tensor], local: torch.Tensor) -> torch.Tensor:
        """This rank's values, float32, in the shape of `local`, the parameter's part on this rank."""
        return local_of(state[self.name])

    def write(self, state: dict[str, torch.Tensor], value: torch.Tensor) -> None:
        """Store float32 values of the local shape."""
        local_of(state[self.name]).copy_(value)


@dataclass(frozen=True, slots=True)
class BlockMoment(ABC):
    """A moment stored as codes with a float32 scale per block; subclasses say what a code is.

    Attributes:
        name: prefix of the state keys.
        signed: whether values can be negative (first moment) or not (second moment).
        block_size: elements per scale along a row.
        kernel_format: what `aotrain.kernels.adam` calls this format.
    """

    kernel_format: ClassVar[str]

    name: str
    signed: bool
    block_size: int

    @property
    def keys(self) -> tuple[str, ...]:
        """State keys of this moment."""
        return (f"{self.name}_codes", f"{self.name}_scale")

    def init(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """State that decodes to (nearly) zero; both tensors sharded like the parameter."""
        local = local_of(param)
        # All rows of zeros are alike: encode one.
        row = self.encode(torch.zeros((1, *local.shape[1:]), dtype=torch.float32, device=local.device))
        return {
            key: shard_like(param, encoded.expand(local.shape[0], *encoded.shape[1:]).contiguous())
            for key, encoded in zip(self.keys, row, strict=True)
        }

    def read(self, state: dict[str, torch.Tensor], local: torch.Tensor) -> torch.Tensor:
        """This rank's values, float32, in the shape of `local`, the parameter's part on this rank."""
        codes, scale = (local_of(state[key]) for key in self.keys)
        return self.decode(codes, scale, local.shape)

    def write(self, state: dict[str, torch.Tensor], value: torch.Tensor) -> None:
        """Quantize and store float32 values of the local shape."""
        for key, encoded in zip(self.keys, self.encode(value), strict=True):
            local_of(state[key]).copy_(encoded)

    def encode(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scale) of float32 values [d0, ...]."""
        rows = value.reshape(value.shape[0], row_length(value.shape))
        block = (1, self.block_size)
        scale = self._scale(block_amax(rows, block).clamp(min=AMAX_MIN))  # [d0, ceil(R / block)]
        codes = self._encode(rows / expand_blocks(scale, rows.shape, block))
        return codes.view(self.codes_shape(value.shape)), scale

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """float32 values of the given shape."""
        rows = (shape[0], row_length(shape))
        values = self._decode(codes.reshape(shape[0], row_length(codes.shape)), rows[1])
        return (values * expand_blocks(scale, rows, (1, self.block_size))).view(shape)

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the codes of values [d0, ...]."""
        return tuple(shape)

    def _scale(self, amax: torch.Tensor) -> torch.Tensor:
        return amax

    @abstractmethod
    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Codes of scaled values [d0, R]."""

    @abstractmethod
    def _decode(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        """Scaled values, float32 [d0, length]."""


@dataclass(frozen=True, slots=True)
class Dynamic8bitMoment(BlockMoment):
    """One byte per value: a code of the 8-bit dynamic map."""

    kernel_format = "dynamic8"

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        return encode_dynamic(rows, self.signed)

    def _decode(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        return decode_dynamic(codes, self.signed)


@dataclass(frozen=True, slots=True)
class Dynamic4bitMoment(BlockMoment):
    """Half a byte per value: codes of the 4-bit maps, two per byte along a row; codes are uint8 [d0, ceil(R / 2)]."""

    kernel_format = "dynamic4"

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Rows of packed codes."""
        return (shape[0], -(-row_length(shape) // 2))

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        return pack_nibbles(encode_dynamic(rows, self.signed, bits=4))

    def _decode(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        return decode_dynamic(unpack_nibbles(codes, length), self.signed, bits=4)


@dataclass(frozen=True, slots=True)
class Float8Moment(BlockMoment):
    """One byte per value: float8 e4m3, scaled so that a block's largest magnitude is the format's maximum.

    The codes are stored as uint8: gloo cannot send float8 tensors, and a full state_dict has to be gathered.
    """

    kernel_format = FLOAT8_E4M3.name

    def _scale(self, amax: torch.Tensor) -> torch.Tensor:
        return amax / torch.full_like(amax, FLOAT8_E4M3.max)

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        return round_nearest(rows, FLOAT8_E4M3).view(torch.uint8)

    def _decode(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        return decode_elements(codes.view(FLOAT8_E4M3.dtype), torch.float32)


Moment = Float32Moment | BlockMoment

# What the `bits` of a parameter group may be, and the format it means; 32 keeps float32 moments.
STATE_FORMATS: dict[int | str, type[BlockMoment] | None] = {
    8: Dynamic8bitMoment,
    4: Dynamic4bitMoment,
    "fp8": Float8Moment,
    32: None,
}

# Elements per scale where none is given, as in the other optimizers of each format.
DEFAULT_BLOCK_SIZE: dict[int | str, int] = {8: 256, 4: 128, "fp8": 256, 32: 256}


def check_bits(bits: Any) -> int | str:
    """A valid `bits` option, given as a number or a string; ValueError listing the valid ones otherwise."""
    value = int(bits) if isinstance(bits, str) and bits.isdigit() else bits
    if value not in STATE_FORMATS:
        raise ValueError(f"Invalid bits: {bits!r}; want one of {', '.join(map(repr, STATE_FORMATS))}.")
    return value


def block_moments(
    param: torch.Tensor, group: Mapping[str, Any], signed_by_name: Mapping[str, bool]
) -> tuple[Moment, ...]:
    """How named moments of a parameter are stored, by the `bits` and `block_size` of its parameter group."""
    kind = STATE_FORMATS[group["bits"]]
    if kind is not None and is_quantized(param):
        return tuple(kind(name, signed, group["block_size"]) for name, signed in signed_by_name.items())
    return tuple(Float32Moment(name) for name in signed_by_name)


def adam_moment_names(amsgrad: bool) -> dict[str, bool]:
    """Moments of Adam -> whether they can be negative."""
    names = {"exp_avg": True, "exp_avg_sq": False}
    return {**names, "max_exp_avg_sq": False} if amsgrad else names


def adam_moments(param: torch.Tensor, *, block_size: int, amsgrad: bool, bits: int | str = 8) -> tuple[Moment, ...]:
    """How Adam's moments of a parameter are stored."""
    return block_moments(param, {"bits": bits, "block_size": block_size}, adam_moment_names(amsgrad))
