"""
The server Mixture-of-Experts of Fed-MoE (IJCAI 2025) as a Hugging Face model. Flat: the file travels to the Hub as is.

Shape suffixes: B batch, C classes, K routed experts, L of them chosen, S = main + routed experts, H hidden, T tokens.
"""

import inspect
import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_fedmoe import FedMoEConfig, check_classifier, check_equal_configs, check_equal_states
from .mixture_fedmoe import (
    FedMoEOutput,
    at_least_float32,
    dense_mixture,
    gating_entropy,
    load_imbalance,
    select_experts,
)


def _forward_names(module: nn.Module) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def _classification_head(expert: PreTrainedModel) -> nn.Linear:
    """The linear layer that gives the class scores: the last one with `num_labels` outputs."""
    heads = [m for m in expert.modules() if isinstance(m, nn.Linear) and m.out_features == expert.config.num_labels]
    if not heads:
        raise ValueError(
            f"`gate` is 'main_features', but {type(expert).__name__} has no linear layer with `num_labels` = "
            f"{expert.config.num_labels} outputs to read features from: pass `gate='model'` and a `gate_config`."
        )
    return heads[-1]


def _keep_input(head: nn.Linear, args: tuple[Tensor]) -> None:
    # Stays registered, and keeps no closure: torch.compile does not notice hooks that come and go, and copies of the
    # expert must not write into the original. Keeping only on request lets trained experts be deep-copied.
    if head.keeps_input:
        head.kept_input = args[0]


