# %% [markdown]
# # A tour of the methods, in two dimensions
#
# This notebook is for choosing a method, and for seeing what it does. It trains nineteen methods for one and the same
# short time on the checkerboard, draws what each gives in 1, 2 and 4 network calls, and says in a sentence and a
# formula what differs.
#
# **Notation.** Time runs from $t = 0$ (noise) to $t = 1$ (data) along $x_t = t\,x_1 + (1 - t)\,x_0$. The velocity
# field $v_t(x)$ is what a flow model knows. A flow map is $X_{s,t}(x) = x + (t - s)\,u(x, s, t)$: one network call
# jumps from $s$ to $t$. $u$ is the mean velocity on the way, and $u(x, s, s) = v_s(x)$. `sg` means that no gradient
# flows there, $u^-$ is a slow copy (EMA) of the student, and $Du = \partial_s u + (\nabla u)\,v$ is the derivative of
# $u$ along the flow.
#
# **How to read it.** Each method has its defaults, the same network, the same number of updates, and one seed. So this
# is a tour and not a ranking: updates cost different times, and seeds scatter. For a ranking see
# [Compare methods honestly](comparing_honestly.ipynb).

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

import fewstep
from fewstep.evaluation.points import sliced_wasserstein
from fewstep.networks import MLP

STEPS = int(os.environ.get("STEPS", 3000))  # updates of each method
COUNT = 5000 if STEPS >= 100 else 500  # samples that are measured
CALLS = (1, 2, 4)

warnings.filterwarnings("ignore", message=".*no weight that its teacher lacks.*")
plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

teacher = fewstep.CheckerboardField()  # a velocity field in closed form
data = fewstep.load_data("checkerboard")  # the density that it flows to, drawn without end
noise = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))

# %% [markdown]
# ## The teacher
#
# The teacher is exact here, so its error is not in the way. Its trajectories are curved where cells compete for a
# point. Euler's steps are straight, and cut the curves: that is why a flow model needs many.

# %%
times = torch.linspace(0, 1, 41)
x, states = noise[:250], [noise[:250]]
for s, t in zip(times[:-1], times[1:], strict=True):
    x = x + (t - s) * teacher(x, s)  # Euler, by hand
    states.append(x)
paths = torch.stack(states)

figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
axes[0].plot(paths[..., 0], paths[..., 1], color="0.7", lw=0.5)
axes[0].scatter(*paths[0].T, s=4, color="tab:blue", label="noise, t = 0")
axes[0].scatter(*paths[-1].T, s=4, color="tab:red", label="data, t = 1")
axes[0].legend(loc="upper right", fontsize=7)
axes[0].set_title("the teacher's trajectories")
axes[1].scatter(*data.rows(torch.arange(3000), torch.Generator().manual_seed(1)).data.T, s=1, color="tab:red", lw=0)
axes[1].set_title("the data")
for ax in axes:
    ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Three functions do the rest. `train` is the same for every method. `measure` gives the sliced Wasserstein distance W2
# to the data at each number of calls. `show` draws the samples of each method, with Euler at the same number of calls
# in the first column.


# %%
def train(objective):
    """A flow map from random weights; its averaged weights."""
    torch.manual_seed(0)
    student = fewstep.FlowMap.from_field(teacher, network=MLP(2, width=128, depth=4, times=2))
    result = fewstep.fit(student, objective, data, steps=STEPS, batch=256, chunk=256, lr=3e-3, ema=0.995, quiet=True)
    return result.ema


def measure(model):
    """W2 to the data for each number of calls."""
    found = fewstep.evaluate(model, data=data, steps=CALLS, count=COUNT, batch=COUNT, metrics=["sliced_w2"])
    scores["data"] = found.floor["sliced_w2"]
    return [row["sliced_w2"] for row in found.rows]


def show(models):
    columns = {"Euler, the teacher": teacher, **models}
    figure, axes = plt.subplots(
        len(CALLS), len(columns), figsize=(1.55 * len(columns), 1.72 * len(CALLS)), layout="constrained", squeeze=False
    )
    for column, (name, model) in enumerate(columns.items()):
        if name not in scores:
            scores[name] = measure(model)
        for row, calls in enumerate(CALLS):
            samples, ax = fewstep.sample(model, noise, steps=calls), axes[row, column]
            ax.scatter(*samples.T, s=0.7, color="0.5" if model is teacher else "tab:blue", lw=0)
            ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])
            ax.set_title(f"{name}\n" * (row == 0) + f"W2 {scores[name][row]:.3f}", fontsize=8)
            if column == 0:
                ax.set_ylabel(f"{calls} call{'s' * (calls > 1)}")
    plt.show()


scores = {}

