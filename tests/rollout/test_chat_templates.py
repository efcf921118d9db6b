"""The corpus of chat templates: what each one renders, and what it does to what came before."""

from dataclasses import dataclass
from typing import Any

import jinja2
import pytest

from tests.rollout.chat_templates import FACTS, NAMES, TemplateFacts, template_tokenizer

Message = dict[str, Any]

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
THOUGHTS = "<think>\nhm\n</think>\n\n"

QWEN_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "add", "parameters": {}}}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

QWEN_CALLS = """\
<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"a": 2}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
3
</tool_response>
<tool_response>
4
</tool_response><|im_end|>
<|im_start|>assistant
"""

# Of `conversation`: a system text, a question and its answer, a question, calls and their results;
# without the last two where there are no tools. Answers of models that think begin with THOUGHTS.
EXPECTED = {
    "chatml": """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
Hello<|im_end|>
<|im_start|>user
1+2?<|im_end|>
<|im_start|>assistant
""",
    "qwen2_5": f"""\
<|im_start|>system
Be brief.

{QWEN_TOOLS}<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
Hello<|im_end|>
<|im_start|>user
1+2?<|im_end|>
<|im_start|>assistant
{QWEN_CALLS}""",
    "qwen3": f"""\
<|im_start|>system
Be brief.

{QWEN_TOOLS}<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
Hello<|im_end|>
<|im_start|>user
1+2?<|im_end|>
<|im_start|>assistant
<think>
hm
</think>

{QWEN_CALLS}""",
    "qwen3_without_thinking": f"""\
<|im_start|>system
Be brief.

{QWEN_TOOLS}<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
Hello<|im_end|>
<|im_start|>user
1+2?<|im_end|>
<|im_start|>assistant
{QWEN_CALLS}<think>

</think>

""",
    "qwen3_instruct_2507": f"""\
<|im_start|>system
Be brief.

{QWEN_TOOLS}<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
Hello<|im_end|>
<|im_start|>user
1+2?<|im_end|>
<|im_start|>assistant
{QWEN_CALLS}""",
    "llama3": """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython
Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper \
arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its \
value}.Do not use variables.

{
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {}
    }
}

Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Hello<|eot_id|><|start_header_id|>user<|end_header_id|>

1+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "add", "parameters": {"a": 1}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

"3"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

""",
    "gemma2": """\
<bos><start_of_turn>user
Hi<end_of_turn>
<start_of_turn>model
Hello<end_of_turn>
<start_of_turn>user
1+2?<end_of_turn>
<start_of_turn>model
""",
    "gemma3": """\
<bos><start_of_turn>user
Be brief.

Hi<end_of_turn>
<start_of_turn>model
Hello<end_of_turn>
<start_of_turn>user
1+2?<end_of_turn>
<start_of_turn>model
""",
    "mistral": (
        "<s>[INST]Hi[/INST]Hello</s>[AVAILABLE_TOOLS]["
        '{"type": "function", "function": {"name": "add", "parameters": {}}}][/AVAILABLE_TOOLS]'
        '[INST]1+2?[/INST][TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "call00001"}, '
        '{"name": "add", "arguments": {"a": 2}, "id": "call00002"}]</s>'
        '[TOOL_RESULTS]{"content": 3, "call_id": "call00001"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content": 4, "call_id": "call00002"}[/TOOL_RESULTS]'
    ),
    "deepseek_r1": """\
<|begin_of_sentence|>Be brief.<|User|>Hi<|Assistant|>

Hello<|end_of_sentence|><|User|>1+2?<|Assistant|><|tool_calls_begin|><|tool_call_begin|>\
function<|tool_sep|>add
```json
{"a": 1}
```<|tool_call_end|>
<|tool_call_begin|>function<|tool_sep|>add
```json
{"a": 2}
```<|tool_call_end|><|tool_calls_end|><|end_of_sentence|>\
<|tool_outputs_begin|><|tool_output_begin|>3<|tool_output_end|>
<|tool_output_begin|>4<|tool_output_end|><|tool_outputs_end|>""",
    "phi3_5": """\
<|system|>
Be brief.<|end|>
<|user|>
Hi<|end|>
<|assistant|>
Hello<|end|>
<|user|>
1+2?<|end|>
<|assistant|>
""",
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello<|im_end|><|im_start|>user<|im_sep|>1+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    ),
    "glm4_moe": """\
[gMASK]<sop><|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "add", "parameters": {}}}
</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call><|system|>
Be brief.<|user|>
Hi<|assistant|>
<think></think>
Hello<|user|>
1+2?<|assistant|>
<think>hm</think>
<tool_call>add
<arg_key>a</arg_key>
<arg_value>1</arg_value>
</tool_call>
<tool_call>add
<arg_key>a</arg_key>
<arg_value>2</arg_value>
</tool_call><|observation|>
<tool_response>
3
</tool_response>
<tool_response>
4
</tool_response><|assistant|>""",
}


