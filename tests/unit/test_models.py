"""pu_ray/models.py: networks by name, weights that cannot run code, and a teacher that cannot be trained."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import pickle
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import nn

from pu_ray import engine, images, models
from pu_ray.config import NetworkConfig, PreprocessingConfig, TeacherConfig
from pu_ray.errors import ConfigError, DataError
from pu_ray.models import CifarResNet, Teacher, build


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(name, classes=3, in_channels=3, **options):
    return build(NetworkConfig(architecture=name, options=options), classes, in_channels)


# -- factory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(8, 3), (14, 6), (20, 9), (26, 12), (32, 15), (44, 21), (50, 24), (56, 27), (110, 54), (18, 8), (34, 16)],
)
def test_the_depth_in_a_name_is_the_number_of_weighted_layers(depth, blocks):
    net = network(f"cifar/resnet{depth}-w2")
    kernels = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) == 1 + 2 * blocks
    assert len(kernels) + 1 == depth, "3x3 convolutions and the linear layer; shortcuts do not count"
    assert len(net.stage_names) == (4 if depth in (18, 34) else 3)


@pytest.mark.parametrize("width", [1, 2, 7, 24])
def test_any_width_will_do(width):
    net = network(f"cifar/resnet8-w{width}", classes=4).eval()
    assert (net.stem[0].out_channels, net.head.in_features) == (width, 4 * width)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("depth", "hint"),
    [
        (0, "take 8"),
        (2, "take 8"),
        (9, "take 8 or 14"),
        (16, "take 14 or 18"),
        (19, "take 18 or 20"),
        (33, "take 32 or 34"),
        (50 + 1, "take 50 or 56"),
        (101, "take 98 or 104"),
    ],
)
def test_a_wrong_depth_names_the_nearest_ones(depth, hint):
    with pytest.raises(ConfigError) as caught:
        network(f"cifar/resnet{depth}-w16")
    assert str(caught.value) == (
        "architecture: there is no residual network of this depth\n"
        "  allowed: 6n+2 (8, 14, 20, 26, 32, ...) with three stages; 18 and 34 with four\n"
        f"  got: {depth}\n"
        f"  what to do: {hint}"
    )
    for near in hint.removeprefix("take ").split(" or "):
        network(f"cifar/resnet{near}-w1")


def test_a_network_without_channels_is_refused():
    with pytest.raises(ConfigError, match="a network needs channels") as caught:
        network("cifar/resnet8-w0")
    assert (caught.value.where, caught.value.allowed, caught.value.got) == ("architecture", "w1 and wider", "w0")


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["cifar/resnet8-w4", "timm/test_resnet"])
def test_a_network_has_the_asked_classes_and_input_channels(name, in_channels):
    net = network(name, classes=5, in_channels=in_channels).eval()
    assert net(torch.randn(2, in_channels, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_a_bare_name_is_torchvisions(name):
    net = network(name, classes=7)
    assert type(net).__module__.startswith("torchvision.")
    assert net.fc.out_features == 7


def test_the_published_student_and_teacher_have_their_published_size():
    # He et al.'s ResNet-18 with a 3x3 stem for 32x32 images: 11.17 M parameters (the paper: 11 M); ResNet-20: 0.27 M.
    assert models.parameter_count(network("cifar/resnet18-w64", classes=10)) == 11_173_962
    assert models.parameter_count(network("cifar/resnet20-w16", classes=10)) == pytest.approx(0.27e6, rel=0.02)


def test_the_first_stage_keeps_the_resolution_and_each_later_one_halves_it():
    shapes = {}
    net = network("cifar/resnet18-w4")
    for name in net.stage_names:
        getattr(net, name).register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: out.shape[1:]}))
    net(torch.randn(1, 3, 32, 32))
    assert list(shapes.values()) == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet9999", "did you mean resnet"),
        ("torchvision/resnet19", "did you mean torchvision/resnet"),
        ("mobilenet_v3_smal", "did you mean mobilenet_v3_small"),
        ("timm/resnet34x", "did you mean timm/resnet34"),
        ("test_resnet", "did you mean timm/test_resnet?"),
        ("cifar/resnet8", "for example cifar/resnet20-w16"),
        ("cifar/vgg16-w8", "for example cifar/resnet20-w16"),
        ("timm/no_such_net_at_all", None),
        ("timm/hf-hub:somebody/something", None),
        ("torchvision/", None),
        ("huggingface/x", None),
    ],
)
def test_an_unknown_network_is_refused_with_what_there_is_and_what_is_like_it(name, hint):
    with pytest.raises(ConfigError) as caught:
        network(name)
    assert (caught.value.problem, caught.value.where, caught.value.got) == ("unknown network", "architecture", name)
    assert caught.value.allowed == (
        "cifar/resnet{depth}-w{width}, torchvision/NAME, timm/NAME, or module:function of your own"
    )
    if hint is None:
        assert caught.value.hint is None
    else:
        assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("name", "task", "hint"),
    [
        ("fasterrcnn_resnet50_fpn", "detection", "did you mean resnet50?"),
        ("torchvision/fcn_resnet101", "segmentation", "did you mean torchvision/resnet101?"),
        ("torchvision/r3d_18", "video", None),
        ("quantized_resnet18", "quantization", "did you mean resnet18?"),
        ("raft_small", "optical_flow", None),
    ],
)
def test_torchvisions_networks_for_other_tasks_are_refused_by_their_task(name, task, hint):
    with pytest.raises(ConfigError) as caught:
        network(name)
    assert caught.value.problem == f"this is one of torchvision's networks for {task}"
    assert caught.value.allowed == "networks that classify images: one vector of logits for each"
    assert (caught.value.where, caught.value.got, caught.value.hint) == ("architecture", name, hint)


@pytest.mark.parametrize("name", ["cifar/resnet8-w4", "timm/test_resnet", "torchvision/resnet18"])
def test_an_option_the_factory_does_not_know_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} cannot be built with these options") as caught:
        network(name, no_such_option=3)
    assert caught.value.where == "options"
    assert caught.value.got == "{'no_such_option': 3}"
    assert "no_such_option" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("timm/resnet18.no_such_tag", {}, "RuntimeError: Invalid pretrained tag (no_such_tag) for resnet18."),
        ("googlenet", {"aux_logits": "x", "init_weights": True, "num_classes": "many"}, "TypeError: "),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_library_raises_is_a_wrong_setting(name, options, hint):
    with pytest.raises(ConfigError, match="cannot be built with these options") as caught:
        network(name, **options)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_with_auxiliary_classifiers_answers_with_logits_and_takes_weights_that_have_them(name, tmp_path):
    images = torch.rand(2, 3, 96, 96)
    whole = network(name, aux_logits=True, init_weights=False)
    (tmp_path / "whole.safetensors").write_bytes(save(whole.state_dict()))
    plain = network(name)
    assert plain.train()(images).shape == (2, 3)
    models.load_weights(plain, str(tmp_path / "whole.safetensors"))
    torch.testing.assert_close(plain.eval()(images), whole.eval()(images))


def test_options_reach_the_factory():
    assert network("timm/test_resnet", drop_rate=0.25).drop_rate == 0.25


def test_torchvisions_networks_refuse_grey_images_and_say_what_to_do():
    with pytest.raises(ConfigError, match="torchvision's networks take colour images") as caught:
        network("resnet18", in_channels=1)
    assert (caught.value.allowed, caught.value.got) == ("3", "1")
    assert "set channels to 3" in caught.value.hint


# -- networks of one's own ---------------------------------------------------------------------------------

OWN = """
from torch import nn