def _last_token(features_BTH: Tensor, input_ids_BT: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Features of the token that Hugging Face decoders classify: the last that is not padding."""
    if input_ids_BT is None or pad_token_id is None:
        return features_BTH[:, -1]
    positions_T = torch.arange(input_ids_BT.shape[1], device=features_BTH.device)
    last_B = (positions_T * (input_ids_BT != pad_token_id).to(features_BTH.device)).argmax(dim=-1)
    return features_BTH[torch.arange(len(last_B), device=features_BTH.device), last_B]


class FedMoEPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation that all Fed-MoE models share."""

    config_class = FedMoEConfig
    base_model_prefix = ""
    # Half precision would lose the small steps of one scalar.
    _keep_in_fp32_modules_strict = frozenset({"alpha_logit"})
    # The sub-models check for themselves which implementation they have.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Sub-models may swallow `num_items_in_batch` without using it; `Trainer` must then divide the loss itself.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FedMoEPreTrainedModel):
            init.constant_(module.alpha_logit, math.log(self.config.initial_alpha / (1 - self.config.initial_alpha)))


class _FedMoEForClassification(FedMoEPreTrainedModel):
    """Everything about the mixture that does not depend on what the experts read."""

    expert_auto_class = AutoModelForSequenceClassification

    def __init__(self, config: FedMoEConfig) -> None:
        super().__init__(config)
        config.validate()
        if type(config.expert_config) not in self.expert_auto_class._model_mapping:
            raise ValueError(
                f"`expert_config` is a {type(config.expert_config).__name__}, which {self.expert_auto_class.__name__} "
                "does not know: pass the configuration of a classifier for this kind of input."
            )
        make = self.expert_auto_class.from_config
        self.main_experts = nn.ModuleList(make(config.expert_config) for _ in range(config.num_main_experts))
        self.routed_experts = nn.ModuleList(make(config.expert_config) for _ in range(config.num_routed_experts))
        sub_models = [(f"main_experts.{i}", m) for i, m in enumerate(self.main_experts)]
        sub_models += [(f"routed_experts.{k}", m) for k, m in enumerate(self.routed_experts)]
        if config.gate == "model":
            self.gate = make(config.gate_config)
            self._gate_names = _forward_names(self.gate)
            sub_models.append(("gate", self.gate))
        else:
            head = _classification_head(self.main_experts[0])
            head.keeps_input = False
            head.register_forward_pre_hook(_keep_input)
            self.gate = nn.Linear(head.in_features, config.num_routed_experts)
        self._expert_names = _forward_names(self.experts[0])
        self.alpha_logit = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.supports_gradient_checkpointing = all(m.supports_gradient_checkpointing for _, m in sub_models)
        self._gather_from_sub_models(sub_models)
        self.post_init()
        self.all_tied_weights_keys.update(self.get_expanded_tied_weights_keys(all_submodels=True))
        # The method fuses by averaging, which needs one common start: different random starts average to chance.
        for expert in self.experts[1:]:
            expert.load_state_dict(self.experts[0].state_dict())

    def _gather_from_sub_models(self, sub_models: list[tuple[str, PreTrainedModel]]) -> None:
        # `post_init` gathers these from direct children only, and does not look into a ModuleList.
        for name in (
            "_no_split_modules",
            "_skip_keys_device_placement",
            "_keep_in_fp32_modules",
            "_keep_in_fp32_modules_strict",
            "_keys_to_ignore_on_load_unexpected",
            "_keys_to_ignore_on_load_missing",
        ):
            setattr(self, name, set(getattr(self, name) or []).union(*(getattr(m, name) or [] for _, m in sub_models)))
        self._keys_to_ignore_on_save = {f"{p}.{key}" for p, m in sub_models for key in m._keys_to_ignore_on_save or []}

    @property
    def experts(self) -> list[PreTrainedModel]:
        """The S experts, main ones first."""
        return [*self.main_experts, *self.routed_experts]

    @property
    def alpha(self) -> Tensor:
        """Weight of the routed part, a `torch.Tensor` of shape `(1,)` in (0, 1)."""
        return self.alpha_logit.sigmoid()

    @property
    def dtype(self) -> torch.dtype:
        """The experts' type: the first parameter, which transformers would look at, is `alpha_logit` in float32."""
        return self.experts[0].dtype

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the first expert (each expert has its own)."""
        return self.experts[0].get_input_embeddings()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resizes the embeddings of every expert, and of a gate that reads tokens; arguments as in transformers."""
        readers = [*self.experts, self.gate] if self.config.gate == "model" else self.experts
        for module in readers:
            module.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        return self.get_input_embeddings()

    def _run(self, module: PreTrainedModel, names: frozenset[str], batch: dict[str, Any]) -> Tensor:
        """Logits of one sub-model, which is given only the inputs that its `forward` names."""
        inputs = {name: value for name, value in batch.items() if name in names and isinstance(value, Tensor)}
        if "use_cache" in names:
            inputs["use_cache"] = False
        try:
            return module(**inputs, return_dict=True).logits
        except ValueError as error:
            if self.config.pad_token_id is None and "padding token" in str(error):
                raise ValueError(
                    f"`pad_token_id` is None, and {type(module).__name__} needs it to find the last token of each "
                    "example in a batch of more than one: set `model.config.pad_token_id` to the tokenizer's "
                    "`pad_token_id` (or pass it to `from_expert`)."
                ) from error
            raise

    def _batch_size(self, batch: dict[str, Any]) -> int:
        for name in (self.main_input_name, "inputs_embeds"):
            if batch.get(name) is not None:
                return batch[name].shape[0]
        raise ValueError(f"`{self.main_input_name}` is missing from the inputs, got {sorted(batch)}: pass it.")

    def gate_features(self, batch: dict[str, Any]) -> Tensor | None:
        """
        What the gate reads and what does not depend on its weights: worth caching while the experts are frozen.

        Args:
            batch (`dict[str, torch.Tensor]`):
                The model's inputs.

        Returns:
            `torch.Tensor` of shape `(B, H)`: pooled features (the input of the classification head) of the first
            main expert, or `None` with `gate="model"`, which reads the inputs themselves.
        """
        return None if self.config.gate == "model" else self._first_main_outputs(batch)[1]

    def _first_main_outputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        head = _classification_head(self.main_experts[0])
        head.keeps_input = True
        try:
            logits_BC = self._run(self.main_experts[0], self._expert_names, batch)
        finally:
            head.keeps_input = False
        features, head.kept_input = head.kept_input, None
        if features.dim() == 3:
            features = _last_token(features, batch.get("input_ids"), self.config.pad_token_id)
        return logits_BC, features

    def _main_outputs(self, batch: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        if self.config.gate == "model":
            return [self._run(expert, self._expert_names, batch) for expert in self.main_experts], None
        first_BC, features_BH = self._first_main_outputs(batch)
        others = [self._run(expert, self._expert_names, batch) for expert in self.main_experts[1:]]
        return [first_BC, *others], features_BH

    def expert_outputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """
        Runs every expert once on the whole batch.

        Args:
            batch (`dict[str, torch.Tensor]`):
                The model's inputs; names that an expert's `forward` does not have are not passed on.

        Returns:
            The logits, a `torch.Tensor` of shape `(B, S, C)`, main experts first, and the features as in
            [`~FedMoEForSequenceClassification.gate_features`].
        """
        main, features_BH = self._main_outputs(batch)
        routed = [self._run(expert, self._expert_names, batch) for expert in self.routed_experts]
        return self._stack(main + routed), features_BH

    def _stack(self, logits: list[Tensor]) -> Tensor:
        # With a device map the experts may lie on several devices; the mixture is where alpha is.
        return torch.stack([at_least_float32(logits_BC).to(self.alpha_logit.device) for logits_BC in logits], dim=1)

    def gate_logits(self, features_BH: Tensor | None, batch: dict[str, Any]) -> Tensor:
        """
        Runs the gate.

        Args:
            features_BH (`torch.Tensor` of shape `(B, H)`, *optional*):
                Features from [`~FedMoEForSequenceClassification.expert_outputs`]; read with `gate="main_features"`.
            batch (`dict[str, torch.Tensor]`):
                The model's inputs; read with `gate="model"`.

        Returns:
            `torch.Tensor` of shape `(B, K)`: scores of the routed experts, in float32 at least.
        """
        if self.config.gate == "model":
            scores_BK = self._run(self.gate, self._gate_names, batch)
        else:
            scores_BK = self.gate(features_BH)
        return at_least_float32(scores_BK).to(self.alpha_logit.device)

    def _dispatch(self, batch: dict[str, Any], size: int, experts_BL: Tensor) -> Tensor:
        """Logits `(B, L, C)` of the chosen experts, each run once, on its own examples only."""
        selected_BLC = torch.zeros(*experts_BL.shape, self.config.num_labels, device=experts_BL.device)
        for k, expert in enumerate(self.routed_experts):
            rows_N, slots_N = (experts_BL == k).nonzero(as_tuple=True)
            if len(rows_N) == 0:
                continue
            share = {
                name: value.index_select(0, rows_N.to(value.device))
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
                else value
                for name, value in batch.items()
            }
            logits_NC = at_least_float32(self._run(expert, self._expert_names, share)).to(experts_BL.device)
            selected_BLC = selected_BLC.to(logits_NC.dtype).index_put((rows_N, slots_N), logits_NC)
        return selected_BLC

    def _forward(
        self,
        batch: dict[str, Any],
        labels: Tensor | None,
        top_l: int | None,
        dense: bool | None,
        output_expert_logits: bool,
    ) -> FedMoEOutput:
        config = self.config
        size = self._batch_size(batch)
        dense = self.training if dense is None else dense
        top_l = config.top_l if top_l is None else top_l
        if not 1 <= top_l <= config.num_routed_experts:
            raise ValueError(
                f"`top_l` is {top_l}: pass 1 to {config.num_routed_experts}, the number of routed experts."
            )
        n_main, expert_logits_BSC, selected_BL = config.num_main_experts, None, None
        if dense or output_expert_logits:
            expert_logits_BSC, features_BH = self.expert_outputs(batch)
        else:
            main, features_BH = self._main_outputs(batch)
        gate_probs_BK = self.gate_logits(features_BH, batch).softmax(dim=-1)

        if dense:
            mixed_BSC, weights_BL = expert_logits_BSC, gate_probs_BK
        else:
            weights_BL, selected_BL = select_experts(gate_probs_BK, top_l, config.top_l_weighting)
            if output_expert_logits:
                index_BLC = selected_BL[:, :, None].expand(-1, -1, config.num_labels)
                routed_BLC = expert_logits_BSC[:, n_main:].gather(1, index_BLC)
                mixed_BSC = torch.cat([expert_logits_BSC[:, :n_main], routed_BLC], dim=1)
            else:
                routed_BLC = self._dispatch(batch, size, selected_BL)
                mixed_BSC = torch.cat([self._stack(main), routed_BLC], dim=1) if main else routed_BLC
        logits_BC = dense_mixture(mixed_BSC, weights_BL, self.alpha, n_main, config.mix)

        loss = None
        if labels is not None:
            loss = nn.functional.nll_loss(logits_BC, labels.to(logits_BC.device))
            if self.training:
                loss = loss + config.entropy_weight * gating_entropy(gate_probs_BK)
                loss = loss + config.balance_weight * load_imbalance(gate_probs_BK)
        return FedMoEOutput(
            loss=loss,
            logits=logits_BC,
            gate_probs=gate_probs_BK,
            selected_experts=selected_BL,
            expert_logits=expert_logits_BSC if output_expert_logits else None,
        )

    @classmethod
    def from_expert(
        cls,
        expert: str | os.PathLike | PreTrainedModel,
        gate: str | os.PathLike | PreTrainedModel = "main_features",
        num_routed_experts: int = 3,
        num_labels: int | None = None,
        **config_kwargs: Any,
    ) -> "_FedMoEForClassification":
        """
        Builds a mixture whose main and routed experts all start as bit-equal copies of one classifier.

        Args:
            expert (`str`, `os.PathLike` or `PreTrainedModel`):
                Name or path of a checkpoint, or a classifier.
            gate (`str`, `os.PathLike` or `PreTrainedModel`, *optional*, defaults to `"main_features"`):
                `"main_features"`, or name or path of a checkpoint, or a classifier with `num_routed_experts` labels.
            num_routed_experts (`int`, *optional*, defaults to 3):
                Number K of routed experts.
            num_labels (`int`, *optional*):
                Number of classes for an expert given by name. Defaults to the expert's.
            config_kwargs:
                Further fields of [`FedMoEConfig`], e.g. `num_main_experts`, `top_l`, `id2label`, `label2id`.

        Returns:
            The model, in evaluation mode, nothing frozen.

        Raises:
            `ValueError`: If the expert is no classifier, or its labels or vocabulary contradict the other arguments.
        """
        names = {key: config_kwargs[key] for key in ("id2label", "label2id") if config_kwargs.get(key)}
        sizes = {key: len(value) for key, value in names.items()}
        if num_labels is not None:
            sizes["num_labels"] = num_labels
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The arguments disagree on the number of classes, {sizes}: make them equal.")
        if isinstance(expert, (str, os.PathLike)):
            count = {"num_labels": max(sizes.values())} if sizes else {}
            expert = cls.expert_auto_class.from_pretrained(expert, **count)
        main = [expert] * config_kwargs.pop("num_main_experts", 1)
        if num_labels is not None:
            config_kwargs["num_labels"] = num_labels
        return cls.from_experts(main, [expert] * num_routed_experts, gate=gate, **config_kwargs)

    @classmethod
    def from_experts(
        cls,
        main: list[PreTrainedModel],
        routed: list[PreTrainedModel],
        gate: str | os.PathLike | PreTrainedModel = "main_features",
        **config_kwargs: Any,
    ) -> "_FedMoEForClassification":
        """
        Builds a mixture from trained experts, which are copied.

        Args:
            main (`list[PreTrainedModel]`):
                The main experts, 0 to 3 classifiers.
            routed (`list[PreTrainedModel]`):
                The routed experts, at least one classifier; all experts have one architecture.
            gate (`str`, `os.PathLike` or `PreTrainedModel`, *optional*, defaults to `"main_features"`):
                As in [`~FedMoEForSequenceClassification.from_expert`].
            config_kwargs:
                Further fields of [`FedMoEConfig`].

        Returns:
            The model, in evaluation mode, nothing frozen.

        Raises:
            `ValueError`: If the experts are no classifiers or unequal (the message names the first difference).
        """
        places = [f"main[{i}]" for i in range(len(main))] + [f"routed[{k}]" for k in range(len(routed))]
        experts = dict(zip(places, [*main, *routed], strict=True))
        if not routed:
            raise ValueError("`routed` is empty: pass at least one routed expert.")
        for place, expert in experts.items():
            check_classifier(place, expert, cls.expert_auto_class)
            check_equal_configs(places[0], experts[places[0]], place, expert)
        first = experts[places[0]]
        if isinstance(gate, (str, os.PathLike)) and gate != "main_features":
            gate = cls.expert_auto_class.from_pretrained(gate, num_labels=len(routed))
        if gate != "main_features":
            check_classifier("gate", gate, cls.expert_auto_class)
            if gate.config.num_labels != len(routed):
                raise ValueError(
                    f"`gate` has {gate.config.num_labels} labels, but there are {len(routed)} routed experts: load "
                    f"it with `num_labels={len(routed)}`."
                )
            config_kwargs.update(gate="model", gate_config=gate.config)
        config = FedMoEConfig(
            expert_config=first.config, num_routed_experts=len(routed), num_main_experts=len(main), **config_kwargs
        )
        if config.num_labels != first.config.num_labels:
            raise ValueError(
                f"`num_labels` is {config.num_labels}, but the expert's head has {first.config.num_labels} outputs: "
                "load the expert with the number of classes that you want."
            )

        with init.no_init_weights():
            model = cls._from_config(config, dtype=first.dtype)
        for place, target in zip(places, model.experts, strict=True):
            check_equal_states(place, experts[place], target)
            target.load_state_dict(experts[place].state_dict())
        if gate == "main_features":
            model._init_weights(model.gate)
        else:
            check_equal_states("gate", gate, model.gate)
            model.gate.load_state_dict(gate.state_dict())
        model._init_weights(model)
        model.tie_weights()
        return model.to(first.device).eval()


class FedMoEForSequenceClassification(_FedMoEForClassification):
    """
    A mixture of text classifiers: main experts that see every example, routed experts, a gate and the weight alpha.

    Build it with [`~FedMoEForSequenceClassification.from_expert`] or
    [`~FedMoEForSequenceClassification.from_experts`]; save, load and use it as any other classifier.

    Args:
        config ([`FedMoEConfig`]):
            The configuration. Weights are random, equal in all experts.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        top_l: int | None = None,
        dense: bool | None = None,
        output_expert_logits: bool = False,
        **inputs: Any,
    ) -> FedMoEOutput:
        """
        Classifies a batch.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Token ids.
            attention_mask, token_type_ids, position_ids, inputs_embeds (`torch.Tensor`, *optional*):
                As in the experts; each sub-model is given those that its own `forward` names.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.
            top_l (`int`, *optional*, defaults to `config.top_l`):
                Number L of routed experts per example.
            dense (`bool`, *optional*, defaults to `self.training`):
                `True` mixes all experts (Eq. 1), `False` sends each example to L routed experts only (Eq. 10).
            output_expert_logits (`bool`, *optional*, defaults to `False`):
                Whether to run every expert on every example and return their logits.
            inputs:
                Further tensors for sub-models that name them.

        Returns:
            [`FedMoEOutput`]
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **inputs,
        }
        return self._forward(batch, labels, top_l, dense, output_expert_logits)
