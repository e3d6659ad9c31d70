"""
Whether it pays to train several clients of a process at once: a step of plain gradient descent of n clients, one
after another as `LocalTrainer` does it, and together. Whole models go through `torch.vmap`; LoRA adapters through one
forward of their base, in a batch that PEFT divides among them.

`clients_at_once` trains them together. This says where it pays.
"""

import copy
from collections.abc import Callable

import torch
from compiled import gpt2, images, on, texts
from machine import add_device, alternate, benchmark_parser, pin_threads, print_table, ratios, spread
from peft import LoraConfig
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hf_fedmoe.models import (
    AdapterExpert,
    LinearConfig,
    LinearForClassification,
    SmallCNNConfig,
    SmallCNNForImageClassification,
)
from hf_fedmoe.models.adapters_fedmoe import peft_config_dict, with_adapters


BATCH = 10
Batch = dict[str, Tensor]


def linear() -> nn.Module:
    return LinearForClassification(LinearConfig(num_features=60, num_labels=10))


def small_cnn() -> nn.Module:
    return SmallCNNForImageClassification(SmallCNNConfig(num_labels=62))


def gpt2_without_fused_attention() -> nn.Module:
    model = gpt2()
    model.set_attn_implementation("eager")  # vmap cannot see into the checks of masks that others make
    return model


def bert() -> nn.Module:
    shape = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(**shape, **quiet, vocab_size=2000, num_labels=4))


def features(size: int) -> Batch:
    return {"features": torch.randn(size, 60), "labels": torch.randint(10, (size,))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "linear model of 60 features": (linear, lambda: features(BATCH)),
    "CNN of 6.6M, grey images of 28x28": (small_cnn, lambda: images(BATCH, 1, 28, 62)),
    "GPT-2, 2 layers of 128, 32 tokens": (gpt2_without_fused_attention, lambda: texts(BATCH)),
}


class OneByOne:
    """A step of each client in turn."""

    def __init__(self, models: list[nn.Module], batches: list[Batch]):
        self.models, self.batches = models, batches
        self.parameters = [[p for p in model.parameters() if p.requires_grad] for model in models]
        self.optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in self.parameters]

    def __call__(self) -> None:
        for model, batch, optimizer in zip(self.models, self.batches, self.optimizers, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def first_weights(self) -> list[Tensor]:
        return [parameters[0].detach() for parameters in self.parameters]


class Stacked:
    """The same step of all clients' models as one model of stacked weights."""

    def __init__(self, models: list[nn.Module], batches: list[Batch]):
        self.stacked, _ = stack_module_state(models)
        self.batch = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
        skeleton = models[0]

        def loss(weights: Batch, batch: Batch) -> Tensor:
            return functional_call(skeleton, weights, kwargs=batch).loss

        self.losses = vmap(loss, randomness="different")
        self.optimizer = torch.optim.SGD(self.stacked.values(), lr=0.01)

    def __call__(self) -> None:
        self.losses(self.stacked, self.batch).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first_weights(self) -> list[Tensor]:
        return list(next(iter(self.stacked.values())).detach())


class OneBatch:
    """The same step of all clients' adapters on one base."""

    def __init__(self, adapters: list[AdapterExpert], batches: list[Batch]):
        self.adapters, self.model = adapters, adapters[0].peft_model
        self.inputs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "labels"}
        self.labels = [batch["labels"] for batch in batches]
        self.names = [adapter.name for adapter in adapters for _ in range(BATCH)]
        self.optimizer = torch.optim.SGD([p for adapter in adapters for p in adapter.parameters()], lr=0.01)

    def __call__(self) -> None:
        # PEFT asks this module, which has nothing that trains otherwise, before it divides a batch.
        self.model.base_model.training = False
        logits = self.model(**self.inputs, adapter_names=self.names).logits.split(BATCH)
        losses = [nn.functional.cross_entropy(own, labels) for own, labels in zip(logits, self.labels, strict=True)]
        sum(losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.base_model.training = True

    def first_weights(self) -> list[Tensor]:
        return [next(adapter.parameters()).detach() for adapter in self.adapters]


def whole_models(make: Callable[[], nn.Module], count: int, device: str) -> list[nn.Module]:
    torch.manual_seed(0)
    model = make().train().to(device)
    return [copy.deepcopy(model) for _ in range(count)]


def adapters(count: int, device: str) -> list[AdapterExpert]:
    torch.manual_seed(0)
    names = [f"client{index}" for index in range(count)]
    model = with_adapters(bert(), peft_config_dict(LoraConfig(r=8)), names).train().to(device)
    return [AdapterExpert(model, name) for name in names]


def main() -> None:
    parser = benchmark_parser("A step of several clients, one after another and together.")
    add_device(parser)
    parser.add_argument("--clients", type=int, default=10, help="How many are trained together.")
    parser.add_argument("--steps", type=int, default=3, help="Steps of a turn.")
    parser.add_argument("--repetitions", type=int, default=7, help="Turns that count, after one that does not.")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.repetitions = 2, 2
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    kinds = {
        name: (Stacked, lambda make=make: whole_models(make, args.clients, args.device), batch)
        for name, (make, batch) in MODELS.items()
    }
    lora = "LoRA of rank 8 on a BERT of 6 layers of 256, 32 tokens"
    kinds[lora] = (OneBatch, lambda: adapters(args.clients, args.device), lambda: texts(BATCH))
    rows = []
    for name, (together, make, batch) in kinds.items():
        torch.manual_seed(1)
        batches = [on(args.device, batch()) for _ in range(args.clients)]
        steps = {"one by one": OneByOne(make(), batches), "together": together(make(), batches)}

        def turn(step: Callable[[], None]) -> None:
            for _ in range(args.steps):
                step()

        turns = {kind: (lambda step=step: turn(step)) for kind, step in steps.items()}
        seconds = alternate(turns, args.repetitions, clock)
        weights = zip(*(step.first_weights() for step in steps.values()), strict=True)
        gap = max((a - b).abs().max().item() for a, b in weights)
        milliseconds = [spread(seconds[kind], 1e3 / args.steps, 1) for kind in steps]
        rows.append([name, *milliseconds, spread(ratios(*seconds.values())), f"{gap:.0e}"])
    header = ["", "one by one, ms", "together, ms", "one by one / together", "largest gap of a weight"]
    print_table(f"A step of {args.clients} clients, batches of {BATCH}", header, rows)


if __name__ == "__main__":
    main()
