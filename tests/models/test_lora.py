"""LoRA: an adapter that starts silent, trains alone, is averaged, kept and resumed alone, merges, and others load."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from toys.families import conditions, tiny_pipeline
from toys.unet import tiny_field, tiny_unet

from fewstep.common.errors import TrainingError
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import Guided, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed
from fewstep.models.adapter_files import DIFFUSERS_FILE, PEFT_FILE, load_adapter, save_adapter
from fewstep.models.lora import add_lora, has_lora, merge_lora
from fewstep.networks import MLP
from fewstep.objectives import ITVM, FlowMatching
from fewstep.runs.build import build
from fewstep.runs.export import export
from fewstep.runs.opening import load, open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training import checkpoints
from fewstep.training.ema import Ema
from fewstep.training.fingerprint import differences, flat
from fewstep.training.fit import fit

MLP_SIZE = 2 * 16 + 16 + 64 * 16 + 16 + 16 * 16 + 16 + 16 * 2 + 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def points(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return NetworkField(MLP(2, **{"width": 16, "depth": 2, **options})).to(dtype)


def images(prediction="v_prediction", **options):
    return tiny_field(prediction, **options)


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


def call(model, seed=0):
    """The model on noise, at several times; a map at several pairs."""
    draw = torch.Generator().manual_seed(seed)
    is_points = isinstance(model.network, MLP)
    dtype = next(model.parameters()).dtype
    x = torch.randn(3, *((2,) if is_points else (1, 8, 8)), generator=draw, dtype=torch.float64).to(dtype)
    s, t = torch.tensor([0.1, 0.5, 0.9]).to(dtype), torch.tensor([0.4, 0.8, 1.0]).to(dtype)
    config = {} if is_points else model.network.model.config
    cond = {"class_labels": torch.tensor([0, 1, 4])} if config.get("num_class_embeds") else {}
    with torch.no_grad():
        return model.average_velocity(x, s, t, **cond) if isinstance(model, FlowMap) else model(x, s, **cond)


def trained(model, size=0.1):
    """A model whose adapter speaks, as after training."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight)
    return model


def adapted(model, **options):
    torch.manual_seed(3)
    add_lora(model, **{"rank": 2, **options})
    return model


def base(model):
    """The frozen weights, by the names they had before."""
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def shifted(count=256, shift=2.0):
    draw = torch.Generator().manual_seed(5)
    return 0.5 * torch.randn(count, 2, generator=draw) + shift


def quick(student, objective=None, data=None, **options):
    options = {"steps": 3, "batch": 16, "quiet": True, "checkpoint_every": 2, "lr": 1e-2, **options}
    return fit(student, objective or FlowMatching(), shifted() if data is None else data, **options)


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


def test_the_average_shares_what_is_frozen():
    """One copy of the base in memory; the adapter's average is the formula's."""
    student = trained(adapted(points(dtype=torch.bfloat16)))
    ema = Ema(student, 0.75)
    mine = dict(ema.module.named_parameters())
    for name, weight in student.named_parameters():
        assert (mine[name] is weight) == (not weight.requires_grad)
        assert mine[name].dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    before = {name: p.detach().clone() for name, p in mine.items()}
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight += 1.0
    ema.update(0)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, before[name] + (0.25 if ".lora_" in name else 0.0))


def test_a_checkpoint_holds_the_adapter_and_the_buffers_alone(tmp_path):
    student = adapted(points())
    student.register_buffer("calls", torch.tensor(5.0))
    quick(student, out=tmp_path, steps=2)
    tensors = checkpoints.load(checkpoints.latest(tmp_path / "checkpoints")).tensors
    moving = {n for n, p in student.named_parameters() if p.requires_grad}
    assert set(tensors["model"]) == set(tensors["ema"]) == moving | {"calls"}
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "checkpoints" / "step-00000002").iterdir()}
    numbers = sum(p.numel() for p in student.parameters() if p.requires_grad) + 1
    assert numbers * 4 < sizes["model.safetensors"] < numbers * 4 + 2000  # the header


