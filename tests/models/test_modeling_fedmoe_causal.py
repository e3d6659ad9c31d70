"""The mixture of owners of text against forwards and texts written out by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer, Trainer, TrainingArguments

from hf_fedmoe.models import FedMoEForCausalLM
from hf_fedmoe.models.precision_fedmoe import to_float32_
from tests.tiny_decoders import ALPHA, DECODERS, OWNERS, RANK, prompts, texts_of, tiny_decoder, tiny_mixture
from tests.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID
from tests.tiny_tokenizer import tiny_tokenizer


FEW = ("gpt2", "llama", "gemma2")


def route_by_hand(model: FedMoEForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Weights of each expert by loops, the running mean of embeddings first."""
    embeddings = model.get_input_embeddings()(input_ids).double().detach().numpy()
    counted = np.ones(input_ids.shape) if attention_mask is None else attention_mask.numpy()
    router = model.router_ED.double().numpy()
    weights = np.zeros((*input_ids.shape, len(router)))
    for row in range(input_ids.shape[0]):
        for position in range(input_ids.shape[1]):
            seen = [place for place in range(position + 1) if counted[row, place]]
            mean = embeddings[row, seen].mean(0) if seen else np.zeros(embeddings.shape[-1])
            scores = (router[:, :-1] @ mean + router[:, -1]) / model.config.router_temperature
            exponentials = np.exp(scores - scores.max())
            weights[row, position] = exponentials / exponentials.sum()
    return torch.tensor(weights)


