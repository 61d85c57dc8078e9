"""Offsets, in bytes, of the two blocks that the thread team shares with its kernels; see team.py.

Words that different threads write sit on cache lines of their own (two lines: the prefetcher fetches pairs).
"""

SEQUENCE, STOP, GATE, KERNEL, ARGUMENTS = 0, 128, 256, 384, 392
CONTROL_BYTES = 512
OPEN = 1 << 32  # the gate counts members inside; closed, it is this much lower

STAGES = 4
STAGE_BYTES = 256
NEXT, DONE = 0, 128  # within a stage: next chunk to hand out, chunks done
FAILURE = STAGES * STAGE_BYTES
PARAMETERS = FAILURE + 64
MAX_PARAMETERS = 36
ARGUMENT_BYTES = PARAMETERS + 8 * MAX_PARAMETERS

# A recorded program: a head, then one entry an op, the kernel's address and MAX_PARAMETERS parameters.
PROGRAM_COUNT, PROGRAM_INDEX = 0, 8
PROGRAM_HEAD_BYTES = 64
PROGRAM_ENTRY_BYTES = 8 * (1 + MAX_PARAMETERS)
