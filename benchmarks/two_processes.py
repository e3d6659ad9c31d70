"""
Measures what a second process saves: rounds of Fed-MoE and FedAvg with one thread in one process and in two, in turns.

Every stage ends when the slowest process is through. Its processor time, without the time in which it waits for a core
or for the others, is what the stage takes on a machine with a core for each, and what a busy machine can tell.

Then what memory Fed-MoE's uploads take in each of two processes, by peaks of runs with few clients and with many.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from machine import StageClock, launch, print_table, ratios, spread
from round import BATCH_SIZE, TOKENS, VOCAB_SIZE, random_clients
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback
from transformers.utils import logging

from hf_fedmoe.federation import EachItsOwn, Federation, Together
from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.strategies import FedAvg, FedMoE
from hf_fedmoe.training import FederatedTrainer, FedMoETrainingArguments


METHODS = ("FedAvg", "Fed-MoE")
STAGES = [
    (EachItsOwn, "fit", "clients"),
    (Together, "fit", "clients"),
    (Federation, "server_step", "server"),
    (Federation, "synchronise", "synchronise"),
    (Federation, "finish", "end"),
]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
FEW, MANY, WIDE = 4, 20, 512
MEGABYTE = 2**20


class FromTheSecondRound(TrainerCallback):
    """Starts the clocks when the first round has warmed up."""

    def __init__(self, stack: ExitStack):
        self.stack = stack
        self.clocks = {name: StageClock(STAGES, clock) for name, clock in CLOCKS.items()}

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step == 1:
            for clock in self.clocks.values():
                self.stack.enter_context(clock)


def run(method: str, folder: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """
    Seconds of this process by clock and stage, of a round, but for what comes after the last one; the most memory that
    it had, and the size of an upload, in MB.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = random_clients(args.clients, args.examples, args.reserved)
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_embd=args.hidden, n_head=args.hidden // 32, n_positions=TOKENS)
    config = dict(**shape, vocab_size=VOCAB_SIZE, pad_token_id=0)
    model = GPT2ForSequenceClassification(GPT2Config(**config, num_labels=4))
    if method == "Fed-MoE":
        gate = GPT2ForSequenceClassification(GPT2Config(**config, num_labels=3)) if args.gate == "model" else args.gate
        model = FedMoEForSequenceClassification.from_expert(model, gate, num_routed_experts=3)
    training = FedMoETrainingArguments(
        folder,
        rounds=args.rounds + 1,
        clients_per_round=args.clients,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=32,
        client_parallelism=args.parallelism,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    strategy = FedMoE() if method == "Fed-MoE" else FedAvg()
    with ExitStack() as stack:
        timing = FromTheSecondRound(stack)
        trainer = FederatedTrainer(model, training, data, strategy, callbacks=[timing])
        trainer.train()
    seconds = {
        name: {stage: clock.seconds[stage] / (1 if stage == "end" else args.rounds) for *_, stage in STAGES}
        for name, clock in timing.clocks.items()
    }
    upload = sum(parameter.nbytes for parameter in strategy.server_models(model)[0].parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds | {"memory": {"peak": peak / MEGABYTE, "upload": upload / MEGABYTE}}


def found_by(method: str, count: int, *changes: str) -> list[dict[str, dict[str, float]]]:
    """Returns what each of `count` processes of a run found."""
    with tempfile.TemporaryDirectory() as folder:
        ended = launch([__file__, "--child", method, folder, *sys.argv[1:], *changes], count, count > 1)
    for process in ended:
        if process.returncode:
            sys.exit(process.stderr)
    return [json.loads(process.stdout.strip().split("\n")[-1]) for process in ended]


def slowest(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {name: {stage: max(own[name][stage] for own in found) for stage in found[0][name]} for name in CLOCKS}


def print_memory(few: int, many: int, width: int) -> None:
    rows = []
    for parallelism in ("clients", "sums"):
        sizes = ("--parallelism", parallelism, "--hidden", str(width), "--examples", "10", "--rounds", "1")
        peaks = []
        for clients in (few, many):
            found = found_by("Fed-MoE", 2, "--clients", str(clients), *sizes)
            peaks.append([own["memory"]["peak"] for own in found])
        upload = found[0]["memory"]["upload"]
        for name, less, more in zip(("main", "other"), *peaks, strict=True):
            kept = (more - less) / upload
            rows.append([f'"{parallelism}"', name, f"{less:.0f}", f"{more:.0f}", f"{kept:.1f}"])
    header = ["", "process", f"{few} clients, MB", f"{many} clients, MB", f"uploads kept of {many - few} more"]
    print_table(f"Fed-MoE, peak memory, uploads of {upload:.0f} MB", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--clients", type=int, default=4, help="Clients of a round.")
    parser.add_argument("--examples", type=int, default=100, help="Examples of a client.")
    parser.add_argument("--reserved", type=int, default=128, help="Reserved examples.")
    parser.add_argument("--hidden", type=int, default=128, help="Width of the two-layer GPT-2 classifier.")
    parser.add_argument("--rounds", type=int, default=2, help="Rounds that count, after one that does not.")
    parser.add_argument("--turns", type=int, default=3, help="Runs of each kind.")
    parser.add_argument("--parallelism", default="clients", help="`client_parallelism` of the timed runs.")
    gates = ("main_features", "model")
    parser.add_argument("--gate", choices=gates, default=gates[0], help="Of Fed-MoE: a layer, or a GPT-2 as well.")
    parser.add_argument("--quick", action="store_true", help="Small sizes, one turn: does it run at all?")
    parser.add_argument("--child", nargs=2, help="Method, folder: one process of a run, as JSON.")
    args = parser.parse_args()
    if args.quick:
        args.examples, args.reserved, args.hidden, args.rounds, args.turns = 20, 64, 64, 1, 1
    if args.child:
        print(json.dumps(run(*args.child, args)))
        return
    for method in METHODS:
        turns = [[slowest(found_by(method, count)) for count in (1, 2)] for _ in range(args.turns)]
        rows = []
        for stage in ["clients", "server", "synchronise", "round", "end"]:
            parts = ["clients", "server", "synchronise"] if stage == "round" else [stage]
            cells = []
            for clock in CLOCKS:
                one, two = ([sum(turn[i][clock][part] for part in parts) for turn in turns] for i in (0, 1))
                # What is done in no time takes some time to agree on.
                ratio = spread(ratios(one, two)) if min(one) > 1e-3 else ""
                cells += [spread(one, 1e3, 0), spread(two, 1e3, 0), ratio]
            rows.append([stage, *cells])
        header = [
            "",
            *(f"{what}, {clock}" for clock in CLOCKS for what in ("1 process, ms", "2 processes, ms", "1 / 2")),
        ]
        print_table(f"{method}, a round of {args.clients} clients, and the end", header, rows)
    print_memory(FEW, MANY, args.hidden if args.quick else WIDE)


if __name__ == "__main__":
    main()