def slow_model(model: FedMoEForCausalLM, weights_BTE: Tensor) -> PreTrainedModel:
    """The base in which each layer adds each owner's update at each position, one after the other."""
    base = model.merge("base")
    for name in model.target_names:
        stack = model.expert_layers()[name].owners

        def add(layer, args, output, stack=stack):
            output = output.clone()
            for row in range(output.shape[0]):
                for position in range(output.shape[1]):
                    x = args[0][row, position]
                    for k in range(len(model.config.owners)):
                        A, B = (each[k * RANK : (k + 1) * RANK] for each in (stack.lora_A, stack.lora_B))
                        weight = weights_BTE[row, position, k + 1].float()
                        output[row, position] += weight * (ALPHA / RANK) * (B.T @ (A @ x))
            return output

        base.get_submodule(name).register_forward_hook(add)
    return base


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_logits_are_those_of_the_formula_written_out(family):
    model, batch = tiny_mixture(family), prompts()
    weights_BTE = route_by_hand(model, **batch)
    assert weights_BTE[..., 1:].std() > 0.05 and weights_BTE[..., 0].max() > 0.05
    assert_close(model.route(**batch).double(), weights_BTE)
    expected = slow_model(model, weights_BTE)(**batch).logits
    seen = batch["attention_mask"].bool()
    assert_close(model(**batch).logits[seen], expected[seen])
    base = model.merge("base")(**batch).logits
    assert (expected - base)[seen].abs().max() > 0.05
    # The base by itself is the base, and so is expert 0.
    assert torch.equal(model.base(**batch).logits, base) and torch.equal(model(**batch, expert="base").logits, base)


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_experts_are_weighted_by_how_likely_they_find_the_text(family):
    """Compares with Bayes' rule token by token, of rows of which one is padded on the left."""
    model, batch = tiny_mixture(family), prompts()
    weights_BTE = model.route_by_likelihood(**batch)
    assert not batch["attention_mask"].bool().all()
    for row, seen in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row, seen]
        told = [
            model.merge(name)(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            for name in model.config.expert_names
        ]
        log_odds = torch.zeros(len(told)).double()
        for place, token in enumerate(ids):
            if place:
                log_odds += torch.stack([each[place - 1, token] for each in told])
            assert_close(weights_BTE[row, seen][place].double(), log_odds.softmax(0))
    last = weights_BTE[:, -1:]
    assert last.max() > 0.4 and last.std() > 0.05  # or any weights would do
    found = model.generate(**batch, expert_weights=last, max_new_tokens=4, do_sample=False)
    text, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(4):
        inputs = {"input_ids": text, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        logits = slow_model(model, last.expand(-1, text.shape[1], -1))(**inputs).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(found, text)
    one = model.route_by_likelihood(batch["input_ids"][:, :1])
    assert torch.equal(one, torch.full((3, 1, 4), 1 / 4))
    assert model.generate(**prompts(pad=False), expert_weights=one, max_new_tokens=1).shape[1] == text.shape[1] - 3


@torch.no_grad()
def test_of_weights_by_likelihood_as_many_stay_as_of_the_router():
    model, batch = tiny_mixture(), prompts()
    all_BTE = model.route_by_likelihood(**batch)
    model.config.top_l = 2
    found_BTE = model.route_by_likelihood(**batch)
    largest_BT2, experts_BT2 = all_BTE[:, 1:].topk(2)
    expected = torch.zeros_like(all_BTE[:, 1:]).scatter(2, experts_BT2, largest_BT2 / largest_BT2.sum(2, True))
    assert_close(found_BTE[:, 1:], expected)
    assert ((found_BTE > 0).sum(2) == 2).all()


@torch.no_grad()
def test_padding_that_is_no_number_counts_nothing_in_likelihoods():
    """Some attention gives no numbers where a position sees none, and a head may rule out the token of padding."""
    model, batch = tiny_mixture(), prompts()
    expected = model.route_by_likelihood(**batch)
    padding_BT = ~batch["attention_mask"].bool()

    def spoil(head, args, logits_BTV):
        return logits_BTV.masked_fill(padding_BT[..., None], torch.nan)

    model.base.lm_head.register_forward_hook(spoil)
    assert padding_BT.any() and torch.equal(model.route_by_likelihood(**batch), expected)


def test_a_mask_that_is_not_of_the_tokens_is_refused_for_likelihoods():
    batch = prompts()
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(3, 9\), but the tokens \(3, 10\)"):
        tiny_mixture().route_by_likelihood(batch["input_ids"], batch["attention_mask"][:, 1:])


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_one_expert_alone_is_the_base_with_its_update_merged(family):
    model, batch = tiny_mixture(family), prompts(pad=False)
    for index, name in enumerate(OWNERS, start=1):
        expected = model.merge(name)(**batch).logits
        one_hot = torch.nn.functional.one_hot(torch.tensor([[index]]), len(OWNERS) + 1).float()
        for found in (
            model(**batch, expert=name),
            model(**batch, expert=index),
            model(**batch, expert_weights=one_hot),
        ):
            assert_close(found.logits, expected)


@torch.no_grad()
def test_the_largest_weights_stay_and_are_renormalised():
    model, batch = tiny_mixture(), prompts()
    soft_BTE, soft = model.route(**batch), model(**batch).logits
    for top_l in (1, 2, 3):
        model.config.top_l = top_l
        weights_BTE = model.route(**batch)
        for row, chosen in zip(soft_BTE.flatten(0, 1), weights_BTE.flatten(0, 1), strict=True):
            best = row.argsort(descending=True)[:top_l]
            expected = torch.zeros_like(row)
            expected[best] = row[best] / row[best].sum()
            assert_close(chosen, expected)
        assert weights_BTE.argmax(-1).unique().numel() > 1
        seen = batch["attention_mask"].bool()
        assert_close(model(**batch).logits[seen], slow_model(model, weights_BTE)(**batch).logits[seen])
    model.config.top_l = len(OWNERS) + 1
    assert torch.equal(model.route(**batch), soft_BTE)
    assert_close(model(**batch).logits, soft)


@pytest.mark.parametrize(
    ("family", "top_l"), [*((family, None) for family in DECODERS if family != "qwen3"), ("llama", 1)]
)
@torch.no_grad()
def test_greedy_text_is_that_of_a_loop_without_a_cache(family, top_l):
    model, input_ids = tiny_mixture(family, top_l=top_l), prompts(pad=False)["input_ids"][:1]
    found = model.generate(input_ids, max_new_tokens=8, do_sample=False)
    while input_ids.shape[1] < found.shape[1]:
        weights_BTE = route_by_hand(model, input_ids)
        if top_l == 1:
            weights_BTE = torch.nn.functional.one_hot(weights_BTE.argmax(-1), weights_BTE.shape[-1]).double()
        logits = slow_model(model, weights_BTE)(input_ids).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, input_ids)
    alone = model.generate(prompts(pad=False)["input_ids"][:1], max_new_tokens=8, do_sample=False, expert="base")
    assert not torch.equal(found, alone)


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_every_way_to_generate_is_the_same_with_and_without_a_cache(family):
    model, batch = tiny_mixture(family), prompts()
    for arguments in (
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2, "expert": "press"},
        {"num_beams": 2, "do_sample": False, "expert_weights": model.route(**batch)[:, -1:]},
    ):
        texts = []
        for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
            torch.manual_seed(1)
            texts.append(model.generate(**batch, max_new_tokens=8, **arguments, **cache))
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(("family", "top_l"), [("gpt2", None), ("llama", 1), ("gemma2", None)])
@torch.no_grad()
def test_rows_padded_on_the_left_are_as_if_alone(family, top_l):
    model, batch = tiny_mixture(family, top_l=top_l), prompts()
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    for row in range(3):
        alone = batch["input_ids"][row : row + 1, batch["attention_mask"][row] == 1]
        weights = model.route(**batch)[row, batch["attention_mask"][row] == 1]
        assert torch.equal(weights, model.route(alone)[0])
        text = model.generate(alone, max_new_tokens=8, do_sample=False)[0]
        length = len(text) - alone.shape[1]
        assert torch.equal(together[row, 10 : 10 + length], text[alone.shape[1] :])
        assert (together[row, 10 + length :] == PAD_TOKEN_ID).all()


