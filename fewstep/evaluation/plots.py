"""Figures of samples, of their paths, of quality against network calls, of losses and of residuals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fewstep.evaluation.style import COLOURS, DENSITY, INK, QUIET, frame, panels, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.evaluation.diagnostics import Diagnosis
    from fewstep.evaluation.geometry import Curve, Geometry


def _extent(points: Any) -> Any:
    """The lowest and the highest coordinates (2, 2) of points (N, 2), all but of the few farthest."""
    return np.quantile(points, [0.002, 0.998], axis=0)


def points_figure(samples: Mapping[str, Tensor]) -> "Figure":
    """2-D samples (N, 2) by name, one panel each, as densities on one scale; the last is the truth, or the teacher,
    whose extent and shade all share."""
    from matplotlib.colors import LinearSegmentedColormap

    clouds = {name: points.detach().double().cpu().numpy() for name, points in samples.items()}
    (low, high), wide = _extent(list(clouds.values())[-1]), _extent(np.concatenate(list(clouds.values())))
    if (high - low).max() < 0.01 * (wide[1] - wide[0]).max():  # one step of a teacher leads to the mean of the data
        low, high = wide
    centre, half = (low + high) / 2, 0.58 * float((high - low).max()) or 1.0
    box = [(c - half, c + half) for c in centre]
    bins = min(max(40, int(0.8 * math.sqrt(min(map(len, clouds.values()))))), 160)  # enough points a bin to see a shade
    densities = [np.histogram2d(*cloud.T, bins=bins, range=box)[0].T / len(cloud) for cloud in clouds.values()]
    brightest = float(np.quantile(densities[-1][densities[-1] > 0], 0.99))
    with panels(len(clouds), size=2.05) as (figure, axes):
        for ax, name, density in zip(axes, clouds, densities, strict=True):
            ax.imshow(
                density,
                origin="lower",
                extent=(*box[0], *box[1]),
                cmap=LinearSegmentedColormap.from_list("density", DENSITY),
                vmin=0,
                vmax=brightest,
                interpolation="nearest",
            )
            frame(ax, name)
    return figure


def trajectory_figure(paths: Mapping[str, Tensor], lines: int = 150) -> "Figure":
    """2-D sample paths by name, (T, N, 2) each: straight lines between the T states, from noise (grey) to data
    (blue), of the first ``lines`` samples; one panel a name, all with one extent."""
    from matplotlib.collections import LineCollection

    tracks = {name: path[:, :lines].detach().double().cpu().numpy() for name, path in paths.items()}
    everything = np.concatenate([track.reshape(-1, 2) for track in tracks.values()])
    low, high = np.quantile(everything, [0.005, 0.995], axis=0)
    centre, half = (low + high) / 2, 0.58 * float((high - low).max())
    with panels(len(tracks), size=3.0) as (figure, axes):
        for ax, (name, track) in zip(axes, tracks.items(), strict=True):
            ax.add_collection(LineCollection(list(track.swapaxes(0, 1)), colors=QUIET, linewidths=0.6, alpha=0.35))
            for inner in track[1:-1] if len(track) <= 9 else ():
                ax.scatter(*inner.T, s=3, color=QUIET, alpha=0.5, linewidths=0)
            ax.scatter(*track[0].T, s=7, color="#9aa0a6", linewidths=0, label="noise", zorder=3)
            ax.scatter(*track[-1].T, s=9, color=COLOURS[0], linewidths=0, label="data", zorder=4)
            ax.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half), aspect="equal")
            frame(ax, name)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=2)
    return figure


def quality_figure(rows: Sequence[Mapping[str, Any]], metric: str, label: str | None = None) -> "Figure":
    """A metric against network calls, both axes logarithmic; lower is better.

    Args:
        rows: one a measurement: ``model`` (the name of its line), ``nfe`` and the metric under its own name. Several
            rows of one model at one nfe are seeds: the line runs through their mean, a band spans them. Models whose
            name begins with "teacher" are dashed and grey. Rows without the metric are left out.
        label: of the metric's axis, its name by default.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.get(metric) is not None and math.isfinite(row[metric]):
            lines.setdefault(str(row["model"]), {}).setdefault(int(row["nfe"]), []).append(float(row[metric]))
    if not lines:
        raise ValueError(
            f"no row has the metric {metric!r}, the rows have: {', '.join({k: 0 for r in rows for k in r})}"
        )
    calls = sorted({nfe for points in lines.values() for nfe in points})
    is_crowded = len(lines) > 7  # then the names stand outside, and a second round of colours is dotted
    columns = math.ceil(len(lines) / 18)  # of names that find room beside the plot
    with panels(1, size=(5.6 + 2.8 * columns, 4.8) if is_crowded else (4.9, 3.6)) as (figure, (ax,)):
        looks = ((colour, *look) for look in (("-", "o"), (":", "D"), ("-.", "v")) * len(lines) for colour in COLOURS)
        for name, points in lines.items():
            is_teacher = name.startswith("teacher")
            nfes = sorted(points)
            values = [points[n] for n in nfes]
            means = [float(np.mean(v)) for v in values]
            if is_teacher:
                colour = QUIET
                ax.plot(nfes, means, color=colour, label=name, linestyle=(0, (4, 2)), marker="s", markersize=4.5)
            else:
                colour, style, marker = next(looks)
                ax.plot(nfes, means, color=colour, label=name, linestyle=style, marker=marker)
            if max(map(len, values)) > 1:
                ax.fill_between(
                    nfes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0
                )
        ax.set(xscale="log", xlabel="network calls per sample", ylabel=label or metric)
        if all(v > 0 for points in lines.values() for values in points.values() for v in values):
            ax.set_yscale("log")
        # Powers of two, which step counts are, and the far ends (a teacher's 50 or 100).
        ticks = [n for n in calls if n & (n - 1) == 0 or n == calls[-1]]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        plain_log_ticks(ax)
        if is_crowded:
            figure.legend(loc="outside right upper", ncols=columns)
        else:
            ax.legend()
    return figure


