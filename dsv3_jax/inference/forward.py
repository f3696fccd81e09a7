"""The model on a cache: prefill, decode, and the prediction modules one token ahead.

The weights and modules are those of training; only attention differs, and reads what earlier tokens left in the cache.
All shapes are static and rows have their own lengths: a row's tokens beyond its count are padding, which writes nothing
and changes nothing. Run under the mesh as the training step is (with `mesh.context` the queries of a cache in pages
only).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Execution
from dsv3_jax.inference.attend import attend
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.layers_in_halves import have_halves, run_in_halves
from dsv3_jax.inference.paged_storage import PagedStorage
from dsv3_jax.inference.storage import Storage
from dsv3_jax.mesh import constrain_batch, gather_for_compute
from dsv3_jax.nn.block import SHORT_STACK, Block, gathered
from dsv3_jax.nn.model import DeepSeekV3
from dsv3_jax.nn.replicated import ReplicatedExperts, TokenNumbers


class CachedOutput(NamedTuple):
    """Hidden states of the tokens given, and the cache with them in it."""

    hidden_BQD: jax.Array
    """After the final norm, for `DeepSeekV3.logits`."""
    mtp_input_BQD: jax.Array
    """What the first prediction module reads: the same, or from before the norm (`ModelConfig.mtp_hidden`)."""
    cache: LatentCache


class Span(NamedTuple):
    """Which tokens a pass computes."""

    positions_BQ: jax.Array
    """int32: of each token in its row."""
    real_BQ: jax.Array
    """bool: False for padding."""
    lengths_B: jax.Array
    """int32: entries that the row's cache has when these are written."""
    fresh: bool
    """Whether the tokens start at position 0, so that they can attend among themselves alone."""
    number_BQ: jax.Array | None = None
    """int32: `numbered`'s."""

    def numbered(self, tokens_BQ: jax.Array) -> Span:
        """With a number for each token, from which its replicas of experts follow: its position plus its id.

        Both are the token's own, so its replicas, and with them the order in which its experts' outputs are added, are
        the same in any row and beside any others; entries in pages that requests share are those each would write.
        Tokens of a prompt have successive positions, which spread evenly; rows that decode side by side have their own
        positions and ids. Only rows with equal tokens at equal positions go the same way.
        """
        return self._replace(number_BQ=self.positions_BQ + tokens_BQ)


def prefill(model: DeepSeekV3, tokens_BT: jax.Array, lengths_B: jax.Array, cache: LatentCache,
            execution: Execution = Execution()) -> CachedOutput:
    """Reads prompts of different lengths into a cache whose rows are empty.

    Keys and values are projected up as in training, which costs less than absorption when queries are as many as keys.

    Args:
      tokens_BT: int [B, T], each row padded on the right.
      lengths_B: int [B], real tokens of each row.
      cache: made for T tokens or more; what it holds is forgotten.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    span = Span(positions_BT, positions_BT < lengths_B[:, None], lengths_B, fresh=True)
    return _run(model, tokens_BT, span, cache, execution)


def decode(model: DeepSeekV3, tokens_BQ: jax.Array, cache: LatentCache, counts_B: jax.Array | None = None,
           execution: Execution = Execution()) -> CachedOutput:
    """Appends Q tokens to each row: one for plain decoding, more for a chunk of a prompt or to verify drafts.

    Scores of all Q queries to the whole capacity are in memory at once, so a long prompt goes in chunks.

    Args:
      tokens_BQ: int [B, Q].
      counts_B: int [B], how many of the Q are real; None: all. A row with none stays as it is. Tokens beyond the
        cache's capacity are lost, so the caller must stop before.
    """
    start_B = cache.lengths_B
    column_Q = jnp.arange(tokens_BQ.shape[1])
    counts_B = jnp.full_like(start_B, tokens_BQ.shape[1]) if counts_B is None else counts_B.astype(jnp.int32)
    span = Span(start_B[:, None] + column_Q, column_Q < counts_B[:, None], start_B + counts_B, fresh=False)
    return _run(model, tokens_BQ, span, cache, execution)


def predict_ahead(model: DeepSeekV3, depth: int, hidden_BQD: jax.Array, tokens_BQ: jax.Array, span: Span,
                  cache: LatentCache, execution: Execution = Execution()) -> tuple[jax.Array, LatentCache]:
    """Runs prediction module `depth` (from 1) on its own layer of the cache (paper 2, section 2.2).

    Args:
      hidden_BQD: h^{depth-1} at the span's positions; for depth 1 `CachedOutput.mtp_input_BQD`.
      tokens_BQ: int, the token `depth` further on than each position.

    Returns:
      h^depth [B, Q, D] before the module's norm, and the cache; its lengths do not change.
    """
    module = gathered(model.mtp[depth - 1])
    ahead_BQD = constrain_batch(gathered(model.embed_tokens)(tokens_BQ))
    joined = module.join(hidden_BQD, ahead_BQD)
    hidden_BQD, storage, sent_HS = _block(module.block, joined, span.numbered(tokens_BQ), cache.storage,
                                          model.config.num_hidden_layers + depth - 1, execution)
    cache = _counted(cache, model.config.num_moe_layers + depth - 1, None if sent_HS is None else sent_HS[None])
    return hidden_BQD, dataclasses.replace(cache, storage=storage)


def prefill_ahead(model: DeepSeekV3, mtp_input_BTD: jax.Array, tokens_BT: jax.Array, cache: LatentCache,
                  execution: Execution = Execution()) -> LatentCache:
    """Fills the prediction modules' caches of a prompt that `prefill` has just read.

    The last `depth` entries of each row want tokens that are not known yet; they are written with what follows in
    tokens_BT and are to be computed again (see `speculative`).
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    span = Span(positions_BT, positions_BT < cache.lengths_B[:, None], cache.lengths_B, fresh=True)
    hidden_BTD = mtp_input_BTD
    for depth in range(1, len(model.mtp) + 1):
        hidden_BTD, cache = predict_ahead(model, depth, hidden_BTD, jnp.roll(tokens_BT, -depth, axis=1), span, cache,
                                          execution)
    return cache


