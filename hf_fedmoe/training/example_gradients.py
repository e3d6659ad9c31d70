"""A look at the gradients that Opacus finds of single examples, before anybody relies on them."""

import torch
from torch import Tensor

from ..federation import LocalTrainer


# Of the norm of an example's gradient; float32 rounds less away.
TOLERANCE = 1e-3
REMEDY = (
    "Take rows of equal length if the loss is a mean over tokens, adapters (`peft_config`) if a layer is to blame, or "
    "leave `example_noise_multiplier` and `example_target_epsilon` out."
)


def check_example_gradients(local: LocalTrainer, batch: dict[str, Tensor], loss_is: str) -> None:
    """
    Raises `ValueError` unless the gradient of each row of a batch is that of the row by itself: where rows share
    something, normalisation, a loss of whole batches or of all tokens alike, none can be shortened by itself.

    Args:
        local ([`~federation.LocalTrainer`]): The clients' trainer, whose worker is a client's.
        batch (`dict[str, Tensor]`): Rows as they are collated.
        loss_is (`str`): Whose loss it is, for messages.
    """
    private, worker = local.private_updates, local.worker
    assert private is not None  # the run hides examples
    training = {module: module.training for module in private.runs.modules()}
    # Without dropout, whose masks differ; Opacus looks at layers in training only.
    for module in training:
        module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    begin = f"{loss_is} cannot be trained by DP-SGD:"
    try:
        local.objective(worker, dict(batch)).backward()
        try:
            found = private.gradients_of_examples()
        except RuntimeError as error:
            raise ValueError(f"{begin} {error}. {REMEDY}") from error
        count = len(next(iter(batch.values())))
        for row in range(count):
            worker.zero_grad()
            with private.looking_away():
                local.objective(worker, {name: tensor[row : row + 1] for name, tensor in batch.items()}).backward()
            own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, (p, _) in found.items()}
            whole = torch.stack([gradient.norm() for gradient in own.values()]).norm()
            for name, (_, gradients) in found.items():
                off = (gradients[row] - own[name]).norm()
                if not off <= TOLERANCE * whole:
                    raise ValueError(
                        f"{begin} the gradient of a row in `{name}` is another in a batch of {count} than by itself "
                        f"(by {off.item():.3g}, where all of it is {whole.item():.3g}), and cannot be shortened. "
                        f"{REMEDY}"
                    )
    finally:
        private.forget()
        for module, mode in training.items():
            module.training = mode
