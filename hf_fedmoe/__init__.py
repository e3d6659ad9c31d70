"""Federated learning with a server-side Mixture-of-Experts, in Hugging Face terms."""

import sys
from pathlib import PurePath

from .lazy_names import lazy_names


__version__ = "0.1.0"

# The room of each name that is offered here. A room is imported with the first of its names.
_ROOMS = {
    "FedMoECausalConfig": "models",
    "FedMoEConfig": "models",
    "FedMoEForCausalLM": "models",
    "FedMoEForImageClassification": "models",
    "FedMoEForSequenceClassification": "models",
    "SmallImageProcessor": "models",
    "client_prior": "models",
    "TextStatistics": "models",
    "text_statistics": "models",
    "AUGMENTATIONS": "data",
    "FederatedDataset": "data",
    "FederatedTexts": "data",
    "ImageCollator": "data",
    "decode_images": "data",
    "dirichlet": "data",
    "hold_out_client_tests": "data",
    "iid": "data",
    "load_source": "data",
    "natural": "data",
    "pachinko": "data",
    "predominant": "data",
    "shards": "data",
    "token_rows": "data",
    "Server": "federation",
    "ServerStep": "federation",
    "Strategy": "federation",
    "Uploads": "federation",
    "AFL": "strategies",
    "APFL": "strategies",
    "ClusteredFL": "strategies",
    "Decentralised": "strategies",
    "FedAdagrad": "strategies",
    "FedAdam": "strategies",
    "FedAvg": "strategies",
    "FedAvgAdjusted": "strategies",
    "FedAvgMovingAverage": "strategies",
    "FedAvgPlus": "strategies",
    "FedAvgReserved": "strategies",
    "FedEM": "strategies",
    "FedJETs": "strategies",
    "FedMix": "strategies",
    "FedMoE": "strategies",
    "FedMoEGroups": "strategies",
    "FedMoESettings": "strategies",
    "FedProx": "strategies",
    "FedRep": "strategies",
    "FedRolex": "strategies",
    "FedYogi": "strategies",
    "HeteroFL": "strategies",
    "IFCA": "strategies",
    "L2SGD": "strategies",
    "Local": "strategies",
    "Owners": "strategies",
    "PFedMM": "strategies",
    "PFedMe": "strategies",
    "PFedMoE": "strategies",
    "QFFL": "strategies",
    "Scaffold": "strategies",
    "diagnose": "reporting",
    "plot_clients": "reporting",
    "FedMoETrainer": "training",
    "FederatedTrainer": "training",
    "FedMoETrainingArguments": "training",
    "FederatedTrainingArguments": "training",
    "evaluate_metrics": "training",
    "compare": "experiments",
}

__all__ = list(_ROOMS)

# `import hf_fedmoe` registers the Auto classes. Only the command `hf-fedmoe` leaves that to what it calls: with them
# comes torch, and a mistyped word would be answered after seconds.
if PurePath(*sys.argv[:1]).name != "hf-fedmoe":
    from . import models  # noqa: F401

__getattr__, __dir__ = lazy_names(__name__, _ROOMS)
