"""Metrics as tables and pictures show them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """
    A metric as it is shown, and which of two values is the better one.

    Args:
        heading (`str`): Of its column.
        factor (`float`, *optional*, defaults to 100): By what values are multiplied; shares of 1 are told in per cent.
        digits (`int`, *optional*, defaults to 1): Behind the point.
        lower_is_better (`bool`, *optional*, defaults to `False`): As of a loss.
    """

    heading: str
    factor: float = 100.0
    digits: int = 1
    lower_is_better: bool = False

    def is_better(self, value: float, other: float) -> bool:
        """Tells whether a value is better than another one; NaN is not, nor is anything better than NaN."""
        return value < other if self.lower_is_better else value > other


# What a mean round costs, whatever is trained.
COSTS = {
    "megabytes_up": Metric("MB up in a round", 1, 2, lower_is_better=True),
    "megabytes_down": Metric("MB down in a round", 1, 2, lower_is_better=True),
    "seconds": Metric("s in a round", 1, 2, lower_is_better=True),
}
# Of classifiers. Others are shares of 1, and named as they are called.
METRICS = {
    "accuracy": Metric("accuracy"),
    "macro_f1": Metric("macro-F1"),
    "auc": Metric("AUC"),
    "clients_accuracy": Metric("clients"),
    "clients_macro_f1": Metric("clients, macro-F1"),
    "clients_auc": Metric("clients, AUC"),
    "clients_bottom_decile": Metric("bottom decile"),
    "clients_worst": Metric("worst client"),
    "clients_unseen_accuracy": Metric("unseen clients"),
    "clients_unseen_bottom_decile": Metric("unseen, bottom decile"),
    **COSTS,
}


def metric_named(name: str, metrics: Mapping[str, Metric] = METRICS) -> Metric:
    """Returns a metric by its name, in per cent and by that name where there is none."""
    return metrics.get(name) or Metric(name.replace("_", " "))
