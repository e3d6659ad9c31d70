"""Sums over owners' texts, and the router that follows from them in closed form."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_fedmoe.models import TextStatistics, base_sha256, ridge_router, text_statistics
from hf_fedmoe.models.router_fedmoe_causal import PREFIXES, packed_bits, running_means, unpacked_bits
from tests.tiny_decoders import HIDDEN, OWNERS, adapter_for, statistics_for, texts_of, tiny_decoder, tiny_mixture


def features_by_hand(embeddings: np.ndarray, texts: list[torch.Tensor]) -> np.ndarray:
    """Means of the first 4, 8, ... tokens of each text, and a one."""
    found = []
    for text in texts:
        for prefix in (4, 8, 16, 32, 64, 127):
            if prefix <= len(text):
                found.append([*embeddings[text[:prefix].numpy()].mean(0), 1.0])
    return np.array(found)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_statistics_are_sums_over_means_of_prefixes(family):
    embed = tiny_decoder(family).get_input_embeddings()
    every_token = embed(torch.arange(40)).detach().double().numpy()
    texts = [text[:length] for text, length in zip(texts_of("court"), (40, 31, 3, 8, 0, 4, 40, 16), strict=True)]
    texts.append(torch.arange(130) % 40)
    found, features = text_statistics(embed, texts), features_by_hand(every_token, texts)
    assert found.count == len(features) == 4 + 3 + 0 + 2 + 0 + 1 + 4 + 3 + 6
    np.testing.assert_allclose(found.gram_DD.numpy(), features.T @ features, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.feature_sum_H.numpy(), features[:, :-1].sum(0), rtol=1e-12)
    assert torch.equal(found.gram_DD, found.gram_DD.T)
    # Lists are as good as tensors, and other prefixes can be asked for.
    assert torch.equal(text_statistics(embed, [text.tolist() for text in texts]).gram_DD, found.gram_DD)
    assert text_statistics(embed, texts, prefixes=(2, 3)).count == 2 * (len(texts) - 1)
    assert PREFIXES == (4, 8, 16, 32, 64, 127)


def test_statistics_of_parts_add_up_to_those_of_the_whole(monkeypatch):
    embed, texts = tiny_decoder().get_input_embeddings(), texts_of("court", count=12)
    whole, first, second = (text_statistics(embed, part, base_sha256="ab") for part in (texts, texts[:5], texts[5:]))
    torch.testing.assert_close((first + second).gram_DD, whole.gram_DD, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close((whole - first).gram_DD, second.gram_DD, rtol=1e-11, atol=1e-11)
    assert (first + second).count == whole.count == 48 and (first + second).base_sha256 == "ab"
    # Many texts are multiplied a block at a time.
    monkeypatch.setattr("hf_fedmoe.models.router_fedmoe_causal._BLOCK", 18)
    torch.testing.assert_close(text_statistics(embed, texts).gram_DD, whole.gram_DD, rtol=1e-13, atol=1e-13)


def test_statistics_on_disk(tmp_path):
    statistics = statistics_for(tiny_mixture(), "court")
    for sha256 in (None, "ab"):
        TextStatistics(statistics.gram_DD, sha256).save(tmp_path / "sums.safetensors")
        loaded = TextStatistics.load(tmp_path / "sums.safetensors")
        assert torch.equal(loaded.gram_DD, statistics.gram_DD) and loaded.base_sha256 == sha256
    save_file({"weights": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds \['weights'\] and no statistics: pass a file of `save`"):
        TextStatistics.load(tmp_path / "other.safetensors")


def test_bits_bring_back_every_sum():
    gram_DD = statistics_for(tiny_mixture(), "court").gram_DD
    assert torch.equal(unpacked_bits(packed_bits(gram_DD)), gram_DD)
    assert len(packed_bits(gram_DD)) == 33 * 34 // 2


def test_router_is_that_of_ridge_regression_in_which_owners_count_alike():
    embed = tiny_decoder().get_input_embeddings()
    every_token = embed(torch.arange(40)).detach().double().numpy()
    counts = {"court": 80, "press": 10, "code": 40}
    features = [features_by_hand(every_token, texts_of(name, count)) for name, count in counts.items()]
    X = np.concatenate(features)
    Y = np.concatenate([np.eye(3)[[k] * len(each)] for k, each in enumerate(features)])
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in features])
    gram = (X.T * weights) @ X
    ridge = 0.02 * np.trace(gram) / len(gram) * np.eye(HIDDEN + 1)
    expected = np.linalg.inv(gram + ridge) @ (X.T * weights) @ Y
    found = ridge_router([text_statistics(embed, texts_of(*each)) for each in counts.items()], ridge=0.02)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=1e-8, atol=1e-8)
    # It knows the texts of an owner of few; plain sums would not.
    plain = np.linalg.inv(X.T @ X + 0.02 * np.trace(X.T @ X) / len(gram) * np.eye(HIDDEN + 1)) @ X.T @ Y
    right, right_of_plain = (((features[1] @ router).argmax(1) == 1).mean() for router in (expected, plain))
    assert right > 0.6 and right_of_plain < 0.1


def test_sums_over_nothing_make_no_router():
    one = statistics_for(tiny_mixture(), "court")
    with pytest.raises(ValueError, match=r"`statistics\[1\].count` is 0: pass sums over some text"):
        ridge_router([one, one - one])


def test_router_of_a_mixture_is_that_of_its_sums():
    model = tiny_mixture(ridge=0.5, public_bias=0.25)
    names = ("base", *OWNERS)
    expected = ridge_router([statistics_for(model, name) for name in names], ridge=0.5)
    expected = expected.float()
    expected[0, -1] += 0.25
    assert torch.equal(model.router_ED, expected)
    for name in names:
        assert torch.equal(model.statistics_of(name).gram_DD, statistics_for(model, name).gram_DD)
        assert model.statistics_of(name).base_sha256 == base_sha256(model.base)
    # Whom the router does not know has no weight, and no part in it.
    unknown = model.add_owner(adapter_for(model, "newcomer"), name="newcomer")
    assert torch.equal(unknown.router_ED[:-1], model.router_ED) and unknown.statistics_of("newcomer") is None
    assert unknown.route(texts_of("code")[0][None])[..., -1].abs().max() == 0


def test_running_means_by_loops():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 7, 3, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [1] * 7])
    positions = torch.tensor([[0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 0, 1]])
    for mask_BT, position_ids_BT in ((None, None), (mask, None), (None, positions), (mask, positions)):
        found = running_means(values, mask_BT, position_ids_BT)
        for row in range(2):
            for t in range(7):
                starts = [s for s in range(t + 1) if position_ids_BT is not None and position_ids_BT[row, s] == 0]
                first = max(starts, default=0)
                seen = [s for s in range(first, t + 1) if mask_BT is None or mask_BT[row, s]]
                expected = values[row, seen].mean(0) if seen else torch.zeros(3)
                torch.testing.assert_close(found[row, t], expected, rtol=1e-5, atol=1e-6)


def test_statistics_that_cannot_be():
    embed = tiny_decoder().get_input_embeddings()
    with pytest.raises(ValueError, match="`sequences` has no text of at least 4 tokens: pass longer ones"):
        text_statistics(embed, [torch.tensor([2, 3, 4])])
    with pytest.raises(ValueError, match=r"A sequence has the shape \(2, 5\): pass the token ids of one text"):
        text_statistics(embed, [torch.ones(2, 5, dtype=torch.long)])
    with pytest.raises(ValueError, match=r"`gram_DD` has the shape \(3, 3\) in torch.float32: pass a square matrix"):
        TextStatistics(torch.ones(3, 3))
    with pytest.raises(ValueError, match="`gram_DD` is not finite: look for NaN"):
        TextStatistics(torch.full((3, 3), float("nan"), dtype=torch.float64))
    one, other = (TextStatistics(torch.eye(3, dtype=torch.float64), sha256) for sha256 in ("ab", "cd"))
    with pytest.raises(ValueError, match="two bases, 2 wide with `base_sha256` 'ab' and 2 wide with 'cd': take both"):
        one + other
