"""
Builds a mixture from whole classifiers, from adapters of one base, or from a checkpoint. Flat: the file travels to the
Hub as it is.
"""

import copy
import difflib
import json
import os
import re
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_peft_available

from .adapters_fedmoe import (
    LOADING_ARGUMENTS,
    AdapterExpert,
    base_arguments,
    load_adapter,
    load_base,
    merged_expert,
    peft_config_dict,
    read_adapter_configs,
    source_arguments,
    train_adapters_only,
)
from .configuration_checks import MAX_MODULES, AutoClassifier, built, check_integer
from .configuration_fedmoe import FedMoEConfig, check_classifier, check_equal_configs, check_equal_states


if is_peft_available():
    from peft import PeftModel

# Gates that are no models of their own, and the copy of an expert.
GATES = ("main_features", "adapter", "prototypes")
# What a mixture keeps besides its size when its adapters are merged.
KEPT_WHEN_MERGED = (
    "id2label",
    "label2id",
    "pad_token_id",
    "gate_prototypes",
    "top_l",
    "top_l_weighting",
    "mix",
    "initial_alpha",
    "entropy_weight",
    "balance_weight",
)


# Arguments of a mixture besides the fields of its own configuration.
_FURTHER_ARGUMENTS = ("id2label", "label2id", "num_labels", "problem_type")


