"""What is asked of the planner with nothing left open: policy, workload and machine meet here, and nowhere after."""

from dataclasses import dataclass

from placement.cost.model import working_set_bytes
from placement.cost.objective import reference_context
from placement.machine.hardware import HardwareProfile
from placement.plan.memory import (
    activation_bytes,
    gpu_resident_bytes,
    host_activation_bytes,
    rounded_input_bytes,
)
from placement.plan.plan import DEVICES
from placement.plan.workload import Workload
from placement.policy.policy import Policy

DEFAULT_STAGING_SLOTS = 4
PREFIX_SHARE = 1 / 16  # of host memory that nothing else needs: it fills with use, and is then no other program's
MOST_PREFIX_STATES = 32  # sixteen conversations' newest two


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A model's workload, a machine as the plan will use it, and what is wished of the placement.

    hardware: at the plan's thread count and for its working set. policy: its rules, its shape and its objective are
    read from here on, and nothing that it may leave open. gpu_memory_bytes: None without a GPU. limits: the budget in
    bytes by place, that of a drafter in it, None without one. staging_slots: 0 where nothing may stream.
    """

    workload: Workload
    hardware: HardwareProfile
    policy: Policy
    device: str
    limits: dict[str, int | None]
    staging_slots: int

    @property
    def gpu_memory_bytes(self) -> int | None:
        """The GPU budget, None without a GPU."""
        return self.limits["gpu"]

    @property
    def context_bytes(self) -> int:
        """What CUDA and the temporaries of kernels take of GPU memory."""
        if self.device != "cuda":
            return 0
        return self.hardware.gpu_context_bytes + rounded_input_bytes(self.workload)

    @property
    def fixed_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes by place and kind that no decision changes, those of a drafter too; host includes pinned."""
        workload = self.workload
        gpu = {
            "activations": activation_bytes(workload),
            "resident": gpu_resident_bytes(workload),
            "context": self.context_bytes,
        }
        host = {"activations": host_activation_bytes(workload), "embed": workload.embed_bytes}
        host["prefixes"] = workload.prefix_state_bytes
        if self.device == "cpu":
            host["resident"] = workload.resident_bytes + workload.state_bytes
        drafter = workload.drafter_bytes
        host["drafter"] = workload.drafter_host_bytes
        return {"gpu": gpu | drafter["gpu"], "pinned": drafter["pinned"], "host": host}

    @property
    def may_pair(self) -> bool:
        """Whether there is a paired shape beside that of the workload's linears."""
        return self.device != "cpu" and not self.workload.elastic and bool(self.workload.row_cuts)


def requested(
    workload: Workload, hardware: HardwareProfile, policy: Policy, *, device: str, gpu_memory_bytes: int | None = None
) -> PlanRequest:
    """Decide whatever the policy leaves open; arguments and ValueError of `make_plan`."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    on_gpu = device != "cpu"
    if on_gpu and not hardware.has_gpu:
        raise ValueError(
            f"device {device} needs a hardware profile with a GPU; {hardware.name} has none: give one with a GPU, or "
            "device cpu"
        )
    _check_sizes(workload, policy)
    workload = workload.resized(
        elastic=on_gpu and (policy.elastic or workload.elastic),
        staging_piece_bytes=hardware.staging_piece_bytes,
        inserts=workload.inserts if policy.inserts is None else policy.inserts,
        prefix_states=_prefix_states(workload, hardware.dram_bytes if policy.host_memory is None else 0),
    )
    machine = hardware.with_threads(policy.threads) if policy.threads else hardware
    machine = machine.for_working_set(working_set_bytes(workload, reference_context(workload)))
    budget = gpu_memory_bytes or policy.gpu_memory or hardware.gpu_memory_bytes
    staging_slots = DEFAULT_STAGING_SLOTS if policy.staging_slots is None else policy.staging_slots
    limits = {"gpu": budget if on_gpu else None, "pinned": policy.pinned_memory, "host": policy.host_memory}
    return PlanRequest(workload, machine, policy, device, limits, staging_slots if on_gpu else 0)


def _prefix_states(workload: Workload, host_bytes: int) -> int:
    """At how many ends of prompts states are kept, where they are at all: no fewer than the workload asks for, more
    where host memory would be left though all weights and the whole cache were there. host_bytes: 0 where a budget says
    what may be taken, of which more than is needed would make a smaller one fail."""
    if not workload.prefix_states:
        return 0
    cache = sum(shard.kv_heads * workload.layer_tokens(shard) * shard.bytes_per_token for shard in workload.kv)
    left = host_bytes - workload.weight_bytes - workload.embed_bytes - cache - workload.state_bytes
    each = workload.prefix_state_bytes // workload.prefix_states
    return max(workload.prefix_states, min(MOST_PREFIX_STATES, int(PREFIX_SHARE * left) // each))


def _check_sizes(workload: Workload, policy: Policy) -> None:
    """Raise ValueError for a policy that asks for another size than the workload was made in."""
    made = {
        "context": workload.max_context,
        "batch": workload.max_batch,
        "kv_tokens": workload.kv_tokens,
        "prefill_chunk": None if workload.chunk_choices else workload.prefill_chunk,
        "kv_dtype": workload.kv_dtype,
    }
    for name, wish in policy.sizes.items():
        if wish != made[name]:
            raise ValueError(
                f"the policy asks for {name}: {wish}, but the workload was made with {made[name]}, and a plan is made "
                "in the sizes of its workload: make it with the policy's and give policy.without_sizes()"
            )