@torch.no_grad()
def test_assistants_and_streams():
    model, input_ids = tiny_mixture(), prompts(pad=False)["input_ids"][:1]
    expected = model.generate(input_ids, max_new_tokens=8, do_sample=False)
    for arguments in ({"assistant_model": tiny_decoder(seed=1)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(input_ids, max_new_tokens=8, do_sample=False, **arguments), expected)

    class Words(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    words = Words(tiny_tokenizer())
    model.generate(input_ids, max_new_tokens=8, do_sample=False, streamer=words)
    assert words.text == tiny_tokenizer().decode(expected[0])


@torch.no_grad()
def test_a_cache_without_the_text_before_is_refused():
    model, input_ids = tiny_mixture(), prompts(pad=False)["input_ids"]
    expected = model(input_ids).logits
    start = model(input_ids[:, :6], use_cache=True)
    with pytest.raises(ValueError, match=r"`expert_weights` is None, and the cache holds 6 tokens .* `generate`"):
        model(input_ids[:, 6:], cache=start.cache)
    rest = model(input_ids[:, 6:], cache=start.cache, expert_weights=model.route(input_ids)[:, 6:])
    assert_close(torch.cat([start.logits, rest.logits], dim=1), expected)
    # The caller's cache and the whole text go together.
    start = model(input_ids[:, :6], use_cache=True)
    found = model.generate(input_ids, cache=start.cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(input_ids, max_new_tokens=4, do_sample=False))
    with pytest.raises(
        ValueError, match=r"`input_ids` has 4 tokens, but the cache holds 4 .* no `prefill_chunk_size`"
    ):
        model.generate(input_ids, max_new_tokens=4, prefill_chunk_size=4)
    alone = {"max_new_tokens": 4, "do_sample": False, "expert": "code"}
    assert torch.equal(model.generate(input_ids, prefill_chunk_size=4, **alone), model.generate(input_ids, **alone))


@torch.no_grad()
def test_embeddings_and_packed_rows_are_routed_too():
    model, input_ids = tiny_mixture(), prompts(pad=False)["input_ids"]
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = model.route(input_ids, position_ids=position_ids)
    assert_close(packed[:, :4], model.route(input_ids[:, :4]))
    assert_close(packed[:, 4:], model.route(input_ids[:, 4:]))
    logits = model(input_ids, position_ids=position_ids.expand(3, -1), use_cache=False).logits
    assert_close(logits[:, 4:], model(input_ids[:, 4:]).logits)
    assert not torch.allclose(model.route(input_ids)[:, 4:], packed[:, 4:], atol=1e-2)
    # Padding to the left, with the positions that go with it.
    batch = prompts()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    seen = batch["attention_mask"].bool()
    assert_close(model.route(**batch, position_ids=positions)[seen], model.route(**batch)[seen])


def test_loss_and_gradients():
    model, batch = tiny_mixture(), prompts()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :5] = -100
    output = model(**batch, labels=labels)
    log_probs = output.logits[:, :-1].double().log_softmax(-1)
    counted = [(row, t) for row in range(3) for t in range(9) if labels[row, t + 1] != -100]
    losses = [-log_probs[row, t, labels[row, t + 1]] for row, t in counted]
    assert len(counted) == 20
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    halved = model(**batch, labels=labels, num_items_in_batch=2 * len(counted)).loss
    assert halved.item() == pytest.approx(output.loss.item() / 2, abs=1e-6)
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if ".owners.lora_" in name}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)
    model.zero_grad()
    model(**batch, labels=labels, expert="press").loss.backward()
    for layer in model.expert_layers().values():
        for weight in (layer.owners.lora_A, layer.owners.lora_B):
            reached = weight.grad.abs().sum(1) > 0
            assert reached[RANK : 2 * RANK].all() and reached.sum() == RANK


