"""The local objective, which a client minimises."""

from torch import Tensor, nn


class LocalObjective:
    """
    The local objective of a method, [`Strategy`]: the model's own loss, and near the received model if asked. A method
    that has another overrides [`LocalObjective.loss`].
    """

    def loss(self, model: nn.Module, batch: dict[str, Tensor], received: dict[str, Tensor]) -> Tensor:
        """
        Returns the local objective on one batch: the model's own loss and [`LocalObjective.proximal_weight`] times
        half the squared distance from `received`, the downloaded parameters by name.
        """
        return own_loss(model, batch) + held_near(model, received, self.proximal_weight)

    @property
    def proximal_weight(self) -> float:
        """mu of the term mu / 2 ||w - w_received||^2 of the loss."""
        return 0.0

    def learning_rate_factors(self, model: nn.Module) -> dict[str, float]:
        """Gives what multiplies the learning rates of a client's parameters, by their names; 1 for those left out."""
        return {}


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the model's own loss on a batch."""
    return model(**batch).loss


def held_near(model: nn.Module, received: dict[str, Tensor], mu: float) -> Tensor | float:
    """Returns mu / 2 ||w - w_received||^2 over the parameters that learn."""
    if not mu:
        return 0.0
    learning = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return mu / 2 * sum((parameter - received[name]).square().sum() for name, parameter in learning)


def has_own_loss(objective: LocalObjective) -> bool:
    """Tells whether clients train by the model's own loss and `proximal_weight`, whoever computes them."""
    return type(objective).loss is LocalObjective.loss and "loss" not in vars(objective)
