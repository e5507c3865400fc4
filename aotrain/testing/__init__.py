"""What tests and benchmarks share: one error metric, bitwise comparison, adversarial inputs, the interpreter fix."""

from aotrain.testing.compare import assert_bitwise_equal, sqnr
from aotrain.testing.inputs import adversarial_matrix, all_bfloat16_values, all_codes

__all__ = ["adversarial_matrix", "all_bfloat16_values", "all_codes", "assert_bitwise_equal", "sqnr"]
