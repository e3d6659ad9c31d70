"""A look at the gradients that Opacus finds of single examples, before anybody relies on them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.row_checks import LABELS
from ..federation import LocalTrainer
from .precision import without_tf32
from .readers import Reader


# Of the norm of an example's gradient; float32 rounds less away.
TOLERANCE = 1e-3
# So many rows are asked for their class, of as many classes one is tried.
MOST_ASKED, MOST_KINDS = 1000, 4
REMEDY = (
    "If the loss is a mean over tokens or weighs classes, give a `compute_loss_func` that is the mean of each row's "
    "own loss, or take rows of equal length; if padding is not masked, these too; if a layer is to blame, adapters "
    "(`peft_config`); or leave `example_noise_multiplier` and `example_target_epsilon` out."
)


def telling_rows(reader: Reader) -> list[int]:
    """
    Returns three rows or more by which whatever a batch's rows share shows: the shortest and the longest, and some of
    other classes, or with other numbers of labelled tokens, since a loss may weigh rows by them.
    """
    stored = reader.dataset.with_format(None)
    label = next((name for name in LABELS if name in stored.column_names), None)
    kinds: dict[Any, int] = {}
    if label is not None:
        every = reader.rows
        asked = every[np.linspace(0, len(every) - 1, min(len(every), MOST_ASKED)).astype(int)]
        for row, target in zip(asked.tolist(), stored.select(asked)[label], strict=True):
            kinds.setdefault(sum(token >= 0 for token in target) if isinstance(target, list) else target, row)
    known = sorted(kind for kind in kinds if kind is not None)
    chosen = {known[place] for place in np.linspace(0, len(known) - 1, MOST_KINDS).astype(int)} if known else set()
    rows = list(dict.fromkeys([*reader.extremes(), *(row for kind, row in kinds.items() if kind in chosen)]))
    return [*rows, rows[0], rows[0]][: max(3, len(rows))]  # a dimension of two may be anything


@without_tf32()
def check_example_gradients(
    local: LocalTrainer, rows: Sequence[int], collate: Callable[[Sequence[int]], dict[str, Tensor]], loss_is: str
) -> None:
    """
    Raises `ValueError` unless the gradient of each row of a batch is that of the row by itself: where rows share
    something, normalisation, padding that is not masked, a loss of whole batches or of all tokens alike, none can be
    shortened by itself. Parameters that are 0 are others afterwards: nothing would show behind them.

    Args:
        local ([`~federation.LocalTrainer`]): The clients' trainer, whose worker is a client's.
        rows (`Sequence[int]`): See [`telling_rows`].
        collate (`Callable`): Makes a batch of rows, on the device.
        loss_is (`str`): Whose loss it is, for messages.
    """
    private, worker = local.private_updates, local.worker
    assert private is not None  # the run hides examples
    training = {module: module.training for module in private.runs.modules()}
    # Without dropout, whose masks differ; Opacus looks at layers in training only.
    for module in training:
        module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    _fill_zeros(worker)
    begin, batch = f"{loss_is} cannot be trained by DP-SGD:", collate(rows)
    try:
        try:
            local.objective(worker, dict(batch)).backward()
            found = private.gradients_of_examples()
        except Exception as error:
            raise ValueError(f"{begin} {_line(error)}. {REMEDY}") from error
        for place, row in enumerate(rows):
            worker.zero_grad()
            alone = _by_itself({name: tensor[place : place + 1] for name, tensor in batch.items()}, collate([row]))
            try:
                with private.looking_away():
                    local.objective(worker, alone).backward()
            except Exception as error:
                raise ValueError(f"{begin} a row by itself has no gradient. {_line(error)}. {REMEDY}") from error
            own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, (p, _) in found.items()}
            whole = torch.stack([gradient.norm() for gradient in own.values()]).norm()
            for name, (_, gradients) in found.items():
                off = (gradients[place] - own[name]).norm()
                if not off <= TOLERANCE * whole:
                    raise ValueError(
                        f"{begin} the gradient of a row in `{name}` is another in a batch of {len(rows)} than by "
                        f"itself (by {off.item():.3g}, where all of it is {whole.item():.3g}), and cannot be "
                        f"shortened. {REMEDY}"
                    )
    finally:
        private.forget()
        for module, mode in training.items():
            module.training = mode


def check_nothing_is_kept(local: LocalTrainer, batch: dict[str, Tensor], loss_is: str) -> None:
    """
    Raises `ValueError` if the model keeps something of the rows that it reads in training, in a buffer or a frozen
    parameter: it is sent, or left to the next client, without noise.

    Args:
        local ([`~federation.LocalTrainer`]): The clients' trainer, whose worker is a client's.
        batch (`dict[str, Tensor]`): Rows as they are collated.
        loss_is (`str`): Whose loss it is, for messages.
    """
    private = local.private_updates
    assert private is not None  # the run hides examples

    def kept() -> dict[str, Tensor]:
        frozen = {name: p for name, p in local.worker.named_parameters() if not p.requires_grad}
        return frozen | dict(local.worker.named_buffers())

    before = {name: tensor.detach().clone() for name, tensor in kept().items()}
    with private.looking_away():
        local.objective(local.worker.train(), dict(batch))
    for name, tensor in kept().items():
        if name not in before or not torch.equal(tensor, before[name]):
            raise ValueError(
                f"{loss_is} cannot be trained by DP-SGD: `{name}` of the model changes when it reads rows in "
                "training, and no noise hides what it keeps of them. Choose a model without it, or leave "
                "`example_noise_multiplier` and `example_target_epsilon` out."
            )


@torch.no_grad()
def _fill_zeros(worker: nn.Module) -> None:
    """Gives parameters that are 0 throughout, as B of a fresh adapter, other values."""
    for parameter in worker.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.1)


def _by_itself(placed: dict[str, Tensor], alone: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Returns a row as it is collated alone, where it differs by nothing but padding from how it is in a batch: of a
    collator that draws random numbers it is another row.
    """
    same = placed.keys() == alone.keys() and all(_is_padded(placed[name], tensor) for name, tensor in alone.items())
    return alone if same else placed


def _is_padded(placed: Tensor, alone: Tensor) -> bool:
    if placed.dim() < 2:
        return torch.equal(placed, alone)
    length = alone.shape[1]
    return any(torch.equal(part, alone) for part in (placed[:, :length], placed[:, -length:]))


def _line(error: Exception) -> str:
    return f"It says: {type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
