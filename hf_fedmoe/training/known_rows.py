"""Rows that the server knows, on which its model is tried after each round."""

from collections.abc import Callable
from functools import partial

import datasets
from accelerate import Accelerator
from torch import nn

from ..data import FederatedDataset, ReservedSet
from ..federation import computes_finite
from ..strategies import Strategy


# One forward of them takes half a percent of a round of small models, and it is one in a round, whatever takes part.
NUM_ROWS = 4


def trial_on_known_rows(
    strategy: Strategy,
    data: FederatedDataset,
    columns: Callable[[datasets.Dataset], datasets.Dataset],
    collate: Callable,
    accelerator: Accelerator,
) -> Callable[[nn.Module], bool]:
    """
    Returns what tells of a model whether its scores of a few rows of the validation or reserved set are finite.

    Args:
        strategy ([`~strategies.Strategy`]): The method; one that asks each upload by itself needs no trial.
        data ([`~data.FederatedDataset`]): Of the run; where it has neither set, every model passes.
        columns (`Callable`): Leaves out the columns that the model does not take.
        collate (`Callable`): The data collator of evaluation.
        accelerator ([`~accelerate.Accelerator`]): Precision and device.
    """
    rows, batch = data.reserved if data.validation is None else data.validation, None
    if rows and type(strategy).probe is Strategy.probe:
        rows = columns(rows.select(range(min(len(rows), NUM_ROWS))))
        [batch] = ReservedSet(rows, collate, NUM_ROWS, accelerator.device).inputs
    return partial(computes_finite, rows=batch, autocast=accelerator.autocast)
