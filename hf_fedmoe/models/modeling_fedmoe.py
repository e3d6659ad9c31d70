"""
The server Mixture-of-Experts of Fed-MoE (IJCAI 2025) as a Hugging Face model. Flat: the file travels to the Hub as is.

Shape suffixes: B batch, C classes, K routed experts, L of them chosen, S = main + routed experts, H hidden, T tokens,
N scores of the gate.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .adapters_fedmoe import AdapterExpert, activate, adapter_submodule, ids_of_adapters, with_adapters
from .building_fedmoe import FedMoEBuilding
from .classification_head import classification_head, last_token
from .configuration_fedmoe import FedMoEConfig
from .mixture_fedmoe import (
    FedMoEOutput,
    at_least_float32,
    dense_mixture,
    gating_entropy,
    load_imbalance,
    log_prior,
    select_experts,
)
from .precision_fedmoe import cast_inputs_of, to_float32_


# Patterns of the tensors beside the base, which stay float32 when a base of half precision is loaded with them.
TRAINED_WITH_ADAPTERS = frozenset({"lora_", "ia3_", "modules_to_save", r"^gate\."})


def _forward_names(module: nn.Module) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def _features_head(expert: PreTrainedModel, gate: str) -> str:
    """Name of the head whose input the gate reads."""
    name = classification_head(expert)
    if name is None:
        raise ValueError(
            f"`gate` is {gate!r}, but {type(expert).__name__} has no linear layer with `num_labels` = "
            f"{expert.config.num_labels} outputs to read features from: pass `gate='model'` and a `gate_config`."
        )
    return name


def _keep_inputs_of(head: nn.Module) -> None:
    # Torch's stub knows of attributes that are tensors and modules alone.
    head.keeps_input = False  # type: ignore[assignment]
    head.register_forward_pre_hook(_keep_input)


def _keep_input(head: nn.Module, args: tuple[Tensor]) -> None:
    # Stays registered, and keeps no closure: torch.compile does not notice hooks that come and go, and copies of the
    # expert must not write into the original. Keeping only on request lets trained experts be deep-copied.
    if head.keeps_input:
        head.kept_input = args[0]


def _rows(batch: dict[str, Any], size: int, rows_N: Tensor) -> dict[str, Any]:
    """The examples `rows_N` of a batch of `size`; what is not given by example stays as it is."""
    return {
        name: value.index_select(0, rows_N.to(value.device))
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        else value
        for name, value in batch.items()
    }


class FedMoEPreTrainedModel(FedMoEBuilding):
    """Everything about the mixture that does not depend on what the experts read."""

    base_model_prefix = ""
    # Half precision would lose the small steps of one scalar.
    _keep_in_fp32_modules_strict = {"alpha_logit"}
    # The sub-models check for themselves which implementation they have.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Sub-models may swallow `num_items_in_batch` without using it; `Trainer` must then divide the loss itself.
    accepts_loss_kwargs = False

    def __init__(self, config: FedMoEConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        config.validate()
        if type(config.expert_config) not in self.expert_auto_class._model_mapping:
            raise ValueError(
                f"`expert_config` is a {type(config.expert_config).__name__}, which {self.expert_auto_class.__name__} "
                "does not know: pass the configuration of a classifier for this kind of input."
            )
        make = self.expert_auto_class.from_config
        if config.peft_config is None:
            main: list[PreTrainedModel] = [make(config.expert_config) for _ in range(config.num_main_experts)]
            routed: list[PreTrainedModel] = [make(config.expert_config) for _ in range(config.num_routed_experts)]
            self.main_experts, self.routed_experts = nn.ModuleList(main), nn.ModuleList(routed)
            sub_models = [(f"main_experts.{i}", m) for i, m in enumerate(main)]
            sub_models += [(f"routed_experts.{k}", m) for k, m in enumerate(routed)]
        else:
            base = make(config.expert_config) if base is None else base
            sub_models = [("base", base)]
        self._expert_names = _forward_names(sub_models[0][1])
        if config.gate == "model":
            gate: PreTrainedModel = make(config.gate_config)
            self.gate, self._gate_names = gate, _forward_names(gate)
            sub_models.append(("gate", gate))
        else:
            self._head_name = _features_head(sub_models[0][1], config.gate)
            head = sub_models[0][1].get_submodule(self._head_name)
            assert isinstance(head, nn.Linear)
            # Without a bias where the head has none: merged, the gate's adapter is a classifier of the same kind.
            bias = config.gate != "adapter" or head.bias is not None
            num_scores = config.num_routed_experts * config.gate_prototypes
            self.gate = nn.Linear(head.in_features, num_scores, bias=bias)
        # Prototypes need a bias each, and heads of decoders have none.
        num_biases = config.num_routed_experts * config.gate_prototypes if config.gate_prototypes > 1 else 0
        self.gate_bias_N = nn.Parameter(torch.empty(num_biases, dtype=torch.float32)) if num_biases else None
        if config.peft_config is not None:
            self.base = with_adapters(sub_models[0][1], config.peft_config, self.adapter_names)
            # What is trained is float32, whatever the base is stored in.
            to_float32_([*self.gate.parameters(), *self.gate.buffers()])
            cast_inputs_of(self.gate)
        if config.gate != "model":
            _keep_inputs_of(self._features_head())
        self.alpha_logit = nn.Parameter(torch.empty(1, dtype=torch.float32))
        # Adapters share a base: by the time that a checkpointed layer runs again, another one may be active.
        self.supports_gradient_checkpointing = config.peft_config is None and all(
            m.supports_gradient_checkpointing for _, m in sub_models
        )
        self._gather_from_sub_models(sub_models)
        self.post_init()
        if config.peft_config is None:
            self.all_tied_weights_keys.update(self.get_expanded_tied_weights_keys(all_submodels=True))
            # The method fuses by averaging, which needs one common start: random starts average to chance.
            for expert in self.experts[1:]:
                expert.load_state_dict(self.experts[0].state_dict())
        elif config.peft_config.get("base_model_name_or_path"):
            own = ids_of_adapters(self.base, self.adapter_names)
            state = self.base.state_dict(keep_vars=True)
            self._keys_to_ignore_on_save = {f"base.{key}" for key, tensor in state.items() if id(tensor) not in own}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FedMoEPreTrainedModel):
            init.constant_(module.alpha_logit, math.log(self.config.initial_alpha / (1 - self.config.initial_alpha)))
            if module.gate_bias_N is not None:
                init.zeros_(module.gate_bias_N)

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
        if self.config.peft_config is not None:
            self._keep_in_fp32_modules_strict |= TRAINED_WITH_ADAPTERS
        self._keys_to_ignore_on_save = {f"{p}.{key}" for p, m in sub_models for key in m._keys_to_ignore_on_save or []}

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that training the gate changes, without alpha."""
        own = [*self.gate.parameters(), *([] if self.gate_bias_N is None else [self.gate_bias_N])]
        if self.config.gate == "adapter":
            unused = set(adapter_submodule(self.base, self._head_name, "gate").parameters())
            own += [p for p in AdapterExpert(self.base, "gate").parameters() if p not in unused]
        return own

    @property
    def alpha(self) -> Tensor:
        """Weight of the routed part, a `torch.Tensor` of shape `(1,)` in (0, 1)."""
        return self.alpha_logit.sigmoid()

    @property
    def dtype(self) -> torch.dtype:
        """The experts' type: the first parameter, which transformers would look at, is `alpha_logit` in float32."""
        return self._first_sub_model().dtype

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the first expert (each expert has its own), or of the base of all."""
        return self._first_sub_model().get_input_embeddings()

    def _first_sub_model(self) -> PreTrainedModel:
        first = self.base.get_base_model() if self.config.peft_config is not None else self.experts[0]
        assert isinstance(first, PreTrainedModel)
        return first

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the embeddings of every expert, and of a gate that reads tokens; arguments as in transformers."""
        if self.config.peft_config is not None:
            raise ValueError("Adapters belong to their base as it is: resize its embeddings, then build the mixture.")
        readers: list[PreTrainedModel] = [*self.main_experts, *self.routed_experts]
        if isinstance(self.gate, PreTrainedModel):
            readers.append(self.gate)
        for module in readers:
            module.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        resized = self.get_input_embeddings()
        assert isinstance(resized, nn.Embedding)
        return resized

    def _run_expert(self, index: int, batch: dict[str, Any]) -> Tensor:
        """Logits of one of the S experts."""
        if self.config.peft_config is not None:
            return self._run_adapter(self.adapter_names[index], batch)
        n_main = len(self.main_experts)
        expert = self.main_experts[index] if index < n_main else self.routed_experts[index - n_main]
        return self._run(expert, self._expert_names, batch)

    def _run_adapter(self, name: str, batch: dict[str, Any]) -> Tensor:
        activate(self.base, name)
        return self._run(self.base.get_base_model(), self._expert_names, batch)

    def _run(self, module: nn.Module, names: frozenset[str], batch: dict[str, Any], **adapters: list[str]) -> Tensor:
        """Logits of one sub-model, which is given only the inputs that its `forward` names."""
        inputs: dict[str, Any] = {
            name: value for name, value in batch.items() if name in names and isinstance(value, Tensor)
        }
        if "use_cache" in names:
            inputs["use_cache"] = False
        try:
            return module(**inputs, **adapters, return_dict=True).logits
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
                size, *rest = batch[name].shape
                if 0 in rest:
                    raise ValueError(f"`{name}` has the shape {(size, *rest)}, nothing to read: leave empty text out.")
                return size
        raise ValueError(f"`{self.main_input_name}` is missing from the inputs, got {sorted(batch)}: pass it.")

    def gate_features(self, batch: dict[str, Any]) -> Tensor | None:
        """
        Returns what the gate reads if that does not depend on its weights: worth caching while the experts are frozen.

        Args:
            batch (`dict[str, torch.Tensor]`):
                The model's inputs.

        Returns:
            `torch.Tensor` of shape `(B, H)`: pooled features (the input of the classification head) of the first
            main expert, or `None` with `gate="model"`, which reads the inputs themselves.
        """
        return self._main_features(batch)[1] if self.config.gate == "main_features" else None

    def _features_head(self) -> nn.Module:
        """The head whose input the gate reads."""
        if self.config.peft_config is None:
            return self.main_experts[0].get_submodule(self._head_name)
        name = "gate" if self.config.gate == "adapter" else "main_0"
        return adapter_submodule(self.base, self._head_name, name)

    def _with_features(self, run: Callable[[], Tensor], batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The result of `run` and the features that the head read meanwhile."""
        head = self._features_head()
        head.keeps_input = True  # type: ignore[assignment]  # as above
        try:
            logits_BC = run()
        finally:
            head.keeps_input = False  # type: ignore[assignment]
        features, head.kept_input = head.kept_input, None  # type: ignore[assignment]
        assert isinstance(features, Tensor)
        if features.dim() == 3:
            features = last_token(features, batch.get("input_ids"), self.config.pad_token_id)
        return logits_BC, features

    def _main_features(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._with_features(lambda: self._run_expert(0, batch), batch)

    def _main_outputs(self, batch: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        mains = range(self.config.num_main_experts)
        if self.config.gate != "main_features":
            return [self._run_expert(index, batch) for index in mains], None
        first_BC, features_BH = self._main_features(batch)
        return [first_BC, *(self._run_expert(index, batch) for index in mains[1:])], features_BH

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
        n_main = self.config.num_main_experts
        routed = [self._run_expert(n_main + k, batch) for k in range(self.config.num_routed_experts)]
        return self._stack(main + routed), features_BH

    def routed_logits(self, k: int, batch: dict[str, Any]) -> Tensor:
        """Logits `(B, C)` of the routed expert `k` alone, in float32 at least; for methods that train some of them."""
        return at_least_float32(self._run_expert(self.config.num_main_experts + k, batch))

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
                The model's inputs; read with `gate="model"` and `gate="adapter"`.

        Returns:
            `torch.Tensor` of shape `(B, K)`: scores of the routed experts, in float32 at least.
        """
        return self.gate_scores(features_BH, batch).logsumexp(-1)

    def gate_scores(self, features_BH: Tensor | None, batch: dict[str, Any]) -> Tensor:
        """Runs the gate as [`~FedMoEForSequenceClassification.gate_logits`]; its `gate_prototypes` scores apart."""
        if self.config.gate == "model":
            scores_BN = self._run(self.gate, self._gate_names, batch)
        else:
            if self.config.gate == "adapter":
                _, features_BH = self._with_features(lambda: self._run_adapter("gate", batch), batch)
            scores_BN = self.gate(features_BH)
        scores_BN = at_least_float32(scores_BN).to(self.alpha_logit.device)
        if self.gate_bias_N is not None:
            scores_BN = scores_BN + self.gate_bias_N
        return scores_BN.unflatten(1, (self.config.num_routed_experts, -1))

    def _dispatch(self, batch: dict[str, Any], size: int, experts_BL: Tensor) -> Tensor:
        """Logits `(B, L, C)` of the chosen experts, each run once, on its own examples only."""
        # PEFT mixes LoRA adapters in one batch, outside of training.
        if (
            self.config.peft_config is not None
            and self.config.peft_config["peft_type"] == "LORA"
            and not self.training
        ):
            return self._dispatch_at_once(batch, size, experts_BL)
        K, L = self.config.num_routed_experts, experts_BL.shape[1]
        # On a GPU the host waits once, for how many rows each expert has.
        counts_K = (experts_BL.reshape(-1, 1) == torch.arange(K, device=experts_BL.device)).sum(0).tolist()
        order_N = experts_BL.flatten().argsort(stable=True)
        logits = [
            self._run_expert(self.config.num_main_experts + k, _rows(batch, size, pairs_N // L))
            for k, pairs_N in enumerate(order_N.split(counts_K))
            if len(pairs_N)
        ]
        logits_NC = torch.cat([at_least_float32(own).to(experts_BL.device) for own in logits])
        restored_NC = torch.empty_like(logits_NC).index_copy(0, order_N, logits_NC)
        return restored_NC.view(*experts_BL.shape, -1)

    def _dispatch_at_once(self, batch: dict[str, Any], size: int, experts_BL: Tensor) -> Tensor:
        """Dispatches in one forward of the base over all pairs of an example and an expert, sorted by expert."""
        order_N = experts_BL.flatten().argsort()
        names = [f"routed_{k}" for k in experts_BL.flatten()[order_N].tolist()]
        share = _rows(batch, size, order_N // experts_BL.shape[1])
        logits_NC = at_least_float32(self._run(self.base, self._expert_names, share, adapter_names=names))
        restored_NC = torch.empty_like(logits_NC).index_copy(0, order_N.to(logits_NC.device), logits_NC)
        return restored_NC.view(*experts_BL.shape, -1).to(experts_BL.device)

    def _forward(
        self,
        batch: dict[str, Any],
        labels: Tensor | None,
        top_l: int | None,
        dense: bool | None,
        output_expert_logits: bool,
        client_prior: Tensor | None,
    ) -> FedMoEOutput:
        config = self.config
        size = self._batch_size(batch)
        dense = self.training if dense is None else dense
        top_l = config.top_l if top_l is None else top_l
        if not isinstance(top_l, int) or not 1 <= top_l <= config.num_routed_experts:
            raise ValueError(
                f"`top_l` is {top_l}: pass 1 to {config.num_routed_experts}, the number of routed experts."
            )
        n_main, selected_BL = config.num_main_experts, None
        expert_logits_BSC: Tensor | None = None
        if dense or output_expert_logits:
            expert_logits_BSC, features_BH = self.expert_outputs(batch)
        else:
            main, features_BH = self._main_outputs(batch)
        gate_logits_BK = self.gate_logits(features_BH, batch)
        if client_prior is not None:
            gate_logits_BK = gate_logits_BK + log_prior(client_prior, gate_logits_BK)
        gate_probs_BK = gate_logits_BK.softmax(dim=-1)

        if dense:
            assert expert_logits_BSC is not None
            mixed_BSC, weights_BL = expert_logits_BSC, gate_probs_BK
        else:
            weights_BL, selected_BL = select_experts(gate_probs_BK, top_l, config.top_l_weighting)
            if expert_logits_BSC is not None:
                index_BLC = selected_BL[:, :, None].expand(-1, -1, expert_logits_BSC.shape[-1])
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


class FedMoEForSequenceClassification(FedMoEPreTrainedModel):
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
        client_prior: Tensor | None = None,
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
            client_prior (`torch.Tensor` of shape `(K,)` or `(B, K)`, *optional*):
                How likely each routed expert is to suit who asks, see [`~models.client_prior`].
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
        return self._forward(batch, labels, top_l, dense, output_expert_logits, client_prior)
