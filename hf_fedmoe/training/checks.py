"""Everything that can be known to be wrong before a run starts."""

import os
from collections.abc import Collection

from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..data import FederatedDataset
from ..models.configuration_checks import check_weights, class_names
from ..strategies import Strategy, check_setting_kinds
from .defence_checks import check_defence
from .engine_choice import engine_kind
from .example_arguments import check_example_run
from .federated_arguments import FederatedTrainingArguments
from .honoured import check_arguments
from .privacy_arguments import check_private_run
from .trainer_of_rounds import client_model_of


# What follows a model's name when its head is none for one label per row.
OTHER_HEADS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForObjectDetection",
    "ForSemanticSegmentation",
)


def check_parts(model: nn.Module, args: FederatedTrainingArguments, strategy: Strategy) -> None:
    """Raises `ValueError` when what a trainer is given is of another kind, before anything is asked of it."""
    if not isinstance(args, FederatedTrainingArguments):
        raise ValueError(
            f"`args` is a {type(args).__name__}: a federated run takes its settings from `FederatedTrainingArguments`."
        )
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        raise ValueError(f"`strategy` is the class {strategy.__name__}: give an instance, `{strategy.__name__}()`.")
    if not isinstance(strategy, Strategy):
        raise ValueError(
            f"`strategy` is {strategy!r}, a {type(strategy).__name__}: give an instance of one of the classes in "
            "`hf_fedmoe.strategies`, for example `FedAvg()`."
        )
    check_setting_kinds(strategy)
    if is_compiled_module(model):
        raise ValueError(
            "`model` is what `torch.compile` returned: give the model itself, and `torch_compile=True` in the "
            "arguments."
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            f"`model` is a {type(model).__name__}: load a classifier of Transformers, "
            "`AutoModelForSequenceClassification.from_pretrained(...)` or that for images."
        )
    check_weights("model", model)


def check_classes(client_model: nn.Module) -> None:
    """Raises `ValueError` when a client's model is trained for something else than one class of each row."""
    inner = client_model.get_base_model() if isinstance(client_model, PeftModel) else client_model
    name = type(inner).__name__
    if name.endswith(OTHER_HEADS):
        raise ValueError(
            f"`model` is a {name}, which gives no row one class: load it with "
            "`AutoModelForSequenceClassification.from_pretrained`, or `AutoModelForImageClassification` for images."
        )
    problem_type = getattr(inner.config, "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"The model's configuration has `problem_type` {problem_type!r}, but a row of a federated run has one "
            "class: set `model.config.problem_type = None`."
        )


def check_language_model(client_model: nn.Module) -> None:
    """Raises `ValueError` when a client's model does not predict the next token, of rows that have no class."""
    inner = client_model_of(client_model)
    if not inner.can_generate():
        raise ValueError(
            f"`model` is a {type(inner).__name__}, and the rows of a `FederatedTexts` have a label for each token: "
            "load it with `AutoModelForCausalLM.from_pretrained`, or give a `FederatedDataset` of labelled rows."
        )


def check_labels_and_padding(
    model: PreTrainedModel,
    data: FederatedDataset,
    strategy: Strategy,
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None,
) -> None:
    """Raises `ValueError` when a classifier has too few classes, or cannot tell texts from their padding."""
    num_labels = len(class_names(model.config))
    if data.num_labels > num_labels:
        raise ValueError(
            f"The data has {data.num_labels} labels, the model {num_labels} (`num_labels`): load it with "
            f"`num_labels={data.num_labels}`."
        )
    if isinstance(processing_class, PreTrainedTokenizerBase) and processing_class.pad_token is None:
        raise ValueError(
            "`processing_class` has no pad token, so that texts of different lengths make no batch: set "
            "`tokenizer.pad_token = tokenizer.eos_token`, and `pad_token_id` in the model's configuration alike."
        )
    client_config = client_model_of(strategy.server_models(model)[0]).config
    if model.main_input_name == "input_ids" and client_config.pad_token_id is None:
        raise ValueError(
            "The model's configuration has `pad_token_id` None, so that it cannot tell texts of a batch from their "
            "padding: set `model.config.pad_token_id = tokenizer.pad_token_id`."
        )


