"""Scores of ensembles of fields, against closed forms."""

import math

import pytest
import torch

from fewstep.common.randomness import generator
from fewstep.evaluation import crps, energy_spectrum, relative_error, spectrum_error


def test_crps_of_a_gaussian() -> None:
    """Of N(mu, sigma): sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mu) / sigma."""
    x = 0.5 + 2 * torch.randn(20, 40_000, dtype=torch.float64, generator=generator(0))
    for y in (0.5, 3.0):
        z = torch.tensor((y - 0.5) / 2, dtype=torch.float64)
        phi, cdf = math.exp(-0.5 * float(z) ** 2) / math.sqrt(2 * math.pi), float(torch.special.ndtr(z))
        exact = 2 * (float(z) * (2 * cdf - 1) + 2 * phi - 1 / math.sqrt(math.pi))
        # The fair estimate does not hang on how many there are.
        for members in (2, 20):
            assert abs(crps(x[:members], torch.full((40_000,), y, dtype=torch.float64)) - exact) < 0.02
    one, truth = torch.randn(1, 3, 2, generator=generator(1)), torch.zeros(3, 2)
    assert crps(one, truth) == pytest.approx(float(one.abs().mean()))
    # The pairs by hand.
    few = torch.randn(4, 5, generator=generator(2), dtype=torch.float64)
    pairs = (few[:, None] - few[None]).abs().sum((0, 1)) / (4 * 3)
    assert crps(few, torch.zeros(5)) == pytest.approx(float((few.abs().mean(0) - pairs / 2).mean()), abs=1e-12)


def test_spectra() -> None:
    x = torch.arange(16, dtype=torch.float64) * 2 * math.pi / 16
    wave = torch.cos(3 * x).expand(2, 1, 16, 16)
    energy = energy_spectrum(wave)
    assert energy[3] == pytest.approx(0.25, abs=1e-12)  # half the mean square of a cosine
    assert energy.sum() == pytest.approx(0.25, abs=1e-12)
    oblique = torch.cos(3 * x[:, None] + 4 * x).expand(1, 1, 16, 16)
    assert energy_spectrum(oblique)[5] == pytest.approx(0.25, abs=1e-12)
    noise = torch.randn(8, 1, 16, 16, generator=generator(0))
    # Twice the amplitude is four times the energy at every wave number.
    assert spectrum_error(2 * noise, noise) == pytest.approx(math.log(4), abs=1e-9)
    with pytest.raises(ValueError, match=r"fields of shape \(1, 16, 8\)"):
        energy_spectrum(torch.zeros(1, 16, 8))


def test_relative_error() -> None:
    truth = torch.randn(4, 1, 3, 3, generator=generator(0))
    assert relative_error(1.5 * truth, truth) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="row by row alike"):
        relative_error(truth[:2], truth)
