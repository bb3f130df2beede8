"""`ray up` of our cluster files, with Ray's own launcher, autoscaler and node providers, on a simulated AWS (moto).

Nodes are moto's records and whatever would be typed on them over SSH is written down instead, so not covered: whether
AWS has such nodes to sell, how it judges the policies, and what the commands do on a real machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import boto3  # type: ignore[import-untyped]
import botocore.client  # type: ignore[import-untyped]
import httpx
import pyarrow as pa
import pytest
import yaml
from botocore.exceptions import ClientError  # type: ignore[import-untyped]
from moto import mock_aws
from moto.server import ThreadedMotoServer
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider as aws_node_provider
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.local.node_provider import LocalNodeProvider, record_local_head_state_if_needed
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, FileConfigReader
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler
from ray.core.generated import autoscaler_pb2

from pu_ray.errors import DataError
from pu_ray.storage import Storage, storage_for_ray

ROOT = Path(__file__).parents[2]
REGION = "us-east-1"
WORKERS = ("cpu-decode", "gpu-spot", "gpu-on-demand")
TOKEN = "a-token-that-must-not-show"
MOUNTS = json.dumps([{"Destination": "/home/ray/.ray/auth_token"}])
OPEN_POLICIES = {"AmazonEC2FullAccess", "AmazonS3FullAccess"}


# Most of this is untyped in Ray.
aws_provider: Callable[..., Any] = AWSNodeProvider
local_provider: Callable[..., Any] = LocalNodeProvider
bootstrap: Callable[..., Any] = aws_config.bootstrap_aws
in_memory: Callable[..., Any] = InMemoryStorage
messages: Any = autoscaler_pb2


@dataclass
class Shell:
    """Takes the place of `subprocess` in Ray's launcher: writes down what would be typed, by SSH or rsync.

    Attributes:
        running: Whether the node's container is up already.
        typed: Line by line.
        head_config: The file that the autoscaler of the head reads, if it was sent.
    """

    running: bool = False
    typed: list[str] = field(default_factory=list)
    head_config: dict[str, Any] = field(default_factory=dict)

    def check_call(self, command: Sequence[str], **_: Any) -> int:
        self.typed.append(" ".join(command))
        source = Path(command[-2])
        if source.name.startswith("ray-bootstrap-"):
            self.head_config = json.loads(source.read_text())
        return 0

    def check_output(self, command: Sequence[str], **_: Any) -> bytes:
        line = " ".join(command)
        self.typed.append(line)
        container = {".State.Running": "true", ".Config.Image": "pu-ray:0.1.0", "json .Mounts": MOUNTS}
        answers = (container if self.running else {}) | {
            "command -v docker": "/usr/bin/docker",
            ".Config.Env": '["HOME=/home/ray"]',
            "printenv HOME": "/home/ray",
            ".Runtimes": "map[nvidia:{nvidia-container-runtime}]",
            "/proc/meminfo": "MemAvailable: 60000000 kB",
        }
        return next((answer for part, answer in answers.items() if part in line), "").encode()

    def started(self) -> str:
        """The one `ray start`."""
        (line,) = [line for line in self.typed if "ray start" in line]
        return line


@dataclass(frozen=True)
class Account:
    """An AWS account in which somebody did what docs/cluster.md says, and nothing more.

    Attributes:
        file: ray-cluster.yaml with this account's values filled in.
        image: The AMI.
        subnets: Two, in zones of their own.
        group: The security group.
        calls: Of the API, by service and operation, as they come.
    """

    file: str
    image: str
    subnets: list[str]
    group: str
    calls: list[str]

    def holds(self) -> dict[str, Any]:
        """What Ray might add to or open up."""
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam")
        roles = [role["RoleName"] for role in iam.list_roles()["Roles"]]
        return {
            "groups": {
                group["GroupId"]: group["IpPermissions"] for group in ec2.describe_security_groups()["SecurityGroups"]
            },
            "keys": [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]],
            "roles": {role: iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] for role in roles},
            "profiles": [each["InstanceProfileName"] for each in iam.list_instance_profiles()["InstanceProfiles"]],
        }


@dataclass(frozen=True)
class Cluster:
    """What one `ray up` did, and the autoscaler of the head after it.

    Attributes:
        config: As the launcher resolved it.
        before: What the account held.
        after: The same, once nodes of every kind were started.
        shells: What was typed on a node of each kind; `again`: on the head, when its file had changed.
        nodes: EC2's description of a node of each kind, by kind.
        ended: State of the same nodes once the autoscaler and `ray down` had ended them.
        launcher_calls: Of the launching machine.
        autoscaler_calls: Of the head.
    """

    config: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    shells: dict[str, Shell]
    nodes: dict[str, dict[str, Any]]
    ended: dict[str, str]
    launcher_calls: set[str]
    autoscaler_calls: set[str]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    home = tmp_path_factory.mktemp("home")
    # The home of the launching machine, and for the key's second place, that of the head.
    for file, content in ((".ssh/pu-ray.pem", "a key"), ("ray_bootstrap_key.pem", "a key"), (".ray/auth_token", TOKEN)):
        (home / file).parent.mkdir(exist_ok=True)
        (home / file).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
        patch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
        # Ray waits for the real AWS to spread the news, and between two tags.
        patch.setattr(aws_config, "time", SimpleNamespace(sleep=lambda _: None))
        patch.setattr(aws_node_provider, "TAG_BATCH_DELAY", 0)
        calls: list[str] = []
        ask = botocore.client.BaseClient._make_api_call

        def recorded(client: Any, operation: str, arguments: Any) -> Any:
            calls.append(f"{client.meta.service_model.service_name}:{operation}")
            return ask(client, operation, arguments)

        patch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
        with mock_aws():
            forget_clients()
            yield filled_in(calls)
            forget_clients()


def forget_clients() -> None:
    for cache in (aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die):
        cache.cache_clear()


def filled_in(calls: list[str]) -> Account:
    ec2, iam = boto3.client("ec2", REGION), boto3.client("iam")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = []
    for number, zone in enumerate("ab"):
        made = ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=REGION + zone)
        subnets.append(made["Subnet"]["SubnetId"])
        ec2.modify_subnet_attribute(SubnetId=subnets[-1], MapPublicIpOnLaunch={"Value": True})
    group = ec2.create_security_group(GroupName="pu-ray", Description="pu-ray", VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]},
        ],
    )
    ec2.create_key_pair(KeyName="pu-ray")
    image = ec2.register_image(Name="docker", RootDeviceName="/dev/sda1")["ImageId"]
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    for name in ("pu-ray-head", "pu-ray-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    file = (ROOT / "ray-cluster.yaml").read_text(encoding="utf-8")
    for placeholder, value in (
        ("ami-0123456789abcdef0", image),
        ("subnet-0123456789abcdef0", ", ".join(subnets)),
        ("sg-0123456789abcdef0", group),
    ):
        assert file.count(placeholder) == 1, f"{placeholder} is not only under metadata.fill_in"
        file = file.replace(placeholder, value)
    return Account(file, image, subnets, group, calls)


@pytest.fixture(scope="module")
def cluster(account: Account, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The whole life of a cluster, in the order in which it happens."""
    before = account.holds()
    account.calls.clear()
    config = commands._bootstrap_config(yaml.safe_load(account.file), no_config_cache=True)
    provider = aws_provider(config["provider"], config["cluster_name"])
    shells = {"head": Shell()}
    type_ray_up(config, provider, shells["head"])
    launcher_calls = set(account.calls)

    account.calls.clear()
    on_head = AutoscalingConfig(shells["head"].head_config)
    provider = aws_provider(on_head.get_config("provider"), on_head.get_config("cluster_name"))
    file = tmp_path_factory.mktemp("head") / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(shells["head"].head_config))
    adapter = NodeProviderAdapter(provider, FileConfigReader(str(file)))
    for kind in WORKERS:
        adapter._launch_nodes_by_type(kind, 1, f"request for {kind}")
    assert [str(error.__cause__) for error in adapter.poll_errors()] == []
    ids = {node.node_type: name for name, node in adapter.get_non_terminated().items()}
    for kind in WORKERS:
        shells[kind] = Shell()
        node = SimpleNamespace(cloud_instance_id=ids[kind], instance_type=kind)
        RayInstaller(provider, on_head, shells[kind]).install_ray(node, "10.0.0.5")
    autoscaler_calls = set(account.calls)
    after = account.holds()
    nodes = described(ids)

    in_a_hurry = commands._bootstrap_config(on_demand_first(yaml.safe_load(account.file)), no_config_cache=True)
    shells["again"] = Shell(running=True)
    type_ray_up(in_a_hurry, aws_provider(config["provider"], "pu-ray"), shells["again"], no_restart=True)
    assert described(ids).keys() == nodes.keys()

    account.calls.clear()
    adapter._do_terminate([ids["gpu-spot"], ids["gpu-on-demand"]], "idle")
    autoscaler_calls |= set(account.calls)
    account.calls.clear()
    provider.terminate_node(ids["cpu-decode"])
    provider.terminate_nodes([ids["head"]])
    launcher_calls |= set(account.calls)
    ended = {kind: node["State"]["Name"] for kind, node in described(ids).items()}
    return Cluster(config, before, after, shells, nodes, ended, launcher_calls, autoscaler_calls)


