"""convert_state: optimizer checkpoints from one state format, or one library, to another.

    state = torch.load("optimizer.pt", weights_only=True)
    optimizer.load_state_dict(convert_state(state, optimizer))

Reads full (unsharded) state_dicts of `torch.optim.Adam(W)`, of this package in any format, of torchao's low-bit
optimizers and of bitsandbytes' Adam(W), and writes the layout that `optimizer` would have created. Every moment goes
through float32, except where source and target store it as the same codes in equal blocks: then codes and scales are
copied, bit for bit. Blocks of other libraries are equal to ours where their size divides the parameter's rows.

With FSDP2, convert a full state_dict and load it with `torch.distributed.checkpoint.state_dict`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aotrain.formats.codebook import dynamic_codebook
from aotrain.formats.scaling import expand_blocks
from aotrain.optim.load import check_finite
from aotrain.optim.sharding import is_dtensor
from aotrain.optim.state import (
    STATE_FORMATS,
    BlockMoment,
    Dynamic4bitMoment,
    Dynamic8bitMoment,
    Float8Moment,
    Moment,
    adam_moment_names,
    block_moments,
    row_length,
)

# Name of each moment in bitsandbytes' state, and where state_dict keeps it from version 0.50 on.
_BITSANDBYTES_SUFFIX = {"exp_avg": "1", "exp_avg_sq": "2"}
_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
# Code values of a map computed in another order of float32 operations; torchao's and bitsandbytes' differ by 1.8e-7.
_MAP_RTOL = 1e-6


@dataclass(frozen=True, slots=True)
class _Source:
    """One moment as found in a checkpoint: its values and, where our layout has the same blocks, how it is stored."""

    value: torch.Tensor
    moment: BlockMoment | None = None
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def convert_state(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state_dict that `optimizer.load_state_dict` accepts, with the moments and step counts of another one.

    Args:
        state_dict: {"state": {id: {...}}, "param_groups": [...]} of a supported optimizer over the same parameters.
            They are matched by name where both have names (`named_parameters()`, `precision_groups`, full state_dicts
            of sharded models), and must be in the same order where not. Not modified.
        optimizer: an optimizer of this package, or `torch.optim.Adam(W)` for export to float32. Its parameters give
            the shapes. Its options are kept except learning rate, betas, eps and weight decay, which come from the
            checkpoint.

    Raises:
        ValueError: other parameters, a state of unknown layout, a moment missing in the source or not
            finite, or sharded tensors.
    """
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    sources = _sources(state_dict["param_groups"], optimizer.param_groups)
    result: dict[str, Any] = copy.deepcopy({**optimizer.state_dict(), "state": {}})
    for target_id, ((saved_id, saved_group), (param, group)) in enumerate(zip(sources, params, strict=True)):
        if saved_id in state_dict["state"]:
            label = f"parameter {saved_id} of shape {tuple(param.shape)}"
            result["state"][target_id] = _convert(label, state_dict["state"][saved_id], saved_group, param, group)
    position = 0
    for group in result["param_groups"]:
        saved_group = sources[position][1] if group["params"] else {}
        group.update({key: saved_group[key] for key in ("lr", "betas", "eps", "weight_decay") if key in saved_group})
        position += len(group["params"])
    return result


