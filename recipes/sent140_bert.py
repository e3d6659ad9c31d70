"""Fed-MoE on tweets, BERT experts: `accelerate launch recipes/sent140_bert.py [--preset paper] [--any setting]`."""

from pathlib import Path


if __name__ == "__main__":
    print("Loading PyTorch and transformers ...", flush=True)  # which takes seconds
    from hf_fedmoe.experiments import TextExperiment, main

    main(TextExperiment, Path(__file__).with_suffix(".yaml"))