def on_demand_first(config: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(config))
    copy["available_node_types"]["gpu-on-demand"]["priority"] = 30
    return copy


def type_ray_up(config: dict[str, Any], provider: Any, shell: Shell, *, no_restart: bool = False) -> None:
    commands.get_or_create_head_node(
        config,
        "cluster.yaml",
        no_restart=no_restart,
        restart_only=False,
        yes=True,
        override_cluster_name=None,
        _provider=provider,
        _runner=cast(Any, shell),
    )


def described(ids: dict[str, str]) -> dict[str, dict[str, Any]]:
    found = boto3.client("ec2", REGION).describe_instances(InstanceIds=list(ids.values()))
    by_id = {node["InstanceId"]: node for reservation in found["Reservations"] for node in reservation["Instances"]}
    return {kind: by_id[name] for kind, name in ids.items()}


# -- what is started ---------------------------------------------------------------------------------------


def test_a_node_of_each_kind_is_what_the_file_says_and_only_gpu_spot_is_spot(cluster: Cluster) -> None:
    assert {kind: node["InstanceType"] for kind, node in cluster.nodes.items()} == {
        "head": "m6i.2xlarge",
        "cpu-decode": "m6i.4xlarge",
        "gpu-spot": "g5.4xlarge",
        "gpu-on-demand": "g5.4xlarge",
    }
    assert [kind for kind, node in cluster.nodes.items() if node.get("InstanceLifecycle") == "spot"] == ["gpu-spot"]


