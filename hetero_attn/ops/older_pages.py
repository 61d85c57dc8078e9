"""Which pages of the older cache a step's prompts attend on the GPU, in the blocks in which they come there."""

from collections.abc import Iterator

from cpu_kernels.contract import ChunkKeys
from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pages import PagedStore
from hetero_attn.cache.stream import PageBlock
from hetero_attn.ops.step import Step


def older_blocks(cache: KVCache, step: Step, block_pages: int) -> Iterator[PageBlock]:
    """The blocks of older pages that the layers of a step attend on the GPU, in their order."""
    for _, (pool, layer) in sorted(cache.places.items()):
        for part, segments in zip(step.parts, step.pools[pool].parts, strict=True):
            if part.streams_older and isinstance(segments.spilled, ChunkKeys):
                yield from layer_blocks(cache.pools[pool].spilled, segments.spilled, layer, block_pages)


def layer_blocks(store: PagedStore, segment: ChunkKeys, layer: int, block_pages: int) -> Iterator[PageBlock]:
    """The pages of a chunk's segment in host memory, in blocks of at most `block_pages`."""
    stop = -(-segment.stop // store.page_size)
    for first in range(segment.start // store.page_size, stop, block_pages):
        rows = segment.table[0, first : min(first + block_pages, stop)].tolist()
        yield PageBlock(store, layer, first, tuple(row // store.kv_heads for row in rows))
