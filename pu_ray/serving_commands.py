"""The commands around serving: `serve`, `predict`, `token` and `registry`."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pu_ray.errors import ConfigError
from pu_ray.options import Address, Json, State, Url, Verbose, print_json
from pu_ray.progress import Narrator

_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Its per-request records cost a request 0.3 ms of CPU; our own metrics count the same requests.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # A process that stops waits so long for HAProxy to hear of it. Ray's 30 s are for load balancers of a cloud.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}

# Where HAProxy listens besides: Ray's choices, and others where another server of this machine has these.
_HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}

# Ray runs its workers at 15, so that a busy one never starves the node. Here a request waits for them, and HAProxy
# before them runs at 0: whatever else runs on the machine would come first.
_PRIORITY = {"RAY_worker_niceness": "0"}

registry_app = typer.Typer(no_args_is_help=True, help="Versions of students, and which of them answers.")

Registry = Annotated[str, typer.Argument(metavar="REGISTRY", help="Folder or URI of the registry.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the student.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="A version, or how it begins.")]
VersionOrNone = Annotated[
    str | None, typer.Argument(metavar="[VERSION]", help="A version, or how it begins; left out: none.")
]


def add_to(app: typer.Typer) -> None:
    """Make these commands of the command line."""
    for command in (serve, predict, token):
        app.command()(command)
    app.add_typer(registry_app, name="registry")


# -- serving -----------------------------------------------------------------------------------------------


def serve(
    students: Annotated[
        list[str], typer.Argument(metavar="EXPORTED...", help="Folders or URIs of exported students, or one registry.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(help="Speak gRPC there too; Ray Serve opens it on every interface.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="File or URI of token digests (`pu-ray token`); default: this user's own token."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask nobody for a token.")] = False,
    engine: Annotated[
        str, typer.Option(help="auto (the fastest, as the export measured), onnx, onnx-int8 or torch.")
    ] = "auto",
    replicas: Annotated[int, typer.Option(help="Processes per student.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="Let each student scale up to so many processes, by requests under way.")
    ] = None,
    placement: Annotated[
        str,
        typer.Option(help="inside (processes that speak HTTP answer), apart (each version has its own), or auto."),
    ] = "auto",
    fronts: Annotated[
        int, typer.Option(help="Processes that speak HTTP and gRPC, where each version has processes of its own.")
    ] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs per process, or a share of one.")] = 0.0,
    haproxy: Annotated[
        bool,
        typer.Option("--haproxy", help="HAProxy in the place of Ray's Python proxy; listens on every interface."),
    ] = False,
    tail: Annotated[
        list[str] | None,
        typer.Option(help="Students that share a process, opened on demand, none while nobody asks; * for all."),
    ] = None,
    config_out: Annotated[
        Path | None, typer.Option(help="Start nothing: write a Serve config file for `serve deploy` or RayService.")
    ] = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Serve exported students on Ray Serve until Ctrl-C."""
    State.verbose = verbose
    State.resume_hint = "the server has stopped"
    if haproxy:
        if address is not None:
            raise ConfigError(
                "a running cluster has chosen its proxy",
                slug="proxy-already-chosen",
                where="--haproxy",
                hint="set RAY_SERVE_ENABLE_HA_PROXY=1 on every node before Ray starts there",
            )
        ports = {variable: str(_free_port(port)) for variable, port in _HAPROXY_PORTS.items()}
        for variable, value in (_HAPROXY | ports).items():
            os.environ.setdefault(variable, value)  # Ray reads them when it is first imported
    from serving import lean

    lean.import_serve()
    from cluster.session import ray_session
    from serving import app as server
    from serving import auth, deployment_file
    from serving.settings import settings_from

    changes: dict[str, Any] = {"engine": engine, "grpc_port": grpc_port, "replicas": replicas}
    changes |= {"max_replicas": max_replicas or replicas, "tail": tuple(tail or ())}
    changes |= {"placement": placement, "gpus_per_replica": gpus, "fronts": fronts}
    if no_auth:
        changes["authentication"] = "off"
    elif tokens is not None:
        changes["tokens_uri"] = tokens if "://" in tokens else str(Path(tokens).absolute())
    else:
        changes["token_digests"] = (auth.digest(auth.own_token()),)
    settings = settings_from(changes)
    narrator = Narrator()
    if config_out is not None:
        text = deployment_file.text(students, settings, host=host, port=port)
        try:
            config_out.write_text(text)
        except OSError as error:
            raise ConfigError(
                "the file cannot be written",
                slug="file-not-writable",
                where="--config-out",
                got=f"{config_out}: {error.strerror}",
            ) from error
        narrator.say(f"wrote {config_out}; `serve deploy {config_out}` brings it to a cluster")
        return

    def on_ready(url: str) -> None:
        narrator.say(f"serving at {url}; Ctrl-C stops it. For example:\n  pu-ray predict --url {url} IMAGE")
        if not no_auth and tokens is None:
            narrator.say(f"  clients of this user find their token in {auth.own_token_file()}")

    needed = len(students) * settings.replicas * settings.cpus_per_replica + 2.0
    with ExitStack() as stack:
        if not verbose:
            # Ray reports the end of its own controller on stdout, as an error.
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        session = ray_session(
            address=address, verbose=verbose, needed_cpus=needed, worker_hook=lean.HOOK, variables=_PRIORITY
        )
        stack.enter_context(session)
        # Whoever manages processes says SIGTERM where a person says Ctrl-C. Ray's own handler prints a stack.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.run_until_interrupted(
            students, settings, host=host, port=port, on_ready=on_ready, on_change=narrator.say
        )


