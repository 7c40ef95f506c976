"""The report of a conversion: what the diffusion model was, what the flow is, and how well the two agree."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.common.console import markdown
from fewstep.evaluation.agreement import Agreement, scheduler_of
from fewstep.flows.fields import NetworkField
from fewstep.flows.paths import Linear
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.tabulated import Tabulated
from fewstep.networks import OfDiffusers

# What a sampler of diffusers may do besides its steps, and a flow does not.
_SWITCHES = ("clip_sample", "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_CHOICES = ("timestep_spacing", "steps_offset", "final_sigmas_type")


@dataclass(frozen=True)
class Conversion:
    """What :func:`fewstep.convert` found and wrote.

    Attributes:
        folder: where it is.
        model, written: the class of the network in diffusers, and that of the flow in the folder.
        pipeline: the class of the pipeline in the folder.
        missing: those of its parts that the folder does not have, and that are to be passed when loading.
        left_out: parts that the original's folder does not have whole, and that the pipeline does without.
        by_hand: why the pipeline can be loaded but not called, empty where it can be.
        scheduler, flow_scheduler: the class of the original's, and of the folder's.
        schedule: the name of the betas, or EDM, cosine or flow.
        train_steps: steps of a discrete schedule, None for a continuous one.
        log_snr: of the schedule's noisiest and cleanest point with a signal, log(alpha^2 / sigma^2); None for a flow.
        zero_snr: whether the schedule has a last step without signal.
        prediction: what the network predicts, by its name in ``fewstep.flows.predictions``.
        learned_variance: whether it predicts a variance too, of which a flow makes no use.
        options: what the original's sampler does by its config, and a flow does not.
        covered: the times of the linear path (0 noise, 1 data) between which the network was trained.
        outside: the shares of uniform times below and above these.
        agreement: of the samples; None where it was not checked.
        image: the file with both samplers side by side, None where there is none.
    """

    folder: Path
    model: str
    written: str
    pipeline: str
    missing: tuple[str, ...]
    left_out: tuple[str, ...]
    by_hand: str
    scheduler: str
    flow_scheduler: str
    schedule: str
    train_steps: int | None
    log_snr: tuple[float, float] | None
    zero_snr: bool
    prediction: str
    learned_variance: bool
    options: dict[str, Any]
    covered: tuple[float, float]
    outside: tuple[float, float]
    agreement: Agreement | None = None
    picture: str | None = None

    @property
    def verdict(self) -> str:
        """One line: whether the flow is the model."""
        return "not checked: the samplers were not compared" if self.agreement is None else self.agreement.verdict

    def rows(self) -> list[tuple[str, str]]:
        """What there is to know, as pairs of a name and a line."""
        steps = "" if self.train_steps is None else f", {self.train_steps} steps"
        snr = "" if self.log_snr is None else f", log-SNR {self.log_snr[0]:.3g} to {self.log_snr[1]:.3g}"
        zero = ", zero SNR at the last step" if self.zero_snr else ""
        below, above = (f"{100 * share:.2g} %" for share in self.outside)
        held = (
            f"{below} of uniform t below, {above} above: the network is asked at its last step, and its estimate of "
            "the data is held towards noise, that of the noise towards data"
            if sum(self.outside)
            else "none"
        )
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        is_flow = self.prediction in ("velocity", "flow")
        parts = f" (without its {', '.join(self.missing)}: pass them when loading)" if self.missing else ""
        parts += f" (without its {', '.join(self.left_out)}, which it does not need)" if self.left_out else ""
        parts += f", which loads it but cannot be called: {self.by_hand}; see README.md" if self.by_hand else ""
        return [
            ("schedule", f"{self.scheduler}: {self.schedule}{steps}{snr}{zero}"),
            ("prediction", self.prediction + (", and a variance, which a flow does not use" * self.learned_variance)),
            (
                "not in a flow",
                options or ("nothing: it is one, and is written as it is" if is_flow else "nothing"),
            ),
            ("times covered", f"t = {self.covered[0]:.4f} to {self.covered[1]:.4f} (0 is noise, 1 is data)"),
            ("times outside", held),
            ("written as", f"{self.written} with {self.flow_scheduler}, for {self.pipeline}{parts}"),
        ]

    def text(self) -> str:
        """All of it as Markdown."""
        parts = [f"**{self.verdict[0].upper()}{self.verdict[1:]}.**", markdown(["", "the model"], self.rows())]
        if self.agreement is not None:
            agreement = self.agreement
            parts += [
                f"Both from the same noise, {agreement.count} samples of seed {agreement.seed}, begun at the first "
                "point of the schedule. The difference is RMS over the deviation of the samples, against the original "
                "at its finest; what is left of it in fine steps is what the steps of the two still cost.",
                markdown(*agreement.table()),
            ]
        if self.picture is not None:
            parts.append(
                f"![both samplers]({self.picture})\n\nThe original, the flow by Euler in as many steps, and the flow "
                "minus the original (grey is none)."
            )
        return "\n\n".join(parts) + "\n"

    def json(self) -> str:
        """The same for programs."""
        values = {**asdict(self), "verdict": self.verdict}
        del values["folder"]
        return json.dumps(values, indent=2) + "\n"


def describe(field: NetworkField) -> dict[str, Any]:
    """What a report says of the model itself: its fields from ``model`` to ``outside`` but those of the folder."""
    network: Any = field.network
    scheduler, model = scheduler_of(field), network.model
    config: Any = scheduler.config
    ends = log_ratio_ends(field.native)
    low, high = _covered(field)
    options = {}
    if not field.is_flow:  # a flow keeps its sampler
        options = {name: True for name in _SWITCHES if config.get(name)}
        if options.get("clip_sample"):
            options["clip_sample_range"] = config.get("clip_sample_range", 1.0)
        options |= {name: config[name] for name in _CHOICES if config.get(name) not in (None, 0, False)}
    other = "cosine" if isinstance(field.native, Cosine) else "flow" if ends is None else "EDM"
    steps = field.native.steps if isinstance(field.native, Tabulated) else None
    trained = "trained betas" if config.get("trained_betas") is not None else f"{config.get('beta_schedule')} betas"
    return {
        "model": type(model).__name__,
        "scheduler": type(scheduler).__name__,
        "schedule": trained if steps else other,
        "train_steps": len(scheduler.betas) if steps else None,
        "log_snr": None if ends is None else (2 * ends[0], 2 * ends[1]),
        "zero_snr": isinstance(field.native, Tabulated) and field.native.ends_in_noise,
        "prediction": field.prediction,
        "learned_variance": isinstance(network, OfDiffusers)
        and (model.config.get("out_channels") or 0) == 2 * network.channels,
        "options": options,
        "covered": (low, high),
        "outside": (low, 1 - high),
    }


def _covered(field: NetworkField) -> tuple[float, float]:
    """The times of the linear path between which the network is asked at its own, and not at the nearest it knows."""
    ends = torch.tensor(field.native.hold_range(field.prediction), dtype=torch.float64)
    low, high = Linear().time_of(field.native.alpha(ends), field.native.sigma(ends)).tolist()
    return low, high


def log_ratio_ends(native: Trajectory) -> tuple[float, float] | None:
    """log(alpha / sigma) of a schedule's noisiest and cleanest point with a signal; None for a path that reaches both
    ends."""
    if isinstance(native, Tabulated):
        return native.log_ratios[-1], native.log_ratios[0]
    return (-math.log(native.sigma_max), -math.log(native.sigma_min)) if isinstance(native, Preconditioned) else None