def test_every_node_has_our_network_image_and_key_and_workers_have_less_rights_than_the_head(
    account: Account, cluster: Cluster
) -> None:
    for kind, node in cluster.nodes.items():
        assert [group["GroupId"] for group in node["SecurityGroups"]] == [account.group]
        assert node["SubnetId"] in account.subnets
        assert (node["KeyName"], node["ImageId"]) == ("pu-ray", account.image)
        profile = "pu-ray-head" if kind == "head" else "pu-ray-worker"
        assert node["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")


def test_every_node_bears_the_cluster_s_name_and_its_disk_goes_with_it(cluster: Cluster) -> None:
    for kind, node in cluster.nodes.items():
        tags = {tag["Key"]: tag["Value"] for tag in node["Tags"]}
        assert tags["ray-cluster-name"] == "pu-ray"
        assert (tags[TAG_RAY_NODE_KIND], tags[TAG_RAY_USER_NODE_TYPE]) == ("head" if kind == "head" else "worker", kind)
        disks = node["BlockDeviceMappings"]
        assert [(disk["DeviceName"], disk["Ebs"]["DeleteOnTermination"]) for disk in disks] == [("/dev/sda1", True)]


def test_nodes_end_instead_of_stopping_so_that_nothing_goes_on_costing(cluster: Cluster) -> None:
    assert set(cluster.ended) == {"head", *WORKERS}
    assert set(cluster.ended.values()) == {"terminated"}