def _free_port(wanted: int) -> int:
    """This TCP port if nobody listens there, else any."""
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    return wanted  # HAProxy will say what is wrong


def predict(
    image_files: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, folders of them, or - for one on stdin.")
    ],
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Which student; default: the only one.")] = None,
    top_k: Annotated[int, typer.Option(help="Answers per image.")] = 3,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Classify images with a served student; the token is that of PU_RAY_TOKEN, else this user's own."""
    State.verbose = verbose
    from serving.client import Client

    answers = []
    with Client(url) as client:
        for name, content in _images(image_files):
            answer = client.classify(content, model=model, top_k=top_k)
            answers.append({"file": name, **asdict(answer)})
            if not as_json:
                said = ", ".join(f"{item.label} {item.probability:.3f}" for item in answer.predictions)
                print(f"{name}: {said}")
    if as_json:
        print_json(answers)


_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def _images(given: list[Path]) -> Any:
    """Name and content of every image, one after the other."""
    for path in given:
        if str(path) == "-":
            yield "-", sys.stdin.buffer.read()
            continue
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
            if not files:
                raise ConfigError(
                    "there is no image in this folder",
                    slug="no-image-in-folder",
                    where=str(path),
                    allowed=", ".join(_SUFFIXES),
                )
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                raise ConfigError(
                    "the image cannot be read", slug="image-unreadable", where=str(file), got=error.strerror
                ) from error
            yield str(file), content


def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose token it will be, for the log.")],
    add_to: Annotated[Path | None, typer.Option("--add-to", help="Append its line to this tokens file.")] = None,
) -> None:
    """Make a token: it is printed once, and a server knows its digest alone."""
    from serving import auth

    fresh = auth.new_token()
    line = f"{auth.digest(fresh)} {' '.join(name.split())}"
    if add_to is not None:
        try:
            with add_to.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise ConfigError(
                "the tokens file cannot be written",
                slug="tokens-file-not-writable",
                where=str(add_to),
                got=error.strerror,
            ) from error
    else:
        print(f"line of the tokens file: {line}", file=sys.stderr)
    print(fresh)


# -- registry ----------------------------------------------------------------------------------------------


@registry_app.command("add")
def registry_add(
    registry: Registry,
    exported: Annotated[str, typer.Argument(metavar="EXPORTED", help="Folder or URI of an exported student.")],
) -> None:
    """Copy an exported student into the registry; the first version of a name is stable at once."""
    from serving.catalog import Catalog

    student = Catalog(registry).add(exported)
    print(f"{student.name} {student.version}")


@registry_app.command("list")
def registry_list(registry: Registry, as_json: Json = False) -> None:
    """All students, their versions and routes."""
    from serving.catalog import Catalog

    entries = Catalog(registry).entries()
    if as_json:
        print_json(
            [
                {"name": entry.name, "versions": list(entry.uris), **entry.routed.model_dump(mode="json")}
                for entry in entries.values()
            ]
        )
        return
    for entry in entries.values():
        route = entry.routed.route
        for version in entry.uris:
            roles = ["stable"] if version == route.stable else []
            roles += [f"canary {100 * route.canary_share:g} %"] if version == route.canary else []
            roles += ["shadow"] if version == route.shadow else []
            roles += [alias for alias, named in route.aliases.items() if named == version]
            print(f"{entry.name}  {version}  {', '.join(roles)}".rstrip())


@registry_app.command("promote")
def registry_promote(registry: Registry, name: Name, version: VersionOrNone = None) -> None:
    """Make a version, by default the canary, the stable one."""
    from serving.catalog import Catalog

    print(f"stable: {Catalog(registry).promote(name, version).route.stable}")


@registry_app.command("rollback")
def registry_rollback(registry: Registry, name: Name) -> None:
    """Go back to the stable version before this one."""
    from serving.catalog import Catalog

    print(f"stable: {Catalog(registry).rollback(name).route.stable}")


@registry_app.command("canary")
def registry_canary(
    registry: Registry,
    name: Name,
    version: VersionOrNone = None,
    percent: Annotated[float, typer.Option(min=0.0, max=100.0, help="Of the requests that name no version.")] = 10.0,
) -> None:
    """Give a version a share of the requests; without a version, end the canary."""
    from serving.catalog import Catalog

    route = Catalog(registry).canary(name, version, percent / 100).route
    print(f"canary: {route.canary} {100 * route.canary_share:g} %" if route.canary else "no canary")


@registry_app.command("shadow")
def registry_shadow(registry: Registry, name: Name, version: VersionOrNone = None) -> None:
    """Give a version copies of the stable version's requests; without a version, end it."""
    from serving.catalog import Catalog

    print(f"shadow: {Catalog(registry).shadow(name, version).route.shadow or 'none'}")


@registry_app.command("alias")
def registry_alias(
    registry: Registry,
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="A further name for a version.")],
    version: VersionOrNone = None,
) -> None:
    """Give a version a further name; without a version, take the name away."""
    from serving.catalog import Catalog

    aliases = Catalog(registry).alias(name, alias, version).route.aliases
    print(", ".join(f"{key}: {value}" for key, value in aliases.items()) or "no aliases")


@registry_app.command("remove")
def registry_remove(registry: Registry, name: Name, version: Version) -> None:
    """Delete a version that no route names."""
    from serving.catalog import Catalog

    print(f"removed {Catalog(registry).remove(name, version)}")
