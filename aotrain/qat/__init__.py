"""Quantization-aware training: train through the quantization that the model will be served in.

Two ways in: `prepare_qat(model, "int4-g32")` with a scheme by name, and `quantize_(model, QATConfig(base_config))` with
the configurations that users of this field write. Both give layers that hold the parameters they were made from;
`convert_qat`, or the convert step, gives quantized layers with the very numbers that training saw.
"""

from aotrain.qat.api import (
    FromIntXQuantizationAwareTrainingConfig,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
    QATStep,
    from_intx_quantization_aware_training,
    intx_quantization_aware_training,
)
from aotrain.qat.convert import convert_qat
from aotrain.qat.distill import distillation_loss
from aotrain.qat.embedding import FakeQuantizedEmbedding
from aotrain.qat.experts import prepare_moe_qat, unprepare_moe_qat
from aotrain.qat.fake_quantizer import (
    FakeQuantizer,
    FakeQuantizerBase,
    Float8FakeQuantizer,
    Int4WeightFakeQuantizer,
    IntxFakeQuantizer,
    initialize_fake_quantizers,
)
from aotrain.qat.fused_scales import share_global_scales
from aotrain.qat.linear import FakeQuantizedLinear, MXFakeQuantizedLinear, NVFP4FakeQuantizedLinear
from aotrain.qat.mx_config import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig
from aotrain.qat.prepare import prepare_qat
from aotrain.qat.schedule import QATSchedule
from aotrain.qat.tensor_config import (
    FakeQuantizeConfig,
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    SchemeFakeQuantizeConfig,
)
from aotrain.qat.two_step import (
    ComposableQATQuantizer,
    Float8ActInt4WeightQATQuantizer,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATQuantizer,
    TwoStepQuantizer,
)

__all__ = [
    "ComposableQATQuantizer",
    "FakeQuantizeConfig",
    "FakeQuantizeConfigBase",
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "FakeQuantizer",
    "FakeQuantizerBase",
    "Float8ActInt4WeightQATQuantizer",
    "Float8FakeQuantizeConfig",
    "Float8FakeQuantizer",
    "FromIntXQuantizationAwareTrainingConfig",
    "Int4WeightFakeQuantizeConfig",
    "Int4WeightFakeQuantizer",
    "Int4WeightOnlyEmbeddingQATQuantizer",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATQuantizer",
    "IntXQuantizationAwareTrainingConfig",
    "IntxFakeQuantizeConfig",
    "IntxFakeQuantizer",
    "MXFakeQuantizeConfig",
    "MXFakeQuantizedLinear",
    "NVFP4FakeQuantizeConfig",
    "NVFP4FakeQuantizedLinear",
    "QATConfig",
    "QATSchedule",
    "QATStep",
    "SchemeFakeQuantizeConfig",
    "TwoStepQuantizer",
    "convert_qat",
    "distillation_loss",
    "from_intx_quantization_aware_training",
    "initialize_fake_quantizers",
    "intx_quantization_aware_training",
    "prepare_moe_qat",
    "prepare_qat",
    "share_global_scales",
    "unprepare_moe_qat",
]
