# %% [markdown]
# # Compare methods honestly
#
# This notebook is for those who want to know which method is better, and for those who read that one is. It makes a
# fair table with `fewstep.compare_methods`, and then shows on the same runs how each shortcut would have misled.
#
# **A fair table has**
#
# 1. one budget for all, in time or memory and not in updates alone;
# 2. the same network, data, seeds and evaluation for all, and each method's own settings, tuned alike or not at all;
# 3. several seeds, with their spread beside the mean;
# 4. quality against network calls (NFE), and calls that are counted;
# 5. the teacher at the same calls, and with many calls;
# 6. the number of samples, and what perfect samples would score with as many;
# 7. a row for what failed.

# %%
import os

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

import fewstep

STEPS = int(os.environ.get("STEPS", 3000))
SECONDS = STEPS / 300  # of training, for each method and seed
SEEDS = (0, 1, 2) if STEPS >= 100 else (0, 1)
COUNT = 5000 if STEPS >= 100 else 500  # samples that are measured

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})


def table(columns, rows):
    cells = [
        ["" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row] for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


# %% [markdown]
# ## One call
#
# A recipe says teacher, network and data: the checkerboard, whose flow is known in closed form. So there is a truth:
# the end point of each trajectory, and the RMSE to it. Three methods, three seeds, the same seconds for each.
# `MeanFlow` is there twice: with the teacher, and `teacher=none`, from the data alone.
#
# The steps of all methods are timed first, in turn. Each then gets as many updates as fit, so what else the machine
# does during the training favours nobody, and the run can be repeated.

# %%
compared = fewstep.compare_methods(
    "checkerboard-itvm",
    ["ITVM", "LMD", "MeanFlow", "MeanFlow:teacher=none"],
    seeds=SEEDS,
    seconds=SECONDS,
    out="compared",
    overrides={
        "training.batch": "256", "training.chunk": "256", "training.ema": "0.995",
        "evaluation.count": str(COUNT), "evaluation.steps": "[1, 2, 4, 8]",
    },
    say=lambda line: None,
)  # fmt: skip

print(compared.caption("rmse"))
table(*compared.table("rmse"))

# %% [markdown]
# Mean ± standard deviation over the seeds, at 1, 2, 4, 8 and 100 network calls. `steps` is how many updates the budget
# bought, `time / FM` what an update costs as a multiple of flow matching's. The last row is the teacher, solved by
# Euler.
#
# As a picture, with the span of the seeds as a band:

# %%
figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
names = dict.fromkeys(row["model"] for row in compared.rows)
for name in names:
    values = {}
    for row in compared.rows:
        if row["model"] == name:
            values.setdefault(row["nfe"], []).append(row["rmse"])
    calls = sorted(n for n in values if n <= 8)
    style = {"color": "black", "ls": "--"} if name == "teacher" else {"marker": "o", "ms": 3}
    (line,) = ax.plot(calls, [sum(values[n]) / len(values[n]) for n in calls], label=name, **style)
    ax.fill_between(
        calls, [min(values[n]) for n in calls], [max(values[n]) for n in calls], color=line.get_color(), alpha=0.2, lw=0
    )
ax.set(xscale="log", yscale="log", xlabel="network calls a sample", ylabel="RMSE to the exact end points")
ax.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# Without the dashed line one would not see that at 8 calls the teacher, untrained for it, is level with two of the
# methods.
#
# ## Shortcut 1: the same number of updates
#
# It sounds fair, and gives the dear methods more. This is what each would have had in time for one and the same number
# of updates, with flow matching at 1:

# %%
table(
    ["method", "updates in this budget", "time for the same updates", "peak memory"],
    [
        [name, max(run.steps for run in compared.runs if run.method == name), f"{cost.time:.2f}", f"{cost.memory:.2f}"]
        for name, cost in compared.costs.items()
    ],
)

# %% [markdown]
# ## Shortcut 2: one seed
#
# Here is the order of the methods at one call, seed by seed. Where two of them change places, one seed would have told
# a story. A difference that is not well above the spread is none.

# %%
for seed in SEEDS:
    ones = [row for row in compared.rows if row["seed"] == seed and row["nfe"] == 1 and row["model"] != "teacher"]
    print(
        f"seed {seed}:", ", ".join(f"{row['model']} {row['rmse']:.3f}" for row in sorted(ones, key=lambda r: r["rmse"]))
    )

# %% [markdown]
# ITVM leads in every seed, by far more than the spread. LMD and MeanFlow change places: of these two the table says
# that they are alike at one call, and a single seed would have named a winner.
#
# ## Shortcut 3: steps for calls
#
# A step is not a call. A guided teacher asks its network twice a step, and so does Heun's or the midpoint solver. So
# fewstep counts what passes through the network. Here the teacher is guided by a weaker field, a Gaussian
# (autoguidance), and the same steps cost twice as much:

# %%
teacher, data = fewstep.CheckerboardField(), fewstep.load_data("checkerboard")
guided = fewstep.Guided(teacher, 1.5, weak=fewstep.GaussianField(torch.zeros(2), torch.eye(2)))
rows = []
for name, model in {"teacher": teacher, "guided teacher": guided}.items():
    found = fewstep.evaluate(model, data=data, steps=(1, 4), count=500, metrics=["sliced_w2"])
    rows += [[name, row["steps"], row["nfe"]] for row in found.rows]
table(["model", "steps", "network calls"], rows)

# %% [markdown]
# ## Shortcut 4: another number of samples
#
# Distances between sets of samples are biased, and the bias falls with their number. One and the same model, at one
# call:

# %%
best = fewstep.load(next(run.folder for run in compared.runs if run.method == "ITVM"))
evaluations = {
    count: fewstep.evaluate(best, teacher=teacher, steps=(1,), count=count, metrics=["sliced_w2"])
    for count in (COUNT // 10, COUNT // 3, COUNT)
}
table(
    ["samples", "sliced W2 of the model", "of data against data"],
    [[n, f"{found.rows[0]['sliced_w2']:.4f}", f"{found.floor['sliced_w2']:.4f}"] for n, found in evaluations.items()],
)

# %% [markdown]
# A number stands for something only beside the last column, the floor. And two that were measured with different
# numbers of samples do not stand in one table; `fewstep.compare` refuses it:

# %%
few, _, many = evaluations.values()
try:
    fewstep.compare({"mine": many, "theirs": few})
except ValueError as error:
    print(error)

# %% [markdown]
# ## Shortcut 5: one metric
#
# RMSE says how near each sample is to its own end point. Sliced W2 says how near the *set* is to the data. A model may
# carry noise to the wrong cell of the board and still have good samples, or hit nearly every end point and smear the
# edges. The median error stands beside the RMSE because a few lost rows rule a mean of squares.

# %%
seed0 = {run.method: run.evaluation for run in compared.runs if run.seed == 0 and run.evaluation is not None}
columns, rows = fewstep.compare(seed0)
wanted = ("rmse", "error_median", "sliced_w2")
table(columns, [row for row in rows if row[0] in wanted and row[1] in (1, 4)])

# %% [markdown]
# ## What this table does not say
#
# * It is about points in the plane, a small network and a short budget. On images other methods lead at other calls.
# * Defaults are not the best settings of any method. Tune all alike, or none.
# * The teacher here is a formula. With a large network for a teacher, methods that call it often pay more.
#
# The same on the command line, for a recipe of your own:
# `fewstep compare my-recipe.yaml --methods ITVM LMD PSD --seeds 0 1 2 --seconds 600`.
