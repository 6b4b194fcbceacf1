"""Ways from logits to log-probability, entropy and the gradient of a weighted sum of both: ours and the peers'.

A method takes (logits [T, V], a leaf that it may overwrite; labels [T], weights a and b [T] of the log-probs and the
entropy; the group that shares the vocabulary, or None) and returns (entropy [T], gradient [T, V]). The peers' functions
are called as their actors call them. A peer whose package is not installed is left out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from or1_megatron.parallel.vocab import Shard, combine, log_probs_and_entropy, write_gradient

Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
Pair = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]  # log-probs and entropy
OURS, OURS_AUTOGRAD, NAIVE = "or1_megatron in place", "or1_megatron autograd", "torch naive"
RL_SYSTEMS = ("verl", "verl compiled", "AReaL", "TRL")


def methods(tp: int) -> dict[str, Method]:
    """By name, those that can run with the vocabulary on `tp` ranks."""
    found: dict[str, Method] = {OURS: _in_place, OURS_AUTOGRAD: _by_autograd(_ours)}
    if tp == 1:
        found[NAIVE] = _by_autograd(_naive)
    for module, add in (
        ("verl.utils.megatron.tensor_parallel" if tp > 1 else "verl.utils.torch_functional", _add_verl),
        ("areal.utils.functional.vocab_parallel", _add_areal),
        ("trl.trainer.utils", _add_trl),
        ("megatron.core.tensor_parallel", _add_megatron),
    ):
        if "areal" in module:
            sys.path.insert(0, f"{sys.prefix}/hydra")
        try:
            peer = importlib.import_module(module)
        except Exception:  # whatever a peer can lack here
            continue
        add(found, peer, tp)
    return found


def _shard(logits: torch.Tensor, group: Any) -> Shard:
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    return Shard(logits.shape[1] * ranks, rank * logits.shape[1], group)


def _in_place(logits: torch.Tensor, labels: torch.Tensor, a: torch.Tensor, b: torch.Tensor, group: Any) -> Any:
    shard, logits = _shard(logits, group), logits.detach()
    found = combine(logits, labels, shard)
    write_gradient(logits, labels, shard, found.top_T, found.total_T, found.centred_T, a, b, out_TV=logits)
    return found.entropy_T, logits


def _by_autograd(pair: Pair) -> Method:
    def method(logits: torch.Tensor, labels: torch.Tensor, a: torch.Tensor, b: torch.Tensor, group: Any) -> Any:
        log_probs, entropy = pair(logits, labels, group)
        ((log_probs * a).sum() + (entropy * b).sum()).backward()
        return entropy.detach(), logits.grad

    return method


def _ours(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs_and_entropy(logits, labels, _shard(logits, group))


def _naive(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax(logits, -1)
    return log_probs.gather(-1, labels[:, None]).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def _add_verl(found: dict[str, Method], verl: Any, tp: int) -> None:
    def sharded(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kept = logits.clone()
        entropy = verl.vocab_parallel_entropy(logits)
        return verl.vocab_parallel_log_probs_from_logits(kept, labels), entropy

    if tp > 1:
        found["verl"] = _by_autograd(sharded)
        return
    for name, entropy_of in (
        ("verl", verl.entropy_from_logits),
        ("verl compiled", torch.compile(verl.entropy_from_logits, dynamic=True)),
    ):
        found[name] = _by_autograd(
            lambda logits, labels, group, entropy_of=entropy_of: (
                verl.logprobs_from_logits(logits, labels),
                entropy_of(logits),
            )
        )


def _add_areal(found: dict[str, Method], areal: Any, tp: int) -> None:
    found["AReaL"] = _by_autograd(
        lambda logits, labels, group: areal.gather_logprobs_entropy(logits, labels, tp_group=group)
    )


def _add_trl(found: dict[str, Method], trl: Any, tp: int) -> None:
    if tp == 1:
        found["TRL"] = _by_autograd(lambda logits, labels, group: trl.selective_log_softmax_and_entropy(logits, labels))


def _add_megatron(found: dict[str, Method], megatron: Any, tp: int) -> None:
    """Cross-entropy alone: Megatron has no entropy. It overwrites float32 logits."""

    def log_probs(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = -megatron.vocab_parallel_cross_entropy(logits * 1 if logits.is_leaf else logits, labels)
        return found, found.new_zeros(found.shape)

    found["Megatron, log-probs only"] = _by_autograd(log_probs)
