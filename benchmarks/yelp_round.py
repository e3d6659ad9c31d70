"""
Rounds of Fed-MoE in the shape of the paper's Yelp run (`recipes/yelp_gpt2.yaml`, preset "paper"), by stages, and the
most memory of a process: whole models and LoRA adapters, without DeepSpeed and with its ZeRO 1 to 3.

Experts and clients are GPT-2-medium, the gate is GPT-2; three routed experts, three of 100 clients in a round, bf16.
Weights and texts are random, and clients take a few steps: a round's time is measured, and nothing is learned. The
server's step is the preset's, on a smaller reserved set. Texts are longer than there (64 tokens), and batches larger
(one text).
"""

import argparse
import importlib.util
import itertools
import json
import re
import statistics
import sys
import tempfile
from typing import Any

import torch
from lora_dispatch import resident_kilobytes
from machine import add_device, device_name, launch, print_table, spread
from peft import LoraConfig
from round import random_clients
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback
from transformers.utils import logging

from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.training import FedMoETrainer, FedMoETrainingArguments


EXPERT, GATE = dict(n_layer=24, n_embd=1024, n_head=16), dict(n_layer=12, n_embd=768, n_head=12)
QUICK = dict(n_layer=2, n_embd=64, n_head=2)
CLIENTS, PARTICIPANTS, K, LABELS, RANK = 100, 3, 3, 5, 8
MODELS = {"whole": {}, "lora": {"peft_config": LoraConfig(r=RANK, fan_in_fan_out=True)}}
STAGES = ("clients", "server", "synchronise")


class PeakOfRounds(TrainerCallback):
    """The most memory that was allocated on the GPU from the second round on."""

    bytes = 0

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        if args.device.type == "cuda" and state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()


def gpt2(shape: dict[str, int], num_labels: int) -> GPT2ForSequenceClassification:
    # As the recipe loads it: its activation in one kernel.
    config = GPT2Config(**shape, num_labels=num_labels, pad_token_id=0, activation_function="gelu_pytorch_tanh")
    return GPT2ForSequenceClassification(config)


def run(models: str, stage: int, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each round but the first by stage, and the most memory, of this process."""
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    vocab_size = GPT2Config().vocab_size
    data = random_clients(CLIENTS, args.steps * args.batch_size, args.reserved, args.tokens, vocab_size)
    torch.manual_seed(0)
    expert, gate = (gpt2(QUICK if args.quick else shape, n) for shape, n in ((EXPERT, LABELS), (GATE, K)))
    model = FedMoEForSequenceClassification.from_expert(expert, gate, K, **MODELS[models])
    training = FedMoETrainingArguments(
        folder,
        preset="paper",
        rounds=args.rounds + 1,
        clients_per_round=PARTICIPANTS,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=32,
        optim=args.optim,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        gate_learning_rate=3e-6,
        bf16=True,
        deepspeed={"zero_optimization": {"stage": stage}} if stage else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
    )
    peak = PeakOfRounds()
    trainer = FedMoETrainer(model, training, train_dataset=data, callbacks=[peak])
    trainer.train()
    for report in trainer.rounds:
        if report.refused:
            raise RuntimeError(f"Clients failed: {report.refused}")
    seconds = {name: [report.seconds[name] for report in trainer.rounds[1:]] for name in STAGES}
    return {"seconds": seconds, "peak": peak.bytes or 1024 * resident_kilobytes("VmHWM")}


def launched(models: str, stage: int, args: argparse.Namespace) -> dict[str, Any] | str:
    """Returns what the slowest and the largest process of a run found, or why there was none."""
    with tempfile.TemporaryDirectory() as folder:
        child = ["--child", models, str(stage), folder]
        ended = launch([__file__, *sys.argv[1:], *child], args.processes, stage > 0 or args.processes > 1)
    for process in ended:
        if process.returncode:
            lines = process.stderr.strip().split("\n")
            return re.sub(r"^\[rank\d+\]: ", "", next((line for line in lines[::-1] if "Error: " in line), lines[-1]))
    printed = [process.stdout.split("\n") for process in ended]
    found = [json.loads(next(line for line in lines if line.startswith('{"seconds"'))) for lines in printed]
    seconds = {name: [max(r) for r in zip(*(own["seconds"][name] for own in found), strict=True)] for name in STAGES}
    return {"seconds": seconds, "peak": max(own["peak"] for own in found)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_device(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="What clients train.")
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3], help="Stages; 0 is without DeepSpeed.")
    parser.add_argument("--processes", type=int, default=1, help="Of each run, a GPU for each.")
    parser.add_argument("--threads", type=int, default=1, help="Of each process.")
    parser.add_argument("--rounds", type=int, default=2, help="Rounds that count, after one that does not.")
    parser.add_argument("--steps", type=int, default=10, help="Local steps of a client.")
    parser.add_argument("--batch_size", type=int, default=16, help="Texts of a step.")
    parser.add_argument("--tokens", type=int, default=256, help="Of a text.")
    parser.add_argument("--reserved", type=int, default=256, help="Texts of the reserved set.")
    parser.add_argument("--optim", default="sgd", help="The clients' optimizer.")
    parser.add_argument("--quick", action="store_true", help="Small models and texts: does it run at all?")
    parser.add_argument("--child", nargs=3, help="Models, stage, folder: one process of a run, as JSON.")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size, args.tokens, args.reserved = 2, 4, 16, 40
    if args.child:
        models, stage, folder = args.child
        print(json.dumps(run(models, int(stage), folder, args)))
        return
    print(f"PyTorch {torch.__version__}, {device_name(args.device)}, {args.processes} process(es), {args.optim}")
    if importlib.util.find_spec("deepspeed") is None and any(args.zero):
        print("DeepSpeed is not installed (`pip install hf_fedmoe[deepspeed]`): no ZeRO.")
        args.zero = [0]
    rows, first = [], None
    for models, stage in itertools.product(args.models, args.zero):
        rows.append([models, f"ZeRO {stage}" if stage else "no DeepSpeed"])
        found = launched(models, stage, args)
        if isinstance(found, str):
            rows[-1] += [*[""] * 7, found]
        else:
            rounds = [sum(parts) for parts in zip(*found["seconds"].values(), strict=True)]
            now = statistics.median(rounds), found["peak"]
            first = first or now
            times = [spread(values) for values in (*found["seconds"].values(), rounds)]
            shares = [f"{own / reference:.2f}" for own, reference in zip(now, first, strict=True)]
            rows[-1] += [*times, shares[0], f"{found['peak'] / 1e9:.2f}", shares[1], ""]
        print(*rows[-1], flush=True)  # if something ends this before the table
    seconds = [f"{name}, s" for name in (*STAGES, "round")]
    header = ["clients train", "", *seconds, "/ first row", "peak memory, GB", "/ first row", "refused"]
    where = "allocated on the GPU in these rounds" if args.device == "cuda" else "of the process on the host"
    shape = f"{args.steps} steps of {args.batch_size} texts of {args.tokens} tokens, {args.reserved} reserved texts"
    print_table(f"A round of {PARTICIPANTS} clients, {shape}; peak memory {where}", header, rows)


if __name__ == "__main__":
    main()
