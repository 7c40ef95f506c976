"""LoRA: an adapter that starts silent, trains alone, is averaged, kept and resumed alone, merges, and others load."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from toys.adapters import adapted, call, images, points, quick, shifted, trained
from toys.families import conditions, tiny_pipeline
from toys.unet import tiny_unet

from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed
from fewstep.models.adapter_files import DIFFUSERS_FILE, PEFT_FILE, load_adapter, save_adapter
from fewstep.models.lora import add_lora, has_lora, merge_lora
from fewstep.objectives import ITVM
from fewstep.runs.loading import load


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def maps():
    return FlowMap.from_field(images())


MODELS = {
    "points": points,
    "images": images,
    "map": maps,
    "labels": lambda: FlowMap.from_field(images(classes=5)),
    "guided": lambda: FlowMap.from_field(images(), guidance=True),
}
IN_FULL = {
    "points": None,
    "images": None,
    "map": ["class_embedding"],
    "labels": ["class_embedding.second"],
    "guided": ["class_embedding.second", "class_embedding.strength"],
}


def base(model):
    """The frozen weights, by the names they had before."""
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_changes_no_bit(name):
    model = MODELS[name]()
    before = call(model)
    add_lora(model, rank=3, alpha=7.0)
    assert has_lora(model)
    assert torch.equal(call(model), before)


def test_the_adapter_alone_trains():
    """Not a bit of the base moves in a training, and every weight of the adapter does."""
    student = adapted(points())
    before, kept = {n: p.detach().clone() for n, p in student.named_parameters()}, dict(points().named_parameters())
    quick(student)
    after = dict(student.named_parameters())
    assert {n for n in after if not torch.equal(after[n], before[n])} == {n for n in after if ".lora_" in n}
    now = base(student)
    assert len(now) == 8
    assert all(torch.equal(kept[name], value) for name, value in now.items())


@pytest.mark.takes_seconds
def test_an_adapter_learns_what_the_base_did_not():
    """A network that knows the flow of one Gaussian learns another by rank 4: against the exact velocity."""
    field = points(width=32)
    near, far = (GaussianField(torch.full((2,), m), 0.25 * torch.eye(2)) for m in (0.0, 2.0))
    quick(field, data=shifted(2048, 0.0), steps=150, batch=128, lr=5e-3, ema=None)
    draw = torch.Generator().manual_seed(1)
    t, noise = torch.rand(512, generator=draw), torch.randn(512, 2, generator=draw)

    def error(model, exact, mean):
        x = (1 - t[:, None]) * noise + t[:, None] * (mean + 0.5 * torch.randn(512, 2, generator=draw))
        with torch.no_grad():
            return (model(x, t) - exact(x, t)).square().mean().item()

    assert error(field, near, 0.0) < 0.1
    frozen = error(field, far, 2.0)
    add_lora(field, rank=4)
    quick(field, data=shifted(2048, 2.0), steps=150, batch=128, lr=1e-2, ema=None)
    assert error(field, far, 2.0) < 0.1 * frozen


def test_the_new_weights_are_as_many_as_the_formula_says():
    """r (in + out) for a linear layer, r (in k k + out) for a convolution."""
    for make in (points, images):
        bare = make()
        expected = 0
        for layer in bare.modules():
            if isinstance(layer, nn.Linear):
                expected += 3 * (layer.in_features + layer.out_features)
            if isinstance(layer, nn.Conv2d):
                expected += 3 * (layer.in_channels * layer.kernel_size[0] ** 2 + layer.out_channels)
        size = sum(p.numel() for p in bare.parameters())
        model = adapted(bare, rank=3)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == size


def test_targets_are_names_or_a_regular_expression():
    layers = lambda model: {n for n, m in model.network.named_modules() if hasattr(m, "lora_A")}  # noqa: E731
    assert layers(adapted(points(), targets=["input", "hidden.0"])) == {"input", "hidden.0"}
    assert layers(adapted(points(), targets="hidden.*|output")) == {"hidden.0", "output"}
    attention = layers(adapted(images(), targets=["to_q", "to_out.0"]))
    assert attention
    assert all(name.endswith((".to_q", ".to_out.0")) for name in attention)


class Nested(nn.Module):
    """Names that end alike, and layers that no adapter can reach."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 8)
        self.block = nn.ModuleDict({"proj": nn.Conv2d(2, 2, 1, groups=2), "up": nn.Linear(8, 8)})
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x, t):
        return self.out(self.layer(self.block["up"](self.proj(x)))[:, 0] if x.ndim == 3 else self.proj(x))


