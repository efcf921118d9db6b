"""Where a model's files are, and its tokenizer, checked before anything is started with them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from arealite.data.paths import is_hub_id, local_path
from arealite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_MATH = "arealite/tiny-math"
"""Name of the embedded model that answers word problems; it runs anywhere."""
TINY_STEPS = "arealite/tiny-steps"
"""Name of the embedded model that works every problem out, with many a wrong step."""
TINY_AGENT = "arealite/tiny-agent"
"""Name of the embedded model that calls a calculator, corrects itself, and programs."""

_EMBEDDED = {
    TINY_MATH: Path(__file__).parent / "tiny_math",
    TINY_STEPS: Path(__file__).parent / "tiny_steps",
    TINY_AGENT: Path(__file__).parent / "tiny_agent",
}
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
FULL_VOCABULARY = 0.9
"""Share of a model's rows that its tokenizer has at least; 0.98 is the least seen in models."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_model(name: str) -> str:
    """The folder of a model that is on this machine, else the Hub id as it is.

    Raises DataError for a folder without a config or without all of its weights, and for a path
    that does not exist.
    """
    folder = _folder_of(name)
    if folder is None:
        return name
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} has no config.json. {_describe_model_folder()}")
    missing = _missing_weights(folder)
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}. {_describe_model_folder()}")
    return str(folder)


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or Hub id, the same that its vLLM server loads.

    Raises DataError unless it has a chat template and an end token, and fits the model's
    vocabulary.
    """
    # Here and not at the top: importing it takes seconds, and whoever only wants a path pays too.
    from transformers import AutoTokenizer

    folder = _folder_of(name)
    if folder is not None and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        # Without this, transformers makes an empty vocabulary up and drops every character.
        raise DataError(
            f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there. Copy the "
            "tokenizer files of the model it was made from."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} gave no tokenizer: {_why(folder, error)}") from error
    _check_tokenizer(name, tokenizer)
    _check_fits_model(name, folder, tokenizer)
    return tokenizer


def _folder_of(name: str) -> Path | None:
    """The folder that `name` means, or None for a Hub id."""
    if name in _EMBEDDED:
        return _EMBEDDED[name]
    path = local_path(name)
    if path is not None:
        if path.is_dir():
            return path
        raise DataError(f"{path} is a file. A model is a folder, or an id on the Hugging Face Hub.")
    if name.startswith("arealite/"):
        known = ", ".join(map(repr, _EMBEDDED))
        raise DataError(f"There is no embedded model {name!r}. There are {known}.")
    if not is_hub_id(name):
        raise DataError(
            f"There is no model folder {name!r}, and it is no Hugging Face id: those look like "
            "'Qwen/Qwen2.5-0.5B'."
        )
    return None


def _missing_weights(folder: Path) -> list[str]:
    """Weight files that the folder should have and does not."""
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{index} is not an index of weight files: {error!r}.") from error
        return sorted(shard for shard in shards if not (folder / shard).is_file())
    if any(path.is_file() for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)):
        return []
    return ["model.safetensors"]


def _describe_model_folder() -> str:
    return "A model folder holds config.json, the weights (safetensors) and the tokenizer files."


def _why(folder: Path | None, error: Exception) -> str:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    if folder is not None:
        return f"{reason} Copy the tokenizer files of the model it was made from."
    return (
        f"{reason} There is no folder of that name; if it is a Hub id, check its spelling, the "
        "network and, for a gated model, `hf auth login`."
    )


def _check_tokenizer(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            f"The tokenizer of {name} has no chat template, so prompts cannot be rendered. Use the "
            "instruct variant of the model, or put a chat_template.jinja into its folder."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {name} has no end token, so no answer could ever end. Set "
            "`eos_token` in its tokenizer_config.json."
        )


def _check_fits_model(name: str, folder: Path | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise if the two cannot belong together; a folder with a tokenizer alone passes."""
    from transformers import AutoConfig

    if folder is not None and not (folder / "config.json").is_file():
        return
    try:
        config = AutoConfig.from_pretrained(folder or name).get_text_config()
    except (OSError, ValueError):
        return  # its trainer or server says more about a config that cannot be read
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise DataError(
            f"The tokenizer of {name} has token ids up to {largest}, its model knows only "
            f"{config.vocab_size}. They belong to different models: use one folder for both."
        )
    # Either alone is common: rows that no token uses, and a chat model with its own end token.
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    has_other_end = ends != [None] and tokenizer.eos_token_id not in ends
    if largest < FULL_VOCABULARY * config.vocab_size and has_other_end:
        raise DataError(
            f"The tokenizer of {name} has token ids up to {largest} and ends with "
            f"{tokenizer.eos_token_id}, its model knows {config.vocab_size} and ends with "
            f"{ends}. They belong to different models: use one folder for both."
        )
