"""Old single-file GPTQ checkpoints: converted to the weights that were packed, or refused in one paragraph.

The files are written here as GPTQ-for-LLaMa wrote them, by code that shares nothing with the converter.
"""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.engines.gptq_checkpoint import convert_gptq_checkpoint, refuse_or_explain
from kani_nb.engines.sources_checks import check_weights
from kani_nb.errors import ConfigError, EngineError, KaniNbError, MissingDependencyError, ModelFilesError
from kani_nb.hardware.gptq_check import needs_of
from kani_nb.serve.cli import main
from tests.gptq.old_files import WIDTH, OldFile, codes, old_model

pytestmark = pytest.mark.quant


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of two layers, of which only configuration and tokenizer are used."""
    return old_model(tmp_path_factory.mktemp("original"))


def weights_in(folder):
    """The weights of a folder, read as its configuration says: by name, `(N, K)` float64."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    bits, less = config["bits"], {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    tensors, found = load_file(folder / "model.safetensors"), {}
    for name in [each.removesuffix(".qweight") for each in tensors if each.endswith(".qweight")]:
        group, scale = tensors[f"{name}.g_idx"], tensors[f"{name}.scales"].astype(np.float64)
        assert tensors[f"{name}.scales"].dtype == np.float16
        code = codes(tensors[f"{name}.qweight"], bits, len(group))
        zero = codes(tensors[f"{name}.qzeros"].T, bits, scale.shape[1]).T + less
        found[name] = (scale[group] * (code - zero[group])).T
    return found, config


def assert_same_weights(folder, old):
    found, config = weights_in(folder)
    assert found.keys() == old.weights.keys()
    for name, weight in old.weights.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    return config


@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 32, 64]),
    is_symmetric=st.booleans(),
    act_order=st.booleans(),
    index=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_folder_holds_the_weights_that_were_packed(model, tmp_path_factory, **how):
    folder = tmp_path_factory.mktemp("converted")
    old = OldFile(**how)
    made = convert_gptq_checkpoint(old.save(folder / "old.pt"), model, folder / "out", how["group_size"], how["bits"])
    config = assert_same_weights(folder / "out", old)
    assert made.folder == folder / "out"
    # Kernels want groups: one for all inputs is written as several with equal scales.
    assert config["group_size"] == made.group_size == (64 if how["group_size"] == -1 else how["group_size"])
    assert config["sym"] == made.is_symmetric == how["is_symmetric"]
    assert config["desc_act"] == made.has_act_order == (how["act_order"] and how["group_size"] != -1)
    # Asymmetric weights in the first version of the format are what gptqmodel refuses.
    assert config["format"] == ("gptq" if how["is_symmetric"] else "gptq_v2")


