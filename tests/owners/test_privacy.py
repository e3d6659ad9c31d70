"""Private statistics: how much noise, and that what comes out is that of a text."""

import math
import re
from statistics import NormalDist

import pytest
import torch

from hf_fedmoe import TextStatistics, text_statistics
from hf_fedmoe.models.router_fedmoe_causal import PREFIXES
from hf_fedmoe.owners import private_statistics
from hf_fedmoe.owners.privacy import gaussian_noise
from tests.tiny_decoders import texts_of, tiny_decoder


@pytest.mark.parametrize(("epsilon", "delta"), [(4.0, 1e-5), (0.5, 1e-6), (1.0, 1e-2)])
def test_the_noise_is_the_least_that_is_private(epsilon, delta):
    phi = NormalDist().cdf

    def told(deviation):
        return phi(0.5 / deviation - epsilon * deviation) - math.exp(epsilon) * phi(
            -0.5 / deviation - epsilon * deviation
        )

    deviation = gaussian_noise(epsilon, delta, 1.0)
    assert told(deviation) <= delta < told(deviation * 0.999)
    assert gaussian_noise(epsilon, delta, 12.0) == pytest.approx(12 * deviation)


def test_one_sequence_changes_the_sum_by_no_more_than_is_covered():
    """In units of the longest feature: |x x^T| = |x|^2 <= 2 for each prefix."""
    base = tiny_decoder("gpt2")
    embed = base.get_input_embeddings()
    longest = embed.weight.detach().norm(dim=1).median().item()
    for text in texts_of("court", length=200):
        gram = text_statistics(embed, [text], longest=longest).gram_DD
        units = torch.full((len(gram),), longest, dtype=torch.float64)
        units[-1] = 1
        assert (gram / units / units[:, None]).norm() <= 2 * len(PREFIXES) + 1e-9


def test_private_statistics_are_those_of_a_text_and_near_the_exact_ones():
    base = tiny_decoder("gpt2")
    embed, texts = base.get_input_embeddings(), texts_of("court", count=4000)
    exact = text_statistics(embed, texts)
    found = private_statistics(base, texts, 4.0, 1e-5, "hash", seed=1)
    assert found.base_sha256 == "hash" and found.fault(embed) is None
    assert found.count <= exact.count and found.count == pytest.approx(exact.count, rel=0.01)
    means = [each.feature_sum_H / each.gram_DD[-1, -1] for each in (exact, found)]
    assert (means[0] - means[1]).norm() < 0.05 * means[0].norm()
    again = private_statistics(base, texts, 4.0, 1e-5, "hash", seed=1)
    assert torch.equal(found.gram_DD, again.gram_DD)
    drawn = [private_statistics(base, texts, 4.0, 1e-5).gram_DD for _ in range(2)]
    assert not torch.equal(*drawn)
    few = private_statistics(base, texts[:1], 0.1, 1e-5, seed=2)
    assert few.fault(embed) is None


@pytest.mark.parametrize(
    ("epsilon", "delta", "message"), [(0.0, 1e-5, "`epsilon` is 0.0"), (1.0, 1.0, "`delta` is 1.0")]
)
def test_what_is_no_privacy_is_refused(epsilon, delta, message):
    with pytest.raises(ValueError, match=message):
        gaussian_noise(epsilon, delta, 1.0)


def test_sums_that_no_text_has_are_told():
    base = tiny_decoder("gpt2")
    embed = base.get_input_embeddings()
    gram = text_statistics(embed, texts_of("court")).gram_DD
    assert TextStatistics(gram).fault(embed) is None
    wide = gram.clone()
    wide[:-1, :-1] *= 1e9
    crooked = gram.clone()
    crooked[0, 1] += 1
    negative = gram.clone()
    negative[0, 0] = 0
    for hostile, message in (
        (wide, "mean square.* and no embedding of the base has more than"),
        (gram * 1e300, "they are over .* features"),
        (crooked, "they are not symmetric"),
        (negative, "they are no sum of squares"),
        (gram[1:, 1:].contiguous(), "they are of embeddings 31 wide, the base's are 32 wide"),
        (torch.zeros_like(gram), "they are over 0 features"),
    ):
        assert re.search(message, TextStatistics(hostile).fault(embed))
