"""Routers by token and layer, against loops."""

import torch

from hf_fedmoe.experiments.language_layer_routers import NAMES, RoutedByLayer, layer_routers, using
from hf_fedmoe.models.lora_fedmoe_causal import stack_of
from tests.tiny_decoders import OWNERS, tiny_mixture


def test_rows_are_those_of_their_papers():
    model = tiny_mixture("llama")
    texts = {
        name: torch.randint(3, 24, (3, 12), generator=torch.Generator().manual_seed(k))
        for k, name in enumerate(OWNERS)
    }
    arrow, dume, flexolmo = (layer_routers(model, texts)[name] for name in NAMES)
    name, layer = next(iter(model.expert_layers().items()))
    stack, read = stack_of(layer), []
    hook = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        for owner, ids in texts.items():
            model(input_ids=ids, expert=owner)
    hook.remove()
    together = torch.cat(read)
    gram = together.T @ together
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    for k, own in enumerate(read):
        expected = torch.linalg.solve(gram, own.sum(0))
        torch.testing.assert_close(dume.rows[stack][k], expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(flexolmo.rows[stack][k], own.sum(0) / own.sum(0).norm(), rtol=1e-5, atol=1e-8)
        update = model.merge(OWNERS[k]).get_submodule(name).weight - model.merge("base").get_submodule(name).weight
        first = torch.linalg.svd(update.detach()).Vh[0]
        torch.testing.assert_close((arrow.rows[stack][k] * first).sum().abs(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)


def test_with_equal_scores_it_is_the_soup():
    model, ids = tiny_mixture("gpt2"), torch.arange(3, 15)[None]
    zero = {
        stack_of(layer): torch.zeros(3, stack_of(layer).lora_A.shape[1]) for layer in model.expert_layers().values()
    }
    third = torch.tensor([[[0, 1 / 3, 1 / 3, 1 / 3]]])
    with torch.no_grad():
        expected = model(input_ids=ids, expert_weights=third).logits
        with using(model, RoutedByLayer(zero, model.in_use, 1.0)):
            found = model.base(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert model.in_use.experts is None


def test_scores_weigh_experts():
    """A score far above the others is one expert alone; without the sign, one far below is too."""
    model, ids = tiny_mixture("gpt2"), torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, expert="press").logits
        rows = {}
        for layer in model.expert_layers().values():
            rows[stack_of(layer)] = torch.zeros(3, stack_of(layer).lora_A.shape[1])
        router = RoutedByLayer(rows, model.in_use, 1e-6, absolute=True)
        # The row of the press is the layer's own input, whose product with itself is above 0.
        for stack in rows:
            rows[stack][1] = 1.0
        with using(model, router):
            found = model.base(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
