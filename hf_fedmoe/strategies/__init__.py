"""One file per published method; [`Strategy`] has the hooks in which they differ."""

from ..federation import (
    ClientTask,
    JointWork,
    Server,
    ServerStep,
    Strategy,
    Uploads,
    Work,
    has_own_loss,
    has_plain_clients,
    held_near,
    own_loss,
)
from .afl import AFL
from .apfl import APFL
from .clustered import ClusteredFL
from .decentralised import Decentralised
from .fedavg import FedAvg, FedAvgMovingAverage, FedAvgReserved
from .fedavg_adjusted import FedAvgAdjusted
from .fedavg_plus import FedAvgPlus
from .fedem import FedEM
from .fedjets import FedJETs, freeze_common_expert
from .fedmix import FedMix
from .fedmoe import FedMoE, FedMoESettings
from .fedmoe_groups import FedMoEGroups
from .fedopt import FedAdagrad, FedAdam, FedYogi
from .fedprox import FedProx
from .fedrep import FedRep
from .fedrolex import FedRolex, HeteroFL
from .gate_training import GateFit
from .ifca import IFCA
from .l2sgd import L2SGD
from .local import Local
from .owners import Owners
from .pfedme import PFedMe
from .pfedmm import PFedMM
from .pfedmoe import PFedMoE, pfedmoe_cnns
from .qffl import QFFL
from .relevance import client_mixture, correlate
from .scaffold import Scaffold
from .setting_kinds import check_setting_kinds
from .zero_gate import ZeroGateFit


__all__ = [
    "AFL",
    "APFL",
    "IFCA",
    "L2SGD",
    "QFFL",
    "ClientTask",
    "ClusteredFL",
    "Decentralised",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgAdjusted",
    "FedAvgMovingAverage",
    "FedAvgPlus",
    "FedAvgReserved",
    "FedEM",
    "FedJETs",
    "FedMix",
    "FedMoE",
    "FedMoEGroups",
    "FedMoESettings",
    "FedProx",
    "FedRep",
    "FedRolex",
    "FedYogi",
    "GateFit",
    "HeteroFL",
    "JointWork",
    "Local",
    "Owners",
    "PFedMM",
    "PFedMe",
    "PFedMoE",
    "Scaffold",
    "Server",
    "ServerStep",
    "Strategy",
    "Uploads",
    "Work",
    "ZeroGateFit",
    "check_setting_kinds",
    "client_mixture",
    "correlate",
    "freeze_common_expert",
    "has_own_loss",
    "has_plain_clients",
    "held_near",
    "own_loss",
    "pfedmoe_cnns",
]
