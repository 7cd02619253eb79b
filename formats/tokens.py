"""Text to token ids and back.  A tokenizer here is:

encode(text) -> ids (list of int), the begin token first where the tokenizer puts one;
chat(messages) -> text, by the checkpoint's template; begin: the model's begin token, or None;
stream() -> put(token) -> text, and end() -> what is left of it: text comes out in whole characters.
"""

import codecs

from formats.chat import ChatTemplate
from formats.files import need
from model import UserError


class Bytes:
    """The embedded target needs no tokenizer: bytes after the begin token, 256."""

    def __init__(self, config):
        if (config.vocab_size, config.bos_token_id) != (257, 256):
            raise UserError(
                f"this target is not byte-level: its vocabulary is {config.vocab_size} and its "
                f"begin token {config.bos_token_id}, expected 257 and 256"
            )

        self.begin = 256

    def encode(self, text):
        return [256, *text.encode()]

    def chat(self, messages):
        raise UserError("this target reads bytes, and has no chat template: leave out --chat, "
                        "messages, and the classes of --traffic that are chat")

    def stream(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def put(token):
            return decoder.decode(bytes([token]))

        return put, lambda: decoder.decode(b"", final=True)


class Tokenizer:
    """The tokenizer.json of a checkpoint."""

    def __init__(self, config, directory):
        library = need("tokenizers")
        try:
            self.inner = library.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{directory}: no tokenizer.json that can be read ({reason})") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.begin, self.vocab_size = config.bos_token_id, config.vocab_size
        self.directory, self.template = directory, None

    def chat(self, messages):
        self.template = self.template or ChatTemplate(self.directory)
        return self.template(messages)

    def encode(self, text):
        """Special tokens may be written out, as chat templates do; a begin token is not doubled."""
        ids = self.inner.encode(text).ids
        highest = max(ids, default=0)
        if highest >= self.vocab_size:
            raise UserError(f"{self.directory}: the tokenizer gives id {highest}, "
                            f"the model has {self.vocab_size}")
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.begin
        return ids[1:] if doubled else ids

    def stream(self):
        """Tokens are decoded after those that came out last, because what a token reads as may hang
        on the one before it (a space at the start of a word)."""
        shown, waiting = [], []  # the tokens that came out last; those that are no whole text yet

        def flush(last):
            nonlocal shown, waiting
            before, now = self.inner.decode(shown), self.inner.decode(shown + waiting)
            if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
                return ""
            shown, waiting = waiting, []
            return now[len(before) :]

        def put(token):
            waiting.append(token)
            return flush(last=False)

        return put, lambda: flush(last=True)