def test_with_nothing_frozen_a_checkpoint_holds_all(tmp_path):
    student = points()
    quick(student, out=tmp_path, steps=2)
    found = checkpoints.load(checkpoints.latest(tmp_path / "checkpoints"))
    assert list(found.state["files"]) == [f"{n}.safetensors" for n in ("model", "ema", "optimizer-student")]
    assert sum(value.numel() for value in found.tensors["model"].values()) == MLP_SIZE
    assert "frozen" not in found.state


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path):
    """Dropout, the average and the target among it: stopped after 2 of 5 steps, and not stopped."""
    teacher = points(5)

    def train(out, steps):
        student = adapted(FlowMap.from_field(points()), dropout=0.2)
        return quick(student, ITVM(teacher), out=tmp_path / out, steps=steps, schedule="constant")

    whole = train("whole", 5)
    train("parts", 2)
    parts = train("parts", 5)
    assert parts.step == 5
    for a, b in ((whole.student, parts.student), (whole.ema, parts.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    last = [tmp_path / out / "checkpoints" / "step-00000005" for out in ("whole", "parts")]
    names = [p.name for p in last[0].iterdir() if p.suffix == ".safetensors"]
    assert {"model.safetensors", "ema.safetensors", "target.safetensors"} <= set(names)
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in names)


def test_another_base_or_a_missing_weight_is_refused(tmp_path):
    quick(adapted(points()), out=tmp_path, steps=2)
    with pytest.raises(ValueError, match="the frozen weights are not those that"):
        quick(adapted(points(seed=1)), out=tmp_path, steps=4)
    path = checkpoints.latest(tmp_path / "checkpoints")
    found = checkpoints.load(path)
    found.tensors["model"].pop("network.input.lora_A.default.weight")
    state = {key: value for key, value in found.state.items() if key not in ("files", "step")}
    checkpoints.save(path.parent, 3, found.tensors, state, keep=2)
    with pytest.raises(ValueError, match=r"are not those of the student.*Missing key.*network\.input\.lora_A"):
        quick(adapted(points()), out=tmp_path, steps=4)


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


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("models") / "ddpm"
    DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "images.npy"
    import numpy as np

    np.save(data, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).numpy())
    return {
        "name": "tuned",
        "teacher": str(teacher_folder),
        "student": {"network": "auto", "kind": "field", "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}},
        "data": str(data),
        "objective": "FlowMatching",
        "training": {"steps": 3, "batch": 8, "checkpoint_every": 2, "quiet": True, "lr": 1e-2},
        "evaluation": {"count": 0, "steps": [1]},
    }


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return out, run(load_recipe(recipe), out).result


@pytest.mark.takes_seconds
def test_a_recipe_trains_an_adapter_and_the_run_loads_back(finished, teacher_folder):
    out, result = finished
    back = open_run(out)
    assert torch.equal(call(back.model), call(result.ema))
    assert (call(back.model) - call(load(teacher_folder))).abs().max() > 1e-4
    tensors = checkpoints.load(checkpoints.latest(out / "checkpoints")).tensors
    assert all(".lora_" in name for name in tensors["model"])
    merged = load(out)
    assert not has_lora(merged)
    torch.testing.assert_close(call(merged), call(result.ema), rtol=0, atol=1e-5)


def test_the_teacher_and_the_student_of_a_recipe_have_one_base(recipe):
    built = build(load_recipe(recipe))
    theirs = {id(p) for p in built.teacher.parameters()}
    assert theirs == {id(p) for p in built.student.parameters() if not p.requires_grad}


@pytest.mark.takes_seconds
def test_the_seed_of_a_recipe_decides_the_first_weights(recipe):
    first = lambda seed: [  # noqa: E731
        p.detach() for p in build(load_recipe({**recipe, "seed": seed})).student.parameters() if p.requires_grad
    ]
    assert all(torch.equal(a, b) for a, b in zip(first(1), first(1), strict=True))
    assert not torch.equal(first(1)[0], first(2)[0])


def test_a_recipe_without_lora_is_the_run_it_was():
    recipe = load_recipe({
        "name": "x", "data": "checkerboard", "student": "mlp", "objective": "FlowMatching", "training": {"steps": 1}
    })  # fmt: skip
    assert recipe.student.lora is None
    now = flat(recipe.fingerprint())
    before = {key: value for key, value in now.items() if key != "student.lora"}
    assert differences(before, now) == []


@pytest.mark.takes_seconds
def test_an_export_is_merged_and_an_adapter_is_the_adapter(finished, teacher_folder, tmp_path):
    out, result = finished
    merged = load(export(out, tmp_path / "model"))
    torch.testing.assert_close(call(merged), call(result.ema), rtol=0, atol=1e-5)
    assert sorted(dict(merged.named_parameters())) == sorted(dict(load(teacher_folder).named_parameters()))
    folder = export(out, tmp_path / "adapter", adapter=True)
    tuned = load(teacher_folder)
    load_adapter(tuned, folder)
    torch.testing.assert_close(call(tuned), call(result.ema), rtol=0, atol=2e-6)
    with pytest.raises(FileExistsError):
        export(out, tmp_path / "adapter", adapter=True)
    export(out, tmp_path / "adapter", adapter=True, overwrite=True)


@pytest.mark.takes_seconds
def test_flags_make_a_lora_run(teacher_folder, recipe, tmp_path, capsys):
    import yaml

    from fewstep.cli import main

    bare = {**recipe, "student": {"network": "auto", "kind": "field"}}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(bare))
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "tune.yaml"), "--student.lora.rank", "3", "--out", str(out)]) == 0
    assert open_run(out).recipe.student.lora.rank == 3
    assert main(["export", str(out), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    assert main(["train", str(tmp_path / "tune.yaml"), "--student.lora.rnk", "3"]) == 2
    assert "did you mean 'student.lora.rank'?" in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_a_distilled_map_of_a_recipe_trains_by_lora(recipe, tmp_path):
    distil = {**recipe, "objective": "ITVM", "student": {"network": "auto", "lora": {"rank": 2}}}
    result = run(load_recipe(distil), tmp_path / "run").result
    back = open_run(tmp_path / "run").model
    assert isinstance(back, FlowMap)
    assert torch.equal(call(back), call(result.ema))


def test_what_cannot_be_is_refused_before_anything_changes(tmp_path, monkeypatch):
    field = points()
    for options, words in (
        ({"rank": 0}, "rank of an adapter is 0"),
        ({"alpha": 0.0}, "alpha of an adapter is 0"),
        ({"dropout": 1.0}, "dropout of an adapter is 1"),
        ({"dropout": -0.1}, "lies in"),
        ({"targets": ["to_q"]}, r"matches targets \['to_q'\]; there is: hidden\.0, input, output, time"),
        ({"targets": "("}, "no regular expression"),
    ):
        with pytest.raises(ValueError, match=words):
            add_lora(field, **options)
    with pytest.raises(ValueError, match="a Guided has no network to adapt"):
        add_lora(Guided(field, 2.0, null={"class_labels": 0}))
    with pytest.raises(ValueError, match="has no adapter to save"):
        save_adapter(field, tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        load_adapter(field, tmp_path)
    assert all(p.requires_grad for p in field.parameters())
    with monkeypatch.context() as context:
        context.setitem(__import__("sys").modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'fewstep\[lora\]'"):
            add_lora(field)
    save_adapter(adapted(field), tmp_path)
    with pytest.raises(ValueError, match="there is an adapter in the model already"):
        add_lora(field)
    with pytest.raises(ValueError, match="is not one of this UNet2DModel, which has no layer"):
        load_adapter(images(), tmp_path)
    with pytest.raises(ValueError, match="is not one of this MLP"):
        load_adapter(points(width=8), tmp_path)


def test_lora_on_random_weights_is_refused(recipe):
    tree = {**recipe, "teacher": None, "student": {"network": "unet", "lora": {"rank": 2}}}
    with pytest.raises(ValueError, match="the student starts from random ones"):
        build(load_recipe(tree))


def test_training_errors_are_still_ours(tmp_path):
    """A damaged checkpoint of an adapter is named as any other."""
    quick(adapted(points()), out=tmp_path, steps=2)
    (tmp_path / "checkpoints" / "step-00000002" / "ema.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"ema\.safetensors is missing"):
        quick(adapted(points()), out=tmp_path, steps=4)


def test_an_adapter_that_would_never_see_the_image_is_refused(recipe):
    student = {"network": "auto", "kind": "field", "image": 1, "lora": {"rank": 2, "targets": ["to_q"]}}
    with pytest.raises(ValueError, match=r"student.image adds channels to the layer conv_in.*name conv_in among"):
        build(load_recipe({**recipe, "student": student}))


def test_a_map_starts_from_weights_and_not_from_an_adapter():
    field = adapted(images())
    with pytest.raises(ValueError, match=r"the field has an adapter: start from merge_lora\(field\)"):
        FlowMap.from_field(field)
    student = FlowMap.from_field(merge_lora(trained(field)))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        torch.testing.assert_close(student.velocity(x, t), field(x, t), rtol=1e-4, atol=1e-4)
