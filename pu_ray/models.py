"""Networks by name, safely loaded weights, and taps on a teacher's stages.

Axes: N images, C channels, H, W; D feature width, the sum of the stages' channels; K classes; S tokens.
"""

from __future__ import annotations

import difflib
import importlib
import io
import itertools
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pu_ray.config import JobConfig, NetworkConfig, PreprocessingConfig, TeacherConfig
from pu_ray.errors import ConfigError, DataError
from pu_ray.storage import Storage

# -- CIFAR-style residual networks -------------------------------------------------------------------------

# Blocks per stage of the ImageNet nets with a 3x3 stem; all other depths have three stages.
_FOUR_STAGES: Mapping[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_CIFAR_NAME = re.compile(r"cifar/resnet(?P<depth>\d+)-w(?P<width>\d+)")


def _is_depth(depth: int) -> bool:
    """6n+2 layers: a stem, three stages of n blocks with two convolutions each, and the linear layer."""
    return depth in _FOUR_STAGES or (depth >= 8 and depth % 6 == 2)


def _blocks(depth: int) -> tuple[int, ...]:
    """Blocks per stage.

    Raises:
        ConfigError: There is no such network; names the depths next to it.
    """
    if not _is_depth(depth):
        below = next((near for near in range(depth - 1, 0, -1) if _is_depth(near)), None)
        above = next(near for near in itertools.count(depth + 1) if _is_depth(near))
        raise ConfigError(
            "there is no residual network of this depth",
            slug="no-such-depth",
            where="architecture",
            allowed="6n+2 (8, 14, 20, 26, 32, ...) with three stages; 18 and 34 with four",
            got=str(depth),
            hint=f"take {above}" if below is None else f"take {below} or {above}",
        )
    return _FOUR_STAGES.get(depth) or ((depth - 2) // 6,) * 3


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
        depth: Weighted layers: 6n+2 with three stages (He et al. 2016, section 4.2), 18 or 34 with four.
        width: Channels of the first stage.
        classes: Number of logits.
        in_channels: 1 or 3.

    Raises:
        ConfigError: There is no network of this depth or width.
    """

    def __init__(self, depth: int, width: int, classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(
                "a network needs channels",
                slug="network-without-channels",
                where="architecture",
                allowed="w1 and wider",
                got=f"w{width}",
            )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        channels = width
        self.stage_names = []
        for index, blocks in enumerate(_blocks(depth)):
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


_FORMS = "cifar/resnet{depth}-w{width}, torchvision/NAME, timm/NAME, or module:function of your own"
_OWN_FACTORY = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")


def build(network: NetworkConfig, classes: int, in_channels: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        network: `cifar/resnet{depth}-w{width}`, `torchvision/{name}`, `timm/{name}` (a bare name is torchvision's), or
            `module:function`, called as `function(num_classes=..., in_chans=..., **options)`. The latter imports that
            module, from where Python finds modules or from the current directory: code that the job's author names
            runs, as himself; weights never do.
        classes: Number of logits.
        in_channels: 1 or 3; torchvision's networks take 3 only.

    Raises:
        ConfigError: Unknown name, options the factory refuses, a factory that cannot be imported or gives no network.
    """
    name, options = network.architecture, dict(network.options)
    if name.startswith("cifar/"):
        return _built(name, options, lambda: _cifar(name, classes, in_channels, options))
    if name.startswith("timm/"):
        return _timm(name, classes, in_channels, options)
    if ":" in name:
        return _own(name, classes, in_channels, options)
    return _torchvision(name, classes, in_channels, options)


def _built(name: str, options: Mapping[str, Any], make: Callable[[], Any]) -> nn.Module:
    """What a factory makes, or why it refuses."""
    try:
        return cast(nn.Module, make())
    except ConfigError:
        raise
    except Exception as error:  # every library has its own ways to refuse an option
        raise ConfigError(
            f"{name} cannot be built with these options",
            slug="network-not-buildable",
            where="options",
            got=str(dict(options)),
            hint=_in_short(error),
        ) from error


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _unknown(name: str, *, hint: str | None = None) -> ConfigError:
    return ConfigError(
        "unknown network", slug="unknown-network", where="architecture", allowed=_FORMS, got=name, hint=hint
    )


def _like(plain: str, known: Sequence[str], prefix: str) -> str | None:
    """What a name may have been meant to be."""
    close = difflib.get_close_matches(plain, known, n=3)
    return f"did you mean {' or '.join(prefix + name for name in close)}?" if close else None


def _cifar(name: str, classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    match = _CIFAR_NAME.fullmatch(name)
    if match is None:
        raise _unknown(name, hint="for example cifar/resnet20-w16")
    return CifarResNet(int(match["depth"]), int(match["width"]), classes, in_channels, **cast(Any, options))


def _timm(name: str, classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    import timm

    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        raise _unknown(name, hint=_like(plain, timm.list_models(), "timm/"))
    wanted: dict[str, Any] = {"num_classes": classes, "in_chans": in_channels, **options}
    return _built(name, options, lambda: timm.create_model(plain, pretrained=False, **wanted))


def _torchvision(name: str, classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models as torchvision_models

    plain, prefix = name.removeprefix("torchvision/"), "torchvision/" if name.startswith("torchvision/") else ""
    known = torchvision_models.list_models(module=torchvision_models)
    if plain not in known:
        if plain in torchvision_models.list_models():
            task = torchvision_models.get_model_builder(plain).__module__.split(".")[2]
            inside = max((each for each in known if each in plain), key=len, default=None)
            raise ConfigError(
                f"this is one of torchvision's networks for {task}",
                slug="not-a-classifier",
                where="architecture",
                allowed="networks that classify images: one vector of logits for each",
                got=name,
                hint=f"did you mean {prefix}{inside}?" if inside else None,
            )
        import timm

        elsewhere = f"did you mean timm/{plain}?" if timm.is_model(plain) else None
        raise _unknown(name, hint=elsewhere or _like(plain, known, prefix))
    if in_channels != 3:
        raise ConfigError(
            "torchvision's networks take colour images",
            slug="network-needs-colour",
            where="preprocessing.channels",
            allowed="3",
            got=str(in_channels),
            hint="set channels to 3 (grey images are repeated), or use a timm/ or cifar/ network",
        )
    wanted: dict[str, Any] = {"num_classes": classes, "weights": None, **_AUXILIARY.get(plain, {}), **options}
    return _built(name, options, lambda: torchvision_models.get_model(plain, **wanted))


# Networks whose second classifiers exist while they are trained, and then answer with a tuple instead of logits. The
# losses here ask for one vector of logits.
_AUXILIARY: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
_AUXILIARY_WEIGHTS = ("aux1.", "aux2.", "AuxLogits.")


def _own(name: str, classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    match = _OWN_FACTORY.fullmatch(name)
    if match is None:
        raise ConfigError(
            "this is not the name of a function in a module",
            slug="not-a-function-name",
            where="architecture",
            allowed="module:function, for example my_nets.tiny:build",
            got=name,
            hint="write the module as in an import: dots between folders, no .py",
        )
    module = _imported(match["module"], name)
    factory = getattr(module, match["function"], None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(match["function"], known, n=1)
        raise ConfigError(
            "the module has no such function",
            slug="no-such-function",
            where="architecture",
            allowed=", ".join(sorted(known)) or f"nothing: {match['module']} has no functions",
            got=name,
            hint=f"did you mean {match['module']}:{close[0]}?" if close else None,
        )

    def make() -> Any:
        return factory(num_classes=classes, in_chans=in_channels, **options)

    made = _built(name, options, make)
    if not isinstance(made, nn.Module):
        raise ConfigError(
            "the factory gives no network",
            slug="factory-without-network",
            where="architecture",
            allowed=f"{name} returns a torch.nn.Module",
            got=type(made).__name__,
        )
    return made


def _imported(module: str, name: str) -> Any:
    """A module of the user's own.

    Ray's workers look for modules in the driver's current directory too; the `pu-ray` command alone would not.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                "there is no such module",
                slug="no-such-module",
                where="architecture",
                allowed="a module that is installed, on PYTHONPATH, or in the current directory",
                got=name,
                hint=f"no {missing} here in {here}; workers on other machines must find it too: install it there",
            ) from error
        raise ConfigError(
            "the module cannot be imported",
            slug="module-not-importable",
            where="architecture",
            allowed=f"import {module} works",
            got=_in_short(error),
            hint=f"`python -c 'import {module}'` shows the whole error",
        ) from error


def require_logits(network: nn.Module, preprocessing: PreprocessingConfig, classes: int) -> None:
    """Have the network classify two black images; it is left in eval mode.

    Raises:
        ConfigError: It refuses images of this shape, or gives anything else than one logit per class and image.
    """
    side, channels = preprocessing.size_px, preprocessing.channels
    try:
        with torch.inference_mode():
            output = network.eval()(torch.zeros(2, channels, side, side))
    except Exception as error:  # whatever a network raises for images that are not its size
        raise ConfigError(
            "the network refuses such images",
            slug="network-refuses-images",
            where="preprocessing",
            allowed="a size and channels that the network takes",
            got=f"{side} x {side} pixels, channels: {channels}",
            hint=_in_short(error),
        ) from error
    found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != [2, classes]:
        raise ConfigError(
            "the network gives no logits for these classes",
            slug="network-without-logits",
            where="architecture",
            allowed=f"one tensor, {[2, classes]} for two images of {classes} classes",
            got=str(found),
            hint="the network needs one output for each line of teacher.classes",
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
            slug="invalid-class-list",
            where=uri,
            allowed="two or more different names, one per line",
            got=str(classes[:20]),
            hint="write every class of the teacher once, in the order of its logits",
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
        load_safetensors(module, content, uri)
    else:
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; all mean that the file cannot be trusted or read
            raise DataError(
                "the weights cannot be loaded safely",
                slug="unsafe-weights",
                where=uri,
                allowed="a .safetensors file, or a .pth that holds a plain state dict",
                got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                hint="save the state dict with safetensors.torch.save_file",
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise DataError(
                "not a plain state dict",
                slug="not-a-state-dict",
                where=uri,
                allowed="a mapping of names to tensors",
                hint="save network.state_dict() alone, best with safetensors.torch.save_file",
            )
        _load_state(module, state, uri)


def load_safetensors(module: nn.Module, content: bytes, where: str) -> None:
    """Load the bytes of a safetensors file.

    Args:
        module: Whose weights they are.
        content: The file.
        where: Its name, for messages.

    Raises:
        DataError: Not such a file, or not this network's weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(content)
    except SafetensorError as error:
        raise DataError(
            "not a safetensors file",
            slug="not-safetensors",
            where=where,
            got=str(error),
            hint="fetch it again, or write it with safetensors.torch.save_file",
        ) from error
    _load_state(module, state, where)


def _load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = module.state_dict()
    if getattr(module, "aux_logits", True) is False:
        state = {key: value for key, value in state.items() if not key.startswith(_AUXILIARY_WEIGHTS)}
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
            slug="weights-do-not-fit",
            where=where,
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
                slug="no-such-stage",
                where="teacher.stages",
                allowed=", ".join(name for name, _ in network.named_children()),
                got=", ".join(missing) or "none",
                hint="deeper modules have dotted names, such as layer1.0; leave teacher.stages out to have them found",
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
                    slug="stage-without-tensor",
                    where="teacher.stages",
                    allowed="modules that the forward pass calls, with one tensor as output",
                    got=f"{type(output).__name__} from {name}" if output is not None else f"nothing from {name}",
                    hint="name another module, or leave teacher.stages out to have them found",
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
                slug="gate-spares-no-stage",
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
                slug="network-not-separable",
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
        slug="stages-not-known",
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
    student = build(config.student, classes, config.student_preprocessing.channels)
    load_weights(student, f"{folder.uri}/model.safetensors")
    return student.eval()


class Normalised(nn.Module):
    """Puts normalisation in front of a network, so that uint8 pixels travel and the device does the arithmetic.

    Images of another size or of other channels than the network's are made to fit, so that a teacher and a student with
    inputs of their own see the same crop. It is the whole image that is resized, to a square: `resize_px` belongs to
    decoding. Images that fit pass as they are; a graph made from such has no other operations than the normalisation.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, preprocessing: PreprocessingConfig) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(preprocessing.std).view(1, -1, 1, 1) * 255))

    def forward(self, pixels_NHWC: Tensor) -> Any:
        """The network's outputs for uint8 [N, H, W, C], C being 1 or 3."""
        # On a GPU the pixels' own layout is what channels_last kernels want. On a CPU explicitly NCHW in memory: with
        # the permuted layout torch 2.15 corrupts its heap in the backward pass of narrow convolutions on one thread
        # (docs/LOG.md).
        layout = torch.channels_last if pixels_NHWC.is_cuda else torch.contiguous_format
        x_NCHW = pixels_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        if pixels_NHWC.shape[1:] != self.preprocessing.shape_hwc:
            x_NCHW = fitted(x_NCHW, self.preprocessing).contiguous(memory_format=layout)
        return self.network((x_NCHW - self.mean) * self.scale)


def fitted(x_NCHW: Tensor, preprocessing: PreprocessingConfig) -> Tensor:
    """Pixels at the size and with the channels of a network's input, as Pillow would give them.

    Grey becomes colour by repetition, colour grey by ITU-R 601 luma, in the same integers as Pillow. The size changes
    with Pillow's filters, which widen when they shrink; Pillow's fixed-point arithmetic may round to a neighbour.

    Args:
        x_NCHW: Float32 of whole numbers in [0, 255]; C is 1 or 3.
        preprocessing: Of the network.
    """
    side, channels = preprocessing.size_px, preprocessing.channels
    assert {x_NCHW.shape[1], channels} <= {1, 3}
    # Grey is interpolated once, not three times.
    if channels < x_NCHW.shape[1]:
        red, green, blue = x_NCHW[:, 0:1], x_NCHW[:, 1:2], x_NCHW[:, 2:3]
        # Every sum is below 2^24, so float32 has it exactly.
        x_NCHW = torch.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)
    # One axis after the other, so that what overshoots at an edge is cut off between them.
    for size in ((x_NCHW.shape[2], side), (side, side)):
        if x_NCHW.shape[2:] != size:
            x_NCHW = functional.interpolate(x_NCHW, size, mode=preprocessing.interpolation, antialias=True)
            x_NCHW = torch.floor(x_NCHW + 0.5).clamp(0, 255)  # halves go up, as in Pillow
    return x_NCHW.repeat(1, channels // x_NCHW.shape[1], 1, 1)


def example_pixels(preprocessing: PreprocessingConfig, images: int = 2, seed: int = 0) -> Tensor:
    """Random uint8 images [N, H, W, C], for tracing and warm-up."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, *preprocessing.shape_hwc), dtype=torch.uint8, generator=generator)
