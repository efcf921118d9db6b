"""Chat templates of well-known models, written anew to render the same text, on byte tokenizers.

A transcript may only be continued token for token if what was sampled is still there, unchanged,
when the next message is added. Each template, given a system text and tools where it takes them:

    does the text up to and with an answer stay | when a tool's result     | when a user's message
    (with thoughts: the answer begins with some)| follows / with thoughts  | follows / with thoughts
    --------------------------------------------|--------------------------|------------------------
    chatml                                      | no tools                 | yes / yes
    qwen2_5                                     | yes / yes                | yes / yes
    qwen3                                       | yes / yes (1)            | yes / no (2)
    qwen3_without_thinking                      | no (3)                   | no (3)
    qwen3_instruct_2507                         | yes / yes                | yes / yes
    llama3                                      | yes / no (4)             | yes / yes
    gemma2                                      | no tools                 | yes / yes
    gemma3                                      | no tools                 | yes / yes
    mistral                                     | no (5) / no (4, 5)       | no (5)
    deepseek_r1                                 | no (6, 7)                | no (6)
    phi3_5                                      | no tools                 | yes / yes
    phi4                                        | no tools                 | yes / yes
    glm4_moe                                    | yes / yes                | yes / no (2)

1. Thoughts must be set as Qwen3 sets them: `<think>`, line break, text, line break, `</think>`, two
   line breaks, and then the call or the text. An answer without thoughts stays as it is: an empty
   block is put before it only while it is the last message.
2. Thoughts before the last question are dropped; GLM leaves an empty block in their place.
3. The empty block of thoughts that the generation prompt ends with is in no later prompt.
4. A text beside a tool call is dropped.
5. The system text stands in the last message, if that is a user's, and nowhere in any other
   conversation; the tools stand before the last user's message. Without both, text stays.
6. What precedes `</think>` is dropped, and so is the `<think>` of the generation prompt.
7. Nothing closes the list of tool calls of a message that holds only one.

Between a text and a tool call the templates of Qwen set one line break, whatever the model wrote.
White space at both ends of an answer is stripped by llama3, gemma2, gemma3 and glm4_moe: such an
answer never stays. deepseek_r1 has no generation prompt after a tool's result. In glm4_moe no token
ends a turn: the model stops by sampling the role of the next one, `<|user|>` or `<|observation|>`.
In phi3_5 a text without a generation prompt ends in `<|endoftext|>`, which no longer text has
there. The role tokens of phi3_5 swallow the white space behind them, those of phi4 that on both
sides, so that there decoding does not give back what was encoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ToolCallFormat = Literal["hermes", "llama_json", "mistral", "deepseek", "glm_xml"]
"""How the model writes a tool call in its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFacts:
    """What a test has to know to write a conversation for one template, and its special tokens."""

    file: str
    end_of_turn: str | None
    """What the model samples when it is done; None if that is the role of the next turn."""
    eos: str
    pad: str | None = None
    bos: str | None = None
    adds_bos: bool = False
    """Whether encoding puts `bos` first, where the template has written it already."""
    control_tokens: tuple[str, ...]
    """Left out by `decode(skip_special_tokens=True)`."""
    text_tokens: tuple[str, ...] = ()
    """One token each, but kept by `decode(skip_special_tokens=True)`."""
    swallows: Mapping[str, Literal["right", "both"]] = field(default_factory=dict)
    """Control tokens that take in the white space beside them, and on which side."""
    keywords: Mapping[str, bool] = field(default_factory=dict)
    """What this entry passes to `apply_chat_template`."""
    takes_system: bool = True
    thinks: bool = False
    """Whether answers begin with thoughts, as the tokens `<think>` and `</think>` set them."""
    tool_calls: ToolCallFormat | None = None
    """None: the template takes no tools."""
    max_calls_per_message: int | None = None
    arguments: Literal["mapping", "json", "either"] = "mapping"
    """How a tool call's arguments must come: mappings, JSON as text, or as one likes."""
    must_alternate: bool = False
    """Whether a user and an assistant must take turns, calls and results aside."""
    needs_nine_letter_ids: bool = False
    """Whether the id of a tool call, and of its result, must have 9 letters or digits."""


_DEEPSEEK_BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
_DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOL_CALL = ("<tool_call>", "</tool_call>")
_TOOL_RESPONSE = ("<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_PHI3_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_PHI4_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_85|>")
_GEMMA_CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


