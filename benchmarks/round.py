"""
Measures what a federated round costs beyond its training: `FederatedTrainer` with FedAvg against a bare PyTorch loop.

The bare loop is what a careful researcher writes: one model, one dataset and the same collator per client, the same
optimizer class, schedule, clipping and batches, then a weighted mean in plain Python; it ends with the same weights,
which is checked. A second bare loop gets its batches collated beforehand and loads no data at all. The three run in
turns, round by round, each from the same weights. `image_round.py` is the same for images.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from machine import StageClock, add_device, benchmark_parser, pin_threads, print_table, ratios, spread
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, adam
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, dataloader
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
    default_data_collator,
)
from transformers import get_linear_schedule_with_warmup as linear_schedule
from transformers.utils import logging

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.federation import LocalTrainer, Stream, seed_of, soundness
from hf_fedmoe.federation.local_training import local_steps
from hf_fedmoe.strategies import Strategy
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments
from hf_fedmoe.training.client_training import ClientTraining
from hf_fedmoe.weights import StateLayout


VOCAB_SIZE, TOKENS, BATCH_SIZE = 2000, 32, 10


class BareLoop:
    """Federated averaging without a framework."""

    def __init__(
        self,
        model: nn.Module,
        clients: list[datasets.Dataset],
        args: FederatedTrainingArguments,
        collate: Callable,
    ):
        self.model, self.clients, self.args, self.collate = copy.deepcopy(model), clients, args, collate
        self.model.to(args.device)

    def order(self, client: int, round_index: int) -> list[list[int]]:
        """The rows of each batch; seeds what is random in training as well."""
        seed = seed_of(self.args.seed, Stream.LOCAL_TRAINING, round_index, client)
        torch.manual_seed(seed)
        return [batch for step in local_steps(len(self.clients[client]), self.args, seed) for batch in step]

    def load(self, client: int, order: list[list[int]]) -> Iterable[dict[str, Tensor]]:
        pin_memory = self.args.device.type == "cuda"
        return DataLoader(self.clients[client], batch_sampler=order, collate_fn=self.collate, pin_memory=pin_memory)

    def run_round(self, round_index: int, start: dict[str, Tensor], collated: list | None = None) -> dict[str, Tensor]:
        states, sizes = [], []
        for client, dataset in enumerate(self.clients):
            order = self.order(client, round_index)
            batches = self.load(client, order) if collated is None else collated[client]
            self.model.load_state_dict(start)
            self.train(batches, num_steps=len(order))
            states.append(self.copy_state())
            sizes.append(len(dataset))
        return self.average(states, sizes)

    def train(self, batches: Iterable[dict[str, Tensor]], num_steps: int) -> float:
        model, total = self.model.train(), 0.0
        optimizer = AdamW(model.parameters(), lr=self.args.learning_rate, weight_decay=0.0, fused=True)
        scheduler = linear_schedule(optimizer, 0, num_steps)
        for batch in batches:
            batch = {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in batch.items()}
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item()
        return total / num_steps

    def copy_state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def average(self, states: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
        weights = [size / sum(sizes) for size in sizes]
        return {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]}


# Where a round's time goes: (owner of a function, its name, stage).
DATA_STAGES = [
    *((DataLoader, "__iter__", "data loader"), (dataloader._BaseDataLoaderIter, "__next__", "data loader")),
    (datasets.Dataset, "__getitems__", "read rows"),
]
STAGES = [
    *((GPT2ForSequenceClassification, "forward", "forward"), (Tensor, "backward", "backward")),
    *((nn.utils, "clip_grad_norm_", "clip"), (adam, "adam", "optimizer step"), (Optimizer, "zero_grad", "zero_grad")),
    *((StateLayout, "write", "download copy"), (nn.Module, "load_state_dict", "download copy")),
    *((StateLayout, "read", "upload copy"), (BareLoop, "copy_state", "upload copy")),
    *((LocalTrainer, "reset_optimizer", "optimizer reset"), (AdamW, "__init__", "optimizer reset")),
    *((ClientTraining, "_local_scheduler", "scheduler"), (LRScheduler, "step", "scheduler")),
    *((soundness, "payload_fault", "check"), (Strategy, "update", "server"), (BareLoop, "average", "server")),
]


class Turns(TrainerCallback):
    """Times the trainer's rounds, logging included, and runs the bare loops after each of them."""

    def __init__(
        self, bare: BareLoop, repetitions: int, clock: Callable[[], float], stages: list[tuple[Any, str, str]]
    ):
        self.bare, self.repetitions, self.clock = bare, repetitions, clock
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": [], "collated": []}
        self.stages = {"trainer": StageClock(stages, clock), "bare": StageClock(stages, clock)}
        self.difference, self.started = 0.0, None

    def on_step_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.split = state.global_step > self.repetitions
        if self.split:
            self.stages["trainer"].__enter__()
        self.started = self.clock()

    def on_log(self, args, state, control, model=None, **kwargs: Any) -> None:
        if self.started is None:  # the summary after the last round
            return
        seconds, round_index = [self.clock() - self.started], state.global_step - 1
        self.started = None
        if self.split:
            self.stages["trainer"].__exit__()
            with self.stages["bare"]:
                self.bare.run_round(round_index, self.start)
            return
        clients = range(len(self.bare.clients))
        collated = [list(self.bare.load(client, self.bare.order(client, round_index))) for client in clients]
        for batches in (None, collated):
            started = self.clock()
            result = self.bare.run_round(round_index, self.start, batches)
            seconds.append(self.clock() - started)
            if batches is None:
                gaps = [(result[name] - tensor).abs().max().item() for name, tensor in model.state_dict().items()]
                self.difference = max(self.difference, *gaps)
        if round_index > 0:  # the first one warms up
            for name, value in zip(self.seconds, seconds, strict=True):
                self.seconds[name].append(value)


