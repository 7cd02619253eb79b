"""GGUF files: what is refused, each in one line.  tests/test_real.py has one that is converted."""

import pytest
import torch

from formats import gguf
from formats.find import find_target
from formats.huggingface import check_memory
from model import UserError

library = pytest.importorskip("gguf")
pytest.importorskip("transformers")


def written(path, kind="llama", sizes=True):
    writer = library.GGUFWriter(path, kind)
    if sizes:
        writer.add_block_count(1)
        writer.add_embedding_length(256)
        writer.add_token_list(["a", "b", "c", "d"])
    writer.add_tensor("token_embd.weight", torch.zeros(4, 256).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path, tmp_path, reason):
    with pytest.raises(UserError, match=reason) as error:
        gguf.convert(path, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch):
    refused(tmp_path / "missing.gguf", tmp_path, "no file")
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4 something else")
    refused(tmp_path / "other.gguf", tmp_path, "is not a GGUF")
    whole = written(tmp_path / "whole.gguf")
    refused(written(tmp_path / "s.gguf", sizes=False), tmp_path, "holds no llama.block_count")
    (tmp_path / "half.gguf").write_bytes(whole.read_bytes()[:40])
    refused(tmp_path / "half.gguf", tmp_path, "not a whole GGUF")
    refused(written(tmp_path / "g.gguf", "gemma3"), tmp_path, "architecture 'gemma3' is not")
    with pytest.raises(UserError, match="exists: name a directory"):
        gguf.convert(whole, tmp_path)

    def unreadable(*_):
        raise NotImplementedError("of a type that has no reader")

    monkeypatch.setattr(library, "dequantize", unreadable)
    refused(whole, tmp_path, "is quantised as F32, which cannot be read")


def test_a_missing_extra_names_the_requirements(tmp_path, monkeypatch):
    path = written(tmp_path / "whole.gguf")

    def none(module):
        raise ImportError(module)

    monkeypatch.setattr("formats.files.importlib.import_module", none)
    refused(path, tmp_path, "needs gguf: pip install -r requirements-gguf.txt")


def test_a_gguf_as_the_target_names_the_command(tmp_path):
    path = written(tmp_path / "whole.gguf")
    for name in (path, tmp_path):  # the file, and a directory that holds nothing else
        with pytest.raises(UserError, match=f"python -m formats.gguf {path} --out DIR"):
            find_target(str(name), "auto")


def test_too_little_memory_is_told_before_anything_is_read(monkeypatch):
    tensors = {"a": torch.empty(2_000_000, device="meta"), "b": torch.empty(500_000, device="meta")}
    monkeypatch.setattr("formats.huggingface.bytes_free", lambda: 9_999_999)
    with pytest.raises(UserError, match="take 0.0 GB in float32, and 0.0 GB of memory are free"):
        check_memory("DIR", tensors, torch.float32)
    check_memory("DIR", tensors, torch.bfloat16)  # half of it fits
    monkeypatch.setattr("formats.huggingface.bytes_free", lambda: None)
    check_memory("DIR", tensors, torch.float32)  # not known: it is tried
