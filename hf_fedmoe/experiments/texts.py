"""The text recipes: tokenizers, pretrained experts, sentences."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from ..data import FederatedDataset
from ..models import (
    EnsembleForSequenceClassification,
    FedMoEForSequenceClassification,
    MultiHeadForSequenceClassification,
)
from .classifier_experiment import label_maps
from .domain_experiment import DomainExperiment
from .experiment import find_model, load_pretrained


SENTENCES = [
    "I love it, a perfect fit and beautiful fabric. I get compliments every time!",
    "It is okay. The colour is nice, but the material is thinner than I expected.",
    "Terrible quality. It fell apart after one wash and I sent it back.",
]


@dataclass
class TextExperiment(DomainExperiment):
    """Text classification with pretrained experts."""

    text_column: str | None = field(default=None, metadata={"help": "Column of texts, when it is not obvious."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text."})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Batches have so many tokens or a multiple: a GPU replays few shapes."}
    )
    peft: str = field(default="none", metadata={"help": "Experts as adapters of one base: 'lora', or 'none'."})
    rank: int = field(default=8, metadata={"help": "Of the LoRA adapters; lora_alpha is twice as much."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers with adapters, or all-linear."}
    )

    mixture_class = FedMoEForSequenceClassification
    ensemble_class = EnsembleForSequenceClassification
    multi_head_class = MultiHeadForSequenceClassification
    source_arguments = ("text_column", "label_column")
    not_of_data = (*DomainExperiment.not_of_data, "pad_to_multiple_of")
    lowest = {**DomainExperiment.lowest, "max_length": 1, "pad_to_multiple_of": 1, "rank": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft not in ("none", "lora"):
            raise ValueError(f"`peft` is {self.peft!r}: choose 'lora' or 'none'.")
        if self.pad_to_multiple_of and self.max_length % self.pad_to_multiple_of:
            raise ValueError(
                f"`pad_to_multiple_of` is {self.pad_to_multiple_of}, of which `max_length` = {self.max_length} is no "
                "multiple: the longest texts would be made longer than that."
            )

    def load_processor(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with a pad token."""
        tokenizer = load_pretrained(AutoTokenizer, find_model(self.model))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def prepare(self, data: FederatedDataset, processor: PreTrainedTokenizerBase) -> FederatedDataset:
        return data.map(
            lambda rows: processor(rows["text"], truncation=True, max_length=self.max_length), batched=True
        )

    def collators(self, processor: PreTrainedTokenizerBase) -> dict[str, Callable]:
        if self.pad_to_multiple_of is None:
            return {}
        return {"data_collator": DataCollatorWithPadding(processor, pad_to_multiple_of=self.pad_to_multiple_of)}

    def make_expert(self, data: FederatedDataset, processor: PreTrainedTokenizerBase) -> PreTrainedModel:
        name = find_model(self.model)
        config = load_pretrained(AutoConfig, name, **label_maps(data))
        if config.model_type == "gpt2" and config.activation_function == "gelu_new":
            # The same function in one kernel in the place of eight, which take a third of a step on a GPU.
            config.activation_function = "gelu_pytorch_tanh"
        expert = load_pretrained(
            AutoModelForSequenceClassification, name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        if expert.config.pad_token_id is None:
            expert.config.pad_token_id = processor.pad_token_id
        return expert

    def peft_config(self) -> PeftConfig | None:
        if self.peft == "none":
            return None
        base = find_model(self.model)
        return LoraConfig(
            # GPT-2's layers have their weights the other way round.
            fan_in_fan_out=AutoConfig.from_pretrained(base).model_type == "gpt2",
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules="all-linear" if self.target_modules == ["all-linear"] else self.target_modules,
            base_model_name_or_path=base,
        )

    def show(self, folder: Path, data: FederatedDataset, processor: PreTrainedTokenizerBase) -> None:
        classifier = pipeline("text-classification", model=str(folder))
        for sentence in SENTENCES:
            print(f"  {classifier(sentence)[0]['label']:>10s}  {sentence}")
