"""
Builds mixtures of owners of text, adds owners and takes them out again. Flat: the file travels to the Hub as it is.

Shape suffixes: E experts (the base first), D width of the embeddings + 1, P = D (D + 1) / 2, r rank, I and O widths of
a layer's input and output.
"""

import copy
import os
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapters_fedmoe import LOADING_ARGUMENTS
from .adapters_fedmoe_causal import base_sha256, check_same_base, read_adapter, write_adapter
from .configuration_checks import check_weights
from .configuration_fedmoe_causal import BASE_NAME, FedMoECausalConfig, check_base_config, owners_as_dicts
from .lora_fedmoe_causal import ExpertsInUse, OwnersLora, TargetLayer, merge_expert, stack_of, target_layer
from .router_fedmoe_causal import UNKNOWN, TextStatistics, packed_bits, ridge_router, unpacked_bits


class FedMoECausalBuilding(PreTrainedModel):
    """The constructors of a mixture of owners of text, and its ways to mixtures of more and of fewer: a part of it."""

    config: FedMoECausalConfig
    config_class: type[FedMoECausalConfig] = FedMoECausalConfig

    base: PreTrainedModel
    in_use: ExpertsInUse
    target_names: list[str]
    router_ED: Tensor
    sums_EP: Tensor

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike | PreTrainedModel,
        owners: Collection[str | dict[str, Any]] = (),
        **config_kwargs: Any,
    ) -> Self:
        """
        Builds a mixture around a decoder, which is frozen, and used, not copied.

        Args:
            base (`str`, `os.PathLike` or `PreTrainedModel`):
                A causal language model. Given by its name or path, it is saved by that name only.
            owners (`Collection[str | dict]`, *optional*):
                Names of owners, or facts about them with a `name`, each of whom has a new expert, which begins as
                the base. Owners with a trained expert come by [`~FedMoEForCausalLM.add_owner`].
            config_kwargs:
                Further fields of [`FedMoECausalConfig`], e.g. `lora_rank`, `router_temperature`, `top_l`; for a base
                that is given by name also what concerns its loading (`dtype`, `revision`, `device_map`, ...).

        Returns:
            The model, in evaluation mode; only experts are trained.

        Raises:
            `ValueError`: If the base is no decoder, or an argument is unknown or out of its range.
        """
        loading = {name: config_kwargs.pop(name) for name in LOADING_ARGUMENTS if name in config_kwargs}
        known = [name for name in FedMoECausalConfig.__annotations__ if not name.startswith(("_", "base_"))]
        for name in config_kwargs:
            if name not in known:
                raise ValueError(f"`{name}` is no argument of a mixture of owners: pass some of {known}.")
        if isinstance(base, (str, os.PathLike)):
            name, base = str(base), AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **loading)
            revision = loading.get("revision") or getattr(base.config, "_commit_hash", None)
            config_kwargs |= {"base_model_name_or_path": name, "base_revision": revision}
        elif loading:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in loading)} would say how to load a base that is given by name, "
                f"but `base` is a {type(base).__name__}: load it so, or convert it with `.to(dtype)`."
            )
        if not isinstance(base, PreTrainedModel) or not base.can_generate():
            raise ValueError(
                f"`base` is a {type(base).__name__}: pass the name of a causal language model, or one that "
                "`AutoModelForCausalLM` has loaded, without an adapter in it."
            )
        if any(isinstance(module, OwnersLora) for module in base.modules()):
            raise ValueError("`base` is in a mixture already: call its `add_owner`, or load the base once more.")
        check_base_config(base.config)
        check_weights("base", base)
        config = FedMoECausalConfig(
            base_config=base.config, owners=owners_as_dicts(owners), base_sha256=base_sha256(base), **config_kwargs
        )
        return cls._around(config, base)

    @classmethod
    def _around(cls, config: FedMoECausalConfig, base: PreTrainedModel) -> Self:
        for module in base.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # its weights are there
        model = cls(config, base)
        model.generation_config = copy.deepcopy(base.generation_config)
        return model._follow_base(base.dtype).eval()

    def _follow_base(self, dtype: torch.dtype | None = None) -> Self:
        """Brings experts and router to the devices of the layers that they belong to, and the experts to a type."""
        for layer in self.expert_layers().values():
            stack_of(layer).to(layer.weight.device, dtype)
        device = self._embedding_weight().device
        self.router_ED, self.sums_EP = self.router_ED.to(device), self.sums_EP.to(device)
        return self

    def _embedding_weight(self) -> Tensor:
        weight = self.base.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    # Owners come and go

    def add_owner(
        self,
        adapter: "str | os.PathLike | Mapping[str, Tensor] | Any",
        statistics: TextStatistics | str | os.PathLike | None = None,
        *,
        name: str,
        **facts: Any,
    ) -> Self:
        """
        Returns a mixture of one owner more. This one stays as it is; both share the weights of the base.

        Args:
            adapter (`str`, `os.PathLike`, `PeftModel` or `Mapping[str, torch.Tensor]`):
                The owner's LoRA adapter of the base: a folder or Hub name (safetensors only), a model of PEFT, or
                tensors under PEFT's names.
            statistics ([`TextStatistics`], `str` or `os.PathLike`, *optional*):
                Of the owner's text, or a file of them. Without it the router gives the expert no weight.
            name (`str`):
                Of the owner.
            facts:
                What else the configuration says of the owner, e.g. `licence`, `tokens`.

        Raises:
            `ValueError`: If the name is taken, or adapter or statistics belong to another base.
        """
        targets = self.expert_layers()
        matrices = read_adapter(adapter, targets, self.config)
        config = copy.deepcopy(self.config)
        config.owners = owners_as_dicts([*(config.owners or ()), {"name": name, **facts}])
        model = self._sharing_base(config)
        for layer, module in model.expert_layers().items():
            stack, (A_rI, B_Or) = stack_of(module), matrices[layer]
            stack.lora_A = nn.Parameter(torch.cat([stack.lora_A.detach(), A_rI.to(stack.lora_A)]))
            stack.lora_B = nn.Parameter(torch.cat([stack.lora_B.detach(), B_Or.T.to(stack.lora_B)]))
        model.sums_EP = torch.cat([self.sums_EP, torch.zeros_like(self.sums_EP[:1])])
        if statistics is None:
            model._solve_router()
        else:
            model.set_statistics(name, statistics)
        return model

    def without(self, *names: str) -> Self:
        """
        Returns a mixture without these owners, equal to one that never had them: their experts are left out, their
        sums are left out of the total, and the router is found again. This one stays as it is; both share the weights
        of the base.

        Args:
            names (`str`): Of the owners.

        Raises:
            `ValueError`: If there is no such owner.
        """
        gone = {self._owner_index(name) for name in names}
        return self._of([k for k in range(1, len(self.config.expert_names)) if k not in gone])

    def only(self, names: Collection[str]) -> Self:
        """
        Returns a mixture of these owners alone, in their order here, as [`~FedMoEForCausalLM.without`] the others.

        Args:
            names (`Collection[str]`): Of the owners. The base is in every mixture.

        Raises:
            `ValueError`: If there is no such owner.
        """
        if isinstance(names, str):
            raise ValueError(f"`names` is {names!r}: pass a list of names.")
        return self._of(sorted({self._owner_index(name) for name in names}))

    def merge(self, owner: str) -> PreTrainedModel:
        """
        Returns a copy of the base, an ordinary model of its own class, with one owner's expert merged into it.

        Args:
            owner (`str`): Name of the owner, or `"base"` for the base as it is.

        Raises:
            `ValueError`: If there is no such owner, or the base is quantised.
        """
        expert = self.config.expert_index(owner)
        for name, layer in self.expert_layers().items():
            if not layer.weight.is_floating_point():
                raise ValueError(f"`base.{name}` is quantised, in {layer.weight.dtype}: load the base without that.")
        base = copy.deepcopy(self.base)
        for name in self.target_names:
            merge_expert(target_layer(base, name), expert)
        return base.requires_grad_(True)

    def save_adapter(self, owner: str, folder: str | os.PathLike) -> None:
        """
        Writes one owner's expert as an adapter of PEFT, which `PeftModel.from_pretrained(base, folder)` loads.

        Args:
            owner (`str`): Name of the owner.
            folder (`str` or `os.PathLike`): Made if needed.
        """
        own, targets = self.in_use.rows_of(self._owner_index(owner)), self.expert_layers()
        matrices = {}
        for name, layer in targets.items():
            matrices[name] = stack_of(layer).lora_A[own], stack_of(layer).lora_B[own].T
        write_adapter(folder, matrices, targets, self.config)

    # Statistics and router

    def set_statistics(self, name: str, statistics: TextStatistics | str | os.PathLike) -> None:
        """
        Sets the sums of an owner's text, or of public text for `"base"`, and finds the router again.

        Args:
            name (`str`):
                Name of the owner, or `"base"`: without statistics of text that is nobody's the base has no weight.
            statistics ([`TextStatistics`], `str` or `os.PathLike`):
                From [`text_statistics`] with this base's embeddings, or a file of them.

        Raises:
            `ValueError`: If there is no such owner, or the statistics belong to another base.
        """
        expert = self.config.expert_index(name)
        if not isinstance(statistics, TextStatistics):
            statistics = TextStatistics.load(statistics)
        width = self.router_ED.shape[1]
        if len(statistics.gram_DD) != width:
            raise ValueError(
                f"`statistics` are of embeddings {len(statistics.gram_DD) - 1} wide, but the base's are {width - 1} "
                "wide: take them with `model.get_input_embeddings()`."
            )
        check_same_base("statistics", statistics.base_sha256, self.config.base_sha256)
        if fault := statistics.fault(self.get_input_embeddings()):
            raise ValueError(f"`statistics` of {name!r} are none of a text: {fault}. Have them taken again.")
        self.sums_EP[expert] = packed_bits(statistics.gram_DD).to(self.sums_EP.device)
        names = {*(self.config.router_names or ()), name}
        self.config.router_names = [each for each in self.config.expert_names if each in names]
        self._solve_router()

    def statistics_of(self, name: str) -> TextStatistics | None:
        """
        Returns the sums of an owner's text, `None` if there are none.

        Args:
            name (`str`): Name of the owner, or `"base"`.
        """
        expert = self.config.expert_index(name)
        if name not in (self.config.router_names or ()):
            return None
        return TextStatistics(unpacked_bits(self.sums_EP[expert].cpu()), self.config.base_sha256)

    def _solve_router(self) -> None:
        """Finds the router from the sums, which are added in the order of the experts."""
        known = self.config.router_names or ()
        places = [place for place, name in enumerate(self.config.expert_names) if name in known]
        router_ED = torch.zeros(len(self.sums_EP), self.router_ED.shape[1])
        router_ED[:, -1] = UNKNOWN  # the score of an expert that the router does not know
        if places:
            sums = [TextStatistics(unpacked_bits(self.sums_EP[place].cpu())) for place in places]
            router_ED[places] = ridge_router(sums, self.config.ridge).float()
            if places[0] == 0:
                router_ED[0, -1] += self.config.public_bias
        self.router_ED = router_ED.to(self.sums_EP.device)

    # Copies over one base

    def expert_layers(self) -> dict[str, TargetLayer]:
        """The layers of the base that experts change, by name; each has a stack of the experts as `owners`."""
        return {name: target_layer(self.base, name) for name in self.target_names}

    def _owner_index(self, name: str) -> int:
        if name == BASE_NAME:
            raise ValueError(f"`{BASE_NAME}` is the base, which is nobody's: pass the name of an owner.")
        return self.config.expert_index(name)

    def _of(self, kept: list[int]) -> Self:
        """A mixture of the experts `kept`."""
        config = copy.deepcopy(self.config)
        owners = config.owners or []
        config.owners = [owners[k - 1] for k in kept]
        config.router_names = [name for name in config.router_names or () if name in config.expert_names]
        model = self._sharing_base(config)
        rank = config.lora_rank
        rows = [row for k in kept for row in range((k - 1) * rank, k * rank)]
        for layer in model.expert_layers().values():
            stack = stack_of(layer)
            stack.lora_A, stack.lora_B = (nn.Parameter(each.detach()[rows]) for each in (stack.lora_A, stack.lora_B))
        model.sums_EP = self.sums_EP[[0, *kept]]
        model._solve_router()
        return model

    def _sharing_base(self, config: FedMoECausalConfig) -> Self:
        """A copy with a configuration of its own, whose tensors are views of the same memory."""
        memo: dict[int, Any] = {id(self.config): config}
        for tensor in [*self.parameters(), *self.buffers()]:
            # A parameter of its own: what moves one model to a device would move the other's weights, not its buffers.
            plain = type(tensor) is nn.Parameter
            memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad) if plain else tensor
        return copy.deepcopy(self, memo)