seen = []

class Tiny(nn.Module):
    def __init__(self, num_classes, in_chans, width=4):
        super().__init__()
        seen.append((num_classes, in_chans, width))
        self.body = nn.Conv2d(in_chans, num_classes, 1)

    def forward(self, x):
        return self.body(x).mean(dim=(2, 3))

def build(num_classes, in_chans, **options):
    return Tiny(num_classes, in_chans, **options)

def positional(num_classes, in_chans, /):
    return None

def broken(num_classes, in_chans):
    raise ZeroDivisionError("no layers\\nat all")

def nothing(num_classes, in_chans):
    return {"layers": num_classes}

table = {}
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A package `own_nets` in the current directory, found without any help; forgotten afterwards."""
    folder = tmp_path / "own_nets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "tiny.py").write_text(OWN)
    (folder / "half.py").write_text("import no_such_library_anywhere\n")
    (folder / "script.py").write_text("raise SystemExit('usage: script')\n")
    (folder / "typo.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield "own_nets.tiny"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_nets"]:
        del sys.modules[name]


def test_a_function_of_ones_own_gets_classes_channels_and_options(own_module):
    net = network(f"{own_module}:build", classes=5, in_channels=1, width=9)
    assert sys.modules[own_module].seen == [(5, 1, 9)]
    assert net(torch.randn(2, 1, 6, 6)).shape == (2, 5)


def test_a_class_is_a_factory_too(own_module):
    assert type(network(f"{own_module}:Tiny")).__name__ == "Tiny"


def test_the_current_directory_comes_last_so_that_it_hides_nothing(own_module, tmp_path):
    before = list(sys.path)
    network(f"{own_module}:build")
    network(f"{own_module}:build")
    assert sys.path == [*before, str(tmp_path)]


def refusal(name, **options):
    with pytest.raises(ConfigError) as caught:
        network(name, **options)
    return caught.value


@pytest.mark.parametrize("name", ["own_nets/tiny.py:build", "own_nets.tiny:", ":build", "own_nets.tiny:a.b", "a:b:c"])
def test_what_is_no_function_in_a_module_is_refused(own_module, name):
    error = refusal(name)
    assert error.problem == "this is not the name of a function in a module"
    assert (error.where, error.got) == ("architecture", name)
    assert error.allowed == "module:function, for example my_nets.tiny:build"
    assert error.hint == "write the module as in an import: dots between folders, no .py"


@pytest.mark.parametrize(
    ("name", "missing"),
    [("no_nets:build", "no_nets"), ("no_nets.tiny:build", "no_nets"), ("own_nets.absent:build", "own_nets.absent")],
)
def test_a_module_that_is_not_there_is_named_with_where_it_was_looked_for(own_module, tmp_path, name, missing):
    error = refusal(name)
    assert (error.problem, error.where, error.got) == ("there is no such module", "architecture", name)
    assert error.allowed == "a module that is installed, on PYTHONPATH, or in the current directory"
    assert error.hint.startswith(f"no {missing} here in {tmp_path};")


@pytest.mark.parametrize(
    ("module", "got"),
    [
        ("own_nets.half", "ModuleNotFoundError: No module named 'no_such_library_anywhere'"),
        ("own_nets.script", "SystemExit: usage: script"),
        ("own_nets.typo", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_fails_on_import_says_why(own_module, module, got):
    error = refusal(f"{module}:build")
    assert (error.problem, error.where) == ("the module cannot be imported", "architecture")
    assert error.allowed == f"import {module} works"
    assert error.got.startswith(got)


@pytest.mark.parametrize(
    ("function", "hint"),
    [("biuld", "did you mean own_nets.tiny:build?"), ("table", None), ("zzz", None)],
)
def test_a_function_that_is_not_in_the_module_is_refused_with_those_that_are(own_module, function, hint):
    error = refusal(f"{own_module}:{function}")
    assert (error.problem, error.where) == ("the module has no such function", "architecture")
    assert error.allowed == "Tiny, broken, build, nothing, positional"
    assert (error.got, error.hint) == (f"{own_module}:{function}", hint)


@pytest.mark.parametrize(
    ("function", "options", "hint"),
    [
        ("broken", {}, "ZeroDivisionError: no layers"),
        ("broken", {"depth": 3}, "TypeError: broken() got an unexpected keyword argument 'depth'"),
        ("build", {"num_classes": 3}, "TypeError: "),
        ("positional", {}, "TypeError: "),
    ],
)
def test_a_factory_that_raises_is_quoted(own_module, function, options, hint):
    error = refusal(f"{own_module}:{function}", **options)
    assert error.problem == f"{own_module}:{function} cannot be built with these options"
    assert (error.where, error.got) == ("options", str(options))
    assert error.hint.startswith(hint)
    assert "at all" not in str(error), "one line is enough"


def test_a_factory_that_gives_something_else_is_refused(own_module):
    error = refusal(f"{own_module}:nothing")
    assert (error.problem, error.where, error.got) == ("the factory gives no network", "architecture", "dict")
    assert error.allowed == "own_nets.tiny:nothing returns a torch.nn.Module"


# -- logits ------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """Whatever it is given to answer."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def test_a_network_that_classifies_passes_and_sees_images_of_its_own_shape():
    seen = []
    net = Answers(lambda x: (seen.append(tuple(x.shape)), torch.zeros(len(x), 3))[1])
    models.require_logits(net, PreprocessingConfig(size_px=9, channels=1, mean=(0.5,), std=(0.5,)), 3)
    assert seen == [(2, 1, 9, 9)]


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: torch.zeros(len(x), 4), "[2, 4]"),
        (lambda x: torch.zeros(len(x), 3, 1, 1), "[2, 3, 1, 1]"),
        (lambda x: (torch.zeros(len(x), 3),), "tuple"),
    ],
)
def test_a_network_that_answers_otherwise_is_refused(answer, got):
    with pytest.raises(ConfigError, match="the network gives no logits for these classes") as caught:
        models.require_logits(Answers(answer), PreprocessingConfig(size_px=8), 3)
    assert caught.value.where == "architecture"
    assert caught.value.allowed == "one tensor, [2, 3] for two images of 3 classes"
    assert caught.value.got == got


