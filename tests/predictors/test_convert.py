"""Test that checkpoints from the reference implementation are converted, or refused unexecuted."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError

DATA = Path(__file__).parents[1] / "data"


def checkpoint(path: Path, file: str, prefix: str) -> np.lib.npyio.NpzFile:
    """Write a checkpoint in the shape of a released one, numpy scalars included.

    Return the arrays that it was made from.
    """
    z = np.load(DATA / f"vilu_head_{file}.npz")
    state = {
        key.removeprefix(f"{prefix}/param/"): torch.tensor(z[key])
        for key in z
        if key.startswith(f"{prefix}/param/")
    }
    state["iteration_count"] = torch.tensor(1000)
    torch.save({"epoch": 3, "train_meter": {"auc": np.float64(0.9)}, "state_dict": state}, path)
    return z


@pytest.mark.parametrize("file", ["d24", "k100"])
@pytest.mark.parametrize("prefix", [f"attention{a}_caption{c}" for a in (0, 1) for c in (0, 1)])
def test_logits_are_reproduced(file: str, prefix: str, tmp_path: Path) -> None:
    z = checkpoint(tmp_path / "head.ckpt", file, prefix)
    scale, dim = float(z["logit_scale"]), z["image"].shape[1]
    predictor = vilu.convert_official(tmp_path / "head.ckpt", scale, embed_dim=dim)
    data = Embeddings(z["image"], z["text"], target=z["label"], logit_scale=scale)
    expected = 1 / (1 + np.exp(z[f"{prefix}/confidence_logit"].astype(np.float64)))
    # An error of 1e-5 in a logit moves a probability by at most a quarter of that.
    np.testing.assert_allclose(predictor.predict_uncertainty(data), expected, atol=2.5e-6)
    predictor.save(tmp_path / "predictor")
    assert np.array_equal(
        vilu.load(tmp_path / "predictor").predict_uncertainty(data),
        predictor.predict_uncertainty(data),
    )


def test_kind_of_head_is_read_off_the_weights(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.ckpt", "d24", "attention0_caption0")
    assert vilu.convert_official(tmp_path / "a.ckpt").name == "lvu"
    checkpoint(tmp_path / "b.ckpt", "d24", "attention1_caption0")
    converted = vilu.convert_official(tmp_path / "b.ckpt")
    assert (converted.attention, converted.predicted_caption, converted.hidden) == (
        "official",
        False,
        (16, 8),
    )


def test_projections_that_were_frozen_become_the_identity(tmp_path: Path) -> None:
    """The converted projections must be the identity.

    The reference passes embeddings by a frozen projection, while weight decay shrinks its weights.
    """
    z = checkpoint(tmp_path / "head.ckpt", "d24", "attention1_caption1")
    content = torch.load(tmp_path / "head.ckpt", weights_only=False)
    for name in ("in_proj_v.weight", "in_proj_t.weight"):
        content["state_dict"][name] = 0.0004 * torch.eye(24)
    torch.save(content, tmp_path / "frozen.ckpt")
    scale = float(z["logit_scale"])
    data = Embeddings(z["image"], z["text"], target=z["label"], logit_scale=scale)
    expected = z["attention1_caption1/confidence_logit_frozen_projections"].astype(np.float64)
    found = vilu.convert_official(tmp_path / "frozen.ckpt", scale).predict_uncertainty(data)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(expected)), atol=2.5e-6)


class Payload:
    """Touch a file when a pickle with this object is opened, as malicious code would."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("wrap", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, wrap: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = {"state_dict": {"mlp.0.weight": Payload(marker)}}
    if wrap == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(
        DataError, match=r"refused, nothing in it was executed: it asks for .*only tensors"
    ) as refused:
        vilu.convert_official(path)
    assert "weights_only" not in str(refused.value)  # torch advises this to have the file executed
    assert "load" not in str(refused.value)
    assert not marker.exists()
    # The payload is real: an unrestricted load would run it.
    torch.load(path, weights_only=False) if wrap == "torch" else pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"weight": torch.zeros(2)}}, "holds no multilayer perceptron"),
        ({"state_dict": 3}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        (
            {
                "mlp.0.weight": torch.zeros(4, 7),
                "mlp.0.bias": torch.zeros(4),
                "in_proj_t.weight": torch.eye(3),
            },
            "width 7",
        ),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match=message):
        vilu.convert_official(tmp_path / "other.ckpt")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        vilu.convert_official(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(DataError, match="refused"):
        vilu.convert_official(tmp_path / "text.ckpt")


@pytest.mark.data
def test_a_released_checkpoint(shared: Path) -> None:
    """The converted head must equal a plain evaluation of its layers.

    The checkpoint is visual-only, with D = 512 and hidden (512, 256, 128).
    """
    path = shared / "golden" / "lvu_cifar10.ckpt"
    predictor = vilu.convert_official(path)
    assert (predictor.name, predictor.hidden, predictor.space_.embed_dim) == (
        "lvu",
        (512, 256, 128),
        512,
    )
    scalar = np.float64(0).__reduce__()[0]
    with torch.serialization.safe_globals(
        [(scalar, "numpy._core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
    ):
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(32, 512, generator=generator), dim=1)
    hidden = image.double()
    for layer in (0, 2, 4, 6):
        hidden = (
            hidden @ weights[f"mlp.{layer}.weight"].double().T
            + weights[f"mlp.{layer}.bias"].double()
        )
        hidden = hidden.relu() if layer < 6 else hidden
    expected = torch.sigmoid(-hidden.squeeze(1)).numpy()
    found = predictor.predict_uncertainty(Embeddings(image, image[:3], target=None))
    np.testing.assert_allclose(found, expected, atol=2.5e-6)
