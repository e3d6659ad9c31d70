"""The round: drawing clients, sending, local training, receiving, the client store, checkpoints."""

from .batch_reader import BatchReader
from .checkpoint import check_identity, load_federation, read_manifest, save_federation
from .client_choice import CLIENT_CHOICES
from .client_store import ClientStore
from .files import atomic_directory
from .local_training import LocalTrainer, scale_learning_rates
from .processes import Processes, balance, leave_group
from .randomness import Stream, seed_of
from .round import Federation, RoundReport
from .server_step import take_step
from .soundness import BrokenPromiseError, check_start, computes_finite, sound_finish
from .stacked_training import StackedTrainer
from .team import Team
from .zero import ZeroTrainer
from .zero_gate import ZeroGateFit


__all__ = [
    "CLIENT_CHOICES",
    "BatchReader",
    "BrokenPromiseError",
    "ClientStore",
    "Federation",
    "LocalTrainer",
    "Processes",
    "RoundReport",
    "StackedTrainer",
    "Stream",
    "Team",
    "ZeroGateFit",
    "ZeroTrainer",
    "atomic_directory",
    "balance",
    "check_identity",
    "check_start",
    "computes_finite",
    "leave_group",
    "load_federation",
    "read_manifest",
    "save_federation",
    "scale_learning_rates",
    "seed_of",
    "sound_finish",
    "take_step",
]
