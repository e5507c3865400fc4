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
        "convert_to_mx_training",
        "get_recipe",
        "quantize_",
        "unconvert",
    ],
    "aotrain.formats": [
        "BFLOAT16",
        "BLOCKWISE_1X16",
        "BLOCKWISE_1X32",
        "BLOCKWISE_1X128",
        "BLOCKWISE_16X16",
        "BLOCKWISE_128X128",
        "COLWISE",
        "ELEMENT_FORMATS",
        "FLOAT4_E2M1",
        "FLOAT6_E2M3",
        "FLOAT6_E3M2",
        "FLOAT8_E4M3",
        "FLOAT8_E4M3FNUZ",
        "FLOAT8_E5M2",
        "FLOAT8_E5M2FNUZ",
        "INT8",
        "ROWWISE",
        "SCALE_FORMATS",
        "TENSORWISE",
        "ElementFormat",
        "Nvfp4Tensor",
        "ScaleFormat",
        "ScaledTensor",
        "Scaling",
        "blocked_size",
        "data_key",
        "decode_elements",
        "dequantize",
        "dequantize_nvfp4",
        "fake_quantize",
        "from_blocked",
        "hadamard_signs",
        "hadamard_transform",
        "inverse_hadamard_transform",
        "is_mx",
        "nvfp4_global_scale",
        "pack_float4",
        "philox_bits16",
        "philox_u32",
        "quantize",
        "quantize_mx",
        "quantize_nvfp4",
        "round_nearest",
        "round_stochastic",
        "scale_shape",
        "stochastic_key",
        "to_blocked",
        "unpack_float4",
    ],
    "aotrain.nn": [
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
        "convert_to_float8_training",
        "convert_to_mx_training",
        "keep_tail_layers",
        "make_plan",
        "precompute_float8_dynamic_scale_for_fsdp",
        "save_products",
        "unconvert",
    ],
    "aotrain.ops": [
        "PAYLOADS",
        "Nvfp4Recipe",
        "OperandCasts",
        "Payload",
        "QuantizedRows",
        "QuantizedWeight",
        "WeightCasts",
        "all_to_all_combine",
        "all_to_all_dispatch",
        "all_to_all_dispatch_quantized",
        "cast_operand",
        "cast_weight",
        "check_save_for_backward",
        "dequantize_rows",
        "generate_permute_indices",
        "nvfp4_linear",
        "pad_token_groups",
        "permute",
        "permute_and_pad",
        "permute_quantized",
        "scaled_grouped_mm",
        "scaled_linear",
        "transpose_quantized",
        "unpad_token_groups",
        "unpermute",
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
    "aotrain.quantization": ["quantize_", "register_quantize_handler"],
    "aotrain.kernels": [
        "Nvfp4Operand",
        "RowPermutation",
        "cast_kernel_gap",
        "expert_major_permutation",
        "float8_problem",
        "gather_rows",
        "mx_cast",
        "mx_cast_both",
        "mx_mm",
        "mx_mm_problem",
        "native_scaled_mm_problem",
        "nvfp4_cast",
        "nvfp4_cast_both",
        "nvfp4_mm",
        "operand_multiples",
        "scaled_cast",
        "scaled_cast_after",
        "scaled_cast_both",
        "scaled_mm",
        "sum_rows",
        "with_equal_depths",
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
