"""Launch scripts: the commands they print, what they refuse, how words reach a worker, and a worker on this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACE = "--project=my-project --zone=us-east5-a"
TRAIN = (
    "train --config configs/pretrain.py:14b --workdir gs://my-bucket/runs/14b "
    "--compilation-cache gs://my-bucket/cache --config.data.source=gs://my-bucket/data/laion_coco "
    "--config.tokenizer.path=gs://my-bucket/tokenizer.model --config.init.llama=gs://my-bucket/weights/llama "
    "--config.init.vision=gs://my-bucket/weights/vision"
)
QUEUED = "gcloud compute tpus queued-resources"
VM = "gcloud compute tpus tpu-vm"
DESCRIBE = f"{QUEUED} describe emu {PLACE} '--format=value(state.state)'"
CREATE = (
    f"{QUEUED} create emu {PLACE} --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-id=emu --spot",
    DESCRIBE,
)
ON_ALL = f"{QUEUED} ssh emu {PLACE} --node=all --worker=all"
INSTALL = (
    "git archive --format=tar.gz COMMIT | gcloud storage cp - gs://my-bucket/archives/COMMIT.tar.gz",
    f"{ON_ALL} '--command={{ test ! -e emu_jax/launch/worker.sh || emu_jax/launch/worker.sh stop; }} && "
    "mkdir -p emu_jax && rm -rf emu_jax/* && gcloud storage cp gs://my-bucket/archives/COMMIT.tar.gz emu_jax.tar.gz && "
    "tar -xzf emu_jax.tar.gz -C emu_jax && emu_jax/launch/worker.sh install tpu,gcs,s3'",
)
RUN = f"{ON_ALL} '--command=emu_jax/launch/worker.sh start {TRAIN}'"
DELETE = f"{QUEUED} delete emu {PLACE} --quiet --force"
CLUSTER = f"--cluster=emu {PLACE}"
SLICE = "--tpu-type=v5p-128 --num-slices=1"
IMAGE = "us-docker.pkg.dev/my-project/emu/emu-jax:COMMIT"
XPK_RUN = (
    f"xpk workload create --workload=emu {CLUSTER} {SLICE} --docker-image={IMAGE} --max-restarts=50 "
    f"--restart-on-exit-codes=1,69,75 --termination-grace-period-seconds=600 '--command=emu-jax {TRAIN}'"
)
XPK_STOP = f"xpk workload delete --workload=emu {CLUSTER} --force"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="the scripts need git")


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository of the scripts and configs, in one commit, with the example as its environment file."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("pod.env", "__pycache__"))
    shutil.copy(ROOT / ".gitignore", folder)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=all")
    shutil.copy(folder / "launch" / "pod.env.example", folder / "launch" / "pod.env")
    return folder


def launch(project: Path, script: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    command = [project / "launch" / script, *words]
    # From another folder, as users may.
    return subprocess.run(command, cwd=project.parent, capture_output=True, text=True, env=os.environ | env)


def edited(project: Path, tmp_path: Path, **values: str) -> Path:
    """The example with other values, added at its end."""
    path = tmp_path / "pod.env"
    lines = [f"{name}={value}\n" for name, value in values.items()]
    path.write_text((project / "launch" / "pod.env.example").read_text(encoding="utf-8") + "".join(lines))
    return path


def printed(project: Path, script: str, *words: str) -> list[str]:
    """The lines of --dry-run, with COMMIT for the commit."""
    done = launch(project, script, "--dry-run", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(git(project, "rev-parse", "--short=12", "HEAD").strip(), "COMMIT").splitlines()


@pytest.mark.parametrize(
    ("script", "command", "expected"),
    [
        ("tpu-vm.sh", "create", CREATE),
        ("tpu-vm.sh", "install", INSTALL),
        ("tpu-vm.sh", "run", (RUN,)),
        ("tpu-vm.sh", "resume", (DESCRIBE, DELETE, *CREATE, *INSTALL, RUN)),
        ("tpu-vm.sh", "status", (DESCRIBE, f"{ON_ALL} '--command=emu_jax/launch/worker.sh status'")),
        (
            "tpu-vm.sh",
            "logs",
            (f"{QUEUED} ssh emu {PLACE} --node=0 --worker=0 '--command=emu_jax/launch/worker.sh log'",),
        ),
        ("tpu-vm.sh", "stop", (f"{ON_ALL} '--command=emu_jax/launch/worker.sh stop'",)),
        ("tpu-vm.sh", "delete", (DELETE,)),
        ("gke.sh", "create", (f"xpk cluster create {CLUSTER} {SLICE} --spot",)),
        (
            "gke.sh",
            "image",
            (
                "git archive COMMIT | docker build --file=launch/Dockerfile --build-arg=EXTRAS=tpu,gcs,s3 "
                f"--tag={IMAGE} -",
                f"docker push {IMAGE}",
            ),
        ),
        ("gke.sh", "run", (XPK_RUN,)),
        ("gke.sh", "resume", (XPK_STOP, XPK_RUN)),
        ("gke.sh", "status", (f"xpk workload list {CLUSTER}",)),
        (
            "gke.sh",
            "logs",
            (
                "gcloud container clusters get-credentials emu --project=my-project --region=us-east5",
                "kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=emu,jobset.sigs.k8s.io/job-index=0,"
                "batch.kubernetes.io/job-completion-index=0 --all-containers --tail=100 --follow",
            ),
        ),
        ("gke.sh", "stop", (XPK_STOP,)),
        ("gke.sh", "delete", (f"xpk cluster delete {CLUSTER} --force",)),
    ],
)
def test_commands_of_the_example(project, script, command, expected):
    assert printed(project, script, command) == list(expected)


def test_several_slices_train_together(project, tmp_path):
    env = edited(project, tmp_path, SLICES="4", CAPACITY="reserved", RESERVATION="mine")
    (create, _) = printed(project, "tpu-vm.sh", "--env", str(env), "create")
    assert create.endswith("--runtime-version=v2-alpha-tpuv5 --node-count=4 --node-prefix=emu --reserved")
    (run,) = printed(project, "tpu-vm.sh", "--env", str(env), "run")
    assert run.endswith("--config.init.vision=gs://my-bucket/weights/vision --config.train.mesh.slice=4'")
    (create,) = printed(project, "gke.sh", "--env", str(env), "create")
    assert create == f"xpk cluster create {CLUSTER} --tpu-type=v5p-128 --num-slices=4 --reservation=mine"


def test_a_slice_at_once(project, tmp_path):
    env = str(edited(project, tmp_path, QUEUED="no", CAPACITY="on-demand", MOUNT="'mount /mnt/emu'"))
    assert printed(project, "tpu-vm.sh", "--env", env, "create") == [
        f"{VM} create emu {PLACE} --accelerator-type=v5p-128 --version=v2-alpha-tpuv5",
        f"{VM} describe emu {PLACE} '--format=value(state)'",
    ]
    assert printed(project, "tpu-vm.sh", "--env", env, "stop") == [
        f"{VM} ssh emu {PLACE} --worker=all '--command=emu_jax/launch/worker.sh stop'"
    ]
    assert printed(project, "tpu-vm.sh", "--env", env, "run") == [
        f"{VM} ssh emu {PLACE} --worker=all '--command={{ mount /mnt/emu; }} && emu_jax/launch/worker.sh start {TRAIN}'"
    ]
    assert printed(project, "tpu-vm.sh", "--env", env, "delete") == [f"{VM} delete emu {PLACE} --quiet"]


CLOSED = {
    "NETWORK": "closed",
    "SUBNETWORK": "projects/my-project/regions/us-east5/subnetworks/pods",
    "INTERNAL_IPS": "yes",
    "SERVICE_ACCOUNT": "emu@my-project.iam.gserviceaccount.com",
    "LABELS": "team=vision,run=14b",
}


def test_a_closed_network(project, tmp_path):
    env = str(edited(project, tmp_path, **CLOSED, SSH="iap"))
    (create, _) = printed(project, "tpu-vm.sh", "--env", env, "create")
    flags = [f"--{name.lower().replace('_', '-')}={value}" for name, value in CLOSED.items()]
    assert create == " ".join([CREATE[0], *flags]).replace("--internal-ips=yes", "--internal-ips")
    tunnel = f"{QUEUED} ssh emu {PLACE} --tunnel-through-iap"
    assert printed(project, "tpu-vm.sh", "--env", env, "stop") == [
        f"{tunnel} --node=all --worker=all '--command=emu_jax/launch/worker.sh stop'"
    ]
    assert printed(project, "tpu-vm.sh", "--env", env, "logs") == [
        f"{tunnel} --node=0 --worker=0 '--command=emu_jax/launch/worker.sh log'"
    ]
    assert printed(project, "gke.sh", "--env", env, "create") == [
        f"xpk cluster create {CLUSTER} {SLICE} --spot --private "
        f"'--custom-cluster-arguments=--network=closed --subnetwork={CLOSED['SUBNETWORK']} "
        f"--service-account={CLOSED['SERVICE_ACCOUNT']}' "
        f"'--custom-nodepool-arguments=--service-account={CLOSED['SERVICE_ACCOUNT']} --labels=team=vision,run=14b'"
    ]


def test_from_the_network_of_the_workers(project, tmp_path):
    env = str(edited(project, tmp_path, INTERNAL_IPS="yes", SSH="internal-ip", QUEUED="no"))
    assert printed(project, "tpu-vm.sh", "--env", env, "stop") == [
        f"{VM} ssh emu {PLACE} --internal-ip --worker=all '--command=emu_jax/launch/worker.sh stop'"
    ]


@pytest.mark.parametrize(
    ("job", "extras"), [("evaluate", "tpu,gcs,s3,eval"), ("precompute", "tpu,gcs,s3")], ids=["evaluate", "precompute"]
)
def test_other_jobs(project, tmp_path, job, extras):
    values = {"JOB": job, "ACCELERATOR_TYPE": "v5p-8", "ARGUMENTS": "(--model gs://b/emu)", "CONFIG": "", "WORKDIR": ""}
    env = str(edited(project, tmp_path, **values))
    (*_, install) = printed(project, "tpu-vm.sh", "--env", env, "install")
    assert install.endswith(f"emu_jax/launch/worker.sh install {extras}'")
    (run,) = printed(project, "tpu-vm.sh", "--env", env, "run")
    assert run == f"{ON_ALL} '--command=emu_jax/launch/worker.sh start {job} --model gs://b/emu'"
    (build, _) = printed(project, "gke.sh", "--env", env, "image")
    assert f"--build-arg=EXTRAS={extras} " in build
    (run,) = printed(project, "gke.sh", "--env", env, "run")
    assert run.endswith(f"'--command=emu-jax {job} --model gs://b/emu'")


def test_changes_that_stay_behind_are_mentioned(project, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    (copy / "configs" / "pretrain.py").write_text("changed")
    done = launch(copy, "tpu-vm.sh", "--dry-run", "install")
    assert done.returncode == 0
    assert done.stderr.startswith("launch/tpu-vm.sh: uncommitted changes stay on this machine; the pod gets commit ")


@pytest.mark.parametrize(
    ("script", "variable", "value", "expected"),
    [
        ("tpu-vm.sh", "PROJECT", "", "PROJECT=''; expected a Google Cloud project; set it in "),
        ("tpu-vm.sh", "ZONE", "us-east5", "ZONE='us-east5'; expected a zone such as us-east5-a; set it in "),
        ("tpu-vm.sh", "NAME", "Emu", "NAME='Emu'; expected at most 39 lower-case letters, digits and hyphens"),
        ("tpu-vm.sh", "ACCELERATOR_TYPE", "v5p", "ACCELERATOR_TYPE='v5p'; expected an accelerator type such as v4-64"),
        ("tpu-vm.sh", "SLICES", "two", "SLICES='two'; expected a number of slices, 1 or more; set it in "),
        ("tpu-vm.sh", "CAPACITY", "cheap", "CAPACITY='cheap'; expected on-demand, spot or reserved; set it in "),
        ("tpu-vm.sh", "COMMIT", "gone", "COMMIT='gone'; expected a commit of this repository; set it in "),
        ("tpu-vm.sh", "CONFIG", "configs/gone.py", "CONFIG='configs/gone.py'; expected a file of commit "),
        (
            "tpu-vm.sh",
            "WORKDIR",
            "gs://b",
            "WORKDIR='gs://b'; expected a folder of a bucket, as in gs://my-bucket/runs/14b",
        ),
        ("tpu-vm.sh", "WORKDIR", "runs/14b", "WORKDIR='runs/14b'; expected a folder of a bucket, as in gs://my-bucket"),
        ("tpu-vm.sh", "ARGUMENTS", "(--workdir=/mnt)", "'--workdir=/mnt' is no argument; set CONFIG and WORKDIR in "),
        ("gke.sh", "ARGUMENTS", "($'a\\nb')", "ARGUMENTS has a line break in 'a…'; expected words of one line; set it"),
        ("gke.sh", "ENVIRONMENT", "(A=1 --b=2)", "ENVIRONMENT has '--b=2'; expected words like NAME=value; set it in "),
        ("tpu-vm.sh", "JOB", "serve", "JOB='serve'; expected train, evaluate or precompute; set it in "),
        (
            "tpu-vm.sh",
            "JOB",
            "evaluate",
            "ACCELERATOR_TYPE='v5p-128'; expected a slice of one host for JOB=evaluate: v(5l",
        ),
        (
            "gke.sh",
            "JOB",
            "precompute",
            "ACCELERATOR_TYPE='v5p-128'; expected a slice of one host for JOB=precompute: v6e",
        ),
        (
            "tpu-vm.sh",
            "NETWORK",
            "'a b'",
            "NETWORK='a b'; expected a VPC network, or nothing for the project's default",
        ),
        ("gke.sh", "SUBNETWORK", "'a b'", "SUBNETWORK='a b'; expected a subnetwork, or nothing for the network's; set"),
        ("tpu-vm.sh", "INTERNAL_IPS", "", "INTERNAL_IPS=''; expected yes or no; set it in "),
        (
            "tpu-vm.sh",
            "INTERNAL_IPS",
            "yes",
            "SSH=external-ip with INTERNAL_IPS=yes; expected internal-ip or iap; set it",
        ),
        ("tpu-vm.sh", "SSH", "tunnel", "SSH='tunnel'; expected external-ip, internal-ip or iap; set it in "),
        (
            "gke.sh",
            "SERVICE_ACCOUNT",
            "emu",
            "SERVICE_ACCOUNT='emu'; expected an account's address, or nothing for the",
        ),
        ("gke.sh", "LABELS", "team", "LABELS='team'; expected name=value,name=value, or nothing; set it in "),
        ("tpu-vm.sh", "RUNTIME_VERSION", "", "RUNTIME_VERSION=''; expected a TPU runtime version such as"),
        ("tpu-vm.sh", "QUEUED", "maybe", "QUEUED='maybe'; expected yes or no; set it in "),
        ("tpu-vm.sh", "ARCHIVES", "here", "ARCHIVES='here'; expected a folder in a bucket, gs://…; set it in "),
        ("gke.sh", "IMAGE", "emu:3", "IMAGE='emu:3'; expected a container image without a tag"),
        ("gke.sh", "MAX_RESTARTS", "many", "MAX_RESTARTS='many'; expected a number, 0 or more; set it in "),
        ("gke.sh", "GRACE_SECONDS", "long", "GRACE_SECONDS='long'; expected a number, 0 or more; set it in "),
        ("gke.sh", "CAPACITY", "reserved", "RESERVATION=''; expected the reservation's name, for CAPACITY is reserved"),
        ("gke.sh", "ARGUMENTS", "(", "bash cannot read it; expected lines like those of launch/pod.env.example"),
    ],
)
def test_values_that_cannot_be(project, tmp_path, script, variable, value, expected):
    env = edited(project, tmp_path, **{variable: value})
    done = launch(project, script, "--dry-run", "--env", str(env), "run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"launch/{script}: ")
    assert expected in done.stderr
    assert str(env) in done.stderr


@pytest.mark.parametrize("name", ["ARGUMENTS", "ENVIRONMENT"])
def test_lists_are_lists(project, tmp_path, name):
    env = edited(project, tmp_path, **{f"unset {name}; {name}": "'--config.a=1 --config.b=2'"})
    done = launch(project, "gke.sh", "--dry-run", "--env", str(env), "run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{name} is no list; expected words in parentheses, as in {name}=(" in done.stderr


def test_several_slices_are_queued(project, tmp_path):
    env = edited(project, tmp_path, SLICES="2", QUEUED="no")
    done = launch(project, "tpu-vm.sh", "--env", str(env), "create")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "SLICES=2 with QUEUED=no; expected QUEUED=yes" in done.stderr


def test_a_tunnel_needs_a_queue(project, tmp_path):
    env = edited(project, tmp_path, SSH="iap", QUEUED="no")
    done = launch(project, "tpu-vm.sh", "--env", str(env), "stop")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "SSH=iap with QUEUED=no; expected QUEUED=yes, whose ssh knows the tunnel" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "one of: create image run resume status logs stop delete"),
        (("fly",), "one of: create image run resume status logs stop delete"),
        (("--env",), "one of: create image run resume status logs stop delete"),
        (("run", "now"), "'now' is not an argument of the job; expected one such as --reshard-data"),
        (("stop", "--now"), "'--now': stop takes no arguments; those of the job follow run and resume"),
        (("run", "--config", "a.py"), "'--config' is no argument; set CONFIG and WORKDIR in "),
    ],
)
def test_commands_that_are_none(project, words, expected):
    done = launch(project, "gke.sh", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert expected in done.stderr


def test_settings_that_may_be_left_out(project, tmp_path):
    """A file of an older example, and a shell that uses the same names, change nothing."""
    optional = (
        "JOB",
        "NETWORK",
        "SUBNETWORK",
        "INTERNAL_IPS",
        "SSH",
        "SERVICE_ACCOUNT",
        "LABELS",
        "MOUNT",
        "ENVIRONMENT",
    )
    env = tmp_path / "pod.env"
    lines = (project / "launch" / "pod.env.example").read_text(encoding="utf-8").splitlines(keepends=True)
    env.write_text("".join(line for line in lines if not line.startswith(tuple(f"{name}=" for name in optional))))
    done = launch(project, "tpu-vm.sh", "--dry-run", "--env", str(env), "run", **dict.fromkeys(optional, "?"))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{RUN}\n")


def test_without_an_environment_file(project, tmp_path):
    done = launch(project, "gke.sh", "--env", str(tmp_path / "gone.env"), "run")
    assert done.returncode == 2
    assert done.stderr == (
        f"launch/gke.sh: {tmp_path}/gone.env: no such file; copy launch/pod.env.example there and fill it in\n"
    )


def test_without_the_program(project, tmp_path):
    for name in ("bash", "basename", "dirname", "git"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = launch(project, "tpu-vm.sh", "run", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "launch/tpu-vm.sh: gcloud is not on the PATH; install it, or look at the commands with --dry-run\n"
    )


AWKWARD = [
    "--config.data.source=gs://b/two words.jsonl",
    "--config.a.b='it''s'",
    '--config.c="$HOME" `id` \\',
    "--config.d=",
    "--compilation-cache",
    "gs://b/$(date) $$ ${HOME} $$$(HOME)",
    "--profile-steps",
    "10:15",
]
VARIABLES = {
    "EMU_JAX_TIMEOUT": "300",
    "LIBTPU_INIT_ARGS": "--xla_tpu_a=true --xla_tpu_b='c d'",
    "EMPTY": "",
    "AWKWARD": '"it\'s" $HOME $$ $(HOME) `id` \\ = *',
}
MORE = ["--change", "config.optimizer.learning_rate=1e-5", "--skip-windows", "3", "--note", "it's $$"]


def recorder(path: Path) -> None:
    """An executable that writes its arguments and its environment as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n")
    path.chmod(0o755)


