"""Several codes in one byte: 8 of 1 bit, 4 of 2 bits or 2 of 4 bits, the first element in the lowest bits.

Of 4 bits that is the storage of e2m1 data that hardware reads, torch.float4_e2m1fn_x2. (The 4-bit optimizer states of
`aotrain.formats.codebook` have the opposite order, that of the checkpoints they are compatible with.)
"""

import torch


def pack_float4(codes: torch.Tensor) -> torch.Tensor:
    """Pack pairs along the last dimension; an odd last element is followed by the code 0.

    Args:
        codes: uint8 [..., columns] with values below 16.

    Returns:
        uint8 [..., ceil(columns / 2)]; `.view(torch.float4_e2m1fn_x2)` gives it the dtype that torch's products take.
    """
    return pack_codes(codes, 4)


def unpack_float4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The first `columns` codes along the last dimension of what `pack_float4` returned; uint8 [..., columns].

    Args:
        packed: uint8 or float4_e2m1fn_x2 [..., ceil(columns / 2)].
        columns: number of elements.
    """
    return unpack_codes(packed.view(torch.uint8), 4, columns)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack neighbours along the last dimension; a last byte that is not full is filled with the code 0.

    Args:
        codes: uint8 [..., columns] with values below 2^bits.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 [..., ceil(columns * bits / 8)].
    """
    per_byte = _per_byte(bits)
    if codes.shape[-1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    packed = codes[..., ::per_byte]
    for index in range(1, per_byte):
        packed = packed | (codes[..., index::per_byte] << (index * bits))
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The first `columns` codes along the last dimension of what `pack_codes` returned; uint8 [..., columns].

    Args:
        packed: uint8 [..., ceil(columns * bits / 8)].
        bits: 1, 2, 4 or 8.
        columns: number of elements.

    Raises:
        ValueError: another width, or other rows.
    """
    per_byte = _per_byte(bits)
    if packed.shape[-1] != -(-columns // per_byte):
        raise ValueError(
            f"unpack_codes got {packed.shape[-1]} bytes per row for {columns} columns of {bits} bits; want "
            f"{-(-columns // per_byte)}."
        )
    if per_byte == 1:
        return packed
    mask = 2**bits - 1
    shifted = [(packed >> (index * bits)) & mask for index in range(per_byte)]
    return torch.stack(shifted, dim=-1).flatten(-2)[..., :columns]


def _per_byte(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"Packing got codes of {bits} bits; want 1, 2, 4 or 8: store others in the next width.")
    return 8 // bits
