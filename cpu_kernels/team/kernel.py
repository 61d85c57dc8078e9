"""What the members of the thread team run: see team.py for the protocol and the control block."""

from cpu_kernels.team.arguments import FLAG, MAX_PARAMETERS
from cpu_kernels.team.flag_kernel import comes
from cpu_kernels.team.flag_words import NAPS_AT_ONCE
from cpu_kernels.team.words import (
    ARGUMENTS,
    AWAIT,
    DONE,
    EXPIRED,
    FAILURE,
    GATE,
    KERNEL,
    NEXT,
    OPEN,
    PARAMETERS,
    PROGRAM_COUNT,
    PROGRAM_ENTRY_BYTES,
    PROGRAM_HEAD_BYTES,
    PROGRAM_INDEX,
    PROGRAM_TIMEOUT_NS,
    PROGRAM_WAITED_NS,
    SEQUENCE,
    SERVING,
    SET,
    STAGE_BYTES,
    STAGES,
    STOP,
)
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import (
    call_kernel,
    clock_ns,
    fetch_add,
    load_acquire,
    load_i64,
    pause,
    sleep_us,
    store_i64,
    store_release,
    yield_core,
)

SPINS = 2000  # about 40 us of pause, longer than the gap between two ops of a busy engine
YIELDS = 4000  # then about 1 ms of sched_yield
NAPS = 300  # then naps of 60 us, about 20 ms, before the member parks in Python; neither while a program is served


@helper
def run_kernel(control):
    """The caller's side of one op: open the gate, run the kernel as thread 0, close it, wait until it is empty."""
    arguments = load_i64(control + ARGUMENTS)
    store_i64(0, arguments + FAILURE)
    for stage in range(STAGES):
        store_i64(0, arguments + STAGE_BYTES * stage + NEXT)
        store_i64(0, arguments + STAGE_BYTES * stage + DONE)
    fetch_add(control + GATE, OPEN)
    store_release(load_i64(control + SEQUENCE) + 1, control + SEQUENCE)
    call_kernel(load_i64(control + KERNEL), arguments, 0)
    fetch_add(control + GATE, -OPEN)
    spins = 0
    while load_acquire(control + GATE) != -OPEN:
        pause()
        spins += 1
        if spins > SPINS:
            yield_core()


def drive():
    """Run the one kernel that the control block names."""

    def kernel(control, _):
        run_kernel(control)

    return kernel


@helper
def await_in_time(flag, value, program):
    """Wait for a flag of a program; False after its timeout. The time is added to what the program has waited."""
    if load_acquire(flag) == value:
        return True
    started, came = clock_ns(), False
    while not came and clock_ns() - started <= load_i64(program + PROGRAM_TIMEOUT_NS):
        came = comes(flag, value, NAPS_AT_ONCE)
    store_i64(load_i64(program + PROGRAM_WAITED_NS) + clock_ns() - started, program + PROGRAM_WAITED_NS)
    return came


@helper
def run_entry(control, arguments, entry):
    """Run one op of a program; its failure code stays in the arguments."""
    store_i64(load_i64(entry), control + KERNEL)
    for word in range(MAX_PARAMETERS):
        store_i64(load_i64(entry + 8 + 8 * word), arguments + PARAMETERS + 8 * word)
    run_kernel(control)


def drive_all():
    """Run the entries of a recorded program in order, up to the first that fails; the program's head says which."""

    def kernel(control, program):
        arguments = load_i64(control + ARGUMENTS)
        store_i64(0, arguments + FAILURE)
        store_i64(0, program + PROGRAM_WAITED_NS)
        for index in range(load_i64(program + PROGRAM_COUNT)):
            entry = program + PROGRAM_HEAD_BYTES + index * PROGRAM_ENTRY_BYTES
            store_i64(index, program + PROGRAM_INDEX)
            kind, words = load_i64(entry), entry + 8
            flag, value = load_i64(words + 8 * FLAG.address), load_i64(words + 8 * FLAG.value)
            if kind == SET:
                store_release(value, flag)
            elif kind == AWAIT:
                if not await_in_time(flag, value, program):
                    store_i64(EXPIRED, arguments + FAILURE)
            else:
                run_entry(control, arguments, entry)
            if load_i64(arguments + FAILURE) != 0:
                return

    return kernel


def member():
    """A member's loop: returns when told to stop, or after about 20 ms without work while no program is served."""

    def kernel(control, thread):
        seen = load_acquire(control + SEQUENCE) - 1  # try the op under way, if any
        idle = 0
        while load_acquire(control + STOP) == 0:
            now = load_acquire(control + SEQUENCE)
            if now != seen:
                seen = now
                idle = 0
                if fetch_add(control + GATE, 1) >= 0:
                    call_kernel(load_i64(control + KERNEL), load_i64(control + ARGUMENTS), thread)
                fetch_add(control + GATE, -1)
            else:
                idle += 1
                if idle < SPINS:
                    pause()
                elif idle < SPINS + YIELDS:
                    yield_core()
                elif load_acquire(control + SERVING) != 0:
                    idle = SPINS  # an op may come any moment, once a flag is set: who naps would be late for it
                elif idle < SPINS + YIELDS + NAPS:
                    sleep_us(60)
                else:
                    break

    return kernel
