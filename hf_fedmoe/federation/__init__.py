"""The round: drawing clients, sending, local training, receiving, the client store, checkpoints."""

from .batch_reader import BatchReader
from .checkpoint import has_federation, load_federation, read_identity, save_federation
from .client_choice import CLIENT_CHOICES
from .client_clock import ClientClock
from .client_store import ClientStore
from .files import FileDigest, atomic_directory, remove_directory, remove_leftovers
from .folder_lock import FolderLock
from .local_training import LocalTrainer, Loss, StepBatches, local_steps, scale_learning_rates
from .manifest import UnreadableManifestError, find_faults, has_manifest, read_manifest, write_manifest
from .processes import Processes, balance, leave_group
from .randomness import Stream, seed_of
from .refusals import client_number, never_accepted, reasons
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
    "ClientClock",
    "ClientStore",
    "Federation",
    "FileDigest",
    "FolderLock",
    "LocalTrainer",
    "Loss",
    "Processes",
    "RoundReport",
    "StackedTrainer",
    "StepBatches",
    "Stream",
    "Team",
    "UnreadableManifestError",
    "ZeroGateFit",
    "ZeroTrainer",
    "atomic_directory",
    "balance",
    "check_start",
    "client_number",
    "computes_finite",
    "find_faults",
    "has_federation",
    "has_manifest",
    "leave_group",
    "load_federation",
    "local_steps",
    "never_accepted",
    "read_identity",
    "read_manifest",
    "reasons",
    "remove_directory",
    "remove_leftovers",
    "save_federation",
    "scale_learning_rates",
    "seed_of",
    "sound_finish",
    "take_step",
    "write_manifest",
]
