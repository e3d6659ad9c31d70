"""Fed-MoE on handwritten characters: `accelerate launch recipes/femnist_cnn.py [--preset NAME] [--any setting]`."""

from pathlib import Path

from hf_fedmoe.experiments import ImageExperiment, main


if __name__ == "__main__":
    main(ImageExperiment, Path(__file__).with_suffix(".yaml"))
