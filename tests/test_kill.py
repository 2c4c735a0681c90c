"""A search that is killed at any moment, and gone on with, ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from tests.test_layers import ROOT
from tests.test_merges import save_toy_zoo

SETTINGS = (
    "device=cpu",
    *("prompts.per_adapter=4", "prompts.unseen_per_adapter=3", "prompts.max_new_tokens=10"),
    *("search.max_evaluations=90", "search.n_candidates=6", "search.n_finalists=3", "search.race_keep=0.5"),
    "search.stages=[{share: 1, groups: model}, {share: 2, groups: layer}]",
    *("search.gradient.inject_every=3", "objective.weak_signal_nats=0"),
)
TIMES = {"elapsed_s", "seconds", "peak_bytes", "left_s", "needed_s", "reserves_s", "commit"}
N_MOMENTS, N_MOMENTS_SLOW = 14, 50


@dataclass
class Server:
    """Starts, kills and waits for real processes."""

    process: subprocess.Popen
    log: Path

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, config, output):
        argv = ["run", str(config), "--out", str(output), "--set", *SETTINGS]
        return self.ask(argv=argv, log=str(self.log))

    def finish(self, config, output):
        """Run to the end; return the exit code."""
        return self.ask(wait=self.start(config, output))

    def kill_after(self, seconds, config, output):
        """Run, and kill after so many seconds; return the exit status, -9 if it was not over by then."""
        pid = self.start(config, output)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return self.ask(wait=pid)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@contextmanager
def serve(zoo, log):
    base = yaml.safe_load(zoo.read_text())["base"]
    base_folder = zoo.parent / (base if isinstance(base, str) else base["source"])
    command = [sys.executable, "-W", "ignore", "-m", "tests.fork_server", str(base_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Server(process, log)
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def servers(zoo, tmp_path_factory):
    """Two, since there are two cores."""
    logs = tmp_path_factory.mktemp("log")
    with serve(zoo, logs / "one.txt") as one, serve(zoo, logs / "two.txt") as two:
        yield one, two


@pytest.fixture(scope="module")
def server(servers):
    return servers[0]


@pytest.fixture(scope="module")
def whole(server, zoo, tmp_path_factory):
    """A run that nobody disturbed: its config, folder and seconds, once everything is warm."""
    for name in ("cold", "whole"):
        output = tmp_path_factory.mktemp(name)
        started_s = time.monotonic()
        assert server.finish(zoo, output) == 0, server.log.read_text()
    return zoo, output, time.monotonic() - started_s


def read_lines(output):
    """The trace without times and commit, and without what says that it was continued."""
    lines = [json.loads(line) for line in (output / "trace.jsonl").read_bytes().splitlines()]
    kept = [line for line in lines if line.get("event") != "resumed"]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in kept]


def read_results(output):
    """Adapter and coefficients; whoever edits the checkout meanwhile changes only the commit."""
    document = json.loads((output / "coefficients.json").read_text())
    del document["provenance"]["commit"]
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    weights = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return document, weights, (output / "adapter" / "adapter_config.json").read_text()


def whole_lines(path):
    """Every line of a file that has its end."""
    return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []


def last_step(lines):
    """What the last whole line of a trace tells."""
    last = json.loads(lines[-1]) if lines else {"kind": "the start"}
    return last.get("event", last["kind"])


def tear(path, rng):
    """Cut into the last line, or leave a beginning of a next one."""
    if not path.exists() or not path.stat().st_size:
        return "nothing to tear"
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    if rng.random() < 0.5:
        path.write_bytes(content[: rng.integers(last, len(content))])
        return "last line cut"
    path.write_bytes(content + content[last : rng.integers(last + 1, len(content))])
    return "half a line added"


def disturb(server, whole, output, rng):
    """Kill a run once or twice, tear its trace now and then, let it end; tell the story, check its lines."""
    config, _, whole_s = whole
    trace = output / "trace.jsonl"
    story, before = [], []
    for _ in range(rng.integers(1, 3)):
        seconds = float(rng.uniform(0, whole_s))
        while (status := server.kill_after(seconds, config, output)) != -signal.SIGKILL:
            assert status == 0, server.log.read_text()  # it was over: kill earlier
            shutil.rmtree(output)
            story, seconds = [], seconds / 2
        torn = tear(trace, rng) if rng.random() < 0.4 else "not torn"
        before = whole_lines(trace)
        n_done = sum(b'"kind": "generation"' in line for line in before)
        story.append(f"killed after {seconds:.2f} s at {last_step(before)}, {n_done} generations, {torn}")
    assert server.finish(config, output) == 0, server.log.read_text()
    after = trace.read_bytes().splitlines()
    assert after[: len(before)] == before, "what was recorded was written anew"
    return "; ".join(story), n_done > 0


def check_moments(servers, whole, folder, moments):
    half = len(moments) // 2
    with ThreadPoolExecutor(2) as pool:
        tried = pool.map(partial(try_moments, whole, folder), servers, (moments[:half], moments[half:]))
        n_equal, n_in_search = np.sum(list(tried), axis=0)
    sys.stdout.write(f"{n_equal} of {len(moments)} equal\n")
    assert n_equal == len(moments)
    assert n_in_search >= len(moments) / 8, "hardly any kill hit the search: nothing was shown"


def try_moments(whole, folder, server, moments):
    """Return how many ended as if undisturbed, and how many were killed while they searched."""
    expected_lines, expected_results = read_lines(whole[1]), read_results(whole[1])
    n_equal = n_in_search = 0
    for moment in moments:
        output = folder / str(moment)
        story, was_in_search = disturb(server, whole, output, np.random.default_rng(moment))
        same = read_lines(output) == expected_lines and read_results(output) == expected_results
        n_equal, n_in_search = n_equal + same, n_in_search + was_in_search
        sys.stdout.write(f"moment {moment:2}: {'equal' if same else 'DIFFERENT'}: {story}\n")
    return n_equal, n_in_search


def test_a_killed_search_goes_on_as_if_nothing_had_happened(servers, whole, tmp_path):
    check_moments(servers, whole, tmp_path, range(N_MOMENTS))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_merges_the_best_so_far_and_the_search_can_go_on(server, whole, tmp_path, number):
    config, undisturbed, _ = whole
    trace = tmp_path / "trace.jsonl"
    pid = server.start(config, tmp_path)
    deadline_s = time.monotonic() + 60
    while b'"index": 3' not in (trace.read_bytes() if trace.exists() else b""):
        assert time.monotonic() < deadline_s, server.log.read_text()
        time.sleep(0.02)
    os.kill(pid, number)
    assert server.ask(wait=pid) == 130
    assert read_results(tmp_path)[0]["provenance"]["ended_by"] == "interrupt"
    assert server.finish(config, tmp_path) == 0
    assert read_results(tmp_path) == read_results(undisturbed)
    generations = [line for line in read_lines(tmp_path) if line["kind"] == "generation"]
    assert generations == [line for line in read_lines(undisturbed) if line["kind"] == "generation"]


@pytest.mark.slow
def test_fifty_more_kills(servers, whole, tmp_path):
    check_moments(servers, whole, tmp_path, range(100, 100 + N_MOMENTS_SLOW))
