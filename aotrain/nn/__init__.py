"""Modules and model conversion. A converted model keeps its Parameters, their names and its state_dict."""

from aotrain.nn.checkpointing import save_products
from aotrain.nn.convert import convert_to_float8_training, convert_to_mx_training, unconvert
from aotrain.nn.expert_parallel import ExpertParallel
from aotrain.nn.filters import auto_filter_for_recipe
from aotrain.nn.float8_config import (
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from aotrain.nn.float8_linear import Float8Linear
from aotrain.nn.fsdp_wrap import precompute_float8_dynamic_scale_for_fsdp
from aotrain.nn.moe import convert_moe_training
from aotrain.nn.mx_config import (
    Float8TrainingOpConfig,
    Float8TrainingRecipe,
    KernelPreference,
    MXFP8TrainingOpConfig,
    MXFP8TrainingRecipe,
    MXLinearConfig,
    ScaleCalculationMode,
)
from aotrain.nn.mx_linear import MXFP8Linear, MXLinear
from aotrain.nn.nvfp4_linear import NVFP4Linear, NVFP4TrainingConfig
from aotrain.nn.plan import Plan, PlanRow, make_plan
from aotrain.nn.report import Report, ReportRow, conversion_report
from aotrain.nn.tail_filter import keep_tail_layers

__all__ = [
    "CastConfig",
    "ExpertParallel",
    "Float8GemmConfig",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8TrainingOpConfig",
    "Float8TrainingRecipe",
    "KernelPreference",
    "MXFP8Linear",
    "MXFP8TrainingOpConfig",
    "MXFP8TrainingRecipe",
    "MXLinear",
    "MXLinearConfig",
    "NVFP4Linear",
    "NVFP4TrainingConfig",
    "Plan",
    "PlanRow",
    "Report",
    "ReportRow",
    "ScaleCalculationMode",
    "ScalingGranularity",
    "ScalingType",
    "auto_filter_for_recipe",
    "conversion_report",
    "convert_moe_training",
    "convert_to_float8_training",
    "convert_to_mx_training",
    "keep_tail_layers",
    "make_plan",
    "precompute_float8_dynamic_scale_for_fsdp",
    "save_products",
    "unconvert",
]