def take_turns(
    model: PreTrainedModel,
    data: FederatedDataset,
    collate: Callable,
    batch_size: int,
    args: argparse.Namespace,
    clock: Callable[[], float],
    bare_class: type[BareLoop] = BareLoop,
    more_stages: Sequence[tuple[Any, str, str]] = (),
) -> Turns:
    """Trains for one round that warms up, `args.repetitions` that count, and one that is split by stages."""
    with tempfile.TemporaryDirectory() as folder:
        training = FederatedTrainingArguments(
            output_dir=folder,
            rounds=args.repetitions + 2,
            clients_per_round=data.num_clients,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
        )
        clients = [data.client(client) for client in range(data.num_clients)]
        bare = bare_class(model, clients, training, collate)
        turns = Turns(bare, args.repetitions, clock, [*DATA_STAGES, *more_stages, *STAGES])
        FederatedTrainer(model, training, train_dataset=data, data_collator=collate, callbacks=[turns]).train()
    return turns


def print_turns(turns: Turns, title: str) -> None:
    rows = [["FederatedTrainer", spread(turns.seconds["trainer"]), ""]]
    for key, name in (("bare", "bare loop"), ("collated", "bare loop, batches collated beforehand")):
        overhead = [ratio - 1 for ratio in ratios(turns.seconds["trainer"], turns.seconds[key])]
        rows.append([name, spread(turns.seconds[key]), spread(overhead, 100, 1)])
    print_table(title, ["", "seconds", "overhead of FederatedTrainer, %"], rows)
    print(f"\nLargest difference of a weight after a round: {turns.difference:.1e}")

    ours, bare = (turns.stages[name].seconds for name in ("trainer", "bare"))
    stages = [*dict.fromkeys(stage for *_, stage in turns.stages["trainer"].stages), "rest"]
    per_client = 1e3 / len(turns.bare.clients)
    rows = [
        [stage, *(f"{x * per_client:.2f}" for x in (a, b, a - b)), f"{100 * a / ours.total():.1f}"]
        for stage, a, b in [
            *((stage, ours[stage], bare[stage]) for stage in stages),
            ("all", ours.total(), bare.total()),
        ]
    ]
    header = ["", "trainer", "bare loop", "difference", "share of the trainer's, %"]
    print_table("One more round by stages, ms per client", header, rows)


def random_clients(
    num_clients: int, num_examples: int, num_reserved: int = 0, tokens: int = TOKENS, vocab_size: int = VOCAB_SIZE
) -> FederatedDataset:
    rng, count = np.random.default_rng(0), num_clients * num_examples + num_reserved
    columns = {
        "input_ids": rng.integers(1, vocab_size, (count, tokens)),
        "attention_mask": np.ones((count, tokens), dtype=np.int64),
        "label": rng.integers(0, 4, count),
    }
    pool = datasets.Dataset.from_dict(columns)
    *clients, reserved = np.split(np.arange(count), np.arange(1, num_clients + 1) * num_examples)
    return FederatedDataset(pool, clients, reserved=reserved if num_reserved else None, num_labels=4)


def main() -> None:
    parser = benchmark_parser("A round of FederatedTrainer against a bare PyTorch loop with the same local steps.")
    add_device(parser)
    parser.add_argument("--clients", type=int, default=50, help="Clients of a round.")
    parser.add_argument("--examples", type=int, default=50, help="Examples of a client.")
    parser.add_argument("--hidden", type=int, default=64, help="Width of the two-layer GPT-2 classifier.")
    parser.add_argument("--repetitions", type=int, default=5, help="Rounds that count, after one that does not.")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.repetitions = 8, 2
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    data = random_clients(args.clients, args.examples)
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_embd=args.hidden, n_head=args.hidden // 32, n_positions=TOKENS)
    model = GPT2ForSequenceClassification(GPT2Config(**shape, vocab_size=VOCAB_SIZE, num_labels=4, pad_token_id=0))
    turns = take_turns(model, data, default_data_collator, BATCH_SIZE, args, clock)
    print_turns(turns, f"A round of {args.clients} clients, {model.num_parameters() / 1e6:.2f}M parameters")


if __name__ == "__main__":
    main()