def test_by_default_only_what_can_be_adapted_is():
    """Not a convolution in groups, and not what torch's transformer layers read past an adapter."""
    model = adapted(NetworkField(Nested()))
    assert {n for n, m in model.network.named_modules() if hasattr(m, "lora_A")} == {"proj", "block.up", "out"}
    with pytest.raises(ValueError, match=r"layer\.linear1 cannot be adapted, as TransformerEncoderLayer uses"):
        add_lora(NetworkField(Nested()), targets=["linear1"])


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_merged_model_is_plain_and_gives_the_same(name, dtype, close):
    if name == "map" and dtype is torch.float64:
        pytest.skip("diffusers embeds a timestep in class_labels in float32 alone")
    bare = MODELS[name]().to(dtype)
    model = trained(adapted(deepcopy(bare), alpha=3.0))
    merged = merge_lora(model)
    assert (call(model) - call(bare)).abs().max() > 1e-3
    torch.testing.assert_close(call(merged), call(model), rtol=0, atol=close)
    assert has_lora(model)
    assert not has_lora(merged)
    assert type(merged) is type(bare)
    assert [(n, p.shape, p.requires_grad) for n, p in merged.named_parameters()] == [
        (n, p.shape, True) for n, p in bare.named_parameters()
    ]
    assert not {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_comes_back_from_its_folder(name, tmp_path):
    bare = MODELS[name]()
    model = trained(adapted(deepcopy(bare), alpha=3.0, dropout=0.25))
    assert save_adapter(model.eval(), tmp_path / "adapter") == tmp_path / "adapter"
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", PEFT_FILE]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == IN_FULL[name]
    back = deepcopy(bare).eval()
    load_adapter(back, tmp_path / "adapter")
    assert torch.equal(call(back), call(model))
    assert [(n, p.requires_grad) for n, p in back.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    dropouts = [m.p for m in back.modules() if isinstance(m, nn.Dropout) and m.p == 0.25]
    assert dropouts


@pytest.mark.parametrize("name", MODELS)
def test_peft_itself_reads_an_adapter(name, tmp_path):
    """What trains in full, the second time, is among it."""
    from peft import PeftModel

    bare = MODELS[name]()
    model = trained(adapted(deepcopy(bare), alpha=3.0))
    save_adapter(model, tmp_path)
    wrapped = deepcopy(bare)
    inner = wrapped.network if name == "points" else wrapped.network.model
    inner = PeftModel.from_pretrained(inner, str(tmp_path)).base_model.model
    if name == "points":
        wrapped.network = inner
    torch.testing.assert_close(call(wrapped), call(model), rtol=0, atol=2e-6)


def test_an_adapter_of_pefts_own_is_read_and_kept(tmp_path):
    """With its own rank for one layer, and a layer that it saved in full."""
    from peft import LoraConfig, get_peft_model

    theirs = points()
    config = LoraConfig(
        r=2, target_modules=["input", "time"], modules_to_save=["output"], rank_pattern={"time": 3}, lora_alpha=5
    )
    wrapped = get_peft_model(theirs.network, config)  # pyright: ignore[reportArgumentType]
    trained(wrapped)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    theirs.network = wrapped.base_model.model
    ours = points()
    load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(call(ours), call(theirs))
    assert ours.network.output.weight.requires_grad
    again = points()
    load_adapter(again, save_adapter(ours, tmp_path / "ours"))
    assert torch.equal(call(again), call(theirs))


class Headed(nn.Module):
    """A diffusers model, and more."""

    def __init__(self):
        super().__init__()
        self.model, self.head = tiny_unet(), nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.head(self.model(x, t).sample)


def test_layers_around_a_diffusers_model_are_adapted_too(tmp_path):
    torch.manual_seed(0)
    bare = NetworkField(Headed())
    model = trained(adapted(deepcopy(bare)))
    assert all(hasattr(layer, "lora_A") for layer in (model.network.head, model.network.model.conv_in))
    load_adapter(bare, save_adapter(model, tmp_path))
    assert torch.equal(call(bare), call(model))


def test_what_reads_an_image_trains():
    """Where a U-Net takes more channels than it gives, its first convolution is adapted beside the attention."""
    field = NetworkField(Conditional(conditional_unet(7)), Reversed(), "flow", path=Linear())
    add_lora(field)
    layers = {n.rpartition(".")[2] for n, m in field.named_modules() if hasattr(m, "lora_A")}
    assert layers == {"to_q", "to_k", "to_v", "0", "conv_in"}


def conditional_unet(in_channels=4):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


class Conditional(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, timestep, **cond):
        return self.model(x, timestep, **cond).sample


@pytest.mark.takes_seconds
def test_diffusers_loads_the_adapter_of_a_conditional_unet(tmp_path):
    """`pipeline.load_lora_weights(folder)` gives the same outputs, by the alpha in the metadata; and so do we."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    field = trained(adapted(NetworkField(Conditional(conditional_unet()), Reversed(), "flow", path=Linear()), alpha=6))
    layers = {n.rpartition(".")[2] for n, m in field.named_modules() if hasattr(m, "lora_A")}
    assert layers == {"to_q", "to_k", "to_v", "0"}
    save_adapter(field, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [DIFFUSERS_FILE]
    with safe_open(tmp_path / DIFFUSERS_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 6
    assert all(name.startswith("unet.") for name in load_file(tmp_path / DIFFUSERS_FILE))

    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 3, 8, generator=draw)
    expected = field.network(x, torch.tensor([10.0, 500.0]), encoder_hidden_states=text)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=conditional_unet(), scheduler=DDIMScheduler(), requires_safety_checker=False, **none
    )
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipe.unet(x, torch.tensor([10.0, 500.0]), text).sample, expected, rtol=0, atol=1e-6)

    back = NetworkField(Conditional(conditional_unet()), Reversed(), "flow", path=Linear())
    load_adapter(back, tmp_path)
    again = back.network(x, torch.tensor([10.0, 500.0]), encoder_hidden_states=text)
    assert torch.equal(again, expected)


def test_the_adapter_of_a_field_goes_into_its_students_too(tmp_path):
    """A style's adapter in a map made of the field that it was trained on, as in the field and then the map, though
    the second time has layers whose names end like those that the adapter is for."""
    field = trained(adapted(images(classes=5)))
    save_adapter(field, tmp_path)
    expected, student = FlowMap.from_field(merge_lora(field)), FlowMap.from_field(images(classes=5))
    load_adapter(student, tmp_path)
    assert not [n for n, m in student.named_modules() if "second" in n and hasattr(m, "lora_A")]
    assert (call(expected) - call(FlowMap.from_field(images(classes=5)))).abs().max() > 1e-3
    torch.testing.assert_close(call(student), call(expected), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_diffusers_goes_into_a_conditional_student(tmp_path):
    """Its file says `unet.`, and the student's class is called TwoTimeUNet2DConditionModel."""
    field = load(tiny_pipeline("sd"))
    style = trained(adapted(load(tiny_pipeline("sd"))))
    save_adapter(style, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [DIFFUSERS_FILE]
    student, expected = FlowMap.from_field(field), FlowMap.from_field(merge_lora(style))
    load_adapter(student, tmp_path)
    x, s, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.4]), torch.tensor([0.6, 1.0]), conditions("sd")
    torch.testing.assert_close(student(x, s, t, **cond), expected(x, s, t, **cond), rtol=1e-4, atol=1e-5)


@pytest.mark.takes_seconds
def test_a_map_trains_its_second_time_and_the_adapter():
    """The second time is new: it moves in full, in the average too, and nothing frozen does."""
    teacher = images()
    student = adapted(FlowMap.from_field(teacher))
    still = base(student)
    second = {n: p.detach().clone() for n, p in student.named_parameters() if "class_embedding" in n}
    assert len(second) == 4
    result = quick(student, ITVM(teacher), torch.randn(64, 1, 8, 8), steps=3, batch=8)
    for model in (result.student, result.ema):
        now = dict(model.named_parameters())
        moved = {n for n in now if ".lora_B." in n and now[n].abs().max() > 0}
        assert moved
        assert not torch.equal(now["network.model.class_embedding.linear_2.weight"], second[
            "network.model.class_embedding.linear_2.weight"
        ])  # fmt: skip
    assert all(torch.equal(value, still[name]) for name, value in base(result.student).items())
    assert not any(".lora_" in n for n in second)


def test_a_map_starts_from_weights_and_not_from_an_adapter():
    field = adapted(images())
    with pytest.raises(ValueError, match=r"the field has an adapter: start from merge_lora\(field\)"):
        FlowMap.from_field(field)
    student = FlowMap.from_field(merge_lora(trained(field)))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        torch.testing.assert_close(student.velocity(x, t), field(x, t), rtol=1e-4, atol=1e-4)
