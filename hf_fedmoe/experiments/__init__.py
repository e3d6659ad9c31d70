"""Experiments from settings: recipes, and comparisons of methods over seeds."""

from .characters import CharacterExperiment
from .compare import FailedRunsError, compare
from .experiment import Experiment, find_model
from .images import ImageExperiment
from .methods import METHODS, make_trainer
from .recipe import main, parse
from .settings import parse_settings, read_preset, read_words
from .texts import TextExperiment


__all__ = [
    "METHODS",
    "CharacterExperiment",
    "Experiment",
    "FailedRunsError",
    "ImageExperiment",
    "TextExperiment",
    "compare",
    "find_model",
    "main",
    "make_trainer",
    "parse",
    "parse_settings",
    "read_preset",
    "read_words",
]
