"""Two 4-bit codes in one byte, the storage of e2m1 data that hardware reads.

The even element is in the low half, the odd one in the high half, as in torch.float4_e2m1fn_x2. (The 4-bit optimizer
states of `aotrain.formats.codebook` have the opposite order, that of the checkpoints they are compatible with.)
"""

import torch


def pack_float4(codes: torch.Tensor) -> torch.Tensor:
    """Pack pairs along the last dimension; an odd last element is followed by the code 0.

    Args:
        codes: uint8 [..., columns] with values below 16.

    Returns:
        uint8 [..., ceil(columns / 2)]; `.view(torch.float4_e2m1fn_x2)` gives it the dtype that torch's products take.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_float4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The first `columns` codes along the last dimension of what `pack_float4` returned; uint8 [..., columns].

    Args:
        packed: uint8 or float4_e2m1fn_x2 [..., ceil(columns / 2)].
        columns: number of elements.
    """
    if packed.shape[-1] != -(-columns // 2):
        raise ValueError(
            f"unpack_float4 got {packed.shape[-1]} bytes per row for {columns} columns; want {-(-columns // 2)}."
        )
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :columns]
