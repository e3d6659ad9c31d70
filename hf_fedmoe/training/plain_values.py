"""Settings of any kind in values that JSON knows, for comparing them across processes and days."""

import enum
import functools
import hashlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


# Of a model's configuration: where it came from, what saving, tokenizers and the first forward write into it, and
# names. No bit of a training depends on them.
HARMLESS_IN_CONFIGURATIONS = frozenset(
    (
        *("_name_or_path", "name_or_path", "base_model_name_or_path", "_commit_hash", "transformers_version"),
        *("architectures", "auto_map", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "problem_type"),
        *("id2label", "label2id", "inference_mode", "peft_version", "task_type", "auto_mapping", "revision"),
    )
)
# Objects within objects; deeper ones count by their type.
MAX_DEPTH = 8


def plain(value: Any, depth: int = 0) -> Any:
    """
    Says in values that JSON knows what a setting is, alike in every process: an object by its class and its
    attributes, a function by its name, a tensor or a module by a checksum.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth == MAX_DEPTH:
        return type(value).__qualname__
    inside = functools.partial(plain, depth=depth + 1)
    match value:
        case enum.Enum():
            return inside(value.value)
        case np.generic():
            return inside(value.item())
        case dict():
            return {str(name): inside(item) for name, item in value.items()}
        case list() | tuple():
            return [inside(item) for item in value]
        case set() | frozenset():
            return sorted((inside(item) for item in value), key=str)
        case str() | Path() | torch.dtype() | torch.device():
            return str(value)
        case torch.Tensor():
            rows = value.detach().cpu().contiguous()
            return _checksum(rows.reshape(-1).view(torch.uint8).numpy(), rows.dtype, rows.shape)
        case np.ndarray():
            return _checksum(value, value.dtype, value.shape)
        case nn.Module():
            return {"class": type(value).__qualname__, **inside(dict(value.state_dict()))}
        case PreTrainedConfig():
            return plain_configuration(value.to_dict())
        case PreTrainedTokenizerBase():
            sides = {"padding_side": value.padding_side, "truncation_side": value.truncation_side}
            return {"class": type(value).__qualname__, "size": len(value), "pad_token_id": value.pad_token_id, **sides}
        case functools.partial():
            return {"function": inside(value.func), "args": inside(value.args), "keywords": inside(value.keywords)}
        case type() | types.FunctionType() | types.MethodType() | types.BuiltinFunctionType():
            return value.__qualname__
    return {"class": type(value).__qualname__, **inside(_attributes(value))}


def plain_configuration(values: dict[str, Any]) -> dict[str, Any]:
    """Says what of a configuration, and of those within it, decides about a training."""
    return {
        name: plain_configuration(value) if isinstance(value, dict) else plain(value)
        for name, value in values.items()
        if name not in HARMLESS_IN_CONFIGURATIONS
    }


def _attributes(value: Any) -> dict[str, Any]:
    try:
        return dict(vars(value))
    except TypeError:  # of an object without any
        return {}


def _checksum(array: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
