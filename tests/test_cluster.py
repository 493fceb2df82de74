"""Tasks that run elsewhere: pickled, opened again, lost and run again; the same bytes each time."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import WIDTH, PairFiles, make_pair, tree_hashes, write_checkpoint
from folding_models import write_deep, write_text
from refusals import nothing_left, refused
from tiny_models import write_family

from deltafold import compress, factor, merge, restore, share
from deltafold.archive import Archive, reader
from deltafold.checkpoint import Checkpoint, CheckpointWriter
from deltafold.errors import ClusterError, NonFiniteError, StorageError, UsageError
from deltafold.merging.recipe import Model, Recipe
from deltafold.running import cluster
from deltafold.running import workspace as workspace_module
from deltafold.running.cluster import RayEngine, check_engine, open_engine
from deltafold.running.engine import Progress, Step, Task
from deltafold.running.workspace import Workspace

RATIO: dict[str, Any] = {"file_ratio": 8}


@pytest.fixture(scope="module", autouse=True)
def _token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cluster's own token, not the user's. Set for all tests here: `import ray` reads the mode."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        yield


def again(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


# --- what tasks refer to ----------------------------------------------------------------------


def test_a_checkpoint_is_opened_again(pair: PairFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.base.parent)
    with Checkpoint(Path(pair.base.name)) as here:
        sent = pickle.dumps(here)
        monkeypatch.chdir("/")  # a worker has a folder of its own
        there = pickle.loads(sent)
        assert there.path == pair.base and there.label == here.label
        assert pickle.loads(sent) is there  # a process opens it once
        monkeypatch.chdir(pair.base.parent)
        for name in here.tensors:
            assert torch.equal(there.tensor(name), here.tensor(name))


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_checkpoint_that_is_not_shared(pair: PairFiles, change: str) -> None:
    with Checkpoint(pair.base) as here:
        sent = pickle.dumps(here)
    if change == "gone":
        shutil.rmtree(pair.base)
    else:
        os.utime(pair.base / "model.safetensors", (1, 1))
    refused(ClusterError, lambda: pickle.loads(sent), str(pair.base), "share")


def test_an_archive_is_opened_again(archive: Path) -> None:
    with Archive(archive) as here:
        there = again(here)
        sent = pickle.dumps(here)
        tensor = next(each for each in here.manifest.tensors if each.pieces)
        parts = there.parts(tensor, tensor.pieces[0])
        assert {name: part.tolist() for name, part in parts.items()} == {
            name: part.tolist() for name, part in here.parts(tensor, tensor.pieces[0]).items()
        }
    archive.rename(archive.with_name("moved"))
    reader._opened_elsewhere.cache_clear()
    refused(ClusterError, lambda: pickle.loads(sent), str(archive), "share")


def test_a_workspace_is_joined(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", {"seed": 1}) as here:
        there = again(here)
        there.save_json("a/1.json", [1])
        there.save_tensors("b/1.safetensors", {"x": torch.arange(3)})
        assert here.load_json("a/1.json") == [1]
        assert here.load_tensor("b/1.safetensors", "x").tolist() == [0, 1, 2]
        assert not list(here.folder.rglob("*.tmp"))
        sent = pickle.dumps(here)
    (tmp_path / "out.partial" / "journal.json").write_text("{}")
    refused(ClusterError, lambda: pickle.loads(sent), "out.partial")


def test_two_that_write_one_result_do_not_share_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was given up may still be alive: both end with a whole file."""
    with Workspace(tmp_path / "out", {}) as here:
        one, two = again(here), again(here)
        rename, names = Path.replace, []

        def replace(self: Path, target: Path) -> Path:
            names.append(self.name)
            if len(names) == 1:
                two.save_json("a.json", 2)
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        one.save_json("a.json", 1)
        assert len(set(names)) == 2 and here.load_json("a.json") == 1


def test_a_result_may_show_late(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", {}) as here:
        there = again(here)
        late = threading.Timer(0.5, lambda: there.save_json("late/1.json", 7))
        late.start()
        assert here.load_json("late/1.json") == 7
        late.join()


def test_a_missing_result_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_module, "PATIENCE_SECONDS", 0.1)
    with Workspace(tmp_path / "out", {}) as here:
        with pytest.raises(StorageError):  # at once, where nobody else writes
            here.load_json("never.json")
        again(here)
        with pytest.raises(StorageError):
            here.load_json("never.json")


