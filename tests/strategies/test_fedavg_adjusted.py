"""FedAvg whose clients allow for their proportions of classes."""

import numpy as np
import pytest
import torch

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.strategies import FedAvgAdjusted
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import state, tiny_args, tiny_expert, tiny_rows


def test_a_step_by_hand(tmp_path):
    """One client with classes 0 and 1 only, one step of plain descent on all of its rows."""
    rows = tiny_rows(60)
    labels_N = np.array(rows["label"])
    own = np.concatenate([np.flatnonzero(labels_N == 0)[:9], np.flatnonzero(labels_N == 1)[:3]])
    data = FederatedDataset(rows, [own], reserved=np.arange(50, 60))
    settings = dict(rounds=1, clients_per_round=1, per_device_train_batch_size=12, optim="sgd", learning_rate=0.1)
    settings |= dict(per_device_eval_batch_size=5)  # labels are counted over several batches
    settings |= dict(max_grad_norm=0.0, warmup_steps=0, lr_scheduler_type="constant", save_strategy="no")
    model = tiny_expert().eval()
    batch = {name: torch.tensor(rows.select(own)[name]) for name in ("input_ids", "attention_mask")}
    log_counts_C = torch.tensor([9.0, 3.0, 1e-6]).log()
    logits_BC = model(**batch).logits + 2.0 * log_counts_C
    torch.nn.functional.cross_entropy(logits_BC, torch.tensor(labels_N[own])).backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    strategy = FedAvgAdjusted(strength=2.0, learning_rate=0.0)
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, **settings), data, strategy)
    trainer.train()
    found = state(trainer.model)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    # Nothing pulls the score of the class that the client lacks.
    torch.testing.assert_close(found["classifier.bias"][2], state(tiny_expert())["classifier.bias"][2])


@pytest.mark.parametrize("strength", [-0.5, float("-inf"), float("inf")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match=f"`strength` is {strength}: give 0 or more"):
        FedAvgAdjusted(strength=strength)
