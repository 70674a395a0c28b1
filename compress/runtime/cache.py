"""A key-value cache that is allocated once: a token's keys and values are written behind those of the tokens before it.

transformers' `DynamicCache` joins old and new at every token, which copies all that it holds; its `StaticCache` computes
attention over the places of tokens that are still to come, and needs a mask for them. Here attention sees a view of what is
written, of the shape that `DynamicCache` would hand it: the same arithmetic, and no copies.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class BufferedLayer(DynamicLayer):
    """Keys and values of one block, in buffers for `capacity` tokens, which double if more come."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = None
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self._buffers is None or end > self.capacity:
            self._allocate(key_states, value_states, begin, end)
        assert self._buffers is not None
        keys, values = self._buffers
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def room(self) -> tuple[Tensor, Tensor, int] | None:
        """The buffers and the place of the next token in them; None: they are full, or not there yet."""
        place = self.get_seq_length() if self._buffers is not None else self.capacity
        return None if self._buffers is None or place >= self.capacity else (*self._buffers, place)

    def filled(self, length: int) -> None:
        """Tokens were written into the buffers, so that there are `length`."""
        assert self._buffers is not None
        keys, values = self._buffers
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def _allocate(self, key_states: Tensor, value_states: Tensor, begin: int, end: int) -> None:
        """New buffers, with what there is so far."""
        while self.capacity < end:
            self.capacity *= 2
        made = []
        for new, held in ((key_states, self.keys), (value_states, self.values)):
            buffer = new.new_empty(*new.shape[:2], self.capacity, new.shape[-1])
            if begin:
                assert held is not None
                buffer[:, :, :begin] = held
            made.append(buffer)
        self._buffers = (made[0], made[1])

    # what follows replaces the held tensors by others, which are not views of the buffers

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def buffered_cache(model: PreTrainedModel, capacity: int) -> Cache | None:
    """An empty cache for `capacity` tokens; None for a model whose cache is of another kind.

    Blocks that attend within a sliding window keep transformers' own layer, which holds no more than the window.
    """
    layers: list[Any] = []
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicLayer:
            layers.append(BufferedLayer(max(capacity, 1)))
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(layer)
        else:
            return None
    return Cache(layers=layers) if layers else None
