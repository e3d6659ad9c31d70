"""The differential privacy of a run, of clients and of examples, in the words of its model card."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivacyFacts:
    """
    A trainer's knowledge of the privacy of its run.

    Args:
        epsilon (`float`), delta (`float`): Of all means that were released.
        relation (`str`): Between two federations that can hardly be told apart, as a deed.
        draw (`str`): How participants were drawn.
        noise_multiplier (`float`): Deviation of the noise on a sum, in clipping norms.
        clipping_norm (`float`): The first one, if it moved to `clipping_quantile`.
        clipping_quantile (`float`, *optional*): To which quantile of the updates' norms it moved.
        releases (`int`): Means that were released.
        accountant (`str`): By which epsilon was counted.
    """

    epsilon: float
    delta: float
    relation: str
    draw: str
    noise_multiplier: float
    clipping_norm: float
    clipping_quantile: float | None
    releases: int
    accountant: str

    @property
    def sentence(self) -> str:
        """Says what holds, of what and for whom."""
        norm = f"norm {self.clipping_norm:g}"
        if self.clipping_quantile is not None:
            norm = f"a norm that moved from {self.clipping_norm:g} to the {self.clipping_quantile:g} quantile"
        return (
            f"The model is ({self.epsilon:.3g}, {self.delta:g})-differentially private for {self.relation}: updates "
            f"were clipped to {norm}, noise of {self.noise_multiplier:.3g} of it was added to each of "
            f"{self.releases} sums ({self.draw}), counted by dp-accounting ({self.accountant.upper()}). That holds "
            "for whoever sees the model, not against the server, which saw every upload by itself, and not for "
            "figures of clients that were published beside it."
        )


@dataclass(frozen=True)
class ExamplePrivacyFacts:
    """
    A trainer's knowledge of the privacy of single examples in its run.

    Args:
        epsilon (`float`), delta (`float`): Of the examples of the client whose rounds cost most.
        noise_multiplier (`float`): Deviation of the noise on a sum of gradients, in clipping norms.
        clipping_norm (`float`): To which the gradient of each example was shortened.
        most_rounds (`int`): Rounds in which the client that was drawn most often took part.
        accountant (`str`): By which epsilon was counted.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    clipping_norm: float
    most_rounds: int
    accountant: str

    @property
    def sentence(self) -> str:
        """Says what holds, of what and for whom."""
        return (
            f"Each client's uploads together are ({self.epsilon:.3g}, {self.delta:g})-differentially private for "
            "adding or leaving out one of its examples, and so is the model: clients trained by DP-SGD (Opacus), "
            f"gradients of examples were clipped to norm {self.clipping_norm:g}, noise of {self.noise_multiplier:.3g} "
            f"of it was added to the sum of each step, in at most {self.most_rounds} rounds of a client, counted by "
            f"dp-accounting ({self.accountant.upper()}). That holds against the server too. It is that of one "
            "example, not of all that a client has, and not for the number of its examples or for figures of clients "
            "that were published beside it."
        )
