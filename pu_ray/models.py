"""Networks by name, safely loaded weights, and taps on a teacher's stages.

Axes: N images, C channels, H, W; D feature width, the sum of the stages' channels; K classes; S tokens.
"""

from __future__ import annotations

import io
import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pu_ray.config import JobConfig, NetworkConfig, PreprocessingConfig, TeacherConfig
from pu_ray.errors import ConfigError, DataError
from pu_ray.storage import Storage

# -- CIFAR-style residual networks -------------------------------------------------------------------------

# Blocks per stage. Three stages: He et al. 2016, section 4.2 (6n+2 layers); four: the ImageNet nets with a 3x3 stem.
_CIFAR_BLOCKS: Mapping[int, tuple[int, ...]] = {
    8: (1, 1, 1),
    14: (2, 2, 2),
    20: (3, 3, 3),
    32: (5, 5, 5),
    56: (9, 9, 9),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
}
_CIFAR_NAME = re.compile(r"cifar/resnet(?P<depth>\d+)-w(?P<width>\d+)")


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x_NCHW))


class CifarResNet(nn.Module):
    """Residual network for small images: a 3x3 stem without pooling, channels doubling per stage.

    Args:
        depth: 8, 14, 20, 32 or 56 (three stages), 18 or 34 (four stages).
        width: Channels of the first stage.
        classes: Number of logits.
        in_channels: 1 or 3.
    """

    def __init__(self, depth: int, width: int, classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        channels = width
        self.stage_names = []
        for index, blocks in enumerate(_CIFAR_BLOCKS[depth]):
            out_channels = width * 2**index
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                layers[str(block)] = _BasicBlock(channels, out_channels, stride)
                channels = out_channels
            self.add_module(f"layer{index + 1}", nn.Sequential(layers))
            self.stage_names.append(f"layer{index + 1}")
        self.head = nn.Linear(channels, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        x_NCHW = self.stem(x_NCHW)
        for name in self.stage_names:
            x_NCHW = getattr(self, name)(x_NCHW)
        return cast(Tensor, self.head(x_NCHW.mean(dim=(2, 3))))


# -- factory -----------------------------------------------------------------------------------------------


def build(network: NetworkConfig, classes: int, in_channels: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        network: `cifar/resnet{depth}-w{width}`, `torchvision/{name}`, `timm/{name}`; a bare name is torchvision's.
        classes: Number of logits.
        in_channels: 1 or 3; torchvision's networks take 3 only.

    Raises:
        ConfigError: Unknown name, or options the factory refuses.
    """
    name = network.architecture
    try:
        if match := _CIFAR_NAME.fullmatch(name):
            depth, width = int(match["depth"]), int(match["width"])
            if depth in _CIFAR_BLOCKS and width > 0:
                return CifarResNet(depth, width, classes, in_channels, **cast(Any, network.options))
        elif name.startswith("timm/"):
            import timm

            if timm.is_model(name.removeprefix("timm/")):
                options: dict[str, Any] = {"num_classes": classes, "in_chans": in_channels, **network.options}
                return timm.create_model(name.removeprefix("timm/"), pretrained=False, **options)
        else:
            from torchvision import models as torchvision_models

            plain = name.removeprefix("torchvision/")
            if plain in torchvision_models.list_models(module=torchvision_models):
                if in_channels != 3:
                    raise ConfigError(
                        "torchvision's networks take colour images",
                        where="preprocessing.channels",
                        allowed="3",
                        got=str(in_channels),
                        hint="set channels to 3 (grey images are repeated), or use a timm/ or cifar/ network",
                    )
                options = {"num_classes": classes, "weights": None, **network.options}
                return cast(nn.Module, torchvision_models.get_model(plain, **options))
    except TypeError as error:
        raise ConfigError(
            "the network refuses these options", where=name, got=str(dict(network.options)), hint=str(error)
        ) from error
    raise ConfigError(
        "unknown network",
        where="architecture",
        allowed=f"cifar/resnet{{{','.join(map(str, sorted(_CIFAR_BLOCKS)))}}}-w{{width}}, torchvision/NAME, timm/NAME",
        got=name,
    )


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, buffers excluded."""
    return sum(parameter.numel() for parameter in module.parameters())


# -- weights -----------------------------------------------------------------------------------------------


def read_classes(uri: str) -> list[str]:
    """Class names in the order of the logits, from a text file with one per line.

    Raises:
        DataError: Missing, fewer than two names, or a name twice.
    """
    folder, name = Storage(uri).split()
    classes = [line.strip() for line in folder.read_text(name).splitlines() if line.strip()]
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise DataError(
            "the class list is not usable",
            where=uri,
            allowed="two or more different names, one per line",
            got=str(classes[:20]),
        )
    return classes


def load_weights(module: nn.Module, uri: str) -> None:
    """Load a state dict without unpickling anything but tensors.

    Raises:
        DataError: Missing, unsafe, or not this network's weights; names the first differences.
    """
    folder, name = Storage(uri).split()
    content = folder.read_bytes(name)
    if name.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            state = load(content)
        except SafetensorError as error:
            raise DataError("not a safetensors file", where=uri, got=str(error)) from error
    else:
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; all mean that the file cannot be trusted or read
            raise DataError(
                "the weights cannot be loaded safely",
                where=uri,
                allowed="a .safetensors file, or a .pth that holds a plain state dict",
                got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                hint="save the state dict with safetensors.torch.save_file",
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise DataError("not a plain state dict", where=uri, allowed="a mapping of names to tensors")
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key}: {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise DataError(
            "the weights do not belong to this network",
            where=uri,
            got="; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""),
            hint="check architecture, its options, the class list and preprocessing.channels",
        )
    module.load_state_dict(state)


def save_weights(module: nn.Module) -> bytes:
    """The state dict as safetensors bytes."""
    from safetensors.torch import save

    return save({key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()})


# -- the frozen teacher ------------------------------------------------------------------------------------

_GATE_GRID = 4


class Teacher(nn.Module):
    """A trained network that cannot be trained again: frozen, and always in eval mode.

    `forward` takes normalised images [N, C, H, W] and returns the multi-scale features [N, D], each stage's
    output averaged over space (or tokens), and the logits [N, K] (paper, section 3.1).
    """

    def __init__(self, network: nn.Module, stages: Sequence[str] | None = None) -> None:
        super().__init__()
        self.tapped = TappedNetwork(network, stages)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever is asked."""
        return self

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and logits [N, K]."""
        return cast(tuple[Tensor, Tensor], self.tapped(x_NCHW))


@dataclass(frozen=True)
class _Layout:
    """How a network's activations lie in memory.

    Attributes:
        channels_last: Whether those of four axes are [N, H, W, C].
        prefix_tokens: How many of the first of S tokens stand for the whole image and not for a patch of it.
    """

    channels_last: bool
    prefix_tokens: int

    @classmethod
    def of(cls, network: nn.Module) -> _Layout:
        """What is known of this network's class; otherwise [N, C, H, W], and only patches."""
        # timm's word for it; torchvision's Swin has none.
        fmt = str(getattr(network, "output_fmt", "NCHW"))
        channels_last = fmt.endswith("NHWC") or _is_a(network, _CHANNELS_LAST_CLASSES)
        # timm counts them; torchvision has the class token alone.
        prefix = int(getattr(network, "num_prefix_tokens", 1)) if _is_a(network, _PREFIX_CLASSES) else 0
        return cls(channels_last, prefix)

    def pool(self, output: Tensor) -> Tensor:
        """The average over space or over the patches' tokens [N, C]; an output of two axes as it is."""
        if output.ndim == 4:
            return output.mean(dim=(1, 2) if self.channels_last else (2, 3))
        return output[:, self.prefix_tokens :].mean(dim=1) if output.ndim == 3 else output

    def grid(self, output: Tensor) -> Tensor:
        """Averages over the cells of a grid of about `_GATE_GRID` x `_GATE_GRID`, [N, G]; tokens as a whole."""
        if output.ndim != 4:
            return self.pool(output)
        x_NCHW = output.permute(0, 3, 1, 2) if self.channels_last else output
        cell = [max(1, size // _GATE_GRID) for size in x_NCHW.shape[2:]]
        return functional.avg_pool2d(x_NCHW, cell).flatten(1)

    def resolution(self, output: Tensor) -> tuple[int, ...]:
        """Height and width, or the number of tokens."""
        return tuple(output.shape[2:] if output.ndim == 4 and not self.channels_last else output.shape[1:-1])


# By name, so that a network of one library does not import the other. CaiT and XCiT count a class token that their
# blocks do not have, so that the count alone is not enough.
_CHANNELS_LAST_CLASSES = frozenset(("SwinTransformer",))
_PREFIX_CLASSES = frozenset(("VisionTransformer", "Eva", "Beit"))


def _is_a(network: nn.Module, names: frozenset[str]) -> bool:
    return not names.isdisjoint(kind.__name__ for kind in type(network).__mro__)


class TappedNetwork(nn.Module):
    """A network whose stages are observed on the way to its logits.

    Any module works whose forward pass calls each stage once and whose stages give one tensor each: [N, C, H, W]
    ([N, H, W, C] if the network has an attribute `output_fmt = "NHWC"`), tokens [N, S, C], or [N, C]. Space and tokens
    are averaged, without the class token and the registers where their place is known: in ViT, DeiT,
    EVA and BEiT of timm, and in torchvision's ViT. Other networks' tokens are averaged as they are.

    Args:
        network: The network.
        stages: Names of its modules, early to late; otherwise `find_stages` is asked.

    Raises:
        ConfigError: There are no such modules, or no stages are found.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str] | None = None) -> None:
        super().__init__()
        self.network = network
        self.stages = tuple(stages) if stages is not None else find_stages(network)
        modules = dict(network.named_modules())
        missing = [name for name in self.stages if name not in modules]
        if missing or not self.stages:
            raise ConfigError(
                "the network has no such module",
                where="teacher.stages",
                allowed=", ".join(name for name, _ in network.named_children()),
                got=", ".join(missing) or "none",
            )
        self.layout = _Layout.of(network)
        self._taps: dict[str, Any] = {}
        for name in self.stages:
            modules[name].register_forward_hook(self._observe(name))

    def _observe(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._taps[name] = output

        return hook

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and logits [N, K]."""
        pooled, logits_NK, _ = self.observe(x_NCHW)
        return torch.cat(pooled, dim=1), logits_NK

    def observe(self, x_NCHW: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Pooled features of each stage, logits [N, K], and each stage's output as it is.

        Raises:
            ConfigError: A stage took no part in the forward pass, or gave something else than one tensor.
        """
        logits_NK = self.network(x_NCHW)
        outputs = [self._taps.get(name) for name in self.stages]
        self._taps.clear()
        for name, output in zip(self.stages, outputs, strict=True):
            if not isinstance(output, Tensor):
                raise ConfigError(
                    "a stage gives no tensor",
                    where="teacher.stages",
                    allowed="modules that the forward pass calls, with one tensor as output",
                    got=f"{type(output).__name__} from {name}" if output is not None else f"nothing from {name}",
                )
        tensors = cast(list[Tensor], outputs)
        return [self.layout.pool(output) for output in tensors], logits_NK, tensors


class StagedTeacher(nn.Module):
    """The frozen teacher with a seam: what comes before the cascade's gate, and what comes after.

    Args:
        teacher: The whole.
        early: How many stages come before the gate.

    Raises:
        ConfigError: There are no stages left for after it.
    """

    def __init__(self, teacher: Teacher, early: int) -> None:
        super().__init__()
        stages = teacher.tapped.stages
        if not 0 < early < len(stages):
            raise ConfigError(
                "the gate must leave some stages to spare",
                where="features.cascade_stages",
                allowed=f"1 to {len(stages) - 1}, for the stages {', '.join(stages)}",
                got=str(early),
            )
        self.teacher = teacher
        self._early = early

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Early features [N, D'], the gate's inputs [N, G], the last early activation, late features [N, D''], logits.

        The gate gets the activation averaged over a coarse grid: early features are local, and where they lie tells
        more than their mean (docs/LOG.md).
        """
        tapped = self.teacher.tapped
        pooled, logits_NK, outputs = tapped.observe(x_NCHW)
        early, late = pooled[: self._early], pooled[self._early :]
        activation = outputs[self._early - 1]
        gate_NG = tapped.layout.grid(activation)
        return torch.cat(early, dim=1), gate_NG, activation, torch.cat(late, dim=1), logits_NK


class LateStages(nn.Module):
    """The features after the seam, computed from the images: for networks whose graph is not cut."""

    def __init__(self, teacher: Teacher, early: int) -> None:
        super().__init__()
        self.staged = StagedTeacher(teacher, early)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Late features [N, D''] and logits [N, K]."""
        *_, late_ND, logits_NK = self.staged(x_NCHW)
        return late_ND, logits_NK


class EarlyStages(nn.Module):
    """The first stages of a teacher and nothing after them.

    Raises:
        ConfigError: The network cannot be traced, so that its late stages cannot be left out.
    """

    def __init__(self, teacher: Teacher, early: int) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        tapped = teacher.tapped
        names = tapped.stages[:early]
        try:
            self.network: nn.Module = create_feature_extractor(tapped.network, return_nodes=list(names))
        except Exception as error:  # torch.fx raises whatever the network's own code raises while it is traced
            raise ConfigError(
                "the late stages of this network cannot be left out",
                where="features.cascade",
                got=str(error).partition("\n")[0],
                hint="set features.engine to onnx, or features.cascade to false",
            ) from error
        self._names = names
        self._layout = tapped.layout

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D'] and the gate's inputs [N, G], as `StagedTeacher` gives them."""
        outputs = self.network(x_NCHW)
        pooled = [self._layout.pool(outputs[name]) for name in self._names]
        return torch.cat(pooled, dim=1), self._layout.grid(outputs[self._names[-1]])


_MOST_STAGES = 4
# Where networks keep the modules that an image passes one after the other: torchvision's families (`features`:
# MobileNet, EfficientNet, ConvNeXt, DenseNet, VGG, Swin; `trunk_output`: RegNet; `layers`: MNASNet; `blocks`: MaxViT),
# and whoever writes networks as they do.
_TRUNKS = ("features", "trunk_output", "layers", "blocks")
# Small, so that the probe takes milliseconds, and large enough to be halved five times; then what MaxViT wants.
_PROBE_SIDES_PX = (64, 224)


def find_stages(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules after which the resolution changes, early to late.

    In this order: what the network itself says (`stage_names`); `layer1` to `layer4`, as in every ResNet; timm's
    `feature_info`; `stage1` and following; and a trunk of modules in a row, in which a forward pass with a small image
    shows where the resolution falls. Of the trunk it takes the last module of each resolution, at most the last four
    resolutions, so that a stem is left out; one at which nothing has parameters (VGG's last pooling) does not count.
    Transformers of one resolution give four blocks evenly spread, the last among them, in timm as in torchvision.

    The network is left as it was: parameters, buffers, hooks, and the mode of every module.

    Raises:
        ConfigError: An unknown structure; `teacher.stages` must name them.
    """
    if names := getattr(network, "stage_names", None):
        return tuple(names)
    children = dict(network.named_children())
    resnet = tuple(name for name in ("layer1", "layer2", "layer3", "layer4") if name in children)
    if len(resnet) >= 3:
        return resnet
    if info := getattr(network, "feature_info", None):  # timm
        modules = [str(entry["module"]) for entry in info]
        return _spread(modules) if len({entry.get("reduction") for entry in info}) == 1 else tuple(modules)
    numbered = tuple(name for name in children if re.fullmatch(r"stage\d", name))
    if len(numbered) >= 3:
        return numbered
    if type(network).__name__ == "VisionTransformer":  # torchvision's, since timm's has a feature_info
        return _spread(
            [f"encoder.layers.{name}" for name, _ in network.get_submodule("encoder.layers").named_children()]
        )
    trunk = next((name for name in _TRUNKS if isinstance(children.get(name), nn.Sequential | nn.ModuleList)), None)
    if trunk is not None and (found := _last_of_each_resolution(network, trunk)):
        return found
    raise ConfigError(
        "the stages of this network are not known",
        where="teacher.stages",
        allowed="a list of module names, early to late",
        got=f"none, for {type(network).__name__}",
        hint=f"its children are: {', '.join(children)}",
    )


def _spread(names: Sequence[str]) -> tuple[str, ...]:
    """At most four of them, evenly spread, the last among them."""
    count = min(len(names), _MOST_STAGES)
    return tuple(names[(place + 1) * len(names) // count - 1] for place in range(count))


def _last_of_each_resolution(network: nn.Module, trunk: str) -> tuple[str, ...]:
    """The stages in a row of modules; none where no image passes the network."""
    groups = [
        [name for name, _ in steps] for _, steps in itertools.groupby(_probe(network, trunk), key=lambda step: step[1])
    ]
    known = dict(network.named_modules())
    groups = [names for names in groups if any(parameter_count(known[name]) for name in names)]
    if len(groups) == 1:
        return _spread(groups[0])
    return tuple(names[-1] for names in groups[-_MOST_STAGES:])


def _probe(network: nn.Module, trunk: str) -> list[tuple[str, tuple[int, ...]]]:
    """The trunk's modules in the order in which a small image passes them, with the resolution of their outputs."""
    layout = _Layout.of(network)
    passed: list[tuple[str, tuple[int, ...]]] = []

    def observe(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Tokens that come before the images, [S, N, C], would be averaged along the wrong axis.
            if isinstance(output, Tensor) and output.ndim in (3, 4) and output.shape[0] == 1:
                passed.append((name, layout.resolution(output)))

        return hook

    channels = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
    like = next(network.parameters(), torch.zeros(()))
    modes = [(module, module.training) for module in network.modules()]
    handles = [
        module.register_forward_hook(observe(f"{trunk}.{name}"))
        for name, module in network.get_submodule(trunk).named_children()
    ]
    try:
        # Not network.eval(): some networks refuse to change their mode.
        for module, _ in modes:
            module.training = False
        for side in _PROBE_SIDES_PX:
            try:
                with torch.no_grad():
                    network(like.new_zeros((1, channels, side, side)))
                return passed
            except Exception:  # whatever a network raises for images that are not its size
                passed.clear()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return passed


def load_teacher(teacher: TeacherConfig) -> tuple[Teacher, list[str]]:
    """The frozen teacher and its class names.

    Raises:
        ConfigError: Unknown network or stages.
        DataError: Weights or classes that cannot be used.
    """
    classes = read_classes(teacher.classes)
    network = build(teacher, len(classes), teacher.preprocessing.channels)
    load_weights(network, teacher.weights)
    return Teacher(network, teacher.stages), classes


def load_student(config: JobConfig, folder: Storage, classes: int) -> nn.Module:
    """The distilled student, in eval mode, from a folder with `model.safetensors`."""
    student = build(config.student, classes, config.teacher.preprocessing.channels)
    load_weights(student, f"{folder.uri}/model.safetensors")
    return student.eval()


class Normalised(nn.Module):
    """Puts normalisation in front of a network, so that uint8 pixels travel and the device does the arithmetic."""

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, preprocessing: PreprocessingConfig) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(preprocessing.std).view(1, -1, 1, 1) * 255))

    def forward(self, pixels_NHWC: Tensor) -> Any:
        """The network's outputs for uint8 [N, H, W, C]."""
        # On a GPU the pixels' own layout is what channels_last kernels want. On a CPU explicitly NCHW in memory: with
        # the permuted layout torch 2.15 corrupts its heap in the backward pass of narrow convolutions on one thread
        # (docs/LOG.md).
        layout = torch.channels_last if pixels_NHWC.is_cuda else torch.contiguous_format
        x_NCHW = pixels_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        return self.network((x_NCHW - self.mean) * self.scale)


def example_pixels(preprocessing: PreprocessingConfig, images: int = 2, seed: int = 0) -> Tensor:
    """Random uint8 images [N, H, W, C], for tracing and warm-up."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, *preprocessing.shape_hwc), dtype=torch.uint8, generator=generator)
