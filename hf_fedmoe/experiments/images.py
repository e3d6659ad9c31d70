"""The image recipes: image processors, augmentation, experts from configurations, partitions by writer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel, pipeline

from ..data import (
    AUGMENTATIONS,
    SHIFTS,
    FederatedDataset,
    ImageCollator,
    decode_images,
    dirichlet,
    hold_out_ids,
    natural,
    pachinko,
)
from ..data.images import name_undecodable
from ..models import (
    EnsembleForImageClassification,
    FedMoEForImageClassification,
    MultiHeadForImageClassification,
    SmallImageProcessor,
)
from .classifier_experiment import build_classifier, label_maps
from .domain_experiment import DomainExperiment
from .experiment import find_model


@dataclass
class ImageExperiment(DomainExperiment):
    """Image classification; a model is the name of an architecture, with random weights, or a pretrained one."""

    model_config: str = field(default="{}", metadata={"help": "JSON: the configuration of an architecture."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images, when it is not obvious."})
    image_size: int = field(default=28, metadata={"help": "Height and width that images are resized to."})
    num_channels: int = field(default=1, metadata={"help": "1 for grey images, 3 for colour."})
    augmentation: str = field(default="none", metadata={"help": f"Of training: {', '.join(AUGMENTATIONS)}."})
    client_column: str = field(default="writer_id", metadata={"help": "Whose row it is, for partition natural."})
    coarse_column: str = field(default="coarse_label", metadata={"help": "Groups of classes, for pachinko."})
    num_groups: int | None = field(default=None, metadata={"help": "Groups of classes that Dirichlet draws share."})
    domain_shift: str = field(
        default="rotations", metadata={"help": f"What differs between domains: {', '.join(SHIFTS)}."}
    )
    test_share: float = field(default=0.2, metadata={"help": "Share of writers in no client, for partition natural."})

    mixture_class = FedMoEForImageClassification
    ensemble_class = EnsembleForImageClassification
    multi_head_class = MultiHeadForImageClassification
    source_arguments = ("image_column", "label_column")
    partitions = (*DomainExperiment.partitions, "natural", "pachinko")
    lowest = {**DomainExperiment.lowest, "image_size": 1, "num_groups": 1}
    shares = (*DomainExperiment.shares, "test_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"`augmentation` is {self.augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}.")
        if self.num_channels not in (1, 3):
            raise ValueError(f"`num_channels` is {self.num_channels}: give 1 for grey images or 3 for colour.")

    def load_processor(self) -> BaseImageProcessor:
        return SmallImageProcessor(
            num_channels=self.num_channels, size={"height": self.image_size, "width": self.image_size}
        )

    def split(self, source: datasets.DatasetDict, seed: int) -> FederatedDataset:
        if self.partition == "natural":
            # Whoever wrote a test character is in no client.
            rows = datasets.concatenate_datasets(list(source.values()))
            self._check_column("client_column", "whose row it is", rows)
            test, train = hold_out_ids(rows[self.client_column], self.test_share, seed=0)
            source = datasets.DatasetDict(train=rows.select(train), test=rows.select(test))
        return super().split(source, seed)

    def _check_column(self, name: str, meaning: str, rows: datasets.Dataset) -> None:
        if vars(self)[name] not in rows.column_names:
            raise ValueError(
                f"`{name}` is {vars(self)[name]!r}, but the data has the columns {rows.column_names}: name the one "
                f"that says {meaning}, or take another `partition`."
            )

    def divide(self, rows: datasets.Dataset, seed: int) -> list[np.ndarray]:
        if self.partition == "natural":
            return natural(
                rows[self.client_column], self.num_clients, seed, min_size=10, max_size=self.examples_per_client
            )
        if self.partition == "pachinko":
            self._check_column("coarse_column", "which group its class is in", rows)
            return pachinko(
                rows[self.coarse_column], rows["label"], self.num_clients, self.examples_per_client, seed=seed
            )
        if self.partition == "dirichlet":
            return dirichlet(
                rows["label"], self.num_clients, self.dirichlet_alpha, seed, min_size=10, num_groups=self.num_groups
            )
        return super().divide(rows, seed)

    def prepare(self, data: FederatedDataset, processor: BaseImageProcessor) -> FederatedDataset:
        decode = partial(decode_images, image_processor=processor)
        try:
            return data.map(decode, batched=True, batch_size=256, remove_columns=["image"])
        except ValueError as error:  # which knows one batch: whoever mends files mends all
            test = {} if data.test is None else {"test": data.test}
            more = name_undecodable({"pool": data.pool, **test}, processor, str(error))
            raise ValueError(f"{error}{more}") from error

    def make_expert(self, data: FederatedDataset, processor: BaseImageProcessor) -> PreTrainedModel:
        return self._build(find_model(self.model), label_maps(data))

    def make_gate(self, num_experts: int) -> PreTrainedModel:
        return self._build(find_model(self._gate_names()), {"num_labels": num_experts})

    def _build(self, name: str, labels: dict[str, Any]) -> PreTrainedModel:
        config = {"num_channels": self.num_channels, **self.read_json("model_config")}
        if name == "small_cnn":
            config["image_size"] = self.image_size
        return build_classifier(AutoModelForImageClassification, name, config, labels)

    def collators(self, processor: BaseImageProcessor) -> dict[str, Callable]:
        return {
            "data_collator": ImageCollator(processor),
            "train_data_collator": ImageCollator(processor, AUGMENTATIONS[self.augmentation]),
        }

    def show(self, folder: Path, data: FederatedDataset, processor: BaseImageProcessor) -> None:
        classify = pipeline("image-classification", model=str(folder))
        assert data.test is not None
        shape = ImageCollator(processor).shape
        for row in data.test.select(range(min(5, len(data.test)))):
            pixels_YXN = np.frombuffer(row["pixel_values"], np.uint8).reshape(shape).transpose(1, 2, 0)
            found = classify(Image.fromarray(pixels_YXN.squeeze()))[0]
            print(f"  {found['label']:>10s} ({found['score']:.2f}), truly {data.label_names[row['label']]}")
