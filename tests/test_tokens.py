"""Text to ids and back: what streams out is whole characters, and all of the text."""

import pytest

from formats.tokens import Bytes, Tokenizer
from tests.test_formats import refused
from tests.tiny import tiny_target

tokenizers = pytest.importorskip("tokenizers")


def config(**changes):
    return tiny_target(hidden_size=8, num_hidden_layers=1, suppress_tokens=(), **changes).config


def bpe(folder, whole_words=False):
    """A tokenizer.json trained here: byte-level, where é is two tokens; or whole words, with their
    spaces in front.  It puts <s>, id 1, first."""
    from tokenizers import decoders, pre_tokenizers, processors, trainers

    t, alphabet, size = tokenizers.Tokenizer(tokenizers.models.BPE()), [], 60
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if not whole_words:
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = decoders.ByteLevel()
        alphabet, size = pre_tokenizers.ByteLevel.alphabet(), 290
    text = ["the quick brown fox jumps over the lazy dog, and the dog says hello"] * 3
    t.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False))
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    return t


@pytest.mark.parametrize("text, whole_words", [
    ("the dog says: été, 你好, 🙂‍↔️, naïve — “quotes” fox", False),
    ("the dog jumps over the quick fox", True)])
def test_streamed_text_is_whole_characters_and_all_of_it(tmp_path, text, whole_words):
    inner = bpe(tmp_path, whole_words)
    tokenizer = Tokenizer(config(vocab_size=400, bos_token_id=1), tmp_path)
    ids = inner.encode(text).ids
    assert ids[0] == 1
    put, end = tokenizer.stream()
    pieces = [put(i) for i in ids]
    assert "".join(pieces) + end() == text
    assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 8
    put, end = tokenizer.stream()  # another stream, which knows nothing of the first
    assert "".join(map(put, ids)) + end() == text


def test_an_answer_that_stops_within_a_character_shows_what_there_is(tmp_path):
    inner = bpe(tmp_path)
    for tokenizer, cut in (
        (Tokenizer(config(vocab_size=400, bos_token_id=1), tmp_path),
         inner.encode("dog é", add_special_tokens=False).ids[:-1]),
        (Bytes(config(vocab_size=257, bos_token_id=256)), list("dog é".encode()[:-1])),
    ):
        put, end = tokenizer.stream()
        assert "".join(map(put, cut)) == "dog " and end() == "\ufffd"


def test_the_begin_token_is_not_doubled_and_special_tokens_can_be_written(tmp_path):
    bpe(tmp_path)
    tokenizer = Tokenizer(config(vocab_size=400, bos_token_id=1), tmp_path)
    once = tokenizer.encode("hello</s>")
    assert once[0] == 1 != once[1] and once[-1] == 2
    assert tokenizer.encode("<s>hello</s>") == once
    assert tokenizer.encode("<s><s>hello</s>") == [1, *once]


def test_what_is_no_tokenizer_of_this_model_is_refused(tmp_path):
    with refused("no tokenizer.json that can be read"):
        Tokenizer(config(), tmp_path)
    bpe(tmp_path)
    with refused("the tokenizer gives id .*, the model has 20"):
        Tokenizer(config(vocab_size=20, bos_token_id=1), tmp_path).encode("hello")
    (tmp_path / "tokenizer.json").write_text("{")
    with refused("no tokenizer.json that can be read"):
        Tokenizer(config(), tmp_path)
    for changes in ({"vocab_size": 256, "bos_token_id": 255}, {"vocab_size": 257}):
        with refused("not byte-level"):
            Bytes(config(**changes))


def test_bytes_are_their_own_ids():
    tokenizer = Bytes(config(vocab_size=257, bos_token_id=256))
    text = "é 🙂\n"
    assert tokenizer.encode(text) == [256, *text.encode()]
    put, end = tokenizer.stream()
    pieces = [put(i) for i in text.encode()]
    assert pieces[:2] == ["", "é"] and "".join(pieces) == text and end() == ""
