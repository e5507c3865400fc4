"""The names users import, pinned: a change here is a change for them."""

import importlib

import pytest

PUBLIC = {
    "aotrain": [
        "RECIPES",
        "AdamW8bit",
        "CastConfig",
        "Float8GemmConfig",
        "Float8Linear",
        "Float8LinearConfig",
        "Float8LinearRecipeName",
        "ScalingGranularity",
        "ScalingType",
        "__version__",
        "conversion_report",
        "convert_to_float8_training",
        "get_recipe",
        "unconvert",
    ],
    "aotrain.nn": [
        "CastConfig",
        "Float8GemmConfig",
        "Float8Linear",
        "Float8LinearConfig",
        "Float8LinearRecipeName",
        "Plan",
        "PlanRow",
        "Report",
        "ReportRow",
        "ScalingGranularity",
        "ScalingType",
        "auto_filter_for_recipe",
        "conversion_report",
        "convert_to_float8_training",
        "make_plan",
        "precompute_float8_dynamic_scale_for_fsdp",
        "save_products",
        "unconvert",
    ],
    "aotrain.ops": [
        "OperandCasts",
        "QuantizedWeight",
        "WeightCasts",
        "cast_operand",
        "cast_weight",
        "check_save_for_backward",
        "scaled_linear",
        "transpose_quantized",
    ],
    "aotrain.optim": [
        "Adam4bit",
        "Adam8bit",
        "Adam32bit",
        "AdamFp8",
        "AdamW4bit",
        "AdamW8bit",
        "AdamW32bit",
        "AdamWFp8",
        "CPUOffloadOptimizer",
        "Lion8bit",
        "Muon8bit",
        "convert_state",
        "precision_groups",
    ],
    "aotrain.integrations.huggingface": ["convert_trainer_checkpoint", "optimizer_cls_and_kwargs"],
    "aotrain.kernels": [
        "cast_kernel_gap",
        "float8_problem",
        "native_scaled_mm_problem",
        "scaled_cast",
        "scaled_cast_both",
        "scaled_mm",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_exports(module: str):
    loaded = importlib.import_module(module)
    assert loaded.__all__ == PUBLIC[module]
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
    assert set(loaded.__all__) <= set(dir(loaded))


def test_unknown_name_is_an_attribute_error():
    import aotrain

    with pytest.raises(AttributeError, match="no attribute 'convert_to_int3'"):
        aotrain.convert_to_int3  # noqa: B018


def test_custom_ops_are_registered_once_and_have_schemas():
    import torch

    import aotrain.kernels

    assert aotrain.kernels.scaled_cast is not None
    for op in (torch.ops.aotrain.scaled_cast, torch.ops.aotrain.scaled_cast_both, torch.ops.aotrain.scaled_mm):
        assert not op.default._schema.is_mutable
