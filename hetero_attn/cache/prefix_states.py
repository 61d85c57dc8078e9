"""States of fixed size at the ends of prefixes, kept in host memory for prompts that go on from there.

Keys and values of a prefix stay where they are while a sequence grows beyond it; its state is overwritten. So a prompt
says before it is computed at which lengths its state shall be kept, the step that passes such a length copies it, and
it belongs to the page of the prefix tree that ends there until its place is wanted for another one. Conversations by
turns would push out each other's newest states, were the oldest always the first to go: those that a conversation has
left behind go before.
"""

from collections.abc import Mapping

import torch

from hetero_attn.cache.pages import Node, host_empty
from hetero_attn.cache.states import FixedStates
from placement.plan.plan import Plan


class PrefixStates:
    """Places for `plan.workload.prefix_states` states of every layer; false where no layer has one.

    A place is free, wanted by a sequence that is going to pass a length, or kept at a node of the prefix tree.
    """

    def __init__(self, plan: Plan, states: FixedStates) -> None:
        places = plan.workload.prefix_states
        self._states = states
        self._memory = {
            shard.layer: host_empty((places, *shard.shape), torch.float32, "prefixes") for shard in plan.workload.states
        }
        self._free = list(range(places))
        self._wanted: dict[int, dict[int, int]] = {}  # sequence id -> length -> place
        self._kept: dict[Node, int] = {}  # the one that was of use longest ago first
        self._layers_kept: dict[int, int] = {}  # place -> of how many layers it holds the state

    def __len__(self) -> int:
        return len(self._memory)

    def want(self, sequence_id: int, length: int) -> bool:
        """Keep a sequence's state when it has so many tokens; False where sequences want every place."""
        wanted = self._wanted.setdefault(sequence_id, {})
        if length not in wanted and (place := self._take()) is not None:
            wanted[length] = place
        return length in wanted

    def wanted(self, sequence_id: int) -> Mapping[int, int]:
        """At which lengths of a sequence its state is kept, and in which place."""
        return self._wanted.get(sequence_id, {})

    def keep(self, layer: int, sequence_id: int, place: int) -> None:
        """Copy a layer's state of a sequence as queued work leaves it."""
        self._memory[layer][place].copy_(self._states[layer][sequence_id])
        self._layers_kept[place] += 1

    def settle(self, sequence_id: int, length: int, node: Node) -> None:
        """The first `length` tokens of a sequence end in this node and are stored: a state kept there is the node's."""
        place = self._wanted.get(sequence_id, {}).pop(length, None)
        if place is None:
            return
        if node in self._kept or self._layers_kept[place] < len(self._memory):
            self._free.append(place)
        else:
            self._kept[node] = place

    def __contains__(self, node: Node) -> bool:
        return node in self._kept

    def restore(self, sequence_id: int, node: Node) -> None:
        """Begin a sequence with the state at a node."""
        place = self._kept.pop(node)
        self._kept[node] = place
        self._states.set(sequence_id, {layer: memory[place] for layer, memory in self._memory.items()})

    def drop(self, node: Node) -> None:
        """Let go of a node's state, if it has one."""
        if (place := self._kept.pop(node, None)) is not None:
            self._free.append(place)

    def release(self, sequence_id: int) -> None:
        """Let go of the places that a sequence which ends still wanted."""
        self._free += self._wanted.pop(sequence_id, {}).values()

    def _take(self) -> int | None:
        if not self._free and self._kept:
            self.drop(self._least_needed())
        if not self._free:
            return None
        place = self._free.pop()
        self._layers_kept[place] = 0
        return place

    def _least_needed(self) -> Node:
        """Of the nodes with states the first one whose conversation has gone on: two kept behind it lead nowhere but on
        from each other, and a next turn goes on from one of them. Else that of use longest ago."""
        behind: dict[Node, list[Node]] = {}
        for node in self._kept:
            if (before := self._kept_before(node)) is not None:
                behind.setdefault(before, []).append(node)
        outgrown = (node for node, later in behind.items() if len(later) == 1 and later[0] in behind)
        return next(outgrown, next(iter(self._kept)))

    def _kept_before(self, node: Node) -> Node | None:
        before = node.parent
        while before is not None and before not in self._kept:
            before = before.parent
        return before