def test_a_network_for_another_size_is_refused_with_what_it_says():
    with pytest.raises(ConfigError, match="the network refuses such images") as caught:
        models.require_logits(small_vit(), PreprocessingConfig(size_px=20), 3)
    assert caught.value.where == "preprocessing"
    assert caught.value.got == "20 x 20 pixels, channels: 3"
    assert caught.value.hint == "AssertionError: Wrong image height! Expected 32 but got 20!"


def test_building_downloads_nothing_and_leaves_random_weights():
    assert not torch.equal(network("resnet18").conv1.weight, network("resnet18").conv1.weight)


# -- class list --------------------------------------------------------------------------------------------


def test_class_names_are_read_in_order_without_blank_lines(tmp_path):
    (tmp_path / "classes.txt").write_text("owl\n\n  cat \ndog\n")
    assert models.read_classes(f"{tmp_path}/classes.txt") == ["owl", "cat", "dog"]


@pytest.mark.parametrize("content", ["", "cat\n", "cat\ndog\ncat\n"])
def test_an_unusable_class_list_is_refused(tmp_path, content):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(DataError, match="the class list is not usable") as caught:
        models.read_classes(f"{tmp_path}/classes.txt")
    assert caught.value.allowed == "two or more different names, one per line"
    assert caught.value.got == str(content.split())


def test_a_missing_class_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        models.read_classes(f"{tmp_path}/nowhere.txt")


# -- weights -----------------------------------------------------------------------------------------------


def small():
    return CifarResNet(8, 2, 3)


def write(folder, name, state):
    path = folder / name
    if name.endswith(".safetensors"):
        path.write_bytes(save(state))
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.pth"])
def test_weights_come_back_as_they_were_saved(tmp_path, name):
    saved, loaded = small(), small()
    uri = write(tmp_path, name, saved.state_dict())
    models.load_weights(loaded, uri)
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_saved_weights_hold_buffers_too():
    net = small()
    net(torch.randn(4, 3, 8, 8))
    state = load(models.save_weights(net))
    assert state.keys() == net.state_dict().keys()
    assert torch.equal(state["stem.1.running_mean"], net.stem[1].running_mean)


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path):
    state = small().state_dict()
    del state["head.bias"]
    state["fc.bias"] = torch.zeros(3)
    state["head.weight"] = torch.zeros(10, 8)
    with pytest.raises(DataError, match="the weights do not belong to this network") as caught:
        models.load_weights(small(), write(tmp_path, "w.safetensors", state))
    assert caught.value.got == "missing head.bias; unexpected fc.bias; head.weight: [10, 8] instead of [3, 8]"
    assert "class list" in caught.value.hint


