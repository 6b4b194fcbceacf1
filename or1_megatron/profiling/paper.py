"""The paper's time tables (section 5), and what the planner makes of them with one set of constants.

Given: Table 9 (1024 responses at 16K, R1-Distill-Qwen-7B, on 32 to 256 H800), Table 7 (Skywork-OR1-32B, 1000 steps:
760 at 16K with D_R 256 and gs 16, 240 at 24K with 160 and 32), Table 8 (7B at 32 H800, D_R 64, gs 16; its hours
divided by their own rollout are seconds per step where Table 9 gives the rollout's).
"""

from __future__ import annotations

from dataclasses import dataclass

from or1_megatron.architecture import Architecture
from or1_megatron.profiling.hardware import H800
from or1_megatron.profiling.lengths import LogNormal
from or1_megatron.profiling.planner import Layout, StepTime, Work, costs_of, predict


def _qwen2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> Architecture:
    return Architecture(
        family="qwen2", num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, vocab_size=152064, norm_eps=1e-6, qkv_bias=True, qk_norm=False,
        tied=False, max_positions=131072, rope_type="default",
    )  # fmt: skip


MODELS = {
    "DeepSeek-R1-Distill-Qwen-7B": _qwen2(28, 3584, 18944, 28, 4),
    "DeepSeek-R1-Distill-Qwen-32B": _qwen2(64, 5120, 27648, 40, 8),
}
LENGTHS = LogNormal(median=6860, sigma=0.7, prompt_share=0.5)  # 40 % above 8192 tokens, as 3.2.3 reports
KEPT_SHARE = 0.65
GPUS_32B = 256
ENGINE_TP = {"7B": 1, "32B": 2}
ASSUMED = (
    "not in the paper, assumed:",
    f"  responses {LENGTHS.describe()}; both models, all stages (3.2.3: about 40 % are longer than 8192)",
    f"  {KEPT_SHARE:.0%} of the groups are kept after rejection; no refill",
    f"  Table 7 ran on {GPUS_32B} GPUs, its 1000 steps were 760 at 16K and 240 at 24K (Table 12)",
    f"  engines of {ENGINE_TP['7B']} GPU for 7B and {ENGINE_TP['32B']} for 32B with 80 % of the memory, dealt single "
    "responses, as in the released scripts",
    "  a pass for old log-probs, rewards after the rollout, full recomputation",
    "  Table 8 lasted as many steps as its rollout hours divided by Table 9's 375 s",
    "fitted to Table 9: seconds per layer and per response of a decoding round; Table 7's rollout follows from them",
    "fitted to Tables 7 and 8: training efficiency, seconds per optimizer step; of the rest, per step and per response",
)


@dataclass(frozen=True)
class Row:
    """One number of the paper, in seconds, and the planner's."""

    table: str
    what: str
    paper: float
    planned: float

    @property
    def error(self) -> float:
        return self.planned / self.paper - 1


def _step(size: str, gpus: int, batch: int, group: int, context: int, sgd_steps: int = 1) -> StepTime:
    work = Work(
        rollout_batch_size=batch, group_size=group, context_length=context, num_sgd_steps=sgd_steps, lengths=LENGTHS,
        kept_share=KEPT_SHARE, recomputes_old_log_probs=True, overlaps_scoring=False, policy="scattered",
    )  # fmt: skip
    model = MODELS[f"DeepSeek-R1-Distill-Qwen-{size}"]
    return predict(work, costs_of(model, Layout(num_devices=gpus, engine_tp=ENGINE_TP[size]), H800))


def table_9() -> list[Row]:
    """Rollout of 1024 responses."""
    measured = {32: 375, 64: 270, 128: 225, 256: 205}
    return [
        Row("Table 9", f"rollout, {n} GPUs", seconds, _step("7B", n, 64, 16, 16384).rollout)
        for n, seconds in measured.items()
    ]


def table_7() -> list[Row]:
    """A step of the 32B run, averaged over its two stages."""
    first, second = _step("32B", GPUS_32B, 256, 16, 16384), _step("32B", GPUS_32B, 160, 32, 24576)
    paper = {"rollout": 223 * 3.6, "update": 27 * 3.6, "others": 59 * 3.6}
    return [
        Row("Table 7", f"32B {name}", seconds, 0.76 * getattr(first, name) + 0.24 * getattr(second, name))
        for name, seconds in paper.items()
    ]


def table_8() -> list[Row]:
    """Update and others of the 7B baseline and of two and four optimizer steps."""
    rows = []
    for sgd_steps, (rollout, update, others) in {1: (90, 8, 18), 2: (87, 10, 17), 4: (90, 12, 16)}.items():
        step = _step("7B", 32, 64, 16, 16384, sgd_steps)
        for name, hours in (("update", update), ("others", others)):
            planned = getattr(step, name)
            rows.append(Row("Table 8", f"7B {name}, N_SGD {sgd_steps}", hours / rollout * 375, planned))
    return rows


def comparison_lines() -> list[str]:
    """The tables, the planner's numbers and what was assumed, as `or1 plan --paper` prints them."""
    lines = [f"{'':8} {'':24} {'paper s':>8} {'planned s':>10} {'error':>7}"]
    for row in (*table_9(), *table_7(), *table_8()):
        lines.append(f"{row.table:8} {row.what:24} {row.paper:8.0f} {row.planned:10.0f} {row.error:+7.1%}")
    return [*lines, "", *ASSUMED]
