"""prepare_qat: a model whose linear layers, and embeddings if asked, train through a scheme's quantization.

    report = prepare_qat(model, "int4-g32")
    ... any training loop, any optimizer ...
    convert_qat(model)          # or save the checkpoint, which is an ordinary one, and export it

Parameters stay the objects they were, so an optimizer may exist already; keys of the state_dict do not change. A tied
weight is quantized once, for all the layers that share it, or not at all.
"""

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.qat.linear import FakeQuantizedLinear
from aotrain.qat.swap import FakeQuantized, fake_quantized, swap, unsupported
from aotrain.qat.tensor_config import SchemeFakeQuantizeConfig
from aotrain.qat.ties import Tie, find_ties
from aotrain.quantization.schemes import Scheme, get_scheme

logger = logging.getLogger(__name__)

DEFAULT_EXCLUDE = ("lm_head",)


def prepare_qat(
    model: torch.nn.Module,
    scheme: str | Scheme,
    *,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    embeddings: bool = False,
) -> Report:
    """Fake-quantize a model by a scheme, in place.

    Layers whose shape the scheme cannot take, and subclasses with a forward of their own, are skipped, with the reason
    in the report. A layer whose weight is an embedding's is prepared with the embedding: its weight even if it is
    excluded, its input only if it is not; without `embeddings` it is skipped.

    Args:
        model: on any device, meta included; with tensor parallelism or not; before FSDP.
        scheme: a name of `quantization.SCHEMES`, or a scheme.
        exclude: patterns, as of `fnmatch`, of dotted names of modules that are left alone.
        embeddings: whether embeddings are quantized too, by the scheme of the weights.

    Returns:
        What happened to each layer; also logged, and kept for `aotrain.conversion_report`.

    Raises:
        ValueError: an unknown scheme, a pattern that matches no module, a model that is prepared already, one that
            FSDP shards, or one that has no layer to prepare.
    """
    scheme = get_scheme(scheme)
    _check_patterns(model, exclude)
    prepared = [fqn for fqn, module in model.named_modules() if isinstance(module, FakeQuantized)]
    if prepared:
        raise ValueError(
            f"prepare_qat got a model that is prepared already ({prepared[0]} and {len(prepared) - 1} more); to use "
            'another scheme, go back first: quantize_(model, QATConfig(step="convert"), filter_fn=None).'
        )
    request, ties = _Request(scheme, exclude, embeddings), find_ties(model)
    kinds = (torch.nn.Linear, torch.nn.Embedding) if embeddings else (torch.nn.Linear,)
    replacements: dict[torch.nn.Module, torch.nn.Module] = {}
    rows = []
    for fqn, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        problem = request.problem(fqn, module, ties.get(module))
        if problem is not None:
            rows.append(ReportRow(fqn, "skipped", problem))
            continue
        has_input = isinstance(module, torch.nn.Linear) and not request.excludes(fqn)
        activation = scheme.activation if has_input else None
        configs = (
            None if tensor is None else SchemeFakeQuantizeConfig(tensor) for tensor in (activation, scheme.weight)
        )
        replacements[module] = new = fake_quantized(module, *configs)
        rows.append(ReportRow(fqn, "converted", _description(new)))
    report = Report(f"QAT {scheme.name or scheme.weight}", tuple(rows))
    if not replacements:
        raise ValueError(f"prepare_qat found no layer to prepare: {report}")
    swap(model, replacements)
    attach_report(model, report)
    logger.info("%s", report.summary())
    return report


def _check_patterns(model: torch.nn.Module, exclude: Sequence[str]) -> None:
    if isinstance(exclude, str):
        raise ValueError(f"prepare_qat got exclude={exclude!r}; want a list of patterns: [{exclude!r}].")
    names = [fqn for fqn, _ in model.named_modules()]
    for pattern in exclude:
        if pattern not in DEFAULT_EXCLUDE and not fnmatch.filter(names, pattern):
            raise ValueError(
                f"prepare_qat got exclude={pattern!r}, which matches no module; want a pattern of dotted "
                f"names, such as {next((name for name in names if name.count('.')), 'lm_head')!r}."
            )


@dataclass(frozen=True)
class _Request:
    scheme: Scheme
    exclude: Sequence[str]
    embeddings: bool

    def excludes(self, fqn: str) -> bool:
        return any(fnmatch.fnmatchcase(fqn, pattern) for pattern in self.exclude)

    def problem(self, fqn: str, module: torch.nn.Module, tie: Tie | None) -> str | None:
        """Why a layer is left alone; None when it is prepared. Layers of a tie have one answer."""
        others = {} if tie is None else tie.others(module)
        layers = {fqn: module, **others}
        # The weight of an excluded head is quantized with the embedding that it is.
        with_embedding = self.embeddings and any(isinstance(layer, torch.nn.Embedding) for layer in layers.values())
        for name, layer in layers.items():
            problem = self._own_problem(name, layer, with_embedding and isinstance(layer, torch.nn.Linear))
            if problem is not None:
                return problem if layer is module else f"its weight is that of {name}: {problem}"
        return None

    def _own_problem(self, fqn: str, layer: torch.nn.Module, in_spite_of_exclude: bool) -> str | None:
        if self.excludes(fqn) and not in_spite_of_exclude:
            return "excluded"
        if isinstance(layer, torch.nn.Embedding) and not self.embeddings:
            return "embeddings=True would quantize both"
        problem = unsupported(layer)
        if problem is None:
            assert isinstance(layer.weight, torch.nn.Parameter)
            problem = self.scheme.weight.problem(tuple(layer.weight.shape))
        if problem is None and self.scheme.activation is not None and isinstance(layer, torch.nn.Linear):
            problem = self.scheme.activation.problem((1, layer.in_features))
        return problem


def _description(module: FakeQuantized) -> str:
    rows, columns = module.weight.shape
    if not isinstance(module, FakeQuantizedLinear):
        return f"table, {rows} x {columns}"
    return f"{'weight' if module.activation_fake_quantizer is None else 'weight and input'}, {columns} -> {rows}"