def test_many_differences_are_counted(tmp_path):
    state = {f"module.{key}": value for key, value in small().state_dict().items()}
    with pytest.raises(DataError) as caught:
        models.load_weights(small(), write(tmp_path, "w.pth", state))
    assert caught.value.got.endswith(f"; and {2 * len(state) - 5} more")


def test_refused_weights_leave_the_network_alone(tmp_path):
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["head.bias"]
    with pytest.raises(DataError):
        models.load_weights(net, write(tmp_path, "w.pth", state))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


class Malice:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle", "inside a state dict"])
def test_a_malicious_file_is_refused_and_never_executed(tmp_path, form):
    trap, path = str(tmp_path / "trap"), tmp_path / "evil.pth"
    content = {**small().state_dict(), "head.bias": Malice(trap)} if form == "inside a state dict" else Malice(trap)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match="the weights cannot be loaded safely") as caught:
        models.load_weights(small(), str(path))
    assert not os.path.exists(trap)
    assert caught.value.where == str(path)
    assert caught.value.hint == "save the state dict with safetensors.torch.save_file"
    # The trap is real: whoever trusts the file springs it.
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert os.path.exists(trap)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"a": 3}])
def test_what_is_not_a_plain_state_dict_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="not a plain state dict"):
        models.load_weights(small(), write(tmp_path, "w.pth", content))


def test_damaged_files_are_refused(tmp_path):
    whole = io.BytesIO()
    torch.save(small().state_dict(), whole)
    for number, content in enumerate([b"hello", whole.getvalue()[:1000]]):
        (tmp_path / f"{number}.pth").write_bytes(content)
        with pytest.raises(DataError, match="the weights cannot be loaded safely"):
            models.load_weights(small(), f"{tmp_path}/{number}.pth")
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a safetensors file"):
        models.load_weights(small(), f"{tmp_path}/w.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x02"])
def test_empty_files_are_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(DataError, match="the weights cannot be loaded safely"):
        models.load_weights(small(), f"{tmp_path}/w.pth")


# -- the frozen teacher ------------------------------------------------------------------------------------


def test_a_teacher_is_frozen_and_stays_in_eval_mode_whatever_is_asked():
    teacher = Teacher(small())
    holder = nn.Sequential(models.Normalised(teacher, PreprocessingConfig(size_px=8)))
    for ask in (lambda: teacher.train(), lambda: holder.train(), lambda: teacher.train(True)):
        ask()
        assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    holder(torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8))
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in before.items()), "batch norm moved"


def hooked(net, names):
    """What the modules give in the next forward pass, kept by hooks of our own."""
    outputs = {}
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    return outputs


def small_vit():
    """torchvision's ViT, six narrow blocks."""
    from torchvision.models import VisionTransformer

    net = VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )
    nn.init.normal_(net.heads.head.weight)  # torchvision starts with zeros, and equal logits prove nothing
    return net


def manual_gap(net, names, x):
    """Stage outputs averaged over space with hooks of our own."""
    outputs = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        logits = net.eval()(x)
    for handle in handles:
        handle.remove()
    return np.concatenate([outputs[name].numpy().mean(axis=(2, 3)) for name in names], axis=1), logits.numpy()


@pytest.mark.parametrize(
    ("name", "stages", "widths"),
    [
        ("cifar/resnet8-w4", ["layer1", "layer2", "layer3"], [4, 8, 16]),
        ("cifar/resnet18-w4", ["layer1", "layer2", "layer3", "layer4"], [4, 8, 16, 32]),
        ("torchvision/resnet18", ["layer1", "layer2", "layer3", "layer4"], [64, 128, 256, 512]),
        ("timm/test_resnet", ["layer1", "layer2", "layer3", "layer4"], [32, 48, 192, 96]),
        ("timm/test_efficientnet", [f"blocks.{i}" for i in range(5)], [16, 24, 32, 48, 64]),
    ],
)
def test_features_are_the_pooled_outputs_of_all_stages_and_logits_the_networks_own(name, stages, widths):
    torch.manual_seed(0)
    net = network(name)
    x = torch.randn(3, 3, 64, 64)
    expected, logits = manual_gap(net, stages, x)
    teacher = Teacher(net)
    assert teacher.tapped.stages == tuple(stages)
    ours, own_logits = teacher(x)
    assert ours.shape == (3, sum(widths))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own_logits.numpy(), logits, rtol=1e-5, atol=1e-6)


def test_the_papers_teacher_has_960_features():
    features, _ = Teacher(network("cifar/resnet34-w64", classes=10))(torch.randn(1, 3, 8, 8))
    assert features.shape == (1, 960)


def test_a_timm_transformers_patches_are_averaged_without_the_class_token():
    torch.manual_seed(0)
    net = network("timm/test_vit")
    teacher = Teacher(net)
    assert teacher.tapped.stages == ("blocks.0", "blocks.2", "blocks.3", "blocks.5"), "four of six, the last among them"
    outputs = hooked(net, teacher.tapped.stages)
    features, _ = teacher(torch.randn(2, 3, 160, 160))
    assert outputs["blocks.5"].shape == (2, 1 + 10 * 10, 64)
    expected = torch.cat([outputs[name][:, 1:].mean(dim=1) for name in teacher.tapped.stages], dim=1)
    torch.testing.assert_close(features, expected)