def test_a_writer_writes_into_the_same_files(tmp_path: Path) -> None:
    layout = {"a.safetensors": [("x", "F32", (2, 3)), ("y", "F32", (3,))]}
    here = CheckpointWriter(tmp_path, layout, {"format": "pt"})
    sent = pickle.dumps(here)
    there = pickle.loads(sent)
    there.write("x", torch.ones(1, 3), 3)
    here.write("x", torch.zeros(1, 3))
    there.write("y", torch.arange(3.0))
    there.close()
    here.finish()
    with Checkpoint(tmp_path) as made:
        assert made.tensor("x").tolist() == [[0, 0, 0], [1, 1, 1]]
        assert made.tensor("y").tolist() == [0, 1, 2]
    (tmp_path / "a.safetensors").unlink()
    refused(ClusterError, lambda: pickle.loads(sent), "a.safetensors", "share")


# --- every verb's tasks, pickled, in a process without the driver's objects -------------------


class Pickling:
    """An engine that sends every task through a pickle, and runs each twice, the last one first."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def run(self, stage: str, tasks: Sequence[Task], progress: Progress | None) -> None:
        from ray import cloudpickle

        if not tasks:
            return
        self.stages.append(stage)
        runs = pickle.loads(cloudpickle.dumps([task.run for task in tasks]))
        for run in [*reversed(runs), *runs]:
            run()

    def to_record(self) -> dict[str, Any]:
        return {"name": "pickling", "stages": self.stages}


@pytest.fixture
def pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine="ray"` is the engine above."""
    pytest.importorskip("ray")

    @contextmanager
    def opened(name: str, *_: object) -> Iterator[Pickling | None]:
        yield Pickling() if name == "ray" else None

    monkeypatch.setattr("deltafold.running.run.open_engine", opened)


@pytest.mark.usefixtures("pickling")
@pytest.mark.parametrize(
    "method", ["impart", "lossless", pytest.param("auto", marks=pytest.mark.integration)]
)
def test_tasks_of_compress_can_run_elsewhere(pair: PairFiles, tmp_path: Path, method: str) -> None:
    budget = {} if method == "lossless" else RATIO
    compress(pair.base, pair.finetuned, tmp_path / "a.delta", method, **budget)
    record = compress(
        pair.base, pair.finetuned, tmp_path / "b.delta", method, engine="ray", **budget
    )
    assert tree_hashes(tmp_path / "a.delta") == tree_hashes(tmp_path / "b.delta")
    assert record["engine"]["stages"][0] == "survey"
    restore(tmp_path / "a.delta", pair.base, tmp_path / "a")
    restore(tmp_path / "b.delta", pair.base, tmp_path / "b", engine="ray")
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")


@pytest.mark.integration
@pytest.mark.usefixtures("pickling")
@pytest.mark.parametrize("family", ["llama tied", "gpt2", "qwen2 moe"])
def test_tasks_of_families(tmp_path: Path, family: str) -> None:
    base, finetuned = write_family(tmp_path, family)
    for engine in ("threads", "ray"):
        out = tmp_path / f"{engine}.delta"
        compress(base, finetuned, out, "magnitude", file_ratio=4, engine=engine)
        restore(out, base, tmp_path / f"restored {engine}", shard_bytes=100_000, engine=engine)
    assert tree_hashes(tmp_path / "ray.delta") == tree_hashes(tmp_path / "threads.delta")
    assert tree_hashes(tmp_path / "restored ray") == tree_hashes(tmp_path / "restored threads")


@pytest.mark.usefixtures("pickling")
def test_tasks_of_merge_can_run_elsewhere(
    pair: PairFiles, lossless_archive: Path, tmp_path: Path
) -> None:
    recipe = Recipe((Model(str(pair.finetuned)), Model(str(lossless_archive))), "dare-ties")
    merge(recipe, tmp_path / "a", base=pair.base, shard_bytes=200_000)
    merge(recipe, tmp_path / "b", base=pair.base, shard_bytes=200_000, engine="ray")
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    recipes = [Recipe(recipe.models, "ties", scale=scale) for scale in (0.5, 1.0)]
    for name, engine in (("c", "threads"), ("d", "ray")):
        merge(
            recipe,
            tmp_path / name,
            base=pair.base,
            candidates=recipes,
            choose=lambda formed: (1, {}),
            engine=engine,
        )
    assert tree_hashes(tmp_path / "c") == tree_hashes(tmp_path / "d")


