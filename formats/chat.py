"""A checkpoint's chat template: messages -> the text that the model was taught to answer.

A template is a program of the checkpoint's (jinja2), and is run in jinja2's sandbox: it sees the
messages and nothing else, and can change nothing.
"""

import json
from datetime import datetime

from formats.files import need, read_json, shorten
from model import UserError


class ChatTemplate:
    def __init__(self, directory):
        """Raises UserError if the directory has no template that can be read."""
        self.directory = directory
        raw, own = {}, directory / "chat_template.jinja"
        if (directory / "tokenizer_config.json").exists():
            raw = read_json(directory / "tokenizer_config.json")
        text = own.read_text(encoding="utf-8") if own.exists() else raw.get("chat_template")
        if isinstance(text, list):  # several, by name
            named = {x.get("name"): x.get("template") for x in text if isinstance(x, dict)}
            text = named.get("default")
        if not isinstance(text, str):
            raise UserError(f"{directory} has no chat template: give --prompt or --prompts as the "
                            "model expects them, without --chat or messages")
        sandbox = need("jinja2.sandbox", "a chat template")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = datetime.now().strftime
        self.special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = raw.get(name)
            self.special[name] = token.get("content") if isinstance(token, dict) else token
        try:
            self.template = environment.from_string(text)
        except Exception as error:
            raise self.unusable(error) from None

    def unusable(self, error):
        reason = shorten(" ".join(str(error).split()))
        return UserError(f"{self.directory}: its chat template cannot be used "
                         f"({type(error).__name__}: {reason})")

    def __call__(self, messages):
        """messages: [{"role", "content"}] -> text, up to where the answer begins."""
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=True, **self.special)
        except Exception as error:  # a template raises what it likes
            raise self.unusable(error) from None


def refuse(message):
    raise UserError(str(message))


def tojson(x, indent=None):
    """As transformers has it: not escaped for HTML."""
    return json.dumps(x, ensure_ascii=False, indent=indent)