def test_registers_are_left_out_too():
    import timm

    net = timm.create_model("test_vit", num_classes=3, reg_tokens=3)
    outputs = hooked(net, ["blocks.5"])
    features, _ = Teacher(net, ["blocks.5"])(torch.randn(1, 3, 160, 160))
    torch.testing.assert_close(features, outputs["blocks.5"][:, 4:].mean(dim=1))


def test_torchvisions_vit_is_averaged_without_the_class_token():
    torch.manual_seed(0)
    net = small_vit()
    teacher = Teacher(net)
    names = [f"encoder.layers.encoder_layer_{block}" for block in (0, 2, 3, 5)]
    assert teacher.tapped.stages == tuple(names)
    outputs = hooked(net, names)
    features, _ = teacher(torch.randn(2, 3, 32, 32))
    assert outputs[names[0]].shape == (2, 1 + 4 * 4, 16)
    torch.testing.assert_close(features, torch.cat([outputs[name][:, 1:].mean(dim=1) for name in names], dim=1))


def test_tokens_of_an_unknown_network_are_averaged_as_they_are():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_prefix_tokens = 1
            self.embed = nn.Linear(5, 4)

        def forward(self, x_NSC):
            return self.embed(x_NSC).mean(dim=1)

    net = Tokens()
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(Teacher(net, ["embed"])(x)[0], net.embed(x).mean(dim=1))


def test_stages_with_channels_last_are_averaged_over_space():
    # Swin's stages give [N, H, W, C]: 8, 16, 32, 64 channels, whatever the size of the image.
    import timm

    net = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=2,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        num_classes=3,
    )
    outputs = {}
    for name in ("layers.0", "layers.1", "layers.2", "layers.3"):
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    features, _ = Teacher(net)(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 8 + 16 + 32 + 64)
    assert outputs["layers.1"].shape == (1, 8, 8, 16)
    torch.testing.assert_close(features[0, 8:24], outputs["layers.1"].mean(dim=(1, 2))[0])


def test_torchvisions_swin_has_channels_last_as_well():
    torch.manual_seed(0)
    net = network("swin_t")
    teacher = Teacher(net)
    assert teacher.tapped.stages == ("features.1", "features.3", "features.5", "features.7")
    outputs = hooked(net, teacher.tapped.stages)
    features, _ = teacher(torch.randn(1, 3, 64, 64))
    assert outputs["features.3"].shape == (1, 8, 8, 192)
    expected = torch.cat([outputs[name].mean(dim=(1, 2)) for name in teacher.tapped.stages], dim=1)
    torch.testing.assert_close(features, expected)


# -- finding stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "trunk", "stages"),
    [
        # What tests/benchmarks/lakes.py names by hand.
        ("mobilenet_v3_small", "features", ["1", "3", "8", "12"]),
        ("mobilenet_v3_large", "features", ["3", "6", "12", "16"]),
        ("mobilenet_v2", "features", ["3", "6", "13", "18"]),
        ("efficientnet_b0", "features", ["2", "3", "5", "8"]),
        ("efficientnet_v2_s", "features", ["2", "3", "5", "7"]),
        ("convnext_tiny", "features", ["1", "3", "5", "7"]),
        ("densenet121", "features", ["denseblock1", "denseblock2", "denseblock3", "norm5"]),
        ("regnet_y_400mf", "trunk_output", ["block1", "block2", "block3", "block4"]),
        ("regnet_x_400mf", "trunk_output", ["block1", "block2", "block3", "block4"]),
        ("mnasnet0_5", "layers", ["8", "9", "11", "16"]),
        ("squeezenet1_1", "features", ["1", "4", "7", "12"]),
        ("shufflenet_v2_x0_5", "", ["stage2", "stage3", "stage4"]),
    ],
)
def test_the_stages_of_torchvisions_families_are_found(name, trunk, stages):
    torch.manual_seed(0)
    net = network(name)
    found = models.find_stages(net)
    assert found == tuple(f"{trunk}.{stage}".strip(".") for stage in stages)
    outputs = hooked(net, found)
    x = torch.randn(2, 3, 96, 96)
    features, logits = Teacher(net)(x)
    sides = [outputs[stage].shape[2] for stage in found]
    # SqueezeNet does not pad; all others halve exactly.
    assert all(0.4 * one <= other <= 0.5 * one for one, other in itertools.pairwise(sides)), sides
    # DenseNet's last stage is rectified in place, on the way to the logits.
    expected = torch.cat([outputs[stage].mean(dim=(2, 3)) for stage in found], dim=1)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, net(x))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vgg11", ["features.4", "features.9", "features.14", "features.19"]),
        ("vgg16_bn", ["features.12", "features.22", "features.32", "features.42"]),
        ("alexnet", ["features.1", "features.4", "features.11"]),
    ],
)
def test_a_last_pooling_is_no_stage(name, stages):
    # Without memory for the hundred million weights behind the trunk; shapes need none.
    with torch.device("meta"):
        net = network(name)
    assert models.find_stages(net) == tuple(stages)


def test_a_network_of_one_image_size_is_probed_at_that_size():
    net = network("maxvit_t")
    assert models.find_stages(net) == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