def deepseek(text: str) -> str:
    """`text` with the letters that DeepSeek writes its marks with."""
    marks = ("begin_of_sentence", "end_of_sentence", "User", "Assistant", "tool_sep")
    lists = ("tool_calls", "tool_call", "tool_outputs", "tool_output")
    for mark in (*marks, *(f"{name}_{side}" for name in lists for side in ("begin", "end"))):
        text = text.replace(f"<|{mark}|>", f"<\uff5c{mark.replace('_', chr(0x2581))}\uff5c>")
    return text


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def call(facts: TemplateFacts, *numbers: int, text: str = "") -> Message:
    """A message that calls `add` once for each of `numbers`."""
    calls = [
        {
            "id": f"call0000{a}",
            "type": "function",
            "function": {
                "name": "add",
                "arguments": f'{{"a": {a}}}' if facts.arguments == "json" else {"a": a},
            },
        }
        for a in numbers
    ]
    # Only a message without any content is one with calls for DeepSeek.
    content = None if facts.tool_calls == "deepseek" else text
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(number: int) -> Message:
    return {"role": "tool", "content": str(number + 2), "tool_call_id": f"call0000{number}"}


def opening(facts: TemplateFacts) -> list[Message]:
    return [{"role": "system", "content": "Be brief."}] if facts.takes_system else []


def conversation(facts: TemplateFacts) -> list[Message]:
    thoughts = THOUGHTS if facts.thinks else ""
    messages = [*opening(facts), user("Hi"), assistant(thoughts + "Hello"), user("1+2?")]
    if facts.tool_calls is None:
        return messages
    numbers = range(1, (facts.max_calls_per_message or 2) + 1)
    return [*messages, call(facts, *numbers, text=thoughts), *(result(n) for n in numbers)]


