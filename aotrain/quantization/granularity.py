"""Granularities: which elements of a tensor share a scale, under the names that users of this field write.

| granularity | elements that share a scale, of a tensor [..., N, K] |
|---|---|
| `PerTensor()` | all |
| `PerAxis(axis)` | a slice along `axis`: `PerAxis(0)` of a weight is one scale per output channel |
| `PerRow(dim=-1)` | a line along `dim`: one scale per output channel of a weight, per token of an activation |
| `PerToken()` | a line along the last dimension |
| `PerGroup(group_size)` | `group_size` neighbours along the last dimension |
| `PerBlock(block_size)` | a tile; sizes go with the last dimensions |
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Granularity:
    """Base of the granularities. Immutable and hashable."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per slice along a dimension.

    Attributes:
        axis: the dimension.
    """

    axis: int


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per group of neighbours along the last dimension.

    Attributes:
        group_size: elements of a group.
    """

    group_size: int


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale per line along a dimension.

    Attributes:
        dim: the dimension along which elements share a scale.
    """

    dim: int = -1


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per line along the last dimension."""


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale per tile of the last dimensions.

    Attributes:
        block_size: size of a tile; dimensions before those that it names have tiles of 1.
    """

    # A list would be neither hashable nor immutable; it becomes a tuple. Checkpoints of others hold lists.
    block_size: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", tuple(self.block_size))


def get_block_size(shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """Number of elements along every dimension that share a scale.

    Raises:
        ValueError: a dimension that the tensor does not have, a group that does not divide the last one, or tiles of
            more dimensions than the tensor has.
        TypeError: not a granularity.
    """
    shape = tuple(shape)
    match granularity:
        case PerTensor():
            return shape
        case PerAxis(axis):
            axis = _dimension(shape, axis, granularity)
            return tuple(1 if dim == axis else size for dim, size in enumerate(shape))
        case PerRow(dim):
            row = _dimension(shape, dim, granularity)
            return tuple(size if dim == row else 1 for dim, size in enumerate(shape))
        case PerToken():
            return get_block_size(shape, PerRow())
        case PerGroup(group_size):
            if not shape or group_size < 1 or shape[-1] % group_size:
                raise ValueError(
                    f"get_block_size got shape {shape} with {granularity}; want a group that divides the last "
                    "dimension."
                )
            return (*(1 for _ in shape[:-1]), group_size)
        case PerBlock(block_size):
            if len(block_size) > len(shape):
                raise ValueError(f"get_block_size got shape {shape} with {granularity}; want at most as many sizes.")
            return (*(1 for _ in shape[: len(shape) - len(block_size)]), *block_size)
    raise TypeError(f"get_block_size got {granularity!r}; want a granularity object, such as PerRow().")


def _dimension(shape: tuple[int, ...], dim: int, granularity: Granularity) -> int:
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"get_block_size got shape {shape} with {granularity}; want a dimension that it has.")
    return dim % len(shape)
