"""EfficientNet-Lite0, the compact model's image tower.

timm has this network, too. But importing timm loads all timm networks, torchvision and torch's
compiler. The import takes longer than embedding a hundred photos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

STEM_CHANNELS: Final = 32
"""Number of channels in the first convolution."""

N_FEATURES: Final = 1280
"""Number of features per image."""

N_CLASSES: Final = 1000
"""Number of classes in the classifier: ImageNet-1k's classes."""

BATCH_NORM_EPSILON: Final = 1e-3
"""Number added to the batch norms' variances, as in TensorFlow."""


@dataclass(frozen=True)
class Stage:
    """Blocks of equal width. The first block has stride ``stride``, all later blocks stride 1."""

    n_blocks: int
    kernel: int
    stride: int
    expansion: int  # number of channels inside a block, divided by the number at the beginning
    channels: int  # number of channels at a block's end


STAGES: Final = (
    Stage(n_blocks=1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(n_blocks=2, kernel=3, stride=2, expansion=6, channels=24),
    Stage(n_blocks=2, kernel=5, stride=2, expansion=6, channels=40),
    Stage(n_blocks=3, kernel=3, stride=2, expansion=6, channels=80),
    Stage(n_blocks=3, kernel=5, stride=1, expansion=6, channels=112),
    Stage(n_blocks=4, kernel=5, stride=2, expansion=6, channels=192),
    Stage(n_blocks=1, kernel=3, stride=1, expansion=6, channels=320),
)
"""EfficientNet-Lite0's stages (Tan and Le, 2019, table 1, without squeeze and excitation)."""


class Convolution(nn.Module):
    """A convolution with a batch norm, and with ReLU6 if ``has_activation``."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        has_activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        # Any, because ``merge_norm`` replaces the batch norm by an ``nn.Identity``
        self.norm: Any = nn.BatchNorm2d(channels_out, eps=BATCH_NORM_EPSILON)
        # With a kernel k and a stride s, TensorFlow pads an even side by k - s zeros in total. The
        # smaller half is put before the pixels. All sides are even here, because image sides are
        # multiples of 32.
        padding = kernel - stride
        before = padding // 2
        after = padding - before
        self.is_padding_symmetric = before == after
        if self.is_padding_symmetric:
            self.conv.padding = (before, before)
        self.padding_of_sides = (before, after, before, after)  # left, right, top, bottom
        self.has_activation = has_activation

    def forward(self, feature_maps: Tensor) -> Tensor:
        """Map channels (B, C_in, H, W) to channels (B, C, H / stride, W / stride)."""
        if not self.is_padding_symmetric:
            feature_maps = functional.pad(feature_maps, self.padding_of_sides)
        feature_maps = self.conv(feature_maps)
        feature_maps = self.norm(feature_maps)
        if self.has_activation:
            return functional.relu6(feature_maps, inplace=True)
        return feature_maps

    def merge_norm(self) -> None:
        """Multiply the batch norm into the weights. Outputs change only by rounding."""
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class InvertedResidual(nn.Module):
    """A block: expand the channels, filter each channel alone, and project to fewer channels."""

    def __init__(self, channels_in: int, stage: Stage, *, stride: int) -> None:
        super().__init__()
        inner_channels = channels_in * stage.expansion
        layers: list[nn.Module] = []
        if stage.expansion > 1:
            expansion = Convolution(channels_in, inner_channels)
            layers.append(expansion)
        depthwise = Convolution(
            inner_channels,
            inner_channels,
            kernel=stage.kernel,
            stride=stride,
            groups=inner_channels,
        )
        projection = Convolution(inner_channels, stage.channels, has_activation=False)
        layers += [depthwise, projection]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and channels_in == stage.channels

    def forward(self, feature_maps: Tensor) -> Tensor:
        """Map channels (B, C_in, H, W) to channels (B, C, H / stride, W / stride)."""
        output: Tensor = self.layers(feature_maps)
        if self.is_residual:
            return output + feature_maps
        return output


class EfficientNetLite0(nn.Module):
    """The network. It maps images (B, 3, H, W) to features (B, ``N_FEATURES``).

    H and W are multiples of 32. The classifier is not applied. It is a member, because the compact
    model uses the classifier's weights. The weights are in the order of the layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM_CHANNELS, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for number in range(stage.n_blocks):
                stride = stage.stride if number == 0 else 1
                block = InvertedResidual(channels, stage, stride=stride)
                blocks.append(block)
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.last = Convolution(channels, N_FEATURES)
        self.classifier = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features: the last channels, averaged over the positions."""
        channels = self.stem(images)
        channels = self.blocks(channels)
        channels = self.last(channels)
        means = functional.adaptive_avg_pool2d(channels, 1)
        return means.flatten(1)

    def merge_norms(self) -> None:
        """Multiply all batch norms into the convolutions' weights.

        An image then takes two thirds of the time, because no batch norm has to read and write the
        channels. The network can no longer be trained.
        """
        for module in self.modules():
            if isinstance(module, Convolution):
                module.merge_norm()
