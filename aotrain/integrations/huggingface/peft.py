"""LoRA and quantization-aware training together, through peft: adapters trained on the weight that is served.

    from peft import LoraConfig, get_peft_model
    from aotrain.integrations.huggingface.peft import qat_lora_config

    model = get_peft_model(model, qat_lora_config(LoraConfig(r=16, lora_alpha=32), "int4-g32"))
    ...                                                # any loop: Trainer, SFTTrainer, your own
    model.merge_and_unload().save_pretrained(path)     # dense; then export it with the same scheme

Every adapted layer multiplies by the fake-quantized `W + scaling * B @ A` (`aotrain.ops.fake_quantized_lora`).
`merge_and_unload` leaves exactly that sum in the layer, so that quantizing the merged checkpoint gives the weights that
the last forward used, bit for bit on the device that trained. Saving, loading, merging and unmerging are peft's.

Layers that have no adapter stay in high precision, and their gradients are not asked for; but they are served quantized
like the others. Prepare them first, and leave the scheme to them:

    prepare_qat(model, "int4-g32")
    model = get_peft_model(model, qat_lora_config(LoraConfig(...)))
    unseen_linears(model)                              # names of linear layers that nothing quantizes: empty

What has no counterpart in one merged weight is refused: dropout, DoRA and other variants, biases of adapters, several
active adapters. A base model from `disable_adapter()` is what it was before, so it serves as a reference model.

peft's registry of custom modules begins with an underscore there; a test holds it.
"""

import copy
import fnmatch
import functools
from collections.abc import Sequence
from typing import Any, Never

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer

from aotrain.ops.fake_quantize import FakeQuantizer, fake_quantized_linear
from aotrain.ops.fake_quantized_lora import fake_quantized_lora, low_rank_delta, merged_weight
from aotrain.qat.fake_quantizer import fake_quantizer_of
from aotrain.quantization.schemes import Scheme, get_scheme

# Settings of peft that are refused when they are set, and why.
_REFUSED = {
    "lora_dropout": "dropout of the adapter alone has no counterpart in one merged weight; set lora_dropout=0",
    "use_dora": "DoRA is not merged into W + s B A; set use_dora=False",
    "lora_bias": "biases of adapters are not merged into the weight; set lora_bias=False",
    "fan_in_fan_out": "transposed weights are quantized along the wrong dimension; use a model with nn.Linear layers",
    "target_parameters": "adapters of parameters, as of fused experts, are not fake-quantized; target linear layers",
    "layer_replication": "replicated layers share a weight and cannot be merged; leave it out",
    "use_qalora": "QALoRA pools its inputs; set use_qalora=False",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only and cannot be merged; leave it out",
}
# Modules that are trained in full and that exporters leave in high precision unless told otherwise.
_NOT_QUANTIZED = ("lm_head", "embed_tokens", "score", "classifier")


def qat_lora_config(
    config: LoraConfig,
    scheme: str | Scheme | None = None,
    *,
    scale_dtype: torch.dtype | None = None,
    exclude: Sequence[str] = _NOT_QUANTIZED,
) -> LoraConfig:
    """A copy of a LoRA configuration whose adapted linear layers train on their fake-quantized merged weights.

    For `get_peft_model`, for trainers that take a `peft_config`, and for `PeftModel.from_pretrained(..., config=)`.

    Args:
        config: target modules, rank and scaling; see the list above for what is refused.
        scheme: a name of `aotrain.quantization.SCHEMES` or a scheme; None takes that of each layer, which
            `aotrain.qat.prepare_qat` has prepared before.
        scale_dtype: see `aotrain.quantization.get_scheme`.
        exclude: patterns of names in `modules_to_save` that the export leaves in high precision.

    Raises:
        ValueError: unknown scheme; a setting that cannot be served; modules trained in full that would be quantized
            only when they are exported. `get_peft_model` raises it for target modules that are no `nn.Linear`, that
            the scheme cannot take, or that are prepared although a scheme is given.
    """
    problems = [f"{name}: {reason}" for name, reason in _REFUSED.items() if getattr(config, name, None)]
    if scheme is None:  # else prepared modules, and whatever they hold, are fake-quantized in full training as well
        exclude = ("*",)
    problems += [
        f"modules_to_save: {name!r} is trained in high precision but exported quantized; leave it out, or name it in "
        "exclude here and in the export"
        for name in config.modules_to_save or ()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
    ]
    if problems:
        raise ValueError("qat_lora_config got settings that do not go with fake quantization. " + "; ".join(problems))
    config = copy.deepcopy(config)
    build = functools.partial(QATLoraLinear, scheme=None if scheme is None else get_scheme(scheme, scale_dtype))
    modules: dict[Any, Any] = {torch.nn.Linear: build, torch.nn.Module: _refuse_module}  # peft takes the first match
    config._register_custom_module(modules)
    return config


def unseen_linears(model: torch.nn.Module, *, exclude: Sequence[str] = _NOT_QUANTIZED) -> list[str]:
    """Names of the linear layers that training sees in high precision and that an export would quantize.

    Args:
        model: after `get_peft_model`.
        exclude: patterns of names, whole or the last part, that the export leaves in high precision.
    """
    parts = {id(part) for module in model.modules() if _is_adapter(module) for part in module.modules()}
    names = []
    for fqn, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or id(module) in parts or hasattr(module, "weight_fake_quantizer"):
            continue
        if not any(fnmatch.fnmatch(name, pattern) for name in (fqn, fqn.rpartition(".")[2]) for pattern in exclude):
            names.append(fqn)
    return names