@pytest.mark.parametrize("top_l", [None, 1])
def test_gradients_of_the_stack_are_those_of_a_small_step(top_l):
    model, batch = tiny_mixture(top_l=top_l).double(), prompts()
    weight = model.expert_layers()["model.layers.1.mlp.up_proj"].owners.lora_A
    model(**batch, labels=batch["input_ids"]).loss.backward()
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            weight += step * direction
            losses.append(model(**batch, labels=batch["input_ids"]).loss)
    slope = (losses[0] - losses[1]) / 2e-3
    assert (weight.grad * direction).sum().item() == pytest.approx(slope.item(), rel=2e-3)  # of a loss in float32


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_with_the_experts_of_their_own_forward(family, reentrant):
    model, batch = tiny_mixture(family, top_l=2).train(), prompts(pad=False)
    again = copy.deepcopy(model)

    def gradients(model):
        first, second = (model(**batch, labels=batch["input_ids"], expert=name).loss for name in ("court", "code"))
        (first + 2 * second + 3 * model(**batch, labels=batch["input_ids"]).loss).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    again._set_gradient_checkpointing(True, _checkpoint_with(reentrant))
    if reentrant:
        again.enable_input_require_grads()
    expected, found = gradients(model), gradients(again)
    assert expected.keys() == found.keys() and len(found) > 0
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-6)
    # A copy of a checkpointed model minds its own experts.
    for name, gradient in gradients(_cleared(copy.deepcopy(again))).items():
        assert_close(gradient, expected[name], 1e-6)


