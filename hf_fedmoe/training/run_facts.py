"""Gathers the facts about a run that its model card tells."""

from typing import Any

import numpy as np
from transformers import TrainerState

from ..data import FederatedDataset
from ..federation import RoundReport
from ..reporting import ExamplePrivacyFacts, PrivacyFacts, RunFacts
from ..strategies import Strategy
from .federated_arguments import FederatedTrainingArguments


# Against hostile uploads, as far as they are set.
DEFENCES = ("max_update_norm", "max_update_norm_ratio", "robust_fusion")
LOCAL_SETTINGS = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "optim", "weight_decay")


def run_facts(
    args: FederatedTrainingArguments,
    strategy: Strategy,
    settings: dict,
    data: FederatedDataset,
    state: TrainerState,
    reports: list[RoundReport],
    contribution_SM: np.ndarray | None = None,
    privacy: PrivacyFacts | None = None,
    example_privacy: ExamplePrivacyFacts | None = None,
) -> RunFacts:
    """
    Gathers [`~reporting.RunFacts`].

    Args:
        args ([`FederatedTrainingArguments`]): Of the run.
        strategy ([`~strategies.Strategy`]): Its method.
        settings (`dict`): The method's settings.
        data ([`~data.FederatedDataset`]): Its clients.
        state (`TrainerState`): With the log, which a resumed run has from its first round on.
        reports (`list[RoundReport]`): The rounds of this process, the last ones of the run.
        contribution_SM (`np.ndarray` of shape `[S, M]`, *optional*): How much of each expert came from each client
            after the last round; it says nothing of the model of an earlier one.
        privacy ([`~reporting.PrivacyFacts`], *optional*): Of a private run.
        example_privacy ([`~reporting.ExamplePrivacyFacts`], *optional*): Of a run whose clients hide examples.
    """
    rounds = state.global_step
    sent: dict[float, dict[str, Any]] = {entry["step"]: entry for entry in state.log_history if "bytes_up" in entry}
    for step, report in enumerate(reports, start=rounds - len(reports) + 1):
        sent[step] = {
            "bytes_up": report.bytes_up,
            "bytes_down": report.bytes_down,
            "refused_clients": len(report.refused),
        }
    participations_M = None
    if reports and len(reports) == rounds:
        drawn = [client for report in reports for client in report.clients if client not in report.refused]
        participations_M = np.bincount(drawn, minlength=data.num_clients)
    chosen_round = state.best_global_step if args.load_best_model_at_end else None
    return RunFacts(
        method=strategy.name,
        settings=settings | _defences(args),
        local={name: args.to_dict()[name] for name in LOCAL_SETTINGS},
        clients_per_round=args.clients_per_round,
        client_sizes_M=data.client_sizes,
        client_names=data.client_names[: data.num_clients],
        reserved_size=len(data.reserved) if strategy.needs_reserved_set() and data.reserved is not None else 0,
        rounds=rounds,
        chosen_round=chosen_round,
        bytes_up=sum(entry["bytes_up"] for entry in sent.values()),
        bytes_down=sum(entry["bytes_down"] for entry in sent.values()),
        counted_rounds=len(sent),
        participations_M=participations_M,
        refused=sum(entry["refused_clients"] for entry in sent.values()),
        contribution_SM=contribution_SM if chosen_round in (None, rounds) else None,
        evaluations=_evaluations(state.log_history),
        privacy=privacy,
        example_privacy=example_privacy,
    )


def _defences(args: FederatedTrainingArguments) -> dict[str, Any]:
    found = {name: vars(args)[name] for name in DEFENCES if vars(args)[name] is not None}
    return found | ({"expected_attackers": args.expected_attackers} if args.robust_fusion else {})


def _evaluations(history: list[dict]) -> dict[str, dict[str, float]]:
    """
    The newest evaluation under each prefix, of the finished model only: what was logged before the end of training
    belongs to earlier rounds, and a strategy may still change the model after the last one.
    """
    ends = [place for place, entry in enumerate(history) if "train_runtime" in entry]
    found: dict[str, dict[str, float]] = {}
    for entry in history[ends[-1] + 1 if ends else 0 :]:
        for key, value in entry.items():
            prefix, _, name = key.partition("_")
            if f"{prefix}_loss" in entry and name:
                found.setdefault(prefix, {})[name] = value
    return found
