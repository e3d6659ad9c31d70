"""
The work that all contestants of `peers.py` do, read from files that it has written, and the gate between rounds.

Nothing of `hf_fedmoe` is imported here, so that its start-up and memory count for no other contestant.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def simple_cnn() -> nn.Sequential:
    """The layers of pfl-research's benchmark on CIFAR-10: 1,626,442 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


def bert_with_lora() -> nn.Module:
    """A BERT of 6 layers and width 256 with random weights, adapters of rank 8 and a head."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    shape = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024)
    base = BertForSequenceClassification(BertConfig(**shape, vocab_size=2000, num_labels=4))
    return get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS"))


MODELS = {"cifar": simple_cnn, "lora": bert_with_lora}


class Work:
    """
    A shape: clients, their data in memory, who takes part when, in which order of examples, from which weights.

    Shape suffixes: R rounds, m participants, n examples of a client.
    """

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self.folder = folder
        settings = json.loads((folder / "settings.json").read_text())
        self.shape, self.batch_size, self.device = settings["shape"], settings["batch_size"], settings["device"]
        plan = load_file(folder / "plan.safetensors")
        self.clients_Rm, self.seeds_Rm = plan["clients"], plan["seeds"]
        self.orders_Rmn = plan["orders"].to(self.device)
        self.rounds, self.participants, self.examples = self.orders_Rmn.shape
        self.data = load_file(folder / "data.safetensors")
        images = self.data.get("pixel_values")
        if images is not None:
            images = images.float().mul_(2 / 255).sub_(1)
            if settings["channels_last"]:
                images = images.contiguous(memory_format=torch.channels_last)
            self.data["pixel_values"] = images
        self.data = {name: column.to(self.device) for name, column in self.data.items()}

    def model(self) -> nn.Module:
        model = MODELS[self.shape]()
        model.load_state_dict(load_file(self.folder / "start.safetensors"))
        return model.to(self.device).train()

    def loss(self, model: nn.Module, **batch: Tensor) -> Tensor:
        if self.shape == "cifar":
            return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
        return model(**batch).loss

    def make_optimizer(self, parameters: Any, lr: float | None = None) -> torch.optim.Optimizer:
        """As the trainer's: SGD for `"cifar"`, the fused AdamW for `"lora"`."""
        kind = torch.optim.SGD if self.shape == "cifar" else partial(torch.optim.AdamW, weight_decay=0.0, fused=True)
        return kind(parameters, lr=self.learning_rate if lr is None else lr)

    @property
    def learning_rate(self) -> float:
        return 0.1 if self.shape == "cifar" else 1e-3

    def begin_client(self, round_index: int, place: int) -> Tensor:
        """Seeds dropout as the trainer does and returns the client's rows in the order of its epoch."""
        torch.manual_seed(self.seeds_Rm[round_index, place].item())
        torch.empty((), dtype=torch.int64).random_()  # the trainer's DataLoader draws a seed for its workers
        return self.clients_Rm[round_index, place] * self.examples + self.orders_Rmn[round_index, place]

    def batches(self, round_index: int, place: int) -> Iterator[dict[str, Tensor]]:
        """A client's local epoch."""
        for rows in self.begin_client(round_index, place).split(self.batch_size):
            yield {name: column[rows] for name, column in self.data.items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Says what clients train and send."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Gate:
    """
    Holds a contestant before each round, and after its last, until `peers.py` lets it go on; then saves the weights
    after the first round and the last. The second round, to whose time the former is added, does not count. A GPU has
    done all that it was asked for before a round counts as ended.
    """

    def __init__(self, folder: Path, name: str, rounds: int, device: str):
        self.folder, self.name, self.rounds, self.device, self.passed = folder, name, rounds, device, -1
        self.replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a framework prints must not reach `peers.py`

    def wait(self, weights: Callable[[], dict[str, Tensor]]) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.replies.write("ready\n")
        self.replies.flush()
        sys.stdin.readline()
        self.passed += 1
        if self.passed in (1, self.rounds):
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights().items()}
            save_file(tensors, self.folder / f"{self.name}-{self.passed}.safetensors")


def enter() -> tuple[Work, Gate]:
    """Reads what the command line names: the folder of the work, and the contestant."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    work = Work(folder)
    return work, Gate(folder, name, work.rounds, work.device)
