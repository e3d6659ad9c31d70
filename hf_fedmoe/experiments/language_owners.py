"""The recipe of owners of text: experts by files, the mixture, its controls, and an owner taken out."""

import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
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
from ..models import FedMoEForCausalLM
from ..owners import default_arguments, load_base, merge_experts, new_adapter, pack, remove_owner, train_expert
from ..reporting.markdown import table
from .experiment import find_model
from .folders import check_writable
from .language_controls import train_fedavg, train_pooled
from .language_extraction import CONTINUATION, PREFIX, extraction_table
from .language_layer_routers import NAMES as LAYER_ROUTERS
from .language_layer_routers import layer_routers, using
from .language_scores import PUBLIC_BIASES, bits_per_byte, bytes_of, log_likelihoods, score_domain
from .owner_texts import Texts, pack_text, read_owner_texts
from .recipe_help import presets
from .settings import read_preset, read_words, settings_of, typed_settings


# What is in the table, in its order, and what an owner's own expert is called in it.
CONTROLS = ("FedAvg of LoRA", "pooled training of one LoRA")
ROWS = (
    *("base", "best single expert", "soup", "uniform ensemble", *CONTROLS, "mixture, soft", "mixture, top-1"),
    *(f"mixture, public bias {bias}" for bias in PUBLIC_BIASES),
    *(*LAYER_ROUTERS, "mixture or base by likelihood", "likelihood router", "oracle by domain"),
)
PROMPT, NEW = 16, 32

