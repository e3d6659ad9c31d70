"""Owners of text who pool nothing: `accelerate launch recipes/owners_lm.py [--preset smollm2] [--any setting]`."""

from pathlib import Path


if __name__ == "__main__":
    print("Loading PyTorch and transformers ...", flush=True)  # which takes seconds
    from hf_fedmoe.experiments import owners_main

    owners_main(Path(__file__).with_suffix(".yaml"))
