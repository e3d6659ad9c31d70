"""
A GPU works on while the host goes ahead, until the host asks for a number. How often it asks does not depend on the
number of steps. What asks of a GPU shows on a CPU too, but for copies: `tests/training/test_on_gpu.py`.
"""

import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import hf_fedmoe
from hf_fedmoe.data import ReservedSet
from hf_fedmoe.models.mixture_fedmoe import dense_mixture
from hf_fedmoe.strategies.gate_training import ALPHAS, TEMPERATURES, calibrated
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import METHODS, image_model
from tests.tiny_federation import tiny_args, tiny_mixture, tiny_rows, with_padding
from tests.tiny_images import tiny_image_federation, tiny_processor


PACKAGE = Path(hf_fedmoe.__file__).parent
# Numbers and sizes that the host asks for, and tensors that it makes of lists, lists of indices among them.
ASK = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal", "lift_fresh"}
# Methods with steps or losses of their own, and one without.
OWN_STEPS = ["fedavg", "fedavg_adjusted", "scaffold", "fedjets", "pfedme", "apfl", "fedem", "pfedmoe"]


class Asked(TorchDispatchMode):
    """Counts what a GPU would be asked for in a block, by the module of the package that asks and how."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ASK and (module := innermost_module()):
            self.found[module, name] += 1
        return function(*args, **kwargs or {})


def innermost_module():
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix()
        frame = frame.f_back
    return None


@pytest.mark.parametrize("name", OWN_STEPS)
def test_more_local_steps_ask_for_nothing_more(name, tmp_path):
    found = []
    for epochs in (1, 3):
        args = tiny_args(tmp_path / str(epochs), rounds=1, num_train_epochs=epochs, save_strategy="no")
        strategy = (METHODS[name].image_strategy or METHODS[name].strategy)()
        data, processor = tiny_image_federation(), tiny_processor()
        run = FederatedTrainer(image_model(name), args, data, strategy, processing_class=processor)
        with Asked() as asked:
            run.train()
        assert run.rounds[0].clients and not run.rounds[0].refused
        # Batches are made on the host, of its own numbers.
        found.append({key: count for key, count in asked.found.items() if not key[0].startswith("data/")})
    # The mean loss of each client.
    assert found[0] == found[1] and found[0]["federation/local_training.py", "_local_scalar_dense"]


def test_a_gate_is_calibrated_by_one_question():
    model = tiny_mixture(gate="prototypes")
    generator = torch.Generator().manual_seed(0)
    logits_RSC, scores_RKN = (3 * torch.randn(12, n, 3, generator=generator) for n in (3, 2))
    labels_R = logits_RSC[:, 1].argmax(1)  # what the first routed expert says, whom the gate does not know
    with Asked() as asked:
        chosen = calibrated(model, logits_RSC, scores_RKN, labels_R)
    assert not asked.found["strategies/gate_training.py", "_local_scalar_dense"]

    def loss(temperature, alpha):
        probs_RK = (scores_RKN / temperature).logsumexp(2).softmax(1)
        log_P_RC = dense_mixture(logits_RSC, probs_RK, torch.tensor([alpha]), 1, model.config.mix)
        return cross_entropy(log_P_RC, labels_R).item()

    assert chosen == min(product(TEMPERATURES, ALPHAS), key=lambda pair: loss(*pair)) != (1.0, 0.05)


def test_a_batch_of_the_reserved_set_is_one_question():
    reserved = ReservedSet(tiny_rows(9), with_padding, batch_size=4)
    with Asked() as asked:
        batch = reserved.batch(torch.tensor([7, 2, 5]))
    assert not asked.found["data/reserved_set.py", "_local_scalar_dense"]
    assert batch["labels"].tolist() == [tiny_rows(9)["label"][index] for index in (7, 2, 5)]
