"""How many cells are held and how many of them are locked, in all and by namespace: the pool's counters.

Held cells are those of the tree, or of the sequences where cells are not shared; locked ones are held by somebody who runs. The
pool says what changes, `law` recounts. A namespace that holds nothing is forgotten. Engine thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from pasture.core.values import Namespace


class Holdings:
    def __init__(self) -> None:
        self.locked_cells = 0
        self._held: dict[Namespace, int] = {}
        self._locked: dict[Namespace, int] = {}

    @property
    def held_by(self) -> Mapping[Namespace, int]:
        return self._held

    @property
    def locked_by(self) -> Mapping[Namespace, int]:
        return self._locked

    def hold(self, namespace: Namespace, n_cells: int) -> None:
        """So many more, or fewer."""
        _add(self._held, namespace, n_cells)

    def lock(self, namespace: Namespace, n_cells: int) -> None:
        """So many more, or fewer."""
        self.locked_cells += n_cells
        _add(self._locked, namespace, n_cells)


def _add(counts: dict[Namespace, int], namespace: Namespace, n: int) -> None:
    if not n:
        return
    total = counts.get(namespace, 0) + n
    if total:
        counts[namespace] = total
    else:
        del counts[namespace]
