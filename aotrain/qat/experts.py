"""prepare_moe_qat: experts of a mixture that train through a scheme's quantization, in their grouped GEMMs.

    prepare_moe_qat(model, "int4-g32")     # and prepare_qat for the linear layers around them
    ...                                    # any training loop; save as ever
    unprepare_moe_qat(model)               # the same parameters in high precision

While a prepared module runs, a grouped GEMM on one of its 3-D parameters multiplies fake-quantized tokens, if the
scheme has activations, by each expert's fake-quantized matrix (`ops.fake_quantized_grouped_mm`). The interception is
that of `aotrain.nn.convert_moe_training`. Parameters stay the masters, the same objects under the same names: a
checkpoint is an ordinary one, and an exporter of its keys quantizes the matrices [out_features, in_features] of single
experts to the values that training saw. Fused gate and up matrices are quantized together, which is the same, except
for the one global scale of NVFP4, which servers of fused experts share as well.

What is quantized is what the grouped GEMM gets. A module that casts its parameters before, as torchtitan's do to
bfloat16, sees the codes of the cast ones: export such a checkpoint with `weight_dtype=torch.bfloat16`.

`weight_fake_quantizer` and `activation_fake_quantizer` (None without) of each prepared module have a switch `enabled`.
"""

import logging

import torch

from aotrain.nn.experts import ExpertScaling, expert_scaling, expert_weights, restore_experts, scale_experts
from aotrain.nn.filters import ModuleFilter
from aotrain.nn.moe import experts_problem, may_be_experts
from aotrain.nn.report import Report, ReportRow, attach_report
from aotrain.ops.fake_quantized_grouped_mm import FakeQuantizedMethod
from aotrain.qat.fake_quantizer import fake_quantizer_of
from aotrain.quantization.schemes import ScaledScheme, Scheme, get_scheme

logger = logging.getLogger(__name__)

_QUANTIZERS = ("activation_fake_quantizer", "weight_fake_quantizer")


def prepare_moe_qat(
    model: torch.nn.Module, scheme: str | Scheme, *, module_filter_fn: ModuleFilter | None = None
) -> Report:
    """Fake-quantize the experts of a model by a scheme, in place.

    A prepared module that trains without calling a grouped GEMM on its weights raises RuntimeError in forward. A module
    whose weights the scheme cannot take is skipped, with the reason in the report.

    Args:
        model: on any device, meta included; before or after FSDP2.
        scheme: a name of `quantization.SCHEMES`, or a scheme.
        module_filter_fn: as of `convert_moe_training`: which of the modules with 3-D parameters.

    Returns:
        What happened to each module; also logged, and kept for `aotrain.conversion_report`.

    Raises:
        ValueError: unknown scheme; experts that are prepared already, or converted to low-precision training; no
            module was prepared.
    """
    scheme = get_scheme(scheme)
    candidates = [(fqn, module) for fqn, module in model.named_modules() if may_be_experts(module)]
    for fqn, module in candidates:
        scaling = expert_scaling(module)
        if scaling is not None and (module_filter_fn is None or module_filter_fn(module, fqn)):
            raise ValueError(_converted_before(fqn, scaling))
    rows = []
    for fqn, module in candidates:
        problem = experts_problem(module, fqn, module_filter_fn) or _scheme_problem(module, scheme)
        if problem is not None:
            rows.append(ReportRow(fqn, "skipped", problem))
            continue
        activation, weight = fake_quantizer_of(scheme.activation), fake_quantizer_of(scheme.weight)
        for name, quantizer in zip(_QUANTIZERS, (activation, weight), strict=True):
            setattr(module, name, quantizer)
        scale_experts(module, ExpertScaling(recipe=FakeQuantizedMethod(activation, weight), fqn=fqn))
        shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in _stacks(module).items())
        rows.append(ReportRow(fqn, "converted", shapes))
    report = Report(f"QAT {scheme.name or scheme.weight}", tuple(rows), what="experts modules")
    if not report.converted:
        raise ValueError(
            f"prepare_moe_qat prepared no module: {report}\nWant experts with 3-D parameters [E, N, K] that the scheme "
            "can take. Experts that are nn.Linear layers of their own are prepared by prepare_qat."
        )
    attach_report(model, report)
    logger.info("%s", report.summary())
    return report


def unprepare_moe_qat(model: torch.nn.Module) -> None:
    """Undo `prepare_moe_qat`, in place: the same parameters, in high precision.

    Raises:
        ValueError: the model has no prepared experts.
    """
    prepared = [module for module in model.modules() if is_prepared(module)]
    if not prepared:
        raise ValueError("unprepare_moe_qat got a model without prepared experts; prepare_moe_qat prepares them.")
    for module in prepared:
        restore_experts(module)
        for name in _QUANTIZERS:
            delattr(module, name)


def is_prepared(module: torch.nn.Module) -> bool:
    """Whether `prepare_moe_qat` has prepared a module."""
    scaling = expert_scaling(module)
    return scaling is not None and isinstance(scaling.recipe, FakeQuantizedMethod)


def _converted_before(fqn: str, scaling: ExpertScaling) -> str:
    if isinstance(scaling.recipe, FakeQuantizedMethod):
        return f"prepare_moe_qat got {fqn or 'a module'} prepared already; go back first: unprepare_moe_qat(model)."
    return (
        f"prepare_moe_qat got {fqn or 'a module'} converted to low-precision training; its products cannot be "
        "fake-quantized too: aotrain.unconvert(model), or leave it out with module_filter_fn."
    )


def _stacks(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in expert_weights(module).items() if weight.dim() == 3}


def _scheme_problem(module: torch.nn.Module, scheme: Scheme) -> str | None:
    """Why a scheme cannot take a module's weights, which are [E, N, K] or [E, K, N]: nobody knows before it runs."""
    for name, weight in _stacks(module).items():
        _, n, k = weight.shape
        problems = [scheme.problem(n, k), scheme.problem(k, n)]
        if None not in problems:
            return f"{name}: {problems[0]}"
        rows = scheme.weight.scaling.block[0] if isinstance(scheme.weight, ScaledScheme) else 1
        if "gate_up" in name and rows > 1 and n % (2 * rows):
            return f"{name}: gate and up are saved apart, and blocks of {rows} rows would lie in both of {n}"
    return None
