"""One file per published method; `base.py` holds the hooks in which they differ."""

from .base import ClientTask, Server, Strategy, Uploads
from .fedavg import FedAvg, FedAvgMovingAverage, FedAvgReserved
from .fedmoe import FedMoE, FedMoESettings
from .fedprox import FedProx
from .relevance import client_mixture, correlate


__all__ = [
    "ClientTask",
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
