"""The floor: federated averaging as a bare PyTorch loop over tensors in memory."""

import torch
from peer_work import enter, trainable


def main() -> None:
    work, gate = enter()
    model = work.model()
    parameters = trainable(model)
    server = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for round_index in range(work.rounds):
        gate.wait(server.copy)
        total = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
        for place in range(work.participants):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(server[name])
            optimizer = work.make_optimizer(parameters.values())
            for batch in work.batches(round_index, place):
                work.loss(model, **batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            for name, parameter in parameters.items():
                total[name].add_(parameter.detach(), alpha=1 / work.participants)
        server = total
    gate.wait(server.copy)