# %% [markdown]
# ## 1. Trajectory distillation: the teacher's flow, in jumps
#
# A frozen teacher gives the velocity, and the student learns the jumps of that flow. On some of the rows $s = t$, and
# there the student's velocity is to be the teacher's. On the others each method has an equation of its own.
#
# * **ITVM** asks for no derivative: the mean velocity of a long way is put together from its two halves, taken from
#   the slow copy, with $m$ the middle of $s$ and $t$.
#   $$\mathbb{E}\,\left|u(x_s,s,t) - \mathrm{sg}[\tfrac12 u^-(x_s,s,m) + \tfrac12 u^-(X^-_{s,m}(x_s),m,t)]\right|^2$$
# * **LMD** (Lagrangian): move the *end* of the jump, and the end point moves with the teacher's velocity there.
#   $$\mathbb{E}\,\left|\partial_t X_{s,t}(x_s) - v_t(X_{s,t}(x_s))\right|^2$$
# * **EMD** (Eulerian): move the *start* along the flow, and the end point stays.
#   $$\mathbb{E}\,\left|\partial_s X_{s,t}(x_s) + (\nabla X_{s,t})\,v_s(x_s)\right|^2$$
# * **AYF** is Eulerian too, as a regression on a normalised tangent, so that no row can throw the training off.
#   $$\mathbb{E}\,\left|u - \mathrm{sg}[u] + g\right|^2,\qquad g = n\big(\mathrm{sg}[(u - v_s) - r\,(t-s)\,Du]\big)$$
#
# LMD, EMD and AYF take a derivative of the network, which attention kernels dislike. ITVM takes plain calls alone.

# %%
show(
    {
        "ITVM": train(fewstep.ITVM(teacher)),
        "LMD": train(fewstep.LMD(teacher)),
        "EMD": train(fewstep.EMD(teacher)),
        "AYF": train(fewstep.AYF(teacher)),
    }
)

# %% [markdown]
# ## 2. Direct: from the data, with no teacher
#
# These learn velocity and jumps at once. Where the family above has the teacher's $v$, they have the student's own
# $u(x, s, s)$, which the data teach by flow matching on the rows with $s = t$.
#
# * **FMM** learns the map and its inverse together: go back from $t$ to $s$, to $y = X_{t,s}(x_t)$, and forth again,
#   and arrive with the velocity of the data's path.
#   $$\mathbb{E}\,\left|\partial_t X_{s,t}(y) - \dot x_t\right|^2 + \mathbb{E}\,\left|X_{s,t}(y) - x_t\right|^2$$
# * **LSD** is LMD with the student for a teacher.
#   $$\mathbb{E}\,\left|\partial_t X_{s,t}(x_s) - \mathrm{sg}[u(X_{s,t}(x_s),t,t)]\right|^2$$
# * **TVM** is LSD with a slow copy for a teacher: $u^-$ for $u$ inside `sg`.
# * **ESD** is EMD with the student for a teacher.
#   $$\mathbb{E}\,\left|\partial_s X_{s,t}(x_s) + \mathrm{sg}[(\nabla X_{s,t})\,u(x_s,s,s)]\right|^2$$
# * **PSD** joins two jumps to one, and takes no derivative; $g = (t-m)/(t-s)$.
#   $$\mathbb{E}\,\left|u(x,s,t) - \mathrm{sg}[(1-g)\,u(x,s,m) + g\,u(X_{s,m}(x),m,t)]\right|^2$$

# %%
show(
    {
        "FMM": train(fewstep.FMM()),
        "LSD": train(fewstep.LSD()),
        "TVM": train(fewstep.TVM()),
        "ESD": train(fewstep.ESD()),
        "PSD": train(fewstep.PSD()),
    }
)

# %% [markdown]
# ## 3. MeanFlow and its kin
#
# The Eulerian equation solved for $u$: the mean velocity is the velocity at the start plus a correction, and the
# network is trained towards that value. Below they learn from the data; each takes a teacher as well.
#
# * **MeanFlow** takes the velocity of the data's path, $\dot x_s = x_1 - x_0$, for $v_s$ and inside $Du$.
#   $$\mathbb{E}\,\left|u(x_s,s,t) - \mathrm{sg}[v_s + (t-s)\,Du]\right|^2$$
# * **ImprovedMeanFlow** takes $Du$ along the student's own velocity $u(x_s,s,s)$: one call more, less noise.
#   $$\mathbb{E}\,\left|u(x_s,s,t) - (t-s)\,\mathrm{sg}[Du] - v_s\right|^2$$
# * **AlphaFlow** goes from flow matching ($a = 1$) to MeanFlow ($a \to 0$) in the course of the training; $m = s +
#   a(t-s)$.
#   $$\mathbb{E}\,a^{-1}\left|u(x_s,s,t) - \mathrm{sg}[a\,v_s + (1-a)\,u(x_m,m,t)]\right|^2$$
# * **SplitMeanFlow** has no derivative: the goal of PSD, cut at a random $m$.

