"""The area under the curve: how well probabilities rank examples, whatever class is the most probable.

Shape suffixes: N examples, C classes.
"""

import math

import numpy as np
from sklearn.metrics import roc_auc_score


def macro_auc(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """
    Mean area under the ROC curve, each class against the rest, over the classes that some examples have and others
    have not; NaN where there is none, or a probability is not finite.
    """
    if not np.isfinite(probabilities_NC).all():
        return math.nan
    present = [c for c in np.unique(labels_N) if (labels_N != c).any()]
    areas = [roc_auc_score(labels_N == c, probabilities_NC[:, c]) for c in present]
    return float(np.mean(areas)) if areas else math.nan
