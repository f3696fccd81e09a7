"""What a prefill engine gives a decode engine: a request, the token that its prompt led to, and what the cache holds.

Entries go as they are kept, so both sides need the same format and page size, and the answer is that of one engine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dsv3_jax.inference.request import Request
from dsv3_jax.inference.sampling import Sampling

_LENGTH = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Handover:
    """A request whose prompt was read."""

    request: Request
    first: int
    """The token drawn from the prompt."""
    arrays_LJSx: tuple[np.ndarray, ...]
    """Its pages, in order; see `PagedStorage`."""
    window: tuple[np.ndarray, np.ndarray] | None = None
    """Hidden states [W, D] and tokens [W] for the prediction modules; see `speculative.Window`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that travel."""
        return sum(array.nbytes for array in (*self.arrays_LJSx, *(self.window or ())))


def request_as_json(request: Request) -> dict:
    """What `request_from_json` reads."""
    return {"prompt": np.asarray(request.prompt).tolist(), "max_new_tokens": request.max_new_tokens,
            "sampling": dataclasses.asdict(request.sampling), "stop_ids": sorted(request.stop_ids),
            "user": request.user}


def request_from_json(told: dict) -> Request:
    """The inverse of `request_as_json`."""
    return Request(np.array(told["prompt"], np.int32), told["max_new_tokens"], Sampling(**told["sampling"]),
                   frozenset(told["stop_ids"]), told["user"])


def pack(header: dict, arrays: Sequence[np.ndarray] = ()) -> bytes:
    """A message: JSON and arrays. For processes that trust each other's numbers but run none of each other's code."""
    shapes = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps({**header, "arrays": shapes}).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(np.ascontiguousarray(array).tobytes() for array in arrays)])


def unpack(message: bytes) -> tuple[dict, list[np.ndarray]]:
    """The inverse of `pack`.

    Raises:
      ValueError: a message that is cut short or too long.
    """
    if len(message) < _LENGTH.size:
        raise ValueError(f"a message of {len(message)} bytes has no header")
    at = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    header = json.loads(message[_LENGTH.size:at])
    arrays = []
    for name, shape in header.pop("arrays"):
        dtype = jnp.dtype(name)
        count = math.prod(shape)
        if at + count * dtype.itemsize > len(message):
            raise ValueError(f"a message of {len(message)} bytes ends within an array {name}{shape}")
        arrays.append(np.frombuffer(message, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize
    if at != len(message):
        raise ValueError(f"a message has {len(message) - at} bytes that its header does not tell of")
    return header, arrays


def handover_message(header: dict, handover: Handover) -> bytes:
    """`pack` with a handover."""
    return pack({**header, "request": request_as_json(handover.request), "first": handover.first,
                 "windowed": handover.window is not None}, [*handover.arrays_LJSx, *(handover.window or ())])


def handover_from(header: dict, arrays: list[np.ndarray]) -> Handover:
    """The handover of a message that `unpack` has read."""
    window = (arrays[-2], arrays[-1]) if header["windowed"] else None
    pages = arrays[:-2] if window else arrays
    return Handover(request_from_json(header["request"]), header["first"], tuple(pages), window)
