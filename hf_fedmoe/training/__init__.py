"""Arguments and trainers: the face that Hugging Face users know."""

from .federated_arguments import FederatedTrainingArguments
from .federated_trainer import FederatedTrainer
from .fedmoe_arguments import FedMoETrainingArguments
from .fedmoe_trainer import FedMoETrainer
from .hub_metrics import evaluate_metrics
from .metrics import classification_metrics


__all__ = [
    "FedMoETrainer",
    "FedMoETrainingArguments",
    "FederatedTrainer",
    "FederatedTrainingArguments",
    "classification_metrics",
    "evaluate_metrics",
]
