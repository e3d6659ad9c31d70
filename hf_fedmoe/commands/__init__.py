"""Commands of `hf-fedmoe`. Their files import torch when a command runs, not before."""