def render(name: str, messages: list[Message], *, is_open: bool = True) -> str:
    facts = FACTS[name]
    return str(
        template_tokenizer(name).apply_chat_template(
            messages,
            tools=[TOOL] if facts.tool_calls else None,
            tokenize=False,
            add_generation_prompt=is_open,
            **facts.keywords,
        )
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_conversation_is_rendered_as_the_model_knows_it(name):
    expected = EXPECTED[name]
    assert render(name, conversation(FACTS[name])) == (
        deepseek(expected) if name == "deepseek_r1" else expected
    )


# What stays when something is added: the docstring of the corpus as a test.


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model samples behind the generation prompt, and the message that is made of it."""

    sampled: str
    message: Message


CALLS: dict[str | None, str] = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama_json": '{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "call00001"}]',
    "deepseek": deepseek(
        "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n"
        '```json\n{"a": 1}\n```<|tool_call_end|>'
    ),
    "glm_xml": ("\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"),
}


def sampled_thoughts(name: str, *, has_thoughts: bool) -> str:
    if name == "glm4_moe":
        return "\n<think>hm</think>" if has_thoughts else "\n<think></think>"
    if name == "deepseek_r1":
        return "hm\n</think>\n\n" if has_thoughts else "\n</think>\n\n"
    return THOUGHTS if has_thoughts else ""


def spoken(name: str, *, has_thoughts: bool) -> Answer:
    text = sampled_thoughts(name, has_thoughts=has_thoughts)
    text += "\n3" if name == "glm4_moe" else "3"
    return Answer(sampled=text, message=assistant(text))


def called(name: str, *, has_thoughts: bool) -> Answer:
    facts = FACTS[name]
    text = sampled_thoughts(name, has_thoughts=has_thoughts)
    if facts.tool_calls == "hermes" and not facts.thinks and text:
        text = text.rstrip("\n")
        return Answer(sampled=f"{text}\n{CALLS['hermes']}", message=call(facts, 1, text=text))
    end = deepseek("<|tool_calls_end|>") if name == "deepseek_r1" else ""
    return Answer(sampled=text + CALLS[facts.tool_calls] + end, message=call(facts, 1, text=text))


def stays(name: str, answer: Answer, added: Message) -> bool:
    messages = [*opening(FACTS[name]), user("1+2?")]
    before = render(name, messages) + answer.sampled + (FACTS[name].end_of_turn or "")
    return render(name, [*messages, answer.message, added]).startswith(before)


# A tool's result follows an answer without and with thoughts; a user's message does.
STAYS = {
    "chatml": (None, None, True, True),
    "qwen2_5": (True, True, True, True),
    "qwen3": (True, True, True, False),
    "qwen3_without_thinking": (False, False, False, False),
    "qwen3_instruct_2507": (True, True, True, True),
    "llama3": (True, False, True, True),
    "gemma2": (None, None, True, True),
    "gemma3": (None, None, True, True),
    "mistral": (False, False, False, False),
    "deepseek_r1": (False, False, False, False),
    "phi3_5": (None, None, True, True),
    "phi4": (None, None, True, True),
    "glm4_moe": (True, True, True, False),
}


@pytest.mark.parametrize("has_thoughts", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if FACTS[name].tool_calls])
def test_a_call_stays_or_not_when_its_result_is_added(name, has_thoughts):
    expected = STAYS[name][has_thoughts]
    assert stays(name, called(name, has_thoughts=has_thoughts), result(1)) is expected


@pytest.mark.parametrize("has_thoughts", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_stays_or_not_when_a_users_message_is_added(name, has_thoughts):
    expected = STAYS[name][2 + has_thoughts]
    assert stays(name, spoken(name, has_thoughts=has_thoughts), user("Sure?")) is expected


@pytest.mark.parametrize("name", NAMES)
def test_white_space_around_an_answer_is_stripped_by_some(name):
    text = render(name, [user("1+2?"), assistant(" 3 "), user("Sure?")])
    assert (" 3 " in text) is (name not in ("llama3", "gemma2", "gemma3", "glm4_moe"))


@pytest.mark.parametrize("name", [name for name in NAMES if FACTS[name].tool_calls == "hermes"])
@pytest.mark.parametrize("num_breaks", [0, 1, 2])
def test_qwen_sets_one_line_break_between_a_text_and_a_call(name, num_breaks):
    sampled = "I add." + "\n" * num_breaks + CALLS["hermes"]
    answer = Answer(sampled=sampled, message=call(FACTS[name], 1, text="I add."))
    expected = num_breaks == 1 and name != "qwen3_without_thinking"
    assert stays(name, answer, result(1)) is expected


# What single templates do to history.


def test_qwen3_drops_the_thoughts_of_turns_before_the_last_question():
    first = [user("1+2?"), assistant(THOUGHTS + "3")]
    assert "hm" in render("qwen3", first)
    assert "hm" not in render("qwen3", [*first, user("Sure?")])


def test_qwen3_takes_a_tools_result_from_a_user_for_no_question():
    first = [user("1+2?"), assistant(THOUGHTS + "3")]
    assert "hm" in render("qwen3", [*first, user("<tool_response>3</tool_response>")])


@pytest.mark.parametrize("name", ["qwen3", "glm4_moe"])
def test_thoughts_may_also_come_in_a_field_of_their_own(name):
    apart = {"role": "assistant", "content": "3", "reasoning_content": "hm"}
    both = [render(name, [user("1+2?"), answer]) for answer in (apart, assistant(THOUGHTS + "3"))]
    assert both[0] == both[1]


def test_glm4_leaves_an_empty_block_where_it_drops_thoughts():
    text = render("glm4_moe", [user("1+2?"), assistant(THOUGHTS + "3"), user("Sure?")])
    assert "<|assistant|>\n<think></think>\n3<|user|>" in text


def test_deepseek_drops_thoughts_always():
    assert "hm" not in render("deepseek_r1", [user("1+2?"), assistant(THOUGHTS + "3")])


def test_deepseek_opens_an_answer_with_thoughts_but_not_after_a_result():
    facts = FACTS["deepseek_r1"]
    assert render("deepseek_r1", [user("1+2?")]).endswith(deepseek("<|Assistant|><think>\n"))
    text = render("deepseek_r1", [user("1+2?"), call(facts, 1), result(1)])
    assert text.endswith(deepseek("<|tool_outputs_end|>"))


def test_mistral_puts_the_system_text_before_the_last_users_message():
    text = render("mistral", [*opening(FACTS["mistral"]), user("Hi"), assistant("Yes"), user("2?")])
    assert text.startswith("<s>[INST]Hi[/INST]Yes</s>[AVAILABLE_TOOLS]")
    assert text.endswith("[/AVAILABLE_TOOLS][INST]Be brief.\n\n2?[/INST]")


def test_mistral_shows_no_system_text_once_an_answer_is_there():
    text = render("mistral", [*opening(FACTS["mistral"]), user("Hi"), assistant("Yes")])
    assert "Be brief." not in text


def test_mistral_keeps_a_plain_chat_once_it_has_neither_system_text_nor_tools():
    tokenizer = template_tokenizer("mistral")
    chat = [user("Hi"), assistant("Yes"), user("2?")]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<s>[INST]Hi[/INST]Yes</s>[INST]2?[/INST]"
    )


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_a_text_beside_a_tool_call_is_dropped(name):
    messages = [user("1+2?"), call(FACTS[name], 1, text="I add."), result(1)]
    assert "I add." not in render(name, messages)


def test_deepseek_drops_the_calls_of_a_message_with_a_text():
    message = call(FACTS["deepseek_r1"], 1) | {"content": "I add."}
    text = render("deepseek_r1", [user("1+2?"), message])
    assert "I add." in text and CALLS["deepseek"] not in text


def test_phi3_ends_a_text_without_a_generation_prompt_for_good():
    messages = [user("Hi"), assistant("Hello")]
    assert render("phi3_5", messages, is_open=False).endswith("Hello<|end|>\n<|endoftext|>")


# What the facts say.

TWO_QUESTIONS = [user("Hi"), user("Hi?")]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, user("Hi")]


def two_calls(facts: TemplateFacts) -> list[Message]:
    return [user("Hi"), call(facts, 1, 2), result(1), result(2)]


def call_with_a_long_id(facts: TemplateFacts) -> list[Message]:
    return [user("Hi"), call(facts, 12), result(12)]


def is_refused(name: str, messages: list[Message]) -> bool:
    try:
        render(name, messages)
    except jinja2.TemplateError:
        return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_say_which_messages_are_refused(name):
    facts = FACTS[name]
    assert is_refused(name, WITH_SYSTEM) is not facts.takes_system
    assert is_refused(name, TWO_QUESTIONS) is facts.must_alternate
    if facts.tool_calls is not None:
        assert is_refused(name, two_calls(facts)) is (facts.max_calls_per_message == 1)
        assert is_refused(name, call_with_a_long_id(facts)) is facts.needs_nine_letter_ids


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_say_whether_tools_are_shown(name):
    text = template_tokenizer(name).apply_chat_template(
        [user("Hi")], tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    # DeepSeek's renders calls and results, but shows no tools.
    assert ('"add"' in text) is (FACTS[name].tool_calls not in (None, "deepseek"))


@pytest.mark.parametrize("name", [name for name in NAMES if FACTS[name].tool_calls])
def test_arguments_are_read_in_the_forms_that_the_facts_name(name):
    facts = FACTS[name]
    seen = []
    for arguments in ({"a": 1}, '{"a": 1}'):
        message = call(facts, 1)
        message["tool_calls"][0]["function"]["arguments"] = arguments
        try:
            seen.append(CALLS[facts.tool_calls] in render(name, [user("1+2?"), message, result(1)]))
        except (TypeError, jinja2.TemplateError):
            seen.append(False)
    expected = {"mapping": [True, False], "either": [True, True], "json": [False, True]}
    assert seen == expected[facts.arguments]


@pytest.mark.parametrize("name", NAMES)
def test_only_control_tokens_are_left_out_of_the_text(name):
    facts, tokenizer = FACTS[name], template_tokenizer(name)
    tokens = [*facts.control_tokens, *facts.text_tokens]
    ids = tokenizer.encode("".join(tokens), add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(facts.text_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_comes_back_from_its_tokens_unless_some_swallow_space(name):
    tokenizer = template_tokenizer(name)
    text = render(name, conversation(FACTS[name]))
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    # Role tokens of Phi-3.5 take in the line break behind them; Phi-4's conversation has no space.
    assert back == (text.replace("|>\n", "|>") if name == "phi3_5" else text)


def test_phi4_loses_white_space_at_the_ends_of_a_text():
    tokenizer = template_tokenizer("phi4")
    ids = tokenizer.encode(render("phi4", [user(" Hi\n")]), add_special_tokens=False)
    assert "<|im_sep|>Hi<|im_end|>" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_puts_the_first_token_first_where_the_facts_say_so(name):
    facts, tokenizer = FACTS[name], template_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("Hi")) == f"{facts.bos if facts.adds_bos else ''}Hi"
