"""Metrics of `evaluate` as `compute_metrics`, and scikit-learn's of the same names where they cannot be reached.

Shape suffixes: B rows, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import sklearn.metrics
from huggingface_hub import is_offline_mode
from transformers import EvalPrediction


# Those of the Hub that scikit-learn computes, which is what their scripts call as well.
SCIKIT_LEARN: dict[str, Callable[..., Any]] = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": sklearn.metrics.f1_score,
    "matthews_correlation": sklearn.metrics.matthews_corrcoef,
    "precision": sklearn.metrics.precision_score,
    "recall": sklearn.metrics.recall_score,
}
# Their own default, "binary", is an error where there are more than two classes.
SETTINGS: dict[str, dict[str, Any]] = {
    "f1": {"average": "macro"},
    "precision": {"average": "macro", "zero_division": 0},
    "recall": {"average": "macro", "zero_division": 0},
}


@runtime_checkable
class Metric(Protocol):
    """The part of an `evaluate.EvaluationModule` that is used here."""

    name: str

    def compute(self, *, predictions: Any, references: Any, **settings: Any) -> dict[str, Any]: ...


@dataclass
class ScikitLearnMetric:
    """
    A metric of scikit-learn, called as one of `evaluate` is.

    Args:
        name (`str`): One of `SCIKIT_LEARN`.
    """

    name: str

    def compute(self, *, predictions: Any, references: Any, **settings: Any) -> dict[str, Any]:
        return {self.name: SCIKIT_LEARN[self.name](references, predictions, **settings)}


@dataclass
class MetricWithSettings:
    """
    A metric that is always computed with the same settings, which `evaluate.combine` would hand to all its metrics.

    Args:
        metric ([`Metric`]): Of `evaluate`, or in its place.
        settings (`dict[str, Any]`): Of its `compute`.
    """

    metric: Metric
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.metric.name

    def compute(self, *, predictions: Any, references: Any) -> dict[str, Any]:
        return self.metric.compute(predictions=predictions, references=references, **self.settings)


def load_metric(name: str) -> Metric:
    """
    Loads a metric of `evaluate`: of a folder with its script, of the Hub, or of the Hub's cache. `HF_HUB_OFFLINE`
    keeps it from asking the Hub.

    Args:
        name (`str`): As `evaluate.load` takes it.

    Raises:
        ValueError: When it cannot be reached, and scikit-learn has none of this name.
    """
    import evaluate  # takes seconds, and only who asks for its metrics needs it

    evaluate.config.HF_EVALUATE_OFFLINE |= is_offline_mode()
    try:
        return evaluate.load(name, keep_in_memory=True)
    except (ConnectionError, FileNotFoundError):
        if name not in SCIKIT_LEARN:
            raise ValueError(
                f"The metric {name!r} is no folder with a script, and neither the Hub nor its cache has it or can be "
                f"reached. Without a network there are {', '.join(SCIKIT_LEARN)}."
            ) from None
        return ScikitLearnMetric(name)


def evaluate_metrics(
    *metrics: str | Metric, **settings: dict[str, Any]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Makes a trainer's `compute_metrics` of metrics of `evaluate`, combined by `evaluate.combine`. Where the Hub and its
    cache cannot be reached, accuracy, f1, precision, recall and matthews_correlation are scikit-learn's, which are the
    same figures. f1, precision and recall are means over classes (`average="macro"`) unless `settings` say otherwise.

    A metric of the Hub is a Python script, which `evaluate` downloads and runs: name those whose authors you trust.

    Args:
        metrics (`str` or `evaluate.EvaluationModule`): Names, folders with a script, or metrics that were loaded.
        settings (`dict[str, Any]`, *optional*): By name, what goes to a metric's `compute`: `f1={"average": "micro"}`.

    Raises:
        ValueError: When something is no metric, a metric cannot be reached or cannot be computed of classes, or
            `settings` name another one.

    Example:

    ```python
    >>> compute_metrics = evaluate_metrics("accuracy", "f1", "matthews_correlation")
    ```
    """
    import evaluate

    for given in metrics:
        if not isinstance(given, str | Metric):
            raise ValueError(
                f"`metrics` has {given!r}, a {type(given).__name__}: give names one by one, "
                '`evaluate_metrics("accuracy", "f1")`, or what `evaluate.load` returns.'
            )
    loaded = [load_metric(each) if isinstance(each, str) else each for each in metrics]
    if not loaded:
        raise ValueError('There is no metric: name one, for instance `evaluate_metrics("accuracy")`.')
    names = [each.name for each in loaded]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"The metric {twice[0]!r} is there {names.count(twice[0])} times: name each once.")
    for name in settings:
        if name not in names:
            raise ValueError(f"There are settings for {name!r}, and the metrics are {', '.join(names)}.")
        if not isinstance(settings[name], dict):
            raise ValueError(
                f"`{name}` is {settings[name]!r}: give the settings of that metric by name, for example "
                f'`{name}={{"average": "macro"}}`.'
            )
    with_settings = [
        MetricWithSettings(each, SETTINGS.get(each.name, {}) | settings.get(each.name, {})) for each in loaded
    ]
    for each in with_settings:
        _try_out(each)
    combined = evaluate.combine(with_settings)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits_BC = logits[0] if isinstance(logits, tuple) else logits
        found = combined.compute(predictions=logits_BC.argmax(-1), references=prediction.label_ids)
        return {name: float(value) for name, value in found.items()}

    return compute_metrics


def _try_out(metric: MetricWithSettings) -> None:
    """Computes a metric of two rows: what fails here, or is no number, would fail after the first round."""
    try:
        for value in metric.compute(predictions=[0, 1], references=[0, 1]).values():
            float(value)
    except Exception as error:
        raise ValueError(
            f"The metric {metric.name!r} cannot be computed of predicted and true classes with the settings "
            f"{metric.settings}: {error}"
        ) from error
