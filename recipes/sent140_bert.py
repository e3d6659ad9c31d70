"""Fed-MoE on tweets, BERT experts: `accelerate launch recipes/sent140_bert.py [--preset paper] [--any setting]`."""

from pathlib import Path

from federated_recipe import main
from text_federation import TextRecipe


if __name__ == "__main__":
    main(TextRecipe, Path(__file__).with_suffix(".yaml"))
