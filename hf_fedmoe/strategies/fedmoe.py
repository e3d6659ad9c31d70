"""Fed-MoE: "Heterogeneous Federated Learning with Scalable Server Mixture-of-Experts", IJCAI 2025.

Shape suffixes: S experts (main ones first), K routed experts, m participants, M clients, R reserved examples,
T inner iterations, P elements of a model's row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import ReservedSet
from ..federation import Server, ServerStep, Strategy, Uploads, warmed_up
from ..models import FedMoEPreTrainedModel, gating_entropy
from ..weights import collapse, fuse_integers, fuse_models_, mix_rows
from .gate_training import fit_gate
from .narrowing import as_mixture, reserved_of
from .relevance import CORRELATIONS, above_floor, capped, client_mixture, correlate
from .server_training import expert_outputs, fine_tune, fine_tune_experts, gate_probabilities, probe
from .setting_kinds import check_setting_kinds


SYNCHRONISATIONS = ("download_main", "download_mixture", "after_round", "none")

# The settings that are left to the preset when they are `None`. "paper" is the letter of the paper with the
# coefficients of its command line; "default" has our choices (docs/fedmoe_defaults.md says why).
PRESETS: dict[str, dict[str, float | int | str | bool]] = {
    "default": {
        "correlation": "relevance",
        "main_fusion_rate": 1.0,
        "fusion_rate": 0.3,
        "fusion_warmup": True,
        "synchronisation": "download_main",
        "gate_epochs": 10,
        "balance_weight": 0.1,
        "download_epochs": 0,
        "expert_epochs": 0,
        "final_expert_epochs": 5,
    },
    "paper": {
        "correlation": "sum",
        "main_fusion_rate": 0.1,
        "fusion_rate": 0.1,
        "fusion_warmup": False,
        "synchronisation": "after_round",
        "gate_epochs": 1,
        "balance_weight": 0.0,
        "download_epochs": 0,
        "expert_epochs": 0,
        "final_expert_epochs": 0,
    },
}


def _setting(default: float | int | str | bool | None, help: str) -> Any:  # as `field` says of itself
    return field(default=default, metadata={"help": help})


@dataclass
class FedMoESettings:
    """
    The settings of [`FedMoE`]; those that are `None` are filled in from `preset`.

    Args:
        preset (`str`, *optional*, defaults to `"default"`): `"default"` or `"paper"`.
        correlation (`str`, *optional*): Reduction of Q^T P_y over the reserved set, see [`~strategies.correlate`].
        correlation_temperature (`float`, *optional*, defaults to 1.0): Divides W before its softmaxes.
        main_fusion_rate (`float`, *optional*): lambda of Eq. 6 for main experts; 1 replaces them by the mean.
        fusion_rate (`float`, *optional*): lambda of Eq. 6 for routed experts, and of Eq. 13 for clients.
        fusion_warmup (`bool`, *optional*): Whether moving averages start as running means.
        synchronisation (`str`, *optional*): How clients get the server's knowledge (Stage C): `"after_round"` (Eq. 13,
            participants keep the mixture until they are drawn again, others keep the initial model),
            `"download_mixture"` (a chosen client starts from today's experts mixed by its last W^c, the main expert if
            it has none), `"download_main"` (always from the main expert) or `"none"` (clients go on from what they
            trained themselves: the paper's ablation).
        server_iterations (`int`, *optional*, defaults to 1): T.
        gate_epochs (`int`, *optional*): Passes over the reserved set per iteration, gate and alpha only.
        gate_learning_rate (`float`, *optional*, defaults to 1e-3): Of AdamW on the gate and alpha.
        gate_batch_size (`int`, *optional*, defaults to 32): Reserved examples per gate step.
        entropy_weight (`float`, *optional*, defaults to 1e-3): beta of Eq. 7.
        balance_weight (`float`, *optional*): Weight of KL(mean gate || uniform), which keeps all experts in use.
        download_epochs (`int`, *optional*): Passes over the reserved set, every round, of a copy of the main expert
            from which the next participants start. The experts get what it learns through the clients only, so that
            they are not too sure of the reserved set to teach a gate.
        expert_epochs (`int`, *optional*): Passes over the reserved set per iteration in which the experts themselves
            are fine-tuned, routed ones more on the examples that the gate sends them.
        final_expert_epochs (`int`, *optional*): Passes over the reserved set in which every expert is fine-tuned once,
            after the last round. The gate stays as it is: experts that have seen the reserved set are too sure of it
            to teach a gate.
        expert_learning_rate (`float`, *optional*, defaults to 1e-4): Of AdamW on the experts.
        reserved_floor (`float`, *optional*): A client gets no weight in a round from which its model comes back worse:
            with less than so many times the mean probability of the true classes of the reserved set that the model
            had which it was sent; 1 for no less. Every client has weight if left out.
        max_expert_share (`float`, *optional*): The most of the uploads in an expert that one client's may be, above 0;
            what is above it goes to the others. All of it if left out.
    """

    preset: str = _setting("default", "Where settings left out come from: default or paper.")
    correlation: str | None = _setting(None, f"Reduction of the correlation: {', '.join(CORRELATIONS)}.")
    correlation_temperature: float = _setting(1.0, "Divides the correlation before its softmaxes.")
    main_fusion_rate: float | None = _setting(None, "lambda of Eq. 6 for main experts.")
    fusion_rate: float | None = _setting(None, "lambda of Eq. 6 for routed experts and of Eq. 13.")
    fusion_warmup: bool | None = _setting(None, "Whether moving averages start as running means.")
    synchronisation: str | None = _setting(None, f"Stage C: {', '.join(SYNCHRONISATIONS)}.")
    server_iterations: int = _setting(1, "T, inner iterations of Stage B.")
    gate_epochs: int | None = _setting(None, "Passes of the gate over the reserved set per iteration.")
    gate_learning_rate: float = _setting(1e-3, "Learning rate of the gate and alpha.")
    gate_batch_size: int = _setting(32, "Reserved examples per gate step.")
    entropy_weight: float = _setting(1e-3, "beta, weight of the gating entropy.")
    balance_weight: float | None = _setting(None, "Weight of the load-balancing term.")
    download_epochs: int | None = _setting(None, "Passes of the clients' start over the reserved set, every round.")
    expert_epochs: int | None = _setting(None, "Passes of the experts over the reserved set per iteration.")
    final_expert_epochs: int | None = _setting(None, "The same once, after the last round.")
    expert_learning_rate: float = _setting(1e-4, "Learning rate of the experts on the reserved set.")
    reserved_floor: float | None = _setting(None, "Quality below which an upload has no weight, 1 for what was sent.")
    max_expert_share: float | None = _setting(None, "The most of the uploads in an expert that one client's may be.")

    def resolve_preset(self) -> None:
        """Fills in what is `None` and checks every setting; called by those who inherit from this class."""
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` is {self.preset!r}: choose one of {', '.join(map(repr, PRESETS))}.")
        for name, value in PRESETS[self.preset].items():
            if vars(self)[name] is None:
                setattr(self, name, value)
        check_setting_kinds(self)
        for name, choices in (("correlation", CORRELATIONS), ("synchronisation", SYNCHRONISATIONS)):
            if vars(self)[name] not in choices:
                raise ValueError(f"`{name}` is {vars(self)[name]!r}: choose one of {', '.join(map(repr, choices))}.")
        for name in ("fusion_rate", "main_fusion_rate"):
            if not 0 < vars(self)[name] <= 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: a moving average needs 0 < rate <= 1.")
        for name in ("server_iterations", "gate_batch_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give at least 1.")
        not_negative = ("gate_epochs", "download_epochs", "expert_epochs", "final_expert_epochs")
        for name in (*not_negative, "entropy_weight", "balance_weight"):
            if vars(self)[name] < 0:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give 0 or more.")
        for name in ("gate_learning_rate", "expert_learning_rate", "correlation_temperature"):
            if vars(self)[name] <= 0:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give more than 0.")
        if self.reserved_floor is not None and not 0 < self.reserved_floor < float("inf"):
            raise ValueError(f"`reserved_floor` is {self.reserved_floor}: give more than 0, or leave it out.")
        if self.reserved_floor is not None and self.synchronisation in ("after_round", "none"):
            raise ValueError(
                f"`reserved_floor` is {self.reserved_floor}, but with `synchronisation` = {self.synchronisation!r} "
                'the server does not know what clients start from: take "download_main", or leave it out.'
            )
        if self.max_expert_share is not None and not 0 < self.max_expert_share <= 1:
            raise ValueError(f"`max_expert_share` is {self.max_expert_share}: give a share above 0, up to 1.")
        if self.download_epochs and self.synchronisation != "download_main":
            raise ValueError(
                f"`download_epochs` is {self.download_epochs}, but with `synchronisation` = {self.synchronisation!r} "
                'clients do not start from the main expert: take "download_main", or 0 epochs.'
            )


class FedMoE(Strategy):
    """
    Fed-MoE: clients' models fused by relevance into a main expert, routed experts and a gate.

    Args:
        settings ([`FedMoESettings`], *optional*): Its coefficients.
    """

    name = "fedmoe"
    trains = "mixture"
    compressible = True

    def __init__(self, settings: FedMoESettings | None = None):
        self.settings = settings or FedMoESettings()
        self.settings.resolve_preset()

    @property
    def needs(self) -> str:  # type: ignore[override]  # a promise that depends on settings, which nobody sets
        return "fusion" if self.settings.synchronisation in ("download_main", "download_mixture") else "rows"

    def needs_reserved_set(self) -> bool:
        return True

    def server_models(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        if not isinstance(model, FedMoEPreTrainedModel):
            raise ValueError(
                f"Fed-MoE trains a mixture, `model` is a {type(model).__name__}: build one around it with "
                "`FedMoEForSequenceClassification.from_expert(model, gate='main_features', num_routed_experts=3)`."
            )
        return model.experts

    def setup(self, server: Server, num_clients: int) -> None:
        # How much of each expert came from each client; what is missing to one is the common start.
        nothing_SM = torch.zeros(len(server.bank_SP), num_clients, device=server.bank_SP.device)
        server.tensors["contribution_SM"] = nothing_SM
        if self.settings.synchronisation == "download_mixture":
            # W^c of each client's last round; a column of zeros means that it never took part.
            server.tensors["mixture_SM"] = nothing_SM.clone()
        if self.settings.synchronisation in ("after_round", "none"):
            server.tensors["initial_P"] = self._main(server).clone()

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        if self.settings.synchronisation in ("after_round", "none"):
            return server.tensors["initial_P"] if kept_P is None else kept_P
        if self.settings.synchronisation == "download_mixture":
            mixture_S = server.tensors["mixture_SM"][:, client].to(server.bank_SP)
            if mixture_S.any():
                return mix_rows(server.bank_SP, mixture_S[None], server.layout)[0]
        return server.tensors.get("start_P", self._main(server))

    def probe(self, server: Server, row_P: Tensor, reserved: ReservedSet | None) -> Tensor:
        """P_y of one client, which Eq. 4 correlates with the gate."""
        assert reserved is not None
        return probe(server.worker, server.layout, row_P, reserved)

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        """Stage B, and the part of Stage C that the server needs (Eq. 11-12)."""
        settings, model, reserved = self.settings, as_mixture(server.model), reserved_of(step)
        # The preset has filled these in.
        assert settings.gate_epochs is not None and settings.balance_weight is not None
        if "outputs" not in server.cache:
            server.cache["outputs"] = expert_outputs(step)
        P_y_mR = torch.stack(uploads.probed)
        report: dict[str, float] = {}
        good_m = self._above_floor(server, uploads, P_y_mR, reserved)
        if settings.reserved_floor is not None:
            report["clients_below_floor"] = float((~good_m).sum().item())
        steps_TSm: list[Tensor] = []
        # T fusions of the same uploads are one fusion of what was before: LoRA experts are cut to their rank once.
        before_SP = server.bank_SP.clone() if server.layout.lora and not settings.expert_epochs else None
        for iteration in range(settings.server_iterations):
            Q_RK = gate_probabilities(model, server.cache["outputs"], reserved)
            W_Km = self._correlate(Q_RK, P_y_mR)
            if good_m.any():
                steps_TSm.append(self._weights(server, uploads, W_Km, good_m, step.round_index))
                if before_SP is None:
                    report |= self._fuse(server, uploads, steps_TSm[-1:], step.round_index)
                else:
                    server.bank_SP.copy_(before_SP)
                    report |= self._fuse(server, uploads, steps_TSm, step.round_index)
            if settings.expert_epochs:
                report |= self._fine_tune(step, Q_RK, settings.expert_epochs, step.seed + iteration)
            server.cache["outputs"] = expert_outputs(step)
            report |= fit_gate(
                step,
                server.cache["outputs"],
                settings.gate_epochs,
                settings.gate_learning_rate,
                server.weight_decay,
                settings.gate_batch_size,
                settings.entropy_weight,
                settings.balance_weight,
                step.seed + iteration,
            )
        if settings.download_epochs:
            report |= self._fine_tune_start(server, step)
        Q_RK = gate_probabilities(model, server.cache["outputs"], reserved)
        W_Km = self._correlate(Q_RK, P_y_mR)
        server.cache["mixture_Sm"] = client_mixture(W_Km, model.alpha.detach(), model.config.num_main_experts)
        if "mixture_SM" in server.tensors:
            server.tensors["mixture_SM"][:, uploads.clients] = server.cache["mixture_Sm"]
        share_K = torch.bincount(Q_RK.argmax(1), minlength=Q_RK.shape[1]) / len(Q_RK)
        return report | {
            "alpha": model.alpha.item(),
            "gate_entropy": gating_entropy(Q_RK).item(),
            **{f"expert_{k}_share": share for k, share in enumerate(share_K.tolist())},
        }

    def finish(self, server: Server, step: ServerStep) -> None:
        if self.settings.final_expert_epochs:
            Q_RK = gate_probabilities(as_mixture(server.model), expert_outputs(step), reserved_of(step))
            self._fine_tune(step, Q_RK, self.settings.final_expert_epochs, step.seed)

    def synchronise(self, server: Server, uploads: Uploads) -> dict[int, Tensor]:
        """M_j <- lambda M_j + (1 - lambda) sum_s W^c_sj E_s for the participants (Eq. 13)."""
        if self.settings.synchronisation == "none":
            return dict(zip(uploads.clients, uploads.rows_mP, strict=True))
        if self.settings.synchronisation != "after_round":
            return {}
        rate = self._fusion_rate
        rows_mP = uploads.rows_mP.clone()
        keep_m = torch.full((len(rows_mP),), rate, device=rows_mP.device)
        fuse_models_(rows_mP, server.bank_SP, (1 - rate) * server.cache["mixture_Sm"].T, keep_m, server.layout)
        return dict(zip(uploads.clients, rows_mP, strict=True))

    @property
    def _fusion_rate(self) -> float:
        assert self.settings.fusion_rate is not None  # the preset has filled it in
        return self.settings.fusion_rate

    def _correlate(self, Q_RK: Tensor, P_y_mR: Tensor) -> Tensor:
        """W `[K, m]`, as the settings say."""
        assert self.settings.correlation is not None  # the preset has filled it in
        return correlate(Q_RK, P_y_mR, self.settings.correlation, self.settings.correlation_temperature)

    def _main(self, server: Server) -> Tensor:
        """The first main expert, or the mean of the routed ones in a mixture without."""
        if server.model.config.num_main_experts:
            return server.bank_SP[0]
        num_routed = len(server.bank_SP)
        return mix_rows(server.bank_SP, server.bank_SP.new_full((1, num_routed), 1 / num_routed), server.layout)[0]

    def _rate(self, server: Server, round_index: int) -> Tensor:
        """lambda of each expert `[S]`."""
        num_main = server.model.config.num_main_experts
        assert self.settings.main_fusion_rate is not None  # the preset has filled it in
        rates = [self.settings.main_fusion_rate] * num_main
        rates += [self._fusion_rate] * (len(server.bank_SP) - num_main)
        if self.settings.fusion_warmup:
            rates = [warmed_up(rate, round_index) for rate in rates]
        return torch.tensor(rates, device=server.bank_SP.device)

    def _above_floor(self, server: Server, uploads: Uploads, P_y_mR: Tensor, reserved: ReservedSet) -> Tensor:
        """Tells who has weight `[m]`, before anything of the server has changed in this round."""
        if self.settings.reserved_floor is None:
            return torch.ones(len(uploads.clients), dtype=torch.bool)
        of_one = self.settings.synchronisation == "download_main"  # all were sent the same
        sent = [self.download(server, client, None) for client in uploads.clients[: 1 if of_one else None]]
        sent_mR = torch.stack([self.probe(server, row_P, reserved).to(P_y_mR) for row_P in sent])
        return above_floor(P_y_mR, sent_mR, self.settings.reserved_floor)

    def _weights(self, server: Server, uploads: Uploads, W_Km: Tensor, good_m: Tensor, round_index: int) -> Tensor:
        """Weighs each upload for each expert `[S, m]`: lambda / m in E_0, lambda W^r_k in E_k (Eq. 6)."""
        rate_S, good_m = self._rate(server, round_index), good_m.to(W_Km.device)
        mean_m = good_m.to(uploads.weights_m) / good_m.sum()
        W_r_Km = W_Km.masked_fill(~good_m, -torch.inf).softmax(1)
        share_Sm = torch.cat([mean_m.expand(server.model.config.num_main_experts, -1), W_r_Km])
        if self.settings.max_expert_share is not None:
            share_Sm = capped(share_Sm, self.settings.max_expert_share)
        weights_Sm = rate_S[:, None] * share_Sm
        contribution_SM = server.tensors["contribution_SM"]
        contribution_SM *= 1 - rate_S[:, None]
        contribution_SM[:, uploads.clients] += weights_Sm
        return weights_Sm

    def _fuse(self, server: Server, uploads: Uploads, steps_TSm: list[Tensor], round_index: int) -> dict[str, float]:
        """E_s <- (1 - lambda_s) E_s + sum_j weights_sj M_j (Eq. 6), for each of the steps in turn."""
        weights_Sm, keep_S = collapse(torch.stack(steps_TSm), 1 - self._rate(server, round_index))
        lost_S = uploads.fuse_into_(server, weights_Sm, keep_S)
        server.integers[:] = [fuse_integers(uploads.integers, weights_m) for weights_m in steps_TSm[-1]]
        if not server.layout.lora:
            return {}
        num_main = server.model.config.num_main_experts
        names = [f"main_{s}" for s in range(num_main)] + [f"expert_{k}" for k in range(len(lost_S) - num_main)]
        return {f"{name}_discarded_energy": lost for name, lost in zip(names, lost_S.tolist(), strict=True)}

    def _fine_tune_start(self, server: Server, step: ServerStep) -> dict[str, float]:
        """A copy of the main expert, trained on the reserved set, for the next round's participants."""
        settings = self.settings
        assert settings.download_epochs is not None
        server.layout.write(self._main(server), server.worker)
        loss = fine_tune(
            server.worker,
            reserved_of(step),
            settings.download_epochs,
            settings.expert_learning_rate,
            server.weight_decay,
            settings.gate_batch_size,
            step.seed,
            track=step.track,
            what="Fine-tuning the clients' start",
            captured=step.captured,
        )
        server.tensors["start_P"] = server.layout.read(server.worker)
        return {"start_loss": loss}

    def _fine_tune(self, step: ServerStep, Q_RK: Tensor, epochs: int, seed: int) -> dict[str, float]:
        """Every expert by itself; in a routed one the examples that the gate sends it weigh more (one on average)."""
        weights: list[Tensor | None] = [None] * step.server.model.config.num_main_experts
        for own_R in Q_RK.T:
            # Half of its attention is for all examples: on its own ones alone, few as they are, it gets worse.
            weights.append(0.5 + 0.5 * own_R / own_R.mean().clamp_min(1e-6))
        rate, batch_size = self.settings.expert_learning_rate, self.settings.gate_batch_size
        losses = fine_tune_experts(step, weights, epochs, rate, batch_size, seed)
        return {"expert_loss": sum(losses) / len(losses)}
