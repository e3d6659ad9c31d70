"""
Lists what rounds honour of `Trainer`: its arguments, its hooks, the events of its callbacks. Whatever is not listed is
refused where a user sets or overrides it, so that what a later release of Transformers adds is refused until somebody
has looked at it. (What does not hinder a resume is another list, in `run_identity.py`.)
"""

import inspect
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging

from ..strategies import FedMoE, FedMoEGroups
from .federated_arguments import FederatedTrainingArguments
from .trainer_of_rounds import TrainerOfRounds


logger = logging.get_logger(__name__)

# Fields of `TrainingArguments`, by who reads them.
HONOURED_ARGUMENTS = {
    "local training of a client": (
        "per_device_train_batch_size num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs "
        "warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon "
        "max_grad_norm gradient_accumulation_steps label_smoothing_factor bf16 fp16 deepspeed dataloader_drop_last "
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor torch_compile torch_compile_backend "
        "torch_compile_mode"
    ),
    "`Trainer`, for the model of which the clients' is a copy": (
        "use_cache activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
        "gradient_checkpointing_kwargs"
    ),
    "the process": "seed full_determinism tf32 use_cpu local_rank ddp_backend ddp_timeout skip_memory_metrics",
    "the columns of a dataset": "remove_unused_columns label_names",
    "evaluation": (
        "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only "
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "bf16_full_eval fp16_full_eval average_tokens_across_devices load_best_model_at_end metric_for_best_model "
        "greater_is_better"
    ),
    "logging": (
        "logging_strategy logging_steps logging_first_step log_level log_level_replica log_on_each_node disable_tqdm "
        "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "saving and the Hub": (
        "output_dir save_strategy save_steps save_total_limit save_only_model push_to_hub hub_token hub_private_repo "
        "hub_model_id hub_strategy hub_revision restore_callback_states_from_checkpoint"
    ),
    "scripts, not `Trainer`": "do_train do_eval do_predict resume_from_checkpoint",
    # Rounds do what these ask for anyway: no data to skip in a resume, no loss left out of the log, workers that stay,
    # pushes that do not wait for one another.
    "nobody, for rounds are like that": (
        "ignore_data_skip logging_nan_inf_filter dataloader_persistent_workers hub_always_push"
    ),
    "nobody, for no model is wrapped for DDP": (
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"
    ),
}
# Of these fields some values only.
HONOURED_VALUES = {"hub_strategy": ("every_save", "end")}
ARGUMENT_REMEDIES = {
    "data_seed": "the order of a client's data follows from `seed`, set that",
    "dataloader_multiprocessing_context": "the workers of all clients are forked once",
    "save_on_each_node": "the main process writes the checkpoints",
    "train_sampling_strategy": "each epoch of a client has a new random order",
    "hub_strategy": 'choose "every_save" or "end"',
}

# What gives the loss in `Trainer`. Each is honoured where clients are trained by the model's own loss.
LOSS_HOOKS = ("compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager")
# Methods of `Trainer` that may be overridden, by who calls them.
HONOURED_HOOKS = {
    "the start": (
        "_validate_args _build_accelerator_args create_accelerator_and_postprocess _move_model_to_device init_hf_repo "
        "add_callback is_local_process_zero is_world_process_zero"
    ),
    "train": (
        "train _inner_training_loop _init_training_state _finalize_training _load_from_checkpoint "
        "_load_callback_state _issue_warnings_after_load _load_best_model store_flos _finish_current_push log"
    ),
    "local training of a client": (
        " ".join(LOSS_HOOKS) + " create_optimizer create_scheduler get_optimizer_cls_and_kwargs "
        "get_decay_parameter_names _set_signature_columns_if_needed _remove_unused_columns"
    ),
    "evaluation": (
        "evaluate _evaluate evaluation_loop predict prediction_step get_eval_dataloader get_test_dataloader "
        "_get_eval_sampler _get_collator_with_removed_columns num_examples _determine_best_metric"
    ),
    "saving and the Hub": "save_model _save _save_checkpoint _get_output_dir create_model_card push_to_hub",
    "users only": (
        "log_metrics save_metrics save_state metrics_format get_num_trainable_parameters get_learning_rates "
        "get_optimizer_group pop_callback remove_callback end"
    ),
}
STRATEGY_REMEDY = (
    "override `compute_loss` for another loss, or `train_client` of a strategy for another local training "
    "(docs/strategies.md)"
)
HOOK_REMEDIES = {
    "training_step": STRATEGY_REMEDY,
    "_run_epoch": STRATEGY_REMEDY,
    "create_optimizer_and_scheduler": "override `create_optimizer(model)` and `create_scheduler`",
    "get_train_dataloader": "choose rows in the `FederatedDataset`, and augment in `train_data_collator`",
    "_get_train_sampler": "choose rows in the `FederatedDataset`",
    "_maybe_log_save_evaluate": "override `log`, `evaluate` or `_save_checkpoint`, or give a `TrainerCallback`",
    "loss_is_scaled_for_ga": "return the mean loss of a batch from `compute_loss`, and set it to False",
}
# Arguments of `Trainer` that `FederatedTrainer` does not take.
INIT_REMEDIES = {
    "optimizers": (
        "each client has a fresh optimizer: give `optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1})`, or "
        "override `create_optimizer(model)` and `create_scheduler`"
    ),
    "model_init": "all clients start from one model: give `model`",
}
# Events of callbacks that no round has.
UNKNOWN_EVENTS = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")


