"""Problem files: what is read, what is refused and where; prompts: what the policy sees."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.tasks.problems import BOXED_INSTRUCTION, Problem, encode_prompt, load_problems, render_prompt

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
FIRST = {"id": "a", "problem": "What is 1 + 1?", "answer": "2", "source": "test/one"}


@pytest.fixture
def write(tmp_path):
    """Writes records (or raw lines) to a file."""

    def write_lines(*records):
        path = tmp_path / "problems.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write_lines


def without(name):
    return {key: value for key, value in FIRST.items() if key != name}


@given(st.lists(st.text(min_size=1).filter(str.strip), unique=True, min_size=1, max_size=4))
def test_what_was_written_is_read_back_in_order(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    problems = [Problem(id=text, problem=text, answer=text, source="") for text in texts]
    path.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in problems), encoding="utf-8")
    assert load_problems(path) == problems


def test_empty_lines_are_skipped_and_still_counted(write):
    path = write(FIRST, "", {**FIRST, "id": "b"}, "  ", FIRST)
    with pytest.raises(ValueError, match=r"problems.jsonl, line 5: id must be unique, got 'a', which line 1 has"):
        load_problems(path)


@pytest.mark.parametrize(
    ("name", "count"),
    [("math500", 500), ("olympiadbench", 675), ("aime24", 30), ("minerva_math", 272), ("dapo_math_sample", 17240)],
)
def test_the_data_sets_load_whole(name, count):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the data set {name}.jsonl is not in ../shared/data")
    assert len(load_problems(path)) == count


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="problem file must exist, got .*nowhere.jsonl"):
        load_problems(tmp_path / "nowhere.jsonl")


def test_a_file_without_problems_is_refused(write):
    with pytest.raises(ValueError, match="must hold at least one problem"):
        load_problems(write(""))


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ('{"id": "b", ', "each line must be a JSON object, got .*Expecting"),
        ("[1, 2]", r"each line must be a JSON object, got '\[1, 2\]'"),
        ('"' + "x" * 100 + '"', r"got '\"x{56}\.\.\.'"),
        (without("answer"), "answer must be given, got only id, problem, source"),
        ({**without("answer"), "anwser": "2"}, "got the unknown 'anwser'"),
        ({**FIRST, "level": "5"}, "keys must be id, problem, answer, source, got the unknown 'level'"),
        ({**FIRST, "id": "b", "answer": 2}, "answer must be a string, got 2"),
        ({**FIRST, "id": "b", "answer": None}, "answer must be a string, got None"),
        ({**FIRST, "id": "b", "problem": " \n"}, "problem must not be empty"),
        (FIRST, "id must be unique, got 'a', which line 1 has"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_rule(write, second, text):
    with pytest.raises(ValueError, match=rf"problems.jsonl, line 2: .*{text}"):
        load_problems(write(FIRST, second))


class SpelledTokenizer:
    """A code point is a token; 0 stands for the begin-of-sequence token, which the template writes as `^`."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
        return "^" + turns + ("<assistant>" if add_generation_prompt else "")

    def encode(self, text, *, add_special_tokens):
        return [0] * add_special_tokens + [0 if letter == "^" else ord(letter) for letter in text]


CHAT, BASE = SpelledTokenizer("a template"), SpelledTokenizer(None)


@pytest.mark.parametrize("template", ["auto", "chat"])
def test_a_chat_prompt_is_one_user_turn_and_the_opening_of_the_assistants(template):
    assert render_prompt("1 + 1?", CHAT, template=template) == "^<user>1 + 1?<assistant>"


@pytest.mark.parametrize(("template", "tokenizer"), [("auto", BASE), ("plain", BASE), ("plain", CHAT)])
def test_a_plain_prompt_needs_no_chat_template(template, tokenizer):
    assert render_prompt("1 + 1?", tokenizer, template=template) == "Problem: 1 + 1?\nSolution:"


@pytest.mark.parametrize("tokenizer", [BASE, CHAT])
def test_a_raw_prompt_is_the_text_itself(tokenizer):
    assert render_prompt("A3 B4 #0 A B C ? C", tokenizer, template="raw") == "A3 B4 #0 A B C ? C"


def test_the_instruction_follows_the_problem_inside_the_users_turn():
    assert render_prompt("1 + 1?", CHAT, instruction=BOXED_INSTRUCTION) == (
        "^<user>1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.<assistant>"
    )
    assert render_prompt("1 + 1?", BASE, instruction="Be brief.") == "Problem: 1 + 1?\nBe brief.\nSolution:"


@pytest.mark.parametrize("tokenizer", [CHAT, BASE])
@pytest.mark.parametrize("template", ["auto", "plain", "raw"])
def test_every_prompt_begins_with_exactly_one_begin_of_sequence_token(tokenizer, template):
    token_ids = encode_prompt("1 + 1?", tokenizer, template=template)
    assert token_ids[0] == 0
    assert token_ids.count(0) == 1


def test_a_tokenizer_of_transformers_fits():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "<u>": 1, "<a>": 2, "one": 3, "?": 4, "[UNK]": 5}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    assert encode_prompt("one ?", tokenizer, template="raw") == [0, 3, 4]
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}<u> {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} <a>{% endif %}"
    )
    assert encode_prompt("one ?", tokenizer) == [0, 1, 3, 4, 2]


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match='template "chat" must have a chat template in the tokenizer, got none'):
        render_prompt("1 + 1?", BASE, template="chat")


def test_an_instruction_with_raw_is_refused():
    with pytest.raises(ValueError, match='instruction must be None with template "raw"'):
        encode_prompt("1 + 1?", BASE, template="raw", instruction="Be brief.")


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="template must be .* got 'qwen'"):
        render_prompt("1 + 1?", CHAT, template="qwen")


def test_a_file_that_is_not_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": "a", "problem": "b", "answer": "1", "source": "s"}\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: a problem file must be UTF-8"):
        load_problems(path)
