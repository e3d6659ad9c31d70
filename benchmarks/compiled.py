"""
Measures what `torch_compile=True` saves of a local step, and costs before: eager and compiled workers, in turns.

Both are trained as a client is: forward, backward, clipping, AdamW. The worker is compiled in place, as local training
does it.
"""

import time

import torch
from machine import add_device, alternate, benchmark_parser, pin_threads, print_table, ratios, spread
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.utils import logging

from hf_fedmoe.models import SmallCNNConfig, SmallCNNForImageClassification


class Steps:
    """Some steps of one model on one batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], count: int, device: str):
        self.model, self.count = model.train().to(device), count
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
        self.losses: list[float] = []

    def __call__(self) -> None:
        for _ in range(self.count):
            loss = self.model(**self.batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss.item())


def gpt2() -> nn.Module:
    # Dropout draws other masks in compiled code.
    shape = dict(n_layer=2, n_embd=128, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokens = dict(vocab_size=2000, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    return GPT2ForSequenceClassification(GPT2Config(**shape, **tokens, num_labels=4))


def texts(size: int) -> dict[str, Tensor]:
    input_ids = torch.randint(1, 2000, (size, 32))
    labels = torch.randint(0, 4, (size,))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def small_cnn(**config) -> nn.Module:
    return SmallCNNForImageClassification(SmallCNNConfig(**config))


def images(size: int, channels: int, width: int, num_labels: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, channels, width, width), "labels": torch.randint(num_labels, (size,))}


MODELS = {
    "GPT-2, 2 layers of 128, 10 texts of 32 tokens": lambda: (gpt2(), texts(10)),
    "CNN of 0.2M, 10 images of 32x32": lambda: (
        small_cnn(image_size=32, num_channels=3, num_labels=10, padding=0, channels=[16, 32], hidden_size=256),
        images(10, 3, 32, 10),
    ),
    "CNN of 6.6M, 64 images of 28x28": lambda: (
        small_cnn(image_size=28, num_channels=1, num_labels=62),
        images(64, 1, 28, 62),
    ),
}


def main() -> None:
    parser = benchmark_parser("A local step of compiled workers against eager ones.")
    add_device(parser)
    parser.add_argument("--steps", type=int, default=20, help="Steps of a turn.")
    parser.add_argument("--repetitions", type=int, default=7, help="Turns that count, after one that does not.")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repetitions = 3, 2
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    rows = []
    for name, make in MODELS.items():
        candidates = {}
        for kind in ("eager", "compiled"):
            torch.manual_seed(0)
            model, batch = make()
            if kind == "compiled":
                model.compile()
            candidates[kind] = Steps(model, batch, args.steps, args.device)
        started = time.perf_counter()
        Steps(candidates["compiled"].model, candidates["compiled"].batch, 1, args.device)()
        first = time.perf_counter() - started
        Steps(candidates["eager"].model, candidates["eager"].batch, 1, args.device)()
        seconds = alternate(candidates, args.repetitions, clock)
        gap = max(abs(a - b) for a, b in zip(candidates["eager"].losses, candidates["compiled"].losses, strict=True))
        milliseconds = [spread(seconds[kind], 1e3 / args.steps) for kind in candidates]
        gain = ratios(seconds["eager"], seconds["compiled"])
        rows.append([name, *milliseconds, spread(gain), f"{first:.0f}", f"{gap:.0e}"])
    header = ["", "eager, ms", "compiled, ms", "eager / compiled", "first step, s", "largest gap of losses"]
    print_table("A local step", header, rows)


if __name__ == "__main__":
    main()
