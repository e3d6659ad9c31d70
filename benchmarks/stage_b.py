"""
Measures what the server does with clients' models (Stage B of Fed-MoE): fusing, training the gate, and inference.

Every figure is a ratio to a reference that runs in turns with it: plain Python over state dicts for fusion, experts
recomputed in every step for the gate, the dense mixture for inference.

Shape suffixes: S experts (one main, K routed), m uploads, P elements of a row, T inner iterations.
"""

import argparse
from collections.abc import Callable
from functools import partial

import datasets
import numpy as np
import torch
from machine import (
    add_device,
    alternate,
    benchmark_parser,
    copy_candidate,
    pin_threads,
    print_table,
    ratios,
    spread,
)
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, default_data_collator
from transformers.utils import logging

from hf_fedmoe.data import ReservedSet
from hf_fedmoe.models import FedMoEForSequenceClassification, gating_entropy
from hf_fedmoe.strategies import Server, ServerStep
from hf_fedmoe.strategies.gate_training import fit_gate
from hf_fedmoe.strategies.server_training import expert_outputs
from hf_fedmoe.weights import StateLayout, collapse, fuse_


GPT2_SIZES = {
    "1M": dict(n_layer=2, n_embd=64, n_head=2, vocab_size=10_000),
    "21M": dict(n_layer=4, n_embd=320, n_head=5),
    "124M": dict(n_layer=12, n_embd=768, n_head=12),
}
VOCAB_SIZE, RATE, T = 8000, 0.3, 5


class Fusion:
    """A bank and uploads with the shapes of a GPT-2 and the ways to fuse them, all on the same memory."""

    def __init__(self, size: str, K: int, device: str):
        config = GPT2Config(**GPT2_SIZES[size], num_labels=4, pad_token_id=0)
        torch.manual_seed(0)
        with torch.device("meta"):
            self.experts = [GPT2ForSequenceClassification(config) for _ in range(K + 1)]
        self.layout = StateLayout.of(self.experts[0])
        self.bank_SP = torch.randn(1, self.layout.size, device=device).repeat(K + 1, 1)
        self.uploads_mP = torch.randn(1, self.layout.size, device=device).repeat(K, 1)
        for expert, row_P in zip(self.experts, self.bank_SP, strict=True):
            expert.load_state_dict(self.layout.views(row_P), assign=True)
        self.uploads = [self.layout.views(row_P) for row_P in self.uploads_mP]
        self.weights_TSm = RATE * torch.rand(T, K + 1, K, device=device).softmax(-1)
        self.keep_S = torch.full((K + 1,), 1 - RATE, device=device)
        self.bytes_moved = 2 * self.bank_SP.nbytes + self.uploads_mP.nbytes

    def as_rows(self) -> None:
        fuse_(self.bank_SP, self.uploads_mP, self.weights_TSm[0], self.keep_S)

    @torch.no_grad()
    def as_state_dicts(self) -> None:
        """Fuses as federated code usually does."""
        for expert, weights_m, keep in zip(self.experts, self.weights_TSm[0].tolist(), self.keep_S, strict=True):
            state = expert.state_dict()
            fused = {}
            for key in state:
                mean = sum(w * upload[key] for w, upload in zip(weights_m, self.uploads, strict=True))
                fused[key] = keep * state[key] + mean
            expert.load_state_dict(fused)

    @torch.no_grad()
    def as_state_dicts_in_place(self) -> None:
        """Fuses by the loop of somebody who avoids temporary tensors."""
        for expert, weights_m, keep in zip(self.experts, self.weights_TSm[0].tolist(), self.keep_S, strict=True):
            for key, tensor in expert.state_dict().items():
                tensor.mul_(keep)
                for w, upload in zip(weights_m, self.uploads, strict=True):
                    tensor.add_(upload[key], alpha=w)

    def t_single(self) -> None:
        for weights_Sm in self.weights_TSm:
            fuse_(self.bank_SP, self.uploads_mP, weights_Sm, self.keep_S)

    def t_collapsed(self) -> None:
        fuse_(self.bank_SP, self.uploads_mP, *collapse(self.weights_TSm, self.keep_S))

    def check(self) -> None:
        """All ways give the same numbers."""
        start_SP, results = self.bank_SP.clone(), []
        for fuse in (self.as_rows, self.as_state_dicts, self.as_state_dicts_in_place):
            self.bank_SP.copy_(start_SP)
            fuse()
            results.append({key: tensor.clone() for key, tensor in self.experts[-1].state_dict().items()})
        for key, tensor in results[0].items():
            for other in results[1:]:
                torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5)


def benchmark_fusion(args: argparse.Namespace, clock: Callable[[], float]) -> None:
    times, rates, collapsed = [], [], []
    for size, K in [(size, K) for size in args.sizes for K in args.experts]:
        case = Fusion(size, K, args.device)
        case.check()
        copy, copy_bytes = copy_candidate(min(case.bank_SP.nbytes, 2**28), args.device)
        ways = {"rows": case.as_rows, "in place": case.as_state_dicts_in_place, "loop": case.as_state_dicts}
        seconds = alternate({"copy": copy, **ways}, args.repetitions, clock)
        against = [spread(ratios(seconds[name], seconds["rows"]), digits=1) for name in ("loop", "in place")]
        times.append([size, str(K), *(spread(seconds[way], 1e3) for way in reversed(ways)), *against])
        copy_rate = [copy_bytes / s / 1e9 for s in seconds["copy"]]
        fuse_rate = [case.bytes_moved / s / 1e9 for s in seconds["rows"]]
        share = spread(ratios(fuse_rate, copy_rate), 100, 0)
        rates.append([size, str(K), spread(fuse_rate, digits=1), spread(copy_rate, digits=1), share])
        seconds = alternate({"single": case.t_single, "collapsed": case.t_collapsed}, args.repetitions, clock)
        collapsed.append([size, str(K), *(spread(values, 1e3) for values in seconds.values())])
        collapsed[-1].append(spread(ratios(seconds["single"], seconds["collapsed"])))
    header = ["model", "K = m", "loop, ms", "in-place loop, ms", "fuse_, ms", "loop / fuse_", "in-place / fuse_"]
    print_table("Fusion: rows against loops over state dicts", header, times)
    print_table("Fusion: memory moved", ["model", "K = m", "fuse_, GB/s", "copy, GB/s", "% of copy"], rates)
    header = ["model", "K = m", f"{T} fuse_, ms", "collapsed, ms", f"ratio (expected {T})"]
    print_table(f"T = {T} fusions of the same uploads, one by one against collapsed", header, collapsed)


