"""One's own hardware, in a short TOML file.

    name = "h100_800g"            # for --pod h100_800g:4x8
    based_on = "h100"             # what is not given below is as of this entry; and the compiler's target
    source = "what if"

    hbm_bytes = 141e9
    hbm_bandwidth = 4.8e12        # bytes/s; with peak_flops FLOP/s, all of one JAX device

    [peak_flops]                  # dense: bf16, and fp8 and int8 where the chip multiplies them
    bf16 = 989.4e12

    [scale_up]                    # one way, all links of the device together
    name = "NVLink"
    bandwidth = 450e9
    effective = 370e9             # reached in practice; nominal if not given
    latency = 3e-6                # seconds; may be left out

    [scale_out]
    like = "roce_400g"            # a name in `links.LINKS`, and what differs from it
    bandwidth = 100e9

Without `based_on` all of these are needed, and kind = "gpu" or "tpu". Then torus (dimensions of the fast network; 0: a
switch), devices_per_chip and largest_scale_up (devices of one fast domain) are 0, 1 and 8 unless given.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsv3_jax.codesign.hardware import HARDWARE, Hardware, hardware
from dsv3_jax.codesign.links import LINKS, Link
from dsv3_jax.codesign.toml_fields import Fields
from dsv3_jax.config import named

_FIELDS = ("name", "based_on", "kind", "source", "hbm_bytes", "hbm_bandwidth", "peak_flops", "scale_up", "scale_out",
           "torus", "devices_per_chip", "largest_scale_up")
_FORMATS = ("bf16", "fp8", "int8")
LEAST_BANDWIDTH, LEAST_BYTES, LEAST_FLOPS = 1e6, 2 ** 20, 1e9
"""Less is a number in other units: GB/s, GB or TFLOP/s."""


def find_hardware(name: str) -> Hardware:
    """The entry of that name, or of the file of that name if it ends in .toml: what a script's --hardware takes."""
    return load_hardware(name) if name.endswith(".toml") else hardware(name)


def load_hardware(path: Path | str) -> Hardware:
    """The hardware in a file, see above.

    Raises:
      ConfigError: names the file, the field, its value and the remedy: what is not TOML, unknown or missing fields,
        quantities that are not positive or plainly in other units, more reached than nominal.
    """
    fields = Fields.of_file(Path(path), _FIELDS)
    base = named(HARDWARE, fields.text("based_on"), f"{path}: based_on") if "based_on" in fields.values else None
    kind = fields.text("kind", base.kind if base else None)
    if kind not in ("gpu", "tpu"):
        raise fields.wrong("kind", kind, "must be gpu or tpu: a switched fast network, or a torus")
    if base and kind != base.kind:
        raise fields.wrong("kind", kind, f"must be that of based_on ({base.name}), {base.kind}: leave it out")
    torus = fields.whole("torus", 0, base.torus if base else 0)
    if (torus > 0) != (kind == "tpu") or torus > 3:
        raise fields.wrong("torus", torus, "must be 0 for a gpu, whose fast network is switched, and 1 to 3 dimensions "
                           "for a tpu")
    per_chip = fields.whole("devices_per_chip", 1, base.devices_per_chip if base else 1)
    largest = fields.whole("largest_scale_up", 1, base.largest_scale_up if base else 8)
    if largest % per_chip:
        raise fields.wrong("largest_scale_up", largest, f"must be a multiple of devices_per_chip ({per_chip})")
    return Hardware(
        name=_name(fields), kind="gpu" if kind == "gpu" else "tpu",
        device_kind=base.device_kind if base else fields.text("name"),
        hbm_bytes=int(fields.quantity("hbm_bytes", "bytes", LEAST_BYTES, base.hbm_bytes if base else None)),
        hbm_bandwidth=fields.quantity("hbm_bandwidth", "bytes/s", LEAST_BANDWIDTH,
                                      base.hbm_bandwidth if base else None),
        peak_flops=_peaks(fields, base), scale_up=_link(fields, "scale_up", base.scale_up if base else None),
        scale_out=_link(fields, "scale_out", base.scale_out if base else None), torus=torus,
        devices_per_chip=per_chip, largest_scale_up=largest, source=fields.text("source", str(path)),
        compiles_as=base.name if base else None)


def load_link(fields: Fields, base: Link | None) -> Link:
    """The link in a table of a file; what it does not give is as of `base`. What is reached of another bandwidth than
    the base's is that bandwidth."""
    if "like" in fields.values:
        base = named(LINKS, fields.text("like"), f"{fields.path}: {fields.table}like")
    bandwidth = fields.quantity("bandwidth", "bytes/s", LEAST_BANDWIDTH, base.bandwidth if base else None)
    reached = base.effective if base and "bandwidth" not in fields.values else bandwidth
    effective = fields.quantity("effective", "bytes/s", LEAST_BANDWIDTH, reached)
    if effective > bandwidth:
        raise fields.wrong("effective", effective, f"must not exceed the nominal bandwidth ({bandwidth:g})")
    latency = base.latency if base else None
    if "latency" in fields.values:
        latency = fields.quantity("latency", "seconds", 0)
        if latency > 1:
            raise fields.wrong("latency", latency, "is too much to be in seconds: 3 microseconds are 3e-6")
    return Link(bandwidth, effective, latency, fields.text("name", base.name if base else fields.table.strip(".")))


def _link(fields: Fields, table: str, base: Link | None) -> Link:
    return load_link(fields.within(table, ("like", "name", "bandwidth", "effective", "latency")), base)


def _name(fields: Fields) -> str:
    name = fields.text("name")
    if not re.fullmatch(r"\w+", name):
        raise fields.wrong("name", name, "must be of letters, digits and _, so that --pod can name it")
    if name in HARDWARE:
        raise fields.wrong("name", name, f"is taken: call yours differently, such as {name}_mine")
    return name


def _peaks(fields: Fields, base: Hardware | None) -> dict[str, float]:
    table = fields.within("peak_flops", _FORMATS)
    peaks = dict(base.peak_flops) if base and not table.values else {}
    peaks |= {name: table.quantity(name, "FLOP/s", LEAST_FLOPS) for name in table.values}
    if "bf16" not in peaks:
        raise table.missing("bf16", "a number of FLOP/s")
    return peaks
