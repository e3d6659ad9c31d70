"""The identity of a run, which checkpoints carry and processes of a launch compare."""

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

from ..data import FederatedDataset, rows_fingerprint
from ..models import AdapterExpert
from ..models.adapters_fedmoe import peft_config_dict
from ..strategies import FedMoESettings, Strategy
from ..weights import StateLayout
from .federated_arguments import FederatedTrainingArguments
from .plain_values import plain, plain_configuration


# By the reason why a run may go on with another value: no bit of a round depends on it. Everything else counts.
HARMLESS = {
    "where results go": (
        *("output_dir", "run_name", "project", "report_to", "trackio_space_id", "trackio_bucket_id"),
        *("trackio_static_space_id", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
        *("hub_strategy", "hub_always_push", "hub_revision"),
    ),
    "what is logged": (
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
        *("log_level", "log_level_replica", "disable_tqdm"),
        *("include_num_input_tokens_seen", "skip_memory_metrics"),
    ),
    "what is saved": (
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        *("enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    ),
    # Which round is taken for the best follows from the evaluations that there are, its model does not.
    "what is evaluated": (
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
        *("eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics", "prediction_loss_only"),
        *("include_for_metrics", "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end"),
        *("metric_for_best_model", "greater_is_better"),
    ),
    "flags for scripts": ("do_train", "do_eval", "do_predict"),
    # None and some are two runs, see `dataloader_workers`.
    "how many workers read": (
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    ),
    # A run may move to another machine, or to more or fewer processes; their sums are rounded in another order.
    "the machine and the launch": (
        *("use_cpu", "local_rank", "debug", "torch_empty_cache_steps", "ddp_backend", "ddp_timeout", "client_timeout"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("accelerator_config", "parallelism_config", "average_tokens_across_devices"),
    ),
    # A longer run begins like a shorter one, unless a schedule spans it, see `_not_compared`.
    "how long it is": ("rounds",),
}


def run_identity(
    args: FederatedTrainingArguments,
    strategy: Strategy,
    experts: Sequence[nn.Module],
    layout: StateLayout,
    base_fingerprint: int | None,
    data: FederatedDataset,
    columns: list[str],
    model_config: PreTrainedConfig,
    collate: Callable,
) -> dict[str, Any]:
    """
    Says, in values that JSON knows, what two runs must have in common for one to resume the other.

    Args:
        args ([`FederatedTrainingArguments`]): All count but the `HARMLESS` ones.
        strategy ([`~strategies.Strategy`]): Its class and its attributes count.
        experts (`Sequence[nn.Module]`): The server's models.
        layout ([`~weights.StateLayout`]): Of one of them.
        base_fingerprint (`int`, *optional*): Of the frozen base under adapters.
        data ([`~data.FederatedDataset`]): Its partition and the contents of its rows count.
        columns (`list[str]`): Those that models read.
        model_config (`PreTrainedConfig`): Of the server's model.
        collate (`Callable`): The collator of training, with what it augments.
    """
    first = experts[0]
    names = [(slot.name, list(slot.shape)) for slot in layout.slots]
    adapter = {}
    if isinstance(first, AdapterExpert):
        adapter = peft_config_dict(first.peft_model.peft_config[first.name])
    return {
        "strategy": strategy.name,
        "strategy_class": type(strategy).__qualname__,
        "strategy_settings": strategy_settings(strategy),
        "server_models": len(experts),
        "parameters": layout.num_elements,
        "trained_tensors": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        "dtype": str(layout.dtype),
        "base": base_fingerprint,
        "data": data.state_fingerprint(),
        "rows": rows_fingerprint(data.pool, [name for name in columns if name in data.pool.column_names]),
        **{name: plain(value) for name, value in args.to_dict().items() if name not in _not_compared(args)},
        "dataloader_workers": "some" if args.dataloader_num_workers else "none",
        "model_config": plain(model_config),
        "peft_config": plain_configuration(adapter),
        "dropout": _dropout(first),
        "train_data_collator": plain(collate),
    }


def first_difference(saved: dict[str, Any], own: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """
    Returns the first setting in which two identities differ, with both values, or `None`. An argument or an entry of a
    configuration that one of them does not know belongs to another version, where it has its default.
    """
    defaults = {field.name: plain(field.default) for field in dataclasses.fields(FederatedTrainingArguments)}
    own = json.loads(json.dumps(own))
    for name, value in own.items():
        lenient = name in ("model_config", "peft_config")
        if found := _difference(name, saved.get(name, defaults.get(name, value)), value, lenient):
            return found
    return None


def check_identity(saved: dict[str, Any], own: dict[str, Any], checkpoint: str) -> None:
    """Raises `ValueError` when a checkpoint was written by a run with other settings: names the first one."""
    if found := first_difference(saved, own):
        name, theirs, mine = found
        raise ValueError(
            f"The checkpoint {checkpoint} was written with {name} = {theirs!r}, this run has {mine!r}: resume with "
            "the settings of that run, or start a new one in another `output_dir`."
        )


def strategy_settings(strategy: Strategy) -> dict[str, Any]:
    """Returns a strategy's attributes, those of its `settings` among them, in values that JSON knows."""
    methods = dir(type(strategy))
    attributes = {
        name: value
        for name, value in vars(strategy).items()
        if not (name in methods and isinstance(value, types.FunctionType | types.MethodType))
    }
    settings = attributes.pop("settings", None)
    if dataclasses.is_dataclass(settings):
        attributes = vars(settings) | attributes
    elif settings is not None:
        attributes["settings"] = settings
    return plain(attributes)


def _difference(name: str, saved: Any, own: Any, lenient: bool) -> tuple[str, Any, Any] | None:
    if not (isinstance(saved, dict) and isinstance(own, dict)):
        # As texts: NaN equals itself, 1 is not True.
        return None if json.dumps(saved) == json.dumps(own) else (name, saved, own)
    for key in own | saved:
        if key in own and key in saved:
            if found := _difference(f"{name}.{key}", saved[key], own[key], lenient):
                return found
        elif not lenient:
            return f"{name}.{key}", saved.get(key, "nothing"), own.get(key, "nothing")
    return None


def _not_compared(args: FederatedTrainingArguments) -> set[str]:
    """The arguments that do not count, or that count elsewhere."""
    names = {name for reason in HARMLESS.values() for name in reason}
    names |= {field.name for field in dataclasses.fields(FedMoESettings)}  # in `strategy_settings`, where they matter
    if args.lr_scheduler_scope == "run" and args.lr_scheduler_type != "constant":
        names.remove("rounds")
    return names


def _dropout(module: nn.Module) -> dict[str, int]:
    """Counts the layers of dropout of each probability, which scripts may set without the configuration."""
    probabilities = sorted(layer.p for layer in module.modules() if isinstance(layer, _DropoutNd))
    return {str(p): probabilities.count(p) for p in dict.fromkeys(probabilities)}