def expanded(command: str, environment: dict[str, str]) -> str:
    """As Kubernetes expands a container's command: $(NAME) of a known variable is its value, $$ is $."""
    return re.sub(
        r"\$\$|\$\((.*?)\)",
        lambda found: "$" if found[0] == "$$" else environment.get(found[1], found[0]),
        command,
    )


def in_a_list(words: list[str]) -> str:
    """Words as the environment file's author quotes them."""
    return "(" + " ".join(shlex.quote(word) for word in words) + ")"


@pytest.mark.parametrize(("script", "program"), [("tpu-vm.sh", "gcloud"), ("gke.sh", "xpk")])
def test_words_reach_training_as_they_are(project, tmp_path, script, program):
    """Through the environment file, the script, the program's one command line, and the shell that runs it there."""
    variables = in_a_list([f"{name}={value}" for name, value in VARIABLES.items()])
    values = {"ARGUMENTS": in_a_list(AWKWARD), "ENVIRONMENT": variables, "SLICES": "2", "MOUNT": "true"}
    env = edited(project, tmp_path, **values)
    recorder(tmp_path / "bin" / program)
    recorder(tmp_path / "bin" / "emu-jax")
    recorder(tmp_path / "emu_jax" / "launch" / "worker.sh")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = launch(project, script, "--env", str(env), "run", *MORE, PATH=path)
    words, _ = json.loads(done.stdout)
    (line,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    assert "\n" not in line
    there = {"PATH": path, "HOME": "/home/emu"}
    if program == "xpk":
        # What xpk makes of a command, and Kubernetes of that.
        line = expanded(f"({line}) & PID=$!; wait $PID", there)
    ran = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=there)
    arguments, environment = json.loads(ran.stdout)
    if program == "gcloud":
        assert arguments.pop(0) == "start"
    expected = ["train", "--config", "configs/pretrain.py:14b", "--workdir", "gs://my-bucket/runs/14b"]
    assert arguments == [*expected, *AWKWARD, *MORE, "--config.train.mesh.slice=2"]
    assert {name: environment.get(name) for name in VARIABLES} == VARIABLES


