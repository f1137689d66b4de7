"""Who steps together, and whether what was found for one step serves the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Turn(NamedTuple):
    """Parameters of one group that have made equally many steps, counted by one tensor, and make the next one together."""

    group: int
    step: Tensor
    # Lists of parameters of one dtype, device and kind of state: their places among the group's with a gradient, and the places
    # of their states in optimizer.state.
    alike: list[tuple[list[int], list[int]]]


class Plan(NamedTuple):
    """The turns of a step. It serves the next one too, as long as the same parameters have gradients and the states are as it
    left them: to find it again would take longer than to step a small model. It keeps nothing alive but counts of steps."""

    moving: list[list[tuple]]  # of each group: identity, dtype and device of its parameters with a gradient
    options: list[tuple]  # of each group: what its states were made for
    states: list[int]  # identities
    steps: list[Tensor | None]
    turns: list[Turn]

    def serves(self, moving: list[list[tuple]], options: list[tuple], states: list[dict]) -> bool:
        return (
            self.options == options
            and self.moving == moving
            and self.states == list(map(id, states))
            and all(state.get("step") is step for state, step in zip(states, self.steps))
        )
