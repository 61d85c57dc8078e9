"""The blocks of an EAGLE-3 head, see `spec.draft_heads.eagle_config`."""

from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.attention import Attention
from hetero_attn.models.block import Block, BlockWeights
from hetero_attn.models.workspace import Workspace
from hetero_attn.ops.linear import linear
from hetero_attn.spec.decoder.eagle import BOTH, EMBEDDED, FUSED, TAKEN, EagleAttentionDeclaration, FusionDeclaration
from placement.plan.workload import row_tier


class Fusion(FusionDeclaration, Block):
    """g = fc(norm?(hidden states)), in a pass of its own."""

    def taken(self, work: Workspace) -> Activation:
        """Where the hidden states are expected, float32 [rows, fusion_width], in host memory."""
        return work.of(TAKEN, self.eagle.fusion_width)

    def fuse(self, lanes: Lanes, weights: BlockWeights, work: Workspace) -> Activation:
        """Queue the product of what `taken` holds; once the lanes are finished the host's side of the result, float32
        [rows, packed hidden_size], is complete."""
        taken, fc = self.taken(work), weights.linears["fusion"]
        fused, tier = work.of(FUSED, self.fc.out_features), row_tier(taken.main.shape[0])
        if lanes.device is not None:
            lanes.copy(taken.device, taken.host)
        if weights.vectors:
            self._normalise(lanes, weights, taken)
            if fc.has_host_features(tier):
                lanes.push(taken, 0, self.eagle.fusion_width)
        linear(lanes, fc, tier, taken, fused)
        lanes.push(fused, 0, fc.device_features(tier))
        return fused

    def _normalise(self, lanes: Lanes, weights: BlockWeights, taken: Activation) -> None:
        """RMS norms in place, of all numbers together or of each hidden state."""
        width = self.eagle.fusion_width // len(weights.vectors)
        for place, vector in enumerate(weights.vectors.values()):
            part = taken.main[:, place * width : (place + 1) * width]
            lanes.main_ops.rms_norm(part, vector.main, self._config.rms_norm_eps, part)


class EagleAttention(EagleAttentionDeclaration, Attention):
    """residual += o(attention(qkv([norm(embedding), norm(residual)])))."""

    def multiply(self, lanes: Lanes, tier: int, weights: BlockWeights, work: Workspace, out: Activation) -> None:
        """As `Attention`."""
        width, qkv = self._config.hidden_size, weights.linears["qkv"]
        both, residual = work.of(BOTH, 2 * width), work.residual.main[:, :width]
        ops, normed = lanes.main_ops, both.main[:, width:]
        ops.rms_norm(work.of(EMBEDDED, width).main, weights.vector("norm").main, self._eps, both.main[:, :width])
        ops.rms_norm(residual, weights.vector("hidden_norm").main, self._eps, normed)
        if self._config.eagle.norm_before_residual:
            ops.copy_rows(residual, normed)
        if qkv.has_host_features(tier):
            lanes.push(both, 0, 2 * width)
        linear(lanes, qkv, tier, both, out)
