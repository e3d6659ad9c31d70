"""
Flower's simulation in this process: Ray with one actor of one CPU, `FedAvg` of its message API.

Kind to Flower: the actor keeps data and model from client to client, only what is trained travels, and each of as many
nodes as there are participants plays the client that was drawn.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peer_work import Gate, Work, enter, trainable
from torch import nn


client_app = ClientApp()


@cache
def kept(folder: str) -> tuple[Work, nn.Module]:
    work = Work(Path(folder))
    return work, work.model()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    work, model = kept(config["folder"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    parameters = trainable(model)
    optimizer, total = work.make_optimizer(parameters.values()), torch.zeros(())
    batches = list(work.batches(config["server-round"] - 1, int(context.node_config["partition-id"])))
    for batch in batches:
        loss = work.loss(model, **batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    content = {
        "arrays": ArrayRecord({name: parameter.detach() for name, parameter in parameters.items()}),
        "metrics": MetricRecord({"loss": total.item() / len(batches), "num-examples": work.examples}),
    }
    return Message(content=RecordDict(content), reply_to=message)


class GatedFedAvg(FedAvg):
    def __init__(self, gate: Gate, participants: int):
        nodes = dict(min_train_nodes=participants, min_available_nodes=participants)
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, **nodes)
        self.gate = gate

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.gate.wait(arrays.to_torch_state_dict)
        return super().configure_train(server_round, arrays, config, grid)


def main() -> None:
    work, gate = enter()
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        start = {name: parameter.detach() for name, parameter in trainable(work.model()).items()}
        result = GatedFedAvg(gate, work.participants).start(
            grid,
            ArrayRecord(start),
            num_rounds=work.rounds,
            train_config=ConfigRecord({"folder": str(work.folder)}),
        )
        gate.wait(result.arrays.to_torch_state_dict)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app, client_app, work.participants, backend_config=resources)
