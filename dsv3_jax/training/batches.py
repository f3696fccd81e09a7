"""Which tokens a training sample holds: a pure function of the seed and the sample's index.

Nothing is stored between samples, so a run resumes at any position, a process reads only its own rows, and the order
does not depend on how many processes there are.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.config import ConfigError

_ROUNDS = 8
"""Four make a Feistel network a good shuffle of a large range; short ranges mix few bits a round and need more."""


class Batches:
    """Training samples cut from one long row of tokens.

    A sample is a window of `sequence_length + lookahead` tokens; windows start `sequence_length` apart. An epoch
    visits each once, in an order of its own, on a grid shifted by an offset of its own, so that another epoch cuts the
    text elsewhere.

    Attributes:
        windows: samples in an epoch.

    Args:
        tokens: [total], any integer dtype, may be a memory map.
        sequence_length: tokens predicted in a sample.
        lookahead: tokens read past those: 1 for the next token, plus 1 for each multi-token-prediction depth.
        seed: not negative.

    Raises:
        ConfigError: the tokens are fewer than one window, or the seed is negative.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, lookahead: int, seed: int) -> None:
        if seed < 0:
            raise ConfigError(f"seed ({seed}) must not be negative")
        spare = len(tokens) - sequence_length - lookahead
        if spare < 0:
            raise ConfigError(f"batch.sequence_length ({sequence_length}) plus {lookahead} tokens of lookahead exceeds "
                              f"the {len(tokens)} training tokens of data.path; lower it or add text")
        # The grid gives up at most one window to have room for every offset; a text of one window shifts less.
        self.windows = max(1, 1 + (spare - (sequence_length - 1)) // sequence_length)
        self._offsets = 1 + min(sequence_length - 1, spare - (self.windows - 1) * sequence_length)
        self._tokens, self._stride, self._length = tokens, sequence_length, sequence_length + lookahead
        self._seed = seed

    def sample(self, index: int) -> np.ndarray:
        """Sample `index` of the run, counted from 0 without bound: int32 [sequence_length + lookahead]."""
        return self.rows(index, index + 1)[0]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Samples `start` to `stop - 1`: int32 [stop - start, sequence_length + lookahead]."""
        if not 0 <= start <= stop:
            raise ValueError(f"rows from {start} to {stop}: samples are counted from 0, upwards")
        rows = np.empty((stop - start, self._length), np.int32)
        for row, begin in enumerate(self._begins(start, stop)):
            rows[row] = self._tokens[begin:begin + self._length]
        return rows

    def _begins(self, start: int, stop: int) -> list[int]:
        """Where each sample begins among the tokens."""
        begins: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.windows)
            last = min(self.windows, first + stop - start)
            *keys, shift = np.random.SeedSequence([self._seed, epoch]).generate_state(_ROUNDS + 1, np.uint64)
            order = permute(np.arange(first, last, dtype=np.uint64), self.windows, keys)
            offset = int(shift) % self._offsets
            begins += [offset + int(window) * self._stride for window in order]
            start += last - first
        return begins


def permute(values: np.ndarray, size: int, keys: list[np.uint64]) -> np.ndarray:
    """A bijection of range(`size`) chosen by `keys`, one a round, applied to uint64 `values` in that range.

    A stored permutation would need memory and start-up time in proportion to the corpus: 14.8T tokens in windows of
    4,096 are 3.6e9 windows, 29 GB of indices in every process. A Feistel network over the next power of four computes
    any element by itself; values it sends outside the range are sent through again until they land inside (cycle
    walking), at most four times on average, which keeps it a bijection.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    values = values.copy()
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        values[outside] = left << half | right
        outside = values >= np.uint64(size)
    return values


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def validation_windows(tokens: np.ndarray, sequence_length: int, lookahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out tokens as windows in which every token but the very first is predicted exactly once.

    The prediction at column t of window i is of token i * sequence_length + t + 1. The negative log likelihood summed
    with the weights, divided by ln 2 and by the bytes of held-out text, is therefore its bits per byte: the first
    token, which nothing predicts, opens a document and stands for no text. Past the end tokens are 0, and weights are
    those of the next token: a deeper prediction of multi-token prediction reads up to its depth further.

    Args:
        tokens: [total], any integer dtype.
        sequence_length: tokens predicted in a window.
        lookahead: as in `Batches`.

    Returns:
        Windows, int32 [N, sequence_length + lookahead], and weights 0 or 1, float32 [N, sequence_length].

    Raises:
        ConfigError: fewer than two tokens, so nothing to predict.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise ConfigError(f"data.validation_share: the held-out text has {len(tokens)} tokens, and at least 2 are "
                          "needed; raise data.validation_share or add text")
    count = -(-targets // sequence_length)
    padded = np.zeros(count * sequence_length + lookahead, np.int32)
    padded[:len(tokens)] = tokens
    inputs = np.lib.stride_tricks.sliding_window_view(padded, sequence_length + lookahead)[::sequence_length].copy()
    weights = (np.arange(count * sequence_length) < targets).astype(np.float32)
    return inputs, weights.reshape(count, sequence_length)