def _sources(saved_groups: Sequence[Any], groups: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(saved id, saved group) for each parameter of the target: by name where both have names, else by position."""
    saved = [(index, group) for group in saved_groups for index in group["params"]]
    count = sum(len(group["params"]) for group in groups)
    if len(saved) != count:
        raise ValueError(
            f"convert_state got state of {len(saved)} parameters for an optimizer of {count}; it belongs to "
            "another model or another set of trainable parameters."
        )
    saved_names = [name for group in saved_groups for name in _names(group)]
    if len(saved_names) != count or not all(group.get("param_names") for group in groups if group["params"]):
        return saved
    by_name = dict(zip(saved_names, saved, strict=True))
    names = [name for group in groups for name in group["param_names"]]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"convert_state found no state of {missing[0]!r} (and {len(missing) - 1} more); the checkpoint has "
            f"{', '.join(list(by_name)[:6])}, ... It belongs to another model."
        )
    return [by_name[name] for name in names]


def _names(group: Mapping[str, Any]) -> Sequence[str]:
    """Names of a saved group's parameters: full state_dicts of sharded models have them for ids."""
    ids = group["params"]
    return ids if all(isinstance(index, str) for index in ids) else group.get("param_names", [])


def _convert(
    label: str, saved: Mapping[str, Any], saved_group: Mapping[str, Any], param: torch.Tensor, group: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    if any(isinstance(value, torch.Tensor) and is_dtensor(value) for value in saved.values()):
        raise ValueError(
            f"convert_state got sharded state for {label}; gather it first, for example with "
            "get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True))."
        )
    saved = {**saved, **saved.get(_BITSANDBYTES_WRAPPER, {})}
    converted = {"step": torch.as_tensor(saved.get("step", 0.0), dtype=torch.float32).cpu().clone()}
    for moment in _target_moments(param, group):
        source = _read(label, moment.name, saved, saved_group, param.shape)
        check_finite(label, {moment.name: source.value})
        converted.update(_write(moment, source))
    return converted


def _target_moments(param: torch.Tensor, group: Mapping[str, Any]) -> tuple[Moment, ...]:
    names = adam_moment_names(bool(group.get("amsgrad")))
    return block_moments(param, {"bits": 32, **group}, names)


def _read(
    label: str, name: str, saved: Mapping[str, Any], saved_group: Mapping[str, Any], shape: torch.Size
) -> _Source:
    """A moment of any supported layout."""
    suffix = _BITSANDBYTES_SUFFIX.get(name, "")
    if f"{name}_codes" in saved:
        source = _read_ours(name, saved, saved_group, shape)
    elif hasattr(saved.get(name), "dequantize") and hasattr(saved.get(name), "scale"):
        source = _read_torchao(name, saved[name], shape)
    elif name in saved:
        source = _Source(saved[name].float())
    elif suffix and f"state{suffix}" in saved:
        source = _read_bitsandbytes(name, saved, suffix, shape)
    else:
        raise ValueError(
            f"convert_state found no {name} in the state of {label}; it has {sorted(saved)}. Supported are torch.optim."
            "Adam(W), aotrain.optim, torchao.optim and bitsandbytes Adam(W), with amsgrad where the target has it."
        )
    if source.value.numel() != shape.numel():
        raise ValueError(
            f"convert_state got {name} with {source.value.numel()} elements for {label}; it belongs to another model."
        )
    return replace(source, value=source.value.reshape(shape))


def _read_ours(name: str, saved: Mapping[str, Any], saved_group: Mapping[str, Any], shape: torch.Size) -> _Source:
    kind = STATE_FORMATS[saved_group["bits"]]
    assert kind is not None, "float32 state has no codes"
    moment = kind(name, name == "exp_avg", saved_group["block_size"])
    codes, scale = (saved[key] for key in moment.keys)
    return _Source(moment.decode(codes, scale, shape), moment, codes, scale)


def _read_torchao(name: str, state: Any, shape: torch.Size) -> _Source:
    """OptimState8bit, OptimState4bit and OptimStateFp8, by their attributes: torchao itself is not needed."""
    value = state.dequantize().float()
    qmap = getattr(state, "qmap", None)
    codes = state.codes if qmap is not None else state.codes.view(torch.uint8)
    return _flat_source(name, value, codes, state.scale, qmap, shape)


def _read_bitsandbytes(name: str, saved: Mapping[str, Any], suffix: str, shape: torch.Size) -> _Source:
    """state1 / state2: float32, or uint8 codes in flat blocks with absmax and the map that decodes them."""
    codes = saved[f"state{suffix}"]
    if codes.dtype != torch.uint8:
        return _Source(codes.float())
    scale, qmap = saved[f"absmax{suffix}"].float(), saved[f"qmap{suffix}"].float()
    flat = codes.flatten()
    block_size = _flat_block_size(flat.numel(), scale.numel())
    decoded = qmap[flat.long()] * expand_blocks(scale[None], (1, flat.numel()), (1, block_size))[0]
    return _flat_source(name, decoded, codes, scale, qmap, shape)


def _flat_source(
    name: str,
    value: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    qmap: torch.Tensor | None,
    shape: torch.Size,
) -> _Source:
    """A moment in flat blocks over the whole tensor; with codes and scales if no block crosses a row."""
    signed = name == "exp_avg"
    block_size = _flat_block_size(value.numel(), scale.numel())
    kind = _kind_of_map(qmap, signed)
    if kind is None or row_length(shape) % block_size or value.numel() != shape.numel():
        return _Source(value)
    moment = kind(name, signed, block_size)
    return _Source(value, moment, codes.reshape(moment.codes_shape(shape)), scale.float().reshape(shape[0], -1))


def _kind_of_map(qmap: torch.Tensor | None, signed: bool) -> type[BlockMoment] | None:
    """The format whose codes mean these values; no map means float8, None that no format has it."""
    if qmap is None:
        return Float8Moment
    for kind, bits in ((Dynamic8bitMoment, 8), (Dynamic4bitMoment, 4)):
        ours = dynamic_codebook(signed, qmap.device, bits)
        if ours.shape == qmap.shape and torch.allclose(ours, qmap.float(), rtol=_MAP_RTOL, atol=0.0):
            return kind
    return None


def _flat_block_size(numel: int, num_blocks: int) -> int:
    """Block size of a flat layout: a power of two, as all of these optimizers use, with the last block shorter."""
    for exponent in range(5, 16):
        if -(-numel // 2**exponent) == num_blocks:
            return 2**exponent
    raise ValueError(f"convert_state got {num_blocks} block scales for {numel} codes; no block size explains that.")


def _write(moment: Moment, source: _Source) -> dict[str, torch.Tensor]:
    if not isinstance(moment, BlockMoment):
        return {moment.name: source.value.clone()}
    if moment == source.moment and source.codes is not None and source.scale is not None:
        return dict(zip(moment.keys, (source.codes.clone(), source.scale.clone()), strict=True))
    return dict(zip(moment.keys, moment.encode(source.value), strict=True))
