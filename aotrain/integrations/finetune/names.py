"""Names that a fine-tuning recipe may give, known without importing torch.

A recipe is checked before anything heavy is loaded, so the names of schemes, of float8 recipes and of export formats
stand here once more; tests hold them equal to the tables of the packages that implement them.
"""

import difflib
from collections.abc import Callable, Iterable

from aotrain.integrations.optimizers import OPTIMIZERS, canonical_name

# Keys of `aotrain.quantization.SCHEMES`.
SCHEMES = (
    "int2-g32",
    "int3-g32",
    "int4-g32",
    "int4-g128",
    "int8-g32",
    "int8",
    "int4-g32-a8",
    "int4-g32-a4",
    "8da4w",
    "fp8",
    "fp8-weight-only",
    "fp8-block",
    "nvfp4",
    "mxfp4",
    "mxfp8",
    "q4_0",
)

# What `Float8LinearConfig.from_recipe_name` takes, by its long names, and the short ones.
FLOAT8_RECIPES = (
    "float8_tensorwise",
    "float8_rowwise",
    "float8_rowwise_with_gw_hp",
    "float8_blockwise",
    "int8_rowwise",
)
_SHORT = tuple(name.removeprefix("float8_") for name in FLOAT8_RECIPES)

# torch's own AdamW beside ours.
TORCH_ADAMW = "adamw"

# Keys of `aotrain.export.table.FORMATS` -> the schemes that each carries.
EXPORT_FORMATS = {
    "compressed-tensors": tuple(name for name in SCHEMES if name not in ("int3-g32", "8da4w", "q4_0")),
    "torchao": (
        *("int2-g32", "int3-g32", "int4-g32", "int4-g128", "int8-g32", "int8", "8da4w", "fp8", "fp8-weight-only"),
    ),
    "gguf-grid": ("q4_0",),
    "float8-block": ("fp8-block",),
}


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A validator that takes these names, and else says which one was probably meant."""
    known = tuple(names)

    def validate(value: str) -> str:
        if value in known:
            return value
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"got {value!r}, want one of {', '.join(known)}{hint}")

    return validate


def float8_recipe(value: str) -> str:
    """The long name of a float8 recipe; ValueError for an unknown one."""
    return f"float8_{value}" if value in _SHORT and value not in FLOAT8_RECIPES else one_of(FLOAT8_RECIPES)(value)


def optimizer_name(value: str) -> str:
    """Our name of an optimizer, `adamw8bit` and others' spellings included, or `adamw`, torch's own."""
    if value in (TORCH_ADAMW, "adamw_torch", "adamw_torch_fused"):
        return TORCH_ADAMW
    plain = {name.replace("_", ""): name for name in OPTIMIZERS}
    try:
        return canonical_name(plain.get(value, value))
    except ValueError as error:
        raise ValueError(f"{error} (or {TORCH_ADAMW}, torch's own)") from None


def export_problem(scheme: str, export_format: str) -> str | None:
    """Why a scheme is not written in a format, with the remedy; None when it is."""
    if scheme in EXPORT_FORMATS[export_format]:
        return None
    others = " or ".join(name for name, carried in EXPORT_FORMATS.items() if scheme in carried)
    # The two that are asked for most, and why not.
    why = {
        "int3-g32": "; readers disagree on how its codes are packed",
        "8da4w": "; its activations are asymmetric, for ExecuTorch: int4-g32-a8 is the symmetric scheme",
    }.get(scheme, "")
    return f"got {export_format!r}, which does not carry {scheme}{why}; want {others}"
