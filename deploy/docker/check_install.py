"""Builds the image of a Dockerfile without Docker, in a clean root, and serves from it as an orchestrator would.

    .venv/bin/python deploy/docker/check_install.py --work /var/tmp/image

It needs Linux, root, `mmdebstrap` (or `--base TAR`, the root file system of the Dockerfile's BASE), `unshare`, about
15 GB of disk and the network for the build. The instructions of the Dockerfile are carried out in order, each RUN line
by `sh -c` in a chroot. Then its ENTRYPOINT runs as its USER: the root read-only, only its VOLUMEs and /dev/shm
writable, without capabilities and without a network. A client of another uid reads captures from shared memory. The
last lines are the figures.
"""

import argparse
import ctypes
import errno
import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
SERVE_S = 900
"""Seconds within which the server must serve."""

REFUSED = (237, 238, 239, 256, 272, 308, 298, 323, 425, 426, 427, 248, 249, 250, 304, 321)
"""Of the system calls that the default profiles of container runtimes refuse without capabilities, on x86-64, those
that a program like this might make: mbind, set_mempolicy, get_mempolicy, migrate_pages, unshare, setns,
perf_event_open, userfaultfd, io_uring_*, keyctl and its like, open_by_handle_at, bpf."""

HOST = "/run/host"
"""Where `--bind` shows this machine's files to RUN lines."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """One FROM of a Dockerfile, as far as it has been carried out."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    """ARG and ENV."""
    settings: dict[str, str] = field(default_factory=dict)
    """USER, VOLUME, HEALTHCHECK, STOPSIGNAL and ENTRYPOINT, as they are written."""


def main() -> int:
    """Builds, or with --reuse takes what was built, and serves; returns 0 if all of it worked."""
    if sys.argv[1:2] == ["--filtered"]:
        _refuse_system_calls()
        os.execvp(sys.argv[2], sys.argv[2:])
    options = _options()
    if options.inside is not None:
        return _serve_inside(json.loads(options.inside))
    began = time.monotonic()
    record = options.work / "stage.json"
    if options.reuse:
        stage = _stage_from(json.loads(record.read_text()))
    else:
        stage = build(options)
        stage_dict = {"root": str(stage.root), "variables": stage.variables, "settings": stage.settings}
        record.write_text(json.dumps(stage_dict))
        print(f"built in {time.monotonic() - began:.0f} s; {_used(stage.root) / 1e9:.2f} GB", flush=True)
    return serve(stage, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the image of a Dockerfile in a clean root, and serve from it.")
    parser.add_argument("--dockerfile", type=Path, default=Path(__file__).with_name("Dockerfile.cpu"))
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/steerllm-image"), help="folder of the roots")
    parser.add_argument("--base", type=Path, help="tar file of the base's root; default: made by mmdebstrap")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], help=f"path that RUN lines see under {HOST}, read-only")
    parser.add_argument("--reuse", action="store_true", help="serve from the root of an earlier call")
    parser.add_argument("--shm-bytes", type=int, default=1 << 30, help="size of /dev/shm (default: %(default)s)")
    parser.add_argument("--serve", default="", help="further arguments of `steer serve`")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


def _stage_from(record: Mapping[str, object]) -> Stage:
    return Stage(root=Path(str(record["root"])), variables=record["variables"], settings=record["settings"])  # type: ignore[arg-type]


# ---- building ----


def build(options: argparse.Namespace) -> Stage:
    """Carries out the Dockerfile; returns its last stage."""
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    given = dict(pair.split("=", 1) for pair in options.build_arg)
    stages: dict[str, Stage] = {}
    defaults: dict[str, str] = {}  # ARG before the first FROM
    stage = Stage(root=options.work)
    parser = DockerfileParser(fileobj=io.BytesIO(options.dockerfile.read_bytes()), env_replace=False)
    for number, line in enumerate(parser.structure):
        kind, value = line["instruction"], line["value"]
        began = time.monotonic()
        if kind == "FROM":
            words = _expanded(value, defaults).split()
            base = options.base or _bootstrapped(words[0], options.work)
            stage = Stage(root=options.work / f"stage-{len(stages)}", variables={"PATH": SYSTEM_PATH})
            stages[words[2] if len(words) > 2 else str(len(stages))] = stage
            stage.root.mkdir()
            subprocess.run(["tar", "-xpf", base, "-C", stage.root, "--exclude=./dev/*"], check=True)
        elif kind == "ARG":
            name, _, default = value.partition("=")
            (stage.variables if stages else defaults)[name] = given.get(name, default)
        elif kind == "ENV":
            pairs = (word.split("=", 1) for word in shlex.split(value))
            stage.variables |= {name: _expanded(text, stage.variables) for name, text in pairs}
        elif kind == "COPY":
            _copy(shlex.split(value), stages, stage)
        elif kind == "RUN":
            _run(value, stage, options.bind, {name: text for name, text in given.items() if name.startswith("PIP_")})
        elif kind == "WORKDIR":
            _within(stage.root, value).mkdir(parents=True, exist_ok=True)
        elif kind in ("USER", "VOLUME", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT"):
            stage.settings[kind] = value
        elif kind not in ("LABEL", "EXPOSE", "COMMENT"):
            raise SystemExit(f"{kind} is not known here: {value}")
        if kind in ("RUN", "COPY", "FROM"):
            print(f"[{number}] {time.monotonic() - began:6.1f} s  {kind} {value[:90]}", flush=True)
    return stage


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace("${" + name + "}", value)
    return text


def _bootstrapped(image: str, work: Path) -> Path:
    """The root of `debian:SUITE-slim`, with Debian's essential packages."""
    name, _, tag = image.partition(":")
    if name != "debian":
        raise SystemExit(f"give --base TAR, the root file system of {image}")
    tar = work / "base.tar"
    if not tar.exists():
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", tag.removesuffix("-slim"), tar], check=True)
    return tar