def small_mixture(K: int, args: argparse.Namespace) -> FedMoEForSequenceClassification:
    shape = dict(n_layer=args.layers, n_embd=args.hidden, n_head=args.hidden // 32, vocab_size=VOCAB_SIZE)
    torch.manual_seed(0)
    expert = GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=4, pad_token_id=0))
    model = FedMoEForSequenceClassification.from_expert(expert, gate="main_features", num_routed_experts=K)
    nn.init.normal_(model.gate.weight)  # routes differently from example to example
    return model.to(args.device)


def random_examples(count: int, tokens: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    columns = {"input_ids": rng.integers(1, VOCAB_SIZE, (count, tokens)), "label": rng.integers(0, 4, count)}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def gate_without_cache(server: Server, reserved: ReservedSet, epochs: int) -> None:
    """Takes the steps with the frozen experts run again in each."""
    model = server.model
    parameters = [*model.gate.parameters(), model.alpha_logit]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for _ in range(epochs):
        for indices in torch.randperm(len(reserved)).split(32):
            output = model(**reserved.batch(indices), dense=True)
            (output.loss + 1e-3 * gating_entropy(output.gate_probs)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def gate_with_cache(server: Server, reserved: ReservedSet, epochs: int) -> None:
    """As a round does, on a GPU by CUDA graphs."""
    captured = {} if server.bank_SP.is_cuda else None
    step = ServerStep(server, reserved, 0, seed=0, captured=captured)
    fit_gate(step, expert_outputs(step), epochs, 1e-3, 0.0, 32, 1e-3, 0.0, 0)


def benchmark_gate(args: argparse.Namespace, clock: Callable[[], float]) -> None:
    reserved = ReservedSet(random_examples(256, 32), default_data_collator, 32, args.device)
    rows = []
    for K, epochs in [(K, epochs) for K in args.experts for epochs in args.epochs]:
        model = small_mixture(K, args)
        layout = StateLayout.of(model.experts[0])
        bank_SP = layout.bank(model.experts)
        for expert in model.experts:
            expert.requires_grad_(False)
        server = Server(model, model.experts[0], layout, bank_SP, [])
        ways = {"recomputed": gate_without_cache, "cached": gate_with_cache}
        candidates = {name: partial(way, server, reserved, epochs) for name, way in ways.items()}
        seconds = alternate(candidates, min(3, args.repetitions), clock)
        times = [spread(values, 1e3) for values in seconds.values()]
        rows.append([str(K), str(epochs), *times, spread(ratios(seconds["recomputed"], seconds["cached"]))])
    header = ["K", "epochs", "recomputed, ms", "cached, ms", "ratio (at most: epochs)"]
    print_table("Gate on 256 reserved examples; the cached time includes the one pass of the experts", header, rows)


def benchmark_inference(args: argparse.Namespace, clock: Callable[[], float]) -> None:
    inputs, rows = {"input_ids": random_examples(64, 64)["input_ids"][:].to(args.device)}, []
    for K in args.experts:
        model = torch.inference_mode()(small_mixture(K, args).forward)
        candidates = {name: partial(model, **inputs, top_l=1, dense=name == "dense") for name in ("dense", "sparse")}
        seconds = alternate(candidates, args.repetitions, clock)
        times = [spread(values, 1e3) for values in seconds.values()]
        rows.append([str(K), *times, spread(ratios(seconds["sparse"], seconds["dense"])), f"{2 / (1 + K):.2f}"])
    header = ["K", "dense, ms", "L = 1, ms", "L = 1 / dense", "(1 + L) / (1 + K)"]
    print_table('Inference on 64 examples of 64 tokens, gate="main_features"', header, rows)


def main() -> None:
    parser = benchmark_parser("Fusion, gate training and inference of Fed-MoE against plain references.")
    add_device(parser)
    parser.add_argument("--sizes", nargs="+", default=["21M"], choices=GPT2_SIZES, help="GPT-2 shapes to fuse.")
    parser.add_argument("--experts", nargs="+", type=int, default=[3, 5], help="Routed experts K, and uploads m.")
    parser.add_argument("--epochs", nargs="+", type=int, default=[3], help="Epochs of the gate.")
    parser.add_argument("--layers", type=int, default=2, help="Layers of the experts of gate and inference.")
    parser.add_argument("--hidden", type=int, default=128, help="Their width.")
    parser.add_argument("--repetitions", type=int, default=5, help="Turns of each pair.")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.experts, args.epochs, args.hidden, args.repetitions = ["1M"], [3], [3], 64, 3
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    benchmark_fusion(args, clock)
    benchmark_gate(args, clock)
    benchmark_inference(args, clock)


if __name__ == "__main__":
    main()