def test_stopping_would_be_seen(account: Account) -> None:
    provider = aws_provider({"region": REGION, "cache_stopped_nodes": True}, "stopping")
    config = yaml.safe_load(account.file)["available_node_types"]["cpu-decode"]["node_config"]
    (name,) = provider.create_node(config, {TAG_RAY_NODE_KIND: "worker", "ray-launch-config": ""}, 1)
    provider.terminate_node(name)
    assert described({"it": name})["it"]["State"]["Name"] == "stopped"


# -- what is left alone ------------------------------------------------------------------------------------


def test_ray_makes_no_group_role_or_key_of_its_own_and_opens_nothing(cluster: Cluster) -> None:
    assert cluster.after == cluster.before
    assert "0.0.0.0/0" not in json.dumps(cluster.after["groups"])
    assert not any(cluster.after["roles"].values())


def test_what_is_left_out_ray_fills_with_the_whole_internet_and_full_access(account: Account, cluster: Cluster) -> None:
    careless = prepare_config(yaml.safe_load(account.file) | {"cluster_name": "careless"})
    for kind in careless["available_node_types"].values():
        for left_out in ("SecurityGroupIds", "IamInstanceProfile", "KeyName"):
            del kind["node_config"][left_out]
    del careless["auth"]["ssh_private_key"]
    bootstrap(careless)
    held = account.holds()
    (added,) = held["groups"].keys() - cluster.after["groups"].keys()
    assert "0.0.0.0/0" in json.dumps(held["groups"][added])
    attached = {policy["PolicyName"] for policies in held["roles"].values() for policy in policies}
    assert attached == OPEN_POLICIES
    assert len(held["keys"]) == 2


# -- what is typed -----------------------------------------------------------------------------------------


def test_a_worker_of_every_kind_offers_memory_or_no_actor_that_asks_for_it_could_ever_start(cluster: Cluster) -> None:
    for kind in WORKERS:
        offered = cluster.config["available_node_types"][kind]["resources"]
        assert offered["CPU"] == 16
        assert offered["memory"] > 40 * 2**30, "of the 64 GiB of each"
        assert offered.get("GPU", 0) == (0 if kind == "cpu-decode" else 1)
        # What the scheduler reckons with and what the node says of itself must be the same.
        (told,) = re.findall(r"RAY_OVERRIDE_RESOURCES=[^{]*(\{[^}]*\})", cluster.shells[kind].started())
        assert json.loads(told) == offered


def test_a_container_with_the_token_runs_ray_in_token_mode_on_every_node(cluster: Cluster) -> None:
    for kind in ("head", *WORKERS):
        shell = cluster.shells[kind]
        (container,) = [line for line in shell.typed if "docker run" in line]
        assert "/.ray/auth_token:/home/ray/.ray/auth_token" in container
        assert "--env RAY_AUTH_MODE=token" in container
        assert "--runtime=nvidia" in container
        assert "RAY_AUTH_MODE=token ray start" in shell.started()
        assert f"RAY_NODE_TYPE_NAME={kind};" in shell.started()
        assert TOKEN not in "".join(shell.typed)
        checked = next(number for number, line in enumerate(shell.typed) if "ray.__version__" in line)
        assert checked < shell.typed.index(shell.started())
        assert not any("pip install" in line or "curl" in line for line in shell.typed)
    assert "--head" in cluster.shells["head"].started()
    assert "RAY_enable_autoscaler_v2=1" in cluster.shells["head"].started()
    for kind in WORKERS:
        assert "RAY_HEAD_IP=10.0.0.5" in cluster.shells[kind].started()