def test_timms_families_name_their_own_stages():
    stages = ("bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5")
    assert models.find_stages(network("timm/mobilenetv3_small_050")) == stages


class Plain(nn.Module):
    """A customer's network: a stem, a trunk under a name of its own, a head."""

    def __init__(self, trunk="body", in_channels=3):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 4, 3, padding=1)
        steps = [
            nn.Sequential(nn.Conv2d(before, after, 3, 2, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout())
            for before, after in [(4, 6), (6, 8), (8, 10)]
        ]
        self.add_module(trunk, nn.Sequential(*steps))
        self.trunk = trunk
        self.head = nn.Linear(10, 3)

    def forward(self, x_NCHW):
        return self.head(getattr(self, self.trunk)(self.stem(x_NCHW)).mean(dim=(2, 3)))


def test_a_customers_network_works_with_named_stages():
    torch.manual_seed(0)
    net = Plain()
    tapped = models.TappedNetwork(net.eval(), ["stem", "body.0", "body.2.0"])
    outputs = hooked(net, tapped.stages)
    x = torch.randn(2, 3, 20, 20)
    features, logits = tapped(x)
    assert features.shape == (2, 4 + 6 + 10)
    torch.testing.assert_close(features, torch.cat([output.mean(dim=(2, 3)) for output in outputs.values()], dim=1))
    torch.testing.assert_close(logits, net(x))


def test_a_customers_network_with_channels_last_says_so():
    class Last(nn.Module):
        output_fmt = "NHWC"

        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 5)

        def forward(self, x_NCHW):
            return self.embed(x_NCHW.permute(0, 2, 3, 1)).mean(dim=(1, 2))

    net = Last()
    x = torch.randn(2, 3, 6, 4)
    torch.testing.assert_close(Teacher(net, ["embed"])(x)[0], net(x))


@pytest.mark.parametrize("in_channels", [1, 3])
def test_a_customers_trunk_is_found_under_a_usual_name(in_channels):
    assert models.find_stages(Plain("features", in_channels)) == ("features.0", "features.1", "features.2")
    with pytest.raises(ConfigError, match="the stages of this network are not known"):
        models.find_stages(Plain("body", in_channels))


def test_looking_for_stages_leaves_the_network_and_the_generator_as_they_were():
    net = Plain("features").train()
    net.features[1].eval()
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    assert models.find_stages(net) == models.find_stages(net)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_a_network_that_takes_no_probe_asks_for_its_stages_and_is_left_as_it_was():
    class Fixed(Plain):
        def forward(self, x_NCHW):
            assert x_NCHW.shape[2] == 50
            return super().forward(x_NCHW)

    net = Fixed("features").train()
    with pytest.raises(ConfigError, match="the stages of this network are not known") as caught:
        models.find_stages(net)
    assert caught.value.hint == "its children are: stem, features, head"
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(("stage", "got"), [("spare", "nothing from spare"), ("pair", "tuple from pair")])
def test_a_stage_without_a_tensor_is_named(stage, got):
    class Pair(nn.Module):
        def forward(self, x_NCHW):
            return x_NCHW, x_NCHW

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.pair = nn.Identity(), Pair()

        def forward(self, x_NCHW):
            return self.pair(x_NCHW)[0].mean(dim=(2, 3))

    with pytest.raises(ConfigError, match="a stage gives no tensor") as caught:
        Teacher(Odd(), [stage])(torch.randn(1, 3, 4, 4))
    assert caught.value.got == got


def test_stages_may_be_named():
    teacher = Teacher(small(), ["stem", "layer3.0.conv1"])
    assert teacher(torch.randn(2, 3, 8, 8))[0].shape == (2, 2 + 8)


@pytest.mark.parametrize(("stages", "got"), [(["layer1", "layer9", "x.y"], "layer9, x.y"), ([], "none")])
def test_stages_that_are_not_there_are_named(stages, got):
    with pytest.raises(ConfigError, match="the network has no such module") as caught:
        Teacher(small(), stages)
    assert caught.value.got == got
    assert caught.value.allowed == "stem, layer1, layer2, layer3, head"
    assert caught.value.where == "teacher.stages"


