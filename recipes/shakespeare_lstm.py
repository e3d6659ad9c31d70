"""Fed-MoE on Shakespeare: `accelerate launch recipes/shakespeare_lstm.py [--preset NAME] [--any setting]`."""

from pathlib import Path

from character_federation import CharacterRecipe
from federated_recipe import main


if __name__ == "__main__":
    main(CharacterRecipe, Path(__file__).with_suffix(".yaml"))
