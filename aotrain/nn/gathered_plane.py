"""GatheredPlane: the codes that FSDP2 has gathered of a weight, and the op by which a compiled graph gets them.

A compiled graph knows a weight by its *handle* only, a tensor that holds a number. The codes in FSDP2's memory come and
go: those of forward are freed, other ones may be gathered for backward, and a forward that is repeated in backward
(activation checkpointing) needs the first again. So the graph does not hold them; `aotrain::gathered_codes` looks up
what is there when it runs, and gathers what is not, as a layer that is not compiled does. It returns a copy, as a graph
may write to what its operations return: one byte read and one written per element, of which the transposition for
grad_input needs no more either way.
"""

import itertools
import weakref
from collections.abc import Callable

import torch

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS, ScaledTensor, Scaling, scale_shape
from aotrain.kernels._library import LIBRARY
from aotrain.recipes import transposed_scaling

LIBRARY.define(
    "gathered_codes(Tensor weight, Tensor? after, SymInt rows, SymInt columns, Device device, bool transposed,"
    " str element, str scale, int block_rows, int block_columns) -> (Tensor data, Tensor scale)",
    # What it returns depends on more than its arguments: a replayed CUDA graph would not see it.
    tags=(torch.Tag.cudagraph_unsafe,),
)

_planes: "weakref.WeakValueDictionary[int, GatheredPlane]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


class GatheredPlane:
    """What was gathered, shared by all views of one GatheredWeight and replaced at each gather.

    Attributes:
        q: the codes and scales.
        gather: gathers another plane; a collective that all ranks of the mesh must call.
        handle: int64 [], on the CPU; the same for all gathers.
    """

    def __init__(self, q: ScaledTensor, gather: Callable[[Scaling], ScaledTensor]) -> None:
        self.q, self.gather = q, gather
        number = next(_numbers)
        with torch.inference_mode(False):  # graphs that are compiled for training save it
            self.handle = torch.tensor(number, device="cpu")
        _planes[number] = self

    def plane(self, scaling: Scaling) -> ScaledTensor:
        """The codes and scales of a plane."""
        if self.q.data.numel() and self.q.data.untyped_storage().size() == 0:
            raise RuntimeError(
                "a weight gathered by FSDP2 was used after FSDP2 had freed it; use it inside the forward or backward "
                "of its module, or call module.unshard() first."
            )
        return self.q if scaling == self.q.scaling else self.gather(scaling)


def gathered_codes(
    weight: torch.Tensor, scaling: Scaling, *, transposed: bool, after: torch.Tensor | None = None
) -> ScaledTensor:
    """`WeightCasts` of a GatheredWeight [N, K] in a compiled graph."""
    rows, columns = weight.shape
    scaling_args = scaling.element.name, scaling.scale.name, *scaling.block
    data, scale = torch.ops.aotrain.gathered_codes(
        weight, after, rows, columns, weight.device, transposed, *scaling_args
    )
    return ScaledTensor(data, scale, scaling)


def _look_up(
    handle: torch.Tensor,
    after: torch.Tensor | None,
    rows: int,
    columns: int,
    device: torch.device,
    transposed: bool,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    block = (block_rows, block_columns)
    scaling = Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=block)
    q = _planes[int(handle)].plane(transposed_scaling(scaling) if transposed else scaling)
    return _copy(q.data, transposed), _copy(q.scale, transposed)


def _copy(x: torch.Tensor, transposed: bool) -> torch.Tensor:
    return (x.t() if transposed else x).clone(memory_format=torch.contiguous_format)


def _fake(
    handle: torch.Tensor,
    after: torch.Tensor | None,
    rows: int,
    columns: int,
    device: torch.device,
    transposed: bool,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (columns, rows) if transposed else (rows, columns)
    data = torch.empty(shape, dtype=ELEMENT_FORMATS[element].dtype, device=device)
    of_scale = scale_shape(shape, (block_rows, block_columns))
    return data, torch.empty(of_scale, dtype=SCALE_FORMATS[scale].dtype, device=device)


LIBRARY.impl("gathered_codes", _look_up, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::gathered_codes", _fake, lib=LIBRARY)
