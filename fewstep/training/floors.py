"""The watch for a player that has won: its loss at its bound, so that it teaches nothing more."""

import warnings
from collections.abc import Mapping

from fewstep.objectives.base import Player

PATIENCE = 200  # steps


class Floors:
    """Warns, once a player, where the mean of its loss has stayed below its ``floor`` for 200 steps.

    Args:
        players: by name.
        step: where the training begins, or goes on.
    """

    def __init__(self, players: Mapping[str, Player], step: int = 0) -> None:
        self._players = {name: player for name, player in players.items() if player.floor is not None}
        self._above = dict.fromkeys(self._players, step)  # the last step at which each was not below

    def see(self, step: int, losses: Mapping[str, float]) -> None:
        """Look at the means since the last time, as they were logged at this step."""
        for name, player in list(self._players.items()):
            if losses.get(f"loss/{name}", float("inf")) >= (player.floor or 0.0):
                self._above[name] = step
            elif step - self._above[name] >= PATIENCE:
                del self._players[name]
                said = (
                    f"step {step}: for {step - self._above[name]} steps the loss of {name!r} is below "
                    f"{player.floor:g}: it has won, and the student learns nothing from it any more"
                )
                warnings.warn(". ".join(filter(None, (said, player.advice))), stacklevel=2)
