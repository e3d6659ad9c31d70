"""Fed-MoE on Shakespeare: `accelerate launch recipes/shakespeare_lstm.py [--preset NAME] [--any setting]`."""

from pathlib import Path

from hf_fedmoe.experiments import CharacterExperiment, main


if __name__ == "__main__":
    main(CharacterExperiment, Path(__file__).with_suffix(".yaml"))
