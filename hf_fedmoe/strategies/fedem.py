"""FedEM: Marfoq et al. 2021, "Federated Multi-Task Learning under a Mixture of Distributions", Algorithm 1.

Shape suffixes: B batch, N examples of a client, M models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import EnsemblePreTrainedModel
from ..weights import Payload
from .setting_kinds import check_setting_kinds


@dataclass
class FedEM(Strategy):
    """
    Each client's data is a mixture of M distributions, each with a model of its own; the models are shared, the
    client's weights pi of the mixture are not.

    A round of a client: q_im = softmax over m of (log pi_m - loss of model m on example i), pi_m = mean over i of
    q_im, then local epochs on the sum over m of the mean over i of q_im times that loss. The server averages each
    model. A client predicts with the mixture of the models' probabilities by its pi; the server's model has equal
    weights. Models that start too much alike may stay so: EM finds a local optimum.

    A client that keeps no pi, an unseen one say, is evaluated after `num_em_steps` from the uniform pi, without
    training.

    Args:
        num_em_steps (`int`, *optional*, defaults to 1): Updates of q and pi before each local training.
        include_absent (`bool`, *optional*, defaults to `False`): Whether clients that did not take part have their
            part in the average all the same, with the models of before the round. Weights are then n_c / n over all
            clients.
    """

    num_em_steps: int = 1
    include_absent: bool = False
    name = "fedem"
    trains = "ensemble"
    needs = "mean"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.num_em_steps < 1:
            raise ValueError(f"`num_em_steps` is {self.num_em_steps}: give at least 1.")

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        if not isinstance(model, EnsemblePreTrainedModel):
            raise ValueError(
                f"FedEM trains several models at once, `model` is a {type(model).__name__}: build an ensemble around "
                "it with `EnsembleForSequenceClassification.from_classifier(model, num_models=3)`."
            )
        return [model]

    def shared(self, server: Server, round_index: int) -> set[str]:
        return {slot.name for slot in server.layout.slots} - {"mixture_M"} | set(server.layout.integers)

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        q_NM, pi_M = self.expect(local, task)
        places = local.own_places(local.plan(task.dataset, task.seed))

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return (q_NM[next(places)] * model_losses(model, batch)).sum(1).mean()

        args = (task.dataset, task.received_P, task.integers, task.out_P, task.seed, task.kept_optimizer)
        return local.train(*args, loss=loss), {"pi_M": pi_M}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        mixture_M = server.layout.views(server.bank_SP[0])["mixture_M"]
        before_M = mixture_M.clone()
        uploads.average_into_(server, server.num_examples if self.include_absent else None)
        mixture_M.copy_(before_M)  # nobody sent one: not even the rounding of a mean may change it
        return {}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        pi_M = task.kept["pi_M"] if "pi_M" in task.kept else self.expect(local, task)[1]
        model = local.load(task.received_P, task.integers)
        model.get_buffer("mixture_M").copy_(pi_M)
        return model

    @torch.no_grad()
    def expect(self, local: LocalTrainer, task: ClientTask) -> tuple[Tensor, Tensor]:
        """q and pi of a client for the received models (the E-step)."""
        model = local.load(task.received_P, task.integers).eval()
        with local.accelerator.autocast():
            losses_NM = torch.cat([model_losses(model, batch) for batch in local.in_order(task.dataset, task.seed)])
        pi_M = task.kept.get("pi_M", torch.full(losses_NM.shape[1:], 1 / losses_NM.shape[1])).to(losses_NM)
        for _ in range(self.num_em_steps):
            q_NM, pi_M = expectation(losses_NM, pi_M)
        return q_NM, pi_M


def model_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each model of an ensemble on each example, `[B, M]`."""
    logits_BMC = model(**batch).model_logits.float()
    labels_BM = batch["labels"][:, None].expand(logits_BMC.shape[:2])
    # As rows: with `full_determinism` a GPU has no other cross-entropy.
    losses_N = cross_entropy(logits_BMC.flatten(0, 1), labels_BM.flatten(), reduction="none")
    return losses_N.view(labels_BM.shape)


def expectation(losses_NM: Tensor, pi_M: Tensor) -> tuple[Tensor, Tensor]:
    """q_im = softmax over m of (log pi_m - l_im), and the new pi, its mean over the examples."""
    q_NM = (pi_M.clamp_min(torch.finfo(pi_M.dtype).tiny).log() - losses_NM).softmax(1)
    return q_NM, q_NM.mean(0)