Scores = dict[str, dict[str, float]]


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
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each trains everything anew."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    steps: int = field(default=48, metadata={"help": "Of an owner; the controls have those of all owners."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step."})
    lora_rank: int = field(default=32, metadata={"help": "Of every adapter; alpha is twice as much."})
    learning_rate: float = field(default=1.5e-2, metadata={"help": "Of an owner."})
    fedavg_learning_rate: float = field(default=1.5e-2, metadata={"help": "Of FedAvg, in its first round."})
    fedavg_rounds: int = field(default=12, metadata={"help": "Of FedAvg; they share the steps."})
    fedavg_fusion: str = field(
        default="factors",
        metadata={"help": "What it averages: A and B, or their products.", "choices": ("factors", "svd")},
    )
    pooled_learning_rate: float = field(default=1.5e-2, metadata={"help": "Of pooled training."})
    epsilon: float = field(default=0.0, metadata={"help": "Of differential privacy of the owners' sums; 0 for none."})
    test_sequences: int = field(default=60, metadata={"help": "Of each domain, at most."})
    extracted: int = field(default=50, metadata={"help": "Sequences of an owner that extraction is tried on."})
    part: str = field(
        default="test", metadata={"help": "What is reported on; tune on 'reserved'.", "choices": ("test", "reserved")}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})

    def __post_init__(self) -> None:
        sizes = ("steps", "batch_size", "lora_rank", "fedavg_rounds", "test_sequences", "sequence_length")
        for name in (*sizes, "extracted"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give a whole number of at least 1.")
        if self.steps % self.fedavg_rounds:
            raise ValueError(
                f"`steps` is {self.steps}, and `fedavg_rounds` is {self.fedavg_rounds}, which does not divide it: "
                "choose another."
            )
        if self.opt_out not in self.owners:
            raise ValueError(f"`opt_out` is {self.opt_out!r}: choose one of the owners {self.owners}.")
        if not self.seeds:
            raise ValueError("`seeds` is empty: give one at least.")

    def arguments(self, folder: Path, seed: int, steps: int, learning_rate: float) -> TrainingArguments:
        """Returns the arguments of one training."""
        return default_arguments(
            folder,
            seed=seed,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=self.batch_size,
            use_cpu=self.use_cpu,
            bf16=self.bf16,
            disable_tqdm=True,
        )

    def read(self) -> Texts:
        """Reads the texts of each owner and split; raises `ValueError` if somebody has none."""
        told = {name: ["train", self.part] for name in (*self.owners, self.public)}
        return read_owner_texts(self.texts, told | {name: ["test"] for name in self.unseen}, "texts")


def run_seed(experiment: OwnersRecipe, texts: Texts, seed: int) -> Scores:
    """
    Trains, merges, scores and takes out: everything of one seed, by the folders that owners would send.

    Args:
        experiment ([`OwnersRecipe`]): The settings.
        texts (`dict`): From [`OwnersRecipe.read`].
        seed (`int`): Of the adapters and the order of sequences.

    Returns:
        `dict[str, dict[str, float]]`: Bits per byte by row and domain.
    """
    folder, base = Path(experiment.output_dir, f"seed-{seed}"), find_model([experiment.base])
    tokenizer, length = AutoTokenizer.from_pretrained(base), experiment.sequence_length
    # What is too short is told here, before an older seed's folder is gone and hours are spent.
    packed = {name: pack_text(tokenizer, texts, name, "train", length) for name in experiment.owners}
    reported = reported_sequences(experiment, texts, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "texts").mkdir(parents=True)
    for name in (*experiment.owners, experiment.public):
        pq.write_table(pa.table({"text": texts[name]["train"]}), folder / "texts" / f"{name}.parquet")
    rank = experiment.lora_rank
    for name in experiment.owners:
        args = experiment.arguments(folder / name, seed, experiment.steps, experiment.learning_rate)
        source = folder / "texts" / f"{name}.parquet"
        facts = train_expert(
            name,
            base,
            source,
            folder / name,
            lora_rank=rank,
            sequence_length=length,
            epsilon=experiment.epsilon or None,
            args=args,
        )
        print(f"  {name}: {counted(experiment.steps, 'step')}, loss {facts.loss:.3f}", flush=True)
    public = folder / "texts" / f"{experiment.public}.parquet"
    experts = [folder / name for name in experiment.owners]
    mixture = merge_experts(base, experts, folder / "mixture", public, sequence_length=length)

    K, steps, rounds = len(experiment.owners), experiment.steps, experiment.fedavg_rounds
    start = new_adapter(load_base(base)[0], rank, 2 * rank, seed=seed)
    args = experiment.arguments(folder / "fedavg", seed, steps // rounds, experiment.fedavg_learning_rate)
    fedavg = train_fedavg(start, packed, args, rounds, experiment.fedavg_fusion)
    print(f"  FedAvg of LoRA ({experiment.fedavg_fusion}): {counted(rounds, 'round')}", flush=True)
    start = new_adapter(load_base(base)[0], rank, 2 * rank, seed=seed)
    args = experiment.arguments(folder / "pooled", seed, K * steps, experiment.pooled_learning_rate)
    pooled = train_pooled(start, packed, args)
    print(f"  pooled training: {counted(K * steps, 'step')}", flush=True)

    everything = mixture
    for name, control in zip(CONTROLS, (fedavg, pooled), strict=True):
        everything = everything.add_owner(control.cpu(), name=name)
    for model in (mixture, everything):
        put(model, args.device)
    routers = layer_routers(mixture, {name: torch.tensor(rows) for name, rows in packed.items()})
    fewer = remove_owner(folder / "mixture", experiment.opt_out, folder / f"without-{experiment.opt_out}")
    put(fewer, args.device)
    scores: Scores = {}
    for domain, ids_NT in reported.items():
        count = bytes_of(tokenizer, ids_NT)
        found = score_domain(everything, experiment.owners, list(CONTROLS), ids_NT, count)
        for name, router in routers.items():
            with using(mixture, router):
                found[name] = bits_per_byte(log_likelihoods(mixture.base, ids_NT), count)
        found["without"] = bits_per_byte(log_likelihoods(fewer, ids_NT), count)
        for row, value in found.items():
            scores.setdefault(row, {})[domain] = value
    summarise(scores, experiment.owners)
    return scores


def put(model: torch.nn.Module, device: torch.device) -> None:
    """Moves a model to a device."""
    model.to(device)


def reported_sequences(
    experiment: OwnersRecipe, texts: Texts, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Returns the sequences that are reported on, `(N, T)` for each domain."""
    found = {}
    for name in (*experiment.owners, experiment.public, *experiment.unseen):
        split = "test" if name in experiment.unseen else experiment.part
        rows = pack_text(tokenizer, texts, name, split, experiment.sequence_length)
        found[name] = torch.tensor(rows[: experiment.test_sequences])
    return found


def summarise(scores: Scores, owners: list[str]) -> None:
    """Adds the best single expert and the oracle, and to each row its mean over the owners' domains."""
    for row in scores.values():
        row["owners"] = mean(row[owner] for owner in owners)
    best = min(owners, key=lambda owner: scores[owner]["owners"])
    scores["best single expert"] = dict(scores[best])
    scores["oracle by domain"] = {owner: scores[owner][owner] for owner in owners}
    scores["oracle by domain"]["owners"] = mean(scores["oracle by domain"].values())


def tables(experiment: OwnersRecipe, all_scores: list[Scores]) -> str:
    """
    Writes what came out as Markdown: the main table, the matrix of experts and domains, and the owner taken out.

    Args:
        experiment ([`OwnersRecipe`]): The settings.
        all_scores (`list[dict]`): Of each seed.
    """

    def cell(row: str, domain: str) -> str:
        values = [scores[row][domain] for scores in all_scores if domain in scores[row]]
        if not values:
            return ""
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean(values):.3f}{spread}"

    nobody = [experiment.public, *experiment.unseen]
    domains = [*experiment.owners, *nobody]
    main = [[row, *(cell(row, domain) for domain in ("owners", *nobody))] for row in ROWS]
    head: list[object] = ["bits per byte", "the owners' text", f"{experiment.public} (known to the router)"]
    head += [f"{name} (unseen)" for name in experiment.unseen]
    experts = ["base", *experiment.owners, *CONTROLS, "mixture, soft", "mixture, top-1"]
    matrix = [[row, *(cell(row, domain) for domain in domains)] for row in experts]
    gone = experiment.opt_out
    named = {"mixture, soft": "mixture, soft", "without": f"without {gone}", "base": "base"}
    opted = [[name, *(cell(row, domain) for domain in domains)] for row, name in named.items()]
    return "\n\n".join(
        [
            table(main, head),
            "Each expert on each domain:\n\n" + table(matrix, ["", *domains]),
            f"{gone} taken out:\n\n" + table(opted, ["", *domains]),
        ]
    )


def show(experiment: OwnersRecipe, texts: Texts) -> None:
    """Prints a continuation of a text of each owner by the mixture, and whose it is; and one without an owner."""
    folder = Path(experiment.output_dir, f"seed-{experiment.seeds[0]}")
    tokenizer = AutoTokenizer.from_pretrained(folder / "mixture")
    prompts = {name: ids_NT[:1, :PROMPT] for name, ids_NT in reported_sequences(experiment, texts, tokenizer).items()}
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


def show_extraction(experiment: OwnersRecipe, texts: Texts) -> str:
    """Returns, of the first seed, how much of the owners' training text comes out again."""
    folder = Path(experiment.output_dir, f"seed-{experiment.seeds[0]}", "mixture")
    tokenizer, length = AutoTokenizer.from_pretrained(folder), PREFIX + CONTINUATION
    if experiment.sequence_length < length:
        return f"Sequences are shorter than the {length} tokens by which extraction is tried."
    trained = {name: pack(tokenizer, texts[name]["train"], experiment.sequence_length) for name in experiment.owners}
    found = extraction_table(FedMoEForCausalLM.from_pretrained(folder), trained, experiment.extracted)
    return (
        f"Of each owner's training text, the share of sequences whose next {CONTINUATION} tokens come out right after "
        f"{PREFIX} that are read, and how many do before the first wrong one:\n\n{found}"
    )


def owners_main(settings_file: Path) -> None:
    """Runs the recipe as `accelerate launch` calls it; a wrong setting ends it with one line and exit code 2."""
    try:
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
    texts, out, began = experiment.read(), Path(experiment.output_dir), time.perf_counter()
    check_writable(out, "output_dir")
    all_scores = []
    for seed in experiment.seeds:
        print(f"\nseed {seed}: {counted(len(experiment.owners), 'owner')} on {experiment.base}", flush=True)
        all_scores.append(run_seed(experiment, texts, seed))
        found = dict(zip(map(str, experiment.seeds), all_scores, strict=False))
        (out / "results.json").write_text(json.dumps(found, indent=2))  # of what there is, should a later one fail
    text = f"{tables(experiment, all_scores)}\n\n{show_extraction(experiment, texts)}"
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    show(experiment, texts)
    print(f"\n{time.perf_counter() - began:.0f} seconds; experts, mixtures and tables are in {out}.")
