"""The table of what each family can do (docs/guides/loading.md) against what the twins of the families do."""

from typing import Any

import diffusers
from toys.places import ROOT
from toys.students import NAMES, network

from fewstep.networks import FAMILIES, SECOND_TIMES, with_second_time
from fewstep.networks.configs import with_image
from fewstep.pipelines.stock_prompts import RETURNED

# Whose prompts tell which family's model.
_PROMPTED = {
    "AnyFlow": "AnyFlowPipeline",
    "AuraFlow": "AuraFlowPipeline", "Chroma": "ChromaPipeline", "CogVideoX": "CogVideoXPipeline",
    "ConditionalUNet": "StableDiffusionPipeline",
    "Flux": "FluxPipeline", "Flux2": "Flux2KleinPipeline", "HunyuanImage": "HunyuanImagePipeline", "LTX": "LTXPipeline",
    "Lumina2": "Lumina2Pipeline", "PixArt": "PixArtSigmaPipeline", "QwenImage": "QwenImagePipeline",
    "SD3": "StableDiffusion3Pipeline", "Sana": "SanaPipeline", "StableAudio": "StableAudioPipeline",
    "Wan": "WanPipeline", "WanExperts": "WanPipeline",
    "ZImage": "ZImagePipeline",
}  # fmt: skip


def _can(make: Any) -> bool:
    try:
        make()
    except ValueError:
        return False
    return True


def can(name: str) -> tuple[str, list[str]]:
    """A row of the table for a twin: its family, and what it can."""
    twin = network(name)
    family = type(twin).__name__
    times = [how for how in SECOND_TIMES if _can(lambda how=how: with_second_time(twin, second_time=how))]
    pipeline = getattr(diffusers, _PROMPTED.get(family, "DiTPipeline"))
    beside, guided = _can(lambda: with_image(twin, 3)), _can(lambda: with_second_time(twin, guidance=True))
    cells = [", ".join(times), *("yes" if yes else "-" for yes in (
        guided, beside, hasattr(twin.model, "load_lora_adapter") and hasattr(pipeline, "load_lora_weights"),
        _PROMPTED.get(family) in RETURNED,
    ))]  # fmt: skip
    return family, cells


TWINS = [*(name for name in NAMES if " " not in name and name != "sdxl"), "wan experts", "anyflow", "stable audio"]


def test_every_family_has_its_row() -> None:
    text = (ROOT / "docs/guides/loading.md").read_text().partition("## What each can do")[2].partition("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:3] == "| `"
    ]
    found = {row[0].strip("`"): row[1:] for row in table}
    assert set(found) == {kind.__name__ for kind in FAMILIES.values()}
    for name in TWINS:
        family, cells = can(name)
        assert found[family] == cells, family
