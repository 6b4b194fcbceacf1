"""The actor of one rank against Hugging Face on the CPU, on the CPU and on the GPU; and the GPU against the CPU.

float32 has fixed tolerances. In bf16 the judge is Hugging Face in float32, and Hugging Face in bf16 says how far bf16
may be from it.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from or1_megatron.config import Config
from tests.dense_reference import dense_step, token_quantities
from tests.gpu import computed
from tests.gpu.one_rank import CPU_AND_GPU, run_on
from tests.parallel.test_actor import make_config, make_sequences
from tests.tiny_models import write_tiny_model

FAMILIES = ("qwen2", "qwen3")  # biases of q, k and v; norms of q and k
VOCAB = 301  # padded rows behind it
PROMPT = make_sequences(VOCAB)[4].tokens[:11]
GROUP = [
    replace(s, tokens=(*PROMPT, *s.tokens[s.num_prompt_tokens :]), num_prompt_tokens=len(PROMPT))
    for s in make_sequences(VOCAB, seed=1)[:3]
]
SEQUENCES = [*make_sequences(VOCAB), *GROUP]
Facts = dict[str, Any]


@dataclass
class HuggingFace:
    facts: Facts
    bf16_error: float  # of log-probs in bf16, mean


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(root / name, name, tied=False, vocab=VOCAB) for name in FAMILIES}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, HuggingFace]:
    return {family: reference(path) for family, path in models.items()}


def config_of(path: Path, dtype: str, implementation: str = "torch") -> Config:
    config = make_config(path, dtype=dtype, transformer_impl=implementation)
    config.parallel.token_budget = 128
    return config


def reference(path: Path) -> HuggingFace:
    low = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        rough = [token_quantities(low, sequence, 0.9)[0].float() for sequence in SEQUENCES]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    step: dict[str, Any] = {"temperature": 0.9, "alpha": computed.ALPHA, "lr": computed.LR}
    first = dense_step(model, SEQUENCES, **step)
    second = dense_step(model, SEQUENCES, optimizer=first.optimizer, **step)
    facts = {
        "log_probs": dict(enumerate(first.log_probs)),
        "entropies": dict(enumerate(first.entropies)),
        "grads": first.grads,
        "losses": [first.loss, second.loss],
        "grad_norms": [first.grad_norm, second.grad_norm],
        "weights": {name: tensor.detach() for name, tensor in model.named_parameters()},
    }
    return HuggingFace(facts, mean_difference(dict(enumerate(rough)), facts["log_probs"]))


@pytest.fixture(scope="module")
def facts_on(models: dict[str, Path]) -> Any:
    """(where, compiled, implementation) -> (family, dtype) -> facts; each computed once."""

    @functools.cache
    def compute(where: str, compiled: bool = False, implementation: str = "torch") -> dict[tuple[str, str], Facts]:
        configs = {
            (family, dtype): config_of(path, dtype, implementation)
            for family, path in models.items()
            for dtype in (("fp32", "bf16") if implementation == "torch" else ("bf16",))
        }
        return run_on(where, computed.actor_facts, configs, SEQUENCES, compiled=compiled)

    return compute


def mean_difference(found: dict[Any, torch.Tensor], wanted: dict[Any, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return float(torch.cat([(found[key] - wanted[key]).abs().flatten() for key in wanted]).mean())


def compare_fp32(found: Facts, wanted: Facts) -> None:
    for what in ("log_probs", "entropies"):
        assert found[what].keys() == wanted[what].keys() and len(wanted[what]) == len(SEQUENCES)
        for i, expected in wanted[what].items():
            torch.testing.assert_close(found[what][i], expected, atol=1e-4, rtol=0)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3)
    assert found["grad_norms"] == pytest.approx(wanted["grad_norms"], rel=1e-3)
    assert found["grads"].keys() == wanted["grads"].keys() == wanted["weights"].keys() == found["weights"].keys()
    for name, expected in wanted["grads"].items():
        error = (found["grads"][name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"
        # Adam's step is lr * sign(g) at first wherever |g| >> eps; where g is all rounding the sign may differ.
        certain = expected.abs() > 1e-3 * expected.abs().max()
        off = (found["weights"][name] - wanted["weights"][name]).abs()[certain].quantile(0.99)
        assert off < 0.02 * computed.LR, f"{name}: weights after two updates differ by {off:.1e}"


def compare_bf16(found: Facts, exact: Facts, rounding: float) -> None:
    """rounding: mean error of log-probs that bf16 is allowed."""
    for what in ("log_probs", "entropies"):
        error = mean_difference(found[what], exact[what])
        assert error < rounding, f"{what}: mean error {error:.1e}, allowed {rounding:.1e}"
    assert found["losses"] == pytest.approx(exact["losses"], rel=0.1, abs=0.02)
    assert found["grad_norms"] == pytest.approx(exact["grad_norms"], rel=0.1)
    for name, expected in exact["grads"].items():
        alike = torch.cosine_similarity(found["grads"][name].flatten(), expected.flatten(), 0)
        assert alike > 0.99, f"{name}: cosine of gradients {alike:.4f}"


def compare(dtype: str, found: Facts, reference: HuggingFace) -> None:
    if dtype == "fp32":
        compare_fp32(found, reference.facts)
    else:
        compare_bf16(found, reference.facts, 1.5 * reference.bf16_error)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", CPU_AND_GPU)
def test_actor_equals_hugging_face(where: str, family: str, dtype: str, facts_on: Any, references: dict) -> None:
    found = facts_on(where)[family, dtype]
    assert found["spared"] == (len(GROUP) - 1) * (len(PROMPT) - 1), (
        "the group shares its prompt, but for the last token"
    )
    compare(dtype, found, references[family])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_actor_equals_hugging_face(family: str, dtype: str, facts_on: Any, references: dict) -> None:
    compare(dtype, facts_on("cuda", True)[family, dtype], references[family])


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_equals_cpu(family: str, facts_on: Any, references: dict) -> None:
    compare_fp32(facts_on("cuda")[family, "fp32"], facts_on("cpu")[family, "fp32"])
    rounding = 2 * references[family].bf16_error
    compare_bf16(facts_on("cuda")[family, "bf16"], facts_on("cpu")[family, "bf16"], rounding)


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_engine_equals_the_torch_layers(family: str, facts_on: Any, references: dict) -> None:
    found, ours = facts_on("cuda", False, "transformer_engine")[family, "bf16"], facts_on("cuda")[family, "bf16"]
    compare_bf16(found, ours, 2 * references[family].bf16_error)


@pytest.mark.parametrize("where", CPU_AND_GPU)
def test_deterministic_updates_are_bitwise_equal(where: str, models: dict) -> None:
    configs = {dtype: config_of(models["qwen3"], dtype) for dtype in ("fp32", "bf16")}
    for config in configs.values():
        config.model.deterministic = True
    found = run_on(where, computed.updates_twice, configs, SEQUENCES)
    for dtype, (first, second) in found.items():
        assert len(first) == len(second) > 10
        assert all(map(torch.equal, first, second)), f"{dtype}: two runs of the same updates differ"
