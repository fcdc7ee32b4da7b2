"""Counts of distinct whole numbers, of which more come than fit into memory at once."""

import numpy as np


class Tally:
    """How often each key was added, as sorted runs: a key costs 16 bytes, however often it comes.

    A run is merged into the one before as soon as that is no longer twice as long. So every key is moved a few times,
    not once per addition, as it would be if all were one run.
    """

    def __init__(self):
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        """Keys held; those in several runs count several times until `merged`."""
        return sum(len(keys) for keys, _ in self._runs)

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Add keys, sorted and distinct, int64 (n,), each as often as `counts`, int64 (n,), says."""
        self._runs.append((keys, counts))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            self._merge_last()

    def keep(self, kept: np.ndarray) -> None:
        """Forget the keys of the `merged` tally for which `kept`, bool (n,), is False."""
        keys, counts = self.merged()
        self._runs = [(keys[kept], counts[kept])]

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted distinct keys and their counts, int64 (n,) each.

        Example:
            7, 7, 3 added, then 3 and 5: keys 3, 5, 7, counts 2, 1, 2.
        """
        while len(self._runs) > 1:
            self._merge_last()
        return self._runs[0] if self._runs else (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def _merge_last(self) -> None:
        (a, of_a), (b, of_b) = self._runs[-2:]
        keys, counts = np.concatenate((a, b)), np.concatenate((of_a, of_b))
        order = np.argsort(keys, kind="stable")  # timsort: two sorted runs are merged in one go
        keys = keys[order]
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[:len(keys)])
        self._runs[-2:] = [(keys[first], np.add.reduceat(counts[order], first) if len(keys) else counts)]
