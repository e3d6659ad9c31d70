"""The methods of language models: adapters by a strategy, a mixture of owners, one adapter on all text."""

import copy
from collections.abc import Callable

import numpy as np
from peft import PeftModel

from ..data import FederatedDataset, FederatedTexts
from ..models import FedMoEForCausalLM, text_statistics
from ..owners import load_base, new_adapter
from ..owners.train import check_length
from ..strategies import Owners, Strategy
from ..training import FederatedTrainer, FedMoETrainingArguments
from .experiment import find_model
from .language_experiment import LanguageExperiment
from .methods import own_settings
from .named_strategies import CENTRALISED, MAJORITY, STRATEGIES
from .settings import nearest, typed_settings


OWNERS, POOLED = Owners.name, "pooled"
# Trained on nothing: the common start of all others.
BASE = "base"
TUNES = "its server trains on reserved rows by their classes", "`fedavg`, or `pooled` for one adapter on all text"
NARROWS = "it cuts whole models, and clients train adapters here", "`fedavg` with `client_ranks`"
GATED = (
    "it trains a gate and experts by the classes of rows",
    f"`{OWNERS}`, a mixture of language models",
)
# Methods that a language model has not, each with the reason, and what does instead.
NOT_HERE = {
    "fedavg_reserved": TUNES,
    "fedavg_tuned_at_end": TUNES,
    "reserved_only": TUNES,
    "fedrolex": NARROWS,
    "heterofl": NARROWS,
    "fedmoe": GATED,
    "cent_moe": GATED,
    "fedrep": ("it keeps a classifier's head with the clients", "`local` or `fedavg_plus`"),
    "pfedmoe": ("its clients have classifiers of their own", "`apfl`"),
    MAJORITY: ("text has no classes", f"`{BASE}`, which trains nothing either"),
}


def language_methods() -> tuple[str, ...]:
    """Lists the names of all methods that train something, those of files that were loaded among them."""
    adapters = (name for name, strategy in STRATEGIES.items() if _trains_adapters(name, strategy))
    return (*adapters, OWNERS, POOLED)


def _trains_adapters(name: str, strategy: type[Strategy]) -> bool:
    return strategy.trains == "classifier" and name not in NOT_HERE


def check_language_name(method: str) -> None:
    """Raises `ValueError` that says why a method of classifiers is none of language models, and what does instead."""
    if method in language_methods() or method not in (*STRATEGIES, *CENTRALISED, *NOT_HERE):
        return
    reason, remedy = NOT_HERE.get(method, ("it trains several classifiers, weighed by classes", f"`{OWNERS}`"))
    raise ValueError(f"`kind` is 'language', which has no {method!r}, for {reason}: take {remedy}.")


def check_language_method(method: str, experiment: LanguageExperiment, args: FedMoETrainingArguments) -> None:
    """Raises `ValueError` when there is no such method, or one of its settings has another name, type or range."""
    given = experiment.read_json("method_settings")
    for name in (method, *given):
        check_language_name(name)
        if name not in language_methods():
            raise ValueError(f"There is no method {name!r}{nearest(name, language_methods())}")
    if args.clients_per_round > len(experiment.owners) and method != POOLED:
        raise ValueError(
            f"`clients_per_round` is {args.clients_per_round}, but there are {len(experiment.owners)} `owners`, each "
            "of whom is a client: lower it."
        )
    if method in STRATEGIES:
        make_language_strategy(method, experiment)


def make_language_strategy(method: str, experiment: LanguageExperiment) -> Strategy:
    """Makes a strategy with its settings among the experiment's `method_settings`."""
    given = experiment.read_json("method_settings").get(method, {})
    return STRATEGIES[method](**typed_settings(given, own_settings(method)))


def make_language_trainer(
    method: str, experiment: LanguageExperiment, args: FedMoETrainingArguments, data: FederatedDataset
) -> FederatedTrainer:
    """
    Makes a trainer of one method. All start from the same adapter, which changes nothing yet.

    Args:
        method (`str`): One of [`language_methods`].
        experiment ([`LanguageExperiment`]), args ([`FedMoETrainingArguments`]): The settings.
        data ([`~data.FederatedDataset`]): From the experiment's `load_data`.
    """
    check_language_method(method, experiment, args)
    make = OF_THEIR_OWN.get(method)
    if make is not None:
        return make(experiment, args, data)
    model = new_start(experiment, args.seed)
    return FederatedTrainer(model, args, data, make_language_strategy(method, experiment))  # type: ignore[arg-type]


def new_start(experiment: LanguageExperiment, seed: int) -> PeftModel:
    """Puts the adapter that all methods start from beside the base."""
    base, _ = load_base(find_model(experiment.model))
    check_length(base, experiment.sequence_length)
    return new_adapter(base, experiment.rank, 2 * experiment.rank, experiment.target_modules, seed)


def _mixture_of_owners(
    experiment: LanguageExperiment, args: FedMoETrainingArguments, data: FederatedDataset
) -> FederatedTrainer:
    """A mixture of an expert for each owner, whose router knows the public text of the reserved set."""
    start = new_start(experiment, args.seed)
    model = FedMoEForCausalLM.from_base(
        find_model(experiment.model),
        lora_rank=experiment.rank,
        lora_alpha=2 * experiment.rank,
        target_modules=experiment.target_modules,
        public_bias=experiment.public_bias,
    )
    for name in experiment.owners:
        model = model.add_owner(start, name=name)
    if data.reserved is not None:
        model.set_statistics(BASE, text_statistics(model.get_input_embeddings(), data.reserved["input_ids"]))
    assert isinstance(data, FederatedTexts)
    return FederatedTrainer(model, args, data, Owners.by_name(model, data))


def _adapter_of_all_text(
    experiment: LanguageExperiment, args: FedMoETrainingArguments, data: FederatedDataset
) -> FederatedTrainer:
    """One adapter, trained on the text of all owners as that of one client: with the steps of all of them."""
    args = copy.copy(args)
    args.clients_per_round = 1
    validation = data.split_indices.get("validation")
    everything = [np.concatenate(data.client_indices)]
    pooled = FederatedTexts(data.pool, everything, None, validation, data.test, data.label_column)
    return FederatedTrainer(new_start(experiment, args.seed), args, pooled)  # type: ignore[arg-type]


OF_THEIR_OWN: dict[
    str, Callable[[LanguageExperiment, FedMoETrainingArguments, FederatedDataset], FederatedTrainer]
] = {OWNERS: _mixture_of_owners, POOLED: _adapter_of_all_text}
