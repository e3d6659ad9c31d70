"""Fed-MoE on Shakespeare: `accelerate launch recipes/shakespeare_lstm.py [--preset NAME] [--any setting]`."""

from pathlib import Path


if __name__ == "__main__":
    print("Loading PyTorch and transformers ...", flush=True)  # which takes seconds
    from hf_fedmoe.experiments import CharacterExperiment, main

    main(CharacterExperiment, Path(__file__).with_suffix(".yaml"))
