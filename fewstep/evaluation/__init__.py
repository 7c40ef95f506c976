"""How good samples are, where a flow map is off, and the pages that show it."""

from fewstep.evaluation.diagnostics import Diagnosis, diagnose, endpoint_rmse, teacher_states
from fewstep.evaluation.extractor import SmallClassifier, accuracy, extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, kid, precision_recall
from fewstep.evaluation.inception import inception
from fewstep.evaluation.points import energy_distance, error_quantiles, histogram_kl, mmd, rmse, sliced_wasserstein
from fewstep.evaluation.report import write_report

__all__ = [
    "Diagnosis",
    "FeatureStatistics",
    "SmallClassifier",
    "accuracy",
    "diagnose",
    "endpoint_rmse",
    "energy_distance",
    "error_quantiles",
    "extract",
    "frechet_distance",
    "histogram_kl",
    "inception",
    "kid",
    "mmd",
    "precision_recall",
    "rmse",
    "sliced_wasserstein",
    "teacher_states",
    "trained_classifier",
    "write_report",
]