def _copy(words: Sequence[str], stages: Mapping[str, Stage], stage: Stage) -> None:
    source_root = REPOSITORY
    if words[0].startswith("--from="):
        source_root, words = stages[words[0].removeprefix("--from=")].root, words[1:]
    *sources, target = words
    to = _within(stage.root, target)
    if target.endswith("/"):
        to.mkdir(parents=True, exist_ok=True)
    for source in sources:
        path = _within(source_root, source)
        if path.is_dir():  # its content, as Docker does
            shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, to)


def _within(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _run(command: str, stage: Stage, binds: Sequence[str], settings: Mapping[str, str]) -> None:
    root = shlex.quote(str(stage.root))
    lines = ["set -e", f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
    lines += [f"mount -t tmpfs tmpfs {root}/run"]
    for bind in binds:
        target = f"{root}{HOST}{bind}"
        make = "mkdir -p" if Path(bind).is_dir() else f"mkdir -p $(dirname {target}) && touch"
        lines += [f"{make} {target}", f"mount --rbind -o ro {bind} {target}"]
    for name in ("resolv.conf", "hosts"):
        lines.append(f"touch {root}/etc/{name} && mount --bind /etc/{name} {root}/etc/{name}")
    environment = [f"{name}={value}" for name, value in (stage.variables | settings).items()]
    lines.append(shlex.join(["exec", "chroot", str(stage.root), "env", "-i", *environment, "sh", "-c", command]))
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}: RUN {command}\n{done.stdout[-4000:]}")


# ---- serving ----


def serve(stage: Stage, options: argparse.Namespace) -> int:
    """Runs the entry point and its clients in namespaces of their own; returns 0 if all of it worked."""
    volumes = options.work / "volumes"
    shutil.rmtree(volumes, ignore_errors=True)
    volumes.mkdir()
    inside = json.dumps({
        "root": str(stage.root), "variables": stage.variables, "settings": stage.settings,
        "shm_bytes": options.shm_bytes, "serve": shlex.split(options.serve), "volumes": str(volumes),
    })  # fmt: skip
    command = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", sys.executable]
    return subprocess.run([*command, __file__, "--inside", inside], check=False).returncode


CLIENT = """
import os
import numpy as np
from steer_client import AddSpec, CaptureSpec, LayerSteeringSpec, SteerClient, SteeringSpec
with SteerClient("127.0.0.1:50051", shm_dir="/captures") as model:
    width, layers = model.hidden_size, range(model.layer_count)
    def program(seed):
        vectors = np.random.default_rng(seed).normal(size=(len(layers), width))
        return SteeringSpec(layers={i: LayerSteeringSpec([AddSpec(vectors[i], 0.01)]) for i in layers})
    prompts = [f"{i} times the sea is" * (1 + i % 8) for i in range(64)]
    results, handles = model.generate(
        prompts, max_tokens=8, steering_spec=[program(i) for i in range(64)], raw_output=True,
        capture=CaptureSpec(layers=layers, delivery="shared_memory_required"),
    )
    for result in results:
        assert result.outputs[0].receipt.rows_steered == result.outputs[0].receipt.rows_total, result.outputs[0].receipt
    rows = [handle.fetch()[5][0]["hidden"] for handle in handles]
    assert all(np.isfinite(each).all() and each.any() for each in rows)
    held = sum(os.stat(f"/captures/{name}").st_size for name in os.listdir("/captures"))
    print("uid", os.getuid(), "mapped", sum(map(len, rows)), "rows of each layer;", held >> 20, "MiB in /captures")
    for handle in handles:
        handle.close()
    texts, _ = model.generate(["Is the sea blue?"], max_tokens=4, structured_outputs={"choice": ["yes", "no"]})
    assert texts[0] in ("yes", "no"), texts
"""


def _serve_inside(given: Mapping[str, object]) -> int:
    stage = _stage_from(given)
    root, uid_gid = stage.root, stage.settings["USER"].split(":")
    volumes = [*json.loads(stage.settings["VOLUME"]), "/captures"]
    _mount(stage, volumes, Path(str(given["volumes"])), int(str(given["shm_bytes"])), uid_gid[1])
    # The entry point, with what a pod has: settings in variables, captures of a group's.
    command = [
        *json.loads(stage.settings["ENTRYPOINT"]), "--metrics-port", "9464", "--shm-dir", "/captures",
        "--shm-mode", "640", "--shm-group", uid_gid[1], *given["serve"],  # type: ignore[misc]
    ]  # fmt: skip
    began = time.monotonic()
    server = subprocess.Popen(_as_user(stage, *uid_gid, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    is_serving, ended_or_serving = threading.Event(), threading.Event()
    threading.Thread(target=_forward, args=(server, began, is_serving, ended_or_serving)).start()
    if not (ended_or_serving.wait(SERVE_S) and is_serving.is_set()):
        server.kill()
        raise SystemExit("the server does not serve")
    steps = {
        "generate": (uid_gid[0], ["steer", "generate", "The sea is", "--max-tokens", "8"]),
        "shared memory, another uid": ("10002", ["python", "-c", CLIENT]),
        "/health": (uid_gid[0], ["python", "-c", _get("health")]),
        "/ready": (uid_gid[0], ["python", "-c", _get("ready")]),
    }
    steps["HEALTHCHECK"] = (uid_gid[0], json.loads(stage.settings["HEALTHCHECK"].partition("CMD")[2]))
    failed = 0
    for name, (uid, step) in steps.items():
        began = time.monotonic()
        status = subprocess.run(_as_user(stage, uid, uid_gid[1], step), check=False).returncode
        failed |= status
        print(f"{name}: status {status}, {time.monotonic() - began:.1f} s", flush=True)
    _print_figures(root, volumes, server.pid)
    began = time.monotonic()
    server.terminate()
    failed |= server.wait(timeout=120)
    print(f"SIGTERM: status {server.returncode}, {time.monotonic() - began:.1f} s", flush=True)
    left = [path.name for folder in ("dev/shm", "captures") for path in (root / folder).iterdir()]
    print(f"left in shared memory: {left or 'nothing'}", flush=True)
    return 1 if failed or [name for name in left if not name.startswith("sem.")] else 0


def _forward(
    server: subprocess.Popen[bytes], began: float, is_serving: threading.Event, ended_or_serving: threading.Event
) -> None:
    """Prints what the server prints, with its time; sets the events when it serves, the latter also when it ends."""
    assert server.stdout is not None
    for line in server.stdout:
        print(f"{time.monotonic() - began:6.1f} s  {line.decode(errors='replace').rstrip()}", flush=True)
        if line.startswith(b"steer: serving"):
            is_serving.set()
            ended_or_serving.set()
    ended_or_serving.set()


def _get(path: str) -> str:
    return f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:9464/{path}').status)"


def _as_user(stage: Stage, uid: str, gid: str, command: Sequence[str]) -> list[str]:
    environment = [f"{name}={value}" for name, value in stage.variables.items()]
    setpriv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={gid}", "--no-new-privs", "--inh-caps=-all",
               "--bounding-set=-all"]  # fmt: skip
    filtered = [sys.executable, __file__, "--filtered", "chroot", str(stage.root)]
    return [*filtered, *setpriv, "env", "-i", "-C", "/tmp", *environment, *command]


def _refuse_system_calls() -> None:
    """Lets REFUSED fail with EPERM from now on, also in programs that this process starts."""
    refuse = struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | errno.EPERM)
    program = struct.pack("HBBI", 0x20, 0, 0, 0)  # load the number of the system call
    for number in REFUSED:
        program += struct.pack("HBBI", 0x15, 0, 1, number) + refuse  # if it is equal, else skip one
    program += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter")


def _mount(stage: Stage, volumes: Sequence[str], store: Path, shm_bytes: int, group: str) -> None:
    root = stage.root
    for path in volumes:
        _within(root, path).mkdir(parents=True, exist_ok=True)
    _sh(f"mount --bind {root} {root}")
    _sh(f"mount -t tmpfs tmpfs {root}/dev && mkdir {root}/dev/shm")
    for name in DEVICES:
        _sh(f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}")
    _sh(f"mount -t proc proc {root}/proc && mount -t sysfs -o ro sysfs {root}/sys")
    _sh(f"mount -o remount,bind,ro {root}")
    _sh(f"mount -t tmpfs -o mode=1777,size={shm_bytes} tmpfs {root}/dev/shm")
    for path in volumes:  # as an emptyDir with an fsGroup
        if path == "/captures":
            _sh(f"mount -t tmpfs -o mode=2770,gid={group},size={shm_bytes} tmpfs {root}/captures")
        else:
            folder = store / path.strip("/").replace("/", "-")
            folder.mkdir()
            os.chown(folder, 0, int(group))
            folder.chmod(0o2775)
            _sh(f"mount --bind {folder} {root}{path}")
    _sh("ip link set lo up")


def _sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


def _print_figures(root: Path, volumes: Sequence[str], server: int) -> None:
    for path in ("/dev/shm", "/captures"):
        system = os.statvfs(_within(root, path))
        used = (system.f_blocks - system.f_bfree) * system.f_frsize
        print(f"{path}: {used / 2**20:.1f} MiB used", flush=True)
        for file in sorted(_within(root, path).iterdir()):
            about = file.stat()
            print(f"    {file.name}: {about.st_size / 2**20:.1f} MiB, {about.st_blocks / 2048:.1f} MiB allocated")
    for path in volumes:
        if path != "/captures":
            print(f"{path}: {_used(_within(root, path)) / 2**20:.0f} MiB on disk", flush=True)
            for child in sorted((_within(root, path) / ".cache").glob("*")):
                print(f"    {child.name}: {_used(child) / 2**20:.0f} MiB", flush=True)
    total = 0.0
    proc = root / "proc"  # of this namespace
    for process in sorted(int(name) for name in os.listdir(proc) if name.isdecimal() and name != "1"):
        try:
            name = Path(f"{proc}/{process}/cmdline").read_bytes().replace(b"\0", b" ")[:60].decode()
            lines = Path(f"{proc}/{process}/smaps_rollup").read_text().splitlines()
            pss = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
            files = len(os.listdir(f"{proc}/{process}/fd"))
        except OSError:
            continue
        total += pss["Pss"]
        print(f"pid {process}: {pss['Pss']:.0f} MiB ({pss['Pss_Shmem']:.0f} shared), {files} files: {name}", flush=True)
    print(f"all processes: {total:.0f} MiB", flush=True)


def _used(folder: Path) -> int:
    return int(
        subprocess.run(["du", "-sx", "-B1", folder], capture_output=True, text=True, check=False).stdout.split()[0]
    )


if __name__ == "__main__":
    sys.exit(main())
