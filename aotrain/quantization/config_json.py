"""Configurations as JSON, as the `quantization_config` of checkpoints on the Hugging Face hub holds them.

    config_to_dict(Int4WeightOnlyConfig(32)) == {
        "_type": "Int4WeightOnlyConfig",
        "_version": 2,
        "_data": {"group_size": 32, ..., "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "PLAIN"}, ...},
    }

A dtype is `{"_type": "torch.dtype", "_data": "int4"}`, a member of an enumeration its name, a nested configuration,
granularity or named tuple the same shape as the whole. Names of classes, fields and members are the format. What is
read back must be a class of the table below: a checkpoint cannot name any other.
"""

import dataclasses
import enum
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from aotrain.formats import MappingType, ZeroPointDomain
from aotrain.nn import KernelPreference, ScaleCalculationMode
from aotrain.quantization import enums, granularity
from aotrain.quantization.configs import AOBaseConfig
from aotrain.quantization.float_configs import Float8MMConfig
from aotrain.quantization.fqn_config import FqnToConfig
from aotrain.quantization.post_training import BASE_CONFIGS

_DTYPE = "torch.dtype"
_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *BASE_CONFIGS,
        FqnToConfig,
        Float8MMConfig,
        *(granularity.PerTensor, granularity.PerAxis, granularity.PerGroup),
        *(granularity.PerRow, granularity.PerToken, granularity.PerBlock),
        *(enums.Int4PackingFormat, enums.Int4ChooseQParamsAlgorithm, enums.Float8PackingFormat),
        *(enums.IntxPackingFormat, enums.IntxChooseQParamsAlgorithm),
        *(MappingType, ZeroPointDomain, KernelPreference, ScaleCalculationMode),
    )
} | {"ModuleFqnToConfig": FqnToConfig, "AOPerModuleConfig": FqnToConfig}


def config_to_dict(config: AOBaseConfig) -> dict[str, Any]:
    """A configuration as what `json.dumps` takes.

    Raises:
        TypeError: not a configuration.
        NotImplementedError: a field holds what has no JSON form, such as a tuple.
    """
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"config_to_dict got a {type(config).__name__}; want a configuration, an AOBaseConfig.")
    return _encode(config)


def config_from_dict(data: dict[str, Any]) -> AOBaseConfig:
    """The configuration that `config_to_dict` wrote, here or in torchao.

    A version that is not that of this library warns, and is passed to the class, which may refuse it.

    Raises:
        TypeError: not a dictionary.
        ValueError: parts of the form are missing, or a class, member or dtype is unknown, or the class refuses.
    """
    if not isinstance(data, dict):
        raise TypeError(f"config_from_dict got a {type(data).__name__}; want a dictionary.")
    config = _decode_object(data)
    if not isinstance(config, AOBaseConfig):
        raise ValueError(f"config_from_dict got a {data['_type']}; want a configuration.")
    return config


def _encode(value: Any) -> Any:
    match value:
        case enum.Enum():
            return {"_type": type(value).__name__, "_data": value.name}
        case torch.dtype():
            return {"_type": _DTYPE, "_data": str(value).removeprefix("torch.")}
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {key: _encode(each) for key, each in value.items()}
        case list():
            return [_encode(each) for each in value]
    fields = _fields(value)
    if fields is None:
        raise NotImplementedError(
            f"config_to_dict got {value!r} of type {type(value).__name__}; want numbers, strings, lists, dictionaries, "
            "dtypes, enumerations, configurations and granularities."
        )
    fields.pop("version", None)
    version = getattr(value, "version", 1)
    return {"_type": type(value).__name__, "_version": version, "_data": {key: _encode(fields[key]) for key in fields}}


def _fields(value: Any) -> dict[str, Any] | None:
    """Public fields of a configuration, granularity or named tuple."""
    if isinstance(value, granularity.PerBlock):
        return {"block_size": list(value.block_size)}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name[0] != "_"}
    return value._asdict() if isinstance(value, tuple) and hasattr(value, "_asdict") else None


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "_type" in value and "_data" in value:
        return _decode_object(value)
    return {key: _decode(each) for key, each in value.items()}


def _decode_object(data: dict[str, Any]) -> Any:
    if "_type" not in data or "_data" not in data:
        raise ValueError(f"config_from_dict got keys {sorted(map(str, data))}; want `_type` and `_data`.")
    name, content = data["_type"], data["_data"]
    if name == _DTYPE:
        dtype = getattr(torch, str(content), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"config_from_dict got the dtype {content!r}; want a name of torch, such as int4.")
        return dtype
    cls = _CLASSES.get(name)
    if cls is None:
        raise ValueError(
            f"Failed to find class {name!r} in any of the allowed modules: aotrain.quantization has "
            f"{', '.join(sorted(_CLASSES))}."
        )
    if issubclass(cls, enum.Enum):
        if content not in cls.__members__:
            raise ValueError(f"config_from_dict got {name} {content!r}; want one of {', '.join(cls.__members__)}.")
        return cls[content]
    if not isinstance(content, dict):
        raise ValueError(
            f"config_from_dict got `_data` of {name} that is a {type(content).__name__}; want a dictionary."
        )
    return _build(cls, {key: _decode(each) for key, each in content.items()}, data.get("_version"))


def _build(cls: type, fields: dict[str, Any], stored: int | None) -> Any:
    current = getattr(cls, "version", 1)
    if stored is not None and stored != current:
        warnings.warn(
            f"{cls.__name__} was stored as version {stored}; this library has version {current}.", stacklevel=4
        )
        if dataclasses.is_dataclass(cls) and any(field.name == "version" for field in dataclasses.fields(cls)):
            fields["version"] = stored
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Failed to create instance of {cls.__name__}: {error}") from error
