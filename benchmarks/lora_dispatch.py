"""
A mixture whose experts are LoRA adapters of one base, against one forward of that base: time and memory.

With one main expert and L routed ones the floor is 1 + L forwards. Whole experts run next to it as a second reference.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from machine import add_device, alternate, benchmark_parser, pin_threads, print_table, ratios, spread
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_fedmoe.models import FedMoEForSequenceClassification


# Kind, its configuration (vocabulary and the rest as in BERT and GPT-2 small), and examples in a batch.
SHAPES = {
    "MiniLM": (
        BertForSequenceClassification,
        BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=4),
        32,
    ),
    "GPT-2 small": (GPT2ForSequenceClassification, GPT2Config(num_labels=4, pad_token_id=0, use_cache=False), 8),
}
TOKENS, QUICK_TOKENS, RANK = 64, 8, 8


def base_classifier(shape: str) -> PreTrainedModel:
    kind, config, _ = SHAPES[shape]
    torch.manual_seed(0)
    return kind(config).eval()


def mixture(shape: str, K: int, whole: bool = False) -> FedMoEForSequenceClassification:
    """Random adapters of rank 8 at the places where PEFT puts them by default, or whole experts."""
    adapters = {} if whole else {"peft_config": LoraConfig(r=RANK)}
    model = FedMoEForSequenceClassification.from_expert(base_classifier(shape), num_routed_experts=K, **adapters)
    for expert in model.experts:
        for name, parameter in expert.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def use_all_experts(model: FedMoEForSequenceClassification, input_ids: torch.Tensor) -> None:
    """A gate whose scores are around zero in the batch, so that it routes differently from example to example."""
    nn.init.normal_(model.gate.weight)
    features_BH = model.gate_features({"input_ids": input_ids})
    model.gate.bias.copy_(-model.gate(features_BH).mean(0))


def random_ids(shape: str, tokens: int) -> torch.Tensor:
    _, config, size = SHAPES[shape]
    return torch.randint(1, config.vocab_size, (size, tokens), generator=torch.Generator().manual_seed(0))


def parameter_bytes(model: nn.Module) -> int:
    """Counts the bytes of distinct storages."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.inference_mode()
def benchmark_time(shape: str, args: argparse.Namespace, clock: Callable[[], float]) -> list[list[str]]:
    input_ids = random_ids(shape, args.tokens).to(args.device)
    base = base_classifier(shape).to(args.device)
    candidates, sent = {"base": partial(base, input_ids)}, {}
    variants = [("adapters", K, L) for K in args.experts for L in args.top_l]
    if args.whole:
        variants.append(("whole experts", args.experts[0], 1))
    built = {}
    for kind, K, L in variants:
        if (kind, K) not in built:
            built[kind, K] = mixture(shape, K, whole=kind != "adapters").to(args.device)
            use_all_experts(built[kind, K], input_ids)
        candidates[kind, K, L] = partial(built[kind, K], input_ids, top_l=L)
        sent[kind, K, L] = len(candidates[kind, K, L]().selected_experts.unique())
    seconds = alternate(candidates, args.repetitions, clock)
    milliseconds = spread(seconds["base"], 1e3, 1)
    rows = [[shape, "base alone", "", "", "", milliseconds, "1", parameter_megabytes(base), "1"]]
    for kind, K, L in variants:
        times, model = seconds[kind, K, L], built[kind, K]
        times = [spread(times, 1e3, 1), spread(ratios(times, seconds["base"]))]
        memory = [parameter_megabytes(model), f"{parameter_bytes(model) / parameter_bytes(base):.2f}"]
        rows.append([shape, kind, str(K), str(L), str(sent[kind, K, L]), *times, *memory])
    return rows


def parameter_megabytes(model: nn.Module) -> str:
    return f"{parameter_bytes(model) / 1e6:.0f}"


def resident_kilobytes(field: str) -> int:
    """`VmRSS` now, or `VmHWM` at the peak. Of Linux: `getrusage` would give a child its parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no `{field}`: measure memory on Linux.")


@torch.inference_mode()
def print_peak(shape: str, kind: str, K: int, tokens: int) -> None:
    """In a process of its own: growth of the resident memory, at its peak, from building the model and forwards."""
    input_ids = random_ids(shape, tokens)
    nn.Linear(64, 64)(torch.ones(64, 64))  # loads what counts for no model
    before = resident_kilobytes("VmRSS")
    model = base_classifier(shape) if kind == "base" else mixture(shape, K, whole=kind != "adapters")
    built = resident_kilobytes("VmRSS")
    for _ in range(3):
        model(input_ids)
    print("KILOBYTES", resident_kilobytes("VmHWM") - before, built - before)


def benchmark_memory(shape: str, args: argparse.Namespace) -> list[list[str]]:
    variants = [("base", 0), *(("adapters", K) for K in args.experts)]
    if args.whole:
        variants.append(("whole experts", args.experts[0]))
    peaks = {}
    for kind, K in variants:
        command = [sys.executable, __file__, "--threads", str(args.threads), "--tokens", str(args.tokens)]
        peaks[kind, K] = []
        for _ in range(args.processes):
            command_of = [*command, "--peak-of", shape, kind, str(K)]
            lines = subprocess.run(command_of, check=True, capture_output=True, text=True).stdout.splitlines()
            figures = next(line for line in lines if line.startswith("KILOBYTES")).split()[1:]
            peaks[kind, K].append([int(figure) for figure in figures])
    rows = []
    for kind, K in peaks:
        cells = []
        for column in (1, 0):
            value, reference = (median(f[column] for f in peaks[key]) for key in ((kind, K), ("base", 0)))
            cells += [f"{value * 1024 / 1e6:.0f}", f"{value / reference:.2f}"]
        rows.append([shape, kind if K else "base alone", str(K) if K else "", *cells])
    return rows


def main() -> None:
    parser = benchmark_parser("Experts as LoRA adapters of one base against a single forward of the base.")
    add_device(parser)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="Bases.")
    parser.add_argument("--experts", nargs="+", type=int, default=[5, 10], help="Routed experts K.")
    parser.add_argument("--top-l", nargs="+", type=int, default=[1, 2], help="Routed experts L of an example.")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="Tokens of an example.")
    parser.add_argument("--repetitions", type=int, default=15, help="Turns.")
    parser.add_argument("--processes", type=int, default=3, help="Processes for each figure of peak memory.")
    parser.add_argument("--no-whole", dest="whole", action="store_false", help="Leave whole experts out.")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.experts, args.tokens, args.repetitions, args.processes = ["MiniLM"], [5], QUICK_TOKENS, 3, 1
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    if args.peak_of:
        shape, kind, K = args.peak_of
        print_peak(shape, kind, int(K), args.tokens)
        return
    rows = [row for shape in args.shapes for row in benchmark_time(shape, args, clock)]
    header = ["base", "model", "K", "L", "experts in use", "ms", "time / base", "parameters, MB", "/ base"]
    print_table(f"Forward of one batch of {args.tokens} tokens: a main expert, and L of K routed ones", header, rows)
    if args.device != "cpu":
        return
    rows = [row for shape in args.shapes for row in benchmark_memory(shape, args)]
    header = ["base", "model", "K", "built, MB", "built / base", "peak, MB", "peak / base"]
    print_table("Growth of resident memory in a process that builds the model and runs it, L = 1", header, rows)


if __name__ == "__main__":
    main()
