"""Loading from a hub: what is fetched and kept, and one clear line for each way in which it fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub import utils as hub_utils

import search.base
import search.hub
from llm_merging.constants import BASE_MODEL_NAME, LIST_MODELS
from llm_merging.merging.uniform_average import UniformAverage
from search.__main__ import quiet_other_libraries
from search.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from search.base import load_base, load_shapes, load_tokenizer, read_context
from search.config import load_config
from search.errors import InputError
from search.files import sha256_file
from search.hub import LONGEST_WAIT_S, TEXT_FILES, WAITS_S, Fetched, MissingOnHubError, fetch, fetch_together
from search.parts import load_adapters
from search.setup import load_setup
from search.trace import Trace
from tests.hub_server import EXPIRED, Hub, Repo, serve

ZOO = Path(__file__).parents[1] / "data/zoo"
EXPERTS = sorted((ZOO / "adapters").iterdir())
ADAPTER, COMMIT = LIST_MODELS[0]
forget_sessions: Callable[[], object] = getattr(hub_utils, "reset_sessions", lambda: None)
"""Before 1.0 a session is on line, or not, for good."""
hub_bars = import_module("huggingface_hub.utils.tqdm")  # the package has a class of that name
FILES = [CONFIG_FILE, WEIGHTS_FILE]


def add_competition(hub: Hub) -> None:
    """Serve the zoo under the competition's names, revisions too."""
    hub.add(BASE_MODEL_NAME, ZOO / "base")
    for place, (name, commit) in enumerate(LIST_MODELS):
        hub.add(name, EXPERTS[place % len(EXPERTS)], commit)


