"""
A mixture of owners of text against its base: a forward, single tokens with a cache, and memory, over the owners K.

The base has the shape of GPT-2 small and random weights, the experts are LoRA on its feed-forward layers.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from lora_dispatch import resident_kilobytes
from machine import add_device, alternate, benchmark_parser, pin_threads, print_table, ratios, spread
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from hf_fedmoe.models import FedMoEForCausalLM, text_statistics
from hf_fedmoe.models.router_fedmoe_causal import packed_bits


PROMPT, NEW = 16, 24


def base_model(quick: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 96, "vocab_size": 500} if quick else {}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()


@torch.no_grad()
def mixture(K: int, rank: int, quick: bool) -> FedMoEForCausalLM:
    """Random experts, and a router of all of them that weighs them differently from text to text."""
    base = base_model(quick)
    owners = [f"owner {k}" for k in range(K)]
    model = FedMoEForCausalLM.from_base(base, owners, lora_rank=rank, lora_alpha=2 * rank)
    generator = torch.Generator().manual_seed(0)
    for layer in model.expert_layers().values():
        nn.init.normal_(layer.owners.lora_B, std=0.02, generator=generator)
    for owner in owners:
        low = int(torch.randint(0, base.config.vocab_size - 100, (), generator=generator))
        texts = torch.randint(low, low + 100, (4, 32), generator=generator)
        statistics = text_statistics(model.get_input_embeddings(), texts)
        model.sums_EP[model.config.expert_index(owner)] = packed_bits(statistics.gram_DD)
    model.config.router_names = owners
    model._solve_router()  # once, not after each owner
    return model


def model_bytes(model: nn.Module) -> int:
    """Returns the bytes of distinct storages of parameters and buffers."""
    storages = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def forward(model: PreTrainedModel, input_ids: torch.Tensor, top_l: int | None = None) -> None:
    model.config.top_l = top_l
    model(input_ids, use_cache=False)


def write(model: PreTrainedModel, input_ids: torch.Tensor, top_l: int | None = None) -> None:
    model.config.top_l = top_l
    model.generate(input_ids, max_new_tokens=NEW, do_sample=False)


@torch.inference_mode()
def benchmark_time(args: argparse.Namespace, clock: Callable[[], float]) -> list[list[str]]:
    base = base_model(args.quick).to(args.device)
    models = {K: mixture(K, args.rank, args.quick).to(args.device) for K in args.owners}
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, base.config.vocab_size, (args.rows, args.tokens), generator=generator).to(args.device)
    rows = []
    for kind, run, input_ids in (
        (f"forward, {args.rows} x {args.tokens}", forward, text),
        (f"{NEW} tokens after {PROMPT}", write, text[:1, :PROMPT]),
    ):
        candidates = {"base": partial(run, base, input_ids)}
        for K, model in models.items():
            candidates[K, "soft"] = partial(run, model, input_ids)
            candidates[K, "top-1"] = partial(run, model, input_ids, 1)
        seconds = alternate(candidates, args.repetitions, clock)
        rows.append([kind, "base", "", spread(seconds["base"], 1e3, 1), "1"])
        for key in list(candidates)[1:]:
            times = seconds[key]
            rows.append([kind, key[1], str(key[0]), spread(times, 1e3, 1), spread(ratios(times, seconds["base"]))])
    return rows


@torch.inference_mode()
def print_peak(K: int, args: argparse.Namespace) -> None:
    """In a process of its own: growth of the resident memory from a model and forwards, and the model's bytes."""
    input_ids = torch.randint(0, 500, (args.rows, args.tokens), generator=torch.Generator().manual_seed(1))
    nn.Linear(64, 64)(torch.ones(64, 64))  # loads what counts for no model
    before = resident_kilobytes("VmRSS")
    model = mixture(K, args.rank, args.quick) if K else base_model(args.quick)
    for _ in range(3):
        model(input_ids, use_cache=False)
    print("FIGURES", model_bytes(model), 1024 * (resident_kilobytes("VmHWM") - before))


def benchmark_memory(args: argparse.Namespace) -> list[list[str]]:
    figures = {}
    for K in (0, *args.owners):
        command = [sys.executable, __file__, "--threads", str(args.threads), "--tokens", str(args.tokens)]
        command += ["--rank", str(args.rank), "--rows", str(args.rows), "--peak-of", str(K)]
        command += ["--quick"] if args.quick else []
        found = []
        for _ in range(args.processes):
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            line = next(line for line in output.splitlines() if line.startswith("FIGURES"))
            found.append([int(figure) for figure in line.split()[1:]])
        figures[K] = [median(column) for column in zip(*found, strict=True)]
    rows = []
    for K, found in figures.items():
        cells = []
        for figure, reference in zip(found, figures[0], strict=True):
            cells += [f"{figure / 1e6:.0f}", f"{figure / reference:.2f}"]
        rows.append([f"K = {K}" if K else "base", *cells])
    return rows


def main() -> None:
    parser = benchmark_parser("A mixture of owners of text against its base.")
    add_device(parser)
    parser.add_argument("--owners", nargs="+", type=int, default=[5, 50], help="Numbers K of owners.")
    parser.add_argument("--rank", type=int, default=32, help="Of the experts.")
    parser.add_argument("--rows", type=int, default=2, help="Texts of a forward.")
    parser.add_argument("--tokens", type=int, default=128, help="Tokens of a text.")
    parser.add_argument("--repetitions", type=int, default=7, help="Turns.")
    parser.add_argument("--processes", type=int, default=1, help="Processes for each figure of memory.")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.owners, args.rank, args.repetitions = [3], 4, 2
    logging.set_verbosity_error()
    clock = pin_threads(args, args.device)
    if args.peak_of is not None:
        print_peak(args.peak_of, args)
        return
    header = ["what", "mixture", "K", "ms", "time / base"]
    print_table(f"Time, experts of rank {args.rank}", header, benchmark_time(args, clock))
    if args.device == "cpu":
        header = ["model", "tensors, MB", "/ base", "peak, MB", "/ base"]
        print_table("Memory: tensors of the model, and growth of a process", header, benchmark_memory(args))


if __name__ == "__main__":
    main()
