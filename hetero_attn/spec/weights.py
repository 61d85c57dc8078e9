"""What a model's weights are: one declaration that sizes a plan, loads a file and lays out packed units.

A linear layer is a run of *units*, the smallest pieces that a cut may separate. Each unit gathers rows of one or more
checkpoint tensors (its *parts*) and is padded to whole blocks of output features:

    qkv      one unit per KV-head group   [q heads of the group | k head | v head]
    gate_up  16 gate rows, then the 16 up rows beside them
    o, down, head   16 rows

In a *paired* layer `o` and `down` are cut the other way, by input feature, so that each side goes on with the heads and
neurons that it has computed and adds one partial sum: a unit is a KV-head group's heads, or 64 neurons.

This module knows names and sizes; it reads nothing and knows no device.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from cpu_kernels.formats import BLOCK_FEATURES, GROUP_INPUTS, format_of, mix_name, unit_blocks, unit_bytes
from cpu_kernels.formats.pages import token_bytes
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats
from placement.plan.workload import KvShard, LinearShard, Workload, round_up

FLOAT32_BYTES = 4
TABLE_ALIGN_BYTES = 64
LOGITS_ROWS = 16  # rows of logits computed at once when a prompt's every position is asked for


@dataclass(frozen=True, slots=True)
class Part:
    """`rows_per_unit` consecutive rows of one checkpoint tensor go into every unit; `rows` is the tensor's total.

    format: the name of the format that they are held in.
    """

    tensor: str
    rows_per_unit: int
    rows: int
    format: str

    @property
    def bias(self) -> str:
        """Name of the bias tensor that belongs to this weight."""
        return self.tensor.removesuffix("weight") + "bias"


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer as a run of units.

    `out_features` counts packed features, padding included; `in_features` is the checkpoint's own. row_unit: input
    features of a unit where the linear is cut by rows of `x @ W`, 0 where it is cut by columns.
    """

    name: str
    kind: str
    layer: int | None
    in_features: int
    parts: tuple[Part, ...]
    has_bias: bool
    row_unit: int = 0

    @cached_property
    def runs(self) -> tuple[tuple[str, tuple[Part, ...]], ...]:
        """Neighbouring parts of one format: (format, parts), in order."""
        return tuple((name, tuple(parts)) for name, parts in groupby(self.parts, key=lambda part: part.format))

    @cached_property
    def format(self) -> str:
        """The format of all parts, or the mix of them."""
        if len(self.runs) == 1:
            return self.parts[0].format
        rows = [(name, sum(part.rows_per_unit for part in parts)) for name, parts in self.runs]
        if odd := [name for name, count in rows[:-1] if count % BLOCK_FEATURES]:
            raise UnsupportedModelError(
                f"{self.name} mixes formats ({', '.join(name for name, _ in rows)}), and its part in {odd[0]} is no "
                f"whole number of {BLOCK_FEATURES} rows a unit; ask for one dtype, such as q8"
            )
        return mix_name([(name, -(-count // BLOCK_FEATURES)) for name, count in rows])

    @cached_property
    def unit_features(self) -> int:
        """Packed output features of one column unit, a multiple of the kernels' block."""
        return round_up(sum(part.rows_per_unit for part in self.parts), BLOCK_FEATURES)

    @cached_property
    def row_features(self) -> int:
        """Output features of one row of the packed weight: a block's, or of a mix those of a whole unit."""
        return BLOCK_FEATURES * unit_blocks(self.format)

    @cached_property
    def unit_rows(self) -> int:
        """Rows of the packed weight in one column unit."""
        return self.unit_features // self.row_features

    @cached_property
    def column_units(self) -> int:
        """Number of runs of output features that are gathered and packed together."""
        return -(-self.parts[0].rows // self.parts[0].rows_per_unit)

    @cached_property
    def units(self) -> int:
        """Number of units that a cut may separate."""
        return self.in_features // self.row_unit if self.row_unit else self.column_units

    @cached_property
    def out_features(self) -> int:
        """Packed output features of the whole linear, padding included."""
        return self.column_units * self.unit_features

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one packed unit."""
        if self.row_unit:
            return self.column_units * self.unit_rows * unit_bytes(self.format, self.row_unit)
        return self.unit_rows * unit_bytes(self.format, self.in_features)

    def shard(self) -> LinearShard:
        """This linear as the planner sees it."""
        return LinearShard(
            name=self.name,
            kind=self.kind,
            layer=self.layer,
            units=self.units,
            unit_bytes=self.unit_bytes,
            unit_features=-(-self.out_features // self.units),
            in_features=self.in_features,
            flops_per_row_per_unit=2 * self.out_features * self.in_features // self.units,
            row_cut=self.row_unit > 0,
            weight_format=self.format,
        )


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The linears and norm tensors of one decoder layer; `q_norm` and `k_norm` are None where the family has none."""

    qkv: LinearSpec
    o: LinearSpec
    gate_up: LinearSpec
    down: LinearSpec
    input_norm: str
    post_attention_norm: str
    q_norm: str | None
    k_norm: str | None

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The four linears in the order they run."""
        return (self.qkv, self.o, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Every weight of a model by its Hugging Face name."""

    layers: tuple[LayerSpec, ...]
    head: LinearSpec
    embed: str
    final_norm: str

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear in the order a forward pass runs them."""
        return tuple(linear for layer in self.layers for linear in layer.linears) + (self.head,)


def model_spec(config: ModelConfig, paired: bool = False, formats: str | WeightFormats = "bf16") -> ModelSpec:
    """Declare the weights of a model with this configuration.

    paired: cut `o` and `down` by rows where their units fall on whole superblocks. formats: of the weights, or the one
    of all of them; widths do not depend on it.
    """
    formats = weight_formats(formats)
    embed = tensor_name("embed")
    head = embed if config.tie_word_embeddings else tensor_name("head")
    head_part = Part(head, BLOCK_FEATURES, config.vocab_size, formats.of(head))
    return ModelSpec(
        layers=tuple(_layer_spec(config, layer, paired, formats) for layer in range(config.num_layers)),
        head=LinearSpec("head", "head", None, config.hidden_size, (head_part,), has_bias=False),
        embed=embed,
        final_norm=tensor_name("final_norm"),
    )


def _layer_spec(config: ModelConfig, layer: int, paired: bool, formats: WeightFormats) -> LayerSpec:
    heads, groups, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    block, hidden, intermediate = BLOCK_FEATURES, config.hidden_size, config.intermediate_size

    def part(name: str, rows_per_unit: int, rows: int) -> Part:
        tensor = tensor_name(name, layer)
        return Part(tensor, rows_per_unit, rows, formats.of(tensor))

    def linear(kind: str, in_features: int, has_bias: bool, *parts: Part, row_unit: int = 0) -> LinearSpec:
        fits = paired and row_unit % superblock(parts[0]) == 0 and in_features % (row_unit or 1) == 0
        return LinearSpec(f"layers.{layer}.{kind}", kind, layer, in_features, parts, has_bias, row_unit if fits else 0)

    def superblock(part: Part) -> int:
        return max(GROUP_INPUTS, format_of(part.format).group_inputs)

    down = part("down", block, hidden)
    qkv = (
        part("q", heads // groups * head_dim, heads * head_dim),
        part("k", head_dim, groups * head_dim),
        part("v", head_dim, groups * head_dim),
    )
    gate_up = (part("gate", block, intermediate), part("up", block, intermediate))
    return LayerSpec(
        qkv=linear("qkv", hidden, config.qkv_bias, *qkv),
        o=linear(
            "o",
            heads * head_dim,
            config.o_bias,
            part("o", block, hidden),
            row_unit=heads // groups * head_dim,
        ),
        gate_up=linear("gate_up", hidden, config.mlp_bias, *gate_up),
        down=linear("down", intermediate, config.mlp_bias, down, row_unit=superblock(down)),
        input_norm=tensor_name("attention_norm", layer),
        post_attention_norm=tensor_name("mlp_norm", layer),
        q_norm=tensor_name("q_norm", layer) if config.qk_norm else None,
        k_norm=tensor_name("k_norm", layer) if config.qk_norm else None,
    )


@dataclass(frozen=True, slots=True)
class ActivationWidths:
    """Widths, in float32 elements a row, of every activation buffer; the workspace allocates exactly these."""

    residual: int
    normed: int
    qkv: int
    query: int
    attention: int
    gate_up: int
    activated: int
    lse: int

    @classmethod
    def of(cls, config: ModelConfig, spec: ModelSpec) -> "ActivationWidths":
        """Widths for a model."""
        layer = spec.layers[0]
        heads_width = config.num_heads * config.head_dim
        return cls(
            residual=layer.o.out_features,
            normed=config.hidden_size,
            qkv=layer.qkv.out_features,
            query=heads_width,
            attention=heads_width,
            gate_up=layer.gate_up.out_features,
            activated=layer.gate_up.out_features // 2,
            lse=config.num_heads,
        )

    @property
    def shared(self) -> dict[str, tuple[str, ...]]:
        """What lies one behind the other in the same GPU memory as the buffer named first, for they never live
        together.

        All that attention computed is dead once `o` has run, and next written after `down`; the normed rows are dead
        once gate_up has multiplied them. Every access on the GPU is in the order of one stream; host memory is not
        shared.
        """
        return {"gate_up": ("qkv", "query", "out", "partial"), "activated": ("normed",)}

    def width(self, name: str) -> int:
        """Elements a row of a buffer by its own name: attention has an output and a partial one."""
        return self.attention if name in ("out", "partial") else getattr(self, name)

    def room(self, name: str) -> int:
        """Elements a row of GPU memory for a buffer and what shares it."""
        return max(self.width(name), sum(map(self.width, self.shared.get(name, ()))))

    @property
    def bytes_per_row(self) -> int:
        """Bytes of GPU memory for one token row.

        The residual counts twice, because columns that another lane computed arrive in a buffer of that width before
        they are added; so does attention, whose partial over the older tokens arrives before it is merged.
        """
        return FLOAT32_BYTES * (2 * self.residual + 2 * self.lse + self.room("gate_up") + self.room("activated"))

    @property
    def host_bytes_per_row(self) -> int:
        """Bytes of host memory for one token row, where every buffer has its own."""
        total = 2 * self.residual + self.normed + self.qkv + self.query + 2 * self.attention + 2 * self.lse
        return FLOAT32_BYTES * (total + self.gate_up + self.activated)


def natural_kv_dtype(weight_dtype: str) -> str:
    """What a cache holds unless asked otherwise: float32 beside float32 weights, else bfloat16."""
    return "fp32" if weight_dtype == "fp32" else "bf16"


def build_workload(
    config: ModelConfig,
    weight_dtype: str | WeightFormats,
    *,
    model: str,
    max_context: int,
    max_batch: int,
    page_size: int,
    prefill_chunk: int,
    kv_dtype: str | None = None,
    kv_tokens: int | None = None,
    embed_shares_head: bool = False,
    paired: bool = False,
) -> Workload:
    """Describe a model to the planner: names, bytes and operations, computed by the code that allocates them.

    weight_dtype: one dtype for all weights, or the format of each. kv_dtype: of the cache; None is that of the weights
    for fp32, else bf16. kv_tokens: KV slots that all sequences
    share, None is max_context for each. embed_shares_head: the token embedding is read from the head's own rows, which
    must then all be in host memory, unquantised; it takes no bytes of its own. paired: as for `model_spec`.
    """
    formats = weight_formats(weight_dtype)
    spec, rows = model_spec(config, paired, formats), model_spec(config, True, formats)
    kv_dtype = kv_dtype or natural_kv_dtype(formats.label)
    bytes_per_token = token_bytes(kv_dtype, config.head_dim)
    kv = tuple(
        KvShard(f"layers.{layer}.kv", layer, config.num_kv_heads, bytes_per_token, config.sliding_window[layer])
        for layer in range(config.num_layers)
    )
    norm_features = (2 * config.num_layers + 1) * config.hidden_size
    if config.qk_norm:
        norm_features += 2 * config.num_layers * config.head_dim
    biases = sum(linear.out_features for linear in spec.linears if linear.has_bias)
    rope_features = max_context * config.rope.rotary_dim
    logits = max(max_batch, LOGITS_ROWS) * spec.head.out_features
    tables = step_table_bytes(
        config.num_layers, config.num_kv_heads, max(prefill_chunk, max_batch), max_batch, -(-max_context // page_size)
    )
    return Workload(
        model=model,
        weight_dtype=formats.label,
        linears=tuple(linear.shard() for linear in spec.linears),
        row_cuts=() if paired else tuple(row.shard() for row in rows.linears if row.row_unit),
        kv=kv,
        embed_bytes=0 if embed_shares_head else _embed_bytes(formats.embed, config),
        resident_bytes=FLOAT32_BYTES * (norm_features + biases + rope_features + logits) + tables,
        activation_bytes_per_row=ActivationWidths.of(config, spec).bytes_per_row,
        host_activation_bytes_per_row=ActivationWidths.of(config, spec).host_bytes_per_row,
        max_context=max_context,
        max_batch=max_batch,
        page_size=page_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        prefill_chunk=prefill_chunk,
        kv_dtype=kv_dtype,
        kv_tokens=kv_tokens,
    )


def _embed_bytes(name: str, config: ModelConfig) -> int:
    """Bytes of the token embedding: plain rows, or packed blocks."""
    item = format_of(name)
    if item.is_row_major:
        return config.vocab_size * config.hidden_size * item.item_bytes
    return -(-config.vocab_size // BLOCK_FEATURES) * item.block_bytes(config.hidden_size)


def table_bytes(count: int) -> int:
    """What a step's table of `count` bytes takes in the tables' buffer: its size up to the next aligned address."""
    return round_up(count, TABLE_ALIGN_BYTES)


def step_table_bytes(layers: int, groups: int, rows: int, batch: int, pages: int) -> int:
    """Bytes that hold any step's tables: positions, and for each of `layers` slots, a page table, starts and stops."""
    per_layer = table_bytes(8 * rows * groups) + table_bytes(4 * batch * groups * pages) + 2 * table_bytes(4 * batch)
    return table_bytes(8 * rows) + layers * per_layer
