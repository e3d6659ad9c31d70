"""Fed-MoE on tweets, BERT experts: `accelerate launch recipes/sent140_bert.py [--preset paper] [--any setting]`."""

from pathlib import Path

from hf_fedmoe.experiments import TextExperiment, main


if __name__ == "__main__":
    main(TextExperiment, Path(__file__).with_suffix(".yaml"))
