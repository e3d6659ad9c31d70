"""Metrics of the server model when the caller names none."""

import numpy as np
from sklearn.metrics import f1_score
from transformers import EvalPrediction


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    `accuracy` and `macro_f1` (mean over all classes of the model, a class that is never right counting 0).

    `evaluate.load("accuracy")` would need the Hub; scikit-learn gives the same figures without a network.
    """
    logits_BC = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted_B = np.asarray(logits_BC).argmax(-1)
    labels = list(range(logits_BC.shape[-1]))
    macro_f1 = f1_score(prediction.label_ids, predicted_B, labels=labels, average="macro", zero_division=0)
    return {"accuracy": float((predicted_B == prediction.label_ids).mean()), "macro_f1": float(macro_f1)}
