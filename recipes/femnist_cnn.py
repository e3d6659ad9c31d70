"""Fed-MoE on handwritten characters: `accelerate launch recipes/femnist_cnn.py [--preset NAME] [--any setting]`."""

from pathlib import Path


if __name__ == "__main__":
    print("Loading PyTorch and transformers ...", flush=True)  # which takes seconds
    from hf_fedmoe.experiments import ImageExperiment, main

    main(ImageExperiment, Path(__file__).with_suffix(".yaml"))
