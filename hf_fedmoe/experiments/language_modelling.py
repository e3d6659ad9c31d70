"""Comparisons of language models of several owners of text: bits per byte by domain, lower is better."""

import math
from functools import partial
from typing import Any

import torch
from datasets import Dataset

from ..data import FederatedDataset
from ..models import FedMoEForCausalLM
from ..owners import load_base
from ..reporting import COSTS, Metric
from ..training import FederatedTrainer, FedMoETrainingArguments
from .experiment import find_model
from .kind import Kind, costs_of_rounds, evaluations
from .language_experiment import LanguageExperiment
from .language_measures import (
    BEST,
    BITS,
    CLIENTS,
    ORACLE,
    PERPLEXITY,
    SPEED,
    bits_of_clients,
    domains_of,
    measure_parts,
    measure_speed,
    measure_way,
    metrics_of_ways,
    part_names,
    watched_of,
)
from .language_methods import (
    BASE,
    OWNERS,
    POOLED,
    check_language_method,
    check_language_name,
    language_methods,
    make_language_trainer,
)
from .language_scores import bytes_of, log_likelihoods
from .methods import own_settings
from .settings import Setting


class LanguageModelling(Kind[LanguageExperiment]):
    """Adapters of a language model, and a mixture of those of several owners of text."""

    columns = (BITS, PERPLEXITY)
    untrained = BASE

    def method_names(self) -> tuple[str, ...]:
        return language_methods()

    def check_name(self, method: str) -> None:
        check_language_name(method)

    def own_settings(self, method: str) -> dict[str, Setting]:
        return own_settings(method)

    def check_method(self, method: str, experiment: LanguageExperiment, args: FedMoETrainingArguments) -> None:
        check_language_method(method, experiment, args)

    def make_trainer(
        self,
        method: str,
        experiment: LanguageExperiment,
        args: FedMoETrainingArguments,
        data: FederatedDataset,
        processor: Any,
    ) -> FederatedTrainer:
        return make_language_trainer(method, experiment, args, data)

    def metrics(self, method: str, experiment: LanguageExperiment) -> dict[str, Metric]:
        of_ways = metrics_of_ways(experiment.domains)
        if method == BASE:
            return of_ways
        found = {**of_ways, "seconds": COSTS["seconds"]}
        if method != POOLED:  # whose owners send their text
            found |= {**COSTS, CLIENTS: Metric("each owner by its own model", 1, 3, lower_is_better=True)}
        for part in self.part_names(method, experiment):
            known = metrics_of_ways(experiment.owners) if part == ORACLE else of_ways
            found |= {f"{part}_{name}": metric for name, metric in known.items()}
        found.pop(f"{ORACLE}_{SPEED}", None)
        return found

    def part_names(self, method: str, experiment: LanguageExperiment) -> list[str]:
        return part_names(experiment) if method == OWNERS else []

    def remedy(self, part: str) -> str:
        return " The best expert is chosen by the rows of a `validation_size`." if part == BEST else ""

    def measure_untrained(
        self, experiment: LanguageExperiment, data: FederatedDataset, processor: Any
    ) -> dict[str, float]:
        base, _ = load_base(find_model(experiment.model))
        way, domains = partial(log_likelihoods, base), domains_of(data, processor)
        return measure_way(way, domains, experiment.owners) | measure_speed(way, domains)

    def measure(
        self,
        method: str,
        trainer: FederatedTrainer,
        experiment: LanguageExperiment,
        data: FederatedDataset,
        processor: Any,
    ) -> dict[str, float]:
        model, domains, owners = trainer.model, domains_of(data, processor), experiment.owners
        assert model is not None
        model.eval()
        way = partial(log_likelihoods, model)
        found = measure_way(way, domains, owners) | measure_speed(way, domains)
        costs = costs_of_rounds(trainer)
        if method == POOLED:
            return found | {"seconds": costs["seconds"]}
        found |= {**costs, CLIENTS: bits_of_clients(trainer, domains, owners, found[BITS])}
        if isinstance(model, FedMoEForCausalLM):
            found |= measure_parts(model, experiment, data, domains, watched_of(data, processor, owners))
        return found

    def curve(self, trainer: FederatedTrainer, processor: Any) -> list[tuple[int, float]]:
        losses = evaluations(trainer, "eval_loss")
        if not losses:
            return []
        assert isinstance(trainer.eval_dataset, Dataset)
        ids_NT = torch.tensor(trainer.eval_dataset["input_ids"][:])
        bits_of_a_nat = ids_NT[:, 1:].numel() / math.log(2) / bytes_of(processor, ids_NT)
        return [(step, loss * bits_of_a_nat) for step, loss in losses]
