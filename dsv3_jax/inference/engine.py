"""Continuous batching: requests come and go while the others decode.

Each turn of the engine lets waiting requests in, reads a chunk of one prompt on each device, or takes a step of all
rows that have read theirs, or both (see `pace`). The answer to a request is the one it would get alone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError

import numpy as np
from flax import nnx

from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.between_turns import BetweenTurns
from dsv3_jax.inference.expert_balance import ExpertBalance, Rebalance, imbalance
from dsv3_jax.inference.handover import Handover
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.pace import Pace, Targets
from dsv3_jax.inference.request import Finish, Listener, Request, Ticket
from dsv3_jax.inference.sampling import Sampling, sampling_rows
from dsv3_jax.inference.scheduler import Busy, Row, Scheduler, Sizes
from dsv3_jax.inference.serving_programs import ServingPrograms

CHUNKS = (16, 64, 256)
"""Tokens of a prompt that are read at once, see `Engine._chunk_for`."""
TOGETHER = 4
"""Prompts of a device that are read at once, as far as their tokens are no more than the greatest chunk: experts'
weights are fetched once for all of them."""
SMALLEST_TABLE = 4
"""Pages of a row that a program sees: this many, or a power of four times it, up to all."""


WITHOUT_PLACEMENT = ("needs a model with a placement of its experts, or nobody counts what they get: make ModelOnMesh "
                     "with placement=Placement.in_order(...)")


@dataclasses.dataclass
class Totals:
    """Of an engine since it began."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompts' tokens those that were found in pages."""
    read_tokens: int = 0
    new_tokens: int = 0
    chunks: int = 0
    steps: int = 0
    row_steps: int = 0
    """Rows that took part in steps."""
    preemptions: int = 0
    refused: int = 0
    rebalances: int = 0
    moved_bytes: int = 0
    """Of experts' weights that came to devices which did not have them."""
    accepted: list[int] = dataclasses.field(default_factory=list)
    """Drafts accepted, by how far ahead they were."""

    def acceptance(self) -> list[float]:
        """Share of steps in which the first, the second, ... draft was kept."""
        return [kept / self.row_steps if self.row_steps else 0.0 for kept in self.accepted]

    @classmethod
    def of_several(cls, parts: Iterable[Totals]) -> Totals:
        """Sums over engines."""
        parts = list(parts)
        accepted = itertools.zip_longest(*(part.accepted for part in parts), fillvalue=0)
        whole = cls(accepted=[sum(each) for each in accepted])
        for field in dataclasses.fields(cls):
            if field.name != "accepted":
                setattr(whole, field.name, sum(getattr(part, field.name) for part in parts))
        return whole


