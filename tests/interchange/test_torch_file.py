"""Reading PyTorch's files: every wrapped form, and what is refused without being opened."""

import argparse
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from dfkd_jax.interchange.torch_file import read_state_dict, read_weights
from dfkd_jax.runtime.errors import UserError

STATE_DICT = {
    "conv.weight": np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3),
    "bn.running_var": np.array([0.5, 2.0], np.float32),
    "bn.num_batches_tracked": np.array(7),
}


def assert_state_dict(found):
    assert found.keys() == STATE_DICT.keys()
    for name, array in found.items():
        assert array.dtype == STATE_DICT[name].dtype
        np.testing.assert_array_equal(array, STATE_DICT[name])


def refusal(file):
    """The one sentence, which names the file; reading it has left nothing behind."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:
        read_state_dict(file)
    assert sorted(file.parent.rglob("*")) == before
    sentence = str(caught.value)
    assert sentence.startswith(f"{file} ") and sentence.endswith(".") and "\n" not in sentence
    return sentence


NAMES = [{"conv.weight", "bn.running_var"}]


@pytest.mark.parametrize(
    "prefix", ["", "module.", "resnet.", "module.resnet.", "_orig_mod.module.", "my.own.backbone."]
)
def test_any_prefix_is_taken_off(prefix, tmp_path):
    file = tmp_path / "net.safetensors"
    save_file({prefix + name: array for name, array in STATE_DICT.items()}, file)
    found = read_weights(file, NAMES)
    assert_state_dict(found.arrays)
    assert found.place == ("", prefix) and found.left_out == ()


def test_what_stands_beside_the_network_is_left_out(tmp_path):
    """As a Lightning module has it, with the loss's own parameters."""
    file = tmp_path / "net.safetensors"
    wrapped = {f"model.{name}": array for name, array in STATE_DICT.items()}
    save_file({**wrapped, "criterion.weight": np.ones(2)}, file)
    found = read_weights(file, NAMES)
    assert_state_dict(found.arrays)
    assert found.left_out == ("criterion.weight",)


def test_a_network_that_is_there_twice_is_asked_for(tmp_path):
    file = tmp_path / "net.safetensors"
    averaged = {f"ema.{name}": np.asarray(array + 1) for name, array in STATE_DICT.items()}
    save_file({**averaged, **{f"net.{n}": a for n, a in STATE_DICT.items()}}, file)
    with pytest.raises(UserError, match=r"2 times, under .*'net\.'.*; choose one with --prefix\.$"):
        read_weights(file, NAMES)
    assert_state_dict(read_weights(file, NAMES, prefix="net.").arrays)
    other = read_weights(file, NAMES, prefix="ema.").arrays
    np.testing.assert_array_equal(other["conv.weight"], STATE_DICT["conv.weight"] + 1)


