"""Fed-MoE on tweets, BERT experts: `accelerate launch recipes/sent140_bert.py [--preset paper] [--any setting]`."""

from pathlib import Path

from text_federation import main


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".yaml"))
