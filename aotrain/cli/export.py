"""`aotrain export SOURCE DESTINATION --scheme NAME`: a trained checkpoint in a format that servers read."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

# Spelled out, so that a mistake is found before torch is loaded.
_DTYPES = ("float32", "bfloat16", "float16")


def _optional(metavar: str) -> Any:
    """An option whose help text says what its absence means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def export(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESTINATION")],
    scheme: Annotated[str, tyro.conf.arg(metavar="NAME")],
    format: Annotated[str, tyro.conf.arg(metavar="NAME")] = "compressed-tensors",
    exclude: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="LAYER")] = (),
    embeddings: bool = False,
    dtype: Annotated[str | None, _optional("NAME")] = None,
    weight_dtype: Annotated[str | None, _optional("NAME")] = None,
    no_verify: bool = False,
    check: bool = False,
) -> int:
    """Quantize the linear layers of a dense checkpoint, write it for a server, read it back and compare.

    Args:
        source: folder of a dense Hugging Face checkpoint (config.json and *.safetensors), as the Trainer writes it.
        destination: folder to write; must not exist.
        scheme: the scheme of training: int4-g32, int4-g128, int2-g32, int8-g32, int8, int4-g32-a8, int4-g32-a4, 8da4w,
            fp8, fp8-weight-only, fp8-block, nvfp4, mxfp4, mxfp8 or q4_0.
        format: compressed-tensors, torchao, gguf-grid (scheme q4_0) or float8-block (scheme fp8-block).
        exclude: keep these layers dense: patterns of module names such as "model.layers.0.*". May be repeated; lm_head
            is always kept.
        embeddings: quantize the embedding of tokens too, as training did: formats torchao and gguf-grid.
        dtype: float32, bfloat16 or float16: of the model when it is served. Default: that of the source.
        weight_dtype: in which training quantized the weights, where layers got copies of float32 masters: bfloat16 for
            FSDP2 with mixed precision and for torchtitan. Default: as they are in the source.
        no_verify: do not read back what was written.
        check: write nothing; say what servers will see, and what would be refused. DESTINATION is not looked at.
    """
    for option, name in (("--dtype", dtype), ("--weight-dtype", weight_dtype)):
        if name is not None and name not in _DTYPES:
            print(f"error: {option} got {name}; want one of {', '.join(_DTYPES)}", file=sys.stderr)
            return 2
    import torch

    from aotrain.export import describe_export
    from aotrain.export import export as run

    options: dict[str, Any] = {
        "scheme": scheme,
        "format": format,
        "exclude": ("lm_head", *exclude),
        "embeddings": embeddings,
        "dtype": None if dtype is None else getattr(torch, dtype),
        "weight_dtype": None if weight_dtype is None else getattr(torch, weight_dtype),
    }
    try:
        if check:
            print(describe_export(source, **options))
        else:
            print(run(source, destination, **options, verify=not no_verify))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
