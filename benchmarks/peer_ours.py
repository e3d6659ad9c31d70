"""
`FederatedTrainer` with FedAvg, logging included, on a dataset in memory, whose batches it brings to the device itself.

As the contestant `ours_at_once` it trains ten clients at once.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from peer_work import Gate, Work, enter, simple_cnn, trainable
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import logging

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import SmallImageProcessor
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments


class SimpleCNNConfig(PreTrainedConfig):
    model_type = "pfl_simple_cnn"


class SimpleCNN(PreTrainedModel):
    """The layers of [`simple_cnn`] as a Hugging Face model."""

    config_class = SimpleCNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SimpleCNNConfig):
        super().__init__(config)
        self.layers = simple_cnn()
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        logits = self.layers(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class GateBeforeRounds(TrainerCallback):
    def __init__(self, gate: Gate, model: nn.Module):
        self.gate, self.weights = gate, partial(trainable, model)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate.wait(self.weights)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.gate.wait(self.weights)


def images(work: Work) -> SimpleNamespace:
    data = load_file(work.folder / "data.safetensors")
    model = SimpleCNN(SimpleCNNConfig(num_labels=10))
    model.layers.load_state_dict(load_file(work.folder / "start.safetensors"))
    columns = {
        "pixel_values": [image.tobytes() for image in data["pixel_values"].numpy()],
        "label": data["labels"].numpy(),
    }
    features = Features({"pixel_values": Value("binary"), "label": ClassLabel(10)})
    return SimpleNamespace(
        model=model,
        sent=model.layers,
        rows=Dataset.from_dict(columns, features=features),
        processor=SmallImageProcessor(num_channels=3, size=32),
        optim="sgd",
    )


def texts(work: Work) -> SimpleNamespace:
    model, data = work.model(), load_file(work.folder / "data.safetensors")
    columns = {"input_ids": data["input_ids"].numpy(), "label": data["labels"].numpy()}
    features = Features({"input_ids": List(Value("int64")), "label": ClassLabel(4)})
    rows = Dataset.from_dict(columns, features=features)
    return SimpleNamespace(model=model, sent=model, rows=rows, processor=None, optim="adamw_torch_fused")


def main() -> None:
    work, gate = enter()
    logging.set_verbosity_error()
    parts = images(work) if work.shape == "cifar" else texts(work)
    rows = np.arange(len(parts.rows))
    data = FederatedDataset(parts.rows, np.split(rows, len(rows) // work.examples))
    args = FederatedTrainingArguments(
        output_dir=str(work.folder / f"{gate.name}-runs"),
        rounds=work.rounds,
        clients_per_round=work.participants,
        client_parallelism="sums",  # uploads are added up as they come, as by the others
        clients_at_once=10 if gate.name == "ours_at_once" else 1,
        per_device_train_batch_size=work.batch_size,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        optim=parts.optim,
        max_grad_norm=0.0,
        lora_fusion="factors",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=work.device == "cpu",
    )
    callbacks = [GateBeforeRounds(gate, parts.sent)]
    FederatedTrainer(parts.model, args, data, processing_class=parts.processor, callbacks=callbacks).train()
