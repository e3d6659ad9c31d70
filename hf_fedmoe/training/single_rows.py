"""Clients with a single row to train on, of which a model with batch statistics may make none."""

import torch

from ..federation import LocalTrainer
from .readers import Reader


# As many owners of a single row are named; those beyond are counted.
MAX_NAMED = 5


@torch.no_grad()
def check_single_rows(local: LocalTrainer, readers: list[Reader]) -> None:
    """
    Raises `ValueError` if the client model cannot be trained on a batch of one row, and somebody has no other. The
    model is asked itself: BatchNorm after a convolution has the statistics of all pixels. Its running statistics
    change.

    Args:
        local ([`~federation.LocalTrainer`]): The clients' trainer.
        readers (`list[Reader]`): Who reads which rows.
    """
    trained = [(reader, part) for reader in readers if reader.trains for part in reader.parts]
    every = local.args.train_batch_size == 1
    alone = [(reader, part) for reader, part in trained if every or len(part.rows) == 1]
    if not alone or not local.has_batch_statistics:
        return
    reader, part = alone[0]
    batch = reader.collate([reader.dataset[int(part.rows[0])]])
    try:
        with local.accelerator.autocast():
            local.worker.train()(**{name: tensor.to(local.accelerator.device) for name, tensor in batch.items()})
    except ValueError as error:
        model = f"the {type(local.worker).__name__} normalises by the statistics of a batch (BatchNorm)"
        if every:
            raise ValueError(
                f"`per_device_train_batch_size` is 1, but {model}, which one row has not: set it to 2 or more. It "
                f"says: {error}"
            ) from error
        names = ", ".join(part.name for _, part in alone[:MAX_NAMED])
        more = f" and {len(alone) - MAX_NAMED} more" if len(alone) > MAX_NAMED else ""
        raise ValueError(
            f"`train_dataset` has only one row of {names}{more}, but {model}, which one row has not: give each two "
            f"rows or more (`min_size=2` of a partition), or leave them out. It says: {error}"
        ) from error
