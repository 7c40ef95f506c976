# %% [markdown]
# # Speed up your own network
#
# This notebook is for those who have a flow model that fewstep has never seen: an `nn.Module` of their own. Four
# things turn it into a generator of one to four network calls:
#
# 1. say what it predicts: `NetworkField(network, path, prediction)`;
# 2. give it a second time: one line where it embeds its time;
# 3. `FlowMap.from_field` and `fit`;
# 4. `sample`, `evaluate`, `export`.
#
# The example is a small network for handwritten digits, conditioned on the class, and trained here by a loop in plain
# PyTorch.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

import fewstep
from fewstep.evaluation.extractor import trained_classifier

STEPS = int(os.environ.get("STEPS", 3000))  # updates of the teacher, and of the student
COUNT = 1797 if STEPS >= 100 else 160  # samples that are measured: as many as there are digits

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

digits = fewstep.load_data("digits")  # 1797 pictures of 8 x 8 pixels, with their classes; they come with scikit-learn
everything = digits.rows(torch.arange(digits.size), torch.Generator())
images, labels = everything.data, everything.cond["class_labels"]


def show(rows):
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 0.52 * len(rows)), layout="constrained", squeeze=False)
    for ax, (name, samples) in zip(axes[:, 0], rows.items(), strict=True):
        ax.imshow(torch.cat(list(samples[:20, 0]), dim=1).clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    plt.show()


# %% [markdown]
# ## Your network
#
# Nothing in `Pixels` knows of fewstep. It is a residual network on the 64 pixels, told the time and the class by
# embeddings, and predicts the velocity $x_1 - x_0$ from $x_t = t\,x_1 + (1-t)\,x_0$. Any other network will do.
#
# `TwoTimePixels` is the student. What is new is **one line in `__init__` and one in `forward`**: a `SecondTime`, added
# where the first time is. It is silent at first, so the student begins as its teacher.
#
# The classes stand in a file, as your network does. An export will carry that file. `config` says how the network was
# made, so that it can be made again.

# %% [writefile] my_network.py
import torch
from torch import nn

from fewstep.networks import SecondTime


class Pixels(nn.Module):
    """A velocity of pictures (B, 1, 8, 8): ``net(x, t, class_labels)``."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.config = {"width": width, "layers": layers}
        self.first = nn.Linear(64, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.last = nn.Linear(width, 64)

    def forward(self, x, t, class_labels):
        return self.decode(x, self.time(t[:, None]), class_labels)

    def decode(self, x, time, class_labels):
        h, told = self.first(x.flatten(1)), time + self.label(class_labels)
        for block in self.blocks:
            h = h + block(h + told)
        return self.last(h).view_as(x)


class TwoTimePixels(Pixels):
    """The student: ``net(x, s, t, class_labels)``."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__(width, layers)
        self.second_time = SecondTime(width)  # new

    def forward(self, x, s, t, class_labels):
        return self.decode(x, self.time(s[:, None]) + self.second_time(t), class_labels)  # new: + self.second_time(t)


# %% [markdown]
# Your training loop, as it was: plain flow matching.

# %%
from my_network import Pixels, TwoTimePixels

torch.manual_seed(0)
network = Pixels()
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for _ in range(STEPS):
    rows = torch.randint(len(images), (128,))
    noise, t = torch.randn(128, 1, 8, 8), torch.rand(128)
    x = t.view(-1, 1, 1, 1) * images[rows] + (1 - t.view(-1, 1, 1, 1)) * noise
    loss = (network(x, t, labels[rows]) - (images[rows] - noise)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()
print(f"{sum(p.numel() for p in network.parameters()):,} parameters, last loss {float(loss.detach()):.3f}")

# %% [markdown]
# ## Say what it predicts
#
# A field is a network with its path and its kind of prediction: velocity, data, noise, v, score or flow. Ours predicts
# the velocity on the linear path. Whatever your network is told beside time goes through by name (`class_labels`).

# %%
teacher = fewstep.NetworkField(network, fewstep.Linear(), prediction="velocity")

noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
asked = torch.arange(20) % 10
show({f"teacher, {n}": fewstep.sample(teacher, noise, steps=n, class_labels=asked) for n in (1, 2, 4, 50)})

# %% [markdown]
# The numbers are network calls. In few steps the teacher smears: its straight steps leave its curved trajectories.
#
# ## Distill
#
# `from_field` loads the teacher's weights into your two-time network by name, and says what is new in it. Before any
# training the student's velocity is the teacher's, to the last bit.

# %%
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    student = fewstep.FlowMap.from_field(teacher, network=TwoTimePixels())
print("from_field says:", said[-1].message)

with torch.no_grad():
    same = torch.equal(
        student.velocity(noise, 0.3, class_labels=asked), teacher.velocity(noise, 0.3, class_labels=asked)
    )
print("velocity of student and teacher are the same bits:", same)

# %% [markdown]
# ITVM asks for no derivative of the network. So fused attention, `torch.compile` and gradient checkpointing stay as
# they are.

# %%
result = fewstep.fit(student, fewstep.ITVM(teacher), digits, steps=STEPS, batch=128, lr=1e-3, quiet=True)
fast = result.ema  # the averaged weights

show(
    {
        "teacher, 50": fewstep.sample(teacher, noise, steps=50, class_labels=asked),
        **{f"student, {n}": fewstep.sample(fast, noise, steps=n, class_labels=asked) for n in (1, 2, 4)},
    }
)

# %% [markdown]
# ## How good, at how many calls
#
# `evaluate` measures student and teacher from the same noise, at the same network calls. `fd` is the Frechet distance
# in the features of a small classifier of digits (not FID; lower is better), `accuracy` the share of samples in the
# class that was asked for. The row `teacher 50` is what there is to reach.

# %%
found = fewstep.evaluate(
    fast, teacher=teacher, data=digits, steps=(1, 2, 4), teacher_steps=(1, 2, 4, 50), count=COUNT,
    extractor=trained_classifier(digits), metrics=["fd", "accuracy"],
)  # fmt: skip
rows = ["| | network calls | fd | accuracy |", "|---|---|---|---|"]
rows += [f"| {row['model']} | {row['nfe']} | {row['fd']:.2f} | {row['accuracy']:.3f} |" for row in found.rows]
Markdown("\n".join(rows))

# %% [markdown]
# The student's one call is ahead of the teacher's four, and its four are level with the teacher's fifty. The teacher's
# few-step digits are smeared towards the mean of their class, which a classifier likes: a perfect accuracy beside a
# poor distance is no praise.
#
# ## Export, and load it back
#
# The export is a folder: the weights, the file of your class, and how it was made. Loading runs the code of that file.
# So it wants to be told that you trust it.

# %%
fewstep.export(fast, "fast-digits", method="ITVM", overwrite=True)
print(*sorted(os.listdir("fast-digits")), sep="\n")

try:
    fewstep.load("fast-digits")
except ValueError as error:
    print("\nwithout trust:", str(error).replace(os.getcwd(), "."))

again = fewstep.load("fast-digits", trust=True)
before, after = (fewstep.sample(model, noise, steps=2, class_labels=asked) for model in (fast, again))
print("\nthe same samples, bit for bit:", torch.equal(before, after))

# %% [markdown]
# ## From here
#
# * A run folder: `fit(..., out="runs/fast")`. A run that is killed goes on, and `fewstep evaluate runs/fast` and
#   `fewstep export runs/fast ./folder` take it.
# * Without data: `fewstep distill` with `data: teacher` draws samples of the teacher and learns from these.
# * Guidance: `Guided(teacher, 1.5, null={"class_labels": 10})` for a network that has a row for *no class*. The
#   student learns the guided velocity, and makes one call where the teacher makes two.
