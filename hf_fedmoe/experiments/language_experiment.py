"""An experiment of language models: from settings to owners of text, and text of nobody."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data import FederatedDataset, FederatedTexts
from .experiment import Experiment, find_model, load_pretrained
from .owner_texts import pack_text, read_owner_texts


# Of the test's rows: whose text each is.
DOMAIN = "domain"
# Rows of token ids by whose they are and by split.
Packed = dict[str, dict[str, list[list[int]]]]


@dataclass
class LanguageExperiment(Experiment):
    """
    Owners of text are the clients, LoRA adapters of a common frozen base are what they train. The reserved set is
    public text, which is nobody's.
    """

    owners: list[str] = field(default_factory=list, metadata={"help": "Those of the texts who are clients."})
    public: str | None = field(
        default=None, metadata={"help": "That of the texts which is nobody's, and known to the router."}
    )
    unseen: list[str] = field(
        default_factory=list, metadata={"help": "Those of the texts which are nobody's, and unknown to it."}
    )
    opt_out: str | None = field(default=None, metadata={"help": "The owner who is taken out of the mixture again."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rows_per_owner: int | None = field(
        default=None, metadata={"help": "Training rows of each owner, drawn by the seed (all)."}
    )
    validation_size: int = field(
        default=0,
        metadata={
            "help": "Rows of each owner's reserved text that rounds are watched on, and `best_expert` is chosen by."
        },
    )
    test_size: int = field(default=48, metadata={"help": "Rows of each domain that are reported on, at most."})
    part: str = field(
        default="test", metadata={"help": "What is reported on; tune on 'reserved'.", "choices": ("test", "reserved")}
    )
    rank: int = field(default=32, metadata={"help": "Of the LoRA adapters; lora_alpha is twice as much."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers with adapters (the feed-forward ones)."}
    )
    public_bias: float = field(default=0.1, metadata={"help": "Added to the base's score by the mixture's router."})

    lowest = {"sequence_length": 4, "rows_per_owner": 1, "validation_size": 0, "test_size": 1, "rank": 1}
    not_of_data: ClassVar[tuple[str, ...]] = (
        *(*Experiment.not_of_data, "opt_out", "rank", "target_modules", "public_bias"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.owners:
            raise ValueError("`owners` is []: name those of the texts who are clients, at least one.")
        for name in self.domains:
            if self.domains.count(name) > 1:
                raise ValueError(f"{name!r} is twice among `owners`, `public` and `unseen`: name it once.")
        if self.opt_out is not None and self.opt_out not in self.owners:
            raise ValueError(f"`opt_out` is {self.opt_out!r}: choose one of the owners {self.owners}.")

    @property
    def domains(self) -> list[str]:
        """The names of those whose text is reported on: the owners, the public, the unseen."""
        return [*self.owners, *([self.public] if self.public is not None else []), *self.unseen]

    @property
    def is_watched(self) -> bool:
        return self.validation_size > 0

    def load_processor(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return load_pretrained(AutoTokenizer, find_model(self.model))

    def load(self, name: str) -> Packed:
        """Rows of all texts that are needed."""
        watched = ["reserved"] if self.is_watched else []
        splits = {owner: ["train", self.part, *watched] for owner in self.owners}
        splits |= {owner: ["test"] for owner in self.unseen}
        if self.public is not None:
            splits[self.public] = ["train", self.part]
        texts, tokenizer = read_owner_texts(name, splits, "dataset"), self.load_processor()
        return {
            owner: {
                split: pack_text(tokenizer, texts, owner, split, self.sequence_length) for split in dict.fromkeys(own)
            }
            for owner, own in splits.items()
        }

    def split(self, source: Packed, seed: int) -> FederatedDataset:
        """Clients by name, public text as reserved set, validation, and the test with its domains."""
        tests = {
            name: source[name]["test" if name in self.unseen else self.part][: self.test_size] for name in self.domains
        }
        test = _dataset([row for rows in tests.values() for row in rows])
        watched = [row for name in self.owners for row in self._watched(source[name], name)] if self.is_watched else []
        return FederatedTexts.from_clients(
            {name: _dataset(self._drawn(source[name]["train"], name, seed)) for name in self.owners},
            reserved=None if self.public is None else _dataset(source[self.public]["train"]),
            validation=_dataset(watched) if self.is_watched else None,
            test=test.add_column(DOMAIN, [name for name, rows in tests.items() for _ in rows]),
        )

    def _watched(self, rows: dict[str, list[list[int]]], name: str) -> list[list[int]]:
        """The rows of an owner that rounds are watched on: none of those that are reported on."""
        reported = self.test_size if self.part == "reserved" else 0
        found = rows["reserved"][reported : reported + self.validation_size]
        if len(found) < self.validation_size:
            taken = f", of which `test_size` = {reported} are reported on" if reported else ""
            raise ValueError(
                f"`validation_size` is {self.validation_size}, but {name!r} has {len(rows['reserved'])} reserved rows "
                f"of `sequence_length` = {self.sequence_length}{taken}: lower it."
            )
        return found

    def _drawn(self, rows: list[list[int]], name: str, seed: int) -> list[list[int]]:
        """The training rows of an owner."""
        if self.rows_per_owner is None:
            return rows
        if len(rows) < self.rows_per_owner:
            raise ValueError(
                f"`rows_per_owner` is {self.rows_per_owner}, but {name!r} has {len(rows)} rows of "
                f"`sequence_length` = {self.sequence_length}: lower one of them."
            )
        order = np.random.default_rng((seed, self.owners.index(name))).permutation(len(rows))
        return [rows[place] for place in order[: self.rows_per_owner]]


def _dataset(rows: list[list[int]]) -> Dataset:
    """Rows of which every token is learned."""
    return Dataset.from_dict({"input_ids": rows, "labels": rows})