def set_template(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """Say where files are; huggingface_hub before 1.0 has it twice."""
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> Iterator[Hub]:
    """A hub that serves the competition's repositories, to a process with an empty cache and no token."""
    with serve() as served:
        add_competition(served)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        set_template(monkeypatch, template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        forget_sessions()
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
        for name in ("HF_TOKEN", "HF_AUTH_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        search.hub._tell_once.cache_clear()
        yield served
        forget_sessions()


@pytest.fixture
def repo(hub: Hub) -> Repo:
    """The first adapter's repository."""
    return hub.repos[ADAPTER]


def fetch_adapter(revision: str | None = COMMIT) -> Fetched:
    return fetch(ADAPTER, revision, FILES, "adapter 'magicoder'")


def refusal(kind: type[InputError] = InputError, revision: str | None = COMMIT) -> str:
    with pytest.raises(InputError) as caught:
        fetch_adapter(revision)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("adapter 'magicoder'")
    return str(caught.value)


# ---- what is fetched


def test_the_competitions_adapters_and_base_come_with_their_commits(hub: Hub) -> None:
    base = load_base(BASE_MODEL_NAME, device="cpu")
    assert (base.source, base.revision) == (BASE_MODEL_NAME, hub.repos[BASE_MODEL_NAME].commit)
    own = load_base(str(ZOO / "base"), device="cpu")
    assert base.sha256 == own.sha256
    torch.testing.assert_close(base.model.state_dict(), own.model.state_dict())
    for place, (name, commit) in enumerate(LIST_MODELS):
        adapter = load_adapter(name, revision=commit)
        assert (adapter.source, adapter.revision) == (name, commit)
        assert adapter.sha256 == sha256_file(EXPERTS[place % len(EXPERTS)] / WEIGHTS_FILE)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_branch_is_resolved_to_its_commit(hub: Hub, revision: str | None) -> None:
    fetched = fetch_adapter(revision)
    assert fetched.commit == fetched.folder.name == COMMIT
    assert sorted(path.name for path in fetched.folder.iterdir()) == FILES


def test_extra_files_stay_on_the_hub(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("import os; os.abort()")
    extra = (
        "modeling.py",
        "adapter_model.bin",
        "README.md",
        "optimizer.pt",
        "checkpoint-1/adapter_config.json",
    )
    repo.files.update(dict.fromkeys((*extra, "checkpoint-1/adapter_model.safetensors"), junk))
    folder = fetch_adapter().folder
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == FILES
    assert set(hub.asked("GET", "file", "large")) == set(FILES)
    base = hub.repos[BASE_MODEL_NAME]
    base.files.update(
        dict.fromkeys(
            ("modeling.py", "pytorch_model.bin", "original/model.safetensors", "training.json"), junk
        )
    )
    load_base(BASE_MODEL_NAME, device="cpu")
    cached = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*")}
    assert cached == {*FILES, *(path.name for path in (ZOO / "base").iterdir())}


def test_a_pickle_comes_only_where_it_is_allowed(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pickle")
    del repo.files[WEIGHTS_FILE]
    repo.files["adapter_model.bin"] = tmp_path / "pickle"
    with pytest.raises(InputError, match=r"read only with `allow_pickle: true`"):
        load_adapter(ADAPTER, revision=COMMIT)
    assert "adapter_model.bin" not in hub.asked("GET", "file", "large")
    with pytest.raises(InputError, match=r"no LoRA tensors"):
        load_adapter(ADAPTER, revision=COMMIT, allow_pickle=True)


def test_code_of_a_base_is_neither_fetched_nor_run(hub: Hub, tmp_path: Path) -> None:
    files = hub.repos[BASE_MODEL_NAME].files
    config = json.loads(files["config.json"].read_text())
    code = tmp_path / "code.py"
    code.write_text("raise SystemExit('ran')")
    files["code.py"] = code
    own = {
        "model_type": "its-own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    files["config.json"] = tmp_path / "config.json"
    files["config.json"].write_text(json.dumps(config | own))
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        read_context(BASE_MODEL_NAME)
    files["config.json"] = tmp_path / "known.json"
    files["config.json"].write_text(json.dumps(config | own | {"model_type": config["model_type"]}))
    hub.repos[BASE_MODEL_NAME].commit = "e" * 40
    load_shapes(BASE_MODEL_NAME)
    assert type(load_base(BASE_MODEL_NAME, device="cpu").model).__module__.startswith("transformers.models.")
    assert "code.py" not in hub.asked("GET", "file")


# ---- the cache


def test_a_pinned_adapter_in_the_cache_needs_no_hub(hub: Hub) -> None:
    first = fetch_adapter()
    hub.requests.clear()
    assert fetch_adapter() == first
    assert not hub.requests


def test_a_branch_in_the_cache_is_asked_for_and_not_fetched_again(hub: Hub) -> None:
    load_tokenizer(BASE_MODEL_NAME)
    hub.requests.clear()
    load_tokenizer(BASE_MODEL_NAME)
    assert hub.asked("GET", "info") == [BASE_MODEL_NAME]
    assert not hub.asked("GET", "file", "large")


def test_a_base_is_of_one_commit_though_its_branch_moves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.repos[BASE_MODEL_NAME]
    first, read = repo.commit, search.base._read_tokenizer

    def move(source: str, folder: Path) -> Any:
        repo.commit, repo.old = "f" * 40, (first,)
        return read(source, folder)

    monkeypatch.setattr(search.base, "_read_tokenizer", move)
    assert load_base(BASE_MODEL_NAME, device="cpu").revision == first


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_offline_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    first = fetch_adapter(revision)
    hub.requests.clear()
    go_offline(monkeypatch)
    assert fetch_adapter(revision) == first
    assert not hub.requests


def test_offline_and_not_in_the_cache_names_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    message = refusal()
    assert f"not or not wholly in the cache {constants.HF_HUB_CACHE}" in message
    assert "Unset HF_HUB_OFFLINE once" in message
    assert not hub.requests


def test_offline_with_a_part_in_the_cache_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tokenizer(BASE_MODEL_NAME)  # without the weights
    go_offline(monkeypatch)
    with pytest.raises(InputError, match=r"not or not wholly in the cache"):
        load_base(BASE_MODEL_NAME, device="cpu")


def test_a_hub_out_of_reach_serves_from_the_cache_else_says_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_adapter("main")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch_adapter("main") == first
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-other")
    assert "not cached, and http://127.0.0.1:9 is out of reach. Connect" in refusal()


def test_what_is_no_hub_is_said_to_be_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_template(monkeypatch, hub.large_url + "/large/{repo_id}/{filename}")
    assert "does not seem to be served by a Hugging Face Hub endpoint" in refusal()


# ---- who may not, and what is not there


def test_a_revision_that_does_not_exist_is_named(hub: Hub) -> None:
    message = refusal(MissingOnHubError, revision="v9")
    assert "at revision 'v9': the hub has no such revision" in message
    assert f"{hub.url}/{ADAPTER}/commits/main" in message
    assert "the hub has no such revision" in refusal(MissingOnHubError, revision="0" * 40)


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("stranger", 403)])
def test_a_guarded_adapter_says_where_to_ask(
    hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch, token: str | None, status: int
) -> None:
    repo.gated_to = "member"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refusal()
    assert (
        f"the hub guards it ({status}): ask for access at {hub.url}/{ADAPTER}, then `hf auth login`"
        in message
    )
    assert "HF_TOKEN" in message


def test_a_token_that_is_no_longer_good_is_told_apart(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", EXPIRED)
    assert f"the hub refuses the token (401). Make one that can read {hub.url}/{ADAPTER}" in refusal()


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HF_AUTH_TOKEN"])
def test_a_token_opens_a_guarded_adapter(
    hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    repo.gated_to = "member"
    monkeypatch.setenv(variable, "member")
    assert fetch_adapter().commit == COMMIT
    assert {r.token for r in hub.requests if r.kind != "large"} == {"member"}
    assert {r.token for r in hub.requests if r.kind == "large"} == {None}  # another host


def test_hf_token_goes_before_the_kits(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.gated_to = "member"
    monkeypatch.setenv("HF_TOKEN", "member")
    monkeypatch.setenv("HF_AUTH_TOKEN", "stranger")
    assert fetch_adapter().commit == COMMIT


@pytest.mark.parametrize("token", [None, "stranger"])
def test_an_adapter_that_is_not_there_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    del hub.repos[ADAPTER]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refusal(MissingOnHubError)
    assert f"no such folder, and not on the hub: {hub.url}/{ADAPTER} (40" in message
    assert "Check its name; if it is private" in message


def configured(tmp_path: Path, *overrides: str, names: Sequence[str] = ("magicoder", "cnn", "drop")) -> Path:
    """Write a configuration of some of the competition's adapters, as the zoo plays them."""
    adapters = [
        {"source": source, "revision": commit, "skeletons": ["### Task: Say.\n### Text:{text}\n### Answer:"]}
        for source, commit in LIST_MODELS
        if source.split("/")[1] in names
    ]
    settings = {"base": {"source": BASE_MODEL_NAME, "name": "data/zoo/base"}, "adapters": adapters}
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([json.dumps(settings)[:-1] + "".join(f", {o}" for o in overrides) + "}"]))
    return path


def test_a_missing_adapter_ends_the_run_and_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    del hub.repos["predibase/cnn"]
    with pytest.raises(InputError) as caught:
        load_adapters(load_config(configured(tmp_path)))
    assert str(caught.value).startswith("adapter 'cnn' (predibase/cnn) at revision 'dec34c4")
    assert str(caught.value).endswith("Or set `adapters_missing: skip` to merge without it.")


def test_a_missing_adapter_is_left_out_and_named_where_the_config_says_so(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del hub.repos["predibase/cnn"]
    setup = load_setup(load_config(configured(tmp_path, '"adapters_missing": "skip"')))
    assert setup.parts.names == ("magicoder", "drop")
    header = setup.describe()
    assert header["left_out"].keys() == {"cnn"}
    assert "not on the hub" in header["left_out"]["cnn"]
    assert [a["revision"] for a in header["adapters"]] == [COMMIT, dict(LIST_MODELS)["predibase/drop"]]
    assert header["base"]["revision"] == hub.repos[BASE_MODEL_NAME].commit
    assert "left out of the merge: adapter 'cnn'" in caplog.text


def test_only_what_the_hub_says_it_does_not_have_is_skipped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(configured(tmp_path, '"adapters_missing": "skip"'))
    hub.repos["predibase/cnn"].gated_to = "member"
    with pytest.raises(InputError, match=r"the hub guards it"):
        load_adapters(config)
    hub.repos["predibase/cnn"].gated_to = None
    hub.repos["predibase/cnn"].busy, hub.repos["predibase/cnn"].busy_at = [(503, None)] * 99, "file"
    with pytest.raises(InputError, match=r"the hub is busy"):
        load_adapters(config)
    go_offline(monkeypatch)
    with pytest.raises(InputError, match=r"not or not wholly in the cache"):
        load_adapters(config)


def test_nothing_is_merged_where_no_adapter_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.repos.clear()
    with pytest.raises(InputError, match=r"no adapter is left; the first: adapter 'magicoder'"):
        load_adapters(load_config(configured(tmp_path, '"adapters_missing": "skip"')))


def test_the_uniform_average_is_over_what_is_there(hub: Hub, tmp_path: Path) -> None:
    del hub.repos["predibase/cnn"]
    method = UniformAverage("u", load_config(configured(tmp_path, '"adapters_missing": "skip"')))
    assert len(method._load_everything()) == 2
    assert method.scale == 1 / 2


def test_several_adapters_are_fetched_at_once_and_come_in_their_order(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, together = search.hub.snapshot_download, Barrier(3, timeout=20)

    def download(*args: Any, **options: Any) -> str:
        together.wait()  # all three, or the barrier breaks
        return real(*args, **options)

    monkeypatch.setattr(search.hub, "snapshot_download", download)
    config = load_config(configured(tmp_path))
    fetched = fetch_together([partial(fetch, a.source, a.revision, FILES, a.name) for a in config.adapters])
    assert [found.commit for found in fetched] == [a.revision for a in config.adapters]


def test_after_an_error_no_other_is_begun_and_of_several_the_first_is_told() -> None:
    begun, both = [], Barrier(2, timeout=20)

    def work(number: int) -> int:
        begun.append(number)
        if number in (1, 2):
            both.wait()
            raise InputError(f"no {number}")
        return number

    assert fetch_together([partial(work, number) for number in (3, 4)]) == [3, 4]
    with pytest.raises(InputError, match="no 1"):
        fetch_together([partial(work, number) for number in (1, 2, *range(5, 4000))])
    assert len(begun) < 4000


@pytest.mark.parametrize("given", [None, True, False])
def test_one_bar_stands_for_all_adapters_unless_the_user_says_which(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool | None
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(hub_bars, "progress_bar_states", {})
    for module in (constants, hub_bars):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", given)
    quiet_other_libraries()
    load_adapters(load_config(configured(tmp_path)))
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("adapters: 100%" in shown) == (given is None)
    assert ("Fetching" in shown) == (given is False)


def test_what_is_not_pinned_is_told_once(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = configured(tmp_path)
    for _ in range(2):
        load_adapters(load_config(path))
        load_base(BASE_MODEL_NAME, device="cpu", revision=hub.repos[BASE_MODEL_NAME].commit)
    assert "not pinned" not in caplog.text
    settings = json.loads(path.read_text())
    del settings["adapters"][0]["revision"]
    settings["adapters"][2]["revision"] = "main"
    path.write_text(json.dumps(settings))
    for _ in range(2):
        adapters, _ = load_adapters(load_config(path))
        load_base(BASE_MODEL_NAME, device="cpu")
    (first, second) = [line for line in caplog.messages if "not pinned" in line]
    assert f"not pinned: adapter 'magicoder' is at {COMMIT}, adapter 'drop' is at " in first
    assert f"not pinned: base '{BASE_MODEL_NAME}' is at {hub.repos[BASE_MODEL_NAME].commit}. " in second
    assert [a.revision for a in adapters] == [dict(LIST_MODELS)[f"predibase/{a.name}"] for a in adapters]


# ---- broken connections and files


def test_a_connection_cut_half_way_goes_on_where_it_broke(hub: Hub, repo: Repo) -> None:
    size = repo.files[WEIGHTS_FILE].stat().st_size
    repo.cut_after = [size // 2, size // 4]
    folder = fetch_adapter().folder
    assert sha256_file(folder / WEIGHTS_FILE) == sha256_file(repo.files[WEIGHTS_FILE])
    ranges = [r.range for r in hub.requests if r.kind == "large" and r.method == "GET"]
    assert ranges[0] is None
    starts = [int((r or "").removeprefix("bytes=").removesuffix("-")) for r in ranges[1:]]
    assert size // 2 - constants.DOWNLOAD_CHUNK_SIZE < starts[0] <= size // 2 < starts[1]


def test_whole_files_are_kept_when_another_never_comes(hub: Hub, repo: Repo) -> None:
    repo.cut_after = [100] * 99
    assert "download failed" in refusal()
    repo.cut_after = []
    hub.requests.clear()
    fetch_adapter()
    assert hub.asked("GET", "file", "large") == [WEIGHTS_FILE]


@pytest.mark.slow
def test_a_killed_processs_part_of_a_file_is_fetched_anew_and_its_whole_files_are_kept(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.hold_after = [repo.files[WEIGHTS_FILE].stat().st_size // 2]
    code = (
        "import sys; from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 14; "
        "from search.hub import fetch; fetch(*sys.argv[1:3], sys.argv[3:], 'a')"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    with subprocess.Popen([sys.executable, "-c", code, ADAPTER, COMMIT, *FILES], env=own) as process:
        part = (tmp_path / "home").rglob
        while not list(part(CONFIG_FILE)) or not any(p.stat().st_size for p in part("*.incomplete")):
            assert process.poll() is None
            Event().wait(0.02)
        process.kill()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    assert fetch_adapter().commit == COMMIT
    assert hub.asked("GET", "file", "large").count(CONFIG_FILE) == 1
    ranges = [r.range for r in hub.requests if r.kind == "large" and r.method == "GET"]
    assert ranges == [None, None]  # huggingface_hub takes up only what it began itself


@pytest.mark.parametrize("broken", [RuntimeError("data store gave up"), ConnectionResetError("by peer")])
def test_a_store_for_large_files_that_breaks_off_is_asked_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, slept: list[float], broken: Exception
) -> None:
    real, failures = search.hub.snapshot_download, [broken, broken]

    def download(*args: Any, **options: Any) -> str:
        if failures:
            raise failures.pop()
        return real(*args, **options)

    monkeypatch.setattr(search.hub, "snapshot_download", download)
    assert fetch_adapter().commit == COMMIT
    assert slept == list(WAITS_S[:2])
    failures.extend([type(broken)("no answer from https://store/a?signature=1 today")] * 99)
    assert (
        "download failed: no answer from https://store/a today. Check name and connection, and start again"
        in refusal()
    )


def test_weights_are_read_for_their_hash_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(search.hub, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    for _ in range(2):
        load_base(BASE_MODEL_NAME, device="cpu")
        load_adapter(ADAPTER, revision=COMMIT)
    n_texts = len([file for pattern in TEXT_FILES for file in (ZOO / "base").glob(pattern)])
    assert len(hashed) == len(set(hashed)) == 2 + n_texts


def test_a_corrupted_file_is_fetched_again_once(
    hub: Hub, repo: Repo, caplog: pytest.LogCaptureFixture
) -> None:
    repo.corrupt = 1
    folder = fetch_adapter().folder
    assert sha256_file(folder / WEIGHTS_FILE) == sha256_file(repo.files[WEIGHTS_FILE])
    assert hub.asked("GET", "large") == [WEIGHTS_FILE] * 2
    assert f"{WEIGHTS_FILE} does not have the hub's hash: fetched again" in caplog.text


def test_a_file_that_stays_corrupted_is_refused_and_forgotten(hub: Hub, repo: Repo) -> None:
    repo.corrupt = 2
    assert f"{WEIGHTS_FILE} does not have the hub's hash, fetched again neither" in refusal()
    left = {name for _, _, names in os.walk(constants.HF_HUB_CACHE) for name in names}  # dangling links too
    assert CONFIG_FILE in left
    assert not {WEIGHTS_FILE, sha256_file(repo.files[WEIGHTS_FILE])} & left
    assert hub.asked("GET", "large") == [WEIGHTS_FILE] * 2
    assert fetch_adapter().commit == COMMIT


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_disk_spoiled_is_fetched_again(hub: Hub, repo: Repo, name: str) -> None:
    path = fetch_adapter().folder / name
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    fetch_adapter()
    assert path.read_bytes() == good


def test_a_file_that_someone_deleted_from_the_cache_is_fetched_again(hub: Hub) -> None:
    path = fetch_adapter().folder / WEIGHTS_FILE
    path.resolve().unlink()
    assert (fetch_adapter().folder / WEIGHTS_FILE).exists()


def test_offline_a_deleted_file_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (fetch_adapter().folder / WEIGHTS_FILE).resolve().unlink()
    go_offline(monkeypatch)
    assert "Unset HF_HUB_OFFLINE once to fetch it" in refusal()


def test_offline_a_spoiled_file_is_refused_and_kept(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_adapter().folder / CONFIG_FILE
    path.write_bytes(path.read_bytes() + b" ")
    go_offline(monkeypatch)
    assert f"{CONFIG_FILE} in the cache does not have its hash. Unset HF_HUB_OFFLINE once" in refusal()
    assert path.exists()


# ---- a busy hub


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("at", ["info", "tree", "large"])
def test_a_busy_hub_is_asked_again(hub: Hub, repo: Repo, slept: list[float], status: int, at: str) -> None:
    repo.busy, repo.busy_at = [(status, None)] * 2, at
    assert fetch_adapter("main").commit == COMMIT
    assert slept
    assert sum(slept) < 10


def test_retry_after_is_waited_for(hub: Hub, repo: Repo, slept: list[float]) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 40))
    repo.busy = [(429, "7"), (503, date), (503, "junk")]
    fetch_adapter("main")
    assert slept == [7.0, pytest.approx(40, abs=2), WAITS_S[2]]


def test_a_hub_that_stays_busy_is_an_error(
    hub: Hub, repo: Repo, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    repo.busy = [(503, None)] * 99
    message = refusal(revision="main")
    assert "the hub is busy (503). Start again later" in message
    assert slept == list(WAITS_S)
    assert caplog.text.count("the hub answers 503; again in") == len(WAITS_S)


def test_a_wait_that_is_too_long_is_told_and_not_waited(hub: Hub, repo: Repo, slept: list[float]) -> None:
    repo.busy = [(429, str(int(LONGEST_WAIT_S) + 1))]
    assert "busy (429), and asks to wait 301 s. Start again later" in refusal(revision="main")
    assert not slept


def test_a_busy_hub_does_not_matter_where_the_cache_serves(hub: Hub, repo: Repo, slept: list[float]) -> None:
    first = fetch_adapter("main")
    repo.busy = [(500, None)] * 99
    assert fetch_adapter("main") == first
    assert not slept


# ---- the environment, as huggingface_hub reads it


def run_alone(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with no variable of the hub's but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *command], env=clean | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_endpoint_home_and_token_come_from_the_environment(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    repo.gated_to = "member"
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_AUTH_TOKEN": "member"}
    code = "import sys; from search.hub import fetch; print(fetch(*sys.argv[1:3], sys.argv[3:], 'a').folder)"
    command = ["-c", code, ADAPTER, COMMIT, *FILES]
    done = run_alone(command, **own)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
    again = run_alone(command, **own, HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_a_whole_run_from_the_hub_records_commits_and_what_was_missing(hub: Hub, tmp_path: Path) -> None:
    del hub.repos["predibase/cnn"]
    path, out = configured(tmp_path, '"adapters_missing": "skip"'), tmp_path / "out"
    quick = ["search.max_evaluations=16", "prompts.per_adapter=2", "search.gradient.refine_steps=0"]
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = run_alone(["-m", "search", "run", str(path), "--out", str(out), "--set", *quick], **own)
    assert done.returncode == 0, done.stderr
    base, found = hub.repos[BASE_MODEL_NAME].commit, json.loads((out / "coefficients.json").read_text())
    for document in (found, Trace.load(out / "trace.jsonl").header):
        assert document["base"]["revision"] == base
        assert [a["revision"] for a in document["adapters"]] == [COMMIT, dict(LIST_MODELS)["predibase/drop"]]
    assert found["provenance"]["left_out"].keys() == {"cnn"}
    assert Trace.load(out / "trace.jsonl").header["left_out"] == found["provenance"]["left_out"]
    assert "left out, coefficient 0: cnn: adapter 'cnn'" in done.stderr
    assert done.stderr.count(f"not pinned: base '{BASE_MODEL_NAME}' is at {base}.") == 1
    merged = run_alone(
        ["-m", "search", "merge", str(out), "-o", str(tmp_path / "m")], **own, HF_HUB_OFFLINE="1"
    )
    assert merged.returncode == 0, merged.stderr
