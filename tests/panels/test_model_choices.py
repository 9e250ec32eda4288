"""What can be chosen: models on this disk are offered with what they are, and an odd one hides no other."""

import json

import pytest

from kani_nb.notebook.panels.model_choices import list_choices


@pytest.mark.parametrize("architectures", [{"a": 1}, 5, [], [7], "Named", None])
def test_an_odd_folder_hides_no_other(tmp_path, architectures):
    for name, config in (("good", {"architectures": ["GoodForCausalLM"]}), ("odd", {"architectures": architectures})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    about = {each["name"]: each["about"] for each in list_choices(tmp_path)["models"]}
    assert about["./good"].startswith("in this folder, GoodForCausalLM, ")
    assert {"./odd", "./list", "./a.gguf"} <= set(about)
    assert "smollm2" in about
    assert list_choices(tmp_path / "missing")["models"]
