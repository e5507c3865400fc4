"""Which device a run uses, and whether it can do what the job asks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aotrain.integrations.config_file import JobError
from aotrain.integrations.torchtitan import cpu
from aotrain.integrations.torchtitan.job import PretrainJob

if TYPE_CHECKING:
    from aotrain.integrations.finetune.recipe import Recipe

# First NVIDIA generation (Ada) and first AMD generation (MI300) whose matrix units multiply float8.
_FLOAT8_CUDA = (8, 9)
_FLOAT8_ROCM = ("gfx94", "gfx95", "gfx12")


def choose_device(job: PretrainJob) -> str:
    """ "cpu" or "cuda"; on CPU torchtitan is told so.

    Raises:
        JobError: a GPU is asked for and there is none, or it lacks float8 and emulation is off.
    """
    wanted = job.training.device
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise JobError("training.device: cuda is asked for, but torch sees no GPU; set training.device=cpu or auto")
    if wanted == "cpu" or not available:
        cpu.install()
        return "cpu"
    if job.precision.recipes and not job.precision.emulate and not _gpu_has_float8():
        key, recipe = next(iter(job.precision.recipes.items()))
        raise JobError(
            f"precision.{key}: {recipe} needs a GPU with float8 (NVIDIA Ada or newer, AMD MI300), "
            f"this is {torch.cuda.get_device_name()}; set precision.emulate=true (slow) or precision.{key}=null"
        )
    return "cuda"


def finetune_device(recipe: Recipe, *, use_cpu: bool) -> str:
    """ "cpu" or "cuda" of a fine-tuning run; on CPU torchtitan is told so.

    Raises:
        JobError: the GPU lacks float8, which the recipe trains in.
    """
    if use_cpu or not torch.cuda.is_available():
        cpu.install()
        return "cpu"
    if (recipe.float8 or "").startswith("float8") and not _gpu_has_float8():
        raise JobError(
            f"float8: {recipe.float8} needs a GPU with float8 (NVIDIA Ada or newer, AMD MI300), this is "
            f"{torch.cuda.get_device_name()}; set float8=null or trainer.use_cpu=true"
        )
    return "cuda"


def _gpu_has_float8() -> bool:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties().gcnArchName.startswith(_FLOAT8_ROCM)
    return torch.cuda.get_device_capability() >= _FLOAT8_CUDA
