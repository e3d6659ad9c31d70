"""
A mixture of owners of text as a causal language model: one frozen base, a LoRA expert for each owner, and a router in
closed form that reads the running mean of the token embeddings. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, T tokens, E experts (the base first), D width of the embeddings + 1, P = D (D + 1) / 2.
"""

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from .adapters_fedmoe import base_arguments, load_base, source_arguments
from .adapters_fedmoe_causal import base_sha256, check_same_base
from .building_fedmoe_causal import FedMoECausalBuilding
from .configuration_checks import built
from .configuration_fedmoe_causal import FedMoECausalConfig
from .lora_fedmoe_causal import ExpertsInUse, OwnersLora, attach_experts, checkpointed_with, find_targets
from .router_fedmoe_causal import UNKNOWN, expert_weights_of, running_means, running_sums


logger = logging.get_logger(__name__)


class FedMoEForCausalLM(FedMoECausalBuilding, GenerationMixin):
    """
    A mixture of owners of text: at each position the layers of the frozen base run with all owners' LoRA experts at
    once, weighted by how much the text so far looks like theirs. The weights are the same in all layers.

    Build it with [`~FedMoEForCausalLM.from_base`] and [`~FedMoEForCausalLM.add_owner`]; save, load and use it as any
    other causal language model.

    Args:
        config ([`FedMoECausalConfig`]):
            The configuration.
        base (`PreTrainedModel`, *optional*):
            The decoder, used as it is. Made from the configuration, with random weights, if left out.
    """

    base_model_prefix = ""
    # Half precision would change whom a text is sent to.
    _keep_in_fp32_modules_strict = {r"^router_ED$"}
    # The base checks for itself which implementation it has.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FedMoECausalConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        config.validate()
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        self.in_use = ExpertsInUse(config.lora_rank, config.lora_alpha / config.lora_rank)
        targets = find_targets(self.base, config.target_modules)
        self.target_names = list(targets)
        num_experts = len(config.expert_names)
        attach_experts(targets, num_experts - 1, self.in_use, self.base.dtype)
        width = self._embedding_weight().shape[1] + 1
        router_ED = torch.zeros(num_experts, width, dtype=torch.float32)
        router_ED[:, -1] = UNKNOWN
        self.register_buffer("router_ED", router_ED)
        sums_EP = torch.zeros(num_experts, width * (width + 1) // 2, dtype=torch.int64)
        self.register_buffer("sums_EP", sums_EP)
        self._freeze_base()
        self.supports_gradient_checkpointing = self.base.supports_gradient_checkpointing
        self._gather_from_base()
        self.post_init()

    def _gather_from_base(self) -> None:
        for name in (
            "_no_split_modules",
            "_skip_keys_device_placement",
            "_keep_in_fp32_modules",
            "_keep_in_fp32_modules_strict",
            "_keys_to_ignore_on_load_unexpected",
            "_keys_to_ignore_on_load_missing",
        ):
            setattr(self, name, {*(getattr(self, name) or []), *(getattr(self.base, name) or [])})
        self._keys_to_ignore_on_save = {f"base.{key}" for key in self.base._keys_to_ignore_on_save or []}
        if self.config.base_model_name_or_path:
            self._keys_to_ignore_on_save = {
                name for name in self.state_dict() if name.startswith("base.") and "owners" not in name.split(".")
            }

    def _freeze_base(self) -> None:
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_("owners" in name.split("."))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the base's token embeddings, whose running mean is routed by."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Returns the base's head."""
        return self.base.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Raises a `ValueError`: experts and statistics belong to the base as it is."""
        raise ValueError("Experts and statistics belong to their base as it is: resize it, then build the mixture.")

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        # Not a closure: copies of the model come with experts in use of their own.
        function = partial(checkpointed_with, self.in_use, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, *args, **kwargs)

    # Routing

    @torch.no_grad()
    def route(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """
        Computes the weight of each expert at each position, from the text up to and including it.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                The whole text, from its first token on.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 at padding, which does not count.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Where these are 0 another text begins.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D - 1)`, *optional*):
                Token embeddings in the place of `input_ids`.

        Returns:
            `torch.Tensor` of shape `(B, T, E)`: the weights, in float32, the base's first.

        Raises:
            `ValueError`: If the router knows no owner, or the mask does not say what is padding.
        """
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        _check_mask(attention_mask, embeds.shape[:2])
        if not self.config.owners:
            return embeds.new_ones(*embeds.shape[:2], 1, dtype=torch.float32)
        # Of several processes that train, only the main one writes names; all have the router.
        if not self.config.router_names and not (self.router_ED[:, -1] > UNKNOWN).any():
            raise ValueError(
                "`router_names` is []: the router has nobody's statistics. Set them with `set_statistics`, or say "
                "which expert to use, `expert=...`."
            )
        with torch.autocast(embeds.device.type, enabled=False):
            router_ED = self.router_ED.float()
            # The score of a mean is the mean of the scores, which are fewer numbers.
            scores_BTE = nn.functional.linear(embeds.float(), router_ED[:, :-1])
            scores_BTE = running_means(scores_BTE, attention_mask, position_ids) + router_ED[:, -1]
            return expert_weights_of(scores_BTE, self.config.router_temperature, self.config.top_l)

    @torch.no_grad()
    def route_by_likelihood(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """
        Computes the weight of each expert at each position by how likely it alone finds the text up to and including
        it: the posterior over experts, of which each is as likely before. It takes a forward for each expert, and no
        statistics; experts without a role in the router count too. As with the router, `top_l` of the configuration
        says how many weights stay.

        `generate(**inputs, expert_weights=model.route_by_likelihood(**inputs)[:, -1:])` lets the prompt choose the
        experts once: each new token then costs what it does with the router.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                The whole text, from its first token on.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 at padding, which does not count.

        Returns:
            `torch.Tensor` of shape `(B, T, E)`: the weights, in float32, the base's first; before `top_l` alike at the
            first token.

        Raises:
            `ValueError`: If the mask does not say what is padding.
        """
        _check_mask(attention_mask, input_ids.shape)
        # A token counts where one is seen before it.
        counted_BS = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None:
            seen_BT = attention_mask.bool()
            counted_BS = seen_BT[:, :-1] & seen_BT[:, 1:]
            if "position_ids" in inspect.signature(self.base.forward).parameters:
                inputs["position_ids"] = (seen_BT.cumsum(1) - 1).clamp_min(0)
        found = []
        for expert in range(len(self.config.expert_names)):
            logits_BSV = self(**inputs, expert=expert, use_cache=False).logits[:, :-1].float()
            # As rows: a GPU with deterministic algorithms has no other cross-entropy.
            told_N = -nn.functional.cross_entropy(
                logits_BSV.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
            )
            told_BS = told_N.view(counted_BS.shape)
            # Padding may be without end unlikely, which times 0 is no number.
            found.append(running_sums(nn.functional.pad(told_BS.where(counted_BS, 0), (1, 0)), 1))
        return expert_weights_of(torch.stack(found, dim=-1), 1.0, self.config.top_l)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        expert: int | str | None = None,
        expert_weights: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Predicts the next token at each position.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Token ids.
            attention_mask, position_ids, inputs_embeds, labels (`torch.Tensor`, *optional*):
                As in the base; labels of -100 do not count.
            expert (`int` or `str`, *optional*):
                One expert to use alone: its index, 0 for the base, or its owner's name, `"base"` for the base. The
                router is not asked. Where one is trained so, `weight_decay` reaches the others too: leave it at 0.
            expert_weights (`torch.Tensor` of shape `(B, T, E)` or `(B, 1, E)`, *optional*):
                Weights in the place of the router's, `(B, 1, E)` for all positions alike. Needed with a cache that
                holds tokens, whose text is not seen here; `generate` does that by itself.
            cache, past_key_values (`Cache`, *optional*):
                As in the base, by the name that it has there.
            kwargs:
                As in the base, e.g. `use_cache`, `logits_to_keep`, `num_items_in_batch`.

        Returns:
            The base's own output.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "labels": labels}
        inputs |= {"cache": cache, "past_key_values": past_key_values}
        # Not every base names all of them.
        inputs = {name: value for name, value in inputs.items() if value is not None} | kwargs
        if expert is not None:
            if expert_weights is not None:
                raise ValueError(f"`expert` is {expert!r} and `expert_weights` are given too: pass one of them.")
            self.in_use.use_one(self.config.expert_index(expert))
        else:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is None:
                raise ValueError("`input_ids` is None: pass the tokens, or `inputs_embeds`.")
            size = given.shape[:2]
            if expert_weights is None:
                _refuse_unseen_text(cache or past_key_values)
                expert_weights = self.route(input_ids, attention_mask, position_ids, inputs_embeds)
            self._check_weights_fit(expert_weights, size)
            # Compiled, the shapes that depend on the weights would be a new graph each time.
            if self.config.top_l is None or torch.compiler.is_compiling():
                self.in_use.use_all(expert_weights, self._expert_dtype())
            else:
                self.in_use.use_chosen(expert_weights.expand(*size, -1), self._expert_dtype())
        try:
            return self.base(**inputs)
        finally:
            # Whoever runs the base by itself runs the base.
            self.in_use.use_none()

    def _expert_dtype(self) -> torch.dtype:
        # A module of any kind, for torch's stub.
        stack: OwnersLora = self.base.get_submodule(f"{self.target_names[0]}.owners")  # type: ignore[assignment]
        return stack.lora_A.dtype

    def _check_weights_fit(self, expert_weights: Tensor, size: torch.Size) -> None:
        E, shape = len(self.router_ED), expert_weights.shape
        if len(shape) != 3 or shape[2] != E or shape[1] not in (1, size[1]) or shape[0] not in (1, size[0]):
            raise ValueError(
                f"`expert_weights` has the shape {tuple(shape)}: pass ({size[0]}, {size[1]}, {E}), or "
                f"({size[0]}, 1, {E}) for all positions alike, the base's weight first."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        expert: int | str | None = None,
        expert_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepares as the base does, with weights at new positions, for which the whole text is looked at again."""
        inputs = self.base.prepare_inputs_for_generation(  # type: ignore[operator]  # which each decoder has
            input_ids, attention_mask=attention_mask, **kwargs
        )
        if expert is None and expert_weights is None:
            new, cached = (
                inputs["input_ids"].shape[1],
                _cached_length(kwargs.get("cache") or kwargs.get("past_key_values")),
            )
            if cached + new != input_ids.shape[1]:
                raise ValueError(
                    f"`input_ids` has {input_ids.shape[1]} tokens, but the cache holds {cached} before the {new} new "
                    "ones: pass the whole text (and no `prefill_chunk_size`), or say which expert to use, "
                    "`expert=...`."
                )
            expert_weights = self.route(input_ids, attention_mask)[:, -new:]
        return inputs | {"expert": expert, "expert_weights": expert_weights}

    # Saving and loading

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves as `PreTrainedModel` does; a base that was given by its name is saved by that name only."""
        if self.config.base_model_name_or_path:
            kwargs["save_original_format"] = False  # would rename some for the way back through the base's class
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: FedMoECausalConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Loads as `PreTrainedModel` does, from safetensors only. Where a checkpoint holds the name of its base, the base
        is loaded by that name, with the arguments that concern it (`dtype`, `device_map`, `quantization_config`, ...),
        and refused if its weights are others than they were.
        """
        source = source_arguments(kwargs)
        given = pretrained_model_name_or_path if config is None else config
        if given is None:
            raise ValueError("`pretrained_model_name_or_path` is None: pass a folder or a name, or a `config`.")
        probed = cls.config_class.from_pretrained(given, **source) if isinstance(given, (str, os.PathLike)) else given
        if not probed.base_model_name_or_path:
            kwargs.setdefault("use_safetensors", True)
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._freeze_base()  # loading makes every parameter anew
            return loaded
        for name in ("output_loading_info", "state_dict"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` does not go with a base that is loaded by its name: leave it out.")
        if pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` is None: pass the folder or name of the experts.")
        file = cached_file(pretrained_model_name_or_path, SAFE_WEIGHTS_NAME, **source)
        assert file is not None  # or it has raised
        if isinstance(given, (str, os.PathLike)):
            probed, kwargs = cls.config_class.from_pretrained(given, return_unused_kwargs=True, **kwargs)
        for_base = base_arguments(kwargs, source)
        model = cls._around_named(probed, for_base)
        tensors, ignored = load_file(file), set(model._keys_to_ignore_on_save or ())
        # In the place of tensors without memory: how many there are says a file that may be anybody's.
        result = model.load_state_dict(tensors, strict=False, assign=True)
        missing = sorted(set(result.missing_keys) - ignored)
        # Weights of a base would take the place of those that were compared.
        unexpected = sorted({*result.unexpected_keys, *(tensors.keys() & ignored)})
        if missing or unexpected:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} and the base "
                f"{probed.base_model_name_or_path!r} do not fit: missing {missing[:3]}, not expected "
                f"{unexpected[:3]}. Take both from one save."
            )
        if cached_file(
            pretrained_model_name_or_path,
            "generation_config.json",
            **source,
            _raise_exceptions_for_missing_entries=False,
        ):
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **source)
        model._freeze_base()
        # Experts may be more exact than their base, unless a type is asked for.
        asked = for_base.get("dtype")
        dtype = getattr(torch, asked) if isinstance(asked, str) and asked != "auto" else asked
        return model._follow_base(dtype if isinstance(dtype, torch.dtype) else None).eval()

    @classmethod
    def _around_named(cls, config: FedMoECausalConfig, for_base: dict[str, Any]) -> Self:
        """A mixture around the base that the configuration names, experts and router without memory."""
        named, asked = config.base_model_name_or_path, for_base.get("dtype")
        assert named is not None
        if for_base.get("quantization_config") is None and asked not in (None, "auto"):
            # In the type that it was saved in, for the hash.
            for_base = {name: value for name, value in for_base.items() if name != "dtype"}
        base = load_base(
            AutoModelForCausalLM, named, built(config.base_config), revision=config.base_revision, **for_base
        )
        if for_base.get("quantization_config") is None:
            check_same_base(named, config.base_sha256, base_sha256(base))
            if asked not in (None, "auto"):
                base = base.to(getattr(torch, asked) if isinstance(asked, str) else asked)
        else:
            logger.warning_once("The weights of a quantised base are not compared with those it had.")
        for module in base.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # their weights are there
        with torch.device("meta"):
            return cls(config, base)


def _check_mask(attention_mask: Tensor | None, size: torch.Size) -> None:
    if attention_mask is not None and attention_mask.shape != size:
        raise ValueError(
            f"`attention_mask` has the shape {tuple(attention_mask.shape)}, but the tokens {tuple(size)}: pass a mask "
            "with 1 for each token and 0 for padding, or `expert_weights`."
        )


def _cached_length(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _refuse_unseen_text(cache: Cache | None) -> None:
    if cached := _cached_length(cache):
        raise ValueError(
            f"`expert_weights` is None, and the cache holds {cached} tokens that the router does not see: pass "
            "`expert_weights=model.route(all_input_ids, attention_mask)[:, -new:]` for the new tokens, or call "
            "`generate`, which does."
        )
