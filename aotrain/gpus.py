"""GPUs that a plan can be made for: peak rates and bandwidths from the vendors' data sheets, as one table.

Rates are dense: where a data sheet prints them with 2:4 sparsity, this is half of the printed number. No torch import
here: the command line checks names before torch is loaded.
"""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU model.

    Attributes:
        name: key in `GPUS`.
        bf16: dense bfloat16 TFLOP/s with float32 accumulation.
        float8: the same for float8; 0 without float8 units.
        int8: dense int8 TOP/s.
        bandwidth: of its memory, TB/s.
        capability: CUDA compute capability; None on AMD.
        gfx: AMD architecture; empty on NVIDIA.
        source: where the numbers are printed.
    """

    name: str
    bf16: float
    float8: float
    int8: float
    bandwidth: float
    capability: tuple[int, int] | None = None
    gfx: str = ""
    source: str


_ROWS = (
    Gpu(
        name="H100",
        bf16=989.4,
        float8=1978.9,
        int8=1978.9,
        bandwidth=3.35,
        capability=(9, 0),
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM column; with sparsity 1979 / 3958 / 3958",
    ),
    Gpu(
        name="H200",
        bf16=989.4,
        float8=1978.9,
        int8=1978.9,
        bandwidth=4.8,
        capability=(9, 0),
        source="NVIDIA H200 Tensor Core GPU data sheet, SXM column; with sparsity 1979 / 3958 / 3958",
    ),
    Gpu(
        name="B200",
        bf16=2250.0,
        float8=4500.0,
        int8=4500.0,
        bandwidth=8.0,
        capability=(10, 0),
        source="NVIDIA Blackwell architecture technical brief, HGX B200 per GPU; with sparsity 4500 / 9000 / 9000",
    ),
    Gpu(
        name="A100",
        bf16=312.0,
        float8=0.0,
        int8=624.0,
        bandwidth=2.039,
        capability=(8, 0),
        source="NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM column",
    ),
    Gpu(
        name="L40S",
        bf16=362.05,
        float8=733.0,
        int8=733.0,
        bandwidth=0.864,
        capability=(8, 9),
        source="NVIDIA L40S data sheet; with sparsity 733 / 1466 / 1466",
    ),
    # Its float8 rate doubles with float16 accumulation, which no training recipe uses.
    Gpu(
        name="RTX 4090",
        bf16=165.2,
        float8=330.3,
        int8=660.6,
        bandwidth=1.008,
        capability=(8, 9),
        source="NVIDIA Ada GPU architecture white paper, appendix A; with sparsity 330.4 / 660.6 / 1321.2",
    ),
    Gpu(
        name="MI300X",
        bf16=1307.4,
        float8=2614.9,
        int8=2614.9,
        bandwidth=5.3,
        gfx="gfx942",
        source="AMD Instinct MI300X accelerator data sheet",
    ),
)

GPUS: dict[str, Gpu] = {row.name: row for row in _ROWS}

# What a plan is made for when neither a name is given nor a GPU is there; most public measurements were made on it.
DEFAULT_GPU = "H100"


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in any case and with or without vendor, spaces or dashes ("rtx4090", "NVIDIA H100").

    Raises:
        ValueError: unknown name; the message lists the valid ones and the nearest.
    """
    keys = {_key(known): gpu for known, gpu in GPUS.items()}
    if (gpu := keys.get(_key(name))) is not None:
        return gpu
    near = difflib.get_close_matches(_key(name), keys, n=1, cutoff=0.5)
    hint = f"; did you mean {keys[near[0]].name!r}?" if near else ""
    raise ValueError(f"Unknown GPU {name!r}; want one of {', '.join(GPUS)}{hint}")


def _key(name: str) -> str:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in ("nvidia", "amd", "geforce", "instinct")).removeprefix("rtx")