@pytest.mark.usefixtures("pickling")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lord", {"centre": True}),
        ("basis-sharing", {"grouping": "alike"}),
        ("bolaco", {"trials": 2}),
        ("welore", {}),
        ("svd", {"dense": True}),
    ],
)
def test_tasks_of_factor_can_run_elsewhere(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    model, text = write_deep(tmp_path / "model", "llama"), write_text(tmp_path / "text.txt")
    asked: dict[str, Any] = {"parameters": 0.75, "calibration": text, "max_tokens": 40, **options}
    factor(model, tmp_path / "a", method, **asked)
    record = factor(
        model, tmp_path / "b", method, engine="ray", progress=lambda step: None, **asked
    )
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    stages = record["engine"]["stages"]
    assert "factor" in stages and stages[-1] == "write"
    assert ("spectra" in stages, "reach" in stages) == (method == "welore", method == "bolaco")


@pytest.mark.usefixtures("pickling")
@pytest.mark.parametrize(
    "options",
    [{"start": "activation", "align": True}, {"start": "svd", "row_scale": True, "dense": True}],
)
def test_tasks_of_share_can_run_elsewhere(tmp_path: Path, options: dict[str, Any]) -> None:
    model = write_deep(tmp_path / "model", "gpt2")
    asked: dict[str, Any] = {"shared": 1, "rank": 4, "protect": (0, -1), "max_tokens": 16} | options
    share(model, tmp_path / "a", samples=4, **asked)
    record = share(model, tmp_path / "b", samples=4, engine="ray", **asked)
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    assert record["engine"]["stages"] == ["start"]


# --- refusals ---------------------------------------------------------------------------------


def test_an_unknown_engine(pair: PairFiles, tmp_path: Path) -> None:
    out = tmp_path / "x.delta"
    refused(
        UsageError,
        lambda: compress(pair.base, pair.finetuned, out, engine="rya"),
        "'rya'",
        "ray",
        "threads",
    )
    refused(UsageError, lambda: restore(out, pair.base, tmp_path / "r", engine="dask"), "'dask'")


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine("threads")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(UsageError, lambda: check_engine("ray"), "pip install 'deltafold[ray]'")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_no_cluster_answers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)

    def action() -> None:
        with open_engine("ray"):
            pass

    refused(ClusterError, action, address, "ray start")


def test_ray_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**_: object) -> None:
        raise Exception("The node timed out. This could happen.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)

    def action() -> None:
        with open_engine("ray"):
            pass

    refused(ClusterError, action, "(The node timed out)", "--engine ray")


def test_no_machine_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [cluster._Machines(frozenset("ab"), 2, 10**9), cluster._Machines()]
    monkeypatch.setattr(cluster._Machines, "look", lambda: machines.pop(0))
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 0.0)
    engine = RayEngine(None)
    engine._look(10**9)
    refused(ClusterError, lambda: engine._look(10**9), "1.0 GB", "goes on where it stopped")
    assert engine.to_record()["machines"] == engine.to_record()["machines_lost"] == 2


def test_the_largest_machine_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left could never hold the task."""
    machines = [cluster._Machines(frozenset(each), 1, size) for each, size in (("a", 9), ("b", 3))]
    monkeypatch.setattr(cluster._Machines, "look", lambda: machines.pop(0))
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 0.0)
    engine = RayEngine(None)
    engine._look(9)
    refused(ClusterError, lambda: engine._look(9), "no machine left")


def test_other_versions_on_a_machine() -> None:
    versions = cluster._versions()
    cluster._check_versions(versions)
    refused(
        ClusterError, lambda: cluster._check_versions(versions | {"torch": "1.0"}), "torch", "1.0"
    )


def test_help_imports_no_ray() -> None:
    code = "import sys, deltafold.cli, deltafold.running.cluster; print('ray' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


# --- a cluster of two workers -----------------------------------------------------------------

STORE_BYTES = 80 << 20
SECONDS = pytest.mark.timeout(600)  # processes start slowly where cores are few and busy


@pytest.fixture(scope="module")
def workers() -> Iterator[SimpleNamespace]:
    """Two machines of one core each, as far as Ray can tell; `lose()` kills the second one."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=options)
        node = found.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        patch.setenv("RAY_ADDRESS", found.address)
        yield SimpleNamespace(lose=lambda: found.remove_node(node, allow_graceful=False))
        found.shutdown()


def losing(action: Callable[[], object], stage: str, after: int) -> tuple[Progress, list[str]]:
    """A progress that acts when so many tasks of a stage are done, and the stages that it saw."""
    seen: list[str] = []

    def advance(step: Step) -> None:
        seen.append(step.stage)
        if step.stage == stage and seen.count(stage) == after:
            action()

    return advance, seen


@SECONDS
@pytest.mark.integration
def test_errors_of_tasks_come_back(
    workers: SimpleNamespace, tmp_path: Path, deltafold: Any
) -> None:
    """The command line: one sentence, nothing on stdout, nothing left; as with threads."""
    pair = make_pair(tmp_path)
    broken, out = dict(pair.tensors), tmp_path / "x.delta"
    name = next(name for name, each in broken.items() if each.shape == (WIDTH, WIDTH))
    broken[name] = torch.full_like(broken[name], float("nan"))
    write_checkpoint(tmp_path / "broken", broken)
    found = deltafold(
        "compress", pair.base, tmp_path / "broken", "-o", out, "-m", "impart", "--engine", "ray"
    )
    said = refused(NonFiniteError, lambda: compress(pair.base, tmp_path / "broken", out, "impart"))
    assert (found.returncode, found.stdout) == (NonFiniteError.exit_code, "")
    assert found.stderr == f"deltafold: {said}\n"
    nothing_left(out)


