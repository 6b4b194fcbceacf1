"""Adaptive entropy control (3.2).

    c_0 = initial;  c_{k+1} = c_k + delta if e_k < target,  c_k - delta if e_k > target
    paper:     alpha_k = c_k * 1{e_k <= target}
    released:  alpha_k = c_{k-1} * 1{e_{k-1} <= target},  alpha_0 = 0

e_k is the actor's entropy estimated on the current rollout buffer, over all samples of all ranks. c is clamped to
[minimum, maximum]: with e_0 above the target the bare rule drives c below zero, and alpha would then punish entropy
as soon as it falls under the target. The released code's coefficient and gate are those of the step before; it takes
the sampled tokens' -log pi for e_k, delta 1e-4 and the clamp [0, 0.005].
"""

from __future__ import annotations

from typing import Any

RULES = ("paper", "released", "fixed", "off")
_ADAPTIVE = ("paper", "released")


class EntropyController:
    """Rules: `paper`, `released` (above), `fixed` (alpha = initial, never clamped), `off` (alpha = 0)."""

    def __init__(self, *, rule: str, target: float, delta: float, initial: float, minimum: float, maximum: float):
        assert rule in RULES, rule
        self._rule, self._target, self._delta = rule, target, delta
        self._minimum, self._maximum = minimum, maximum
        self._next = initial if rule == "fixed" else self._clamped(initial)
        self.coefficient = self._next  # c_k of the last call
        self._lagging = 0.0  # what the paper's rule gave at the last call

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
        lagging, self._lagging = self._lagging, self.coefficient if e_k <= self._target else 0.0
        return lagging if self._rule == "released" else self._lagging

    def _clamped(self, coefficient: float) -> float:
        return min(max(coefficient, self._minimum), self._maximum)

    def state_dict(self) -> dict[str, Any]:
        values = {"coefficient": self.coefficient, "next": self._next, "lagging": self._lagging}
        return {"rule": self._rule, **values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another controller stopped. Where the configuration has changed since, it says what holds: a
        coefficient that no adaptation has led to is left behind, and the clamp is the present one."""
        if self._rule not in _ADAPTIVE or state.get("rule", self._rule) not in _ADAPTIVE:
            return
        self.coefficient, self._next = self._clamped(state["coefficient"]), self._clamped(state["next"])
        self._lagging = min(state["lagging"], self._maximum)  # 0 is the closed gate, whatever the minimum
