"""Downloads from the hub: resumed, verified, never partial; every error has a remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from hub_client import PROGRAM, SLACK, Client
from stand_in_hub import Hub
from tiny_dense import save

from tinychat_mlx import hub as hubs
from tinychat_mlx.base.errors import DownloadError, FormatError, ModelNotFoundError
from tinychat_mlx.hub.ask import _digest, is_wanted
from tinychat_mlx.open import DEMO
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import TensorFile, entries
from tinychat_mlx.weights.shards import write_sharded

WEIGHTS = "model.safetensors"
SIZE = (DEMO / WEIGHTS).stat().st_size


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A hub with the demo as org/model, and files that a model does not need next to it."""
    folder = shutil.copytree(DEMO, tmp_path / "root" / "models" / "org" / "model")
    for name in (
        "modeling.py",
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "onnx/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no part of the model")
    with Hub(tmp_path / "root") as hub:
        yield Client(hub, tmp_path / "home")


def gets(client: Client) -> list[tuple[str, str]]:
    """Return (name, Range) of files requested since the log was cleared."""
    return [(path.rpartition("/")[2], span) for _, path, span in client.hub.log if "/resolve/" in path]


def test_a_pull_fetches_what_a_model_needs_and_no_code(client: Client) -> None:
    done = client.run("models", "pull", "org/model")
    assert done.returncode == 0, done.stderr
    wanted = {p.name: p.read_bytes() for p in DEMO.iterdir()}
    assert client.files() == wanted
    assert Path(done.stdout.strip()).is_dir() and "checksums correct" in done.stderr
    assert {name for name, _ in gets(client)} == set(wanted)


def test_a_second_pull_asks_once_and_fetches_nothing(client: Client) -> None:
    client.run("models", "pull", "org/model")
    client.hub.log.clear()
    done = client.run("models", "pull", "org/model")
    assert "up to date" in done.stderr and len(client.hub.log) == 1


