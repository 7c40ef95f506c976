"""The classes of diffusers' schedulers, Stable Audio's too where the package that its sampler wants is not here."""

from functools import cache
from typing import Any

_COSINE = "CosineDPMSolverMultistepScheduler"


def scheduler_class(name: str) -> Any:
    """The scheduler of this name; None where diffusers has none."""
    import diffusers

    return cosine_scheduler_class() if name == _COSINE else getattr(diffusers, name, None)


@cache
def cosine_scheduler_class() -> Any:
    """``CosineDPMSolverMultistepScheduler`` of diffusers, whose sampler draws its noise by torchsde; without that
    package a class of this name that keeps the same config and samples nothing, as what a model was trained on is all
    that is asked of it here."""
    import diffusers
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.utils import is_torchsde_available

    if is_torchsde_available():
        return getattr(diffusers, _COSINE)

    class CosineDPMSolverMultistepScheduler(diffusers.SchedulerMixin, ConfigMixin):
        @register_to_config
        def __init__(
            self,
            sigma_min: float = 0.3,
            sigma_max: float = 500,
            sigma_data: float = 1.0,
            sigma_schedule: str = "exponential",
            num_train_timesteps: int = 1000,
            solver_order: int = 2,
            prediction_type: str = "v_prediction",
            rho: float = 7.0,
            solver_type: str = "midpoint",
            lower_order_final: bool = True,
            euler_at_final: bool = False,
            final_sigmas_type: str = "zero",
        ) -> None:
            pass

    return CosineDPMSolverMultistepScheduler