def check_arguments(args: FederatedTrainingArguments) -> None:
    """Raises `ValueError` for an argument of `TrainingArguments` that is set, but that rounds do not honour."""
    honoured = set(" ".join(HONOURED_ARGUMENTS.values()).split())
    for name in TrainingArguments.__dataclass_fields__:
        value = vars(args)[name]
        default = type(args).__dataclass_fields__[name].default
        if name in honoured:
            refused = name in HONOURED_VALUES and value not in HONOURED_VALUES[name]
        elif name == "accelerator_config":
            refused = value != AcceleratorConfig()
        else:
            refused = value != default and bool(value or default)
        if refused:
            remedy = ARGUMENT_REMEDIES.get(name, "leave it out")
            raise ValueError(f"`{name}` is {value!r}, which rounds do not honour: {remedy}.")


def check_init_arguments(others: dict[str, Any]) -> None:
    """Raises `ValueError` or `TypeError` for arguments that `FederatedTrainer` does not take."""
    for name, value in others.items():
        if name not in INIT_REMEDIES:
            raise TypeError(f"FederatedTrainer.__init__() got an unexpected keyword argument {name!r}")
        if value is not None and value != (None, None):
            raise ValueError(f"`{name}` is given, which rounds do not honour: {INIT_REMEDIES[name]}.")


def overridden_hooks(trainer: Trainer, base: type[Trainer]) -> list[str]:
    """Lists what a trainer has otherwise than `base`, of all that `Trainer` has."""
    return [
        name
        for name in dir(Trainer)
        if not name.startswith("__")
        and (
            inspect.getattr_static(type(trainer), name) is not inspect.getattr_static(base, name)
            or name in vars(trainer)
        )
    ]


def loss_name(trainer: Trainer) -> str | None:
    """Says what gives the loss of a batch in the place of the model, `None` if nothing does."""
    for name in overridden_hooks(trainer, Trainer):
        if name in LOSS_HOOKS:
            return name
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    return "label_smoothing_factor" if trainer.args.label_smoothing_factor else None


def check_hooks(trainer: TrainerOfRounds, base: type[Trainer]) -> None:
    """
    Raises `ValueError` for a method of `Trainer` that a user has overridden and that rounds never call, and for a loss
    that cannot be honoured; warns of callbacks that wait for what never comes.

    Args:
        trainer ([`~transformers.Trainer`]): The user's.
        base (`type`): What it would be without the user.
    """
    honoured = set(" ".join(HONOURED_HOOKS.values()).split())
    overridden = overridden_hooks(trainer, base)
    kind, args = type(trainer).__name__, trainer.args
    for name in overridden:
        harmless = name == "loss_is_scaled_for_ga" and trainer.loss_is_scaled_for_ga is not True
        if name not in honoured and not harmless:
            remedy = HOOK_REMEDIES.get(name, "leave it out")
            raise ValueError(f"`{name}` of {kind} is overridden, but rounds do not honour it: {remedy}.")
    if args.clients_at_once > 1:
        own: list[str] = [name for name in ("create_optimizer", "create_scheduler") if name in overridden]
        own += ["optimizer_cls_and_kwargs"] if trainer.optimizer_cls_and_kwargs is not None else []
        for name in own:
            raise ValueError(
                f"`clients_at_once` is {args.clients_at_once}, but `{name}` may make what cannot train several models "
                "as one: set it to 1."
            )
    if (loss := loss_name(trainer)) is not None:
        _check_loss(trainer, f"`{loss}` gives the loss, but")
    for callback in trainer.callback_handler.callbacks:
        for event in UNKNOWN_EVENTS:
            if inspect.getattr_static(type(callback), event) is not inspect.getattr_static(TrainerCallback, event):
                logger.warning(
                    f"`{event}` of {type(callback).__name__} is never called: a step of the trainer is a round."
                )


def _check_loss(trainer: TrainerOfRounds, begin: str) -> None:
    """Raises `ValueError` where models are trained by what cannot ask for a loss of whole batches."""
    args, strategy = trainer.args, trainer.strategy
    if args.deepspeed:
        raise ValueError(f"{begin} DeepSpeed trains clients by the model's own: leave DeepSpeed out.")
    if args.clients_at_once > 1:
        raise ValueError(
            f"{begin} `clients_at_once` is {args.clients_at_once}, for which there is the model's own: set it to 1."
        )
    if args.client_parallelism == "data":
        raise ValueError(
            f"{begin} `client_parallelism` is 'data', and a loss of one's own may be no mean over the rows that "
            'processes share out: choose "clients".'
        )
    if isinstance(strategy, FedMoE | FedMoEGroups):
        settings = vars(strategy.settings if isinstance(strategy, FedMoE) else strategy)
        for name in ("expert_epochs", "final_expert_epochs"):
            if settings.get(name):
                raise ValueError(
                    f"{begin} with `{name}` = {settings[name]} the server fine-tunes experts on examples that it "
                    "weighs one by one, which only the cross-entropy can: set it to 0."
                )
