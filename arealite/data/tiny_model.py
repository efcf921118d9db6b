"""Qwen2-shaped models for two cores: their shape, their chat template, the embedded tokenizer.

`AutoTokenizer` reads every folder whose config says qwen2 as a `Qwen2Tokenizer` and ignores any
other pre-tokenizer in it: the same text then gets other ids than training used. So these are
tokenizers that `Qwen2Tokenizer` itself can express. In the embedded one, digits and symbols are
byte-level tokens, and each word is an added token that carries the space before it.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>")

AGENT_SPECIAL_TOKENS = (*SPECIAL_TOKENS, "<|system|>", "<|tool|>")
_ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")

# Each message depends on itself alone, so a conversation only ever grows at its end.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

# The same for four roles; says the names of the tools, and writes calls as Qwen's template does.
AGENT_CHAT_TEMPLATE = (
    "{%- if tools -%}<|system|>Tools:"
    "{%- for tool in tools -%}{{ ' ' + tool['function']['name'] }}{%- endfor -%}<|end|>"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set role = message['role'] -%}"
    "{{ '<|' ~ (role if role in ['assistant', 'system', 'tool'] else 'user') ~ '|>' }}"
    "{{ message['content'] or '' }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- if message['content'] or not loop.first -%}{{ '\n' }}{%- endif -%}"
    "{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}"
    "{%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}"
    "{{ '}\n</tool_call>' }}"
    "{%- endfor -%}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

# Byte-level tokenizers write Ġ for the space and Ċ for the newline.
_CHARACTERS = "0123456789*+-=.?ĠĊ"
# The last two and " again" let an environment answer: "Wrong. Try again."
_WORDS = (
    *("####", "<<", ">>", "Today", " Tom", " Mia", " Sam", " Ann", " Ben", " apples", " books"),
    *(" coins", " cards", " has", " finds", " buys", " gives", " loses", " sells", " more", " to"),
    *(" twice", " as", " many", " again", " Then", " How", " does", " have", " now"),
    *("Wrong", " Try"),
)

# What the agent says and hears besides: programs, their tasks, and the call of its one tool.
_AGENT_CHARACTERS = "abcr(),"
_AGENT_WORDS = (
    *("Tools:", " calculate", "<tool_call>", "</tool_call>"),
    *('\n{"name": "calculate", "arguments": {"expression": "', '"}}\n'),
    *("Read", " a", " two", " three", " number", " numbers", " Take", " their", " sum"),
    *(" product", " the", " largest", " smallest", " first", " minus", " second", " Add"),
    *(" Subtract", " Multiply", " Square", " it", " by", " Print"),
    *("```python\n", "\n```", "int(input())", "input()", "\nr = ", "\nprint(r)", "max", "min"),
    *(" = ", " + ", " - ", " * ", ", "),
)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Tokenizer of `arealite/tiny-math`: 55 tokens. Characters outside of them are dropped."""
    return _word_tokenizer(SPECIAL_TOKENS, _CHARACTERS, _WORDS)


def agent_tokenizer() -> Qwen2Tokenizer:
    """Tokenizer of `arealite/tiny-agent`: that of tiny-math, tools and tiny programs."""
    tokenizer = _word_tokenizer(
        AGENT_SPECIAL_TOKENS, _CHARACTERS + _AGENT_CHARACTERS, _WORDS + _AGENT_WORDS
    )
    tokenizer.chat_template = AGENT_CHAT_TEMPLATE
    return tokenizer


def _word_tokenizer(
    special_tokens: Iterable[str], characters: str, words: Iterable[str]
) -> Qwen2Tokenizer:
    """One token for each character and each word."""
    tokens = (*special_tokens, *characters)
    tokenizer = chat_tokenizer({token: index for index, token in enumerate(tokens)}, merges=[])
    for word in words:
        tokenizer.add_tokens(AddedToken(word, normalized=False))
    return tokenizer


def chat_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2Tokenizer:
    """A tokenizer over this byte-level vocabulary, with our special tokens and chat template.

    `vocabulary` holds `SPECIAL_TOKENS`, maybe with more `<|roles|>`; `<|end|>` ends every message
    and is the end token.
    """
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type] - annotated as strings, pairs are what it takes
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=[token for token in _ROLE_TOKENS if token in vocabulary],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(
    tokenizer: Qwen2Tokenizer, *, num_layers: int = 3, max_positions: int = 512
) -> Qwen2Config:
    """A Qwen2 of hidden size 128 with tied embeddings, as wide as `tokenizer` needs it.

    With the tokenizer of `arealite/tiny-math` it has 0.6M parameters.
    """
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()["<|end|>"],
        pad_token_id=tokenizer.get_vocab()["<|pad|>"],
    )


def write_model_folder(folder: Path, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Write weights, config and tokenizer; a folder that is there is replaced whole."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors gives its files to their owner alone
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