def test_the_environment_is_that_of_the_installation_too(project, tmp_path):
    env = edited(project, tmp_path, ENVIRONMENT="('PIP_INDEX_URL=https://in.house/simple')")
    (*_, install) = printed(project, "tpu-vm.sh", "--env", str(env), "install")
    assert "&& env PIP_INDEX_URL=https://in.house/simple emu_jax/launch/worker.sh install tpu,gcs,s3'" in install


def test_shellcheck():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=path)
    if program is None:
        pytest.skip("pip install '.[test]' brings shellcheck")
    scripts = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run([program, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.slow
def test_a_worker(tmp_path):
    """Installs, trains, refuses a second job, ends one, and goes on: as on a TPU VM, but for the TPU."""
    files = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in files:
        if (ROOT / name).exists():
            (tmp_path / "emu_jax" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "emu_jax" / name)
    env = os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env.pop("VIRTUAL_ENV", None)

    def worker(*words: str) -> subprocess.CompletedProcess:
        # `gcloud … ssh --command` starts in the home folder.
        command = ["emu_jax/launch/worker.sh", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)

    def wait_for(text: str, seconds: float) -> None:
        log = tmp_path / "emu_jax_job" / "log"
        until = time.monotonic() + seconds
        while text not in log.read_text() and time.monotonic() < until:
            time.sleep(0.5)
        assert text in log.read_text()

    done = worker("install", "tpu,gcs,s3")
    assert done.returncode == 0, done.stderr
    assert f"installed {tmp_path}/emu_jax/.venv/bin/emu-jax, Python 3." in done.stdout
    workdir = tmp_path / "run with spaces"
    arguments = ["train", "--config", "configs/quickstart.py", "--workdir", str(workdir)]

    long = [*arguments, *(f"--config.train.{field}" for field in ("steps=100000", "checkpoint_every=5", "log_every=1"))]

    def newest() -> int:
        folder = workdir / "checkpoints"
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
        return max(steps, default=0)

    def train_beyond(step: int) -> None:
        started = worker("start", *long)
        assert started.returncode == 0, started.stderr
        until = time.monotonic() + 180
        while newest() <= step and "running" in worker("status").stdout and time.monotonic() < until:
            time.sleep(0.2)
        assert ": running, process " in worker("status").stdout, (tmp_path / "emu_jax_job" / "log").read_text()
        assert newest() > step

    # A job that would take long is ended, and goes on from its last checkpoint.
    train_beyond(0)
    second = worker("start", *long)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "a job is already running, process " in second.stderr
    assert worker("stop").returncode == 0
    assert ": no job is running" in worker("status").stdout
    wait_for("ended with exit code", 0)  # the job itself was waited for, not only its shell
    reached = newest()
    train_beyond(reached)
    assert worker("stop").returncode == 0
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] >= reached

    # A setting that cannot work ends with code 2, which the log tells.
    assert worker("start", *arguments, "--config.train.steps=3", "--config.data.batch_rows=16").returncode == 0
    wait_for("ended with exit code 2", 180)

    assert worker("stop").returncode == 0  # nothing runs: nothing to do
    assert worker("fly").returncode == 2
