"""One rank of the Megatron actor: log-probs, the MAGIC update and the export of its weights.

All ranks call the same method together, each with its data-parallel replica's micro-batches. Results come from one
rank per replica (last stage, first elsewhere); the others return None. Shape letters: T tokens of a pack, t those of
this context-parallel rank, V columns of the padded vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from or1_megatron.actor import checkpoint
from or1_megatron.actor.checkpoint_writer import CheckpointWriter
from or1_megatron.actor.held import Held
from or1_megatron.actor.mesh import build_mesh
from or1_megatron.actor.model import DTYPES, build_model, hand_hidden_states_through, head_inputs, packed_parameters
from or1_megatron.actor.weights import WeightSource
from or1_megatron.architecture import read_architecture
from or1_megatron.config import Config
from or1_megatron.parallel.device import device, keep_memory, peak_flops, release_memory, use_transformer_engine
from or1_megatron.parallel.dims import Dims
from or1_megatron.parallel.file_sums import FileSums
from or1_megatron.parallel.host_memory import trim_host_memory
from or1_megatron.parallel.offload import Offload
from or1_megatron.parallel.vocab import Shard, log_probs_and_entropy
from or1_megatron.parallel.vocab_head import forget_buffers, head_log_probs_and_entropy, head_loss
from or1_megatron.profiling.spans import Spans
from or1_megatron.rl.loss import magic_loss
from or1_megatron.types import MicroBatch, TokenValues, UpdateResult


class MegatronActor:
    """Built by every rank of an initialised process group; see parallel/device.py."""

    def __init__(self, config: Config, rank: int, spans: Spans | None = None):
        self.config, self._spans = config, spans or Spans(enabled=False)
        keep_memory()
        self.architecture = read_architecture(config.model.path)
        self.mesh = build_mesh(Dims.of(config), rank, config.seed + 1, config.parallel.timeout_s)
        self._gpt = model = build_model(config, self.architecture, self.mesh)
        settings = model.config
        self._fused_head = config.loss.head == "fused"
        if self._fused_head and self.mesh.last_stage:
            hand_hidden_states_through(model)
        self._bf16 = config.model.dtype == "bf16"
        self.model = DistributedDataParallel(
            config=settings,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=True
            ),
            module=Float16Module(settings, model) if self._bf16 else model,
        )
        wanted = self._optimizer_config()
        # Megatron's standard exceptions: norms and biases are not decayed.
        self.optimizer = get_megatron_optimizer(wanted, [self.model], get_standard_config_overrides(wanted))
        checkpoint.initialise_state(self.optimizer)
        settings.grad_scale_func = self.optimizer.scale_loss
        settings.finalize_model_grads_func = self._reduce_gradients
        fused_norms = use_transformer_engine(config.model.transformer_impl, config.model.dtype)
        self.weights = WeightSource(model, self.architecture, self.mesh, fused_norms=fused_norms)
        ddp: Any = self.model
        self.memory = {
            "actor weights": Offload(model.parameters, keep=True),
            "gradients": Offload(lambda: [buffer.grad_data for buffer in ddp.buffers], keep=False),
            "optimizer": Offload(lambda: checkpoint.state_tensors(self.optimizer), keep=True),
        }
        self._reference = [p.detach().cpu().clone() for p in model.parameters()] if config.loss.kl_coefficient else None
        self._writer: CheckpointWriter | None = None
        # Above any pack, a pack of nothing included, and a multiple of the alignment.
        self._max_seqlen = (config.token_budget // config.alignment + 2) * config.alignment

    def _reduce_gradients(self, model: Any, num_tokens: Any, **settings: Any) -> None:
        with self._spans.span("reduce_gradients"):
            finalize_model_grads(model, None, **settings)  # N is in the loss already: no token count to divide by

    def _optimizer_config(self) -> OptimizerConfig:
        wanted = self.config.optimizer
        return OptimizerConfig(
            optimizer="adam",
            lr=0.0,  # update() sets it; Megatron would know the groups of a checkpoint by it
            weight_decay=wanted.weight_decay,
            adam_beta1=wanted.beta1,
            adam_beta2=wanted.beta2,
            adam_eps=wanted.eps,
            clip_grad=wanted.clip_grad,
            bf16=self._bf16,
            params_dtype=torch.bfloat16 if self._bf16 else torch.float32,
            use_distributed_optimizer=True,
        )

    def log_probs(
        self, micro_batches: list[MicroBatch], *, temperature: float | None = None
    ) -> list[TokenValues] | None:
        """log pi and full-vocabulary entropy of every response token under the current weights; no gradients.

        temperature: of the distribution; None is the rollout's.
        """
        score = partial(self._score, temperature=temperature or self.config.rollout.temperature)
        with torch.no_grad():
            outputs: Any = self._schedule(micro_batches, score, forward_only=True)
        return [values for _, values in outputs] if self._reports else None

    def reference_log_probs(
        self, micro_batches: list[MicroBatch], *, temperature: float | None = None
    ) -> list[TokenValues] | None:
        """`log_probs` of the model at model.path, whose weights stay in host memory; with loss.kl_coefficient only."""
        assert self._reference is not None
        current = [parameter.detach().clone() for parameter in self._gpt.parameters()]
        self._put(self._reference)
        try:
            return self.log_probs(micro_batches, temperature=temperature)
        finally:
            self._put(current)

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._gpt.parameters(), values, strict=True):
                parameter.copy_(value)

    def update(
        self,
        micro_batches: list[MicroBatch],
        *,
        entropy_coefficient: float,
        num_tokens: int,
        lr: float,
        temperature: float | None = None,
    ) -> UpdateResult | None:
        """One optimizer step on the MAGIC loss; temperature as in `log_probs`.

        num_tokens: N, response tokens of the whole mini-batch over all replicas and micro-batches.
        Raises RunFailure naming rank, sequence and token when a logit is NaN or infinite: no step is taken then.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = partial(
            self._loss,
            entropy_coefficient=entropy_coefficient,
            num_tokens=num_tokens,
            temperature=temperature or self.config.rollout.temperature,
        )
        with self._spans.span("forward_backward"):
            outputs = self._schedule(micro_batches, loss, forward_only=False)
        wanted = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = lr  # these also where a resume has changed them
            group["betas"], group["eps"] = (wanted.beta1, wanted.beta2), wanted.eps
            group["weight_decay"] = wanted.weight_decay * group["wd_mult"]
        with self._spans.span("optimizer"):
            outcome: Any = self.optimizer.step()
        applied, grad_norm, _ = outcome
        assert applied and np.isfinite(grad_norm), f"gradient norm {grad_norm} with finite gradients"
        if not self._speaks:
            return None
        sums = self._replica_sums([terms for terms, _ in outputs])
        if not self._reports:
            return None
        return UpdateResult(
            sums=sums,
            loss=sums.pop("loss"),
            grad_norm=float(grad_norm),
            values=[values for _, values in outputs],
        )

    def release(self, parts: Iterable[str]) -> None:
        """Gives the device memory of these parts of `memory` back until `restore`."""
        for part in parts:
            self.memory[part].release()
        forget_buffers()
        release_memory()

    def restore(self, parts: Iterable[str]) -> None:
        for part in parts:
            self.memory[part].restore()
        trim_host_memory()

    def shares_prompts(self) -> bool:
        """Whether it may be given packs that share prompts: TransformerEngine's attention does not know how."""
        wanted = self.config.model
        return self.config.can_share_prompts and not use_transformer_engine(wanted.transformer_impl, wanted.dtype)

    def peak_flops(self) -> float:
        return peak_flops(DTYPES[self.config.model.dtype])

    def _replica_sums(self, terms: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Over the micro-batches and this replica's context-parallel ranks."""
        totals = {name: sum(float(term[name]) for term in terms) for name in terms[0]}
        if self.mesh.dims.cp == 1:
            return totals
        values = torch.tensor(list(totals.values()), dtype=torch.float64, device=device())
        torch.distributed.all_reduce(values, group=self.mesh.cp_group)
        return dict(zip(totals, values.tolist(), strict=True))

    @property
    def _speaks(self) -> bool:
        """Whether this rank knows results: all of one context-parallel group do."""
        return self.mesh.last_stage and self.mesh.coordinates.tp == 0

    @property
    def _reports(self) -> bool:
        return self._speaks and self.mesh.coordinates.cp == 0

    def _schedule(self, micro_batches: list[MicroBatch], reduce: Callable, *, forward_only: bool) -> Any:
        """Runs Megatron's pipeline schedule; each micro-batch's second output of `reduce`, on the last stage."""
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward, reduce),
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward(self, reduce: Callable, batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable]:
        held = Held.of(next(batches), self.mesh)
        tokens = held.tokens
        keep_dtype = {"fp32_output": False} if self._bf16 else {}
        output = model(
            tokens.tokens_T.unsqueeze(0),
            tokens.positions_T.unsqueeze(0),
            None,
            packed_seq_params=packed_parameters(tokens, held.part, tokens.positions_T, self._gpt, self._max_seqlen),
            **keep_dtype,
        )
        return output, partial(reduce, held)

    def _shard(self, temperature: float) -> Shard:
        a, dims = self.architecture, self.mesh.dims
        columns = a.padded_vocab_size(dims.tp) // dims.tp
        group = self.mesh.tp_group if dims.tp > 1 else None
        return Shard(a.vocab_size, self.mesh.coordinates.tp * columns, group, temperature)

    def _score(
        self, held: Held, output_1tX: torch.Tensor, *, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        labels_R, shard = held.predicting.labels_T, self._shard(temperature)
        if self._fused_head:
            found = head_log_probs_and_entropy(
                *head_inputs(self._gpt, output_1tX, held.rows_R, self.mesh), labels_R, shard
            )
        else:
            found = log_probs_and_entropy(output_1tX.squeeze(0)[held.rows_R], labels_R, shard)
        values = held.token_values(*found, self.mesh)
        return output_1tX.new_zeros(()), torch.zeros((), dtype=torch.int, device=device()), ({}, values)

    def _loss(
        self,
        held: Held,
        output_1tX: torch.Tensor,
        *,
        entropy_coefficient: float,
        num_tokens: int,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        sums: dict[str, torch.Tensor] = {}
        wanted, mine = self.config.loss, held.predicting

        def token_loss(log_probs_c: torch.Tensor, entropy_c: torch.Tensor, rows: slice) -> torch.Tensor:
            terms = magic_loss(
                log_probs_c,
                _rows(mine.old_log_probs_T, rows),
                mine.advantages_T[rows],
                mine.weights_T[rows],
                entropy_c,
                entropy_coefficient=entropy_coefficient,
                num_tokens=num_tokens,
                clip_low=wanted.clip_low,
                clip_high=wanted.clip_high,
                surrogate=wanted.surrogate,
                engine_log_probs_T=_rows(mine.engine_log_probs_T, rows),
                importance_cap=wanted.importance_cap,
                reference_log_probs_T=_rows(mine.reference_log_probs_T, rows),
                kl_coefficient=wanted.kl_coefficient,
            )
            for name, value in {"loss": terms.loss.detach(), **terms.sums}.items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            return terms.loss

        shard = self._shard(temperature)
        if self._fused_head:
            hidden_RH, weight_VH = head_inputs(self._gpt, output_1tX, held.rows_R, self.mesh)
            grad_VH = weight_VH.main_grad  # type: ignore[attr-defined]  # of Megatron's DistributedDataParallel
            loss, *found = head_loss(hidden_RH, weight_VH, grad_VH, mine.labels_T, shard, token_loss)
        else:
            found = log_probs_and_entropy(output_1tX.squeeze(0)[held.rows_R], mine.labels_T, shard)
            loss = token_loss(*found, slice(None))
        log_probs_R, entropy_R = found
        values = held.token_values(log_probs_R, entropy_R, self.mesh)
        # Megatron's triple: loss, token count (ignored, see finalize above), what to hand back.
        return loss, torch.zeros((), dtype=torch.int, device=device()), (sums, values)

    def begin_save(self, directory: Path) -> None:
        """Has weights, optimizer and generators written into an existing empty directory. Collective."""
        assert self._writer is None, "the save before has not been finished"
        self.model.offload_grad_buffers()  # what the writer copies takes their place
        release_memory()
        self._writer = checkpoint.begin_save(directory, self._gpt, self.optimizer, self.mesh)
        release_memory()
        self.model.restore_grad_buffers()

    def save_written(self) -> float | None:
        """Seconds that this rank's files of the save that has begun took; None while they are being written."""
        assert self._writer is not None, "no save has begun"
        return self._writer.written

    def finish_save(self) -> FileSums:
        """Waits for the save that has begun; this rank's files. Collective. Raises UserError."""
        assert self._writer is not None, "no save has begun"
        writer, self._writer = self._writer, None
        return writer.finish()

    def load(self, directory: Path) -> None:
        """Restores what a save wrote, at any degrees. Collective."""
        checkpoint.load(directory, self._gpt, self.optimizer, self.mesh)


def _rows(values_t: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if values_t is None else values_t[rows]
