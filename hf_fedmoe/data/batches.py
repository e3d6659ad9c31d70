"""
Rows in batches to train on.

Shape suffixes: N rows in the order in which they are read.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_statistics(model: nn.Module) -> bool:
    """Tells whether a layer normalises by the mean and the variance of a batch, which a single row may not have."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def split_rows(order_N: Tensor, batch_size: int, never_one: bool) -> list[Tensor]:
    """
    Splits rows into batches of `batch_size`, of which the last may have fewer.

    Args:
        order_N (`Tensor` of shape `[N]`): The rows.
        batch_size (`int`): Rows of a batch.
        never_one (`bool`): Whether a last row by itself joins the batch before it, for models with batch statistics.
    """
    batches = list(order_N.split(batch_size))
    if never_one and len(batches) > 1 and batch_size > 1 and len(batches[-1]) == 1:
        batches[-2:] = [order_N[-batch_size - 1 :]]
    return batches
