"""FedJETs: Dun et al. 2023, "Efficient Just-In-Time Personalization with Federated Mixture of Experts".

Shape suffixes: B batch, C classes, N examples of a client, H features, K experts, E of them at a client, m clients.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from transformers import PreTrainedModel

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import FedMoEPreTrainedModel, dense_mixture
from ..weights import Payload, Slot, StateLayout, fuse_, fuse_integers
from .narrowing import as_mixture
from .setting_kinds import check_setting_kinds


# The sigmoid of this is 1 to the last bit of float32.
ALPHA_LOGIT_OF_ONE = 40.0


def freeze_common_expert(model: FedMoEPreTrainedModel) -> FedMoEPreTrainedModel:
    """
    Makes the main expert of a mixture the common expert of [`FedJETs`], in place: its weights are frozen, and the
    routed experts alone predict (alpha = 1). A mixture that was loaded must be frozen again to be trained on.
    """
    check_mixture(model)
    model.main_experts.requires_grad_(False)
    model.alpha_logit.requires_grad_(False).fill_(ALPHA_LOGIT_OF_ONE)
    return model


def check_mixture(model: PreTrainedModel) -> FedMoEPreTrainedModel:
    """Returns `model`; raises `ValueError` unless it has whole experts, a main one, and a gate on its features."""
    build = "`FedMoEForSequenceClassification.from_expert(model, gate='main_features', num_routed_experts=5)`"
    if not isinstance(model, FedMoEPreTrainedModel):
        raise ValueError(
            f"FedJETs trains a mixture, `model` is a {type(model).__name__}: build one around it with {build} and "
            "`freeze_common_expert`."
        )
    config = model.config
    if config.gate != "main_features" or config.num_main_experts != 1 or config.peft_config is not None:
        raise ValueError(
            "FedJETs needs whole experts and a gate on the features of one main expert, `model` has "
            f"gate={config.gate!r}, num_main_experts={config.num_main_experts} and "
            f"{'a' if config.peft_config else 'no'} `peft_config`: build it with {build}."
        )
    return model


@dataclass
class FedJETs(Strategy):
    """
    K experts behind a gate that reads the features of a frozen common expert; no client has all of them.

    The first K clients are anchors, one of each expert, and take part in every round beside those who were drawn.
    Anchor q trains expert q by its cross-entropy, and the gate by its cross-entropy with q. Any other client takes the
    experts to which the gate gives the largest sum of probabilities on its examples, and trains them and the gate by
    the cross-entropy of their mixture (gate probabilities over the sum of the client's experts'). The server averages
    the gate over all participants, each expert over those who had it, by their examples; one that nobody had stays.

    The model is a mixture whose main expert is the common one, see [`freeze_common_expert`]. Build it around a
    classifier that has learned something, from a checkpoint or from the server's reserved set: the gate sees what the
    common expert sees. That one never travels, and its features are computed once per client and round (of one view of
    each example, where a collator augments). The mixture's `entropy_weight` and `balance_weight` have no part in this.
    With `top_l=1` each example gets its best expert.

    Args:
        experts_per_client (`int`, *optional*, defaults to 2): Experts that a client which is no anchor trains.
    """

    experts_per_client: int = 2
    name = "fedjets"
    trains = "frozen_common_mixture"
    compressible = False
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.experts_per_client < 1:
            raise ValueError(f"`experts_per_client` is {self.experts_per_client}: give at least 1.")

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        mixture = check_mixture(model)
        num_experts = model.config.num_routed_experts
        if self.experts_per_client > num_experts:
            raise ValueError(
                f"`experts_per_client` is {self.experts_per_client}, but the mixture has {num_experts} routed "
                "experts: lower it, or build a mixture of more."
            )
        learns = any(p.requires_grad for p in [*mixture.main_experts.parameters(), mixture.alpha_logit])
        if learns or mixture.alpha != 1:
            raise ValueError(
                "FedJETs needs a frozen main expert and alpha frozen at 1, but in `model` they "
                f"{'are trainable' if learns else 'are frozen'} and alpha is {mixture.alpha.item():.3f}: call "
                "`freeze_common_expert(model)` first, also for a model that was loaded."
            )
        return [model]

    def setup(self, server: Server, num_clients: int) -> None:
        num_experts = server.model.config.num_routed_experts
        if num_clients < num_experts:
            raise ValueError(
                f"There are {num_clients} clients for `num_routed_experts` = {num_experts}, each of which needs an "
                "anchor: take more clients or fewer experts."
            )

    def participants(self, server: Server, drawn: list[int], round_index: int) -> list[int]:
        return sorted({*range(server.model.config.num_routed_experts), *drawn})

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        task.received.weigh(local.layout, tensors_of(local.layout, []))
        features_NH, scores_K = self.consult_gate(local, task)
        is_anchor = task.client < len(scores_K)
        experts = [task.client] if is_anchor else scores_K.topk(self.experts_per_client).indices.tolist()
        names = tensors_of(local.layout, experts)
        task.received.weigh(local.layout, names)
        places = local.own_places(local.plan(task.dataset, task.seed))
        # A GPU is waited for by each list of indices that it is given: this one is for all steps.
        experts_E = torch.tensor(experts, device=local.accelerator.device)

        model = as_mixture(local.worker)

        def loss(worker: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            labels_B = batch.pop("labels")
            gate_logits_BK = model.gate_logits(features_NH[next(places)], batch)
            logits_BEC = torch.stack([model.routed_logits(k, batch) for k in experts], dim=1)
            if is_anchor:
                own_B = torch.full_like(labels_B, task.client)
                return cross_entropy(logits_BEC[:, 0], labels_B) + cross_entropy(gate_logits_BK, own_B)
            weights_BE = gate_logits_BK[:, experts_E].softmax(-1)
            return nll_loss(dense_mixture(logits_BEC, weights_BE, 1.0, 0, model.config.mix), labels_B)

        args = (task.dataset, task.received_P, task.integers, task.out_P, task.seed, task.kept_optimizer)
        payload = local.train(*args, only=names, loss=loss)
        payload.integers = {name: tensor for name, tensor in payload.integers.items() if name in names}
        payload.weigh(local.layout, names)
        payload.metrics |= {f"expert_{k}": 1.0 for k in experts}
        return payload, {}

    @torch.no_grad()
    def consult_gate(self, local: LocalTrainer, task: ClientTask) -> tuple[Tensor, Tensor]:
        """The common expert's features of a client's examples, and the sum over them of each expert's probability."""
        model = as_mixture(local.load(task.received_P, task.integers))
        model.eval()
        features = []
        with local.accelerator.autocast():
            for batch in local.in_order(task.dataset, task.seed):
                del batch["labels"]
                features.append(model.gate_features(batch))
            features_NH = torch.cat([own_BH for own_BH in features if own_BH is not None])
            return features_NH, model.gate_logits(features_NH, {}).softmax(-1).sum(0)

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        """Refuses reports of experts that are neither that a client had one nor that it had not."""
        for k in range(server.model.config.num_routed_experts):
            had = payload.metrics.get(f"expert_{k}", 0.0)
            if had not in (0.0, 1.0):
                return f"it reports expert_{k} = {had}, where 1 is due for an expert that it had and 0 for others"
        return None

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        average_part_(server, uploads, "gate.", uploads.num_examples_m)
        report = {}
        for k in range(server.model.config.num_routed_experts):
            had_m = torch.tensor([metrics.get(f"expert_{k}", 0.0) for metrics in uploads.metrics])
            report[f"expert_{k}_clients"] = had_m.sum().item()
            if had_m.any():
                examples_m = uploads.num_examples_m * had_m.to(uploads.num_examples_m)
                average_part_(server, uploads, f"routed_experts.{k}.", examples_m)
        return report


