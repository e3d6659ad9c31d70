"""Training without a federation: what every personalised method must beat."""

from torch import Tensor, nn

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..weights import Payload


class Local(Strategy):
    """Each client trains its own model and sends nothing; the server's model stays the common start."""

    name = "local"
    compressible = True
    keeps_optimizer = True
    shares_batches = True

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        return server.bank_SP[0] if kept_P is None else kept_P

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        payload, _ = super().train_client(local, task)
        return payload, {"row_P": payload.row_P.clone()}

    def shared(self, server: Server, round_index: int) -> frozenset[str]:
        return frozenset()

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        return {}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        return local.load(kept_or_trained(self, local, task)["row_P"], task.integers)


def kept_or_trained(strategy: Strategy, local: LocalTrainer, task: ClientTask) -> dict[str, Tensor]:
    """Returns what a client keeps; one that keeps nothing, an unseen one say, does the training of one round first."""
    return task.kept or strategy.train_client(local, task)[1]
