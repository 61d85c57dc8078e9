"""The token embedding: plain rows, blocks of codes, or the rows of a tied head."""

import torch

from cpu_kernels import CpuKernels, fresh_memory
from cpu_kernels.formats import BLOCK_FEATURES, SOURCE_TYPES, format_of
from hetero_attn.checkpoints.loading.landing import Landing
from hetero_attn.checkpoints.loading.numbers import Numbers
from hetero_attn.checkpoints.loading.run_rows import PLAIN_DTYPES, numbers_of
from hetero_attn.checkpoints.sources import WeightSource

EMBED_RUN_ROWS = 4096  # rows of codes read at once, whole blocks
EMBED_CHECK_ROWS = 512  # rows looked at together, so that the check's own masks stay small


class Embedding:
    """Reads the token embedding of a file. tensor: its name there. held_as: the format that it is to be held in."""

    def __init__(self, source: WeightSource, tensor: str, held_as: str, landing: Landing, ops: CpuKernels) -> None:
        self._source, self._tensor, self._landing, self._ops = source, tensor, landing, ops
        self._format = format_of(held_as)
        self._numbers = Numbers(source, ops)

    def of_head(self, blocks: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """The embedding that a tied head in host memory is, whose blocks these are."""
        if not self._format.is_row_major:
            return blocks
        return blocks.view(PLAIN_DTYPES[self._format.name]).view(-1, hidden_size)

    def read(self) -> torch.Tensor:
        """The embedding in memory of its own; raises CheckpointError for numbers that are not finite."""
        if not self._format.is_row_major:
            return self._packed()
        dtype = PLAIN_DTYPES[self._format.name]
        rows = fresh_memory(self._source.shape(self._tensor), self._source.torch_dtype(self._tensor))
        if rows.dtype == torch.uint8:  # codes of a file that is held in another dtype
            return self._dequantised().to(dtype)
        self._source.read(self._tensor, out=rows)
        for start in range(0, rows.shape[0], EMBED_CHECK_ROWS):
            self._numbers.check(self._tensor, rows[start : start + EMBED_CHECK_ROWS])
        return rows.to(dtype)

    def _packed(self) -> torch.Tensor:
        """Blocks of codes, from which rows are gathered: the file's own codes, or its numbers packed."""
        vocab_size, width = self._source.shape(self._tensor)
        item, kind = self._format, self._source.source_type(self._tensor)
        blocks = fresh_memory((-(-vocab_size // BLOCK_FEATURES), item.block_bytes(width)), torch.uint8)
        for start in range(0, vocab_size, EMBED_RUN_ROWS):
            rows = self._source.read(self._tensor, slice(start, min(vocab_size, start + EMBED_RUN_ROWS)))
            if kind is not None and SOURCE_TYPES[kind].format != item.name:
                rows = numbers_of(self._source, self._ops, self._tensor, rows)
            if rows.shape[0] % BLOCK_FEATURES:
                rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % BLOCK_FEATURES))
            first = start // BLOCK_FEATURES
            into = blocks[first : first + rows.shape[0] // BLOCK_FEATURES]
            self._landing.packer.pack([self._tensor], rows, item.name, into)
        return blocks

    def _dequantised(self) -> torch.Tensor:
        dtype = torch.float32 if self._format.name == "fp32" else torch.bfloat16
        values = fresh_memory(self._source.shape(self._tensor), dtype)
        vocab_size = values.shape[0]
        for start in range(0, vocab_size, EMBED_RUN_ROWS):
            rows = self._source.read(self._tensor, slice(start, min(vocab_size, start + EMBED_RUN_ROWS)))
            values[start : start + rows.shape[0]] = numbers_of(self._source, self._ops, self._tensor, rows)
        return values