# -- when the work asks for nodes --------------------------------------------------------------------------

Look = Callable[..., tuple[list[str], int]]


@pytest.fixture
def look(account: Account, cluster: Cluster, tmp_path: Path) -> Look:
    """Lets a head's autoscaler look around a few times while one actor waits for a GPU.

    Returns the kinds of the workers that are up then, and how often EC2 refused.
    """

    def times(count: int, config: dict[str, Any], name: str, *, spot_sold_out: bool = False) -> tuple[list[str], int]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(config | {"cluster_name": name}))
        reader = FileConfigReader(str(file))
        provider = aws_provider(config["provider"], name)
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: "head"}
        (head,) = provider.create_node(config["available_node_types"]["head"]["node_config"], tags, 1)
        create, refused = provider.ec2_fail_fast.create_instances, []

        def sell(**wanted: Any) -> Any:
            if spot_sold_out and "InstanceMarketOptions" in wanted:
                refused.append(wanted["SubnetId"])
                answer = {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "no spot"}}
                raise ClientError(answer, "RunInstances")
            return create(**wanted)

        provider.ec2_fail_fast = SimpleNamespace(create_instances=sell)
        # With one thread, whatever is handed in later starts later.
        adapter = NodeProviderAdapter(provider, reader, max_launch_batch_per_type=1, max_concurrent_launches=1)
        monitor = CloudResourceMonitor()
        manager = InstanceManager(
            InstanceStorage(name, in_memory()), [CloudInstanceUpdater(cloud_provider=adapter), monitor]
        )
        scheduler = ResourceDemandScheduler(None)
        for version in range(1, count + 1):
            Reconciler.reconcile(
                instance_manager=manager,
                scheduler=scheduler,
                cloud_provider=adapter,
                cloud_resource_monitor=monitor,
                ray_cluster_resource_state=one_actor_waits(head, version),
                non_terminated_cloud_instances=adapter.get_non_terminated(),
                autoscaling_config=reader.get_cached_autoscaling_config(),
                cloud_provider_errors=adapter.poll_errors(),
            )
            for thread in (adapter._main_executor, adapter._node_launcher_executors):
                thread.submit(lambda: None).result()
        if refused:
            assert set(refused) == set(account.subnets), "every zone was tried"
        return [node.node_type for node in adapter.get_non_terminated().values() if node.node_type != "head"], len(
            refused
        )

    return times


def one_actor_waits(head: str, version: int) -> Any:
    """What Ray's head would tell its autoscaler."""
    state = messages.ClusterResourceState(cluster_resource_state_version=version)
    state.node_states.add(
        node_id=b"head",
        instance_id=head,
        ray_node_type_name="head",
        status=messages.NodeStatus.RUNNING,
        total_resources={"node:__internal_head__": 1.0, "memory": 2.0**34},
    )
    wanted = state.pending_resource_requests.add(count=1).request
    wanted.resources_bundle.update({"CPU": 1, "GPU": 1, "memory": 4 * 2**30})
    return state


def test_work_for_a_gpu_is_answered_with_a_spot_node(look: Look, cluster: Cluster) -> None:
    assert look(2, cluster.shells["head"].head_config, "spot") == (["gpu-spot"], 0)


def test_a_kind_without_memory_would_never_be_started(look: Look, cluster: Cluster) -> None:
    forgetful = json.loads(json.dumps(cluster.shells["head"].head_config))
    for kind in WORKERS:
        del forgetful["available_node_types"][kind]["resources"]["memory"]
    assert look(2, forgetful, "forgetful") == ([], 0)


