"""The arguments of example-level privacy at clients, and what must hold before such a run starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module

from torch import nn

from ..federation import Strategy, has_plain_clients, opacus


# Of arguments that DP-SGD by Opacus does not go with: what they are without, and why.
PLAIN = {
    "gradient_accumulation_steps": (1, "each step has one batch"),
    "keep_client_optimizer": (False, "each round is accounted for by itself"),
    "clients_at_once": (1, "Opacus finds the gradients of examples in one model"),
    "deepspeed": (None, "Opacus does not know its engine"),
    "bf16": (False, "sums and noise are float32"),
    "fp16": (False, "sums and noise are float32"),
    "mixed_precision": ("no", "sums and noise are float32 (ACCELERATE_MIXED_PRECISION is the launcher's)"),
    "torch_compile": (False, "Opacus reads what layers compute"),
    "gradient_checkpointing": (False, "layers would be read twice"),
    "activation_checkpointing": (False, "layers would be read twice"),
    "dataloader_num_workers": (0, "batches are drawn when a client begins"),
    "dataloader_drop_last": (False, "no batch is the last one"),
}


@dataclass
class ExamplePrivacyArguments:
    """
    Arguments of example-level differential privacy, see docs/privacy.md: each client trains by DP-SGD, so that its
    uploads hide single examples from the server too. A run has it with `example_noise_multiplier` or
    `example_target_epsilon`. `privacy_accountant` and `noise_source` are those of [`PrivacyArguments`].

    Args:
        example_noise_multiplier (`float`, *optional*):
            z: noise of deviation z times `example_clipping_norm` goes onto the sum of a step's gradients. 0 only
            clips.
        example_target_epsilon (`float`, *optional*):
            Epsilon that no client exceeds: the run stops before. Without `example_noise_multiplier` the least noise is
            found with which every client stays within it, even if it takes part in all `rounds`.
        example_delta (`float`, *optional*):
            Of that epsilon; less than 1 / examples of any client.
        example_clipping_norm (`float`, *optional*):
            C, the norm to which the gradient of each example is shortened, in the place of `max_grad_norm`; infinity
            only without noise.
    """

    example_noise_multiplier: float | None = field(
        default=None, metadata={"help": "z of DP-SGD at clients, the noise in clipping norms."}
    )
    example_target_epsilon: float | None = field(
        default=None, metadata={"help": "Epsilon of examples that no client exceeds."}
    )
    example_delta: float | None = field(default=None, metadata={"help": "Of that epsilon; less than 1 / examples."})
    example_clipping_norm: float | None = field(
        default=None, metadata={"help": "C, to which the gradient of each example is shortened."}
    )

    @property
    def hides_examples(self) -> bool:
        """Tells whether clients train by DP-SGD."""
        return self.example_noise_multiplier is not None or self.example_target_epsilon is not None


def check_example_arguments(args: ExamplePrivacyArguments) -> None:
    """Raises `ValueError` for arguments of example-level privacy that contradict one another, or others of a run."""
    z, target, norm = args.example_noise_multiplier, args.example_target_epsilon, args.example_clipping_norm
    if not args.hides_examples:
        for name in ("example_delta", "example_clipping_norm"):
            if vars(args)[name] is not None:
                raise ValueError(
                    f"`{name}` is {vars(args)[name]}, which hides no example by itself: give "
                    "`example_noise_multiplier` or `example_target_epsilon` too, or leave it out."
                )
        return
    for name, least in (("example_noise_multiplier", 0.0), ("example_target_epsilon", math.ulp(0.0))):
        value = vars(args)[name]
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"`{name}` is {value}: give a number of 0 or more, an epsilon above 0.")
    if norm is None or not norm > 0 or (norm == math.inf and z != 0):
        raise ValueError(
            f"`example_clipping_norm` is {norm}: noise hides gradients of a norm that is bounded, give it, above 0: "
            "1.0 is a usual beginning."
        )
    if z == 0 and target is not None:
        raise ValueError(
            f"`example_noise_multiplier` is 0 and `example_target_epsilon` {target}: without noise there is no "
            "epsilon, leave one of them out."
        )
    if z != 0 and not 0 < (args.example_delta or 0) < 1:
        raise ValueError(
            f"`example_delta` is {args.example_delta}: give less than 1 / examples of any client, above 0."
        )
    for name, (plain, why) in PLAIN.items():
        if (vars(args)[name] or plain) != plain:
            raise ValueError(
                f"`{name}` is {vars(args)[name]!r}, but clients train by DP-SGD (`{_switch(args)}`), and {why}: "
                "leave it out."
            )
    if vars(args)["client_parallelism"] == "data":
        raise ValueError(
            f"`client_parallelism` is 'data', but clients train by DP-SGD (`{_switch(args)}`), of which "
            'each process has its own noise: choose "clients".'
        )


def check_example_run(
    args: ExamplePrivacyArguments, strategy: Strategy, client_model: nn.Module, client_sizes: Sequence[int]
) -> None:
    """Raises `ValueError` for a method, a model or clients with which examples cannot be hidden."""
    if not args.hides_examples:
        return
    opacus()
    begin = f"`{_switch(args)}` is {vars(args)[_switch(args)]}, but"
    if not has_plain_clients(strategy):
        raise ValueError(
            f"{begin} clients of {strategy.name!r} do more than train one model by its own loss, and nothing hides "
            "what else they send: choose a method that docs/privacy.md lists, or leave it out."
        )
    for name, _ in client_model.named_buffers():
        if name.endswith("running_mean"):
            raise ValueError(
                f"{begin} `{name}` of the model is a statistic of a client's examples, which has no noise: choose a "
                "model with layer or group normalisation."
            )
    if faults := _faults_by_opacus(client_model):
        raise ValueError(f"{begin} Opacus does not know all of the model: {'; '.join(faults)}.")
    largest = max(client_sizes)
    if (args.example_delta or 0) * largest >= 1:
        raise ValueError(
            f"`example_delta` is {args.example_delta} and a client has {largest} examples: to publish one of them "
            f"would be private by that, give less than {1 / largest:.2g}."
        )


def _faults_by_opacus(model: nn.Module) -> list[str]:
    """Asks Opacus which layers that learn it refuses, by their names."""
    validators = import_module("opacus.validators").ModuleValidator.VALIDATORS
    faults = []
    for name, module in model.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        errors = validators[type(module)](module) if type(module) in validators else []
        said = [" ".join(str(error).split()) for error in errors]
        if not said and next(module.buffers(), None) is not None:
            said = ["a layer that learns and has buffers"]
        faults += [f"{f'`{name}`' if name else 'itself'} ({type(module).__name__}): {text}" for text in said]
    return faults


def _switch(args: ExamplePrivacyArguments) -> str:
    return "example_target_epsilon" if args.example_noise_multiplier is None else "example_noise_multiplier"
