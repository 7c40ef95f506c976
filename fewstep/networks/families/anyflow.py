"""An ``AnyFlowTransformer3DModel`` as the network of a flow map, which it is by itself, and of that map's field."""

from typing import Any

from fewstep.networks.families.base import TwoTimeNetwork
from fewstep.networks.families.wan import Wan


class AnyFlow(Wan):
    """An ``AnyFlowTransformer3DModel`` (arXiv 2605.13724), a Wan 2.1 that was distilled into a flow map: its velocity,
    from a time to that very time. Conditions as those of a ``WanTransformer3DModel``."""

    code, always_map = "anyflow", True
    model: Any


class TwoTimeAnyFlow(TwoTimeNetwork, AnyFlow):
    """Of an ``AnyFlowTransformer3DModel``, as it is."""
