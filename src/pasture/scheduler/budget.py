"""How many prompt tokens a step may compute without holding up the streams in it.

Learns what a step costs as `base + per_row * rows + per_token * prompt tokens` by recursive least squares with forgetting, and
spends what the inter-token target leaves after the rows. Nothing about the machine is assumed beyond a rough start.
"""

from __future__ import annotations

import numpy as np

FORGETTING = 0.98
MIN_TOKENS = 32
"""prefill never stops altogether: a full house of streams must not shut out newcomers"""
QUIET_FACTOR = 2.5
"""a step without streams may take this many targets: long enough to compute well, short enough to let newcomers in"""


class PrefillBudget:
    def __init__(self, itl_target_seconds: float, n_batch: int) -> None:
        self._target = itl_target_seconds
        self._n_batch = n_batch
        self._weights = np.array([0.01, 0.004, 0.003])
        self._covariance = np.diag([1e-3, 1e-4, 1e-4])
        self._n_seen = 0

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """One step's cost. Far outliers (a machine that stalled) are drawn in before they are learnt from."""
        x = np.array([1.0, float(rows), float(prompt_tokens)])
        expected = float(x @ self._weights)
        if self._n_seen > 8 and expected > 0:
            seconds = min(max(seconds, expected / 3), expected * 3)
        gain = self._covariance @ x / (FORGETTING * 0.01 + x @ self._covariance @ x)
        self._weights = np.maximum(self._weights + gain * (seconds - expected), [0.0, 0.0, 1e-7])
        covariance = (self._covariance - np.outer(gain, x @ self._covariance)) / FORGETTING
        self._covariance = np.clip((covariance + covariance.T) / 2, -1.0, 1.0)
        self._n_seen += 1

    @property
    def tokens_per_second(self) -> float:
        """Marginal prefill rate as learnt so far."""
        return float(1.0 / self._weights[2])

    def expected_seconds(self, rows: int, prompt_tokens: int) -> float:
        return float(np.array([1.0, rows, prompt_tokens]) @ self._weights)

    def tokens(self, rows: int) -> int:
        """Prompt tokens for a step that also carries `rows` decode rows."""
        target = self._target if rows else self._target * QUIET_FACTOR
        left = target - self.expected_seconds(rows, 0)
        tokens = int(left / self._weights[2]) if left > 0 else 0
        return max(min(MIN_TOKENS, self._n_batch), min(tokens, self._n_batch - rows))