# %%
show(
    {
        "MeanFlow": train(fewstep.MeanFlow()),
        "ImprovedMeanFlow": train(fewstep.ImprovedMeanFlow()),
        "AlphaFlow": train(fewstep.AlphaFlow()),
        "SplitMeanFlow": train(fewstep.SplitMeanFlow()),
    }
)

# %% [markdown]
# ## 4. Consistency: all states of a trajectory have one end
#
# Two neighbours on a trajectory must be carried to the same point. But for CTM these know the jumps to $t = 1$ alone,
# so that more steps mean fresh noise between them: `fewstep.sample` does that by itself.
#
# * **Consistency distillation**: the neighbour $x_{s'}$ is one step of the teacher on.
#   $$\mathbb{E}\,d\big(X_{s,1}(x_s),\ X^-_{s',1}(x_{s'})\big)$$
# * **Consistency training**: the neighbour has the same noise and data; no teacher. The gap $s' - s$ shrinks as it
#   goes.
# * **SCM** (sCM): the gap is nothing. The tangent of AYF with $t = 1$.
# * **CTM** (consistency trajectory models): jumps to any $t$, and both sides are compared after $X^-_{t,1}$.
#   $$\mathbb{E}\,\left|X^-_{t,1}(X_{s,t}(x_s)) - X^-_{t,1}(X^-_{m,t}(x_m))\right|^2$$

# %%
show(
    {
        "Consistency distillation": train(fewstep.ConsistencyDistillation(teacher)),
        "Consistency training": train(fewstep.ConsistencyTraining()),
        "SCM": train(fewstep.SCM(teacher)),
        "CTM": train(fewstep.CTM(teacher)),
    }
)

# %% [markdown]
# ## 5. Progressive: short jumps teach long ones, in an order
#
# * **PFMM** (progressive distillation on a continuous time): the training is cut into rounds. In each, two jumps of
#   the student as it was before the round, $T$, teach one jump of twice the length.
#   $$\mathbb{E}\,\left|X_{s,t}(x_s) - X^T_{m,t}(X^T_{s,m}(x_s))\right|^2 / (t-s)^2$$
# * **Shortcut** does all lengths at once, on a grid of 1, 1/2, 1/4, ...: two halves of the slow copy teach the whole.
#   So it is made for 1, 2, 4, 8 ... steps and no other number.
#   $$\mathbb{E}\,\left|u(x,s,t) - \mathrm{sg}[\tfrac12 u^-(x,s,m) + \tfrac12 u^-(x_m,m,t)]\right|^2$$

# %%
show({"PFMM": train(fewstep.PFMM(teacher)), "Shortcut": train(fewstep.Shortcut())})

# %% [markdown]
# ## All of them
#
# W2 to the data. Two rows say what a number is worth: *noise* is the noise as it is, which no model has touched, and
# *data* is data against other data, which no model can be expected to beat.

# %%
some = data.rows(torch.arange(COUNT), torch.Generator().manual_seed(2)).data
untouched = sliced_wasserstein(torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(3)), some)
floor = scores.pop("data")

rows = ["| | " + " | ".join(f"{n} call{'s' * (n > 1)}" for n in CALLS) + " |", "|---" * (len(CALLS) + 1) + "|"]
rows += [f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |" for name, found in scores.items()]
for name, value in {"*noise*": untouched, "*data*": floor}.items():
    rows.append(f"| {name} |" + f" {value:.3f} |" * len(CALLS))
Markdown("\n".join(rows))

# %% [markdown]
# **What to see in it.**
#
# * W2 weighs the coarse shape. Euler in 4 calls has a larger W2 than the untouched noise, since it draws all points
#   inwards, although its picture has the cells and the noise has none. So look at the picture and at the number.
# * At one call the best that have a teacher (ITVM, EMD) are ahead of the best that learn from the data (LSD, ESD),
#   whose targets are noisy. A teacher alone does not do it: AYF, PFMM and SCM have one too.
# * Methods that build long jumps from short ones (PFMM, PSD, SplitMeanFlow) have their one call last: the outline is a
#   rounded square first, and cells at 2 and 4 calls.
# * Consistency training has hardly left the noise after this short training, and SCM is on its way. Their authors
#   train far longer.
#
# Which one to take for what: [Which method?](../guides/choosing.md) Each method's page, with its cost and how it
# fails: [Methods](../methods/index.md).
