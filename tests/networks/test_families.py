"""The families of diffusers as networks of a field: what they call, and how they refuse."""

from typing import Any

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    UNet2DModel,
)
from torch import Tensor, nn
from toys.families import MODELS, conditions, tiny_model
from toys.unet import tiny_student, tiny_unet

from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, VariancePreserving
from fewstep.flows.signature import classes_of, shape_of
from fewstep.generation.drawing import draw
from fewstep.networks import FAMILIES, ConditionalUNet, DiT, Flux, PixArt, TwoTimeUNet, UNet
from fewstep.networks.two_times.patches import pack, unpack

NAMES = list(MODELS)
# Of the latents, where the config says none.
SIDES = {"flux": 128, "qwenimage": 128, "chroma": 128, "z-image": 128, "flux2": 64, "hunyuanimage": 64}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIME = torch.tensor([10.0, 700.5])


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name) for name in NAMES}


def bare(name: str, model: Any, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The call of diffusers' own pipeline, written out."""
    text = cond.get("encoder_hidden_states")
    match name:
        case "sd":
            return model(x, time, encoder_hidden_states=text).sample
        case "sdxl":
            added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
            return model(x, time, encoder_hidden_states=text, added_cond_kwargs=added).sample
        case "dit":
            return model(x, timestep=time, class_labels=cond["class_labels"]).sample[:, :4]
        case "pixart":
            added = {"resolution": cond["resolution"], "aspect_ratio": cond["aspect_ratio"]}
            return model(x, encoder_hidden_states=text, timestep=time, added_cond_kwargs=added).sample.chunk(2, 1)[0]
        case "sd3":
            pooled = cond["pooled_projections"]
            return model(x, timestep=time, encoder_hidden_states=text, pooled_projections=pooled).sample
        case "qwenimage":
            rows, channels, height, width = x.shape
            output = model(
                hidden_states=QwenImagePipeline._pack_latents(x[:, :, None], rows, channels, height, width),
                timestep=time / 1000,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=cond["encoder_hidden_states_mask"],
                img_shapes=[[(1, height // 2, width // 2)]] * rows,
            ).sample
            return QwenImagePipeline._unpack_latents(output, 8 * height, 8 * width, 8)[:, :, 0]
        case "flux2":
            ids = Flux2Pipeline._prepare_latent_ids(x)
            output = model(
                hidden_states=Flux2Pipeline._pack_latents(x),
                timestep=time / 1000,
                encoder_hidden_states=text,
                txt_ids=Flux2Pipeline._prepare_text_ids(text),  # pyright: ignore[reportArgumentType]
                img_ids=ids,
                guidance=cond.get("guidance"),
            ).sample
            return torch.as_tensor(Flux2Pipeline._unpack_latents_with_ids(output, ids))
        case "z-image":
            assert text is not None
            lengths = cond["encoder_attention_mask"].sum(1)
            prompts = [row[:length] for row, length in zip(text, lengths, strict=True)]
            output = model(list(x.unsqueeze(2).unbind(0)), (1000 - time) / 1000, prompts, return_dict=False)[0]
            return -torch.stack([one.float() for one in output]).squeeze(2)
        case "sana":
            return model(x, encoder_hidden_states=text, timestep=time * model.config.timestep_scale,
                         encoder_attention_mask=cond["encoder_attention_mask"]).sample  # fmt: skip
        case "auraflow":
            return model(x, encoder_hidden_states=text, timestep=time / 1000).sample
        case "lumina2":
            mask = cond["encoder_attention_mask"].bool()
            return -model(x, 1 - time / 1000, text, mask).sample
        case "chroma":
            rows, channels, height, width = x.shape
            assert text is not None
            mask = torch.cat([cond["encoder_attention_mask"].to(x), torch.ones(rows, height * width // 4)], dim=1)
            output = model(
                hidden_states=ChromaPipeline._pack_latents(x, rows, channels, height, width),
                timestep=time / 1000,
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3),
                img_ids=ChromaPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", x.dtype),
                attention_mask=mask,
            ).sample
            return ChromaPipeline._unpack_latents(output, 8 * height, 8 * width, 8)
        case "hunyuanimage":
            return model(x, timestep=time, **cond).sample
        case _:
            rows, channels, height, width = x.shape
            assert text is not None
            output = model(
                hidden_states=FluxPipeline._pack_latents(x, rows, channels, height, width),
                timestep=time / 1000,
                guidance=cond.get("guidance"),
                pooled_projections=cond["pooled_projections"],
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3),
                img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", x.dtype),
            ).sample
            return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_model_is_what_its_pipeline_calls(name: str, models: dict[str, Any]) -> None:
    cond = conditions(name)
    network = FAMILIES[MODELS[name][0]](models[name])
    with torch.no_grad():
        output = network(X, TIME, **cond)
        assert torch.equal(output, bare(name, models[name], X, TIME, cond))
        assert output.std() > 0.01
        for key, value in cond.items():  # each condition is heard
            assert not torch.equal(network(X, TIME, **{**cond, key: value.flip(0)}), output), key


@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_each_family_is_finite_and_says_what_it_makes(name: str, models: dict[str, Any]) -> None:
    network = FAMILIES[MODELS[name][0]](models[name])
    is_diffusion = name in ("sd", "sdxl", "dit", "pixart")
    scheduler: Any = DDPMScheduler() if is_diffusion else FlowMatchEulerDiscreteScheduler()
    field = DiffusionField(network, scheduler)
    with torch.no_grad():
        for time in (0.0, 0.5, 1.0):
            assert field(X, time, **conditions(name)).isfinite().all()
    side = SIDES.get(name, 8)
    assert shape_of(field) == (4, side, side)
    assert classes_of(field) == (5 if name == "dit" else 0)


def test_flux_sees_oblong_latents_as_its_pipeline_does(models: dict[str, Any]) -> None:
    x, cond = torch.randn(2, 4, 4, 6), conditions("flux")
    with torch.no_grad():
        assert torch.equal(Flux(models["flux"])(x, TIME, **cond), bare("flux", models["flux"], x, TIME, cond))
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 4, 6))
    assert torch.equal(unpack(pack(x), 4, 6), x)
    assert Flux(models["flux"], size=32).shape == (4, 32, 32)
    with pytest.raises(ValueError, match="5 x 6 are not of 2 x 2 patches"):
        Flux(models["flux"])(torch.randn(2, 4, 5, 6), TIME, **cond)


def test_flux_takes_guidance_where_it_was_distilled_to(models: dict[str, Any]) -> None:
    cond, guidance = conditions("flux"), torch.tensor([1.0, 3.5])
    model = tiny_model("flux", guidance_embeds=True)
    with torch.no_grad():
        given = Flux(model)(X, TIME, **cond, guidance=guidance)
        assert torch.equal(given, bare("flux", model, X, TIME, {**cond, "guidance": guidance}))
    with pytest.raises(ValueError, match="needs the condition guidance"):
        Flux(model)(X, TIME, **cond)
    with pytest.raises(ValueError, match=r"takes no guidance.*guidance_embeds"):
        Flux(models["flux"])(X, TIME, **cond, guidance=guidance)


@pytest.mark.parametrize("name", NAMES)
def test_a_condition_that_is_missing_is_named(name: str, models: dict[str, Any]) -> None:
    network = FAMILIES[MODELS[name][0]](models[name])
    for key in network.needed:
        others = {other: value for other, value in conditions(name).items() if other != key}
        with pytest.raises(ValueError, match=f"{MODELS[name][0]} needs the condition {key}"):
            network(X, TIME, **others)


def test_other_conditions_of_a_unet_are_passed_on() -> None:
    model = tiny_model("sd", num_class_embeds=5, time_cond_proj_dim=6)
    network, cond = ConditionalUNet(model), conditions("sd")
    text, labels, extra = cond["encoder_hidden_states"], torch.tensor([0, 4]), torch.randn(2, 6)
    mask = torch.tensor([[1.0] * 8, [1.0] * 3 + [0.0] * 5])
    with torch.no_grad():
        output = network(X, TIME, text, labels, timestep_cond=extra, encoder_attention_mask=mask)
        expected = model(X, TIME, text, labels, timestep_cond=extra, encoder_attention_mask=mask).sample
    assert torch.equal(output, expected)
    assert network.classes == 5
    with pytest.raises(ValueError, match="needs the condition class_labels"):
        network(X, TIME, text)


def test_a_pixart_is_told_which_tokens_count_and_sizes_only_where_it_wants_them(models: dict[str, Any]) -> None:
    cond, mask = conditions("pixart"), torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    network, text = PixArt(models["pixart"]), cond["encoder_hidden_states"]
    other = torch.where(mask.bool()[..., None], text, torch.randn_like(text))
    with torch.no_grad():
        output = network(X, TIME, **cond, encoder_attention_mask=mask)
        assert not torch.equal(output, network(X, TIME, **cond))
        assert torch.equal(
            output, network(X, TIME, **{**cond, "encoder_hidden_states": other}, encoder_attention_mask=mask)
        )
        assert PixArt(tiny_model("pixart", use_additional_conditions=False))(X, TIME, text).shape == X.shape


def test_a_dit_drops_no_labels_by_itself() -> None:
    """In training mode each block of diffusers' would, by torch's global generator."""
    network = DiT(tiny_model("dit")).train()
    with torch.no_grad():
        first, *others = (network(X, TIME, class_labels=torch.tensor([1, 4])) for _ in range(20))
        assert all(torch.equal(first, other) for other in others)
        nothing = network(X, TIME, class_labels=torch.tensor([5, 5]))  # the label for none is still there
    assert not torch.equal(first, nothing)


def test_a_unet_says_its_shape_and_classes_with_one_time_or_two() -> None:
    assert UNet(tiny_unet(classes=5)).shape == (1, 8, 8)
    assert UNet(tiny_unet(sample_size=(8, 16))).shape == (1, 8, 16)
    student = tiny_student("flow", classes=5)
    assert isinstance(student.network, TwoTimeUNet)
    assert (student.network.shape, student.network.classes) == ((1, 8, 8), 5)
    assert tiny_student("flow").network.classes == 0
    with pytest.raises(ValueError, match="UNet2DModel has no sample_size"):
        _ = UNet(tiny_unet(sample_size=None)).shape


def test_a_network_of_ones_own_says_its_shape_and_classes() -> None:
    class Mine(nn.Module):
        shape, classes = (2, 3), 4

        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return x

    field = NetworkField(Mine())
    assert (shape_of(field), classes_of(field)) == ((2, 3), 4)
    samples, cond, _ = draw(field, 3, 1)
    assert samples.shape == (3, 2, 3)
    assert cond["class_labels"].tolist() == [0, 1, 2]
    Mine.classes = 0
    with pytest.raises(ValueError, match="the model has no classes"):
        draw(field, 3, 1, labels=[1])


# Wrapped by hand


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_model_of_diffusers_is_refused_with_the_name_of_its_wrapper(name: str, models: dict[str, Any]) -> None:
    wrapper = FAMILIES[MODELS[name][0]].__name__
    with pytest.raises(ValueError, match=rf"{MODELS[name][0]}.*wrap it first, fewstep\.networks\.{wrapper}\(model\)"):
        DiffusionField(models[name], DDPMScheduler())


class Returns(nn.Module):
    """A network that returns what a function makes of x."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor, *times: Tensor) -> Any:
        return self.give(x)


class OwnUNet(UNet2DModel):
    """A class of one's own, which returns what diffusers' does."""


@pytest.mark.parametrize("native", [Linear(), VariancePreserving()], ids=["as it stands", "converted"])
@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda x: (x,), r"Returns returned a tuple.*x \(2, 4, 8, 8\).*returns the tensor in it.*ConditionalUNet"),
        (lambda x: torch.cat([x, x], 1), r"returned \(2, 8, 8, 8\) .*twice the channels.*the first 4 channels alone"),
        (lambda x: x[:, :1], r"returned \(2, 1, 8, 8\) for x \(2, 4, 8, 8\): a prediction has the shape of x"),
    ],
    ids=["tuple", "variance", "shape"],
)
def test_a_network_that_returns_something_else(native: Any, give: Any, says: str) -> None:
    network = Returns(give)
    with pytest.raises(ValueError, match=says):
        NetworkField(network, native, path=Linear())(X, 0.5)
    with pytest.raises(ValueError, match=says):
        FlowMap(network, native, path=Linear())(X, 0.5, 0.7)


def test_a_network_that_returns_an_object() -> None:
    field = NetworkField(OwnUNet(**{key: value for key, value in tiny_unet().config.items() if key[0] != "_"}))
    with pytest.raises(ValueError, match=r"OwnUNet returned a UNet2DOutput.*returns its \.sample"):
        field(torch.randn(2, 1, 8, 8), 0.5)


# Handed on


def test_latents_and_text_go_where_the_field_goes() -> None:
    latents: Any = object()
    text: Any = object()
    field = NetworkField(UNet(tiny_unet()), prediction="flow")
    assert field.latents is None
    assert field.text is None
    field.latents, field.text = latents, text
    for made in (
        field.on(VariancePreserving()),
        Guided(field, 2.0, null={"class_labels": 0}),
        FlowMap.from_field(field),
    ):
        assert made.latents is latents
        assert made.text is text
