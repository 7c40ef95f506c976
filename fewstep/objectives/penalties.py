"""How steep a critic is at its rows: the zero-centred gradient penalties R1 and R2."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.common.randomness import same_draws

# A critic with all but its rows told: (n, ...) -> (n,).
Critic = Callable[[Tensor], Tensor]
_STEP = 0.1


def slope(critic: Critic, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of rows and ``|grad D(x)|^2``, summed over components, (n,) each; the gradient has a gradient."""
    x = x.detach().requires_grad_()
    logits = critic(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, gradient.square().flatten(1).sum(1)


def slope_by_difference(critic: Critic, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a second derivative: ``(D(x + h e) - D(x))^2 / h^2`` with h = 0.1 and e standard normal, whose
    mean over e is ``|grad D|^2`` where D is linear over h (arXiv 2501.08316, there without the division). Both calls
    have the same dropout."""
    again = same_draws(x.device)
    logits = critic(x.detach())
    again()
    return logits, (critic(x.detach() + _STEP * noise) - logits).square() / _STEP**2


def has_second_derivative(critic: nn.Module, x: Tensor, told: dict[str, Tensor]) -> bool:
    """Whether the gradient at these rows can itself be differentiated; fused attention, for one, cannot."""
    # Weights of its own, so that a whole backward pass, which alone finds out, leaves nothing anywhere.
    weights = {name: p.detach().requires_grad_(p.requires_grad) for name, p in critic.named_parameters()}
    with torch.enable_grad():
        try:
            _, steep = slope(lambda x: functional_call(critic, weights, x, told), x)
            steep.sum().backward()
        except (RuntimeError, NotImplementedError):
            return False
    return True
