"""What can be refused about the rewards before a run starts."""

from __future__ import annotations

from or1_megatron.errors import UserError
from or1_megatron.reward import isolation
from or1_megatron.reward.problem import code_tests
from or1_megatron.reward.sandbox import Sandbox, SandboxFailed
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Prompt


def check_rewards(config: RewardConfig, prompts: list[Prompt]) -> str:
    """A line on the isolation of code answers; empty when no prompt wants code.

    Raises UserError: tests of a problem that cannot be used, or a machine that isolates less than it must.
    """
    num_code = 0
    for prompt in prompts:
        try:
            num_code += code_tests(prompt.ground_truth, prompt.data_source) is not None
        except UserError as error:
            raise UserError(f"{prompt.place}: {error}") from None
    return f"{num_code} code problems; {reached_isolation(config)}" if num_code else ""


def reached_isolation(config: RewardConfig) -> str:
    """Starts a sandbox once to see. Raises UserError below reward.require_isolation."""
    wanted = config.require_isolation
    try:
        sandbox = Sandbox(config.code_memory_mb, bubblewrap=wanted == "namespaces")
    except SandboxFailed:
        fix = "; allow bubblewrap user namespaces, or use full" if wanted == "namespaces" else ""
        raise UserError(
            f"reward.require_isolation={wanted}: the sandbox of tested code does not start here, as said above{fix}"
        ) from None
    sandbox.close()
    isolation.require(sandbox.level, wanted, sandbox.description)
    return f"isolation of tested code: {sandbox.level} ({sandbox.description})"