def test_a_copy_under_another_key_is_asked_for(tmp_path):
    """As timm keeps the moving average of the weights."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in STATE_DICT.items()}
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    file = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": tensors, "state_dict_ema": moved, "epoch": 3}, file)
    with pytest.raises(UserError, match=r"under 'state_dict: ', .*; choose one with --key\.$"):
        read_weights(file, NAMES)
    assert_state_dict(read_weights(file, NAMES, key="state_dict").arrays)
    with pytest.raises(UserError, match=r"--key is 'model'; .* under 'state_dict', 'state_"):
        read_weights(file, NAMES, key="model")


def test_half_precision_is_widened(tmp_path):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {"conv.weight": torch.ones(2, dtype=dtype), "bn.running_var": torch.ones(2)}
        torch.save(tensors, tmp_path / "half.pt")
        assert read_weights(tmp_path / "half.pt", NAMES).arrays["conv.weight"].dtype == np.float32


@pytest.mark.parametrize("name", ["NET.SAFETENSORS", "net.pt", "net"])
def test_a_safetensors_file_is_known_by_its_content(name, tmp_path):
    save_file(STATE_DICT, tmp_path / name)
    assert_state_dict(read_state_dict(tmp_path / name))


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def lying_zip(path):
    """Its directory declares an entry of a gigabyte."""
    write_zip(path, {"archive/data.pkl": b"x", "archive/data/0": b"12345678"})
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 2**30)
    path.write_bytes(content)


def compressed_zip(path):
    write_zip(path, {"archive/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED)


def half_a_zip(path):
    write_zip(path, {"archive/data.pkl": b"x" * 1000})
    path.write_bytes(path.read_bytes()[:600])


def flipped_zip(path):
    """One bit of what is stored is another."""
    write_zip(path, {"archive/data.pkl": b"x" * 1000})
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def header(description, length=None):
    text = json.dumps(description).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


GIANT = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
ALIEN = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}


def half_a_safetensors_file(path):
    save_file({"fc.weight": np.ones((20, 30), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


# None of these needs PyTorch to be refused.
BAD_FILES = {
    "missing.pt": (None, "No such file"),
    "lying.pt": (lying_zip, "declares 1,073,741,825 bytes"),
    "compressed.pth": (compressed_zip, "without compression"),
    "half.pt": (half_a_zip, "damaged"),
    "flipped.pt": (flipped_zip, "'archive/data.pkl' in it has another checksum"),
    "zip.safetensors": (flipped_zip, "another checksum"),
    "script.pt": (
        lambda p: write_zip(p, {"net/constants.pkl": b""}),
        "torch.jit.load('script.pt')",
    ),
    "empty.safetensors": (lambda p: p.write_bytes(b""), "past its end"),
    "text.safetensors": (lambda p: p.write_bytes(b"no checkpoint at all"), "past its end"),
    "long.safetensors": (lambda p: p.write_bytes(header({}, 2**62)), "past its end"),
    "giant.safetensors": (lambda p: p.write_bytes(header(GIANT)), "damaged"),
    "half.safetensors": (half_a_safetensors_file, "damaged"),
    "none.safetensors": (lambda p: p.write_bytes(header({})), "no state dict but empty"),
    "alien.safetensors": (lambda p: p.write_bytes(header(ALIEN) + b"0"), "damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_sentence(name, tmp_path):
    write, words = BAD_FILES[name]
    if write is not None:
        write(tmp_path / name)
    assert words in refusal(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "net.pt").mkdir()
    assert "is a folder; allowed is one file" in refusal(tmp_path / "net.pt")


@pytest.mark.parametrize("given", ["best model", "best model/data.pkl"])
def test_an_unzipped_archive_is_said_to_be_one_and_the_command_helps(given, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in STATE_DICT.items()}
    torch.save(tensors, tmp_path / "best model.pt")
    with zipfile.ZipFile(tmp_path / "best model.pt") as archive:
        archive.extractall(tmp_path)
    sentence = refusal(tmp_path / given)
    assert "is an unzipped archive of torch.save" in sentence and "damaged" not in sentence
    command, file = re.search(r"(cd .* && zip .*), and convert (\S+)\.$", sentence).groups()
    monkeypatch.chdir(tmp_path)  # a relative path is zipped all the same
    with pytest.raises(ValueError, match=re.escape(command)):
        read_state_dict(given)
    if shutil.which("zip") is None:
        pytest.skip("zip is not installed")
    subprocess.run(command, shell=True, check=True, cwd="/", stdout=subprocess.DEVNULL)
    assert_state_dict(read_state_dict(tmp_path / file))


def test_a_data_pkl_without_its_archive_is_no_unzipped_one(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "data.pkl").write_bytes(b"no pickle")
    assert "damaged" in refusal(tmp_path / "data.pkl")


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"anything")
    assert "not installed: pip install 'dfkd-jax[torch]'" in refusal(tmp_path / "x.pt")


WRAPPED = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best_acc1": 0.5},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    "net": lambda s: {"net": s, "acc": 94.0},
    "another key": lambda s: {"weights": s},
    "Lightning": lambda s: {
        "state_dict": {f"model.{name}": tensor for name, tensor in s.items()},
        "optimizer_states": [{"state": {0: {"momentum_buffer": s["conv.weight"]}}}],
        "pytorch-lightning_version": "2.0",
    },
    "with its optimizer": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"exp_avg": s["conv.weight"]}}, "param_groups": []},
    },
    "nested": lambda s: {"model": {"state_dict": s}},
    "module.": lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
    "resnet.": lambda s: {"net": {f"module.resnet.{name}": tensor for name, tensor in s.items()}},
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_wrapped_form(form, legacy, tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "net.pth"
    tensors = {name: torch.tensor(array) for name, array in STATE_DICT.items()}
    torch.save(WRAPPED[form](tensors), file, _use_new_zipfile_serialization=not legacy)
    assert_state_dict(read_weights(file, NAMES).arrays)


@pytest.mark.parametrize("name", ["net.safetensors", "net"])
def test_a_file_of_pytorch_is_known_by_its_content(name, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in STATE_DICT.items()}
    torch.save(tensors, tmp_path / name)
    assert_state_dict(read_state_dict(tmp_path / name))


def test_an_archive_without_checksums_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    serialization = torch.serialization
    tensors = {name: torch.tensor(array) for name, array in STATE_DICT.items()}
    serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "net.pt")
    finally:
        serialization.set_crc32_options(True)
    assert_state_dict(read_state_dict(tmp_path / "net.pt"))


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name, words",
    [
        ("module", ["Linear", "torch.save(model.state_dict(), 'weights.pt')"]),
        ("old_module", ["Linear", "torch.save(model.state_dict(), 'weights.pt')"]),
        ("script", ["TorchScript", "torch.jit.load"]),
        ("module_inside", ["Linear", "weights_only=False)['state_dict'], 'weights.pt')"]),
        ("arguments", ["argparse.Namespace", "torch.load('arguments.pt', weights_only=False)"]),
        ("bomb", ["mkdir", "not opened"]),
        ("pickle", ["damaged or no PyTorch checkpoint"]),
        ("text", ["damaged or no PyTorch checkpoint"]),
        ("half_old", ["damaged or no PyTorch checkpoint"]),
        ("list", ["no state dict but a list"]),
        ("nothing", ["no tensor at 'epoch'", "alone or in others"]),
        ("optimizer", ["the state of an optimizer"]),
        ("repeated", ["declares 10,000,000,000 numbers"]),
        ("sparse", ["no plain arrays"]),
    ],
)
def test_files_of_pytorch_that_are_refused(name, words, tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / f"{name}.pt"
    linear = torch.nn.Linear(2, 2)
    if name == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            torch.jit.script(linear).save(file)
    elif name == "pickle":
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    elif name == "text":
        file.write_bytes(b"no checkpoint at all")
    elif name == "half_old":
        torch.save(linear.state_dict(), file, _use_new_zipfile_serialization=False)
        file.write_bytes(file.read_bytes()[:300])
    else:
        contents = {
            "module": linear,
            "old_module": linear,
            "bomb": {"state_dict": Bomb(tmp_path / "ran")},
            "module_inside": {"state_dict": linear.state_dict(), "network": linear},
            "arguments": {"state_dict": linear.state_dict(), "args": argparse.Namespace(lr=1)},
            "list": [1, 2],
            "nothing": {"epoch": 3},
            "optimizer": torch.optim.SGD(linear.parameters(), 0.1).state_dict(),
            "repeated": {"fc.weight": torch.zeros(1).expand(100_000, 100_000)},
            "sparse": {"fc.weight": torch.zeros(2, 2).to_sparse()},
        }
        torch.save(contents[name], file, _use_new_zipfile_serialization=name != "old_module")
    sentence = refusal(file)
    assert all(word in sentence for word in words), sentence