def test_an_unknown_family_asks_for_its_stages():
    with pytest.raises(ConfigError, match="the stages of this network are not known") as caught:
        Teacher(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    assert caught.value.got == "none, for Sequential"
    assert caught.value.hint == "its children are: 0, 1"


def test_a_tap_holds_no_tensors_between_calls():
    teacher = Teacher(small())
    teacher(torch.randn(2, 3, 8, 8))
    assert teacher.tapped._taps == {}


def test_a_teacher_is_loaded_from_its_files(tmp_path):
    saved = small()
    write(tmp_path, "w.safetensors", saved.state_dict())
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    config = TeacherConfig(
        architecture="cifar/resnet8-w2",
        weights=f"{tmp_path}/w.safetensors",
        classes=f"{tmp_path}/classes.txt",
        stages=("layer2",),
    )
    teacher, classes = models.load_teacher(config)
    assert classes == ["a", "b", "c"]
    x = torch.randn(2, 3, 8, 8)
    features, logits = teacher(x)
    assert features.shape == (2, 4)
    with torch.no_grad():
        torch.testing.assert_close(logits, saved.eval()(x))


def test_a_class_list_of_another_length_is_a_shape_error_that_says_so(tmp_path):
    write(tmp_path, "w.safetensors", small().state_dict())
    (tmp_path / "classes.txt").write_text("a\nb\n")
    config = TeacherConfig(
        architecture="cifar/resnet8-w2", weights=f"{tmp_path}/w.safetensors", classes=f"{tmp_path}/classes.txt"
    )
    with pytest.raises(DataError, match=r"head\.weight: \[3, 8\] instead of \[2, 8\]"):
        models.load_teacher(config)


# -- pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocessing",
    [
        PreprocessingConfig(size_px=6, mean=(0.1, 0.5, 0.7), std=(0.2, 0.3, 0.4)),
        PreprocessingConfig(size_px=6, channels=1, mean=(0.3,), std=(0.5,)),
    ],
)
def test_the_device_normalises_as_numpy_does(preprocessing):
    pixels = models.example_pixels(preprocessing, images=4)
    ours = models.Normalised(nn.Identity(), preprocessing)(pixels).numpy()
    plain = (pixels.numpy() / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    np.testing.assert_allclose(ours, plain.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, images.normalise(pixels.numpy(), preprocessing), rtol=1e-6, atol=1e-6)


def test_normalised_images_lie_in_memory_channel_by_channel():
    # A merely permuted tensor counts as channels_last, and there the backward pass of a strided 1x1 convolution with
    # few channels writes past its workspace on CPUs: crashes, hangs and wrong gradients
    # (https://github.com/uxlfoundation/oneDNN/issues/6035).
    preprocessing = PreprocessingConfig(size_px=6)
    assert models.Normalised(nn.Identity(), preprocessing)(models.example_pixels(preprocessing)).is_contiguous()


def preprocessing_of(size_px, channels, interpolation="bilinear"):
    mean, std = ((0.1, 0.5, 0.7), (0.2, 0.3, 0.4)) if channels == 3 else ((0.3,), (0.5,))
    return PreprocessingConfig(size_px=size_px, channels=channels, interpolation=interpolation, mean=mean, std=std)


def pictures(height, width, channels, count=3):
    """Smooth shapes, hard edges and noise, uint8 [N, H, W, C]."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    phases = generator.uniform(0, 6, (count, 1, 1, channels))
    waves = 127 + 120 * np.sin(rows / 3 + columns / 5)[None, :, :, None] * np.cos(phases)
    waves[0] = 255 * ((rows // 4 + columns // 4) % 2)[:, :, None]
    waves[1] = generator.integers(0, 256, (height, width, channels))
    return waves.astype(np.uint8)


def pixels_of(normalised, preprocessing):
    """Back to [0, 255], [N, H, W, C]."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    return 255 * (normalised.numpy().transpose(0, 2, 3, 1) * std + mean)


def by_pillow(image, preprocessing):
    picture = Image.fromarray(image.squeeze())
    if preprocessing.channels == 1:
        picture = picture.convert("L")
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    side = preprocessing.size_px
    picture = picture.resize((side, side), filters[preprocessing.interpolation])
    return np.asarray(picture.convert("RGB") if preprocessing.channels == 3 else picture).reshape(
        preprocessing.shape_hwc
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(32, 32), (33, 33), (12, 12), (20, 31)])
@pytest.mark.parametrize(("channels", "wanted"), [(3, 3), (1, 1), (3, 1), (1, 3)])
def test_images_of_another_size_become_what_pillow_makes_of_them(shape, channels, wanted, interpolation):
    preprocessing = preprocessing_of(16, wanted, interpolation)
    given = pictures(*shape, channels)
    ours = pixels_of(models.Normalised(nn.Identity(), preprocessing)(torch.from_numpy(given)), preprocessing)
    expected = np.stack([by_pillow(image, preprocessing) for image in given]).astype(float)
    difference = np.abs(ours - expected)
    assert difference.max() < 1.01, "Pillow's fixed-point arithmetic may round to a neighbour"
    assert (difference > 0.5).mean() < 0.05, "and seldom does"
    np.testing.assert_allclose(ours, np.rint(ours), atol=1e-3)


def test_shrinking_without_a_wider_filter_would_be_seen():
    # Guards the test above: plain bilinear interpolation skips pixels and is far off.
    given = torch.from_numpy(pictures(48, 48, 3)).permute(0, 3, 1, 2).float()
    preprocessing = preprocessing_of(16, 3)
    plain = nn.functional.interpolate(given, (16, 16), mode="bilinear")
    assert (models.fitted(given, preprocessing) - plain).abs().max() > 50


def test_colour_becomes_grey_exactly_as_pillow_does_it():
    preprocessing = preprocessing_of(64, 1)
    generator = np.random.default_rng(1)
    given = generator.integers(0, 256, (16, 64, 64, 3)).astype(np.uint8)
    given[0, 0, :8] = [[255 * (n & 1), 255 * (n >> 1 & 1), 255 * (n >> 2)] for n in range(8)]
    ours = models.fitted(torch.from_numpy(given).permute(0, 3, 1, 2).float(), preprocessing).numpy()
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in given])
    np.testing.assert_array_equal(ours[:, 0], expected)


def test_grey_becomes_colour_by_repetition():
    given = torch.from_numpy(pictures(16, 16, 1))
    ours = models.fitted(given.permute(0, 3, 1, 2).float(), preprocessing_of(16, 3))
    assert torch.equal(ours, given.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1))


