"""Comparisons of classifiers: their methods, and their metrics by accuracy, macro-F1 and AUC."""

from typing import Any

import numpy as np

from ..data import FederatedDataset
from ..reporting import COSTS, Metric, metric_named
from ..training import FederatedTrainer, FedMoETrainingArguments
from .classifier_experiment import ClassifierExperiment
from .kind import Kind, costs_of_rounds, evaluations
from .methods import (
    analyse,
    check_method,
    leave_as_it_is,
    majority_scores,
    make_trainer,
    metrics_of_tests,
    own_settings,
)
from .named_strategies import CENTRALISED, MAJORITY, method_names
from .settings import Setting


SCORES = ("accuracy", "macro_f1", "auc")
OF_CLIENTS = (*SCORES, "bottom_decile", "worst")
# Mixtures that are taken apart: what their experts are alone, together, and as the gate has them.
TAKEN_APART = ("fedmoe", "fedmoe_groups")


class Classification(Kind[ClassifierExperiment]):
    """Classifiers of texts, images or characters, and mixtures of them."""

    columns = ("accuracy", "macro_f1")
    untrained = MAJORITY

    def method_names(self) -> tuple[str, ...]:
        return method_names()

    def own_settings(self, method: str) -> dict[str, Setting]:
        return own_settings(method)

    def check_method(self, method: str, experiment: ClassifierExperiment, args: FedMoETrainingArguments) -> None:
        check_method(method, experiment, args)

    def make_trainer(
        self,
        method: str,
        experiment: ClassifierExperiment,
        args: FedMoETrainingArguments,
        data: FederatedDataset,
        processor: Any,
    ) -> FederatedTrainer:
        return make_trainer(method, experiment, args, data, processor)

    def try_trainer(
        self,
        method: str,
        experiment: ClassifierExperiment,
        args: FedMoETrainingArguments,
        data: FederatedDataset,
        processor: Any,
    ) -> None:
        make_trainer(method, experiment, args, data, processor, train_first=leave_as_it_is)

    def metrics(self, method: str, experiment: ClassifierExperiment) -> dict[str, Metric]:
        if method == MAJORITY:
            return {name: metric_named(name) for name in SCORES}
        names = [*SCORES, *COSTS]
        if experiment.client_test_share and method not in CENTRALISED:
            whose = ("clients", "clients_unseen") if experiment.unseen_share else ("clients",)
            names += [f"{prefix}_{name}" for prefix in whose for name in OF_CLIENTS]
        if method in TAKEN_APART:
            names += [f"{part}_{name}" for part in self.part_names(method, experiment) for name in SCORES]
            names.remove("oracle_expert_auc")
            names.append("disagreement")
        return {name: metric_named(name) for name in names}

    def part_names(self, method: str, experiment: ClassifierExperiment) -> list[str]:
        if method not in TAKEN_APART:
            return []
        numbers = range(experiment.num_routed_experts)
        return [
            *(["main_expert"] if experiment.num_main_experts else []),
            *(f"expert_{k}" for k in numbers),
            *("best_expert", "uniform_ensemble", "weight_average"),
            *(f"top_{k + 1}" for k in numbers),
            *("dense", "oracle_expert"),
        ]

    def measure_untrained(
        self, experiment: ClassifierExperiment, data: FederatedDataset, processor: Any
    ) -> dict[str, float]:
        return majority_scores(data)

    def measure(
        self,
        method: str,
        trainer: FederatedTrainer,
        experiment: ClassifierExperiment,
        data: FederatedDataset,
        processor: Any,
    ) -> dict[str, float]:
        metrics = metrics_of_tests(trainer, data)
        if method in TAKEN_APART:
            analysis = analyse(trainer, data, trainer.args.eval_batch_size)
            for part, scores in analysis.scores.items():
                metrics |= {f"{part}_{name}": value for name, value in scores.items()}
            others = ~np.eye(len(analysis.disagreement_SS), dtype=bool)
            metrics["disagreement"] = float(analysis.disagreement_SS[others].mean())
        metrics |= costs_of_rounds(trainer)
        if method in CENTRALISED:  # its one client is the server
            metrics |= {"megabytes_up": 0.0, "megabytes_down": 0.0}
        return metrics

    def curve(self, trainer: FederatedTrainer, processor: Any) -> list[tuple[int, float]]:
        return evaluations(trainer, "eval_accuracy")
