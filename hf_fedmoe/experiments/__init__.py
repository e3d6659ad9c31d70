"""Experiments from settings: recipes, and comparisons of methods over seeds."""

from .characters import CharacterExperiment
from .compare import compare
from .experiment import Experiment, find_model, parse_settings, read_preset
from .images import ImageExperiment
from .methods import METHODS, make_trainer
from .recipe import main, parse
from .texts import TextExperiment


__all__ = [
    "METHODS",
    "CharacterExperiment",
    "Experiment",
    "ImageExperiment",
    "TextExperiment",
    "compare",
    "find_model",
    "main",
    "make_trainer",
    "parse",
    "parse_settings",
    "read_preset",
]
