"""No parameter changes its layout unnoticed."""

from __future__ import annotations

from tests.dsv3_jax.codesign import golden_shardings


def test_every_parameter_lies_where_the_golden_file_says():
    found, expected = list(golden_shardings.lines()), golden_shardings.PATH.read_text().splitlines()
    changed = [f"now  {now}\nwas  {was}" for now, was in zip(found, expected, strict=False) if now != was]
    advice = "layouts changed; if that is meant, run: python -m tests.dsv3_jax.codesign.golden_shardings"
    assert not changed, "\n".join([advice, *changed[:10]])
    assert len(found) == len(expected), advice
