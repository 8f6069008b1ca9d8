"""Models that mace converted to the layers of an accelerator are refused in one sentence that says the way back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import forcetune
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from models import make_mace
from systems import cluster, frames_of, write_labelled
from terminal import Command


@pytest.fixture(params=["cuequivariance_torch.operations.linear", "openequivariance.implementations.TensorProduct"])
def converted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A model with a layer of a package that need not be installed."""
    parts = request.param.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    layer = type("Linear", (nn.Module,), {"__module__": request.param})
    setattr(sys.modules[request.param], "Linear", layer)  # noqa: B010
    model = make_mace(elements=(1, 6, 8))
    made = layer()
    made.weight = nn.Parameter(torch.zeros(24))
    model.get_submodule("node_embedding")._modules["linear"] = made
    yield model


def way_back(model: nn.Module) -> tuple[str, str, str]:
    module = type(model.get_submodule("node_embedding.linear")).__module__
    if module.startswith("cue"):
        return "cuEquivariance", "mace_cueq_to_e3nn", "convert_cueq_e3nn"
    return "OpenEquivariance", "python -m mace.cli.convert_oeq_e3nn", "convert_oeq_e3nn"


@pytest.mark.parametrize("trust", [False, True])
def test_a_file_is_refused_whether_it_is_trusted_or_not(
    converted: nn.Module, tmp_path: Path, command: Command, trust: bool
) -> None:
    path = tmp_path / "fast.model"
    torch.save(converted, path)
    name, back, _ = way_back(converted)
    data = write_labelled(tmp_path / "a.xyz", 4)
    words = ["--trust"] if trust else []
    commands = (
        ("evaluate", path, data),
        ("methods", "--model", path),
        ("fit", data, "--model", path, "--valid", 2, "--epochs", 1, "--out", tmp_path / "run"),
    )
    for arguments in commands:
        code, _, err = command(*arguments, *words)
        assert code == 2
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert f"was converted to {name}" in line
        assert f"`{back} {path} --return_model --output_model plain.model`" in line
        assert f"writes {tmp_path / 'fast.plain.model'}" in line and "Traceback" not in err
        assert "--trust" not in line and line.endswith("use that file.") and line.count(". ") == 0
    assert not (tmp_path / "run").exists()


def test_a_module_is_refused(converted: nn.Module) -> None:
    name, _, module = way_back(converted)
    with pytest.raises(InputError, match=rf"converted to {name}.*mace\.cli\.{module}\.run\(model, return_model=True\)"):
        MaceBackbone.from_module(converted)


def test_a_genuine_conversion_and_the_way_back(tmp_path: Path) -> None:
    pytest.importorskip("cuequivariance_torch")
    from mace.cli.convert_cueq_e3nn import run as to_e3nn
    from mace.cli.convert_e3nn_cueq import run as to_cueq

    plain = make_mace(elements=(1, 6, 8))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.save(to_cueq(plain, device="cpu", return_model=True), tmp_path / "fast.model")
        for trust in (False, True):
            with pytest.raises(InputError, match="mace_cueq_to_e3nn"):
                forcetune.load(tmp_path / "fast.model", trust=trust)
        to_e3nn(str(tmp_path / "fast.model"), "plain.model", device="cpu", return_model=False)
    finally:
        torch.set_default_dtype(before)
    models = (MaceBackbone.from_module(plain), forcetune.load(tmp_path / "fast.plain.model"))
    one, other = (predict(model, build_graphs(model, frames_of(cluster((1, 6, 8))))) for model in models)
    np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=1e-12)