@SECONDS
@pytest.mark.integration
def test_a_worker_that_sees_other_files(workers: SimpleNamespace, pair: PairFiles) -> None:
    with open_engine("ray") as engine, Checkpoint(pair.base) as checkpoint:
        assert engine is not None
        opened, (_, *known) = checkpoint.__reduce__()

        class Moved:
            """The checkpoint, as one that lies elsewhere travels."""

            def __reduce__(self) -> tuple[Any, ...]:
                return opened, (pair.base.parent / "elsewhere", *known)

        moved = Moved()
        tasks = [Task("t", lambda: moved)]
        refused(ClusterError, lambda: engine.run("x", tasks, None), "elsewhere", "share")


@SECONDS
@pytest.mark.integration
def test_a_bug_in_a_task_says_where(workers: SimpleNamespace) -> None:
    with open_engine("ray") as engine:
        assert engine is not None
        tasks = [Task("t", lambda: {}["absent"])]
        with pytest.raises(KeyError, match="absent") as caught:
            engine.run("x", tasks, None)
    assert "Traceback" in str(caught.value.__cause__) or "ray::" in str(caught.value.__cause__)


@SECONDS
@pytest.mark.integration
def test_tasks_of_a_lost_worker_run_again(workers: SimpleNamespace, tmp_path: Path) -> None:
    """Two tasks wait; the process of one is killed; both end, the killed one at its second try."""

    def wait(name: str) -> int:
        with (tmp_path / f"{name}.pids").open("a") as pids:
            pids.write(f"{os.getpid()}\n")
        while not (tmp_path / "go").exists():
            time.sleep(0.05)
        return 1

    def started(name: str) -> list[int]:
        path = tmp_path / f"{name}.pids"
        return list(map(int, path.read_text().split())) if path.exists() else []

    def kill() -> None:
        while not (started("a") and started("b")):
            time.sleep(0.05)
        os.kill(started("b")[0], signal.SIGKILL)
        while len(started("b")) < 2:
            time.sleep(0.05)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    steps: list[Step] = []
    with open_engine("ray") as engine:
        assert engine is not None
        tasks = [Task(name, lambda n=name: wait(n)) for name in "ab"]  # type: ignore[misc]
        engine.run("x", tasks, steps.append)
    assert (len(started("a")), len(started("b"))) == (1, 2)
    assert (steps[-1].done, steps[-1].made_bytes) == (2.0, 2)


@SECONDS
@pytest.mark.integration
def test_a_worker_is_lost(
    workers: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The archive, the restored model and the merged one have the bytes of one process.

    The last test of this cluster: of its two workers one is killed in the midst of encoding.
    """
    pair = make_pair(tmp_path)
    compress(pair.base, pair.finetuned, tmp_path / "one.delta", "auto", **RATIO)
    advance, seen = losing(workers.lose, "encode", 4)
    capfd.readouterr()
    record = compress(
        pair.base, pair.finetuned, tmp_path / "two.delta", "auto", engine="ray", progress=advance,
        **RATIO,
    )  # fmt: skip
    assert seen.count("encode") > 8
    assert record["engine"]["machines"] == 2
    assert record["engine"]["peak_worker_memory_bytes"] > 10**8
    assert capfd.readouterr().out == ""  # Ray is quiet, so that --json is JSON
    assert tree_hashes(tmp_path / "one.delta") == tree_hashes(tmp_path / "two.delta")
    written = json.loads((tmp_path / "two.delta.record.json").read_text())
    assert written["engine"]["name"] == "ray"
    recipe = Recipe((Model(str(pair.finetuned)), Model(str(tmp_path / "one.delta"))), "ties")
    for name, engine in (("one", "threads"), ("two", "ray")):
        restore(tmp_path / "one.delta", pair.base, tmp_path / f"restored-{name}", engine=engine)
        merge(recipe, tmp_path / f"merged-{name}", base=pair.base, engine=engine)
    for kind in ("restored", "merged"):
        assert tree_hashes(tmp_path / f"{kind}-one") == tree_hashes(tmp_path / f"{kind}-two")


def test_a_cluster_and_a_gpu_are_not_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafold.running.cluster.check_engine", lambda name: None)
    monkeypatch.setattr("deltafold.running.cluster.place", lambda: SimpleNamespace(is_gpu=True))
    with pytest.raises(UsageError, match="leave out --device"), open_engine("ray"):
        pass
