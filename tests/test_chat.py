"""Chat templates, messages, and the built-in prompts for checkpoints."""

import json

import pytest

from formats.chat import ChatTemplate
from formats.tokens import Bytes
from model import UserError
from support import chat_traffic, options
from support.corpus import SPLITS

from .tiny import tiny_target

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a < b & c"}]


def directory(tmp_path, template, **more):
    content = {"eos_token": {"content": "</s>"}, "chat_template": template} | more
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("template", [TEMPLATE, [{"name": "tools", "template": "no"},
                                                 {"name": "default", "template": TEMPLATE}]])
def test_a_template_makes_a_prompt_of_messages(tmp_path, template):
    chat = ChatTemplate(directory(tmp_path, template))
    assert chat(MESSAGES) == "<system>be kind</s><user>a < b & c</s><assistant>"


def test_a_template_of_its_own_file_goes_first(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert ChatTemplate(directory(tmp_path, TEMPLATE))(MESSAGES) == "be kind!"


@pytest.mark.parametrize("template, reason", [
    (None, "has no chat template"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[0]['content'] + 1 }}", "TypeError"),
])
def test_a_template_that_cannot_be_used_or_wants_too_much_is_one_line(tmp_path, template, reason):
    with pytest.raises(UserError, match=reason) as error:
        ChatTemplate(directory(tmp_path, template))(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_jsonl_may_hold_messages(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES, "class": "x"}) + '\n{"prompt": "y"}\n')
    assert options.read_prompts(str(path)) == [("x", MESSAGES), ("prompts", "y")]
    args = options.arguments(["--prompts", str(path), "--chat"])
    assert options.prompts(args) == [("x", MESSAGES), ("prompts", chat_traffic.user_says("y"))]
    args = options.arguments(["--prompts", str(path)])
    assert options.prompts(args) == [("x", MESSAGES), ("prompts", "y")]


@pytest.mark.parametrize("messages", [
    "text", [], {}, 7, ["x"], [{"role": "user"}], [{"role": "user", "content": 3}]])
def test_messages_that_are_none_are_refused(tmp_path, messages):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match="messages|empty"):
        options.read_prompts(str(path))


class OneToken:
    """A tokenizer whose every text is a single token, 5."""

    def __init__(self, begin):
        self.begin = begin

    def encode(self, text):
        return [5]


def test_a_prompt_of_one_token_follows_the_begin_token():
    assert options.encode("x", OneToken(begin=1)) == [1, 5]
    for begin in (None, 5):
        with pytest.raises(UserError, match="only 1 token"):
            options.encode("x", OneToken(begin))


def test_a_byte_level_target_has_no_template():
    config = tiny_target(vocab_size=257, bos_token_id=256, suppress_tokens=()).config
    with pytest.raises(UserError, match="no chat template"):
        options.encode(MESSAGES, Bytes(config))


@pytest.mark.parametrize("kind", chat_traffic.CLASSES)
def test_built_in_prompts_repeat_nothing_and_are_the_first_of_more(kind):
    served = chat_traffic.prompts_of(kind, "traffic", 60, seed=0)
    assert len(set(served)) == 60
    assert chat_traffic.prompts_of(kind, "traffic", 20, seed=0) == served[:20]
    assert chat_traffic.prompts_of(kind, "traffic", 20, seed=1) != served[:20]
    with pytest.raises(UserError, match="ask for fewer"):
        chat_traffic.prompts_of(kind, "traffic", 10**6, seed=0)


def test_what_is_asked_about_is_in_one_split_only():
    subjects = {split: {x for x in chat_traffic.SUBJECTS if chat_traffic.split_of(f"chat/{x}")
                        == split} for split in SPLITS}
    assert all(len(x) >= 5 for x in subjects.values())
    functions = {split: set(chat_traffic.texts_to_ask_about(chat_traffic.functions, split))
                 for split in ("eval", "traffic")}
    assert all(len(x) >= 60 for x in functions.values())
    shared = functions["eval"] & functions["traffic"]
    assert len(shared) < 0.05 * len(functions["eval"])  # the library repeats itself here and there
