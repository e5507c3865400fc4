"""Exact conversion of 8-bit data to bfloat16 or float32."""

import torch

from aotrain.formats._tables import cached_table


def decode_elements(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8 or int8 data as bfloat16 or float32, exactly.

    On CPU by table: torch's conversion took 8-10 ns per element on a Zen 5 core, the table lookup 1.6 (2048 x 352).
    """
    if data.device.type != "cpu":
        return data.to(dtype)
    values = _values_of_codes(data.dtype, dtype)
    return values.index_select(0, data.contiguous().view(torch.uint8).flatten().int()).view(data.shape)


@cached_table
def _values_of_codes(element_dtype: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(element_dtype).to(dtype)
