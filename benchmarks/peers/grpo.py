"""TRL's GRPOTrainer, one step when asked: generation by transformers (its vLLM mode needs a GPU), no KL, one optimizer
step per rollout, its default loss. The reward is whether the boxed answer is the right one, which costs nothing."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from or1_megatron.types import Prompt


class Trl:
    """`serve` runs trainer.train(), whose callback waits for `next_step` before each step and gives `done` the phases'
    seconds after it."""

    def __init__(
        self, model: Path, prompts: list[Prompt], dtype: str, batch: int, group: int, longest: int, micro_batch: int
    ):
        """dtype: "bf16" or "fp32"."""
        from datasets import Dataset  # pyright: ignore[reportMissingImports]
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

        self.phases: dict[str, float] = {}
        self.next_step: Any = None
        self.done: Any = None
        outer = self

        class Timed(GRPOTrainer):
            def _generate(self, prompts: list) -> Any:
                started = time.perf_counter()
                found = super()._generate(prompts)
                outer.phases["rollout"] = time.perf_counter() - started
                outer.phases["tokens"] = float(sum(len(tokens) for tokens in found[1]))
                return found

        class Turns(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if not outer.next_step():
                    control.should_training_stop = True
                outer.phases = {}
                self.started = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                outer.phases["step"] = time.perf_counter() - self.started
                outer.done(outer.phases)

        settings = GRPOConfig(
            output_dir=str(Path(tempfile.gettempdir()) / "or1-bench-trl"),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch * group // micro_batch,
            num_generations=group,
            max_completion_length=longest,
            beta=0.0,
            temperature=1.0,
            learning_rate=1e-6,
            max_steps=1000,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_strategy="no",
            model_init_kwargs={"dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype]},
        )
        rows = [{"prompt": prompt.text, "answer": prompt.ground_truth[0]} for prompt in prompts]
        self._trainer = Timed(
            model=str(model), reward_funcs=_boxed, args=settings, train_dataset=Dataset.from_list(rows),
            callbacks=[Turns()],
        )  # fmt: skip

    def serve(self) -> None:
        self._trainer.train()


def _boxed(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(f"\\boxed{{{gold}}}" in text) for text, gold in zip(completions, answer, strict=True)]