class FedMoEBuilding(PreTrainedModel):
    """The constructors of mixtures, and their ways to and from PEFT's adapters: a part of every Fed-MoE model."""

    config: FedMoEConfig
    config_class: type[FedMoEConfig] = FedMoEConfig
    expert_auto_class: AutoClassifier = AutoModelForSequenceClassification

    # Without adapters.
    main_experts: nn.ModuleList
    routed_experts: nn.ModuleList
    gate: PreTrainedModel | nn.Linear
    alpha_logit: nn.Parameter
    _head_name: str

    @property
    def _adapted(self) -> "PeftModel":
        """The base with its adapters."""
        assert isinstance(self.base, PeftModel)
        return self.base

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters of the S experts, main ones first, and of the gate if it is one."""
        main = [f"main_{i}" for i in range(self.config.num_main_experts)]
        routed = [f"routed_{k}" for k in range(self.config.num_routed_experts)]
        return [*main, *routed, *(["gate"] if self.config.gate == "adapter" else [])]

    @property
    def experts(self) -> list[PreTrainedModel] | list[AdapterExpert]:
        """The S experts, main ones first."""
        if self.config.peft_config is None:
            return [*self.main_experts, *self.routed_experts]
        return self._adapter_experts()

    def _adapter_experts(self) -> list[AdapterExpert]:
        count = self.config.num_main_experts + self.config.num_routed_experts
        return [AdapterExpert(self._adapted, name) for name in self.adapter_names[:count]]

    @classmethod
    def from_expert(
        cls,
        expert: str | os.PathLike | PreTrainedModel,
        gate: str | os.PathLike | PreTrainedModel = "main_features",
        num_routed_experts: int = 3,
        num_labels: int | None = None,
        **config_kwargs: Any,
    ) -> Self:
        """
        Builds a mixture whose main and routed experts all start as bit-equal copies of one classifier.

        Args:
            expert (`str`, `os.PathLike` or `PreTrainedModel`):
                Name or path of a checkpoint, or a classifier.
            gate (`str`, `os.PathLike` or `PreTrainedModel`, *optional*, defaults to `"main_features"`):
                `"main_features"`, `"prototypes"` (a copy of the expert with `gate_prototypes` scores for each routed
                one, as many as there are classes), or name or path of a checkpoint, or a classifier with
                `num_routed_experts` labels; with a `peft_config` also `"adapter"`.
            num_routed_experts (`int`, *optional*, defaults to 3):
                Number K of routed experts.
            num_labels (`int`, *optional*):
                Number of classes for an expert given by name. Defaults to the expert's.
            config_kwargs:
                Further fields of [`FedMoEConfig`], e.g. `num_main_experts`, `top_l`, `id2label`, `label2id`. With a
                `peft_config` the experts are adapters of `expert`, which is then frozen and used, not copied; given
                by name, it is saved by that name only. Such an expert is loaded with what concerns loading (`dtype`,
                `device_map`, `quantization_config`, `revision`, ...).

        Returns:
            The model, in evaluation mode, nothing frozen but a base of adapters.

        Raises:
            `ValueError`:
                If the expert is no classifier, its labels or vocabulary contradict the other arguments, or an argument
                is unknown.
        """
        check_integer("num_routed_experts", num_routed_experts, high=MAX_MODULES)
        loading = {name: config_kwargs.pop(name) for name in LOADING_ARGUMENTS if name in config_kwargs}
        names = {key: config_kwargs[key] for key in ("id2label", "label2id") if config_kwargs.get(key)}
        sizes = {key: len(value) for key, value in names.items()}
        if num_labels is not None:
            sizes["num_labels"] = num_labels
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The arguments disagree on the number of classes, {sizes}: make them equal.")
        peft_config = config_kwargs.pop("peft_config", None)
        if peft_config is not None:
            peft_config = peft_config_dict(peft_config)
        if isinstance(expert, (str, os.PathLike)):
            # Where the checkpoint has another number of classes the head is drawn anew, as where it has none.
            count = {"num_labels": max(sizes.values()), "ignore_mismatched_sizes": True} if sizes else {}
            whole: PreTrainedModel = cls.expert_auto_class.from_pretrained(expert, **count, **loading)
            if peft_config is not None and not peft_config.get("base_model_name_or_path"):
                revision = peft_config.get("revision") or loading.get("revision")
                revision = revision or getattr(whole.config, "_commit_hash", None)
                peft_config |= {"base_model_name_or_path": str(expert), "revision": revision}
        elif loading:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in loading)} would say how to load an expert that is given by name, "
                f"but `expert` is a {type(expert).__name__}: load it so, or convert it with `.to(dtype)`."
            )
        else:
            whole = expert
        if peft_config is not None:
            if num_labels is not None:
                config_kwargs["num_labels"] = num_labels
            return cls._from_base(whole, gate, num_routed_experts, peft_config=peft_config, **config_kwargs)
        main = [whole] * config_kwargs.pop("num_main_experts", 1)
        if num_labels is not None:
            config_kwargs["num_labels"] = num_labels
        return cls.from_experts(main, [whole] * num_routed_experts, gate=gate, **config_kwargs)

    @classmethod
    def from_experts(
        cls,
        main: list[PreTrainedModel],
        routed: list[PreTrainedModel],
        gate: str | os.PathLike | PreTrainedModel = "main_features",
        **config_kwargs: Any,
    ) -> Self:
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
        if config_kwargs.get("peft_config") is not None:
            raise ValueError(
                "`peft_config` cannot turn whole models into adapters: pass their common base to `from_expert`, or "
                "trained adapters to `from_adapters`."
            )
        places = [f"main[{i}]" for i in range(len(main))] + [f"routed[{k}]" for k in range(len(routed))]
        experts = dict(zip(places, [*main, *routed], strict=True))
        if not routed:
            raise ValueError("`routed` is empty: pass at least one routed expert.")
        for place, expert in experts.items():
            check_classifier(place, expert, cls.expert_auto_class)
            check_equal_configs(places[0], experts[places[0]], place, expert)
        first = experts[places[0]]
        start, config = cls._gate_and_config(gate, first, len(routed), num_main_experts=len(main), **config_kwargs)
        with init.no_init_weights():
            model = cls._from_config(config, dtype=first.dtype)
        for place, target in zip(places, model.experts, strict=True):
            check_equal_states(place, experts[place], target)
            target.load_state_dict(experts[place].state_dict())
        model._start_gate(start)
        model.tie_weights()
        return model.to(first.device).eval()

    @classmethod
    def _gate_and_config(
        cls, gate: str | os.PathLike | PreTrainedModel, expert: PreTrainedModel, num_routed_experts: int, **fields: Any
    ) -> tuple[str | PreTrainedModel, FedMoEConfig]:
        """The gate, loaded if it was a name, and the configuration of a mixture of such experts."""
        found: str | PreTrainedModel
        if gate == "prototypes":
            fields.setdefault("gate_prototypes", expert.config.num_labels)
        check_integer("gate_prototypes", fields.get("gate_prototypes", 1))
        num_scores = num_routed_experts * fields.get("gate_prototypes", 1)
        if isinstance(gate, str) and gate in ("main_features", "adapter"):
            found = gate
        elif gate == "prototypes":
            found = cls._copy_with_head(expert, num_scores)
        elif isinstance(gate, (str, os.PathLike)):
            near = difflib.get_close_matches(str(gate), GATES, n=1, cutoff=0.85)
            if near and not os.path.isdir(gate):
                raise ValueError(f"`gate` is {gate!r}: is it {near[0]!r}? A model of the Hub has another name.")
            found = cls.expert_auto_class.from_pretrained(gate, num_labels=num_scores)
        else:
            found = gate
        if isinstance(found, str):
            fields["gate"] = found
        else:
            check_classifier("gate", found, cls.expert_auto_class)
            if found.config.num_labels != num_scores:
                prototypes = fields.get("gate_prototypes", 1)
                each = f" with {prototypes} prototypes each" if prototypes > 1 else ""
                raise ValueError(
                    f"`gate` has {found.config.num_labels} labels, but there are {num_routed_experts} routed experts"
                    f"{each}: load it with `num_labels={num_scores}`."
                )
            fields.update(gate="model", gate_config=found.config)
        check_arguments(fields)
        config = FedMoEConfig(expert_config=expert.config, num_routed_experts=num_routed_experts, **fields)
        if config.num_labels != expert.config.num_labels:
            raise ValueError(
                f"`num_labels` is {config.num_labels}, but the expert's head has {expert.config.num_labels} outputs: "
                "load the expert with the number of classes that you want."
            )
        return found, config

    @classmethod
    def _copy_with_head(cls, expert: PreTrainedModel, num_labels: int) -> PreTrainedModel:
        """Copies a classifier but for its head, which gets so many outputs."""
        config = copy.deepcopy(expert.config)
        config.num_labels = num_labels
        found = cls.expert_auto_class.from_config(config, dtype=expert.dtype)
        shapes = {name: tensor.shape for name, tensor in found.state_dict().items()}
        fitting = {name: tensor for name, tensor in expert.state_dict().items() if tensor.shape == shapes[name]}
        found.load_state_dict(fitting, strict=False)
        return found.to(expert.device)

    def _start_gate(self, gate: str | PreTrainedModel) -> None:
        if isinstance(gate, str):
            self._init_weights(self.gate)
        else:
            assert isinstance(self.gate, PreTrainedModel)
            dtype = self.gate.dtype  # it keeps its own: one loaded by its name may be of any
            self.gate.to(gate.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method
            check_equal_states("gate", gate, self.gate)
            self.gate.to(dtype)  # type: ignore[arg-type]  # as above
            self.gate.load_state_dict(gate.state_dict())
        self._init_weights(self)

    # Experts that are adapters

    @classmethod
    def _from_base(
        cls,
        base: PreTrainedModel,
        gate: str | os.PathLike | PreTrainedModel,
        num_routed_experts: int,
        **config_kwargs: Any,
    ) -> Self:
        """A mixture of new adapters of `base`, all with one start."""
        check_classifier("expert", base, cls.expert_auto_class)
        start, config = cls._gate_and_config(gate, base, num_routed_experts, **config_kwargs)
        model = cls._around(config, base)
        model._start_gate(start)
        return model

    @classmethod
    def _around(cls, config: FedMoEConfig, base: PreTrainedModel) -> Self:
        for module in base.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # its weights are there
        model = cls(config, base)
        nn.Module.to(model.gate, base.device)
        model.alpha_logit.data = model.alpha_logit.data.to(base.device)
        return model.eval()

    @classmethod
    def from_adapters(
        cls,
        main: list[str | os.PathLike],
        routed: list[str | os.PathLike],
        base: str | os.PathLike | PreTrainedModel | None = None,
        gate: str | os.PathLike | PreTrainedModel = "main_features",
        **config_kwargs: Any,
    ) -> Self:
        """
        Builds a mixture from PEFT adapters of one base that were trained apart.

        Args:
            main (`list[str]`):
                Folders or Hub names of the main experts' adapters.
            routed (`list[str]`):
                Those of the routed experts, at least one.
            base (`str`, `os.PathLike` or `PreTrainedModel`, *optional*):
                The base. Defaults to the one that the adapters name.
            gate (`str`, `os.PathLike` or `PreTrainedModel`, *optional*, defaults to `"main_features"`):
                As in [`~FedMoEForSequenceClassification.from_expert`], or `"adapter"`.
            config_kwargs:
                Further fields of [`FedMoEConfig`]; `num_labels` (or `id2label`) where the base has other classes.

        Returns:
            The model, in evaluation mode.

        Raises:
            `ValueError`: If the adapters differ in base, rank or target modules, or do not fit the base.
        """
        sources = [*main, *routed]
        if not routed:
            raise ValueError("`routed` is empty: pass at least one routed expert.")
        peft_config = read_adapter_configs(sources) | {"inference_mode": False}
        base = peft_config.get("base_model_name_or_path") if base is None else base
        if base is None:
            raise ValueError("`base` is None, and the adapters name none: pass the model that they were trained on.")
        peft_config["base_model_name_or_path"] = None if isinstance(base, PreTrainedModel) else str(base)
        model = cls.from_expert(
            base, gate, len(routed), peft_config=peft_config, num_main_experts=len(main), **config_kwargs
        )
        for source, expert in zip(sources, model._adapter_experts(), strict=True):
            load_adapter(expert, source)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves as `PreTrainedModel` does; adapters whose base is saved by its name keep their names of tensors."""
        if (self.config.peft_config or {}).get("base_model_name_or_path"):
            kwargs["save_original_format"] = False  # would rename some for the way back through the base's class
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_adapters(self, save_directory: str | os.PathLike) -> None:
        """
        Writes every expert as a plain PEFT adapter, into `main_0`, `routed_0`, ... of a folder. Each loads with
        `PeftModel.from_pretrained(base, folder, subfolder="routed_0")`.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, made if needed.
        """
        if self.config.peft_config is None:
            raise ValueError("`peft_config` is None: the experts are whole models, save them with `save_pretrained`.")
        from .modeling_adapted import save_base_configs  # which needs PEFT, and mixtures of whole models do not

        names = [expert.name for expert in self._adapter_experts()]
        self._adapted.save_pretrained(str(save_directory), selected_adapters=names)
        if self.config.peft_config.get("base_model_name_or_path"):
            save_base_configs(self._adapted, save_directory, names, built(self.config.expert_config))

    def merge_adapters(self) -> Self:
        """
        Returns the mixture with whole experts: each adapter merged into a base of its own, rounded to the base's type.
        For machines without PEFT; as large as S bases.
        """
        if self.config.peft_config is None:
            raise ValueError("`peft_config` is None: the experts are whole models already.")
        n_main = self.config.num_main_experts
        merged = [merged_expert(self._adapted, expert.name) for expert in self._adapter_experts()]
        gate: str | PreTrainedModel = "main_features"
        if self.config.gate == "model":
            assert isinstance(self.gate, PreTrainedModel)
            gate = copy.deepcopy(self.gate)
            gate.to(self.dtype)  # type: ignore[arg-type]  # as above
        elif self.config.gate == "adapter":
            gate = merged_expert(self._adapted, "gate")
            head = copy.deepcopy(self.gate)
            assert isinstance(head, nn.Linear)
            gate.set_submodule(self._head_name, head.to(self.dtype))
            gate.config.num_labels = self.config.num_routed_experts * self.config.gate_prototypes
        fields = {name: vars(self.config)[name] for name in KEPT_WHEN_MERGED}
        model = type(self).from_experts(merged[:n_main], merged[n_main:], gate=gate, **fields)
        if gate == "main_features":
            model.gate.load_state_dict(self.gate.state_dict())
        model.alpha_logit.data.copy_(self.alpha_logit.data)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: FedMoEConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Loads as `PreTrainedModel` does. Where a checkpoint holds adapters and the name of their base, the base is
        loaded by that name, with the arguments that concern it (`dtype`, `device_map`, `quantization_config`, ...).
        """
        source = source_arguments(kwargs)
        given = pretrained_model_name_or_path if config is None else config
        if given is None:
            raise ValueError("`pretrained_model_name_or_path` is None: pass a folder or a name, or a `config`.")
        probed = cls.config_class.from_pretrained(given, **source) if isinstance(given, (str, os.PathLike)) else given
        check_number_of_experts(probed, pretrained_model_name_or_path, source)
        if not (probed.peft_config or {}).get("base_model_name_or_path"):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if model.config.peft_config is not None:
                train_adapters_only(model._adapted, model.adapter_names)
            return loaded
        for name in ("output_loading_info", "state_dict"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` does not go with adapters whose base is loaded by its name: leave it out.")
        if pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` is None: pass the folder or name of the adapters.")
        file = cached_file(pretrained_model_name_or_path, SAFE_WEIGHTS_NAME, **source)
        assert file is not None  # or it has raised
        if isinstance(given, (str, os.PathLike)):
            probed, kwargs = cls.config_class.from_pretrained(given, return_unused_kwargs=True, **kwargs)
        for_base = base_arguments(kwargs, source)
        peft_config = probed.peft_config or {}
        named, revision = peft_config["base_model_name_or_path"], peft_config.get("revision")
        base = load_base(cls.expert_auto_class, named, built(probed.expert_config), revision=revision, **for_base)
        model = cls._around(probed, base)
        result = model.load_state_dict(load_file(file), strict=False)
        missing = sorted(set(result.missing_keys).difference(model._keys_to_ignore_on_save or ()))
        if missing or result.unexpected_keys:
            raise ValueError(
                f"The checkpoint and the base {named!r} do not fit: missing "
                f"{missing[:3]}, not expected {result.unexpected_keys[:3]}. Has the base changed since?"
            )
        return model


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises a `ValueError` that names an argument which no mixture has: a configuration would keep it unread."""
    known = [name for name in FedMoEConfig.__annotations__ if not name.startswith("_")]
    known += [name for name in _FURTHER_ARGUMENTS if name not in known]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"`{name}` is no argument of a mixture: {f'did you mean `{near[0]}`?' if near else 'leave it out.'}"
            )


def check_number_of_experts(config: FedMoEConfig, place: str | os.PathLike | None, source: dict[str, Any]) -> None:
    """
    Raises a `ValueError` when the weights at `place` are not those of as many routed experts as the configuration asks
    for, all of which would be built before a weight is read.
    """
    if place is None:  # with weights from elsewhere
        return
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    names: list[str] = []
    if index := cached_file(place, SAFE_WEIGHTS_INDEX_NAME, **optional, **source):
        with open(index, encoding="utf-8") as file:
            names = list(json.load(file)["weight_map"])
    elif weights := cached_file(place, SAFE_WEIGHTS_NAME, **optional, **source):
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
    # `routed_experts.3.bert...`, and of adapters `base...lora_A.routed_3.weight`.
    found = {int(k) for name in names for k in re.findall(r"(?:^routed_experts\.|\.routed_)(\d+)\.", name)}
    if found and len(found) != config.num_routed_experts:
        raise ValueError(
            f"`num_routed_experts` is {config.num_routed_experts}, but the weights in {str(place)!r} are those of "
            f"{len(found)} routed experts: correct it in `config.json`."
        )