def test_spot_that_is_sold_out_is_asked_for_until_on_demand_is_given_priority(look: Look, cluster: Cluster) -> None:
    # Autoscaler v2 of Ray 2.60 remembers a kind as sold out only if its nodes were promised and never came
    # (ALLOCATION_TIMEOUT), and EC2 refuses at once (ALLOCATION_FAILED). ray-cluster.yaml and docs/cluster.md say so:
    # when a new Ray fails this test, mend them.
    up, refused = look(4, cluster.shells["head"].head_config, "sold-out", spot_sold_out=True)
    assert up == []
    assert refused >= 4
    assert look(2, cluster.shells["again"].head_config, "hurry", spot_sold_out=True) == (["gpu-on-demand"], 0)


def test_a_changed_file_reaches_the_head_without_a_restart(cluster: Cluster) -> None:
    again = cluster.shells["again"]
    assert again.head_config["available_node_types"]["gpu-on-demand"]["priority"] == 30
    assert any("docker exec" in line and "pu-ray:/home/ray/ray_bootstrap_config.yaml" in line for line in again.typed)
    assert not any(
        word in line for line in again.typed for word in ("ray start", "ray stop", "docker run", "docker stop")
    )


# -- what docs/cluster.md says -----------------------------------------------------------------------------


def policies() -> dict[str, dict[str, Any]]:
    """By name: the JSON blocks below the paragraphs that begin with it."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^`(\w+)\.json`, for [^`]*(?:`[^`\n]*`[^`]*)*?\n\n```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return {name: json.loads(block) for name, block in found}


def allowed(policy: dict[str, Any], service: str) -> set[str]:
    lists = [statement["Action"] for statement in policy["Statement"]]
    return {action for actions in lists for action in actions if action.startswith(f"{service}:")}


def test_the_policies_in_the_document_allow_what_ray_asks_and_nothing_else(cluster: Cluster) -> None:
    document = policies()
    assert set(document) == {"storage", "head", "launcher"}
    assert allowed(document["launcher"], "ec2") == cluster.launcher_calls
    assert allowed(document["head"], "ec2") == cluster.autoscaler_calls
    for name, role in (("launcher", "pu-ray-head"), ("head", "pu-ray-worker")):
        # Not a call: EC2 asks IAM for it when a node with a profile is started.
        assert allowed(document[name], "iam") == {"iam:PassRole"}
        (passing,) = [each for each in document[name]["Statement"] if each["Action"] == ["iam:PassRole"]]
        assert passing["Resource"].endswith(f":role/{role}")


def test_the_policies_know_the_kinds_of_the_cluster_file() -> None:
    kinds = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text(encoding="utf-8"))["available_node_types"]
    types = {kind: settings["node_config"]["InstanceType"] for kind, settings in kinds.items()}
    for name, wanted in (("launcher", {types["head"]}), ("head", {types[kind] for kind in WORKERS})):
        (named,) = [
            statement["Condition"]["StringEquals"]["ec2:InstanceType"]
            for statement in policies()[name]["Statement"]
            if "ec2:InstanceType" in statement.get("Condition", {}).get("StringEquals", {})
        ]
        assert {named} == wanted if isinstance(named, str) else set(named) == wanted


def test_no_policy_in_the_document_is_wider_than_a_few_named_actions() -> None:
    for policy in policies().values():
        for statement in policy["Statement"]:
            assert statement["Effect"] == "Allow"
            assert not any("*" in action for action in statement["Action"])
            # EC2 lists nothing by halves.
            describes = all(action.startswith("ec2:Describe") for action in statement["Action"])
            assert (statement["Resource"] == "*") == describes


@pytest.fixture
def worker_s_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 that judges requests, the buckets of the document, and the rights of a worker in the environment."""
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(variable, raising=False)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    anybody = {"endpoint_url": url, "region_name": REGION, "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    s3, iam = boto3.client("s3", **anybody), boto3.client("iam", **anybody)
    for bucket in ("your-lake", "your-runs", "of-others"):
        s3.create_bucket(Bucket=bucket)
        s3.put_object(Bucket=bucket, Key="there", Body=b"content")
    iam.create_user(UserName="worker")
    policy = json.dumps(policies()["storage"])
    iam.put_user_policy(UserName="worker", PolicyName="storage", PolicyDocument=policy)
    key = iam.create_access_key(UserName="worker")["AccessKey"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    httpx.post(f"{url}/moto-api/reset-auth", content=b"0").raise_for_status()  # judge from the next request on
    yield
    httpx.post(f"{url}/moto-api/reset-auth", content=b"inf").raise_for_status()
    server.stop()


@pytest.mark.usefixtures("worker_s_storage")
def test_all_that_our_storage_does_works_under_the_document_s_policy_and_nowhere_else() -> None:
    lake, run = Storage("s3://your-lake"), Storage("s3://your-runs/shop")
    assert [file.path for file in lake.list_files()] == ["there"]
    assert lake.read_bytes("there") == b"content"
    run.write_bytes("small", b"x")
    run.write_bytes("parts", b"x" * (12 << 20))  # more than one part
    run.write_table("rows.parquet", pa.table({"row": [1, 2]}))
    assert run.read_table("rows.parquet").num_rows == 2
    assert not run.exists("missing")
    assert run.write_if("lock", b"1", None)
    assert run.write_if("lock", b"2", run.tag("lock"))
    filesystem, root = storage_for_ray(run)
    filesystem.copy_file(f"{root}/small", f"{root}/checkpoint/small")
    filesystem.delete_dir(f"{root}/checkpoint")
    run.delete()
    assert run.list_files() == []
    for forbidden in (
        lambda: lake.write_bytes("mine", b"x"),
        lambda: lake.delete("there"),
        lambda: Storage("s3://of-others").read_bytes("there"),
        lambda: Storage("s3://of-others").list_files(),
    ):
        with pytest.raises(DataError, match="is not permitted"):
            forbidden()


# -- machines of one's own ---------------------------------------------------------------------------------


@pytest.fixture
def on_prem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """cluster/on-prem.yaml as the launcher resolves it; Ray's files about it lie in a folder of the test's own."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (".ssh/id_ed25519", ".ray/auth_token"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(TOKEN)
    file = yaml.safe_load((ROOT / "cluster" / "on-prem.yaml").read_text(encoding="utf-8"))
    resolved: dict[str, Any] = commands._bootstrap_config(file, no_config_cache=True)
    return resolved


def test_on_prem_every_machine_named_becomes_a_worker_and_stays_one(on_prem: dict[str, Any], tmp_path: Path) -> None:
    machines = on_prem["provider"]["worker_ips"]
    (kind,) = on_prem["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(machines)
    assert kind["resources"] == {}, "each machine says itself what it has, memory included"
    provider = local_provider(on_prem["provider"], on_prem["cluster_name"])
    assert provider.non_terminated_nodes({}) == []
    record_local_head_state_if_needed(provider)
    provider.create_node({}, {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}, kind["min_workers"])
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}) == [on_prem["provider"]["head_ip"]]
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}) == machines
    assert (tmp_path / "ray" / f"cluster-{on_prem['cluster_name']}.state").is_file()
    for machine in provider.nodes_for_teardown({}):
        provider.terminate_node(machine)
    assert provider.non_terminated_nodes({}) == []


@pytest.mark.parametrize(("variable", "v2"), [("0", False), ("1", True)])
def test_on_prem_the_head_starts_with_the_autoscaler_that_the_launcher_s_environment_names(
    on_prem: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str, v2: bool
) -> None:
    monkeypatch.setenv("RAY_UP_enable_autoscaler_v2", variable)
    shell = Shell()
    type_ray_up(on_prem, local_provider(on_prem["provider"], on_prem["cluster_name"]), shell)
    assert ("RAY_enable_autoscaler_v2=1" in shell.started()) == v2
    assert "RAY_AUTH_MODE=token ray start --head" in shell.started()
    assert f"ubuntu@{on_prem['provider']['head_ip']}" in shell.started()
    assert any("rsync" in line and line.endswith(":~/.ray/auth_token") for line in shell.typed)
    assert TOKEN not in "".join(shell.typed)