def tensors_of(layout: StateLayout, experts: list[int]) -> set[str]:
    """Names of the tensors of the gate and of these routed experts: what travels."""
    parts = ("gate.", *(f"routed_experts.{k}." for k in experts))
    return {name for name in (*(slot.name for slot in layout.slots), *layout.integers) if name.startswith(parts)}


def average_part_(server: Server, uploads: Uploads, prefix: str, examples_m: Tensor) -> None:
    """The tensors whose names begin with `prefix` <- their mean over the uploads, weighted by examples."""
    weights_m = examples_m / examples_m.sum()
    slots = [slot for slot in server.layout.slots if slot.name.startswith(prefix)]
    columns = slice(slots[0].start, slots[-1].stop)  # of one module, which stands in one piece

    def moved(slot: Slot) -> Slot:
        return dataclasses.replace(slot, start=slot.start - columns.start)

    batchnorm = tuple(
        (moved(mean), moved(variance)) for mean, variance in server.layout.batchnorm if mean.name.startswith(prefix)
    )
    keep_1 = torch.zeros(1, device=weights_m.device)
    fuse_(server.bank_SP[:1, columns], uploads.rows_mP[:, columns], weights_m[None], keep_1, batchnorm)
    taken = fuse_integers(uploads.integers, weights_m)
    server.integers[0] |= {name: tensor for name, tensor in taken.items() if name.startswith(prefix)}