def check_run(
    model: PreTrainedModel,
    args: FederatedTrainingArguments,
    data: FederatedDataset,
    strategy: Strategy,
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None,
) -> None:
    """Raises `ValueError` naming the field, its value and the remedy; says nothing when the run can start."""
    if not isinstance(data, FederatedDataset):
        raise ValueError(
            f"`train_dataset` is a {type(data).__name__}: a federated run needs its clients, wrap them with "
            "`FederatedDataset.from_clients([...])` or partition a dataset with `FederatedDataset.split(...)`."
        )
    check_arguments(args)
    strategy.check_arguments(args)
    if data.has_classes:
        check_classes(strategy.server_models(model)[0])
        check_labels_and_padding(model, data, strategy, processing_class)
    else:
        check_language_model(strategy.server_models(model)[0])
    if not any(parameter.requires_grad for parameter in strategy.server_models(model)[0].parameters()):
        raise ValueError(
            f"Nothing of the {type(model).__name__} learns, all its parameters are frozen: set `requires_grad` of "
            "those that clients are to train."
        )
    if args.clients_per_round > data.num_clients:
        raise ValueError(
            f"`clients_per_round` is {args.clients_per_round}, but there are {data.num_clients} clients: lower it, or "
            "partition the data over more clients."
        )
    if strategy.needs_reserved_set() and data.reserved is None:
        raise ValueError(
            f"Strategy {strategy.name!r} learns on the server, but `train_dataset.reserved` is None: hold out a small "
            "labelled set, `FederatedDataset.split(..., reserved_size=500)`."
        )
    for name, value, off in (
        ("upload_compression", args.upload_compression, "none"),
        ("max_update_norm", args.max_update_norm, None),
    ):
        if value != off and not strategy.compressible:
            raise ValueError(
                f"`{name}` is {value!r}, but in {strategy.name!r} no receiver knows the model that an update starts "
                f"from: leave it at {off!r}."
            )
    check_private_run(
        args,
        strategy,
        strategy.server_models(model),
        data.num_clients,
        args.lora_fusion,
        args.client_parallelism,
    )
    check_example_run(args, strategy, client_model_of(strategy.server_models(model)[0]), data.client_sizes.tolist())
    if args.keep_client_optimizer and not strategy.keeps_optimizer:
        raise ValueError(
            f"`keep_client_optimizer` is True, but {strategy.name!r} does not promise to go on with an optimizer "
            "(`keeps_optimizer`): leave it out."
        )
    if strategy.needs not in ("rows", "fusion", "mean"):
        raise ValueError(f'`needs` of {strategy.name!r} is {strategy.needs!r}: say "rows", "fusion" or "mean".')
    if args.client_parallelism == "sums" and strategy.needs == "rows":
        raise ValueError(
            f"`client_parallelism` is 'sums', but {strategy.name!r} does more with uploads than add them up: choose "
            '"clients". (One of your own that does not says so by `needs`.)'
        )
    check_defence(args, strategy)
    engine_kind(args).refuse(strategy.server_models(model)[0], args, strategy)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, but none knows of the others: without GPUs give the arguments "
            "`use_cpu=True`, or set ACCELERATE_USE_CPU=true."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible and a process uses one: start a process for each, `accelerate launch "
            f"--multi_gpu --num_processes {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES=0."
        )
    if isinstance(processing_class, (str, os.PathLike)):
        raise ValueError(
            f"`processing_class` is {str(processing_class)!r}: load it, `AutoTokenizer.from_pretrained(...)` or "
            "`AutoImageProcessor.from_pretrained(...)`."
        )
    if not 0 <= args.learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` is {args.learning_rate}: give a number of 0 or more.")
    if args.label_names is not None and "labels" not in [*args.label_names]:
        raise ValueError(
            f"`label_names` is {args.label_names!r}, but batches have their classes as 'labels', whatever the column "
            "is called: leave it out, or no evaluation would have a metric. (The columns' name is `label_column` of "
            "the data.)"
        )
    if args.should_save:
        assert args.output_dir is not None  # transformers has filled it in
        make_folder(args.output_dir)


def check_best_metric(args: FederatedTrainingArguments, metrics: Collection[str], datasets: Collection[str]) -> None:
    """
    Raises `ValueError` when `metric_for_best_model` is none of those of an evaluation.

    Args:
        args ([`FederatedTrainingArguments`]): Of the run.
        metrics (`Collection[str]`): What an evaluation gives, without `eval_`.
        datasets (`Collection[str]`): Names of several datasets that are evaluated, if they are.
    """
    chosen = args.metric_for_best_model
    if chosen is None or args.eval_strategy == "no":
        return
    known = [f"{name}_{metric}" for name in datasets for metric in metrics] or list(metrics)
    if chosen.removeprefix("eval_") not in known:
        raise ValueError(f"`metric_for_best_model` is {chosen!r}: an evaluation has {', '.join(known)}, choose one.")


def make_folder(folder: str | os.PathLike) -> None:
    """Makes a folder to write into where there is none, or raises `ValueError` that says why there can be none."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, where no folder can be made: {error.strerror}. Choose another."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` is {str(folder)!r}, which cannot be written into: choose another.")