def test_the_folder_is_a_model_with_its_tokenizer(model, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path / "out"
    made = convert_gptq_checkpoint(OldFile().save(tmp_path / "old.pt"), model, out, 32)
    assert check_weights(out) == made.weight_bytes
    config = AutoConfig.from_pretrained(out)
    assert (config.hidden_size, config.dtype) == (WIDTH, torch.float16)
    assert "torch_dtype" not in json.loads((out / "config.json").read_text())
    text = "the quick brown fox"
    original = AutoTokenizer.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == original(text).input_ids
    assert AutoTokenizer.from_pretrained(out).chat_template == original.chat_template


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_that_do_not_divide_the_inputs_are_divided_themselves(tmp_path, act_order):
    model = old_model(tmp_path / "original", 192, 160)
    old = OldFile(group_size=128, act_order=act_order, width=192, inner=160)
    made = convert_gptq_checkpoint(old.save(tmp_path / "old.pt"), model, tmp_path / "out", 128)
    config = assert_same_weights(tmp_path / "out", old)
    assert config["group_size"] == made.group_size == 32
    assert "groups of 128 are kept as groups of 32" in made.note
    assert "backend" not in config


@pytest.mark.parametrize(("group_size", "width"), [(16, WIDTH), (32, 96)], ids=["groups of 16", "48 outputs"])
def test_shapes_that_no_fast_kernel_takes_name_the_plain_one(tmp_path, group_size, width):
    model, old = old_model(tmp_path / "original", width), OldFile(group_size=group_size, width=width)
    made = convert_gptq_checkpoint(old.save(tmp_path / "old.pt"), model, tmp_path / "out", group_size)
    assert assert_same_weights(tmp_path / "out", old)["backend"] == "torch"
    assert "slower" in made.note


def test_the_first_files_kept_scales_and_zeros_in_floats_and_a_bias_of_nothing(model, tmp_path):
    old = OldFile(group_size=-1, index=False)
    for name, weight in old.weights.items():
        zero = codes(old.tensors.pop(f"{name}.qzeros").T.numpy(), 4, len(weight)) + 1
        scale = old.tensors[f"{name}.scales"].T.float()
        old.tensors |= {f"{name}.scales": scale, f"{name}.zeros": torch.from_numpy(zero).float() * scale}
        old.tensors[f"{name}.bias"] = torch.zeros(len(weight))
    convert_gptq_checkpoint(old.save(tmp_path / "old.pt"), model, tmp_path / "out", -1)
    assert_same_weights(tmp_path / "out", old)


def test_files_before_torchs_zip_format_and_safetensors_are_read_too(model, tmp_path):
    from safetensors.torch import save_file

    old = OldFile()
    before = old.save(tmp_path / "before.pt", _use_new_zipfile_serialization=False)
    save_file(old.tensors, tmp_path / "single.safetensors")
    for path in (before, tmp_path / "single.safetensors"):
        convert_gptq_checkpoint(path, model, tmp_path / path.stem, 32)
        assert_same_weights(tmp_path / path.stem, old)


def test_an_index_that_was_never_filled_is_not_believed(model, tmp_path):
    old = OldFile(index=False)
    old.tensors |= {f"{name}.g_idx": torch.zeros(w.shape[1], dtype=torch.int32) for name, w in old.weights.items()}
    convert_gptq_checkpoint(old.save(tmp_path / "old.pt"), model, tmp_path / "out", 32)
    assert_same_weights(tmp_path / "out", old)


def dropped(name):
    return lambda old: old.tensors.pop(name)


def replaced(name, make):
    return lambda old: old.tensors.__setitem__(name, make(old.tensors.get(name)))


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (None, {"group_size": 64}, r"group_size is 64 for old\.pt: its scales fit 32\n→ --group-size 32"),
        (None, {"group_size": -1}, r"group_size is -1 .* fit 32"),
        (None, {"group_size": 0}, r"group_size is 0: it must be a whole number, or -1"),
        (None, {"bits": 8}, r"bits is 8 for old\.pt: its weights have 4\n→ --bits 4"),
        (None, {"bits": 5}, r"bits is 5: it must be one of 2, 3, 4, 8"),
        (dropped(f"{DOWN}.qweight"), {}, r"has no model\.layers\.1\.mlp\.down_proj\.qweight: .* asks for 14"),
        (dropped(f"{Q}.scales"), {}, r"q_proj has no scales"),
        (dropped("model.norm.weight"), {}, r"model\.norm\.weight is missing from old\.pt"),
        (replaced("lm_head.weight", lambda t: t[:99]), {}, r"lm_head\.weight is \(99, 64\) in old\.pt: .*\(400, 64\)"),
        (
            replaced(f"{Q}.qweight", lambda t: t[:, :40]),
            {},
            r"q_proj\.qweight .* is \(8, 40\): .* 64 inputs and 64 out",
        ),
        (replaced(f"{Q}.qzeros", lambda t: t[:1]), {}, r"q_proj\.qzeros is \(1, 8\) int32: .* take \(2, 8\)"),
        (replaced(f"{Q}.scales", lambda t: t.to(torch.int32)), {}, r"q_proj\.scales is \(2, 64\) int32"),
        (replaced(f"{Q}.qweight", lambda t: t.float()), {}, r"q_proj\.qweight is \(8, 64\) float32: .* int32"),
        (replaced(f"{Q}.qzeros", lambda t: t | 15), {}, r"q_proj\.qzeros holds zero points that do not fit 4 bits"),
        (replaced(f"{Q}.g_idx", lambda t: t + 5), {}, r"q_proj\.g_idx .* one of 2 groups to each of 64 inputs"),
        (replaced(f"{Q}.bias", lambda t: torch.ones(64)), {}, r"holds .*q_proj\.bias, and the configuration has no"),
        (replaced("model.layers.2.x", lambda t: torch.ones(1)), {}, r"holds model\.layers\.2\.x, and"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(model, tmp_path, spoil, options, said):
    old = OldFile()
    if spoil is not None:
        spoil(old)
    path, out = old.save(tmp_path / "old.pt"), tmp_path / "out"
    with pytest.raises(KaniNbError, match=f"(?s){said}") as refused:
        convert_gptq_checkpoint(path, model, out, **{"group_size": 32} | options)
    assert len(str(refused.value)) < 400
    assert sorted(each.name for each in tmp_path.iterdir()) == ["old.pt"]


class Code:
    """What runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_asks_for_code_is_refused_and_runs_none(model, tmp_path):
    proof = tmp_path / "it ran"
    torch.save({"model.norm.weight": Code(f"touch {shlex.quote(str(proof))}")}, tmp_path / "evil.pt")
    said = r"evil\.pt asks for (posix|nt)\.system while it is read: .* it was not opened"
    with pytest.raises(ModelFilesError, match=said):
        convert_gptq_checkpoint(tmp_path / "evil.pt", model, tmp_path / "out")
    assert "was not opened" in str(refuse_or_explain(tmp_path / "evil.pt"))
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], "is damaged, cut off, or no checkpoint"),
        (lambda whole: b"just some words, and no checkpoint", "is damaged, cut off, or no checkpoint"),
        (lambda whole: b"", "is damaged, cut off, or no checkpoint"),
    ],
    ids=["cut off", "text", "empty"],
)
def test_a_file_that_is_no_whole_checkpoint_is_said_to_be_that(model, tmp_path, content, said):
    path = OldFile(layers=1).save(tmp_path / "old.pt")
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ModelFilesError, match=said):
        convert_gptq_checkpoint(path, model, tmp_path / "out", 32)


def test_what_is_no_gptq_checkpoint_and_what_is_no_model_folder_are_told_apart(model, tmp_path):
    torch.save({"model.norm.weight": torch.ones(4)}, tmp_path / "plain.pt")
    with pytest.raises(ModelFilesError, match=r"plain\.pt is no GPTQ checkpoint: it holds model\.norm\.weight"):
        convert_gptq_checkpoint(tmp_path / "plain.pt", model, tmp_path / "out")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelFilesError, match="it is no table of tensors"):
        convert_gptq_checkpoint(tmp_path / "list.pt", model, tmp_path / "out")
    with pytest.raises(ModelFilesError, match="there is no file"):
        convert_gptq_checkpoint(tmp_path / "none.pt", model, tmp_path / "out")
    with pytest.raises(ModelFilesError, match=r"has no config\.json"):
        convert_gptq_checkpoint(tmp_path / "plain.pt", tmp_path, tmp_path / "out")


def test_a_folder_that_is_quantized_already_or_not_empty_is_refused(model, tmp_path):
    path, out = OldFile().save(tmp_path / "old.pt"), tmp_path / "out"
    convert_gptq_checkpoint(path, model, out, 32)
    with pytest.raises(ConfigError, match=r"is quantized already: .* 'gptq'"):
        convert_gptq_checkpoint(path, out, tmp_path / "again", 32)
    with pytest.raises(ConfigError, match="is not empty"):
        convert_gptq_checkpoint(path, model, out, 32)


@pytest.mark.parametrize("how", [{}, {"group_size": 64, "bits": 3}, {"group_size": -1, "bits": 8}], ids=str)
def test_the_command_in_the_refusal_of_a_single_file_converts_it(model, tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    old = OldFile(**how)
    said = refuse_or_explain(old.save(Path("my llama 4bit.pt")))
    assert f"is an old GPTQ checkpoint ({old.bits} bits, " in said.what
    command = shlex.split(said.fix.partition(", where")[0].replace("FOLDER", str(model)))
    assert command[0] == "kani-nb"
    assert main(command[1:]) == 0
    assert_same_weights(Path("my llama 4bit"), old)
    assert capsys.readouterr().out.splitlines()[-1] == "in a notebook: %load_engine 'my llama 4bit'"
    assert main(command[1:]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_other_single_files_are_pointed_to_their_folder(tmp_path):
    torch.save({"model.norm.weight": torch.ones(4)}, tmp_path / "plain.pt")
    (tmp_path / "notes.txt").write_text("words")
    assert "is weights alone" in str(refuse_or_explain(tmp_path / "plain.pt"))
    assert f"name the folder of a model instead: {tmp_path}" in str(refuse_or_explain(tmp_path / "notes.txt"))


def test_what_gptq_needs_is_said_with_the_line_and_its_price(tmp_path, monkeypatch):
    from importlib.metadata import version

    from kani_nb.engines.huggingface.gptq import quantize_gptq

    lacking = needs_of("gptq")
    assert needs_of("none") is None
    said = str(lacking)
    assert "gptqmodel and optimum are not installed" in said
    assert 'pip install "gptqmodel>=7.7" "optimum>=2.3"' in said
    assert f"it replaces torch {version('torch')} by 2.14.1 or newer, 5.6 GB" in said
    with pytest.raises(MissingDependencyError, match="gptqmodel and optimum are not installed"):
        quantize_gptq(tmp_path, tmp_path / "out")
    for name, number, wants in (("gptqmodel", "7.7.0", "torch>=99.1"), ("optimum", "2.3.0", "torch")):
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\nRequires-Dist: {wants}\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"gptqmodel 7.7.0 needs torch>=99.1: torch is {version('torch')}" in str(needs_of("gptq"))
    assert isinstance(needs_of("gptq"), EngineError)
