"""The methods by their names: what model each trains, with which strategy, on whose data."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data import FederatedDataset
from ..models import FedMoEPreTrainedModel
from ..reporting import ExpertAnalysis, analyse_experts, scores
from ..strategies import Strategy
from ..training import FederatedTrainer, FedMoETrainer, FedMoETrainingArguments
from .classifier_experiment import ClassifierExperiment
from .named_strategies import CENTRALISED, STRATEGIES, method_names
from .server_models import MIXTURES, MODELS
from .settings import Setting, nearest, settings_of, typed_settings


# The models of methods that are no strategies of an experiment's, or that have their own trainer.
WITHOUT_STRATEGY = {"reserved_only": "classifier", "cent_moe": "mixture", "fedmoe": "mixture"}
# Of FedAvg fine-tuned at the end, where Fed-MoE does without.
TUNING_EPOCHS = 5
# Arguments without which a run protects neither clients nor examples.
NOT_PRIVATE = (
    *("noise_multiplier", "target_epsilon", "delta", "clipping_norm", "clipping_quantile"),
    *("example_noise_multiplier", "example_target_epsilon", "example_delta", "example_clipping_norm"),
)


def train_on_reserved_set(
    model: PreTrainedModel,
    args: FedMoETrainingArguments,
    data: FederatedDataset,
    shared: dict[str, Any],
    folder: str,
    **changes: Any,
) -> None:
    """Trains a model alone, in place and before the run: as long as [`centralised`] says, or with these `changes`."""
    alone = centralised(args, data)
    assert args.output_dir is not None  # `TrainingArguments` have one by now
    for name, value in changes.items():
        setattr(alone["args"], name, value)
    alone["args"].output_dir = str(Path(args.output_dir, folder))
    alone["args"].save_strategy = alone["args"].eval_strategy = alone["args"].logging_strategy = "no"
    alone["args"].load_best_model_at_end = False
    trainer = FederatedTrainer(model, **shared | alone)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def leave_as_it_is(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Trains nothing, in the place of [`train_on_reserved_set`] where trainers are only tried out."""


def make_trainer(
    method: str,
    experiment: ClassifierExperiment,
    args: FedMoETrainingArguments,
    data: FederatedDataset,
    processor: Any,
    train_first: Callable[..., None] = train_on_reserved_set,
) -> FederatedTrainer:
    """
    A trainer of one method. Equal seeds give every method the same initial weights, clients and draws.

    Args:
        method (`str`): One of [`method_names`].
        experiment ([`ClassifierExperiment`]), args ([`FedMoETrainingArguments`]): The settings.
        data ([`~data.FederatedDataset`]), processor: From `load_data` and `load_processor` of the experiment.
        train_first (`Callable`, *optional*): Trains what a run starts from, where it is trained.
    """
    check_method(method, experiment, args)
    set_seed(args.seed)
    expert = experiment.make_expert(data, processor)
    shared = dict(args=args, train_dataset=data, processing_class=processor, **experiment.collators(processor))
    if experiment.start_epochs:
        train_first(expert, args, data, shared, "start", rounds=1, num_train_epochs=experiment.start_epochs)
    strategy = make_strategy(method, experiment, args, expert) if method in STRATEGIES else None
    kind = WITHOUT_STRATEGY[method] if strategy is None else strategy.trains
    model = MODELS[kind](
        expert, experiment, args.seed, lambda common: train_first(common, args, data, shared, "common_expert")
    )
    if kind not in MIXTURES:
        shared["peft_config"] = experiment.peft_config()
    if method == "fedmoe" and isinstance(model, FedMoEPreTrainedModel):
        return FedMoETrainer(model, **shared)
    if method == "cent_moe":
        # Cent-MoE: experts, gate and alpha together, by the loss of the mixture, on the reserved set alone.
        model.config.entropy_weight = args.entropy_weight
    if method in CENTRALISED:
        return FederatedTrainer(model, **shared | centralised(args, data))
    return FederatedTrainer(model, strategy=strategy, **shared)


def check_method(method: str, experiment: ClassifierExperiment, args: FedMoETrainingArguments) -> None:
    """
    Raises `ValueError` when there is no such method, or one of its settings has another name, type or range. What
    depends on the model is left to [`make_trainer`].
    """
    if method in STRATEGIES and (kind := STRATEGIES[method].trains) not in tuple(MODELS):
        raise ValueError(
            f"{STRATEGIES[method].__name__} says that it `trains` {kind!r}: write one of {', '.join(MODELS)}."
        )
    given = experiment.read_json("method_settings")
    for name in (method, *given):
        if name not in method_names():
            raise ValueError(f"There is no method {name!r}{nearest(name, method_names())}")
    for name, settings in given.items():
        own = own_settings(name)
        for setting in settings:
            if setting not in own:
                raise ValueError(
                    f"`method_settings` gives {name!r} a {setting!r}: it has "
                    f"{', '.join(own) or 'no settings of its own'}."
                )
    if method in STRATEGIES and method != "pfedmoe":
        make_strategy(method, experiment, args)


