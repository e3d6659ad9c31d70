"""Fed-MoE on handwritten characters: `accelerate launch recipes/femnist_cnn.py [--preset NAME] [--any setting]`."""

from pathlib import Path

from federated_recipe import main
from image_federation import ImageRecipe


if __name__ == "__main__":
    main(ImageRecipe, Path(__file__).with_suffix(".yaml"))
