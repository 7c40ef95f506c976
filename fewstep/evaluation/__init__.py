"""How good samples are, where a flow map is off, and the pages that show it."""

from fewstep.evaluation.copies import memorisation
from fewstep.evaluation.diagnostics import Diagnosis, diagnose, endpoint_rmse
from fewstep.evaluation.ensembles import crps, energy_spectrum, relative_error, spectrum_error
from fewstep.evaluation.extractor import SmallClassifier, accuracy, extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, kid, precision_recall
from fewstep.evaluation.inception import inception
from fewstep.evaluation.points import (
    energy_distance,
    error_quantiles,
    histogram_kl,
    mmd,
    outside,
    rmse,
    sliced_wasserstein,
)
from fewstep.evaluation.report import write_report
from fewstep.evaluation.variety import diversity, mean_distance, spreads
from fewstep.flows.trajectories import teacher_states

__all__ = [
    "Diagnosis",
    "FeatureStatistics",
    "SmallClassifier",
    "accuracy",
    "crps",
    "diagnose",
    "diversity",
    "endpoint_rmse",
    "energy_distance",
    "energy_spectrum",
    "error_quantiles",
    "extract",
    "frechet_distance",
    "histogram_kl",
    "inception",
    "kid",
    "mean_distance",
    "memorisation",
    "mmd",
    "outside",
    "precision_recall",
    "relative_error",
    "rmse",
    "sliced_wasserstein",
    "spectrum_error",
    "spreads",
    "teacher_states",
    "trained_classifier",
    "write_report",
]
