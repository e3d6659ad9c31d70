"""FedRep: Collins et al. 2021, "Exploiting Shared Representations for Personalized Federated Learning"."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import AdapterExpert
from ..weights import Payload, StateLayout
from .local import kept_or_trained
from .setting_kinds import check_setting_kinds


@dataclass
class FedRep(Strategy):
    """
    Clients share the body of the model and keep a head each: first the head learns, then the body (Algorithm 1).

    The body has the local epochs of the training arguments.

    Args:
        head (`tuple[str]`, *optional*): Beginnings of the names of the tensors that stay with the client; `()` is
            FedAvg. By default all that lie outside of the backbone (`base_model_prefix`) of a Hugging Face model.
        head_epochs (`float`, *optional*, defaults to 1.0): Local epochs in which the head alone learns.
    """

    head: tuple[str, ...] | None = None
    head_epochs: float = 1.0
    name = "fedrep"
    needs = "mean"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.head_epochs <= 0:
            raise ValueError(f"`head_epochs` is {self.head_epochs}: the head needs more than 0 epochs to learn.")

    def head_names(self, layout: StateLayout, model: nn.Module) -> set[str]:
        """The names of the head's tensors; raises `ValueError` when nothing is in it, or everything."""
        found = names_of_part(layout, model, self.head)
        if (not found and self.head != ()) or len(found) == len(layout.slots):
            raise ValueError(
                f"`head` is {self.head!r}, which takes {len(found)} of the {len(layout.slots)} tensors of a "
                f"{type(model).__name__}: name where its head begins, for example head=('classifier',)."
            )
        return found

    def setup(self, server: Server, num_clients: int) -> None:
        self.head_names(server.layout, server.worker)

    def shared(self, server: Server, round_index: int) -> set[str]:
        names = {slot.name for slot in server.layout.slots} | set(server.layout.integers)
        return names - self.head_names(server.layout, server.worker)

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        head = self.head_names(local.layout, local.worker)
        body = {name for name, _ in local.worker.named_parameters()} - head
        row_P, integers = self._with_head(local, task, task.kept), task.integers
        if head:
            tuned = local.train(
                task.dataset, row_P, integers, row_P.clone(), task.seed, epochs=self.head_epochs, only=head
            )
            row_P, integers = tuned.row_P, tuned.integers
        # Other orders and masks of dropout than the head had.
        seed = task.seed + 1 if head else task.seed
        payload = local.train(task.dataset, row_P, integers, task.out_P, seed, task.kept_optimizer, only=body)
        views = local.layout.views(payload.row_P)
        return payload, {name: views[name].clone() for name in head}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        average_body_into_(server, uploads, self.head_names(server.layout, server.worker))
        return {}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        kept = kept_or_trained(self, local, task)
        return local.load(self._with_head(local, task, kept), task.integers)

    def _with_head(self, local: LocalTrainer, task: ClientTask, kept: dict[str, Tensor]) -> Tensor:
        """The received row with the client's own head, the received one if it has none yet."""
        row_P = task.received_P.clone()
        views = local.layout.views(row_P)
        with torch.no_grad():
            for name in self.head_names(local.layout, local.worker) & kept.keys():
                views[name].copy_(kept[name])
        return row_P


def names_of_part(layout: StateLayout, model: nn.Module, beginnings: tuple[str, ...] | None) -> set[str]:
    """
    Returns the names of a row's tensors that begin so, or, without `beginnings`, that lie outside of the backbone
    (`base_model_prefix`) of a Hugging Face model: its head.
    """
    if beginnings is not None:
        return {slot.name for slot in layout.slots if slot.name.startswith(tuple(beginnings))}
    prefix = (model.base if isinstance(model, AdapterExpert) else model).base_model_prefix
    return {slot.name for slot in layout.slots if f".{prefix}." not in f".{slot.name}"}


def average_body_into_(server: Server, uploads: Uploads, head: set[str]) -> None:
    """Does what [`average_into_`] does, for models whose `head`, a set of names, stays with the clients."""
    views = server.layout.views(server.bank_SP[0])
    before = {name: views[name].clone() for name in head}
    uploads.average_into_(server)
    # No client sent one: not even the rounding of a mean of equal values may change the server's.
    for name, tensor in before.items():
        views[name].copy_(tensor)
