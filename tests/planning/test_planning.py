"""Plans: parameters and bytes against what the CPU really holds, operations against closed forms, no weights needed."""

import inspect
import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys.families import tiny_pipeline
from toys.unet import tiny_field

import fewstep
from fewstep.cli import main
from fewstep.commands.plan import duration, fit_table, number
from fewstep.common.randomness import generator
from fewstep.data import encoded, pairs
from fewstep.data.batch import Batch
from fewstep.evaluation.cost import step_cost
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.models.lora import add_lora
from fewstep.models.weightless import LONGEST, META, text_conditions
from fewstep.networks import MLP
from fewstep.objectives import ITVM, LMD, FlowMatching
from fewstep.planning import plan as planning
from fewstep.planning.counting import LikeAGpu, count_call, count_step
from fewstep.planning.plan import GIB, GPUS, Plan, changes, fit_on, plan
from fewstep.planning.shards import Shards
from fewstep.planning.weightless import carried, sample_of, teacher_without_weights
from fewstep.runs.build import build
from fewstep.runs.export import export
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.step import Step

POINTS: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 2, "batch": 32, "quiet": True},
    "evaluation": {"count": 0},
}


class Linear(nn.Module):
    """One layer without bias, whatever the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


class Attention(nn.Module):
    """A layer that scales the state, and attention of it to itself: (B, heads, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q = self.scale * x
        return nn.functional.scaled_dot_product_attention(q, q, q)


def on_meta(network: nn.Module) -> NetworkField:
    return NetworkField(network.to(META))


def rows(*shape: int, **cond: Tensor) -> Batch:
    return Batch(torch.empty(shape, device=META), cond)


def test_operations_of_a_linear_layer_and_of_attention_are_the_closed_forms() -> None:
    # Forward, and backward to the weights alone: the state needs no gradient.
    assert count_step(on_meta(Linear(8)), FlowMatching(), rows(5, 8)).flops == 2 * (2 * 5 * 8 * 8)
    # Two products forward, five backward, each of 2 * tokens^2 * width, for every row and head.
    product = 2 * 5 * 3 * 16 * 16 * 8
    assert count_step(on_meta(Attention()), FlowMatching(), rows(5, 3, 16, 8)).flops == 7 * product
    assert count_call(on_meta(Attention()), rows(5, 3, 16, 8).data, (0.5,), {}) == 2 * product


def test_attention_keeps_no_matrix_and_under_a_derivative_is_a_plain_product() -> None:
    with LikeAGpu(torch.bfloat16):
        x = torch.empty(1, 2, 512, 8, device=META)
        assert nn.functional.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
    few = count_step(on_meta(Attention()), FlowMatching(), rows(1, 2, 256, 8)).held
    many = count_step(on_meta(Attention()), FlowMatching(), rows(1, 2, 1024, 8)).held
    assert many < 4.2 * few  # a matrix would be sixteen times as large


def test_types_under_autocast_are_those_of_cuda() -> None:
    known = torch._C._dispatch_has_kernel_for_dispatch_key  # pyright: ignore
    assert all(known(f"aten::{name}", "AutocastCUDA") for name in ("linear", "conv2d", "group_norm", "layer_norm"))
    assert not known("aten::silu", "AutocastCUDA")
    x, weight = torch.empty(2, 4, device=META), torch.empty(4, 4, device=META)
    with LikeAGpu(torch.bfloat16):
        half = nn.functional.linear(x, weight)
        assert half.dtype == (half @ weight).dtype == nn.functional.silu(half).dtype == torch.bfloat16
        assert nn.functional.layer_norm(half, (4,)).dtype == (half**2).dtype == torch.float32
        assert (half + x).dtype == torch.float32
    with LikeAGpu() as gpu, gpu.heard(), torch.autocast("meta", torch.float16):
        assert nn.functional.linear(x, weight).dtype == torch.float16


def _held_for_real(student: FlowMap, objective: Any, batch: Batch, target: Any) -> int:
    """Bytes of what autograd saves in a real step on the CPU, each storage once, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = Step(student, objective)(batch, [generator(0)], target, 0.5, 0)[0]
    loss.backward()
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("heads", [{}, {"attention_head_dim": 4}])
def test_bytes_of_a_step_are_those_that_the_cpu_holds(heads: dict[str, Any]) -> None:
    field = tiny_field(**heads)
    student, objective = FlowMap.from_field(field).train(), ITVM(field)
    target, batch = deepcopy(student).eval().requires_grad_(False), Batch(torch.randn(8, 1, 8, 8))
    held = _held_for_real(student, objective, batch, target)
    peak = step_cost(student, objective, batch, target=target, rounds=1).peak_bytes
    for model in (field, student, target):
        model.to(META)
    counted = count_step(student, objective, rows(8, 1, 8, 8), target=target)
    # A GPU's attention pads the sums that it keeps, and the few numbers of a loss live on beside what autograd saves.
    assert held <= counted.held <= 1.01 * held
    assert peak <= counted.peak <= 1.01 * peak


@pytest.mark.takes_seconds
def test_operations_of_a_step_are_those_that_the_cpu_makes() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet: Any = (tiny_field(**blocks, add_attention=False), torch.randn(8, 1, 8, 8), ITVM)
    mlp: Any = (NetworkField(MLP(2, width=8, depth=2)), torch.randn(8, 2), LMD)  # a forward-mode derivative, and back
    for field, data, method in (unet, mlp):
        student, objective = FlowMap.from_field(field).train(), method(field)
        target = deepcopy(student).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as made:
            Step(student, objective)(Batch(data), [generator(0)], target, 0.5, 0)[0].backward()
        for model in (field, student, target):
            model.to(META)
        assert count_step(student, objective, rows(*data.shape), target=target).flops == made.get_total_flops()


@pytest.mark.takes_seconds
def test_checkpointing_keeps_less_and_computes_more() -> None:
    def counted(levels: int, is_checkpointed: bool) -> Any:
        field = tiny_field(layers_per_block=levels).to(META)
        student = FlowMap.from_field(field).to(META).train()
        if is_checkpointed:
            student.network.model.enable_gradient_checkpointing()
        return count_step(student, FlowMatching(), rows(8, 1, 8, 8), precision=torch.bfloat16)

    whole, less = counted(2, False), counted(2, True)
    assert less.held < 0.7 * whole.held
    assert less.peak < whole.peak
    assert whole.flops < less.flops < 1.5 * whole.flops
    # What is recomputed for a block is gone before the next: deeper networks keep more, their peak is no higher for it.
    deep = counted(4, True)
    assert deep.peak - deep.held < 1.05 * (less.peak - less.held)


@pytest.mark.takes_seconds
def test_half_precision_keeps_less_of_what_grows_with_the_batch() -> None:
    field = tiny_field().to(META)
    student = FlowMap.from_field(field).to(META).train()

    def growth(precision: torch.dtype | None) -> int:
        low, high = (
            count_step(student, ITVM(field), rows(n, 1, 8, 8), target=student, precision=precision) for n in (4, 8)
        )
        return high.held - low.held

    assert 0.4 * growth(None) < growth(torch.bfloat16) < 0.9 * growth(None)


def test_guidance_asks_about_times_that_are_not_there_and_both_calls_are_counted() -> None:
    field = tiny_field(classes=5)
    student = FlowMap.from_field(field)
    labels = torch.zeros(8, dtype=torch.long, device=META)
    guided = Guided(field, 2.0, (0.1, 0.9), null={"class_labels": 4})
    for model in (guided, student):
        model.to(META)
    x = torch.empty(8, 1, 8, 8, device=META)
    assert count_call(guided, x, (0.5,), {"class_labels": labels}) == 2 * count_call(
        field, x, (0.5,), {"class_labels": labels}
    )


def _configurations(name: str, folder: Path) -> Path:
    """The folder of a tiny pipeline, of which no file of weights is left."""
    tiny_pipeline(name).save_pretrained(folder)
    if name == "flux":  # Flux.1-dev is told the strength of guidance
        config = folder / "transformer" / "config.json"
        config.write_text(config.read_text().replace('"guidance_embeds": false', '"guidance_embeds": true'))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


FEW = {"training.batch": "4", "training.accumulate": "2", "training.chunk": "2"}
TWINS = {"sd15-itvm": "sd", "sdxl-itvm": "sdxl", "sd3-itvm-lora": "sd3", "flux-itvm-lora": "flux"}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", TWINS)
def test_recipes_of_published_models_are_planned_from_configurations_alone(name: str, tmp_path: Path) -> None:
    folder = _configurations(TWINS[name], tmp_path / "model")
    found = plan(load_recipe(name, {"teacher.source": str(folder), **FEW}))
    parts = {part.name: part.numbers for part in found.parts}
    assert (found.step.rows, found.least.rows) == (2, 2)  # each term of the loss needs a row
    assert found.passing(2) == found.step.peak
    assert parts["gradients"] == parts["weights that train"] == found.trained
    if name.endswith("lora"):
        # One copy of the base is teacher and student; of the teacher's own there are positions at most, a buffer.
        assert parts.get("teacher", 0) < found.parameters / 8
        assert found.trained < parts["weights that stay"]
    else:
        assert parts["teacher"] < found.trained == found.parameters
        assert parts["averaged weights"] == parts["slow copy of the objective"] == found.parameters


@pytest.mark.takes_seconds
def test_a_plan_is_of_the_run_that_follows(tmp_path: Path) -> None:
    recipe = load_recipe(POINTS)
    found, built = plan(recipe), build(recipe)
    assert found.parameters == sum(p.numel() for p in built.student.parameters())
    assert found.shape == (2,)
    run(recipe, tmp_path / "run")
    files = (tmp_path / "run" / "checkpoints").rglob("*.safetensors")
    numbers = sum(
        value.nbytes for file in files for name, value in load_file(file).items() if not name.endswith(".step")
    )
    assert found.checkpoint == numbers
    parts = {part.name: part.bytes for part in found.parts}
    assert parts["gradients"] == parts["averaged weights"] == parts["two moments of AdamW"] / 2 == 4 * found.parameters


@pytest.mark.parametrize("teacher", ["eight-gaussians", "spiral", "checkerboard"])
@pytest.mark.parametrize("student", [{}, {"path": "vp"}])
@pytest.mark.parametrize("data", ["eight-gaussians", "teacher"])
def test_exact_teachers_are_planned_without_numbers(teacher: str, student: dict[str, Any], data: str) -> None:
    recipe = {**POINTS, "teacher": teacher, "student": POINTS["student"] | student, "data": data}
    assert plan(load_recipe(recipe)).shape == (2,)


@pytest.mark.takes_seconds
def test_a_derivative_that_checkpoints_cannot_follow_is_refused() -> None:
    keys = {"training.batch": "4", "training.gradient_checkpointing": "true", "student": "auto"}
    with pytest.raises(ValueError, match="gradient_checkpointing: LMD differentiates the network forward"):
        plan(load_recipe("fashion-mnist-itvm", {**keys, "data": "teacher", "objective": "LMD"}))


OWN = """
from fewstep import NetworkField
from fewstep.networks import MLP


def made():
    return NetworkField(MLP(2, width=8, depth=2))
"""


@pytest.mark.takes_seconds
def test_a_change_that_the_parts_refuse_is_left_out(tmp_path: Path) -> None:
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    teacher = {"source": "toys.unet:tiny_field", "options": blocks}
    training = {"steps": 2, "batch": 4, "chunk": 4, "precision": "bf16"}
    lmd = {"name": "lmd", "teacher": teacher, "data": "teacher", "objective": "LMD", "training": training}
    [(keys, found)] = changes(load_recipe({**lmd, "evaluation": {"count": 0}}))
    assert keys == {"student.lora.rank": 16}
    assert found.recipe.student.lora is not None
    # A network of one's own has no checkpoints either.
    (tmp_path / "own.py").write_text(OWN)
    teacher = {"source": f"{tmp_path / 'own.py'}:made"}
    own = load_recipe({**POINTS, "teacher": teacher, "student": "auto"})
    assert [list(keys)[-1] for keys, _ in changes(own)] == ["training.precision", "student.lora.rank"]


@pytest.mark.takes_seconds
def test_a_student_that_goes_on_from_a_run_or_an_export_is_planned(tmp_path: Path) -> None:
    run(load_recipe(POINTS), tmp_path / "first")
    for start in (tmp_path / "first", export(tmp_path / "first", tmp_path / "export")):
        found = plan(load_recipe({**POINTS, "student": {"start": str(start)}}))
        bare = plan(load_recipe(POINTS))
        assert (found.parameters, found.fixed, found.step) == (bare.parameters, bare.fixed, bare.step)


@pytest.mark.takes_seconds
def test_a_start_beside_a_teacher_with_text_is_planned_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    student = FlowMap.from_field(cast(NetworkField, fewstep.load(tmp_path / "model")))
    keys = {"teacher.source": str(tmp_path / "model"), "student.start": str(export(student, tmp_path / "fast"))}
    found = plan(load_recipe("sd15-itvm", {**keys, "student.lora.rank": "2", **FEW}))
    add_lora(student, rank=2)
    assert found.parameters == sum(p.numel() for p in student.parameters())
    assert found.trained == sum(p.numel() for p in student.parameters() if p.requires_grad)
    # The weights that it goes on from lie beside the teacher's.
    numbers = {part.name: part.numbers for part in found.parts}
    assert numbers["weights that stay"] >= found.parameters - found.trained
    assert numbers["teacher"] >= found.parameters / 2


@pytest.mark.takes_seconds
def test_rows_have_the_size_that_the_data_say(tmp_path: Path) -> None:
    """The tiny VAE makes a latent of 2 x 2 pixels, and its model's own images are 16 x 16."""
    source = {"teacher.source": str(_configurations("sd", tmp_path / "model"))}

    def shape_with(data: str, **options: str) -> tuple[int, ...]:
        keys = {"data.name": data, **{f"data.{key}": value for key, value in options.items()}}
        recipe = load_recipe("sd15-itvm", {**source, **keys})
        return sample_of(recipe, teacher_without_weights(recipe))[0]

    assert shape_with("./pictures") == (4, 8, 8)
    assert shape_with("./pictures", size="24") == (4, 12, 12)
    with pytest.raises(ValueError, match="images of 17 x 17: the VAE makes one latent of 2 x 2"):
        shape_with("./pictures", size="17")
    for size in ("big", "0", "1.5"):
        with pytest.raises(ValueError, match=rf"size='?{size}'?: the side of an image is a whole number"):
            shape_with("./pictures", size=size)
    for kind, folder in ((encoded, tmp_path / "encoded"), (pairs, tmp_path / "pairs")):
        folder.mkdir()
        file, known = folder / kind.FACTS, {"count": 4, "shard": 4, "labels": None, "command": "fewstep encode"}
        file.write_text(json.dumps({"format": kind.FORMAT, "shape": [4, 6, 6], **known}))
        assert shape_with(str(folder)) == (4, 6, 6)
        with pytest.raises(
            ValueError, match=r"takes no options, got 'size'|unknown option of .* 'size': Known: buckets"
        ):
            shape_with(str(folder), size="16")
        file.write_text(json.dumps({"format": kind.FORMAT, "shape": [16, 6, 6], **known}))
        with pytest.raises(ValueError, match=r"latents of shape \(16, 6, 6\), and the teacher's have 4 channels"):
            shape_with(str(folder))


def _plan(recipe: Any, fixed: int, per_row: int) -> Plan:
    """A plan with these bytes, whose smallest micro-batch has two rows."""
    counted = {rows: planning.Counted(rows, 100 * rows, 0, per_row * rows) for rows in (2, recipe.training.batch)}
    part = (planning.Part("weights that train", fixed // 4, fixed),)
    least, step = counted[2], counted[recipe.training.batch]
    return Plan(recipe, "FlowMap", 10, 10, (2,), part, Shards((), 0, {}, frozenset(), False), step, least, 0, 10, 20, 4)


def test_the_largest_micro_batch_that_fits_and_the_keys_that_say_so() -> None:
    recipe = load_recipe(POINTS, {"training.batch": "96"})  # chunks of 48 rows
    found = _plan(recipe, 10 * GIB, GIB // 4)
    assert found.passing(10) == 10 * GIB // 4
    fit = fit_on(found, 48 * GIB)
    assert fit is not None
    assert (fit.micro, fit.keys) == (96, {"training.accumulate": 1})
    fit = fit_on(found, 24 * GIB)  # (10 + 48 / 4) / .95 + 1
    assert fit is not None
    assert (fit.micro, fit.keys, fit.bytes) == (32, {"training.accumulate": 3, "training.chunk": 32}, found.total(32))
    assert fit_on(found, 13 * GIB) is not None  # (10 + 2 / 4) / .95 + 1 is 12.05
    assert fit_on(found, 12 * GIB) is None
    load_recipe(POINTS, {"training.batch": "96", **{key: str(value) for key, value in fit.keys.items()}})
    assert found.flops == 9600
    assert found.seconds(GPUS["A100"].full, "A100", 0.5) == 2
    assert _plan(load_recipe(POINTS, {"training.precision": "bf16"}), 1, 1).seconds(312e12, "A100", 1.0) == 1


def test_what_does_not_fit_is_told_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"training.precision": "float32", "training.gradient_checkpointing": "false"}
    recipe = load_recipe("sd15-itvm", {**keys, "training.batch": "8", "training.accumulate": "1"})

    def planned(recipe: Any) -> Plan:
        """30 GiB of weights, 5 with an adapter, and 10 GiB a row, 1 with checkpoints."""
        per_row = GIB if recipe.training.gradient_checkpointing else 10 * GIB
        return _plan(recipe, (5 if recipe.student.lora else 30) * GIB, per_row)

    monkeypatch.setattr(planning, "plan", planned)
    wanted = [list(some) for some, _ in changes(recipe)]
    assert wanted == [list(wanted[-1])[: n + 1] for n in range(3)]
    assert wanted[-1] == ["training.precision", "training.gradient_checkpointing", "student.lora.rank"]
    assert [some for some, _ in changes(load_recipe(POINTS))] == [{"training.precision": "bf16"}]
    monkeypatch.setattr("fewstep.commands.plan.CARDS", (7, 24, 48, 80))
    rows_of = {row[0]: (row[1], row[3]) for row in fit_table(planned(recipe))[1]}
    change = "--training.precision bf16 --training.gradient_checkpointing true"
    assert rows_of == {
        "7 GB": (None, "does not fit: 8.4 GiB at the very least"),
        "24 GB": (8, f"{change} --student.lora.rank 16 --training.accumulate 1"),
        "48 GB": (8, f"{change} --training.accumulate 1"),
        "80 GB": (4, "--training.accumulate 2"),
    }


def test_the_command_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "points.yaml"
    file.write_text(load_recipe(POINTS).as_yaml())
    assert main(["plan", str(file), "--training.batch", "64", "--gpu", "H100", "--utilization", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("points: a FlowMap of a MLP of ")
    assert "two moments of AdamW" in out
    assert "at 50% of a GPU's peak" in out
    assert "A100" not in out
    assert f"fewstep distill {file} --training.batch 64 --training.accumulate 1" in err
    assert main(["plan", str(file), "--gpu", "H10"]) == 2
    assert "unknown GPU 'H10': did you mean" in capsys.readouterr().err
    assert main(["plan", str(file), "--utilization", "40"]) == 2
    assert "lies in (0, 1]" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "needs a recipe, --teacher or --data" in capsys.readouterr().err
    assert main(["plan", str(file), "--training.accumulate", "3"]) == 2
    assert "batch=32 cannot be shared equally" in capsys.readouterr().err
    assert main(["distill", str(file), "--dry-run"]) == 0
    assert f"fewstep plan {file}" in capsys.readouterr().err


def test_of_a_teacher_on_the_hub_only_configurations_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = _configurations("flux", tmp_path / "model"), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    recipe = load_recipe("flux-itvm-lora", {"teacher.source": "somebody/flux"})
    teacher: Any = teacher_without_weights(recipe)
    assert asked == [("somebody/flux", ["*.json"])]
    assert {p.device.type for p in teacher.parameters()} == {"meta"}
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"guidance_embeds": true', '"guidance_embeds": false'))
    with pytest.raises(ValueError, match=r"somebody/flux' is told no strength of guidance: say null"):
        teacher_without_weights(recipe)


# As published.
PARAMETERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.2-dev": 32_223_281_152,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Tongyi-MAI/Z-Image": 6_154_908_736,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": 1_604_462_752,
    "stabilityai/stable-audio-open-1.0": 1_056_939_136,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 2 * 14_288_491_584,
}


@pytest.mark.takes_seconds
def test_published_models_are_planned_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name, count in PARAMETERS.items():
        teacher: Any = teacher_without_weights(
            load_recipe(
                {"name": "p", "teacher": name, "data": "./pictures", "objective": "ITVM", "training": {"steps": 1}}
            )
        )
        assert sum(p.numel() for p in teacher.parameters()) == count, name
    for recipe in TWINS:
        assert load_recipe(recipe).teacher.source in PARAMETERS  # pyright: ignore[reportOptionalMemberAccess]
    assert carried("somebody/flux") is None


def test_null_is_a_name_where_yaml_has_it_as_a_key() -> None:
    recipe = load_recipe("sd15-itvm")
    assert recipe.teacher is not None
    assert recipe.teacher.guidance is not None
    assert recipe.teacher.guidance.null == "text"
    assert load_recipe(yaml.safe_load(recipe.as_yaml())) == recipe


def test_prompts_are_as_long_as_their_pipelines_make_them() -> None:
    for name, tokens in LONGEST.items():
        kind: Any = getattr(diffusers, name)
        if name != "HunyuanImagePipeline":  # the length is its own
            assert inspect.signature(kind.__call__).parameters["max_sequence_length"].default == tokens


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["flux2", "qwenimage", "z-image", "sana", "lumina2", "chroma", "hunyuanimage"])
def test_prompts_of_language_models_are_planned_as_long_as_they_are(name: str, tmp_path: Path) -> None:
    """Without the masks, which weigh nothing and of which the meta device would not tell the tokens."""
    tiny_pipeline(name).save_pretrained(tmp_path)
    field: Any = fewstep.load(tmp_path)
    encoded, planned = field.text.encode(["a cat", "a dog"]), text_conditions(field, 2)
    assert planned["encoder_hidden_states"].shape == encoded["encoder_hidden_states"].shape


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_conditions_have_the_shapes_that_text_encoders_give(name: str, tmp_path: Path) -> None:
    tiny_pipeline(name).save_pretrained(tmp_path / "model")
    field: Any = fewstep.load(tmp_path / "model")
    encoded = field.text.encode(["a cat", "a dog"])
    planned = text_conditions(field, 2)
    assert {key: tuple(value.shape) for key, value in planned.items()} == {
        key: tuple(value.shape) for key, value in encoded.items()
    }


@pytest.mark.takes_seconds
@pytest.mark.parametrize("length", ["77", -1, 10**30])
def test_lengths_of_prompts_are_numbers(length: Any, tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": length}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has model_max_length .* is needed"):
        plan(load_recipe({**POINTS, "teacher": str(tmp_path), "student": "auto", "data": "some/photos"}))


def test_numbers_and_durations_are_said_in_their_units() -> None:
    assert [number(value) for value in (12, 1.5e6, 2e9, 3.25e12)] == ["12 ", "1.5 M", "2 G", "3.25 T"]
    assert [duration(s) for s in (0, 5e-6, 0.25, 30, 90, 7200, 172800)] == [
        "0 us", "5 us", "250 ms", "30 s", "1.5 min", "2 h", "2 days",
    ]  # fmt: skip
