"""What the scripts share: presets with dotted overrides, --json, and errors without a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config import ConfigError
from dsv3_jax.training.metrics import Diverged


def take_option(arguments: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the other arguments."""
    rest, value, skip = [], default, False
    for index, argument in enumerate(arguments):
        if skip:
            skip = False
        elif argument == name and index + 1 < len(arguments):
            value, skip = arguments[index + 1], True
        elif argument.startswith(name + "="):
            value = argument[len(name) + 1:]
        else:
            rest.append(argument)
    return value, rest


def provenance() -> dict[str, str]:
    """Command, date, versions and device: what a committed result must tell about itself."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] \
        if cpu.exists() else []
    root, script = Path(__file__).resolve().parent.parent, Path(sys.argv[0]).resolve()
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    return {"command": " ".join(["python", name, *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "python": platform.python_version(),
            "device": f"{jax.devices()[0].device_kind}: {(*models, platform.processor())[0]}, {os.cpu_count()} cores"}


def say_line(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


@contextlib.contextmanager
def standard_output_for_json(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """With `wanted`, sends all that is printed inside, by libraries too, to standard error.

    Yields a function that writes one JSON value to the real standard output.
    """
    if not wanted:
        yield lambda value: None
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def write(value: Any) -> None:
        os.write(real, (json.dumps(value, indent=2) + "\n").encode())
    try:
        yield write
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def finish(main: Callable[[], Any]) -> None:
    """Runs a script: a user's error becomes one line and exit status 2, a diverged run one line and status 3."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)


def write_report(out: Path | None, result: Any, markdown: str, draw: Callable[[], Any] | None = None) -> None:
    """OUT.json and OUT.md, and OUT.png of what `draw` draws; nothing without `out`."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown)
    if draw is not None:
        draw().savefig(out.with_suffix(".png"), dpi=110)


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
      ImportError: it is not installed; names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "dsv3-jax[quickstart]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2))