def unstacked(model: DeepSeekV3) -> DeepSeekV3:
    """`model` with lists of layers instead of stacks.

    A loop over a stack copies each layer's weights out of it, all of its experts' too, where a decoding step reads
    only a few of them. With lists the loop is unrolled and nothing is copied, for more time to compile.
    """
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state)
    for name in ("dense_layers", "moe_layers"):
        if hasattr(copy, name):
            blocks, layers = nnx.split(getattr(copy, name))
            count = len(jax.tree.leaves(layers)[0])
            setattr(copy, name, nnx.List([nnx.merge(blocks, jax.tree.map(lambda w, i=i: w[i], layers))
                                          for i in range(count)]))
    return copy


def _run(model: DeepSeekV3, tokens_BQ: jax.Array, span: Span, cache: LatentCache,
         execution: Execution) -> CachedOutput:
    hidden_BQD, storage = constrain_batch(gathered(model.embed_tokens)(tokens_BQ)), cache.storage
    dense, span = model.config.first_k_dense_replace, span.numbered(tokens_BQ)
    if dense:
        alone = dataclasses.replace(execution, dual=False)  # they exchange nothing
        hidden_BQD, storage, _ = _stack(model.dense_layers, hidden_BQD, span, storage, 0, alone)
    hidden_BQD, storage, sent_LHS = _stack(model.moe_layers, hidden_BQD, span, storage, dense, execution)
    normed = gathered(model.norm)(hidden_BQD)
    mtp_input = hidden_BQD if model.config.mtp_hidden == "pre_norm" else normed
    cache = dataclasses.replace(_counted(cache, 0, sent_LHS), storage=storage, lengths_B=span.lengths_B)
    return CachedOutput(normed, mtp_input, cache)


def _counted(cache: LatentCache, first: int, sent_LHS: jax.Array | None) -> LatentCache:
    """The cache with what MoE layers `first`, first + 1, ... have sent counted, if anybody counts."""
    if cache.sent_HLS is None or sent_LHS is None:
        return cache
    sent_HLS = cache.sent_HLS.at[:, first:first + len(sent_LHS)].add(jnp.moveaxis(sent_LHS, 1, 0))
    return dataclasses.replace(cache, sent_HLS=sent_HLS)


def _stack(blocks: Block | nnx.List, hidden_BQD: jax.Array, span: Span, storage: Storage, first: int,
           execution: Execution) -> tuple[jax.Array, Storage, jax.Array | None]:
    """Layers in order; and what they sent to slots, [L, H, S], if they have any. The cache is carried, not scanned
    over, so that a step writes its entries and no more."""
    if execution.dual and isinstance(storage, PagedStorage) and have_halves(len(hidden_BQD)):
        return run_in_halves(functools.partial(_block, execution=execution), blocks, hidden_BQD, span, storage, first)
    if isinstance(blocks, nnx.List):
        sent = []
        for index, block in enumerate(blocks):
            hidden_BQD, storage, sent_HS = _block(gathered(block), hidden_BQD, span, storage, first + index, execution)
            sent.append(sent_HS)
        return hidden_BQD, storage, jax.tree.map(lambda *each: jnp.stack(each), *sent)
    graphdef, layers = nnx.split(blocks)
    count = len(jax.tree.leaves(layers)[0])

    def step(carry: tuple[jax.Array, Storage], xs: tuple[nnx.State, jax.Array]) -> tuple[tuple, jax.Array | None]:
        layer, index = xs
        *after, sent_HS = _block(nnx.merge(graphdef, gather_for_compute(layer)), carry[0], span, carry[1], index,
                                 execution)
        return tuple(after), sent_HS
    (hidden_BQD, storage), sent_LHS = jax.lax.scan(step, (hidden_BQD, storage), (layers, first + jnp.arange(count)),
                                                   unroll=count <= SHORT_STACK)
    return hidden_BQD, storage, sent_LHS


def _block(block: Block, hidden_BQD: jax.Array, span: Span, storage: Storage, layer: jax.Array | int,
           execution: Execution) -> tuple[jax.Array, Storage, jax.Array | None]:
    """`Block.__call__` with its attention on the cache; the last is `ReplicatedExperts`' count."""
    attention = block.self_attn
    normed = block.input_layernorm(hidden_BQD)
    with jax.named_scope("attention"):
        out, storage = attend(attention, normed, span, storage, layer)
        hidden_BQD += attention.o_proj(out.reshape(*out.shape[:2], -1))
    hidden_BQD = constrain_batch(hidden_BQD)
    if not isinstance(block.mlp, ReplicatedExperts):
        return block.feed_forward(hidden_BQD, execution)[0], storage, None
    numbers = TokenNumbers(span.number_BQ, span.real_BQ)
    out, sent_HS = block.mlp(block.post_attention_layernorm(hidden_BQD), numbers, execution)
    return constrain_batch(hidden_BQD + out), storage, sent_HS
