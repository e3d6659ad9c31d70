"""One file per published method; `base.py` holds the hooks in which they differ."""

from .base import Server, Strategy, Uploads
from .fedavg import FedAvg, FedAvgMovingAverage, FedAvgReserved
from .fedmoe import FedMoE, FedMoESettings
from .fedprox import FedProx
from .relevance import client_mixture, correlate


# The strategies by the name that arguments and command lines use.
STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (FedAvg, FedAvgReserved, FedAvgMovingAverage, FedProx, FedMoE)
}

__all__ = [
    "STRATEGIES",
    "FedAvg",
    "FedAvgMovingAverage",
    "FedAvgReserved",
    "FedMoE",
    "FedMoESettings",
    "FedProx",
    "Server",
    "Strategy",
    "Uploads",
    "client_mixture",
    "correlate",
]
