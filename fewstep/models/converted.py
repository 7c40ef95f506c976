"""Converted models from disk: the flow that ``fewstep.convert`` wrote, as the field that it was made from."""

from pathlib import Path

from fewstep.common.model_files import class_names_in, load_weights, read_json
from fewstep.common.parsing import checked
from fewstep.flows.described import AGAIN
from fewstep.flows.fields import DiffusionField
from fewstep.flows.tabulated import Tabulated
from fewstep.latents.prompts import Prompts, knows_prompts
from fewstep.latents.vae import VAE_FOLDERS, Latents
from fewstep.models.diffusers_configs import find_scheduler
from fewstep.models.distilled import distilled_as
from fewstep.models.manifests import Diffusion
from fewstep.networks import FAMILIES
from fewstep.networks.configs import keep_facts, public_config

# The diffusers models that have a class in `fewstep.networks.flow_model`.
FLOWS = {
    name: f"Flow{name}"
    for name in (
        *("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel"),
        *("CogVideoXTransformer3DModel", "StableAudioDiTModel", "UNet1DModel"),
    )
}
# Where the original's scheduler is: no sampler needs it, but it says what the network was trained on.
ORIGINAL = "diffusion_scheduler"


def is_converted(folder: Path) -> bool:
    """Whether a folder is a diffusion model that ``fewstep.convert`` wrote as a flow."""
    return any(_class_in(folder / part) in FLOWS.values() for part in ("unet", "transformer"))


def load_converted(folder: Path) -> DiffusionField:
    """The field that was converted: the stock model, on its own schedule. No code of the folder is run.

    Raises:
        FileNotFoundError, ValueError: weights that are missing, damaged or not the model's.
    """
    import diffusers

    from fewstep.networks import flow_model

    part = next(folder / part for part in ("unet", "transformer") if _class_in(folder / part) in FLOWS.values())
    flow = load_weights(getattr(flow_model, _class_in(part)), part)
    name = _class_in(part).removeprefix("Flow")
    config = public_config(flow)
    diffusion = checked(Diffusion, config.pop("diffusion", None), part / "config.json", AGAIN)
    config.pop("flow_timesteps", None)
    stock = getattr(diffusers, name).from_config(config)
    keep_facts(stock, flow)
    stock.load_state_dict(flow.state_dict(), assign=True)
    scheduler = find_scheduler(folder / ORIGINAL)
    field = DiffusionField(FAMILIES[name](stock), scheduler)
    if diffusion.log_ratios is not None:
        # The table that the folder's own code goes by, not one computed anew.
        field.native = Tabulated(tuple(diffusion.log_ratios), diffusion.ends_in_noise)
    vaes = [folder / name for name in VAE_FOLDERS if (folder / name / "config.json").is_file()]
    field.latents = Latents(vaes[0]) if vaes else None
    field.text = Prompts(folder) if knows_prompts(folder) else None
    field.class_names, field.distilled = class_names_in(folder), distilled_as(folder, part, scheduler)
    return field


def _class_in(part: Path) -> str:
    return str(read_json(part / "config.json").get("_class_name"))
