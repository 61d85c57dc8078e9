"""Offsets, in bytes, of the two blocks that the thread team shares with its kernels; see team.py.

Words that different threads write sit on cache lines of their own (two lines: the prefetcher fetches pairs).
"""

from cpu_kernels.team.arguments import MAX_PARAMETERS

SEQUENCE, STOP, SERVING, GATE, KERNEL, ARGUMENTS = 0, 128, 136, 256, 384, 392
CONTROL_BYTES = 512
OPEN = 1 << 32  # the gate counts members inside; closed, it is this much lower

STAGES = 4
STAGE_BYTES = 256
NEXT, DONE = 0, 128  # within a stage: next chunk to hand out, chunks done
FAILURE = STAGES * STAGE_BYTES
PARAMETERS = FAILURE + 64
ARGUMENT_BYTES = PARAMETERS + 8 * MAX_PARAMETERS

# A recorded program: a head, then one entry an op, the kernel's address and MAX_PARAMETERS parameters. In the place of
# a kernel's address, AWAIT and SET are entries over a flag: its words are those of FLAG.
PROGRAM_COUNT, PROGRAM_INDEX, PROGRAM_TIMEOUT_NS, PROGRAM_WAITED_NS = 0, 8, 16, 24
PROGRAM_HEAD_BYTES = 64
PROGRAM_ENTRY_BYTES = 8 * (1 + MAX_PARAMETERS)
AWAIT, SET = 1, 2
EXPIRED = -1  # the failure of an AWAIT whose value did not come in time; kernels' own are positive
