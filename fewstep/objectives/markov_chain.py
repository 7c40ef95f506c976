"""Markov chains of tokens: the baseline that flows of tokens are held against."""

from typing import Any

from fewstep.common.randomness import Generators, uniform
from fewstep.flows.broadcasting import as_times
from fewstep.flows.chains import chain_state, check_chain
from fewstep.flows.fields import NetworkField
from fewstep.flows.spaces import Tokens
from fewstep.objectives.base import Batch, Loss, Objective, noise_of


class MarkovChain(Objective):
    """``E sum over places of -log p(x1 at the place | x_t) / (1 - t)`` where the place is noise: what the tokens were,
    asked of rows of which each token is noise with the probability 1 - t (arXiv 2211.16750, 2406.07524).

    With masks this is the ratio matching of 2211.16750, ``-log p(x at a place | all others)``: a masked place says
    nothing of itself, so that no network with a hole is needed. Divided by its 1 - t, which are as many as places are
    noise, it is a bound of the likelihood; here it is the mean over the places that are noise.

    What it trains is no velocity: ``fewstep.sample`` draws from it by the chain (``fewstep.flows.chains``).

    Args:
        kind: ``masked`` or ``uniform``.
    """

    trains_field = True
    sources = ("2211.16750", "2406.07524")

    def __init__(self, kind: str = "masked") -> None:
        super().__init__()
        self.kind = check_chain(kind)

    def forward(
        self,
        student: Any,
        batch: Batch,
        *,
        target: Any = None,
        progress: float = 0.0,
        step: int = 0,
        generator: Generators,
    ) -> Loss:
        noise, t = noise_of(batch, generator), as_times(uniform(len(batch), generator), batch.data)
        x, is_noise = chain_state(self.kind, noise, batch.data, t, generator)
        error = -(batch.data * student.end(x, t, t, **batch.cond).clamp(min=1e-30).log()).sum(-1)
        total = (error * is_noise).sum() / is_noise.sum().clamp(min=1)
        return Loss(total, {"tokens": total.detach()}, {"tokens": t[:, None].expand(-1, 2)})

    def adopt(self, student: Any) -> None:
        super().adopt(student)
        student.chain = self.kind

    def check_student(self, student: Any) -> None:
        if not (isinstance(student, NetworkField) and isinstance(student.space, Tokens)):
            raise ValueError(
                f"MarkovChain trains a field of tokens, not a {type(student).__name__} of "
                f"{type(getattr(student, 'space', None)).__name__}: NetworkField(network, prediction='data', "
                "space=Tokens(V)), or data of text in a recipe"
            )