def loss_figure(rows: Sequence[Mapping[str, Any]], terms: Sequence[str] | None = None) -> "Figure":
    """Losses against steps from the rows of ``metrics.jsonl``: as logged in a faint line, smoothed in a strong one.

    Args:
        rows: mappings with ``step`` and numbers by name; a row need not have them all.
        terms: the names to draw, by default ``loss`` and all that begin with ``loss/``.
    """
    if terms is None:
        terms = list({key: 0 for row in rows for key in row if key == "loss" or key.startswith("loss/")})
    curves = {term: [(row["step"], float(row[term])) for row in rows if row.get(term) is not None] for term in terms}
    curves = {term: np.array(points) for term, points in curves.items() if points}
    if not curves:
        raise ValueError(f"no row has a loss to draw among {list(terms) or 'loss, loss/...'}")
    with panels(1, size=(4.9, 3.6)) as (figure, (ax,)):
        for i, (term, points) in enumerate(curves.items()):
            colour = INK if term == "loss" else COLOURS[i % len(COLOURS)]
            steps, values = points.T
            ax.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            ax.plot(steps, _smooth(values), color=colour, label=term.removeprefix("loss/"))
        ax.set(xlabel="step", ylabel="loss")
        ax.locator_params(axis="x", nbins=5)
        if all((points[:, 1] > 0).all() for points in curves.values()):
            ax.set_yscale("log")
            plain_log_ticks(ax)
        ax.legend()
    return figure


