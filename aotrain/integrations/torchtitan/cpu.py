"""torchtitan on a machine without an accelerator.

torchtitan decides once, when it is imported, which device it runs on, and takes "cuda" when there is none. It reads
the decision through the module globals ``device_type`` and ``device_module`` at call time, so ``install`` may rebind
them late. ``torch.cpu`` is not enough as a device module: it has no memory statistics, no device properties, and its
``current_device()`` is a string.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuProperties:
    name: str
    # Bytes of physical memory.
    total_memory: int


class CpuDevice:
    """The part of ``torch.cuda``'s module interface that torchtitan calls, for one CPU."""

    def is_available(self) -> bool:
        return True

    def set_device(self, device: object) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: object = None) -> None:
        pass

    def get_device_name(self, device: object = None) -> str:
        return f"CPU {platform.machine()}"

    def get_device_properties(self, device: object = None) -> CpuProperties:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return CpuProperties(name=self.get_device_name(), total_memory=total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """Peak resident memory of this process in bytes, under the keys of the CUDA allocator."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    def reset_peak_memory_stats(self, device: object = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def install() -> int:
    """Make the torchtitan modules that are imported by now run on the CPU.

    Call it after importing what the run needs and before a Trainer is built; a repeated call is harmless. Returns how
    many modules were rebound.
    """
    import torchtitan.tools.utils as titan_utils

    if isinstance(titan_utils.device_module, CpuDevice):
        device: object = titan_utils.device_module
    else:
        device = CpuDevice()
    old_type, old_module = titan_utils.device_type, titan_utils.device_module
    rebound = 0
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith("torchtitan"):
            continue
        names = vars(module)
        if names.get("device_type") == old_type or names.get("device_module") is old_module:
            if "device_type" in names:
                names["device_type"] = "cpu"
            if "device_module" in names:
                names["device_module"] = device
            rebound += 1
    return rebound
