"""What a server will see of an export, told without reading a weight: its scheme, and the layers that it joins."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from aotrain.export.base import ExportFormat
from aotrain.export.checkpoint import Checkpoint
from aotrain.export.planning import make_plan
from aotrain.export.report import layers_text
from aotrain.export.selection import module_name
from aotrain.export.table import check_format, get_format
from aotrain.quantization.fused_groups import FUSED, fused_groups
from aotrain.quantization.schemes import Nvfp4Scheme, Scheme, get_scheme

# Of a layer among those that it is joined with.
_PLACE = {leaf: place for family in FUSED for place, leaf in enumerate(family)}


def describe_export(
    source: Path | str,
    *,
    scheme: str | Scheme,
    format: str = "compressed-tensors",
    exclude: Sequence[str] = ("lm_head",),
    embeddings: bool = False,
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
) -> str:
    """What `export` would write, from the headers of the source; refuses what it would refuse before it writes.

    Args:
        source: as of `export`, and so are the others.

    Raises:
        ValueError: as of `export`.
        ImportError: safetensors is not installed.
    """
    chosen, scheme = get_format(format), get_scheme(scheme)
    check_format(chosen, scheme)
    checkpoint = Checkpoint(Path(source).expanduser())
    plan, _, skipped = make_plan(checkpoint, scheme, chosen, exclude, dtype, weight_dtype, embeddings=embeddings)
    served = next(iter(plan.layers.values())).dtype
    tables = sum(layer.embedding for layer in plan.layers.values())
    lines = [
        f"{source}: {layers_text(len(plan.layers) - tables, tables)} as {scheme.name or scheme}, {chosen.name}, served "
        f"in {str(served).removeprefix('torch.')}; {len(skipped)} matrices stay dense",
        *served_lines(scheme, chosen, map(module_name, plan.layers)),
    ]
    return "\n".join(lines)


def served_lines(scheme: Scheme, chosen: ExportFormat, names: Iterable[str]) -> list[str]:
    """The scheme as the format's readers name it, and which layers they join.

    Args:
        scheme: of the linear layers.
        chosen: a format that carries it.
        names: of the modules that are quantized.
    """
    kinds: dict[str, int] = {}
    for group in fused_groups(names):
        if len(group) > 1:
            parent = group[0].rpartition(".")[0].rpartition(".")[2]
            kind = " + ".join(sorted((name.rpartition(".")[2] for name in group), key=_PLACE.__getitem__))
            kind = f"{parent}: {kind}" if parent and not parent.isdigit() else kind
            kinds[kind] = kinds.get(kind, 0) + 1
    shared = isinstance(scheme.weight, Nvfp4Scheme) and scheme.weight.two_level
    scales = "one global scale for each group" if shared else "no scale is common to a group"
    lines = [f"server: {chosen.server_view(scheme)}"]
    if kinds:
        lines += [f"joined by servers into one layer; {scales}:"]
        lines += [f"  {kind} ({count} {'group' if count == 1 else 'groups'})" for kind, count in kinds.items()]
    return lines
