"""What the package needs, as ranges.

On a CPU use `make setup`, which installs requirements/cpu.lock: left to resolve the CPU build of
vLLM by itself, pip brings CUDA builds of torchvision, torchaudio and torchcodec, which break
transformers. On GPUs: `pip install -e .[gpu]`; see requirements/README.md.
"""

from setuptools import find_packages, setup

setup(
    name="grpo_mcore",
    version="0.1.0",
    description="Ray-free GRPO on Megatron-Core with vLLM rollouts",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["grpo_mcore*", "checkpoints_convert*"]),
    package_data={"grpo_mcore": ["report/report.html"]},
    entry_points={"console_scripts": ["grpo-mcore = grpo_mcore.cli:main"]},
    install_requires=[
        "datasets>=4",
        "einops",
        "filelock",
        "hydra-core>=1.3.2,<1.4",
        "math-verify[antlr4_9_3]>=0.9,<0.10",  # of the antlr4 that hydra-core needs
        "matplotlib",
        "megatron-core>=0.16.1,<0.17",  # 0.17 and later need Python 3.12
        "numpy>=2",
        "omegaconf>=2.3,<2.4",
        "openai>=2",
        "packaging",
        "protobuf",  # transformers reads tokenizer.model with it
        "psutil",
        "pydantic>=2",
        "safetensors",
        "sentencepiece",
        "torch>=2.11",
        "tqdm",
        "transformers>=5,<5.20",  # the upper bound is vLLM's
        "xxhash",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9", "vllm>=0.32,<0.33"],
        "trackers": ["mlflow", "tensorboard", "wandb"],
        "dev": [
            "hypothesis",
            "peft==0.21.2",
            "pytest",
            "pytest-randomly",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "trl==1.16.0",
        ],
    },
)