class QATLoraLinear(LoraLinear):
    """peft's LoRA of a linear layer, computed on the fake-quantized merged weight.

    Made by peft from `qat_lora_config`. Where the layer below is prepared, its fake quantizers are used; otherwise this
    one has `weight_fake_quantizer` and `activation_fake_quantizer` (None without), each with a switch `enabled`.
    """

    def __init__(self, base_layer: Any, adapter_name: str, *args: Any, scheme: Scheme | None, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        base: Any = self.get_base_layer()
        if not base.weight.is_floating_point() or base.weight.dim() != 2:
            raise ValueError(
                f"QATLoraLinear got a {type(base).__name__} whose weight is {base.weight.dtype} "
                f"{tuple(base.weight.shape)}; want a floating-point matrix: load the model without quantization."
            )
        prepared = hasattr(base, "weight_fake_quantizer")
        if prepared == (scheme is not None):
            raise ValueError(
                f"QATLoraLinear got scheme={scheme and scheme.name!r} for a layer that is "
                f"{'' if prepared else 'not '}prepared for QAT; give the scheme either to prepare_qat or to "
                "qat_lora_config."
            )
        if getattr(getattr(base, "weight_fake_quantizer", None), "is_learned", False):
            raise ValueError(
                "QATLoraLinear got a layer whose range is learned; want dynamic scales, which follow the adapter."
            )
        if scheme is not None:
            problem = scheme.problem(*base.weight.shape)
            if problem is not None:
                raise ValueError(
                    f"QATLoraLinear got a target module that {scheme.name or scheme} cannot take: {problem}."
                )
            self.weight_fake_quantizer = fake_quantizer_of(scheme.weight)
            self.activation_fake_quantizer = fake_quantizer_of(scheme.activation)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        plain = isinstance(self.lora_dropout[adapter_name], torch.nn.Identity) and not self.lora_bias[adapter_name]
        if not plain or adapter_name in self.lora_variant or self.use_dora[adapter_name]:
            raise ValueError(
                f"QATLoraLinear got an adapter {adapter_name!r} with dropout, a bias, or a variant of LoRA; want plain "
                "LoRA, whose merged weight is W + s B A: make its configuration with qat_lora_config."
            )

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A` [N, K] in float32: what forward adds, so that merging leaves what was trained."""
        return low_rank_delta(*self._factors(adapter))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's; with `safe_merge`, which there rounds the adapter first, the same bits as without."""
        if safe_merge:
            for adapter in self.active_adapters if adapter_names is None else adapter_names:
                if adapter not in self.lora_A:
                    continue
                base: Any = self.get_base_layer()
                if not merged_weight(base.weight.data, *self._factors(adapter)).isfinite().all():
                    raise ValueError(f"merge got adapter {adapter!r}, with which a weight is not finite; want another.")
        super().merge(safe_merge=False, adapter_names=adapter_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or any(value is not None for value in kwargs.values()):
            raise ValueError(
                f"QATLoraLinear got arguments besides its input ({', '.join(kwargs) or len(args)}); one adapter is "
                "computed for all rows: leave adapter_names and alora_offsets out."
            )
        if self.disable_adapters:
            return super().forward(x)
        base: Any = self.get_base_layer()
        active = [] if self.merged else [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if len(active) > 1:
            raise ValueError(
                f"QATLoraLinear got the active adapters {', '.join(active)}; want one: model.set_adapter({active[0]!r})"
                ", or combine them with add_weighted_adapter."
            )
        _check_whole(base.weight, *(factor for name in active for factor in self._factors(name)[:2]))
        activation, weight = self._arithmetic("activation", x), self._arithmetic("weight", base.weight)
        if not active:
            return fake_quantized_linear(x, base.weight, base.bias, activation, weight)
        return fake_quantized_lora(x, base.weight, base.bias, *self._factors(active[0]), activation, weight)

    def served_weight(self) -> torch.Tensor:
        """What is quantized now, [N, K] without gradient: W + s B A of the active adapter."""
        base: Any = self.get_base_layer()
        active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if self.merged or self.disable_adapters or not active:
            return base.weight.detach()
        return merged_weight(base.weight, *self._factors(active[0])).detach()

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, K], B [N, r] and the scaling of their product."""
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        return down.weight, up.weight, self.scaling[adapter]

    def _arithmetic(self, role: str, x: torch.Tensor) -> FakeQuantizer | None:
        """What the fake quantizer of the weight or of the activation does now."""
        base = self.get_base_layer()
        owner = base if hasattr(base, "weight_fake_quantizer") else self
        quantizer = getattr(owner, f"{role}_fake_quantizer")
        return None if quantizer is None else quantizer.arithmetic(x)


def _check_whole(*parameters: Any) -> None:
    for parameter in parameters:
        if hasattr(parameter, "device_mesh"):  # a DTensor
            raise ValueError(
                f"QATLoraLinear got a parameter of which this rank holds a part, {tuple(parameter.shape)} as "
                f"{parameter.placements}; the weight and both factors are merged in forward: fully_shard whole blocks, "
                "not adapters or layers in them, and leave tensor parallelism out."
            )


def _is_adapter(module: object) -> bool:
    return isinstance(module, LoraLayer)


def _refuse_module(target: torch.nn.Module, *args: Any, **kwargs: Any) -> Never:
    raise ValueError(
        f"qat_lora_config got a target module that is a {type(target).__name__}; want nn.Linear layers only: others "
        "would train in high precision. Name the linear layers in target_modules."
    )
