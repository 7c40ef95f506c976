# %% [markdown]
# # A diffusion model as a flow
#
# This notebook is for those who have a diffusion model and want what flow models have: straight paths, Euler steps,
# flow matching, distillation. Nothing needs to be trained for that. A diffusion model *is* a flow, seen along another
# path, and fewstep reads it as one:
#
# ```python
# field = fewstep.load("./my-ddpm")  # a folder of diffusers, or a pipeline in memory
# ```
#
# Here a small DDPM of diffusers is made and trained on handwritten digits. Then it is read as a flow, checked to
# follow the very same trajectories, sampled in fewer steps, and fine-tuned by flow matching. It still is a diffusion
# model at the end.

# %%
import os
from copy import deepcopy

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from IPython.display import Markdown

import fewstep
from fewstep.evaluation.extractor import extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance

STEPS = int(os.environ.get("STEPS", 2000))  # updates of the diffusion model
COUNT = 1797 if STEPS >= 100 else 160  # samples that are measured: as many as there are digits

logging.disable_progress_bar()
plt.rcParams.update({"figure.dpi": 80, "font.size": 9})


def show(rows, count=16):
    """A row of samples for each name."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 0.52 * len(rows)), layout="constrained", squeeze=False)
    for ax, (name, samples) in zip(axes[:, 0], rows.items(), strict=True):
        ax.imshow(torch.cat(list(samples[:count, 0]), dim=1).clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    plt.show()


# %% [markdown]
# ## A diffusion model
#
# All of this is diffusers and plain PyTorch: a U-Net, a schedule of 1000 steps, and the usual loss. It predicts v
# (`prediction_type`); noise or data would do as well, since fewstep reads that from the scheduler.

# %%
digits = fewstep.load_data("digits")  # 1797 pictures of 8 x 8 pixels that come with scikit-learn
images = digits.rows(torch.arange(digits.size), torch.Generator()).data  # (1797, 1, 8, 8) in [-1, 1]

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8, attention_head_dim=16,
)  # fmt: skip
scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)

optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for _ in range(STEPS):
    clean = images[torch.randint(len(images), (64,))]
    noise, k = torch.randn_like(clean), torch.randint(1000, (64,))
    predicted = unet(scheduler.add_noise(clean, noise, k), k).sample
    loss = (predicted - scheduler.get_velocity(clean, noise, k)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()

pipeline = DDPMPipeline(unet.eval(), scheduler)
print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, last loss {float(loss.detach()):.3f}")

# %% [markdown]
# ## Read as a flow
#
# `fewstep.load` takes the pipeline, or its folder, and gives a velocity field $v_t(x)$ on the linear path
# $x_t = t\,x_1 + (1-t)\,x_0$. The weights are the same, no table is rounded, and nothing is trained.
#
# How it works: the state of the diffusion at step $k$ is $x_k = a_k\,x_1 + s_k\,x_0$, with $a_k^2 + s_k^2 = 1$. Divide
# by $a_k + s_k$, and it is a state of the linear path, at the time $t = a_k / (a_k + s_k)$. So each step of the
# diffusion has its time in the flow. Noise and data are mixed alike there, and what the network knows at one it knows
# at the other.

# %%
field = fewstep.load(pipeline)
print(type(field).__name__, "on", field.path, "from a network that predicts", field.prediction)

k = torch.arange(1000)
a, s = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
t = a / (a + s)

figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
axes[0].plot(k, a, label="data, a")
axes[0].plot(k, s, label="noise, s")
axes[0].set(title="the schedule", xlabel="step k of the diffusion")
axes[0].legend()
axes[1].plot(k, t, color="tab:green")
axes[1].set(title="each step has its time in the flow", xlabel="step k", ylabel="t = a / (a + s)")
ddim = t[torch.arange(999, 0, -100)]
axes[2].eventplot([ddim, torch.arange(10) / 10], lineoffsets=[1, 0], linelengths=0.6, colors=["tab:red", "tab:blue"])
axes[2].set(title="where ten steps begin", xlabel="time t of the flow", yticks=[1, 0], yticklabels=["DDIM", "Euler"])
plt.show()

# %% [markdown]
# Look at the right panel. DDIM's ten steps are equal in $k$, and so crowd where there is nearly nothing but noise.
# Equal steps in $t$ spend more of them where digits take shape.
#
# ## The same trajectories
#
# DDIM holds the network's estimates of data and noise through a step. So does Euler on the linear path. So on the same
# steps, from the same noise, both must give the same states: not nearly, but to rounding. Here are both by hand, DDIM
# by diffusers' own scheduler.

# %%
start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))

with torch.no_grad():
    sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(10)
    x, by_ddim = start, [start / (a + s)[999]]
    for step, after in zip(sampler.timesteps, [*sampler.timesteps[1:], None], strict=True):
        x = sampler.step(unet(x, step).sample, step, x).prev_sample
        by_ddim.append(x if after is None else x / (a + s)[after])  # as a state of the linear path

    times = [*t[sampler.timesteps].tolist(), 1.0]
    x, by_flow = by_ddim[0], [by_ddim[0]]
    for now, after in zip(times[:-1], times[1:], strict=True):
        x = x + (after - now) * field(x, now)  # Euler
        by_flow.append(x)

show({"DDIM": torch.stack([x[0] for x in by_ddim]), "flow": torch.stack([x[0] for x in by_flow])})
print(f"largest difference of any pixel at any step: {(torch.stack(by_ddim) - torch.stack(by_flow)).abs().max():.1e}")

# %% [markdown]
# `fewstep.convert` makes this check for you, and writes the flow as a folder that diffusers loads.

# %%
report = fewstep.convert(field, "digits-flow", steps=(10, 50), overwrite=True)
for name, line in report.rows():
    print(f"{name + ':':15} {line}")
print(report.verdict)

# %% [markdown]
# ## Fewer steps
#
# A flow may take any steps. The table has the Frechet distance to the digits (in the features of a small classifier,
# so this is not FID) against network calls, from the same noise: DDIM's steps, and equal steps of $t$. Both run the
# same network with the same solver. The steps alone differ.

# %%
classifier = trained_classifier(digits)
noise = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def distance(samples, real):
    features = [FeatureStatistics.of(extract(classifier, images)) for images in (samples, real)]
    return frechet_distance(*features)


samples, rows = {}, ["| network calls | DDIM's steps | equal steps of t |", "|---|---|---|"]
for calls in (4, 8, 16, 32):
    for grid, name in {"native": "DDIM", "uniform": "Euler"}.items():
        samples[f"{name} {calls}"] = fewstep.sample(field, noise, steps=calls, grid=grid)
    found = (distance(samples[f"{name} {calls}"], images) for name in ("DDIM", "Euler"))
    rows.append(f"| {calls} | " + " | ".join(f"{value:.2f}" for value in found) + " |")

show({name: samples[name] for name in ("DDIM 4", "Euler 4", "DDIM 8", "Euler 8", "DDIM 32", "Euler 32")})
Markdown("\n".join(rows))

# %% [markdown]
# With few steps those of equal $t$ are ahead, and with many the two come together. `fewstep.sample(..., grid=...)`
# takes either, or times of your own.
#
# ## Fine-tuned as a flow
#
# The field is a student like any other. Here it learns digits that lie on their side, by flow matching:
# $\mathbb{E}\,\lvert v_t(x_t) - (x_1 - x_0)\rvert^2$, one network call a step. It starts as the model that it was, and
# learns in a fraction of the steps that it was trained for. `fewstep.add_lora` would train an adapter alone.

# %%
sideways = images.transpose(2, 3).flip(3)
shown = {"before": samples["Euler 16"]}
rows = ["| updates | distance to digits on their side |", "|---|---|"]
rows.append(f"| 0 | {distance(samples['Euler 16'], sideways):.2f} |")
for updates in (max(1, STEPS // 60), max(2, STEPS // 6)):
    tuned = deepcopy(field)
    fewstep.fit(tuned, fewstep.FlowMatching(), sideways, steps=updates, batch=64, lr=1e-3, quiet=True)
    shown[f"after {updates}"] = fewstep.sample(tuned, noise, steps=16)
    rows.append(f"| {updates} | {distance(shown[f'after {updates}'], sideways):.2f} |")
show(shown)
Markdown("\n".join(rows))

# %% [markdown]
# What comes out still speaks the language of its schedule, so it is a diffusion model to diffusers. An export is a
# stock pipeline, and any sampler of diffusers runs it.

# %%
fewstep.export(tuned, "sideways-ddpm", overwrite=True)
again = DDPMPipeline.from_pretrained("sideways-ddpm")
print(type(again.unet).__name__, type(again.scheduler).__name__, again.scheduler.config.prediction_type)

with torch.no_grad():
    sampler.set_timesteps(20)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for step in sampler.timesteps:
        x = sampler.step(again.unet(x, step).sample, step, x).prev_sample
show({"DDIM 20": x})

# %% [markdown]
# ## From here
#
# * On the command line: `fewstep convert ./my-ddpm --out ./my-flow`, `fewstep train --teacher ./my-ddpm --data
#   ./photos`.
# * To 1 to 4 calls: `fewstep.FlowMap.from_field(field)` is a student of the same weights, and
#   [Speed up your own network](your_own_network.ipynb) distills one.
# * More on the conversion, with measured tables: [A diffusion model as a flow](../guides/diff2flow.md).
