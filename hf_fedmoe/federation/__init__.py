"""The round: drawing clients, sending, local training, receiving, the client store, checkpoints."""

from .batch_reader import BatchReader
from .captured_passes import CapturedPasses, Pass
from .checkpoint import has_federation, load_federation, read_identity, save_federation
from .client_choice import CLIENT_CHOICES
from .client_clock import ClientClock
from .client_store import ClientStore
from .contract import (
    ClientTask,
    JointWork,
    Server,
    ServerStep,
    Strategy,
    Track,
    Uploads,
    Work,
    has_plain_clients,
    overrides,
    untracked,
    warmed_up,
)
from .defence import ROBUST_FUSIONS, Defence, make_defence
from .engines import EachItsOwn, EngineArguments, SomeAtOnce, Together, TogetherByZero
from .example_privacy import ExamplePrivacy, PoissonDraw, PrivateUpdates, opacus, poisson_draw
from .files import FileDigest, atomic_directory, read_json, remove_directory, remove_leftovers, write_json
from .filters import Filter, make_filters
from .folder_lock import FolderLock
from .local_training import LocalTrainer, Loss, StepBatches, local_steps, scale_learning_rates
from .local_updates import CapturedUpdates
from .manifest import UnreadableManifestError, find_faults, has_manifest, read_manifest, write_manifest
from .noise import seeded_normals, system_normals
from .objective import LocalObjective, has_own_loss, held_near, own_loss
from .only_sums import methods_of_sums, why_not_private, why_not_summed
from .participants import Participants
from .private_mean import AdaptiveNorm, FixedNorm, GaussianMean, PlainMean
from .process_group import ProcessGroup
from .processes import Processes, balance, leave_group
from .randomness import Stream, seed_of
from .refusals import client_number, never_accepted, reasons
from .round import Federation, RoundReport
from .server_step import take_step
from .soundness import BrokenPromiseError, check_start, computes_finite, sound_finish
from .stacked_training import StackedTraining
from .zero_engine import ZeroEngine
from .zero_training import ZeroTraining


__all__ = [
    "CLIENT_CHOICES",
    "ROBUST_FUSIONS",
    "AdaptiveNorm",
    "BatchReader",
    "BrokenPromiseError",
    "CapturedPasses",
    "CapturedUpdates",
    "ClientClock",
    "ClientStore",
    "ClientTask",
    "Defence",
    "EachItsOwn",
    "EngineArguments",
    "ExamplePrivacy",
    "Federation",
    "FileDigest",
    "Filter",
    "FixedNorm",
    "FolderLock",
    "GaussianMean",
    "JointWork",
    "LocalObjective",
    "LocalTrainer",
    "Loss",
    "Participants",
    "Pass",
    "PlainMean",
    "PoissonDraw",
    "PrivateUpdates",
    "ProcessGroup",
    "Processes",
    "RoundReport",
    "Server",
    "ServerStep",
    "SomeAtOnce",
    "StackedTraining",
    "StepBatches",
    "Strategy",
    "Stream",
    "Together",
    "TogetherByZero",
    "Track",
    "UnreadableManifestError",
    "Uploads",
    "Work",
    "ZeroEngine",
    "ZeroTraining",
    "atomic_directory",
    "balance",
    "check_start",
    "client_number",
    "computes_finite",
    "find_faults",
    "has_federation",
    "has_manifest",
    "has_own_loss",
    "has_plain_clients",
    "held_near",
    "leave_group",
    "load_federation",
    "local_steps",
    "make_defence",
    "make_filters",
    "methods_of_sums",
    "never_accepted",
    "opacus",
    "overrides",
    "own_loss",
    "poisson_draw",
    "read_identity",
    "read_json",
    "read_manifest",
    "reasons",
    "remove_directory",
    "remove_leftovers",
    "save_federation",
    "scale_learning_rates",
    "seed_of",
    "seeded_normals",
    "sound_finish",
    "system_normals",
    "take_step",
    "untracked",
    "warmed_up",
    "why_not_private",
    "why_not_summed",
    "write_json",
    "write_manifest",
]