def diagnostics_figure(diagnosis: "Diagnosis") -> "Figure":
    """The relative residuals of a flow map: the tangent over s as a line, the others over (s, t) as heat maps on one
    logarithmic scale. 1 (dark) is a map that knows nothing."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    times = diagnosis.times.numpy()
    maps = {name: diagnosis.relative(name).numpy() for name in diagnosis.residuals if name != "tangent"}
    cmap = LinearSegmentedColormap.from_list("residual", DENSITY)
    with panels(1 + len(maps), size=(2.05, 2.2)) as (figure, axes):
        axes[0].plot(
            times, diagnosis.relative("tangent").diagonal().numpy(), color=COLOURS[0], marker="o", markersize=4
        )
        axes[0].set(title="Tangent", xlabel="s", box_aspect=1)
        axes[0].set_ylim(bottom=0)
        scale = LogNorm(1e-3, 1, clip=True)
        for ax, (name, values) in zip(axes[1:], maps.items(), strict=True):
            masked = np.ma.masked_invalid(values.T)
            ax.pcolormesh(times, times, masked, norm=scale, cmap=cmap, shading="nearest")
            ax.set(title=name.capitalize(), xlabel="s", aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            ax.grid(False)
        axes[1].set_ylabel("t")
        key = ScalarMappable(scale, cmap)
        figure.colorbar(key, ax=axes, label="relative residual", fraction=0.03, pad=0.01)
    return figure


# A legend that may lie over what is drawn.
_OVER: dict[str, Any] = {"frameon": True, "framealpha": 0.85, "edgecolor": "none", "fontsize": 9}


def geometry_figure(geometry: "Geometry", steps: int = 4) -> "Figure":
    """The shape of trajectories and the errors of few steps: one figure a model.

    Args:
        steps: of the grid that is drawn over the errors of all steps; fewer where there are fewer candidates.
    """
    shapes = {"$x_t$": geometry.state, "$D_t(x_t)$": geometry.denoised}
    with panels(5 if geometry.errors is None else 7, size=(3.1, 2.8), columns=4) as (figure, axes):
        _planarity(axes[0], shapes)
        for colour, (name, curve) in zip(COLOURS, shapes.items(), strict=False):
            axes[1].plot(geometry.times, curve.off_chord, color=colour, label=f"{name}, length {curve.length:.3g}")
        axes[1].plot(geometry.times, geometry.off_chord_scaled, color=COLOURS[2], label=r"$x_t / \alpha_t$")
        axes[1].set(title="Distance from the chord", xlabel="t")
        axes[1].legend(**_OVER)
        axes[2].plot(geometry.middles, geometry.curvature, color=COLOURS[0])
        axes[2].set(title="Curvature $|dv/dt| / |v|$", xlabel="t")
        axes[2].set_ylim(bottom=0)
        for ax, colour, (name, curve) in zip(axes[3:5], COLOURS, shapes.items(), strict=False):
            for track in curve.plane:
                ax.plot(*track.T, color=colour, alpha=0.7, linewidth=1)
                ax.scatter(*track[-1], s=9, color=colour, zorder=3)
            ax.set(title=f"{name}, each in its own plane", xlabel="first component", ylabel="second")
        if geometry.errors is not None:
            _step_errors(axes[5], geometry, steps)
            _error_against_steps(axes[6], geometry)
    return figure


def _planarity(ax: Any, shapes: "Mapping[str, Curve]") -> None:
    for i, (colour, (name, curve)) in enumerate(zip(COLOURS, shapes.items(), strict=False)):
        ax.bar(np.arange(1, 4) + 0.36 * (i - 0.5), curve.planarity, width=0.34, color=colour, label=name)
    low = min(float(curve.planarity[0]) for curve in shapes.values())
    ax.set(title="Variance in the first components", xlabel="principal components", xticks=[1, 2, 3])
    ax.set_ylim(max(0.0, 1 - 2 * (1 - low)) if low < 0.999 else 0.99, 1.0)
    ax.legend(loc="lower right", **_OVER)


def _step_errors(ax: Any, geometry: "Geometry", steps: int) -> None:
    """What each step loses as a heat map, the best grid as the corners of a staircase on it."""
    from matplotlib.colors import LinearSegmentedColormap

    assert geometry.errors is not None
    times, errors = geometry.errors.times, geometry.errors.errors
    steps = min(steps, len(times) - 1)
    masked = np.ma.masked_invalid(errors.T)
    cmap = LinearSegmentedColormap.from_list("losses", DENSITY)
    mesh = ax.pcolormesh(times, times, masked, cmap=cmap, vmin=0, shading="nearest")
    ax.figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.02)
    grid = geometry.errors.grid(steps)
    ax.plot(grid[:-1], grid[1:], "o", color=COLOURS[1], markersize=5, label=f"best {steps} steps")
    ax.set(title="What a step from s to t loses", xlabel="s", ylabel="t", aspect="equal")
    ax.grid(False)
    ax.legend(loc="lower right")


def _error_against_steps(ax: Any, geometry: "Geometry") -> None:
    ns = [grid.steps for grid in geometry.few]
    slope = "" if math.isnan(geometry.slope) else f", slope {geometry.slope:.2f}"
    ax.plot(ns, [grid.uniform_error for grid in geometry.few], "o-", color=COLOURS[0], label=f"uniform{slope}")
    ax.plot(ns, [grid.error for grid in geometry.few], "D--", color=COLOURS[1], markersize=4, label="best grid")
    ax.set(title="Error at the end", xlabel="steps N", xscale="log")
    ax.set_xticks(ns, list(map(str, ns)))
    ax.minorticks_off()
    if all(grid.error > 0 and grid.uniform_error > 0 for grid in geometry.few):
        ax.set_yscale("log")
        plain_log_ticks(ax)
    ax.legend()


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the curve, without lag and without bias at the ends."""
    width = min(max(1, len(values) // 20) | 1, len(values))
    ones = np.ones(width)
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")
