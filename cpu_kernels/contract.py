"""What the operations of a transformer are: what each is given, what it writes, and the values that travel together.

`CpuKernels`, the Triton kernels and `gpu_kernels.reference`, which has the equations, offer the same `Ops` and read
their words here. A floating-point tensor is float32 unless another dtype is named, and its last dimension is
contiguous; what is called written is written in place. Attention reads keys and values from pages, the rows of linears
lie packed in blocks of 16 features: `cpu_kernels.formats` says every byte of both.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Pages(NamedTuple):
    """Keys and values of one layer in one memory, each [num_pages, page_size, row_items] of one KV dtype, as
    `formats.pages` says: float32, bfloat16, int8 (q8) or uint8 (q4)."""

    k: Tensor
    v: Tensor


class RowKeys(NamedTuple):
    """The keys that rows see one by one, each those of its own sequence at the positions [start, stop).

    table: int32 [rows, num_kv_heads, max_pages], the page of each logical page position // page_size; entries of pages
    outside the range may hold anything. start, stop: int32 [rows].
    """

    table: Tensor
    start: Tensor
    stop: Tensor


class ChunkKeys(NamedTuple):
    """The keys [start, stop) of one sequence that a chunk of it meets, whose first row is at position q_start.

    table: int32 [num_kv_heads, max_pages], as in `RowKeys`. window: how many newest keys a row sees, its own too, or 0.
    """

    table: Tensor
    start: int
    stop: int
    q_start: int
    window: int = 0


class Partial(NamedTuple):
    """Attention over some of the keys: out [..., head_dim], and lse [...], the natural logarithm of the sum of the
    exponentials of all scores. Over no key it is (0, -inf), which `merge` leaves out."""

    out: Tensor
    lse: Tensor


class Rotation(NamedTuple):
    """What a layer does to its q and k before it attends.

    cos, sin: [max_positions, rotary_dim / 2], of equal strides; pairs are (i, i + rotary_dim / 2), later dims pass
    through. q_norm, k_norm: [head_dim], of an RMS norm of every head with `eps` before it is rotated, or None.
    """

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


class Routes(NamedTuple):
    """Which experts compute which rows. A pick is one row at one of its k experts; its place is where it is among all
    picks, sorted by expert, then by row.

    ids: int32 [rows, k], the experts of a row, ascending. places: int32 [rows, k], the place of each pick. sources:
    int32 [rows * k], the row of the pick at each place. starts: int32 [experts + 1], where each expert's picks begin.
    weights: [rows, k + 1], what each pick's output counts, then what the shared expert's does.
    expert_slots: int32 [experts], which expert slot holds a copy of each expert, -1 for none; it is read. What a pass
    streams is numbered behind the slots that stay. Picks are then sorted by slot, behind them those of experts that are
    in none by expert, and starts is int32 [slots + experts + 1]. None where there are no expert slots.
    """

    ids: Tensor
    places: Tensor
    sources: Tensor
    starts: Tensor
    weights: Tensor
    expert_slots: Tensor | None = None

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.starts.shape[0] - 1 if self.expert_slots is None else self.expert_slots.shape[0]


class Picks(NamedTuple):
    """The picks of consecutive experts, `first` being the first one.

    sources: int32 [picks], the row of x of each place, None where x has a row for each place. starts: int32 [all
    experts + 1], where each expert's places begin. held: of expert slots, int32 [slots], which expert each one holds;
    None where every expert is at its own number. What they hold is trusted.
    """

    sources: Tensor | None
    starts: Tensor
    first: int
    held: Tensor | None = None


class Scoring(NamedTuple):
    """How products with a router become the experts of a row and what each of them counts.

    gated: whether the row behind the experts' is the gate of a shared expert. normalised: whether weights are divided
    by their sum and eps. bias: [experts], added to the products. sigmoid: an expert's score is the sigmoid of its own
    product, not the softmax of all; only then there may be a correction, [experts], added to scores for the choice
    alone, and groups of neighbouring experts, of which the kept_groups whose two best experts have the highest sum are
    chosen from. scale: what weights are multiplied by at last.
    """

    gated: bool = False
    normalised: bool = True
    sigmoid: bool = False
    bias: Tensor | None = None
    correction: Tensor | None = None
    groups: int = 1
    kept_groups: int = 1
    eps: float = 0.0
    scale: float = 1.0


L2_EPS = 1e-6  # under the root by which a gated DeltaNet divides queries and keys


class DeltaRule(NamedTuple):
    """What a gated DeltaNet layer has between its projections.

    conv: [taps, features], the newest input's tap last, of all queries, then all keys, then all values, head by head.
    rates, dt_bias: [value_heads]; a head's state decays by exp(rates * softplus(a + dt_bias)). norm: [value_dim], of
    the RMS norm of every head with `eps`. is_tiled: whether the output has the first value head of every key head, then
    the second of every one, and so on; else those of a key head stand together.
    """

    conv: Tensor
    rates: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float
    is_tiled: bool = False


class DeltaStates(NamedTuple):
    """States of gated DeltaNet, [sequences, size], and what drafts write instead, likewise; None where none is one."""

    values: Tensor
    spare: Tensor | None = None


class Ops(Protocol):
    """The operations of one place over its tensors; outputs are written in place."""

    def linear(
        self, x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
    ) -> None:
        """out = x W^T + bias, or out += that.

        x: [rows, in_features], rounded as the format wants it: to bfloat16, or to int8 in groups of 64. weight: uint8
        [num_blocks, block_bytes], packed, of a mix of formats [units, unit_bytes]. weight_dtype: the format's name, or
        the mix. bias: [features] or None. out: [rows, features], written. Raises ValueError for an unknown format.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool = False) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight for every row, or out += that.

        x, out: [rows, hidden], out written. weight: [hidden].
        """

    def copy_rows(self, target: Tensor, source: Tensor) -> None:
        """target = source, bit by bit. target, source: float32 [rows, features], target written."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
        """out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias for every row.

        x, out: [rows, hidden], out written. weight, bias: [hidden], bias None for none.
        """

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """out = silu(gate) * up.

        gate_up: [rows, units * 32], a unit being 16 columns of gate, then their 16 of up. out: [rows, units * 16],
        written. The exponential is that of every lane, bit by bit.
        """

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """out = gelu(gate) * up, gelu in its form by tanh; shapes as in `silu_mul`."""

    def gelu(self, x: Tensor, out: Tensor) -> None:
        """out = gelu(x), in the same form. x, out: [rows, features], out written."""

    def gather_columns(self, x: Tensor, order: Tensor, out: Tensor) -> None:
        """out[:, i] = x[:, order[i]]. x, out: [rows, features], out written. order: int32 [features], trusted."""

    def route(self, x: Tensor, router: Tensor, scoring: Scoring, into: Routes) -> None:
        """Choose the experts of every row by x router^T, and sort all picks by expert.

        x: [rows, hidden]. router: [experts, hidden], one more row where it is gated, then zeros to a multiple of 16
        rows. into: all of it written: the experts with the k highest scores of a row, of equal ones the lower id, as
        of groups the lower one; their weights, and behind them the sigmoid of the gate's product, 1 without a gate.
        """

    def expert_linear(self, x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
        """out = x W^T for every pick of some experts, each with its own expert's W.

        x: [rows, in_features], rounded as in `linear`. weight: uint8 [experts, num_blocks, block_bytes], those from
        picks.first on, of a mix of formats [experts, units, unit_bytes]. out: [places, features], written at the places
        of these experts and at no other. Whole-number formats give the same bits on every lane.
        """

    def combine(self, near: Tensor, far: Tensor, border: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
        """out[r] += the sum over j, ascending, of weights[r, j] times the output of its pick places[r, j].

        near, far: [rows * k, features], outputs by place: those before border, int32 [1], in near, the others in far.
        places: int32 [rows, k]. weights: [rows, k]. out: [rows, features], written.
        """

    def scale_rows(self, factors: Tensor, out: Tensor) -> None:
        """out[r] *= factors[r]. factors: [rows, 1]. out: [rows, features], written."""

    def add_expert_bias(self, bias: Tensor, picks: Picks, out: Tensor) -> None:
        """out[place] += the bias of the place's expert, for every pick of some experts.

        bias: [experts, features], those from picks.first on; where expert slots hold the experts (picks.held), those
        of all experts. out: [places, features], written at their places and at no other; picks.sources is not read.
        """

    def clamped_silu_mul(self, gate_up: Tensor, alpha: float, limit: float, out: Tensor) -> None:
        """out = (u + 1) * g * sigmoid(alpha g), g = min(gate, limit), u = up between -limit and limit.

        Shapes as in `silu_mul`, the exponential too.
        """

    def sigmoid_mul(self, gate: Tensor, out: Tensor) -> None:
        """out *= sigmoid(gate). gate, out: [rows, units, features], out written."""

    def norm_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
        """RMS norm of q over all its heads together, and of k over all of its.

        qkv: [rows, num_kv_heads, unit_features] as in `rope_append`, written. q_norm: [num_heads * head_dim]. k_norm:
        [num_kv_heads * head_dim].
        """

    def rope_append(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, q: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        """Norm and rotate q and k of new tokens; q goes to `q`, k and v to their slots of the pages.

        qkv: [rows, num_kv_heads, unit_features], a unit being its query heads, k, v and padding. positions: int64
        [rows]. q: [rows, num_heads, head_dim], written. pages: written at slots, int64 [rows, num_kv_heads], page *
        page_size + offset, no two equal. For pages of codes q and k are multiplied by the Walsh-Hadamard matrix of
        `formats.pages` as well: such a q is for attention over such pages alone.
        """

    def decode_attention(
        self, q: Tensor, pages: Pages, keys: RowKeys, scale: float, into: Partial, cap: float = 0.0
    ) -> None:
        """Attention of every row over its own keys.

        q: [rows, num_heads, head_dim], rounded to the KV dtype, bfloat16 for codes; query head h reads KV head h //
        (num_heads // num_kv_heads). scale: of the scores, above 0. into: out [rows, num_heads, head_dim], lse [rows,
        num_heads], written. cap: a score s counts as cap * tanh(s / cap), as it is where cap is 0.
        """

    def prefill_attention(
        self, q: Tensor, pages: Pages, keys: ChunkKeys, scale: float, into: Partial, cap: float = 0.0
    ) -> None:
        """Causal attention of a chunk of one sequence, q, `into` and cap as in `decode_attention`.

        Row i, at position p = keys.q_start + i, sees key j iff keys.start <= j < keys.stop, j <= p, and j > p -
        keys.window or that is 0.
        """

    def delta_step(
        self, projected: Tensor, gates: Tensor, rule: DeltaRule, states: DeltaStates, ids: Tensor, out: Tensor
    ) -> None:
        """Rows of gated DeltaNet between its projections: a token changes its sequence's state, a draft a copy of it.

        projected: [rows, key_heads, unit_features], a unit being a query, a key, the values of its value heads, their
        gates and padding. gates: [rows, 2 * value_heads or more], before sigmoids the strengths, then what decays are
        made of. states: written, of a sequence the matrices [value_heads, key_dim, value_dim], then the taps - 1 newest
        inputs of the convolution. ids: int64 [rows], of each row its sequence, or ~sequence of a draft; trusted on a
        GPU. Rows of a sequence are taken in their order, drafts last and side by side. out: [rows, value_heads *
        value_dim], written.
        """

    def add_sinks(self, sinks: Tensor, into: Partial) -> None:
        """Count one more score of every head, which has no value, in attention over all keys: out *= sigmoid(lse - s).

        sinks: [heads]. into: out [rows, heads, head_dim], written; lse [rows, heads], of the keys alone.
        """

    def merge(self, partials: list[Partial], into: Partial) -> None:
        """Merge attention over disjoint keys, at least one partial of one shape each, into one that may be among
        them."""