def test_huggingface_hub_itself_finds_what_was_pulled(client: Client) -> None:
    client.run("models", "pull", "org/model")
    code = (
        "from huggingface_hub import scan_cache_dir, snapshot_download\n"
        "print(snapshot_download('org/model', local_files_only=True, allow_patterns='*.safetensors'))\n"
        "found = scan_cache_dir()\n"
        "print([(r.repo_id, r.nb_files) for r in found.repos], found.warnings)"
    )
    env = client.environ(HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    folder, scanned = done.stdout.splitlines()
    assert (Path(folder) / WEIGHTS).stat().st_size == SIZE
    assert scanned == f"[('org/model', {len(list(DEMO.iterdir()))})] []"


def test_a_new_upload_is_fetched_by_pull_and_by_nothing_else(client: Client) -> None:
    client.run("models", "pull", "org/model")
    changed = client.hub.root / "models" / "org" / "model" / "README.md"
    changed.write_text("new")
    client.hub.log.clear()
    assert client.run("run", "-m", "org/model", "hi", "--max-tokens", "1").returncode == 0
    assert not client.hub.log  # a downloaded model runs without requests
    client.run("models", "pull", "org/model")
    assert [name for name, _ in gets(client)] == ["README.md"]
    assert len(list((client.cache / "models--org--model" / "snapshots").iterdir())) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_pull_goes_on_from_where_it_was(client: Client, how: signal.Signals) -> None:
    client.hub.pause = 0.02
    process = client.start("models", "pull", "org/model")
    deadline = time.monotonic() + 300
    while not (begun := [p for p in client.partial() if p.stat().st_size > 1 << 20]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=300)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "is kept; `tinychat models pull org/model` resumes" in err and "error" not in err
    have = begun[0].stat().st_size
    client.hub.pause, client.hub.sent = 0.0, 0
    client.hub.log.clear()
    assert client.run("models", "pull", "org/model").returncode == 0
    assert (WEIGHTS, f"bytes={have}-") in gets(client)
    assert client.hub.sent <= SIZE - have + SLACK
    assert client.files()[WEIGHTS] == (DEMO / WEIGHTS).read_bytes() and not client.partial()


def test_a_connection_that_breaks_is_taken_up_again_unasked(client: Client) -> None:
    client.hub.spoil[f"models/org/model/{WEIGHTS}"] = "cut"
    assert "cannot be reached" in client.refused("models", "pull", "org/model")
    tried = [int(span[6:-1]) for name, span in gets(client) if span]
    assert len(set(tried)) > 3 and tried == sorted(tried)  # it continued while bytes arrived
    client.hub.spoil.clear()
    assert client.run("models", "pull", "org/model").returncode == 0
    assert client.files()[WEIGHTS] == (DEMO / WEIGHTS).read_bytes()


def test_a_file_that_arrives_damaged_is_not_kept(client: Client) -> None:
    client.hub.spoil[f"models/org/model/{WEIGHTS}"] = "corrupted"
    assert "the checksum of model.safetensors differs from the hub's after two downloads" in client.refused(
        "models", "pull", "org/model"
    )
    assert not client.partial() and not (client.cache / "models--org--model" / "snapshots").exists()
    assert [name for name, _ in gets(client)].count(WEIGHTS) == 2


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_file_in_the_cache_is_found_and_fetched_again(client: Client, damage: str) -> None:
    client.run("models", "pull", "org/model")
    blob = next((client.cache / "models--org--model" / "snapshots").glob(f"*/{WEIGHTS}")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data if damage == "one bit" else data[:-1000])
    options = ["--verify"] if damage == "one bit" else []  # a wrong size is detected without reading
    assert client.run("models", "pull", "org/model", *options).returncode == 0
    assert client.files()[WEIGHTS] == (DEMO / WEIGHTS).read_bytes()


def test_a_shard_that_lacks_what_the_index_promises_is_named(client: Client) -> None:
    folder = client.hub.root / "models" / "org" / "sharded"
    whole = TensorFile(save(folder) / WEIGHTS)
    (folder / WEIGHTS).unlink()  # mapped, it can still be read
    write_sharded(folder, entries(whole), max_bytes=60_000)
    assert client.run("models", "pull", "org/sharded").returncode == 0
    Checkpoint.open(next((client.cache / "models--org--sharded" / "snapshots").iterdir()))
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.extra.weight"] = min(table["weight_map"].values())
    index.write_text(json.dumps(table))
    line = client.refused("models", "pull", "org/sharded")
    assert "model.extra.weight" in line and "the download is complete" in line
    table["weight_map"]["model.extra.weight"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(table))
    assert "names model-00009-of-00009.safetensors, which the hub does not have" in client.refused(
        "models", "pull", "org/sharded"
    )


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "no such model on the hub, or it is private — check the name on http"),
        (403, "org/model: this model is gated — accept its terms on http"),
        (404, "no such model on the hub"),
        (429, "the hub limits requests (429) — wait some minutes"),
        (500, "the hub has an internal error (500)"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(client: Client, status: int, says: str) -> None:
    client.hub.refuse["models/org/model"] = status
    line = client.refused("models", "pull", "org/model")
    assert says in line
    assert ("auth login" in line) == (status in (401, 403, 404, 429))
    assert not list(client.cache.rglob("*.safetensors"))


def test_whoever_is_logged_in_is_not_told_to_log_in(client: Client) -> None:
    client.hub.refuse[f"models/org/model/{WEIGHTS}"] = 403
    line = client.refused("models", "pull", "org/model", HF_TOKEN="hf_of_someone")
    assert "accept its terms" in line and "log in" not in line
    assert "hf_of_someone" not in line


def test_a_rate_limit_that_passes_is_waited_for(client: Client) -> None:
    client.hub.refuse["models/org/model"], client.hub.refusals["models/org/model"] = 429, 3
    assert client.run("models", "pull", "org/model").returncode == 0
    assert client.hub.refusals["models/org/model"] == 0


def in_seconds(seconds: float) -> Callable[[], str]:
    """A date when the hub answers, as HTTP has it: whole seconds, so up to one too early."""
    return lambda: formatdate(time.time() + seconds + 1, usegmt=True)


@pytest.mark.parametrize("form", ["seconds", "date", "RateLimit"])
def test_the_wait_that_the_hub_asks_for_is_kept(client: Client, form: str) -> None:
    """Without it the pauses of these tests are hundredths of a second."""
    client.hub.refuse["models/org/model"], client.hub.refusals["models/org/model"] = 429, 1
    start = time.monotonic()
    said = {"seconds": {"Retry-After": "2"}, "RateLimit": {"RateLimit": '"api";r=0;t=2'}}
    client.hub.busy = said.get(form) or {"Retry-After": in_seconds(3)}
    done = client.run("models", "pull", "org/model")
    assert done.returncode == 0, done.stderr
    assert re.search(r"limits requests \(429\): trying again in [2345] s", done.stderr)
    assert time.monotonic() - start >= 2


@pytest.mark.parametrize("form", ["seconds", "date", "RateLimit"])
def test_a_wait_that_is_too_long_is_said_and_not_made(client: Client, form: str) -> None:
    client.hub.refuse["models/org/model"] = 429
    said = {"seconds": {"Retry-After": "300"}, "RateLimit": {"RateLimit": '"api";r=0;t=300'}}
    client.hub.busy = said.get(form) or {"Retry-After": in_seconds(300)}
    line = client.refused("models", "pull", "org/model")
    seconds = re.search(r"wait (\d+) seconds, then repeat the command", line)
    assert seconds and 270 < int(seconds[1]) <= 301
    assert len(client.hub.log) == 1


def test_weights_come_from_another_server_and_the_token_stays_behind(client: Client) -> None:
    client.hub.token, weights = "hf_of_someone", f"models/org/model/{WEIGHTS}"
    client.hub.spoil[weights] = "cut"
    client.refused("models", "pull", "org/model", HF_TOKEN="hf_of_someone")
    client.hub.spoil.clear()
    client.hub.log.clear()
    (partial,) = client.partial()
    have = partial.stat().st_size
    assert have > SIZE / 2
    done = client.run("models", "pull", "org/model", HF_TOKEN="hf_of_someone")
    assert done.returncode == 0, done.stderr
    assert client.files()[WEIGHTS] == (DEMO / WEIGHTS).read_bytes()
    shown = {port: {token for at, token in client.hub.shown if at == port} for port, _ in client.hub.shown}
    assert shown == {client.hub.port: {"Bearer hf_of_someone"}, client.hub.store: {""}}
    stored = [span for _, path, span in client.hub.log if path.startswith("/stored/")]
    assert stored == [f"bytes={have}-"]  # the Range was sent too


def test_a_token_that_the_hub_rejects_is_called_so(client: Client) -> None:
    client.hub.token = "hf_right"
    line = client.refused("models", "pull", "org/model", HF_TOKEN="hf_wrong")
    assert "does not accept your token" in line and "auth login" in line and "unset HF_TOKEN" in line
    assert "hf_wrong" not in line and "no such model" not in line


def test_the_command_that_logs_in_is_one_that_works(client: Client) -> None:
    """For a user whose PATH has no virtual environment."""
    client.hub.refuse[f"models/org/model/{WEIGHTS}"] = 403
    line = client.refused("models", "pull", "org/model", PATH="/usr/bin:/bin")
    command = re.search(r"`([^`]+)`", line)
    assert command and shutil.which(command[1].split()[0], path="/usr/bin:/bin")
    done = subprocess.run(
        f"{command[1]} --help", shell=True, env=client.environ(PATH="/usr/bin:/bin"), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "log" in done.stdout.lower(), done.stderr


def test_a_branch_and_a_tag_are_revisions(client: Client, tmp_path: Path) -> None:
    """Each has different files, and is found again offline by its name."""
    named = {name: tmp_path / name.replace("/", "-") for name in ("v1.0", "refs/pr/1", "feature/long")}
    for name, folder in named.items():
        shutil.copytree(DEMO, folder)
        (folder / "README.md").write_text(name)
    client.hub.revisions["models/org/model"] = named
    run = ("--max-tokens", "1", "--temperature", "0", "hi")
    for name in named:
        done = client.run("models", "pull", f"org/model@{name}", "--quiet")
        assert done.returncode == 0, done.stderr
        assert (Path(done.stdout.strip()) / "README.md").read_text() == name
        offline = client.run("run", "-m", f"org/model@{name}", *run, HF_HUB_OFFLINE="1")
        assert offline.returncode == 0, offline.stderr
    listed = json.loads(client.run("models", "list", "--json").stdout)
    (short,) = (r["name"] for r in listed if r["kind"] == "hub")
    assert re.fullmatch(r"org/model@[0-9a-f]{8}", short)  # main is not downloaded
    assert client.run("run", "-m", short, *run, HF_HUB_OFFLINE="1").returncode == 0
    assert "not in the local cache" in client.refused("run", "-m", "org/model", *run, HF_HUB_OFFLINE="1")


def test_the_licence_is_the_one_that_the_hub_tells(client: Client) -> None:
    client.hub.tags["models/org/model"] = ["safetensors", "license:llama3.2", "region:us"]
    assert json.loads(client.run("models", "show", "org/model", "--json").stdout)["licence"] == "llama3.2"
    client.hub.tags.clear()
    assert json.loads(client.run("models", "show", "org/model", "--json").stdout)["licence"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_a_terminal_shows_a_bar_with_rate_and_time_left(client: Client) -> None:
    from chat_screen import Screen

    client.hub.pause = 0.03  # 2 MB per second
    command = [sys.executable, "-c", PROGRAM.format(more=""), "models", "pull", "org/model"]
    screen = Screen(command, 12, 100, client.environ(TERM="xterm-256color", COLUMNS="100", LANG="C.UTF-8"))
    bar = r"org/model +[━╸╺ ]+ +[\d.]+/3\.5 MB +[\d.]+ MB/s left 0?0:0\d"
    screen.wait(lambda text: re.search(bar, text) is not None)
    client.hub.pause = 0.0
    screen.wait("all checksums correct")
    assert screen.exit_code() == 0
    assert not re.search(bar, screen.text)  # it is removed at the end


# damaged on the hub ------------------------------------------------------------------------------------
def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + b"\0" * 64


DAMAGED = {
    "config.json": (b'{"model_type": ', "config.json: not JSON at line 1"),
    "generation_config.json": (b"[0.7]", "generation_config.json: contains a list, not a JSON object"),
    "model.safetensors.index.json": (b"\xff\xfe", "model.safetensors.index.json: not JSON"),
    "model.safetensors.index.json, another": (b'{"weight_map": 3}', "model.safetensors.index.json: weight_map does not map"),
    WEIGHTS: (with_header(b'{"a": {"dtype": "F16", "shape": [4]}}'), "'a' is not described by dtype, shape"),
    f"{WEIGHTS}, not JSON": (with_header(b'{"a": }'), "header is not JSON at byte 14"),
    f"{WEIGHTS}, a list": (with_header(b'["a"]'), "no '{' at byte 8"),
    f"{WEIGHTS}, a number": (with_header(b'{"a": 7}'), "'a' is not described by dtype, shape"),
    f"{WEIGHTS}, short": (b"abc", "3 bytes long"),
    f"{WEIGHTS}, empty": (b"", "0 bytes long"),
}  # fmt: skip


COMMANDS = ("show", "pull", "run")
# Every kind with one of the commands in turn, and one kind with all of them.
TRIED = [*zip(DAMAGED, COMMANDS * len(DAMAGED)), *((WEIGHTS, command) for command in COMMANDS)]


@pytest.mark.parametrize(("kind", "command"), dict.fromkeys(TRIED))
def test_what_is_damaged_on_the_hub_is_said_of_the_hub(client: Client, kind: str, command: str) -> None:
    """The message does not blame our code, as it once did, and does not suggest the same download."""
    data, says = DAMAGED[kind]
    (client.hub.root / "models" / "org" / "model" / kind.partition(",")[0]).write_bytes(data)
    args = {"show": ("models", "show", "org/model"), "pull": ("models", "pull", "org/model"),
            "run": ("run", "-m", "org/model", "hi")}  # fmt: skip
    line = client.refused(*args[command])
    assert says in line and line.count("org/model") == 1
    assert line.endswith("— use another repository") and "download it again" not in line


def test_an_unknown_revision_is_named_and_a_commit_is_pinned(client: Client) -> None:
    assert "there is no revision 'v9'" in client.refused("models", "pull", "org/model@v9")
    client.run("models", "pull", "org/model")
    (snapshot,) = (client.cache / "models--org--model" / "snapshots").iterdir()
    shutil.rmtree(client.cache)
    assert client.run("models", "pull", f"org/model@{snapshot.name}").returncode == 0
    assert not (client.cache / "models--org--model" / "refs").exists()  # no branch was requested
    offline = client.run(
        "run", "-m", f"org/model@{snapshot.name}", "hi", "--max-tokens", "1", HF_HUB_OFFLINE="1"
    )
    assert offline.returncode == 0, offline.stderr


def test_offline_uses_what_is_here_and_asks_nobody(client: Client) -> None:
    line = client.refused("models", "pull", "org/model", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in line and not client.hub.log
    client.run("models", "pull", "org/model")
    client.hub.log.clear()
    assert client.run("models", "pull", "org/model", HF_HUB_OFFLINE="1").returncode == 0
    assert client.run("run", "-m", "org/model", "hi", "--max-tokens", "1", HF_HUB_OFFLINE="1").returncode == 0
    assert not client.hub.log


def test_a_hub_that_is_not_there_is_named(client: Client) -> None:
    line = client.refused("models", "pull", "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in line


def test_too_little_disk_is_said_before_a_byte_is_fetched(client: Client) -> None:
    more = "import shutil, collections\nU = collections.namedtuple('U', 'total used free')\n"
    more += "shutil.disk_usage = lambda path: U(10**9, 10**9 - 10**6, 10**6)"
    line = client.refused("models", "pull", "org/model", more=more)
    assert "needs 3.5 MB more" in line and "1.0 MB free" in line
    assert "set HF_HOME" in line and not gets(client)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_a_disk_that_refuses_half_way_leaves_what_arrived(client: Client) -> None:
    """A limit on the size of files: the system refuses the write, like a full disk."""
    more = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))"
    line = client.refused("models", "pull", "org/model", more=more)
    assert "File too large" in line and "repeat the command" in line
    assert [p.stat().st_size for p in client.partial()] == [2_000_000]
    assert client.run("models", "pull", "org/model").returncode == 0
    assert (WEIGHTS, "bytes=2000000-") in gets(client)


def test_a_full_disk_leaves_what_arrived(client: Client) -> None:
    """A real file system of 3 MB, if this machine allows mounting one."""
    disk = client.home / "hf"
    disk.mkdir(parents=True)
    if (
        shutil.which("mount") is None
        or os.system(f"mount -t tmpfs -o size=3m none '{disk}' 2>/dev/null") != 0
    ):
        pytest.skip("mounting a small file system is not allowed here")
    try:
        assert "make room" in client.refused("models", "pull", "org/model")
        more = "import shutil, collections\nU = collections.namedtuple('U', 'total used free')\n"
        more += "shutil.disk_usage = lambda path: U(0, 0, 10**12)"  # it was free when the download started
        line = client.refused("models", "pull", "org/model", more=more)
        assert "No space left on device" in line and "is kept" in line
        assert client.partial()[0].stat().st_size > 2_000_000
    finally:
        os.system(f"umount '{disk}'")


def test_a_cache_that_cannot_be_written_is_named(client: Client) -> None:
    client.cache.parent.mkdir(parents=True)
    client.cache.write_text("a file where the folder should be")
    line = client.refused("models", "pull", "org/model")
    assert str(client.cache) in line and "HF_HOME" in line


def test_weights_in_other_formats_are_refused_before_they_are_fetched(client: Client) -> None:
    folder = client.hub.root / "models" / "org" / "model"
    (folder / WEIGHTS).unlink()
    line = client.refused("models", "pull", "org/model")
    assert "safetensors, the only format" in line and "model.gguf" in line and not gets(client)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../b", "/a/b", "a/b/c", "a\\b", "a/b@../../x", "a/b@/etc", "a--b/c", "a/.git", "-a/b", "a/b\n",
     "a/b@", "ü/b", "a", ""],
)  # fmt: skip
def test_names_that_are_no_hub_ids_lead_nowhere(name: str) -> None:
    assert hubs.parse(name) is None
    with pytest.raises(ModelNotFoundError, match="not a Hugging Face id"):
        hubs.find(name)


@pytest.mark.parametrize(
    "path",
    ["../config.json", "a/config.json", "..\\config.json", "C:config.json", "modeling.py", "model.bin",
     "additional_chat_templates/x.py", "additional_chat_templates/../x.jinja", ".gitattributes"],
)  # fmt: skip
def test_a_hub_cannot_make_us_write_elsewhere(path: str) -> None:
    assert not is_wanted(path)


def test_a_hub_that_gives_no_hashes_is_not_trusted() -> None:
    class Sibling:
        rfilename, lfs, blob_id = "config.json", None, "../../../evil"

    with pytest.raises(DownloadError, match=r"returned no hash for 'config\.json'"):
        _digest(hubs.Ref("a/b"), Sibling())


def test_an_index_that_points_elsewhere_is_refused() -> None:
    for shard in ("../x.safetensors", "/x.safetensors", "x.bin", 3):
        with pytest.raises(FormatError, match="weight_map does not map"):
            hubs.shards_of({"weight_map": {"a": shard}})
