"""The host jobs of a captured step: kept once, run again beside every replay of what was captured with them.

In a captured step numbers would be the same each time, so every job has two flags of its own, each set by one side and
waited for by the other; all are cleared with one write before either side starts:

    GPU: ... copies | request = 1 ........ wait done == 1 | copies ...
    host worker:      wait request == 1 | job | done = 1

Jobs that call CPU ops alone become one program of the thread team, waits and flags included: no Python runs between two
ops, or between a flag and an op.
"""

from dataclasses import dataclass, field

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.team.program import Program
from hetero_attn.lanes.handover import Job


@dataclass(slots=True)
class RecordedJob:
    """One job of a captured step. request: its flag where it waits for the GPU; done: where the GPU waits for it."""

    job: Job
    request: torch.Tensor | None
    done: torch.Tensor | None = None

    def set_done(self, ops: CpuKernels) -> None:
        """Let the GPU go on behind this job."""
        if self.done is not None:
            ops.set_flag(self.done, 1)


@dataclass(slots=True)
class RecordedStep:
    """The jobs of a captured step in order. flags: int64 [jobs or more, 2, FLAG_WORDS], request and done of each.

    program: all of it as the thread team runs it; None where a job is more than CPU ops.
    """

    flags: torch.Tensor
    jobs: list[RecordedJob] = field(default_factory=list)
    program: Program | None = None

    def add(self, job: Job, waits: bool) -> torch.Tensor | None:
        """Keep a job; returns the flag by which the GPU asks for it, where it waits for the GPU."""
        assert len(self.jobs) < len(self.flags), "a captured step has more jobs than any step before it"
        request = self.flags[len(self.jobs), 0, :1] if waits else None
        self.jobs.append(RecordedJob(job, request))
        return request

    def done_flag(self, given: int) -> torch.Tensor | None:
        """The flag by which the last of the first `given` jobs says that it has ended; None where the stream waits for
        it, or for a later one, already."""
        if not given or any(recorded.done is not None for recorded in self.jobs[given - 1 :]):
            return None
        done = self.jobs[given - 1].done = self.flags[given - 1, 1, :1]
        return done

    def write_program(self, ops: CpuKernels) -> None:
        """Call every job, with its waits and flags, while `ops` record."""
        for recorded in self.jobs:
            if recorded.request is not None:
                ops.record_wait(recorded.request, 1)
            recorded.job()
            if recorded.done is not None:
                ops.record_set(recorded.done, 1)

    def serve(self, ops: CpuKernels, watchdog_s: float) -> None:
        """Run the jobs as the GPU asks for them; TimeoutError where it does not within watchdog_s."""
        for recorded in self.jobs:
            if recorded.request is not None and not ops.await_flag(recorded.request, 1, watchdog_s):
                raise TimeoutError
            recorded.job()
            recorded.set_done(ops)

    def end(self, ops: CpuKernels) -> None:
        """Let the GPU run to the end of the step, whatever it computes."""
        for recorded in self.jobs:
            recorded.set_done(ops)

    def release(self, ops: CpuKernels) -> None:
        """Let both sides run to their ends, whatever they compute."""
        for recorded in self.jobs:
            if recorded.request is not None:
                ops.set_flag(recorded.request, 1)
            recorded.set_done(ops)
