"""KernelVariant: one specialization of a Triton kernel, as data for ahead-of-time compilation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POINTER_OF_ELEMENT = {"float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5", "int8": "*i8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelVariant:
    """One specialization of a kernel.

    Attributes:
        name: kernel name without the leading underscore and the trailing `_kernel`.
        variant: what distinguishes it from the other specializations.
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type, "constexpr" for compile-time constants.
        constants: compile-time constants by name.
        aligned: arguments that are multiples of 16, as the launcher finds them for contiguous tensors.
        num_warps: warps per program.
        options: further compiler options.
    """

    name: str
    variant: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})
