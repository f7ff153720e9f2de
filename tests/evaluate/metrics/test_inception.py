"""FID's Inception against PyTorch's layers under pytorch-fid's names, with random weights; strict reading."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emu_jax.errors import UserError
from emu_jax.evaluate.metrics import inception


class Conv(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, i: int, o: int, size: int | tuple[int, int], stride: int = 1, padding: int | tuple = 0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Layers by name, and how they are wired: every branch a chain of names or, at its end, of forks."""

    def __init__(self, wiring: list[list], pool=None, **layers: Conv):
        super().__init__()
        self.wiring, self.pool = wiring, pool
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        ends = []
        for chain in self.wiring:
            y = x
            for step in chain:
                if step == "pool":
                    y = self.pool(y)
                elif isinstance(step, tuple):
                    y = torch.cat([getattr(self, fork)(y) for fork in step], 1)
                else:
                    y = getattr(self, step)(y)
            ends.append(y)
        return torch.cat(ends, 1)


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def reduce(x):
    return F.max_pool2d(x, 3, stride=2)


def block_a(i: int, pool: int) -> Block:
    return Block(
        [
            ["branch1x1"],
            ["branch5x5_1", "branch5x5_2"],
            ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
            ["pool", "branch_pool"],
        ],
        average,
        branch1x1=Conv(i, 64, 1),
        branch5x5_1=Conv(i, 48, 1),
        branch5x5_2=Conv(48, 64, 5, padding=2),
        branch3x3dbl_1=Conv(i, 64, 1),
        branch3x3dbl_2=Conv(64, 96, 3, padding=1),
        branch3x3dbl_3=Conv(96, 96, 3, padding=1),
        branch_pool=Conv(i, pool, 1),
    )


def block_b(i: int) -> Block:
    return Block(
        [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["pool"]],
        reduce,
        branch3x3=Conv(i, 384, 3, 2),
        branch3x3dbl_1=Conv(i, 64, 1),
        branch3x3dbl_2=Conv(64, 96, 3, padding=1),
        branch3x3dbl_3=Conv(96, 96, 3, 2),
    )


def block_c(i: int, c: int) -> Block:
    wide, tall = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
    return Block(
        [
            ["branch1x1"],
            [f"branch7x7_{n}" for n in (1, 2, 3)],
            [f"branch7x7dbl_{n}" for n in (1, 2, 3, 4, 5)],
            ["pool", "branch_pool"],
        ],
        average,
        branch1x1=Conv(i, 192, 1),
        branch7x7_1=Conv(i, c, 1),
        branch7x7_2=Conv(c, c, **wide),
        branch7x7_3=Conv(c, 192, **tall),
        branch7x7dbl_1=Conv(i, c, 1),
        branch7x7dbl_2=Conv(c, c, **tall),
        branch7x7dbl_3=Conv(c, c, **wide),
        branch7x7dbl_4=Conv(c, c, **tall),
        branch7x7dbl_5=Conv(c, 192, **wide),
        branch_pool=Conv(i, 192, 1),
    )


def block_d(i: int) -> Block:
    return Block(
        [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{n}" for n in (1, 2, 3, 4)], ["pool"]],
        reduce,
        branch3x3_1=Conv(i, 192, 1),
        branch3x3_2=Conv(192, 320, 3, 2),
        branch7x7x3_1=Conv(i, 192, 1),
        branch7x7x3_2=Conv(192, 192, (1, 7), padding=(0, 3)),
        branch7x7x3_3=Conv(192, 192, (7, 1), padding=(3, 0)),
        branch7x7x3_4=Conv(192, 192, 3, 2),
    )


def block_e(i: int, pool) -> Block:
    return Block(
        [
            ["branch1x1"],
            ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
            ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
            ["pool", "branch_pool"],
        ],
        pool,
        branch1x1=Conv(i, 320, 1),
        branch3x3_1=Conv(i, 384, 1),
        branch3x3_2a=Conv(384, 384, (1, 3), padding=(0, 1)),
        branch3x3_2b=Conv(384, 384, (3, 1), padding=(1, 0)),
        branch3x3dbl_1=Conv(i, 448, 1),
        branch3x3dbl_2=Conv(448, 384, 3, padding=1),
        branch3x3dbl_3a=Conv(384, 384, (1, 3), padding=(0, 1)),
        branch3x3dbl_3b=Conv(384, 384, (3, 1), padding=(1, 0)),
        branch_pool=Conv(i, 192, 1),
    )


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels):
        """uint8 [N, H, W, 3] -> [N, 2048]."""
        x = pixels.permute(0, 3, 1, 2).float() / 255
        x = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
        x = reduce(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = reduce(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for number, letters in (("5", "bcd"), ("6", "abcde"), ("7", "abc")):
            for letter in letters:
                x = getattr(self, f"Mixed_{number}{letter}")(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


@pytest.fixture(scope="module")
def network() -> Inception:
    """Weights that keep activations alive through all blocks, and batch norms that do something."""
    torch.manual_seed(0)
    model = Inception().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return model


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_features_are_pytorchs(network, file):
    """An image scaled up, one scaled down and one of neither side's size."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, np.uint8) for shape in ((32, 32, 3), (401, 380, 3), (64, 310, 3))]
    features = inception.features(inception.load(file), images, batch=2)
    with torch.inference_mode():
        expected = np.concatenate([network(torch.from_numpy(image)[None]).numpy() for image in images])
    assert features.shape == (3, 2048) and features.dtype == np.float32
    assert (expected.std(0) > 0).mean() > 0.5, "the images are not told apart; the comparison would show nothing"
    error = np.abs(features - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"off by {error:.1e} of the largest feature, expected below 1e-4"


def test_layers_are_all_of_pytorchs(network):
    expected = {
        name.removesuffix(".conv.weight"): tuple(v.shape) for name, v in network.state_dict().items() if v.ndim == 4
    }
    assert expected == inception.layers()


def test_reading_is_strict(network, tmp_path):
    state = network.state_dict()
    path = tmp_path / "weights.pth"
    state["AuxLogits.fc.weight"] = torch.zeros(3)
    state["fc.bias"] = torch.zeros(1000)
    del state["Mixed_7c.branch_pool.bn.running_var"]
    torch.save(state, path)
    with pytest.raises(UserError) as error:
        inception.load(path)
    message = str(error.value)
    expected = (
        "Mixed_7c.branch_pool.bn.running_var is missing",
        "fc.bias is [1000], not [1008]",
        "AuxLogits.fc.weight is unknown",
        "expected pytorch-fid's pt_inception-2015-12-05-6726825d.pth",
    )
    assert all(words in message for words in expected) and "\n" not in message, message


def test_batch_norms_counters_may_be_absent(network, file, tmp_path):
    """Files of before PyTorch 0.4.1, as pytorch-fid's, have none."""
    state = {name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(state, tmp_path / "old.pth")
    old, new = inception.load(tmp_path / "old.pth"), inception.load(file)
    assert all(np.array_equal(old[name][part], new[name][part]) for name in new for part in (0, 1))


def test_no_images(file):
    with pytest.raises(UserError, match="no images"):
        inception.features({}, [])
