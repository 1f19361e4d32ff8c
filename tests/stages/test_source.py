"""Loading a user's model: factories, checkpoints, .pt2, names, and what goes wrong with them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from deploykit.errors import InputError, ModelError, UnknownName
from deploykit.source_spec import parse
from deploykit.stages.source import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_factory.py"

TWO = """
import torch
from torch import nn
import sizes_of_two

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(10, sizes_of_two.WIDTH)
        self.l = nn.Linear(6, sizes_of_two.WIDTH)
    def forward(self, a, ids):
        y = self.l(a) + self.e(ids).mean(1)
        return {"y": y, "nothing": None, "z": y.sum(1)}

def make():
    net = Two()
    net.example_inputs = {"a": torch.randn(4, 6), "ids": torch.randint(0, 10, (4, 3))}
    return net
"""


@pytest.fixture
def two(tmp_path: Path) -> str:
    (tmp_path / "sizes_of_two.py").write_text("WIDTH = 5\n")
    (tmp_path / "two.py").write_text(TWO)
    return f"{tmp_path / 'two.py'}:make"


def test_the_example_factory_says_everything_itself() -> None:
    source = load(parse(f"{EXAMPLE}:make", num_classes=4))
    assert [str(s) for s in source.signature.inputs] == ["x:float32:batchx3x32x32"]
    assert [str(s) for s in source.signature.outputs] == ["logits:float32:batchx4"]
    assert source.preprocess is not None
    assert source.preprocess.crop == 32
    again = load(parse(f"{EXAMPLE}:make", num_classes=4))
    assert torch.equal(source.run(source.example)["logits"], again.run(again.example)["logits"])


def test_inputs_outputs_and_local_files_of_a_factory(two: str) -> None:
    source = load(parse(two))
    assert [str(s) for s in source.signature.inputs] == ["a:float32:batchx6", "ids:int64:batchx3"]
    assert [str(s) for s in source.signature.outputs] == ["y:float32:batchx5", "z:float32:batch"]
    assert set(source.local_files) == {"two.py", "sizes_of_two.py"}
    assert source.feeds(7)["ids"].shape == (7, 3)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def make(): return 3", "returned a int"),
        ("def make(): raise ValueError('no such luck')", "no such luck"),
        ("import nothing_like_it\ndef make(): ...", "nothing_like_it"),
        ("def other(): ...", "no function 'make'"),
    ],
)
def test_a_broken_factory_is_one_clear_error(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(ModelError) as caught:
        load(parse(f"{tmp_path / 'broken.py'}:make"))
    assert said in str(caught.value)


def test_without_an_input_the_error_says_to_give_one(tmp_path: Path) -> None:
    (tmp_path / "mlp.py").write_text("from torch import nn\ndef make(): return nn.Linear(4, 2)")
    with pytest.raises(ModelError, match="--input"):
        load(parse(f"{tmp_path / 'mlp.py'}:make"))
    source = load(parse(f"{tmp_path / 'mlp.py'}:make", inputs=("input:float32:batchx4",)))
    assert source.signature.outputs[0].shape == ("batch", 2)
    with pytest.raises(InputError, match="no such parameter"):
        load(parse(f"{tmp_path / 'mlp.py'}:make", inputs=("x:float32:batchx4",)))


def _tiny(classes: int = 4) -> nn.Module:
    return load(parse(f"{EXAMPLE}:make", num_classes=classes)).module


def _with(path: Path) -> nn.Module:
    return load(parse(f"{EXAMPLE}:make", num_classes=4, weights=str(path))).module


def test_checkpoints_are_unwrapped_and_loaded(tmp_path: Path) -> None:
    state = {k: v + 1 if v.is_floating_point() else v for k, v in _tiny().state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "a.pt")
    assert torch.equal(_with(tmp_path / "a.pt").state_dict()["head.bias"], state["head.bias"])


def test_other_names_are_matched_by_order_and_noted(tmp_path: Path) -> None:
    state = _tiny().state_dict()
    torch.save({f"other{i}": v + 1 for i, v in enumerate(state.values())}, tmp_path / "a.pt")
    source = load(parse(f"{EXAMPLE}:make", num_classes=4, weights=str(tmp_path / "a.pt")))
    assert "matched by order" in " ".join(source.notes)
    assert torch.equal(source.module.state_dict()["head.bias"], state["head.bias"] + 1)


def test_a_checkpoint_of_another_model_lists_mismatches(tmp_path: Path) -> None:
    torch.save(_tiny(7).state_dict(), tmp_path / "seven.pt")
    with pytest.raises(ModelError, match="--num-classes 7"):
        _with(tmp_path / "seven.pt")
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ModelError, match="missing in the file"):
        _with(tmp_path / "linear.pt")


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": _Evil(mark)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Evil(mark)))
    torch.save(_tiny(), tmp_path / "whole.pt")
    for name in ("evil.pt", "plain.pth", "whole.pt"):
        with pytest.raises(ModelError) as caught:
            _with(tmp_path / name)
        assert "safetensors" in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_checkpoints_are_named(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(_tiny().state_dict(), path)  # type: ignore[operator]
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"hello world"):
        path.write_bytes(data)
        with pytest.raises(ModelError):
            _with(path)


def test_pt2_takes_its_inputs_by_name(tmp_path: Path, two: str) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    dim = torch.export.Dim("b", min=1, max=9)
    program = torch.export.export(
        Net().eval(), (torch.randn(2, 3),), {"y": torch.randn(2, 3)}, dynamic_shapes={"x": {0: dim}, "y": {0: dim}}
    )
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    source = load(parse(str(path)))
    assert [str(s) for s in source.signature.inputs] == ["x:float32:batchx3", "y:float32:batchx3"]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ModelError, match="truncated"):
        load(parse(str(path)))


def test_unknown_names_get_the_closest_one() -> None:
    with pytest.raises(UnknownName, match="resnet18"):
        load(parse("resnet81", weights="none"))
    with pytest.raises(UnknownName, match="mobilenetv2_1"):
        load(parse("timm:mobilenetv2_10", weights="none"))


def test_a_detection_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="backbone"):
        load(parse("fasterrcnn_resnet50_fpn", weights="none"))
