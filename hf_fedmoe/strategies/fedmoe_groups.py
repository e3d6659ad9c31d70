"""
Fed-MoE whose routed experts belong to groups of clients, which are found by statistics of their data.

Shape suffixes: S experts (main ones first), K routed experts and groups, m participants, M clients, C classes,
d features, R reserved examples, P elements of a model's row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import AdapterExpert, FedMoEPreTrainedModel
from ..weights import Payload, fuse_integers
from .client_groups import ClassSums, groups_of, input_distance, with_old_names
from .client_statistics import ClientStatistics, client_statistics, head_of, projection, prototype_scores
from .fedrep import names_of_part
from .gate_training import calibrated
from .narrowing import as_mixture, as_whole, reserved_of
from .server_training import expert_outputs, fine_tune_experts, gate_probabilities
from .setting_kinds import check_setting_kinds


# Of a client whose group is unknown.
NOBODY = -1
# Sums of the server's that are many small steps, in which a GPU would be waited for.
ON_HOST = ("group_M", "count_MC", "sum_MCd", "gram_dd", "scatter_Mdd", "input_distance", "contribution_SM")
# Squared standard deviations: groups whose inputs are further apart look different. Groups that are found where there
# are none came to 0.6 at most, kinds of pictures and turned ones to 1.2 and more (docs/results.md).
INPUTS_DIFFER = 1.0


@dataclass
class FedMoEGroups(Strategy):
    """
    One routed expert for each group of clients, a main expert that is the mean of all, and where their inputs look
    alike a trunk that all clients train.

    Groups are of clients whose classes look alike: whether their pictures are turned, or the same picture means
    another label to them, the means of their classes are apart in the features of the model that all start from. With
    its first upload a client sends these means ([`ClientStatistics`]); the server joins the clients that are likeliest
    to be alike ([`groups_of`]), and again when it learns of new ones. Proportions of classes alone make no group.

    A client trains the expert of its group. What is the group's `own` is averaged over its participants, all else, the
    trunk, over all of the round's: no expert gets less training than a single model would, but for its own part. A
    client is served by its group's expert, a new one by that with the least loss on its examples. Who does not say who
    asks gets the mixture: its gate, a frozen copy of the start, tells from the same statistics how likely an input is
    to be of each class of each group (linear discriminant analysis). The reserved set decides how much the gate's word
    counts, by one temperature and alpha.

    Args:
        own (`tuple[str]`, *optional*): Beginnings of the names of the tensors that each group has for itself;
            `("",)` for whole experts. By default the statistics decide: whole experts where inputs of groups look
            different ([`input_distance`] above 1), and where they look alike all that lie outside of the backbone
            of a Hugging Face model.
        statistics_size (`int`, *optional*, defaults to 256): d, the features that statistics are of, at most.
        calibrates (`bool`, *optional*, defaults to `True`): Whether temperature and alpha are those with which the
            mixture is surest of the reserved labels, or 1 and what the model starts with, without a reserved set.
        final_expert_epochs (`int`, *optional*, defaults to 5): Passes over the reserved set in which every expert is
            fine-tuned once, after the last round: routed ones on the examples that are likely to be of their groups,
            by the gate and by the label that each expert gives them.
        expert_learning_rate (`float`, *optional*, defaults to 1e-4): Of AdamW on the experts.
        expert_batch_size (`int`, *optional*, defaults to 32): Reserved examples per step of the experts.
    """

    own: tuple[str, ...] | None = None
    statistics_size: int = 256
    calibrates: bool = True
    final_expert_epochs: int = 5
    expert_learning_rate: float = 1e-4
    expert_batch_size: int = 32
    name = "fedmoe_groups"
    trains = "mixture_of_prototypes"
    needs = "fusion"
    compressible = True
    keeps_optimizer = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        for name, lowest in (("statistics_size", 1), ("final_expert_epochs", 0), ("expert_batch_size", 1)):
            if vars(self)[name] < lowest:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give at least {lowest}.")
        if self.expert_learning_rate <= 0:
            raise ValueError(f"`expert_learning_rate` is {self.expert_learning_rate}: give more than 0.")

    def needs_reserved_set(self) -> bool:
        return self.calibrates or self.final_expert_epochs > 0

    def server_models(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        remedy = "`FedMoEForSequenceClassification.from_expert(model, gate='prototypes', num_routed_experts=4)`."
        if not isinstance(model, FedMoEPreTrainedModel):
            raise ValueError(
                f"Groups have the experts of a mixture, `model` is a {type(model).__name__}: build one around it with "
                f"{remedy}"
            )
        if model.config.num_main_experts != 1:
            raise ValueError(
                f"`num_main_experts` is {model.config.num_main_experts}, but the mean of all clients is one: build a "
                "mixture with 1."
            )
        if isinstance(model.experts[0], AdapterExpert):
            raise ValueError("Experts of groups are whole models, `model` has adapters: leave `peft_config` out.")
        head_of(model.experts[0])  # or there is nothing to group by
        config = model.config
        if (config.gate, config.gate_prototypes) != ("model", config.num_labels) or type(model.gate) is not type(
            model.experts[0]
        ):
            raise ValueError(
                f"`gate` is {config.gate!r} with {config.gate_prototypes} prototypes of each expert, but the gate of "
                f"groups is a copy of an expert with one for each of the {config.num_labels} classes: build the "
                f"mixture with {remedy}"
            )
        return model.experts

    def setup(self, server: Server, num_clients: int) -> None:
        num_groups = len(server.bank_SP) - 1
        if num_clients < num_groups:
            raise ValueError(
                f"There are {num_clients} clients for `num_routed_experts` = {num_groups} groups: take more clients "
                "or fewer experts."
            )
        names = names_of_part(server.layout, server.worker, self.own)
        if not names:
            raise ValueError(
                f"`own` is {self.own!r}, with which no tensor of a {type(server.worker).__name__} begins: name the "
                "part that each group has for itself, for example own=('classifier',)."
            )
        gate = as_whole(as_mixture(server.model).gate).state_dict()
        for name, view in server.layout.views(server.bank_SP[0]).items():
            if gate[name].shape == view.shape:  # not the head
                gate[name].copy_(view)
        head = head_of(as_whole(server.worker))
        num_labels, d = head.out_features, min(self.statistics_size, head.in_features)
        server.tensors |= {
            "start_P": server.bank_SP[0].clone(),
            "group_M": torch.full((num_clients,), NOBODY),
            "count_MC": torch.zeros(num_clients, num_labels, dtype=torch.float64),
            "sum_MCd": torch.zeros(num_clients, num_labels, d, dtype=torch.float64),
            "gram_dd": torch.zeros(d, d, dtype=torch.float64),
            "scatter_Mdd": torch.zeros(num_clients, d, d),
            "input_distance": torch.zeros(()),
            "contribution_SM": torch.zeros(len(server.bank_SP), num_clients),
        }

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        return server.bank_SP[1 + int(server.tensors["group_M"][client])]  # the main expert without a group

    def download_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        """The model of whose features the statistics are, to a client that has not sent any."""
        return {"start_P": server.tensors["start_P"]} if self._is_new(server, client) else {}

    def upload_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        if not self._is_new(server, client):
            return {}
        tensors = server.tensors
        return {"count_C": tensors["count_MC"][0], "sum_Cd": tensors["sum_MCd"][0], "gram_dd": tensors["gram_dd"]}

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        found = None
        if "start_P" in task.received.tensors:
            local.load(task.received.tensors["start_P"], task.integers)
            found = client_statistics(local, task.dataset, task.seed, self.statistics_size)
        payload, retained = super().train_client(local, task)
        payload.tensors = {} if found is None else vars(found)
        return payload, retained

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        """Refuses statistics that no rows have: one client's would end the round of all."""
        return ClientStatistics(**payload.tensors).fault(payload.num_examples) if payload.tensors else None

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        # A checkpoint of a run on CPUs has brought them to where the models are.
        server.tensors |= {name: server.tensors[name].cpu() for name in ON_HOST}
        self._find_groups(server, uploads)
        report = self._fuse(server, uploads)
        if (server.tensors["group_M"] != NOBODY).any():
            report |= self._fit_gate(step) | {"input_distance": server.tensors["input_distance"].item()}
        return report | {"alpha": as_mixture(server.model).alpha.item()}

    def finish(self, server: Server, step: ServerStep) -> None:
        if self.final_expert_epochs:
            settings = self.final_expert_epochs, self.expert_learning_rate, self.expert_batch_size, step.seed
            fine_tune_experts(step, [None, *_shares(step).T], *settings)

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        group_M, experts_KP = server.tensors["group_M"], server.bank_SP[1:]
        group = int(group_M[task.client]) if task.client < len(group_M) else NOBODY
        if group == NOBODY:
            group = local.least_loss(task.dataset, experts_KP, task.integers, task.seed)
        return local.load(experts_KP[group], server.integers[1 + group])

    def _find_groups(self, server: Server, uploads: Uploads) -> None:
        """Takes note of the statistics of new clients and, if there are any, divides all known ones into groups."""
        tensors, num_groups = server.tensors, len(server.bank_SP) - 1
        sent = {client: ClientStatistics(**s) for client, s in zip(uploads.clients, uploads.tensors, strict=True) if s}
        for client, found in sent.items():
            tensors["count_MC"][client] = found.count_C.cpu()
            tensors["sum_MCd"][client] = found.sum_Cd.cpu()
            tensors["gram_dd"] += found.gram_dd.cpu()
            tensors["scatter_Mdd"][client] = found.scatter().cpu()
        known = tensors["count_MC"].any(1).nonzero()[:, 0]
        if not sent or len(known) < num_groups:
            return
        count_nC, sum_nCd = tensors["count_MC"][known], tensors["sum_MCd"][known]
        together = ClientStatistics(count_nC.sum(0), sum_nCd.sum(0), tensors["gram_dd"])
        sums = ClassSums.whitened(count_nC, sum_nCd, tensors["scatter_Mdd"][known], together.within_covariance())
        group_n = groups_of(sums, num_groups)
        tensors["group_M"][known] = with_old_names(group_n, tensors["group_M"][known], num_groups)
        tensors["input_distance"].fill_(input_distance(sums.of_groups(group_n)))

    @torch.no_grad()
    def _fit_gate(self, step: ServerStep) -> dict[str, float]:
        """Writes the gate as statistics tell it, and lets the reserved set choose its temperature and alpha."""
        server, model = step.server, as_mixture(step.server.model)
        tensors, num_groups = server.tensors, len(server.bank_SP) - 1
        known = tensors["group_M"] != NOBODY
        group_n = tensors["group_M"][known]
        count_KC, sum_KCd = (
            torch.zeros(num_groups, *each.shape[1:], dtype=each.dtype).index_add_(0, group_n, each[known])
            for each in (tensors["count_MC"], tensors["sum_MCd"])
        )
        weights_Nd, bias_N = prototype_scores(count_KC, sum_KCd, tensors["gram_dd"])
        head = head_of(as_whole(model.gate))
        assert model.gate_bias_N is not None
        weights_NH = weights_Nd @ projection(head.in_features, weights_Nd.shape[1]).T.to(weights_Nd)
        head.weight.copy_(weights_NH)
        model.gate_bias_N.copy_(bias_N)
        if head.bias is not None:
            head.bias.zero_()
        if not self.calibrates:
            return {}
        reserved = reserved_of(step)
        with reserved.autocast():
            scores_RKC = torch.cat([model.gate_scores(None, inputs).float() for inputs in reserved.inputs])
        temperature, alpha = calibrated(model, expert_outputs(step).logits_RSC, scores_RKC, reserved.labels_R)
        head.weight.div_(temperature)
        model.gate_bias_N.div_(temperature)
        model.alpha_logit.fill_(math.log(alpha / (1 - alpha)))
        return {"gate_temperature": temperature}

    def _fuse(self, server: Server, uploads: Uploads) -> dict[str, float]:
        """Averages the trunk over all participants, and each group's own part over its own."""
        layout, device = server.layout, server.bank_SP.device
        num_experts = len(server.bank_SP)
        group_m = server.tensors["group_M"][uploads.clients].to(device)
        member_Sm = torch.stack([torch.ones_like(group_m), *(group_m == k for k in range(num_experts - 1))])
        weights_Sm = member_Sm * uploads.num_examples_m
        total_S = weights_Sm.sum(1)
        weights_Sm /= total_S.clamp_min(1)[:, None]
        keep_S = (total_S == 0).to(weights_Sm)
        uploads.fuse_into_(server, weights_Sm, keep_S)
        inputs_differ = server.tensors["input_distance"] > INPUTS_DIFFER
        own = names_of_part(layout, server.worker, ("",) if self.own is None and inputs_differ else self.own)
        experts = [layout.views(row_P) for row_P in server.bank_SP]
        for s, weights_m in enumerate(weights_Sm):
            trunk = {name: view for name, view in experts[s].items() if name not in own} if s else {}
            for name, view in trunk.items():
                view.copy_(experts[0][name])
            if not keep_S[s]:
                server.integers[s] = fuse_integers(uploads.integers, weights_m)
        contribution_SM = server.tensors["contribution_SM"]
        contribution_SM *= keep_S.cpu()[:, None]
        contribution_SM[:, uploads.clients] += weights_Sm.cpu()
        return {f"expert_{k}_clients": float(count) for k, count in enumerate(member_Sm[1:].sum(1).tolist())}

    def _is_new(self, server: Server, client: int) -> bool:
        """Tells whether a client of the federation has not sent its statistics yet."""
        count_MC = server.tensors["count_MC"]
        return client < len(count_MC) and not count_MC[client].any()


@torch.no_grad()
def _shares(step: ServerStep) -> Tensor:
    """
    Returns the share `[R, K]` that each group has of each reserved example, by the gate and by how likely its expert
    finds the label; of mean 1, so that all experts take steps of the same length.
    """
    reserved, outputs = reserved_of(step), expert_outputs(step)
    log_P_RKC = outputs.logits_RSC[:, 1:].log_softmax(-1)
    labels_RK1 = reserved.labels_R[:, None, None].expand(-1, log_P_RKC.shape[1], 1)
    Q_RK = gate_probabilities(as_mixture(step.server.model), outputs, reserved)
    share_RK = (Q_RK.clamp_min(1e-9).log() + log_P_RKC.gather(2, labels_RK1)[..., 0]).softmax(-1)
    return share_RK / share_RK.mean(0).clamp_min(1e-3)
