"""Rows to the ranks that need them, over the fast network: the way out of expert parallelism."""

from pallas_kernels.all_to_all_dispatch.api import all_to_all_dispatch, dispatch_start, dispatch_wait
from pallas_kernels.peers import Route, make_route

__all__ = ["Route", "all_to_all_dispatch", "dispatch_start", "dispatch_wait", "make_route"]
