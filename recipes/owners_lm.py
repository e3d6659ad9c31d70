"""Owners of text who pool nothing: `accelerate launch recipes/owners_lm.py [--preset smollm2] [--any setting]`."""

from pathlib import Path

from hf_fedmoe.experiments import owners_main


if __name__ == "__main__":
    owners_main(Path(__file__).with_suffix(".yaml"))