def _checkpoint_with(reentrant: bool):
    def checkpoint(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    return checkpoint


def _cleared(model: PreTrainedModel) -> PreTrainedModel:
    model.zero_grad()
    if hasattr(model, "_require_grads_hook"):
        model.enable_input_require_grads()
    return model


def test_a_trainer_trains_the_experts_alone(tmp_path):
    model = tiny_mixture("gpt2")
    before = copy.deepcopy(model)
    rows = [{"input_ids": text, "labels": text} for text in texts_of("court")]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old) != (".owners.lora_" in name), name
    trainer.save_model(str(tmp_path / "trained"))
    loaded = FedMoEForCausalLM.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(loaded(**prompts()).logits, model.eval()(**prompts()).logits)
    # Accumulated, the loss is that of all tokens at once.
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(
        model(torch.stack(texts_of("court")), labels=torch.stack(texts_of("court"))).loss.item(), abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(tmp_path, dtype):
    model, batch = tiny_mixture(), prompts()
    model.save_pretrained(tmp_path)
    half = FedMoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype and half.router_ED.dtype == torch.float32
    assert torch.equal(half.sums_EP, model.sums_EP)
    assert half(**batch).logits.dtype == dtype
    assert_close(half(**batch).logits.float(), model(**batch).logits, 0.1)
    assert_close(half.route(**batch), model.route(**batch), 0.05)
    assert half.generate(**batch, max_new_tokens=3).shape == (3, 13)
    # Experts that are trained can be more exact than the base, and autocast is met.
    to_float32_(parameter for parameter in half.parameters() if parameter.requires_grad)
    for top_l in (None, 1):
        half.config.top_l = model.config.top_l = top_l
        assert half(**batch).logits.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(half.route(**batch), model.route(**batch), 0.05 if top_l is None else 1.0)
            assert model(**batch).logits.isfinite().all() and half(**batch).logits.isfinite().all()
    # Statistics outlive a cast by hand, and with them the ways to other mixtures.
    cast = copy.deepcopy(model).to(dtype)
    assert torch.equal(cast.without("press").router_ED, model.without("press").router_ED)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward():
    for top_l in (None, 1):
        model, batch = tiny_mixture(top_l=top_l), prompts(pad=False)
        compiled = torch.compile(model, fullgraph=True)
        assert_close(compiled(**batch).logits, model(**batch).logits)
        assert_close(compiled(**batch, expert="code").logits, model(**batch, expert="code").logits)


@torch.no_grad()
def test_without_owners_and_without_statistics():
    base, batch = tiny_decoder(), prompts()
    expected = copy.deepcopy(base)(**batch).logits
    model = FedMoEForCausalLM.from_base(base)
    assert torch.equal(model(**batch).logits, expected)
    named = FedMoEForCausalLM.from_base(tiny_decoder(), owners=["court"])
    assert torch.equal(named(**batch, expert="court").logits, expected)  # as it begins
    with pytest.raises(ValueError, match=r"`router_names` is \[\]: .* `set_statistics`"):
        named(**batch)
    named.set_statistics("court", tiny_mixture().statistics_of("court"))
    assert torch.equal(named.route(**batch)[..., 1], torch.ones(3, 10))


@torch.no_grad()
def test_wrong_arguments_of_a_forward():
    model, batch = tiny_mixture(), prompts()
    with pytest.raises(ValueError, match=r"`expert` is 'curt': did you mean 'court'\?"):
        model(**batch, expert="curt")
    with pytest.raises(ValueError, match=r"`expert` is 'x': pass one of \['base', 'court', 'press', 'code'\]"):
        model(**batch, expert="x")
    with pytest.raises(ValueError, match="`expert` is 4: pass an integer of at most 3"):
        model(**batch, expert=4)
    with pytest.raises(ValueError, match="`expert` is 1 and `expert_weights` are given too"):
        model(**batch, expert=1, expert_weights=model.route(**batch))
    with pytest.raises(ValueError, match=r"`expert_weights` has the shape \(4,\): pass \(3, 10, 4\), or \(3, 1, 4\)"):
        model(**batch, expert_weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(3, 1, 10, 10\), but the tokens \(3, 10\)"):
        model(batch["input_ids"], attention_mask=torch.ones(3, 1, 10, 10))
    with pytest.raises(ValueError, match="`input_ids` is None: pass the tokens, or `inputs_embeds`"):
        model(expert_weights=torch.ones(3, 1, 4))
    with pytest.raises(ValueError, match="resize it, then build"):
        model.resize_token_embeddings(EOS_TOKEN_ID + 5)
    # Nothing of a refused or broken forward stays.
    assert model.in_use.experts is None