def _qwen(
    file: str,
    *,
    text_tokens: tuple[str, ...] = (*_TOOL_CALL, *_TOOL_RESPONSE, *_THINK),
    keywords: Mapping[str, bool] | None = None,
    thinks: bool = False,
) -> TemplateFacts:
    return TemplateFacts(
        file=file,
        end_of_turn="<|im_end|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        control_tokens=_QWEN_CONTROL,
        text_tokens=text_tokens,
        keywords=keywords or {},
        thinks=thinks,
        tool_calls="hermes",
        arguments="mapping" if file == "qwen2_5" else "either",
    )


def _gemma(file: str, *, takes_system: bool) -> TemplateFacts:
    return TemplateFacts(
        file=file,
        end_of_turn="<end_of_turn>",
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        adds_bos=True,
        control_tokens=_GEMMA_CONTROL,
        takes_system=takes_system,
        must_alternate=True,
    )


FACTS: Mapping[str, TemplateFacts] = {
    "chatml": TemplateFacts(
        file="chatml",
        end_of_turn="<|im_end|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        control_tokens=_QWEN_CONTROL,
    ),
    "qwen2_5": _qwen("qwen2_5", text_tokens=_TOOL_CALL),
    "qwen3": _qwen("qwen3", keywords={"enable_thinking": True}, thinks=True),
    "qwen3_without_thinking": _qwen("qwen3", keywords={"enable_thinking": False}),
    "qwen3_instruct_2507": _qwen("qwen3_instruct_2507"),
    "llama3": TemplateFacts(
        file="llama3",
        end_of_turn="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
        control_tokens=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        tool_calls="llama_json",
        max_calls_per_message=1,
    ),
    "gemma2": _gemma("gemma2", takes_system=False),
    "gemma3": _gemma("gemma3", takes_system=True),
    "mistral": TemplateFacts(
        file="mistral",
        end_of_turn="</s>",
        eos="</s>",
        bos="<s>",
        adds_bos=True,
        control_tokens=(
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[TOOL_CALLS]",
            "<pad>",
        ),
        tool_calls="mistral",
        must_alternate=True,
        needs_nine_letter_ids=True,
    ),
    "deepseek_r1": TemplateFacts(
        file="deepseek_r1",
        end_of_turn=_DEEPSEEK_END,
        eos=_DEEPSEEK_END,
        pad=_DEEPSEEK_END,
        bos=_DEEPSEEK_BEGIN,
        adds_bos=True,
        control_tokens=(_DEEPSEEK_BEGIN, _DEEPSEEK_END),
        # Marks of tool calls are in its template, but not among its tokens.
        text_tokens=("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", *_THINK, *_TOOL_CALL),
        thinks=True,
        tool_calls="deepseek",
        arguments="json",
    ),
    "phi3_5": TemplateFacts(
        file="phi3_5",
        end_of_turn="<|end|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        bos="<s>",
        control_tokens=("<s>", "<|endoftext|>", *_PHI3_ROLES),
        swallows=dict.fromkeys(_PHI3_ROLES, "right"),
    ),
    "phi4": TemplateFacts(
        file="phi4",
        end_of_turn="<|im_end|>",
        eos="<|im_end|>",
        pad="<|dummy_85|>",
        bos="<|endoftext|>",
        control_tokens=_PHI4_CONTROL,
        swallows=dict.fromkeys(_PHI4_CONTROL, "both"),
    ),
    "glm4_moe": TemplateFacts(
        file="glm4_moe",
        end_of_turn=None,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        control_tokens=(
            "<|endoftext|>",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
        ),
        text_tokens=(
            *_THINK,
            *_TOOL_CALL,
            *_TOOL_RESPONSE,
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
        ),
        keywords={"enable_thinking": True},
        thinks=True,
        tool_calls="glm_xml",
    ),
}
NAMES = list(FACTS)


@cache
def template_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token per byte besides the special tokens of the family, with its chat template.

    The same object each time: copy it before changing it.
    """
    facts = FACTS[name]
    named = {"bos_token": facts.bos, "eos_token": facts.eos, "pad_token": facts.pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(facts),
        chat_template=Path(__file__).with_name(f"{facts.file}.jinja").read_text(encoding="utf-8"),
        **{key: token for key, token in named.items() if token is not None},
    )


def _byte_level(facts: TemplateFacts) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(
                token,
                special=True,
                normalized=False,
                lstrip=facts.swallows.get(token) == "both",
                rstrip=token in facts.swallows,
            )
            for token in facts.control_tokens
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in facts.text_tokens]
    )
    if facts.bos is not None and facts.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{facts.bos} $A", special_tokens=[(facts.bos, tokenizer.token_to_id(facts.bos))]
        )
    return tokenizer
