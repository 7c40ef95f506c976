"""The average velocity of a Gaussian, in closed form."""

from torch import Tensor, nn

from fewstep.flows.exact import GaussianField
from toys.elsewhere import elsewhere  # noqa: F401


class GaussianAverageVelocity(nn.Module):
    """u(x, s, t) of a Gaussian on the linear path, in closed form, smooth through s = t.

    With C_t the variance of p_t along an axis, ``(sqrt(C_t / C_s) - 1) / (t - s)`` is
    ``((C_t - C_s) / (t - s)) / (sqrt(C_s) (sqrt(C_t) + sqrt(C_s)))``, and C is quadratic in t.
    """

    def __init__(self, field: GaussianField) -> None:
        super().__init__()
        self.register_buffer("mean", field.mean)
        self.register_buffer("basis", field.basis)
        self.register_buffer("variances", field.variances)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        s, t = s[:, None], t[:, None]
        root_s, root_t = ((r * r * self.variances + (1 - r) ** 2).sqrt() for r in (s, t))
        rate = ((s + t) * self.variances - (2 - s - t)) / (root_s * (root_s + root_t))
        return self.mean + ((x - s * self.mean) @ self.basis * rate) @ self.basis.T
