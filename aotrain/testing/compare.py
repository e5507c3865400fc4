"""How tests compare tensors: bit for bit, or by SQNR in dB. There is no third metric."""

import torch

_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sqnr(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB: 20 log10(|reference| / |reference - actual|), inf when equal.

    Computed in float64 over all elements; 20 dB means a relative error of 10 %, 40 dB of 1 %.
    """
    if reference.shape != actual.shape:
        raise ValueError(f"sqnr got shapes {tuple(reference.shape)} and {tuple(actual.shape)}; want equal shapes.")
    signal, noise = reference.double().norm(), (reference.double() - actual.double()).norm()
    return (20 * torch.log10(signal / noise)).item()


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, *, what: str = "tensor") -> None:
    """Fail unless both tensors have the same dtype, shape and bits; NaNs are equal only with equal payloads.

    The message gives the number of differing elements and the first one's coordinate, values and bits.
    """
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, want {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(expected.shape)}"
    if actual.device != expected.device:
        actual, expected = actual.cpu(), expected.cpu()
    actual_bits, expected_bits = _bits(actual), _bits(expected)
    differs = actual_bits != expected_bits
    if not differs.any():
        return
    where = tuple(differs.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at {where}: "
        f"{actual[where].float().item()!r} (bits {actual_bits[where].item():#x}), "
        f"want {expected[where].float().item()!r} (bits {expected_bits[where].item():#x})"
    )


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(_INT_OF_SIZE[x.element_size()])