def own_settings(method: str) -> dict[str, Setting]:
    """The settings that a method has besides those of all runs, among which Fed-MoE's are."""
    strategy = STRATEGIES.get(method)
    return settings_of(strategy) if dataclasses.is_dataclass(strategy) else {}


def make_strategy(
    method: str,
    experiment: ClassifierExperiment,
    args: FedMoETrainingArguments,
    expert: PreTrainedModel | None = None,
) -> Strategy:
    """
    The strategy of a method of [`STRATEGIES`], with its `method_settings`. The `client_models` of pFedMoE are given
    there by what differs from the `expert`'s configuration; left out, own models have that of the shared one. The
    others need no `expert`.
    """
    # The controls train on the reserved set at the learning rate of Fed-MoE's experts and as long, if those do.
    server = dict(learning_rate=args.expert_learning_rate, batch_size=args.gate_batch_size)
    defaults: dict[str, dict[str, Any]] = {
        "fedavg_reserved": dict(
            when="round", epochs=max(1, args.expert_epochs or 0, args.download_epochs or 0), **server
        ),
        "fedavg_tuned_at_end": dict(when="end", epochs=args.final_expert_epochs or TUNING_EPOCHS, **server),
        "fedavg_adjusted": dict(epochs=args.final_expert_epochs or TUNING_EPOCHS, **server),
        "fedavg_moving_average": dict(rate=args.fusion_rate),
    }
    own = typed_settings(experiment.read_json("method_settings").get(method, {}), own_settings(method))
    settings = defaults.get(method, {}) | own
    if method == "pfedmoe":
        assert expert is not None
        changes = settings.get("client_models", [{}])
        if not isinstance(changes, list) or not all(isinstance(changed, dict) for changed in changes):
            raise ValueError(
                f"`client_models` is {changes!r}: give a list of what differs from the expert's configuration, for "
                'example [{"hidden_size": 16}].'
            )
        settings["client_models"] = [expert.config.to_dict() | changed for changed in changes]
    return STRATEGIES[method](**settings)


def centralised(args: FedMoETrainingArguments, data: FederatedDataset) -> dict[str, Any]:
    """
    The reserved set as the only client, with as many rounds and local steps as an average client has, and without
    noise: its rows are the server's own.
    """
    if data.reserved is None:
        raise ValueError(
            "`reserved_size` is 0, but a method that trains on the reserved set alone needs one: raise it."
        )
    args = copy.copy(args)
    args.clients_per_round = 1
    for name in NOT_PRIVATE:
        setattr(args, name, None)
    args.num_train_epochs *= data.client_sizes.mean() / len(data.reserved)
    alone = FederatedDataset(
        data.pool, [data.split_indices["reserved"]], validation=data.split_indices.get("validation"), test=data.test
    )
    return {"args": args, "train_dataset": alone}


def train_or_go_on(trainer: FederatedTrainer) -> None:
    """Trains from the start, or from the last checkpoint of a run that was stopped in the same folder."""
    folder = trainer.args.output_dir
    assert folder is not None  # `TrainingArguments` have one by now
    trainer.goes_on_by = "the same command"
    trainer.train(resume_from_checkpoint=has_begun(folder) or None)


def has_begun(folder: str) -> str | None:
    """Finds the last checkpoint of a run that was stopped in a folder, if there is one."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def metrics_of_tests(trainer: FederatedTrainer, data: FederatedDataset) -> dict[str, float]:
    """Scores the server's model on the test set, and as `clients_...` clients' models, where those have test rows."""
    tested = trainer.evaluate(data.test, metric_key_prefix="test")
    metrics = {name: tested[f"test_{name}"] for name in ("accuracy", "macro_f1", "auc")}
    assert trainer.federated_dataset is not None
    return metrics | (trainer.evaluate_clients() if trainer.federated_dataset.client_test_indices else {})


def majority_scores(data: FederatedDataset) -> dict[str, float]:
    """Always the most frequent class of the reserved set, of the clients where there is none."""
    labels = data.label_counts().sum(0) if data.reserved is None else np.bincount(data.reserved["label"])
    assert data.test is not None
    labels_N = torch.tensor(data.test["label"])
    most = torch.nn.functional.one_hot(torch.tensor(labels.argmax()), data.num_labels)
    return scores(most.float().expand(len(labels_N), -1), labels_N)


def analyse(trainer: FederatedTrainer, data: FederatedDataset, batch_size: int) -> ExpertAnalysis:
    """The experts of a trained mixture on the test set."""
    columns = ["input_ids", "attention_mask", "token_type_ids", "pixel_values", "label"]
    assert data.test is not None and isinstance(trainer.model, FedMoEPreTrainedModel)
    test = data.test.select_columns([column for column in columns if column in data.test.column_names])
    return analyse_experts(trainer.model, test, trainer.data_collator, batch_size)
