from collections import Counter

from arealite.data import GSM8K_LARGE, GSM8K_MINI, TINY_PROGRAMS
from recipes.tiny_agent_lessons import FEEDBACK, Lesson, held_out, lessons


def kind(lesson: Lesson) -> str:
    """What a lesson shows, told from its messages alone."""
    *earlier, last = [message["content"] for message in lesson.messages]
    if lesson.tools:
        return "tool" if "<tool_call>" in earlier[1:2] or len(earlier) > 1 else "no tool"
    if FEEDBACK in earlier:
        return "worked" if last.startswith("<<") else "repeated"
    if "```" in last:
        return "careful" if "int(input())" in last else "careless"
    return "direct"


def test_the_first_lessons_show_the_better_way_and_the_others_mostly_not():
    taught = lessons(8_000, num_better=1_600, share_hasty=0.7, seed=5)
    first = Counter(kind(lesson) for lesson in taught[:1_600])
    assert first == {"tool": 700, "worked": 400, "direct": 200, "careful": 300}
    others = Counter(kind(lesson) for lesson in taught[1_600:])
    assert 0.66 < others["no tool"] / (others["no tool"] + others["tool"]) < 0.74
    assert 0.66 < others["repeated"] / (others["repeated"] + others["worked"]) < 0.74
    assert 0.6 < others["careless"] / (others["careless"] + others["careful"]) < 0.75


def test_an_answer_that_is_to_be_corrected_is_wrong_and_not_learned():
    for lesson in lessons(400, num_better=400, share_hasty=0.0, seed=5):
        if kind(lesson) == "worked":
            wrong, better = (lesson.messages[index]["content"] for index in (1, 3))
            assert better.splitlines()[-1] != wrong
            assert lesson.num_given == 1


def test_a_tool_is_told_what_its_last_result_makes_right():
    for lesson in lessons(400, num_better=400, share_hasty=0.0, seed=5):
        if kind(lesson) == "tool":
            *_, result, answer = lesson.messages
            assert answer["content"] == f"#### {result['content']}"
            assert result["role"] == "tool"


def test_no_lesson_is_about_a_row_of_a_test_split():
    taught = lessons(3_000, num_better=0, share_hasty=0.5, seed=5)
    asked = {lesson.messages[0]["content"] for lesson in taught}
    assert not asked & held_out(GSM8K_LARGE)
    assert not asked & held_out(GSM8K_MINI)
    assert not asked & held_out(TINY_PROGRAMS)
