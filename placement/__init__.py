"""Planning: names, bytes and rates in, a frozen plan out. Knows no tensors and no devices.

workload: what a model asks; hardware: what a machine gives; policy: what the user wants; planner: where things go;
cost: how long it takes; plan: the answer.
"""

from placement.machine.hardware import HardwareProfile, catalogue_names
from placement.plan.memory import KvPlacement, LinearPlacement, MemoryReport
from placement.plan.phase import Prediction
from placement.plan.plan import Plan
from placement.plan.shards import KvShard, LinearShard
from placement.plan.workload import NUM_ROW_TIERS, ROW_TIER_LIMITS, ROW_TIER_NAMES, Workload, row_tier
from placement.policy.policy import Policy, policy_schema, shipped_policies
from placement.policy.problems import PolicyError
from placement.solve.make_plan import make_plan
from placement.solve.refusals import BudgetError

__all__ = [
    "BudgetError",
    "HardwareProfile",
    "KvPlacement",
    "KvShard",
    "LinearPlacement",
    "LinearShard",
    "MemoryReport",
    "NUM_ROW_TIERS",
    "Plan",
    "Policy",
    "PolicyError",
    "Prediction",
    "ROW_TIER_LIMITS",
    "ROW_TIER_NAMES",
    "Workload",
    "catalogue_names",
    "make_plan",
    "policy_schema",
    "row_tier",
    "shipped_policies",
]
