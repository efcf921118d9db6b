"""Where in a text its final answer stands. Light to import, unlike what compares answers."""

import re

_HASH_ANSWER = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_ANSWER_LINE = re.compile(r"\banswer[ \t*]*:[\s*]*([^\s*][^\n]*)", re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def final_answer(text: str, *, has_answer_line: bool = False) -> str | None:
    """What follows the last `####`, or stands in the last `\\boxed{}`; None if there is neither.

    Args:
        has_answer_line: what follows the last `Answer:` counts as well. The latest of all counts.
    """
    patterns = (_HASH_ANSWER, _ANSWER_LINE) if has_answer_line else (_HASH_ANSWER,)
    found = [match for pattern in patterns for match in list(pattern.finditer(text))[-1:]]
    candidates = [(match.start(), match[1].strip()) for match in found]
    if (box := _last_box(text)) is not None:
        candidates.append(box)
    return max(candidates)[1] if candidates else None


def _last_box(text: str) -> tuple[int, str] | None:
    """Start and content of the last `\\boxed{...}` that is closed and not empty.

    One pass over the text, whatever it holds: thousands of boxes inside each other are common in
    the output of a policy that degenerates.
    """
    last: tuple[int, str] | None = None
    open_braces: list[re.Match[str]] = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0] == "{" or token[0].startswith(r"\boxed"):
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{" and (last is None or opening.start() > last[0]):
                content = text[opening.end() : token.start()].strip()
                last = (opening.start(), content) if content else last
    return last
