"""A schedule as text for a terminal: a row for each rank, a column for each tick."""

from __future__ import annotations

from dsv3_jax.pipeline.account import UNIT, Durations, on_ticks
from dsv3_jax.pipeline.schedule import Schedule, Work, run

LEGEND = ("F forward, B backward, I its part for inputs, W its part for weights, then the micro-batch; two at once "
          "stand together;\nlower case: a stage that is not the rank's own number; = goes on; blank: waits")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def as_text(schedule: Schedule, ticks: Durations = UNIT) -> str:
    """One line for each rank after a line with every tenth tick, all equally long.

    Micro-batches have one digit, 0 to 9 and then a to z, where 36 are enough, decimal numbers elsewhere.

    Args:
      ticks: whole numbers, a pair at least 2, so that both halves can be written.

    Raises:
      ConfigError: they are not whole.
    """
    columns = 1 + max(tick for tick, _ in on_ticks(schedule, ticks))
    width = 2 if schedule.micro_batches <= len(DIGITS) else 1 + len(str(schedule.micro_batches - 1))
    label = len(f"rank {schedule.ranks - 1}") + 1
    ruler = "".join(str(tick).ljust(10 * width) for tick in range(0, columns, 10))
    lines = ["tick".ljust(label) + ruler[:columns * width].ljust(columns * width)]
    for rank, row in enumerate(run(schedule, ticks).ranks):
        line = f"rank {rank}".ljust(label)
        for slot, start, end in row:
            line = line.ljust(label + int(start) * width)
            written = "".join(_name(work, rank, schedule.micro_batches).ljust(width) for work in slot)
            line += written.ljust(int(end - start) * width, "=")
        lines.append(line.ljust(label + columns * width))
    return "\n".join(lines) + "\n"


def _name(work: Work, rank: int, micro_batches: int) -> str:
    number = DIGITS[work.micro_batch] if micro_batches <= len(DIGITS) else str(work.micro_batch)
    return (work.kind if work.stage == rank else work.kind.lower()) + number
