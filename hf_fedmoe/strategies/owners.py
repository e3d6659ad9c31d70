"""
Owners of text train experts of one frozen base in rounds, and a router follows from sums of their statistics. (The
router is that of DUME, arXiv 2603.29765, on the running mean of embeddings; docs/language_models.md.)

Shape suffixes: M clients, m participants, K owners, S = K rows of the server, P elements of an expert's row, D width
of the base's embeddings and a one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import FederatedTexts
from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import AdapterExpert, FedMoEForCausalLM, TextStatistics, text_statistics
from ..models.adapter_experts_fedmoe_causal import adapter_experts, write_expert
from ..weights import Payload


# What a client is sent whose statistics the server has not, and what it sends then.
WANTED, GRAM = "statistics_wanted", "gram_DD"
# Of a client's rows so many are summed up, taken from all of them.
STATISTICS_ROWS = 1000


@dataclass
class Owners(Strategy):
    """
    Each owner's expert is the mean of the adapters of its own clients; nobody's training reaches another's expert.

    With its first upload a client sends the sums of its text ([`TextStatistics`]); those of an owner's clients are
    added, and the router of the mixture is found again. A client is served by its owner's expert, an unseen one by
    that with the least loss on its rows; whoever does not say who asks gets the mixture.

    Args:
        owner_of (`list[int]`, *optional*): The owner of each client, from 0 in the order of `config.owners`; see
            [`~Owners.by_name`]. By default client k is owner k.
    """

    owner_of: list[int] | None = None
    name = "owners"
    needs = "fusion"
    compressible = True
    keeps_optimizer = True

    @classmethod
    def by_name(cls, model: FedMoEForCausalLM, data: FederatedTexts) -> "Owners":
        """
        Gives each client to the owner who has its name among its `members`, or has its name.

        Args:
            model ([`FedMoEForCausalLM`]): With owners, `{"name": "courts", "members": ["north", "south"]}`.
            data ([`FederatedTexts`]): With names of clients.

        Raises:
            `ValueError`: If a client belongs to no owner, or to two.
        """
        owners = model.config.owners or []
        members = [set(owner.get("members") or [owner["name"]]) for owner in owners]
        found = []
        for client in data.client_names[: data.num_clients]:
            own = [k for k, names in enumerate(members) if client in names]
            if len(own) != 1:
                raise ValueError(
                    f"The client {client!r} belongs to {[owners[k]['name'] for k in own]}: name it as one owner, or "
                    f"among the `members` of one; the owners are {model.config.expert_names[1:]}."
                )
            found += own
        return cls(found)

    def server_models(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        if not isinstance(model, FedMoEForCausalLM):
            raise ValueError(
                f"Owners have the experts of a mixture, `model` is a {type(model).__name__}: build one around it with "
                "`FedMoEForCausalLM.from_base(model, owners=[...])`."
            )
        return adapter_experts(model)

    def setup(self, server: Server, num_clients: int) -> None:
        num_owners, D = len(server.bank_SP), as_owners(server.model).router_ED.shape[1]
        owner_of = list(range(num_clients)) if self.owner_of is None else self.owner_of
        if len(owner_of) != num_clients or set(owner_of) != set(range(num_owners)):
            raise ValueError(
                f"`owner_of` is {self.owner_of}, for {num_clients} clients and {num_owners} owners: give each client "
                "an owner and each owner a client."
            )
        server.tensors |= {
            "owner_M": torch.tensor(owner_of),
            "known_M": torch.zeros(num_clients, dtype=torch.bool),
            "gram_KDD": torch.zeros(num_owners, D, D, dtype=torch.float64),
        }

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        owner_M = server.tensors["owner_M"]
        return server.bank_SP[owner_M[client] if client < len(owner_M) else 0]

    def download_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        return {WANTED: torch.ones(1)} if self._is_new(server, client) else {}

    def upload_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        return {GRAM: server.tensors["gram_KDD"][0]} if self._is_new(server, client) else {}

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        payload, retained = super().train_client(local, task)
        payload.tensors = {}
        if WANTED in task.received.tensors:
            payload.tensors[GRAM] = _statistics(local, task.dataset).gram_DD.to(payload.row_P.device)
        return payload, retained

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        """Refuses statistics that no text has: one client's would decide where all text goes."""
        if GRAM not in payload.tensors:
            return None
        return TextStatistics(payload.tensors[GRAM].cpu()).fault(as_owners(server.model).get_input_embeddings())

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        tensors, device = server.tensors, server.bank_SP.device
        owner_m = tensors["owner_M"].to(device)[uploads.clients]
        member_Km = torch.arange(len(server.bank_SP), device=device)[:, None] == owner_m
        weights_Km = member_Km * uploads.num_examples_m.to(device)
        total_K = weights_Km.sum(1)
        weights_Km = weights_Km / total_K.clamp_min(1)[:, None]
        idle_K = total_K == 0
        keep_K, before = idle_K.to(weights_Km), server.bank_SP[idle_K]
        uploads.fuse_into_(server, weights_Km, keep_K)
        server.bank_SP[idle_K] = before  # to the bit: a product cut to its own rank is rounded
        for client, sent in zip(uploads.clients, uploads.tensors, strict=True):
            if sent:
                tensors["known_M"][client] = True
                tensors["gram_KDD"][tensors["owner_M"][client]] += sent[GRAM].to(tensors["gram_KDD"])
        _write_mixture(server)
        return {f"owner_{k}_clients": float(count) for k, count in enumerate(member_Km.sum(1).tolist())}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        owner_M = server.tensors["owner_M"]
        if task.client < len(owner_M):
            return local.load(server.bank_SP[owner_M[task.client]], task.integers)
        found = local.least_loss(task.dataset, server.bank_SP, task.integers, task.seed)
        return local.load(server.bank_SP[found], task.integers)

    def _is_new(self, server: Server, client: int) -> bool:
        """Tells whether a client of the federation has not sent its statistics yet."""
        known_M = server.tensors["known_M"]
        return client < len(known_M) and not known_M[client]


def as_owners(model: nn.Module) -> FedMoEForCausalLM:
    """Narrows the type of a mixture, of which `server_models` has made sure."""
    assert isinstance(model, FedMoEForCausalLM)
    return model


def _statistics(local: LocalTrainer, dataset: Any) -> TextStatistics:
    """Sums up a client's rows by the embeddings of the frozen base."""
    assert isinstance(local.worker, AdapterExpert)
    places = range(0, len(dataset), -(-len(dataset) // STATISTICS_ROWS))
    embed = local.worker.base.get_input_embeddings()
    return text_statistics(embed, (dataset[place]["input_ids"] for place in places))


def _write_mixture(server: Server) -> None:
    """Copies the experts of the bank, and the router of the statistics so far, into the mixture."""
    mixture = as_owners(server.model)
    for k, row_P in enumerate(server.bank_SP, start=1):
        write_expert(mixture, k, server.layout.views(row_P))
    for name, gram_DD in zip(mixture.config.expert_names[1:], server.tensors["gram_KDD"], strict=True):
        known = mixture.statistics_of(name)
        if gram_DD[-1, -1] > 0 and (known is None or not torch.equal(known.gram_DD, gram_DD.cpu())):
            mixture.set_statistics(name, TextStatistics(gram_DD.cpu()))
