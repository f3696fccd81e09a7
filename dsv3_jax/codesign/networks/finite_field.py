"""Arithmetic in fields of prime-power order, which Slim Fly's graph is made of."""

from __future__ import annotations

import itertools

import numpy as np

from dsv3_jax.config import ConfigError


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with p prime and p^m = q, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q ** 0.5) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None


class Field:
    """GF(q). An element is a number below q whose base-p digits are a polynomial's coefficients, lowest first."""

    def __init__(self, q: int):
        """
        Raises:
          ConfigError: q is not a power of a prime.
        """
        found = prime_power(q)
        if found is None:
            raise ConfigError(f"q ({q}) must be a power of a prime: there is no field of {q} elements")
        self.q, (self.p, self.m) = q, found
        self.power_N = self._powers_of_a_generator()
        """int [q-1]: xi^0, xi^1, ... for one element xi whose powers are all but 0."""
        self.log_Q = np.zeros(q, int)
        self.log_Q[self.power_N] = np.arange(q - 1)

    def _powers_of_a_generator(self) -> np.ndarray:
        """Takes x for xi, and the first polynomial x^m = c_0 + c_1 x + ... modulo which x has order q-1."""
        p, m = self.p, self.m
        for lower in itertools.product(range(p), repeat=m):
            powers, digits = [1], [1] + [0] * (m - 1)
            for _ in range(self.q - 2):
                top = digits[-1]
                digits = [(low + top * c) % p for low, c in zip([0, *digits[:-1]], lower, strict=True)]
                value = sum(digit * p ** place for place, digit in enumerate(digits))
                if value <= 1:
                    break
                powers.append(value)
            if len(set(powers)) == self.q - 1:
                return np.array(powers)
        raise AssertionError(f"GF({self.q}) has a generator")

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a + b, digit by digit without carry."""
        places = self.p ** np.arange(self.m)
        digits = (np.asarray(a)[..., None] // places + np.asarray(b)[..., None] // places) % self.p
        return (digits * places).sum(axis=-1)

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a b, by adding logarithms."""
        product = self.power_N[(self.log_Q[a] + self.log_Q[b]) % (self.q - 1)]
        return np.where((np.asarray(a) == 0) | (np.asarray(b) == 0), 0, product)
