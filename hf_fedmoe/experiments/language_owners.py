"""The recipe of owners of text: experts by files, the mixture, and an owner taken out."""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging

from ..data.counted import counted
from ..federation.files import write_json
from ..models import FedMoEForCausalLM
from ..owners import default_arguments, merge_experts, remove_owner, train_expert
from ..reporting.markdown import table
from .cores import use_all_cores
from .experiment import find_model
from .folders import check_writable
from .language_extraction import CONTINUATION, PREFIX, extraction_table
from .language_scores import SOFT, TOP_1, Way, bits_per_byte, bytes_of, log_likelihoods, single_ways, ways_of
from .library_warnings import without_library_warnings
from .owner_texts import Texts, pack_text, read_owner_texts
from .recipe_help import presets
from .settings import LARGEST_SEED, read_preset, read_words, settings_of, typed_settings


PROMPT, NEW = 16, 32

Scores = dict[str, dict[str, float]]
# Token ids by domain, `(N, T)`.
Sequences = dict[str, Tensor]


@dataclass
class OwnersRecipe:
    """Owners of text, their base, and how much each trains."""

    base: str = field(metadata={"help": "A shipped one, a folder, a name in $HF_FEDMOE_MODELS, or a Hub id."})
    texts: str = field(metadata={"help": "'owners', which is shipped, or a .parquet: owner, split and text."})
    owners: list[str] = field(metadata={"help": "Those of the texts who have an expert."})
    public: str = field(metadata={"help": "That of the texts which is nobody's, and known to the router."})
    unseen: list[str] = field(metadata={"help": "Those of the texts which are nobody's, and unknown to it."})
    opt_out: str = field(metadata={"help": "The owner who is taken out again."})
    preset_name: str = field(default="quick", metadata={"help": "The block of the YAML that settings came from."})
    output_dir: str = field(default="runs/owners_lm", metadata={"help": "Folder of experts, mixtures and tables."})
    seed: int = field(default=0, metadata={"help": "Of the adapters and the order of sequences."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    steps: int = field(default=48, metadata={"help": "Of an owner."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step."})
    lora_rank: int = field(default=32, metadata={"help": "Of every adapter; alpha is twice as much."})
    learning_rate: float = field(default=1.5e-2, metadata={"help": "Of an owner."})
    epsilon: float = field(default=0.0, metadata={"help": "Of differential privacy of the owners' sums; 0 for none."})
    test_sequences: int = field(default=60, metadata={"help": "Of each domain, at most."})
    extracted: int = field(default=50, metadata={"help": "Sequences of an owner that extraction is tried on."})
    part: str = field(
        default="test", metadata={"help": "What is reported on; tune on 'reserved'.", "choices": ("test", "reserved")}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank", "test_sequences", "sequence_length", "extracted"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give a whole number of at least 1.")
        domains = [*self.owners, self.public, *self.unseen]
        for name in domains:
            if domains.count(name) > 1:
                raise ValueError(f"{name!r} is twice among `owners`, `public` and `unseen`: name it once.")
        for name in {"texts", "mixture", f"without-{self.opt_out}"}.intersection(self.owners):
            raise ValueError(f"`owners` has {name!r}, as a folder beside theirs is called: rename it in the texts.")
        if self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}: give a number above 0.")
        if self.epsilon < 0:
            raise ValueError(f"`epsilon` is {self.epsilon}: give a number above 0, or 0 for none.")
        if self.opt_out not in self.owners:
            raise ValueError(f"`opt_out` is {self.opt_out!r}: choose one of the owners {self.owners}.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"`seed` is {self.seed}: give a whole number from 0 to {LARGEST_SEED}.")

    @property
    def folder(self) -> Path:
        """The folder of what is trained, merged and written down."""
        return Path(self.output_dir, f"seed-{self.seed}")

    def arguments(self, folder: Path) -> TrainingArguments:
        """Returns the arguments of an owner's training."""
        return default_arguments(
            folder,
            seed=self.seed,
            max_steps=self.steps,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            use_cpu=self.use_cpu,
            bf16=self.bf16,
            disable_tqdm=True,
        )

    def read(self) -> Texts:
        """Reads the texts of each owner and split; raises `ValueError` if somebody has none."""
        told = {name: ["train", self.part] for name in (*self.owners, self.public)}
        return read_owner_texts(self.texts, told | {name: ["test"] for name in self.unseen}, "texts")


def train_and_merge(experiment: OwnersRecipe, texts: Texts) -> tuple[FedMoEForCausalLM, FedMoEForCausalLM]:
    """
    Trains an expert for each owner, merges them, and takes one out: all by the folders that owners would send.

    Args:
        experiment ([`OwnersRecipe`]): The settings.
        texts (`dict`): From [`OwnersRecipe.read`].

    Returns:
        `tuple[FedMoEForCausalLM, FedMoEForCausalLM]`: The mixture of all owners, and that without one.
    """
    folder, base = experiment.folder, find_model([experiment.base])
    (folder / "texts").mkdir(parents=True)
    for name in (*experiment.owners, experiment.public):
        pq.write_table(pa.table({"text": texts[name]["train"]}), folder / "texts" / f"{name}.parquet")
    for name in experiment.owners:
        facts = train_expert(
            name,
            base,
            folder / "texts" / f"{name}.parquet",
            folder / name,
            lora_rank=experiment.lora_rank,
            sequence_length=experiment.sequence_length,
            epsilon=experiment.epsilon or None,
            args=experiment.arguments(folder / name),
        )
        print(f"  {name}: {counted(experiment.steps, 'step')}, loss {facts.loss:.3f}", flush=True)
    mixture = merge_experts(
        base,
        [folder / name for name in experiment.owners],
        folder / "mixture",
        folder / "texts" / f"{experiment.public}.parquet",
        sequence_length=experiment.sequence_length,
    )
    fewer = remove_owner(folder / "mixture", experiment.opt_out, folder / f"without-{experiment.opt_out}")
    return mixture, fewer


def score(
    experiment: OwnersRecipe, reported: Sequences, mixture: FedMoEForCausalLM, fewer: FedMoEForCausalLM
) -> Scores:
    """Returns bits per byte by row and domain: of the base, each expert, the mixture and that without an owner."""
    tokenizer = AutoTokenizer.from_pretrained(find_model([experiment.base]))
    single = single_ways(mixture, experiment.owners)
    ways: dict[str, Way] = {
        **single,
        TOP_1: ways_of(mixture, single)[TOP_1],
        "without": partial(log_likelihoods, fewer),
    }
    scores: Scores = {row: {} for row in ways}
    for domain, ids_NT in reported.items():
        count = bytes_of(tokenizer, ids_NT)
        for row, way in ways.items():
            scores[row][domain] = bits_per_byte(way(ids_NT), count)
    return scores


def reported_sequences(experiment: OwnersRecipe, texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """Returns the sequences that are reported on, `(N, T)` for each domain."""
    found = {}
    for name in (*experiment.owners, experiment.public, *experiment.unseen):
        split = "test" if name in experiment.unseen else experiment.part
        rows = pack_text(tokenizer, texts, name, split, experiment.sequence_length)
        found[name] = torch.tensor(rows[: experiment.test_sequences])
    return found


def score_table(experiment: OwnersRecipe, scores: Scores) -> str:
    """Writes bits per byte as Markdown, each expert on each domain, and their mean over the owners' domains."""
    domains = list(scores[SOFT])
    rows = []
    for row, found in scores.items():
        owners = mean(found[owner] for owner in experiment.owners)
        name = f"without {experiment.opt_out}" if row == "without" else row
        rows.append([name, *(f"{value:.3f}" for value in (owners, *found.values()))])
    return table(rows, ["bits per byte", "the owners' text", *domains])


def show(experiment: OwnersRecipe, reported: Sequences) -> None:
    """Prints a continuation of a text of each owner by the mixture, and whose it is; and one without an owner."""
    folder = experiment.folder
    tokenizer = AutoTokenizer.from_pretrained(folder / "mixture")
    prompts = {name: ids_NT[:1, :PROMPT] for name, ids_NT in reported.items()}
    gone = experiment.opt_out
    for model_folder, names in (("mixture", experiment.owners), (f"without-{gone}", [gone])):
        model = FedMoEForCausalLM.from_pretrained(folder / model_folder)
        print(f"\n{folder / model_folder} goes on:")
        for name in names:
            set_seed(0)
            mask = torch.ones_like(prompts[name])
            ids_1T = model.generate(prompts[name], attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=20)
            shares_E = model.route(ids_1T)[0, PROMPT:].mean(dim=0).tolist()
            shares = sorted(zip(shares_E, model.config.expert_names, strict=True), reverse=True)[:2]
            prompt, rest = tokenizer.batch_decode([ids_1T[0, :PROMPT], ids_1T[0, PROMPT:]])
            said = ", ".join(f"{owner} {share:.0%}" for share, owner in shares)
            print(f"  {name} ({said}): {' '.join(prompt.split())} | {' '.join(rest.split())}")


def show_extraction(experiment: OwnersRecipe, trained: dict[str, list[list[int]]]) -> str:
    """Returns how much of the owners' training text comes out again."""
    folder, length = experiment.folder / "mixture", PREFIX + CONTINUATION
    if experiment.sequence_length < length:
        return f"Sequences are shorter than the {length} tokens by which extraction is tried."
    found = extraction_table(FedMoEForCausalLM.from_pretrained(folder), trained, experiment.extracted)
    return (
        f"Of each owner's training text, the share of sequences whose next {CONTINUATION} tokens come out right after "
        f"{PREFIX} that are read, and how many do before the first wrong one:\n\n{found}"
    )


def owners_main(settings_file: Path) -> None:
    """Runs the recipe as `accelerate launch` calls it; a wrong setting ends it with one line and exit code 2."""
    try:
        with without_library_warnings():
            _run(settings_file, read_words([word for word in sys.argv[1:] if word != "-h"]), "-h" in sys.argv)
    except (ValueError, OSError, ImportError) as error:
        print(f"{settings_file.stem}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{settings_file.stem}: stopped.", file=sys.stderr)
        sys.exit(130)


def _run(settings_file: Path, told: dict[str, Any], wants_help: bool) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    wants_help = bool(told.pop("help", False)) or wants_help
    preset = read_preset(settings_file, str(told.pop("preset", "quick")))
    known = settings_of(OwnersRecipe)
    experiment = OwnersRecipe(**typed_settings(preset, known) | typed_settings(told, known))
    if wants_help:
        print(f"{settings_file.stem}.py [--preset NAME] [--SETTING VALUE ...]: {presets(settings_file)}")
        for each in dataclasses.fields(experiment):
            print(f"  --{each.name}: {each.metadata['help']} [{vars(experiment)[each.name]}]")
        return
    if PartialState().num_processes > 1:
        raise ValueError("The recipe runs in one process: leave out `--num_processes`, an owner is alone anyway.")
    texts, folder, began = experiment.read(), experiment.folder, time.perf_counter()
    check_writable(Path(experiment.output_dir), "output_dir")
    if folder.exists():
        raise ValueError(
            f"`output_dir` is {experiment.output_dir!r}, which holds {folder.name} of an earlier run: delete that "
            "folder, or choose another `--output_dir` or `--seed`."
        )
    tokenizer = AutoTokenizer.from_pretrained(find_model([experiment.base]))
    # What is too short is told before anything is trained.
    trained = {
        name: pack_text(tokenizer, texts, name, "train", experiment.sequence_length) for name in experiment.owners
    }
    reported = reported_sequences(experiment, texts, tokenizer)
    device: Any = experiment.arguments(folder).device  # with `use_cpu` that of all, before cores are counted
    use_all_cores()
    print(f"\n{counted(len(experiment.owners), 'owner')} on {experiment.base}, seed {experiment.seed}", flush=True)
    mixture, fewer = train_and_merge(experiment, texts)
    for model in (mixture, fewer):
        model.to(device)
    scores = score(experiment, reported, mixture, fewer)
    write_json(folder / "results.json", scores)
    text = f"{score_table(experiment, scores)}\n\n{show_extraction(experiment, trained)}"
    (folder / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    show(experiment, reported)
    print(f"\n{time.perf_counter() - began:.0f} seconds; experts, mixtures and tables are in {folder}.")
