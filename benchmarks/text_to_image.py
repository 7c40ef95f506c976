"""Text to image end to end, on clothes: a small latent diffusion model of captions, and students of it.

    python benchmarks/text_to_image.py FOLDER teacher
    python benchmarks/text_to_image.py FOLDER distill --way full lora
    python benchmarks/text_to_image.py FOLDER distill --way longer corrected adversarial    # they go on from full
    python benchmarks/text_to_image.py FOLDER judge
    python benchmarks/text_to_image.py FOLDER picture --out docs/images/text-to-image.png

``teacher`` writes 20,000 pictures of Fashion-MNIST at 32 x 32 with captions ("a coat"), trains a VAE of them (latents
4 x 8 x 8), encodes both once, trains a U-Net to denoise the latents by their captions, a tenth of which is dropped, and
saves it all as a ``StableDiffusionPipeline``. Its CLIP has random weights: what matters is that it is frozen and that
captions differ. ``distill`` runs `fewstep distill` on that folder and the pictures, with guidance 2 folded in; the ways
beside full and lora go on from full's student for about as long: ``longer`` by more of the same, the others with a
finish. ``--widths``, ``--vae-steps``, ``--teacher-steps`` and ``--steps`` make it all smaller, for an hour of one core.
``judge`` decodes 1,000 samples a step count, and writes FOLDER/text-to-image.json: the Frechet distance in the features
of a small classifier of the pictures, recall, and how many are of the class that the prompt names. Its last rows are
other pictures, as they are and through the VAE: nearer than these no model of the latents comes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from record import here, write
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import fewstep
from fewstep.data import ArrayData, Dropped
from fewstep.evaluation.extractor import accuracy, extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, precision_recall
from fewstep.generation.drawing import draw

NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
PROMPTS = [f"a {name}" for name in NAMES]
GUIDANCE, COUNT = 2.0, 1000
WAYS = {
    "full": ["--training.lr", "3e-4"],
    "lora": ["--training.lr", "1e-3", "--student.lora.rank", "16"],
}
_ON = ["--training.lr", "3e-4", "--training.warmup", "20", "--training.ema", "0.99"]
_FINISH = [*_ON, "--objective.begin", "0", "--objective.rollout", "[1, 2, 1, 4]"]
# These go on from the student of "full".
ONWARD = {
    "longer": _ON,
    "corrected": [*_FINISH, "--objective.finish", "corrected"],
    "adversarial": [*_FINISH, "--objective.finish", "adversarial"],
}


def clothes(split: str, count: int | None = None) -> ArrayData:
    """Fashion-MNIST as RGB at 32 x 32, with labels."""
    data: Any = fewstep.load_data("fashion-mnist", split=split)
    pixels = torch.from_numpy(data.array[:count].copy())
    pixels = nn.functional.pad(pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    return ArrayData(pixels, {"class_labels": data.cond["class_labels"][:count]}, classes=NAMES)


def write_pictures(folder: Path) -> None:
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data, lines = clothes("train", 20_000), []
    for i, (pixels, label) in enumerate(zip(data.array, data.cond["class_labels"], strict=True)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": PROMPTS[int(label)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def train_vae(data: ArrayData, steps: int) -> AutoencoderKL:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, sample_size=32,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    draw_rows = torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.randint(len(data.array), (64,), generator=draw_rows)
        x = data.rows(index, draw_rows).data
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.sample(draw_rows)).sample - x).square().mean() + 1e-4 * posterior.kl().mean() / 256
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0:
            print(f"VAE, step {step}: {float(loss):.4f}", flush=True)
    with torch.no_grad():
        z = vae.encode(data.rows(torch.arange(512), draw_rows).data).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / float(z.std()))
    return vae.eval()


def text_encoder() -> dict[str, Any]:
    """A CLIP of random weights that reads letters."""
    letters = "abcdefghijklmnopqrstuvwxyz-"
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(known)}, merges=[], model_max_length=16)
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(known), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}


def train_teacher(folder: Path, widths: list[int], vae_steps: int, steps: int) -> None:
    write_pictures(folder / "pictures")
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=tuple(widths), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    scheduler: Any = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    unused: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(
        vae=train_vae(clothes("train", 20_000), vae_steps), unet=unet, scheduler=scheduler, **text_encoder(), **unused
    )
    pipeline.save_pretrained(folder / "pipeline")

    field: Any = fewstep.load(folder / "pipeline")
    fewstep.encode(field, folder / "pictures", folder / "encoded", batch=64)
    data: Any = fewstep.load_data(folder / "encoded")
    null = {"encoder_hidden_states": field.text.null()["encoder_hidden_states"]}
    field.requires_grad_(True)
    result: Any = fewstep.fit(
        field, fewstep.Denoising(), Dropped(data, 0.1, null), steps, batch=64, lr=1e-3, warmup=200, out=folder / "run"
    )
    pipeline.unet = result.ema.network.model
    pipeline.save_pretrained(folder / "pipeline")


def distill(folder: Path, way: str, steps: int) -> None:
    command = [
        "distill", "--teacher", str(folder / "pipeline"), "--data", str(folder / "pictures"), "--training.batch", "64",
        "--teacher.guidance", json.dumps({"scale": GUIDANCE, "null": "text"}), "--evaluation.count", "0",
        "--out", str(folder / f"itvm-{way}"), "--training.steps", str(steps), *(WAYS | ONWARD)[way],
    ]  # fmt: skip
    if way in ONWARD:
        command += ["--student", json.dumps({"start": str(folder / "itvm-full")})]
    print("fewstep", *command, flush=True)
    subprocess.run([sys.executable, "-m", "fewstep", *command], check=True)


def judge(folder: Path, ways: list[str]) -> None:
    classifier = trained_classifier(clothes("train"))
    held_out = clothes("test").rows(torch.arange(5000), torch.Generator()).data
    real = extract(classifier, held_out)
    statistics, like = FeatureStatistics.of(real), real[:COUNT]
    wanted = torch.arange(COUNT) % len(PROMPTS)
    rows: list[list[Any]] = []

    def measured(name: str, calls: int | None, pictures: torch.Tensor, classes: torch.Tensor) -> None:
        found = extract(classifier, pictures)
        fd, recall = frechet_distance(FeatureStatistics.of(found), statistics), precision_recall(like, found)[1]
        rows.append([name, calls, fd, recall, 100 * accuracy(classifier, pictures, classes)])
        print(*rows[-1], flush=True)

    runs = {f"ITVM, {way}": folder / f"itvm-{way}" for way in ways if (folder / f"itvm-{way}").is_dir()}
    for name, source in {**runs, "teacher": folder / "pipeline"}.items():
        model = fewstep.load(source)
        is_map = isinstance(model, fewstep.FlowMap)
        for steps in (1, 2, 4, 8) if is_map else (1, 2, 4, 8, 50):
            guidance = {} if is_map else {"guidance": GUIDANCE}
            pictures, _, calls = draw(model, COUNT, steps, prompts=PROMPTS, decode=True, batch=250, **guidance)
            measured(name, int(calls), pictures, wanted)
    others = clothes("train").rows(torch.arange(20_000, 20_000 + COUNT), torch.Generator())
    vae: Any = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae").eval()
    with torch.no_grad():
        through = vae.decode(vae.encode(others.data).latent_dist.mode()).sample
    measured("other pictures, through the VAE", None, through, others.cond["class_labels"])
    measured("other pictures", None, others.data, others.cond["class_labels"])
    write(
        folder / "text-to-image.json", title="Text to image, clothes", rows=rows,
        columns=["model", "network calls", "FD", "recall", "of the class asked for"],
        formats={"FD": "{:.2f}", "recall": "{:.3f}", "of the class asked for": "{:.1f} %"},
        **here([0], [f"{COUNT} samples against 5,000 pictures, features of a small classifier; recall of {COUNT}."]),
    )  # fmt: skip


def picture(folder: Path, out: Path) -> None:
    """The same noise through student and teacher, a row a number of network calls."""
    import matplotlib.pyplot as plt

    lines = [("itvm-full", 1, {}), ("itvm-full", 2, {}), ("itvm-full", 4, {})]
    lines += [("pipeline", steps, {"guidance": GUIDANCE}) for steps in (1, 2, 50)]
    figure, axes = plt.subplots(len(lines), len(PROMPTS), figsize=(9, 5.6))
    for k, (source, steps, guidance) in enumerate(lines):
        pictures, _, calls = draw(
            fewstep.load(folder / source), len(PROMPTS), steps, prompts=PROMPTS, decode=True, seed=3, **guidance
        )
        for axis, image, prompt in zip(axes[k], pictures, PROMPTS, strict=True):
            axis.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if k == 0:
                axis.set_title(prompt, fontsize=8)
        name = f"{'teacher' if guidance else 'student'}\n{calls:g} call{'s' * (calls != 1)}"
        axes[k][0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=["teacher", "distill", "judge", "picture"])
    parser.add_argument("--way", nargs="+", default=list(WAYS), choices=[*WAYS, *ONWARD])
    parser.add_argument("--widths", type=int, nargs=2, default=[64, 96], help="of the U-Net, in multiples of 16")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=800, help="of a student; a step with a finish costs two or more")
    parser.add_argument("--out", type=Path, default=Path("text-to-image.png"))
    args = parser.parse_args()
    if args.stage == "picture":
        picture(args.folder, args.out)
    elif args.stage == "teacher":
        train_teacher(args.folder, args.widths, args.vae_steps, args.teacher_steps)
    elif args.stage == "distill":
        for way in args.way:
            distill(args.folder, way, args.steps)
    else:
        judge(args.folder, args.way)


if __name__ == "__main__":
    main()