class Engine:
    """Serves one model on one mesh. To make one compiles all its programs.

    Args:
      weights: of `ModelOnMesh.prepare`.
      sizes: rows, pages and limits.
      targets: latencies to keep.
      chunks: tokens of a prompt that may be read at once, ascending.
      hand_over: for an engine that reads prompts only: called, from its thread, with each ticket whose prompt is read
        and what another engine needs to go on. The row keeps its pages until `acknowledge`.
      receives: whether other engines' requests will come, by `receive`.
      rebalance_every_s: while `start`ed, rebalances experts so often, in seconds; None: when `rebalance` is called.

    Attributes:
      programs: how many it has compiled: all that serving can need.
      totals: counts since it began.
      error: what it failed with; None while it works.

    Raises:
      ConfigError: a model whose attention has a window, sizes beyond what it can attend to, experts to rebalance
        without a placement, or devices that share prompts in an engine that decodes, or chunks unevenly.
    """

    def __init__(self, on_mesh: ModelOnMesh, weights: nnx.State, sizes: Sizes, targets: Targets = Targets(),
                 chunks: Sequence[int] = CHUNKS, hand_over: Callable[[Ticket, Handover], None] | None = None,
                 receives: bool = False, rebalance_every_s: float | None = None):
        if on_mesh.model.attention_window is not None:
            raise ConfigError(f"model.attention_window ({on_mesh.model.attention_window}): a cache in pages keeps all "
                              "tokens, and such a model wants a ring: use inference.generate")
        if sizes.context > on_mesh.window:
            raise ConfigError(f"engine.context ({sizes.context}) is more than the model's window "
                              f"(model.max_position_embeddings, {on_mesh.window}): lower it")
        shared = on_mesh.mesh.shape["context"]
        if shared > 1 and hand_over is None:
            raise ConfigError(f"mesh.context ({shared}) is for engines that only read prompts: make ModelOnMesh "
                              "without reads_only, and the axis counts as part of scale_up")
        if any(size % shared for size in chunks):
            raise ConfigError(f"mesh.context ({shared}) must divide each of engine.chunks {tuple(chunks)}: the devices "
                              "that share a chunk have equal parts of it")
        if rebalance_every_s is not None and on_mesh.placement is None:
            raise ConfigError(f"engine.rebalance_every_s ({rebalance_every_s:g}) {WITHOUT_PLACEMENT}")
        self.on_mesh, self.sizes = on_mesh, sizes
        self._weights, self._chunks = weights, tuple(chunks)
        self._programs = ServingPrograms(on_mesh, sizes.rows, sizes.pages, sizes.page_size)
        self._ahead, self._devices = self._programs.ahead, self._programs.devices
        self._scheduler = Scheduler(sizes, self._devices, self._ahead)
        self._pace = Pace(targets)
        self.totals = Totals(accepted=[0] * self._ahead)
        self.error: BaseException | None = None
        self._state = self._programs.empty()
        self.programs = self._programs.compile(weights, self._state, self._lanes_and_sizes(),
                                                self._counts() if hand_over is None else (), self._widths())
        self._hand_over = hand_over
        if hand_over is not None or receives:
            gives = hand_over is not None
            self.programs += self._programs.compile_handover(self._state, self._widths(), gives, receives)
        self._balance: ExpertBalance | None = None
        if self._state.sent_HLS is not None:
            self._balance = ExpertBalance(on_mesh, weights, self._state.sent_HLS)
            self.programs += self._balance.programs
        self._rebalance_every_s, self._rebalancing = rebalance_every_s, threading.Lock()
        self._keeper: threading.Thread | None = None
        self._between, self._stopped = BetweenTurns(), threading.Event()
        self._arrivals: collections.deque[tuple[Ticket, Handover, Callable[[], None]]] = collections.deque()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(self, request: Request, listener: Listener | None = None) -> Ticket:
        """Puts a request in line; any thread may.

        Raises:
          ConfigError: a request that no engine of this size can serve.
          Busy: too many wait, or it would wait longer than the target.
          RuntimeError: the engine has failed.
        """
        ticket = self.new_ticket(request, listener)
        self.put(ticket)
        return ticket

    def new_ticket(self, request: Request, listener: Listener | None = None) -> Ticket:
        """A ticket for `put` or `receive`, for who must know it before anything happens to it.

        Raises:
          ConfigError: a request that no engine can serve.
        """
        request.check(self.on_mesh.model.vocab_size)
        return Ticket(request, listener, self._wake)

    def put(self, ticket: Ticket) -> None:
        """Puts a ticket in line; see `submit`."""
        with self._lock:
            self._fail_if_failed()
            try:
                if self._pace.is_late(self._scheduler.unread):
                    raise Busy(f"{self._scheduler.unread} tokens of other requests are to be read first, which would "
                               "take longer than the target: try again later")
                self._scheduler.submit(ticket)
            except Busy:
                self.totals.refused += 1
                raise
            self.totals.requests += 1
            self._lock.notify_all()

    def receive(self, ticket: Ticket, handover: Handover, on_place: Callable[[], None] = lambda: None) -> None:
        """Goes on with a request whose prompt another engine has read; any thread may.

        Args:
          ticket: of `new_ticket` with the handover's request; it has the first token then, which nobody is told of.
          on_place: called, from the engine's thread, when its pages are here and the other side may forget them.
        """
        with self._lock:
            self._fail_if_failed()
            ticket.tokens.append(handover.first)
            self._arrivals.append((ticket, handover, on_place))
            self.totals.requests += 1
            self._lock.notify_all()

    def acknowledge(self, ticket: Ticket) -> None:
        """Another engine has what `hand_over` gave; any thread may. The ticket ends, and its pages are free."""
        with self._lock:
            for row in self._scheduler.rows:
                if row.ticket is ticket:
                    self._scheduler.leave(row)
                    ticket.push([], Finish.HANDED_OVER)
            self._lock.notify_all()

    def rebalance(self, tolerance: float = 0.02) -> Rebalance:
        """Moves experts to where the load measured so far wants them, a layer between two turns; any thread may, and
        the one that calls `turn` if the engine was not started. The placement is searched in the caller's thread, while
        the engine goes on.

        The weights that the engine was made with are overwritten where layers are stacked (not on CPU).

        Args:
          tolerance: `rebalanced`'s.

        Raises:
          ConfigError: the model has no placement.
          CancelledError: the engine stopped before the end.
        """
        balance, began = self._balanced(), time.perf_counter()
        with self._rebalancing:
            self._do_between_turns(self._measure)
            new = balance.improved(tolerance)
            report = balance.report(new)
            balance.begin_anew()
            for layer in np.flatnonzero(np.any(new.expert_LS != balance.placement.expert_LS, axis=1)):
                self._do_between_turns(functools.partial(self._move, int(layer), new))
        self.totals.rebalances += 1
        self.totals.moved_bytes += report.moved_bytes
        return report._replace(seconds=time.perf_counter() - began)

    def imbalance(self) -> np.ndarray:
        """[MoE layers, then prediction modules]: the load of the fullest device over the mean, measured since the last
        rebalance; any thread may.

        Raises:
          ConfigError: the model has no placement.
        """
        balance = self._balanced()
        self._do_between_turns(self._measure)
        return imbalance(balance.device_LM)

    def turn(self) -> bool:
        """One turn: lets requests in, reads a chunk, takes a step. False if there was nothing to do."""
        did = self._between.do_one()
        with self._lock:
            self._end_cancelled()
            placed = self._place_arrivals()
            for row in self._scheduler.admit():
                self.totals.prompt_tokens += row.to_read
                self.totals.reused_tokens += row.read
            decoding = sum(not row.reading for row in self._scheduler.rows)
            reads = self._scheduler.reads() if self._pace.may_read(decoding) else []
        did |= any(reads)
        if any(reads):
            self._read(reads)
        with self._lock:
            # A step costs little more for many rows than for few, so the rows that are being read wait to join it.
            first = self._pace.reads_first and any(self._scheduler.reads())
            decodes = [] if first else self._scheduler.decodes()
            self.totals.preemptions = self._scheduler.preemptions
        if decodes:
            self._decode(decodes)
        return bool(did or decodes or placed)

    def run(self) -> None:
        """Turns until nothing is left to do."""
        while self.turn():
            pass

    def start(self) -> None:
        """Serves in a thread of its own until `stop`."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
            self._thread.start()
            if self._rebalance_every_s is not None:
                self._stopped.clear()
                self._keeper = threading.Thread(target=self._keep_balance, name="balance", daemon=True)
                self._keeper.start()

    def stop(self) -> None:
        """Ends the thread; requests that have not ended are cancelled."""
        with self._lock:
            self._stopping = True
            self._stopped.set()
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            if self._keeper is not None:
                self._keeper.join()
            self._thread = self._keeper = None
        self._end_all(Finish.CANCELLED)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def room(self) -> int:
        """Most tokens of a request, prompt and answer together: a step of drafts wants some beyond them."""
        return self.sizes.context - self._ahead

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        with self._lock:
            return self._scheduler.waiting + len(self._arrivals)

    @property
    def running(self) -> int:
        """Requests with one."""
        with self._lock:
            return len(self._scheduler.rows)

    @property
    def free_pages(self) -> int:
        """Pages that no request holds, of all devices."""
        with self._lock:
            return sum(pool.available for pool in self._scheduler.pools)

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not self._has_work():
                    self._lock.wait()
                if self._stopping:
                    self._between.cancel()
                    return
            try:
                self.turn()
            except BaseException as error:
                with self._lock:
                    self.error = error
                    self._between.cancel()
                self._stopped.set()
                self._end_all(Finish.ERROR, error)
                return

    def _balanced(self) -> ExpertBalance:
        if self._balance is None:
            raise ConfigError(f"balancing experts {WITHOUT_PLACEMENT}")
        return self._balance

    def _do_between_turns(self, piece: Callable[[], None]) -> None:
        """On the engine's thread, or here while it has none."""
        with self._lock:
            self._fail_if_failed()
            if self._thread is not None and self._stopping:
                raise CancelledError
            end = self._between.put(piece)
            if self._thread is None:
                self._between.do_one()
            self._lock.notify_all()
        end.result()

    def _measure(self) -> None:
        assert self._balance is not None
        assert self._state.sent_HLS is not None
        self._state = self._state._replace(sent_HLS=self._balance.measure(self._state.sent_HLS))

    def _move(self, layer: int, new: Placement) -> None:
        assert self._balance is not None
        self._measure()
        self._weights = self._balance.move(self._weights, layer, new)

    def _keep_balance(self) -> None:
        with contextlib.suppress(CancelledError):
            while not self._stopped.wait(self._rebalance_every_s):
                self.rebalance()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _has_work(self) -> bool:
        """Whether a turn would do something: all but wait for others to take rows over."""
        rows = self._scheduler.rows
        return bool(self._between or self._arrivals or self._scheduler.waiting
                    or any(not row.held or row.ticket.cancelled for row in rows))

    def _fail_if_failed(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"the engine has failed: {self.error}") from self.error

    def _read(self, reads: list[list[Row]]) -> None:
        """A chunk of the first rows of each device."""
        began = time.perf_counter()
        most, size = self._chunk_for(reads)
        rows = {device * most + number: row for device, line in enumerate(reads)
                for number, row in enumerate(line[:most])}
        ends = {row: min(row.read + size, row.to_read) for row in rows.values()}
        chunk = self._programs.idle_chunk(size, self._width(ends.values()), most)
        sampling = [Sampling(temperature=0)] * len(chunk.place_b)
        for lane, row in rows.items():
            tokens = row.tokens[row.read:row.read + size + self._ahead]
            chunk.tokens_bX[lane, :len(tokens)] = tokens
            chunk.place_b[lane], chunk.start_b[lane], chunk.count_b[lane] = row.place, row.read, ends[row] - row.read
            chunk.first_b[lane] = row.read == row.first
            pages = row.pages[:chunk.table_bJ.shape[1]]
            chunk.table_bJ[lane, :len(pages)] = pages
            sampling[lane] = row.ticket.request.sampling
        self._state, next_b = self._programs.read(self._weights, self._state, chunk, sampling_rows(sampling))
        with self._lock:
            for lane, row in rows.items():
                self._scheduler.did_read(row, int(chunk.count_b[lane]))
                if not row.reading and self._hand_over is None:
                    self._give(row, [int(next_b[lane])])
                elif not row.reading:
                    self._offer(row, int(next_b[lane]))
            self.totals.chunks += 1
            self.totals.read_tokens += int(chunk.count_b.sum())
            self._pace.did_read(time.perf_counter() - began, int(chunk.count_b.sum()))

    def _chunk_for(self, reads: list[list[Row]]) -> tuple[int, int]:
        """Lanes of a device, and tokens of each: the least chunk that holds what is left of the first prompts if it is
        more than half full then, else the greatest within it. Together with others if most lanes have one."""
        left = max(line[0].to_read - line[0].read for line in reads if line)
        size = next((size for size in self._chunks if size >= left), self._chunks[-1])
        if 2 * left <= size:
            size = max((s for s in self._chunks if s <= left), default=size)
        together = 2 * max(map(len, reads)) > TOGETHER and (TOGETHER, size) in self._lanes_and_sizes()
        return TOGETHER if together else 1, size

    def _lanes_and_sizes(self) -> list[tuple[int, int]]:
        """Of chunks that programs are compiled for."""
        return [(lanes, size) for size in self._chunks for lanes in (1, TOGETHER)
                if lanes == 1 or (lanes <= self.sizes.rows and lanes * size <= self._chunks[-1])]

    def _decode(self, rows: list[Row]) -> None:
        """A step of these rows."""
        began = time.perf_counter()
        of_device = [[row for row in rows if row.device == device] for device in range(self._devices)]
        most = max(map(len, of_device))
        count = next(count for count in self._counts() if count >= most)
        width = self._width(row.read + 1 + self._ahead for row in rows)
        place_b = np.full(count * self._devices, -1, np.int32)
        table_bJ = np.full((count * self._devices, width), -1, np.int32)
        sampling = [Sampling(temperature=0)] * len(place_b)
        lanes = {device * count + number: row for device, own in enumerate(of_device) for number, row in enumerate(own)}
        for lane, row in lanes.items():
            pages = row.pages[:width]
            place_b[lane], table_bJ[lane, :len(pages)] = row.place, pages
            sampling[lane] = row.ticket.request.sampling
        self._state, tokens_bQ, counts_b = self._programs.step(self._weights, self._state, place_b, table_bJ,
                                                               sampling_rows(sampling))
        with self._lock:
            for lane, row in lanes.items():
                added = int(counts_b[lane])
                self._scheduler.did_decode(row, added)
                for draft in range(added - 1):
                    self.totals.accepted[draft] += 1
                self._give(row, tokens_bQ[lane, :added].tolist())
            self.totals.steps += 1
            self.totals.row_steps += len(rows)
            self._pace.did_step(time.perf_counter() - began)

    def _give(self, row: Row, ids: list[int]) -> None:
        """New tokens to the row and to who asked for them."""
        kept, finish = row.ticket.kept(ids)
        row.tokens += ids
        self.totals.new_tokens += len(kept)
        if finish is not None:
            self._scheduler.leave(row)
        row.ticket.push(kept, finish)

    def _offer(self, row: Row, first: int) -> None:
        """A row whose prompt is read to another engine, unless its first token is its last."""
        kept, finish = row.ticket.kept([first])
        if finish is not None:
            return self._give(row, [first])
        row.tokens += kept
        row.held = True
        self.totals.new_tokens += 1
        count = -(-row.read // self.sizes.page_size)
        arrays, window = self._programs.take(self._state, row.device, row.place, row.pages[:count],
                                             self._width([row.read]))
        row.ticket.push(kept)
        assert self._hand_over is not None
        self._hand_over(row.ticket, Handover(row.ticket.request, first, arrays, window))

    def _place_arrivals(self) -> bool:
        """Gives rows to requests that other engines have read, as long as there is room."""
        placed = False
        while self._arrivals:
            ticket, handover, on_place = self._arrivals[0]
            if ticket.cancelled:
                ticket.push([], Finish.CANCELLED)
                on_place()
            else:
                row = self._scheduler.adopt(ticket, handover.first)
                if row is None:
                    break
                self._adopt(row, handover)
                placed = True
                on_place()
            self._arrivals.popleft()
        return placed

    def _adopt(self, row: Row, handover: Handover) -> None:
        """Puts what came into the row's pages."""
        count = handover.arrays_LJSx[0].shape[1]
        arrival = self._programs.no_arrival(self._width([count * self.sizes.page_size]))
        lane = row.device
        arrival.place_b[lane], arrival.lengths_b[lane], arrival.last_b[lane] = row.place, row.read, handover.first
        arrival.table_bJ[lane, :count] = row.pages[:count]
        arrival.seen_bV[lane, row.tokens] = True
        for mine, given in zip(arrival.arrays_bLJSx, handover.arrays_LJSx, strict=True):
            mine[lane, :, :count] = given
        for mine, given in zip(arrival.window or (), handover.window or (), strict=True):
            mine[lane] = given
        self._state = self._programs.adopt(self._state, arrival)

    def _end_cancelled(self) -> None:
        waiting, rows = self._scheduler.remove_cancelled()
        for row in rows:
            self._scheduler.leave(row)
        for ticket in [*waiting, *(row.ticket for row in rows)]:
            ticket.push([], Finish.CANCELLED)

    def _end_all(self, finish: Finish, error: BaseException | None = None) -> None:
        with self._lock:
            tickets = [*self._scheduler.tickets(), *(ticket for ticket, _, _ in self._arrivals)]
            for ticket in tickets:
                ticket.cancel()
            for row in self._scheduler.remove_cancelled()[1]:
                self._scheduler.leave(row)
            self._arrivals.clear()
            for ticket in tickets:
                ticket.push([], finish, error)

    def _counts(self) -> list[int]:
        """Rows of each device that steps are compiled for."""
        return _up_to(self.sizes.rows, 1)

    def _widths(self) -> list[int]:
        """Pages of a row that programs are compiled for."""
        return _up_to(self.sizes.pages_per_row, SMALLEST_TABLE)

    def _width(self, tokens: Iterable[int]) -> int:
        """The least that holds the longest of these numbers of tokens."""
        longest = -(-max(tokens) // self.sizes.page_size)
        return next(width for width in self._widths() if width >= longest)


def _up_to(most: int, smallest: int) -> list[int]:
    """`smallest` and powers of four times it below `most`, and `most`."""
    sizes = []
    while smallest < most:
        sizes.append(smallest)
        smallest *= 4
    return [*sizes, most]
