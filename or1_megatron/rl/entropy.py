"""Adaptive entropy control (3.2).

    c_0 = initial;  c_{k+1} = c_k + delta if e_k < target,  c_k - delta if e_k > target
    alpha_k = c_k * 1{e_k <= target}

e_k is the actor's entropy estimated on the current rollout buffer, over all samples. c is clamped to
[minimum, maximum]: with e_0 above the target the bare rule drives c below zero, and alpha would then punish entropy
as soon as it falls under the target.
"""

from __future__ import annotations


class EntropyController:
    """Rules: `paper` (above), `fixed` (alpha = initial, never clamped), `off` (alpha = 0)."""

    def __init__(self, *, rule: str, target: float, delta: float, initial: float, minimum: float, maximum: float):
        assert rule in ("paper", "fixed", "off"), rule
        self._rule, self._target, self._delta = rule, target, delta
        self._minimum, self._maximum = minimum, maximum
        self._next = initial if rule == "fixed" else self._clamped(initial)
        self.coefficient = self._next  # c_k of the last call

    def alpha(self, e_k: float) -> float:
        """alpha_k for the measured entropy e_k; afterwards c moves on to c_{k+1}."""
        self.coefficient = self._next
        if self._rule == "off":
            return 0.0
        if self._rule == "fixed":
            return self.coefficient
        if e_k != self._target:
            step = self._delta if e_k < self._target else -self._delta
            self._next = self._clamped(self.coefficient + step)
        return self.coefficient if e_k <= self._target else 0.0

    def _clamped(self, coefficient: float) -> float:
        return min(max(coefficient, self._minimum), self._maximum)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, "next": self._next}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient, self._next = state["coefficient"], state["next"]