def test_images_that_fit_are_not_touched(monkeypatch):
    monkeypatch.delattr(models, "fitted")
    for channels in (1, 3):
        preprocessing = preprocessing_of(16, channels)
        models.Normalised(nn.Identity(), preprocessing)(torch.from_numpy(pictures(16, 16, channels)))


@pytest.mark.parametrize(("channels", "wanted"), [(3, 3), (3, 1), (1, 3)])
def test_images_made_to_fit_lie_in_memory_channel_by_channel_too(channels, wanted):
    given = torch.from_numpy(pictures(20, 20, channels))
    made = models.Normalised(nn.Identity(), preprocessing_of(16, wanted))(given)
    assert made.is_contiguous()
    assert made.stride() == torch.empty(made.shape).stride()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_of_images_that_fit_has_no_operation_but_the_normalisation(channels):
    preprocessing = preprocessing_of(8, channels)
    graph = engine.to_onnx(
        models.Normalised(nn.Identity(), preprocessing).eval(),
        models.example_pixels(preprocessing),
        input_name="pixels",
        output_names=["x"],
    )
    assert {node.op_type for node in onnx.load_from_string(graph).graph.node} <= {"Transpose", "Cast", "Sub", "Mul"}
    pixels = models.example_pixels(preprocessing, images=5)
    [ours] = engine.OnnxEngine(graph).run(pixels.numpy())
    np.testing.assert_allclose(ours, models.Normalised(nn.Identity(), preprocessing)(pixels).numpy(), atol=1e-5)


def test_example_pixels_are_the_same_every_time_and_use_the_whole_range():
    preprocessing = PreprocessingConfig(size_px=20)
    pixels = models.example_pixels(preprocessing, images=3)
    assert pixels.shape == (3, 20, 20, 3)
    assert torch.equal(pixels, models.example_pixels(preprocessing, images=3))
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    assert not torch.equal(pixels, models.example_pixels(preprocessing, images=3, seed=1))


# -- the seam of the cascade -------------------------------------------------------------------------------


@pytest.mark.parametrize("size_px", [32, 30])
def test_the_gate_sees_the_early_activation_in_cells(size_px):
    torch.manual_seed(0)
    teacher = models.Teacher(models.build(NetworkConfig(architecture="cifar/resnet8-w4"), 3, 3))
    x = torch.randn(2, 3, size_px, size_px)
    early, gate, activation, late, logits = models.StagedTeacher(teacher, 1)(x)
    features, expected_logits = teacher(x)
    torch.testing.assert_close(torch.cat([early, late], dim=1), features)
    torch.testing.assert_close(logits, expected_logits)
    cell = size_px // 4
    by_hand = torch.stack(
        [
            activation[:, channel, top : top + cell, left : left + cell].mean(dim=(1, 2))
            for channel in range(4)
            for top in range(0, 4 * cell, cell)
            for left in range(0, 4 * cell, cell)
        ],
        dim=1,
    )
    torch.testing.assert_close(gate, by_hand)
    alone_early, alone_gate = models.EarlyStages(teacher, 1)(x)
    torch.testing.assert_close(alone_early, early)
    torch.testing.assert_close(alone_gate, gate)


# -- families on ONNX Runtime ------------------------------------------------------------------------------


def shaken(net):
    """Batch-norm statistics and layer scales unlike their beginnings, so that each of them matters."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for name, parameter in net.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.uniform_(parameter, 0.5, 1, generator=generator)
    return net


@pytest.mark.parametrize(
    ("make", "side_px"),
    [
        (lambda: network("mobilenet_v3_small"), 64),
        (lambda: network("efficientnet_b0"), 64),
        (lambda: network("convnext_tiny"), 64),
        (lambda: network("timm/test_vit"), 160),
        (small_vit, 32),
    ],
    ids=["mobilenet", "efficientnet", "convnext", "timm vit", "torchvision vit"],
)
def test_onnx_runtime_gives_torchs_answers_for_every_family(make, side_px):
    torch.manual_seed(0)
    preprocessing = PreprocessingConfig(size_px=side_px)
    module = models.Normalised(Teacher(shaken(make())), preprocessing).eval()
    graph = engine.to_onnx(
        module, models.example_pixels(preprocessing), input_name="pixels", output_names=["features", "logits"]
    )
    # Images of different colours, so that the answers differ.
    colours = torch.randint(0, 256, (5, 1, 1, 3), generator=torch.Generator().manual_seed(2))
    pixels = (models.example_pixels(preprocessing, images=5) * 0.3 + colours * 0.7).to(torch.uint8)
    with torch.no_grad():
        expected = module(pixels)
    for ours, reference in zip(engine.OnnxEngine(graph).run(pixels.numpy()), expected, strict=True):
        assert ours.shape == reference.shape
        assert reference.std(dim=0).mean() > 0
        scale = float(reference.abs().max())
        np.testing.assert_allclose(ours / scale, reference.numpy() / scale, atol=2e-5)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "swin_t"])
def test_the_early_stages_alone_give_what_the_whole_gives(name):
    torch.manual_seed(0)
    teacher = Teacher(shaken(network(name)))
    x = torch.randn(2, 3, 64, 64)
    early, gate, _, late, _ = models.StagedTeacher(teacher, 2)(x)
    torch.testing.assert_close(torch.cat([early, late], dim=1), teacher(x)[0])
    alone_early, alone_gate = models.EarlyStages(teacher, 2)(x)
    torch.testing.assert_close(alone_early, early)
    torch.testing.assert_close(alone_gate, gate)
