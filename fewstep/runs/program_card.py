"""What lies beside a program (``fewstep.runs.runtimes``): what it takes, and the code that samples it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.signature import classes_of
from fewstep.models.writing import vae_config

_START = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("map.onnx")


def step(x, s, t):  # X_{s,t}(x)
    inputs = {"x": x, "s": np.full(rows, s, np.float32), "t": np.full(rows, t, np.float32), **cond}
    return session.run(None, inputs)[0]""",
    "torch": """import torch

program = torch.export.load("map.pt2").module()


def step(x, s, t):  # X_{s,t}(x)
    inputs = [x, np.full(rows, s, np.float32), np.full(rows, t, np.float32), *cond.values()]
    return program(*map(torch.from_numpy, inputs)).detach().numpy()""",
}
_RENOISED = """    x = step(x, i / steps, 1.0)
    t = (i + 1) / steps
    if t < 1:  # noise is added again, as the map knows the way to t = 1 alone
        x = np.float32(t) * x + np.float32(1 - t) * random.standard_normal(x.shape, dtype=np.float32)"""


def program_config(model: FlowMap, inputs: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: what is to be known of a program, for other programs.

    Args:
        inputs: one row of each, by name. facts: of the file.
    """
    described = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": ["batch", *value.shape[1:]]}
        for name, value in inputs.items()
    }
    config: dict[str, Any] = {
        "_class_name": "FlowMapProgram",
        **facts,
        "inputs": described,
        "output": described["x"],
        "shape": list(inputs["x"].shape[1:]),
        "classes": classes_of(model),
        "path": type(model.path).__name__,
        "gamma": model.gamma,
        "guidance": model.guidance,
        "moments": model.moments,
    }
    if model.latents is not None:
        known = ("_class_name", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
        config["vae"] = {name: value for name, value in vae_config(model.latents).items() if name in known}
    return config


def program_card(model: FlowMap, name: str, config: Mapping[str, Any]) -> str:
    """``README.md``: how a program is sampled, in code that runs where it lies."""
    shape = ", ".join(map(str, config["shape"]))
    is_renoised = model.gamma == 1 and model.path.same_as(Linear())
    lines = [
        f"# {name}",
        "",
        f"A flow map as a program: `{config['file']}` takes x (B, {shape}) at the times s to the times t, (B,) each, "
        "in [0, 1]: t = 0 is noise, t = 1 is data. One call is one step.",
        "",
        "```python",
        "import numpy as np",
        _START[config["format"]],
        "",
        "",
        "rows, steps = 4, 2",
        f"cond = {{{', '.join(_filled(config))}}}",
        "random = np.random.default_rng(0)",
        f"x = random.standard_normal((rows, {shape}), dtype=np.float32)"
        + ("  # put rows of the data set here that it goes from" if model.path.two_sided else ""),
        "for i in range(steps):",
        _RENOISED if is_renoised else "    x = step(x, i / steps, (i + 1) / steps)",
        "```",
        "",
    ]
    if "vae" in config:
        lines += [
            "x are latents. Their images are those of the VAE, whose numbers are in `config.json`: "
            "`vae.decode(x / scaling_factor + shift_factor)`. The VAE is not in this folder.",
            "",
        ]
    if config["moments"] is not None:
        mean, std = config["moments"]
        lines += [
            f"The data were brought to mean 0 and standard deviation 1: samples are `x * {std!r} + {mean!r}` in their "
            "units.",
            "",
        ]
    if any(key.startswith("encoder") for key in config["inputs"]):
        lines += ["The conditions of a prompt come from the model's text encoders, which are not in it either.", ""]
    if config["largest_batch"] is not None:
        lines += [f"A call takes up to {config['largest_batch']} rows.", ""]
    difference = config["largest_difference"]
    lines += [f"Largest difference from the model itself, on random inputs: {difference:.1e}. Written by fewstep.", ""]
    return "\n".join(lines)


def _filled(config: Mapping[str, Any]) -> list[str]:
    """The conditions in numpy, of the right shapes and types."""
    filled = []
    for key, value in config["inputs"].items():
        if key in ("x", "s", "t"):
            continue
        shape = ", ".join(["rows", *map(str, value["shape"][1:])]) + ("," if len(value["shape"]) == 1 else "")
        number = f"{config['guidance'] or 1.0:g}" if key == "guidance" else "0"
        filled.append(f'"{key}": np.full(({shape}), {number}, np.{value["dtype"]})')
    return filled
