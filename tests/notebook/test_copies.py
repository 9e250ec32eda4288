"""Quantized copies are kept, listed and deleted, and a saved folder is named so that it is found again."""

import re


def test_a_copy_is_listed_and_deleted_by_its_name(cells, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path))
    assert "There is no quantized copy. %load_engine MODEL" in cells.good("%engine copies")
    cells.good(f"%load_engine {tiny_model} --quant cpu-int8 --cache-quantized --threads 1")
    listed = cells.good("%engine copies")
    name = re.search(r"\S*-cpu-int8-[0-9a-f]{12}", listed)[0]
    assert re.search(rf"cpu-int8\s+\d+ KiB\s+{name}", listed)
    assert "there is no quantized copy 'nothing'" in cells.run("%engine copies --delete nothing")[1]
    assert re.search(rf"{name} is deleted: \d+ KiB freed", cells.good(f"%engine copies --delete {name}"))
    assert "There is no quantized copy" in cells.good("%engine copies")


def test_a_folder_that_is_called_like_an_alias_is_named_as_a_folder(cells, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells.good(f"%load_engine {tiny_model} --threads 1")
    said = cells.good("%engine save smollm2")
    line = re.search(r"%load_engine \S+", said)[0]
    assert line == "%load_engine ./smollm2"
    cells.good(line)
    assert "400" in cells.good("import kani_nb; print(kani_nb.runtime().engine.model.config.vocab_size)")


def test_a_load_that_fails_says_once_why_and_what_still_answers(cells):
    cells.good("%load_engine echo")
    said = cells.bad("%load_engine smollm2 --quant nf5")
    assert "smollm2 was not loaded after" in said
    assert "echo still answers" in said
    assert said.count("there is no quantization scheme 'nf5'") == 1
