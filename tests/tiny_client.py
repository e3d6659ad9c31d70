"""One client that can be followed by hand: a model of one weight, plain SGD, float64."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import default_collate
from transformers import TrainingArguments

from hf_fedmoe.federation import LocalTrainer
from hf_fedmoe.strategies import ClientTask, Server, Strategy
from hf_fedmoe.weights import Payload, StateLayout


class Slope(nn.Module):
    """loss = mean of (w x - y)^2 / 2, whose gradient is mean of (w x - y) x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor, y: torch.Tensor):
        return type("Output", (), {"loss": ((self.w * x - y) ** 2 / 2).mean()})


def tiny_local(output_dir, strategy: Strategy, learning_rate: float = 0.1, **changes) -> LocalTrainer:
    args = TrainingArguments(
        output_dir=str(output_dir),
        learning_rate=learning_rate,
        use_cpu=True,
        max_grad_norm=0.0,
        report_to="none",
        **{"num_train_epochs": 1, "per_device_train_batch_size": 8} | changes,
    )
    accelerator = Accelerator(cpu=True)

    def make_optimizer(worker):
        optimizer = torch.optim.SGD(worker.parameters(), learning_rate)
        return accelerator.prepare_optimizer(optimizer, device_placement=False)

    def constant(optimizer, num_steps):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    worker = Slope()
    layout = StateLayout.of(worker)
    return LocalTrainer(
        worker, layout, strategy, args, default_collate, make_optimizer(worker), constant, accelerator, make_optimizer
    )


def tiny_task(local: LocalTrainer, w: float, examples: list[tuple[float, float]], **kept: torch.Tensor) -> ClientTask:
    """A client with these (x, y), which received the weight `w`."""
    dataset = [
        {"x": torch.tensor(x, dtype=torch.float64), "y": torch.tensor(y, dtype=torch.float64)} for x, y in examples
    ]
    return ClientTask(0, 0, dataset, Payload(row(local, w)), row(local, 0.0), 3, kept)


def row(local: LocalTrainer, w: float) -> torch.Tensor:
    row_P = torch.zeros(local.layout.size, dtype=torch.float64)
    row_P[0] = w
    return row_P


def tiny_server(local: LocalTrainer, w: float) -> Server:
    model = Slope()
    bank_SP = local.layout.bank([model])
    bank_SP[0, 0] = w
    return Server(model, Slope(), local.layout, bank_SP, [{}])
