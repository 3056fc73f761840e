"""Killed with signal 9 at twenty random moments, resumed, and the same to the last bit."""
import json, os, random, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from notebook_det.engine.checkpoint import latest, read_checkpoint, verify
from notebook_det.engine.logs import read_log

HERE = Path(__file__).resolve().parent
TIMES = ("time", "data_time", "memory", "eta")     # of the clock, not of the run


@pytest.fixture(scope="module")
def start():
    "Run in a process of its own: start(folder) to the end, start(folder, seconds) until it is killed."
    server = subprocess.Popen([sys.executable, HERE / "killed.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)})
    def ask(folder, seconds=None):
        server.stdin.write(json.dumps([str(folder), seconds]) + "\n"); server.stdin.flush()
        return json.loads(server.stdout.readline())
    yield ask
    server.stdin.close()
    assert server.wait(20) == 0


def leaves(x, where=""):
    "Every tensor and value of a nested state, by its place."
    if isinstance(x, dict): return {k: v for n, o in x.items() if n not in TIMES for k, v in leaves(o, f"{where}/{n}").items()}
    if isinstance(x, (list, tuple)): return {k: v for n, o in enumerate(x) for k, v in leaves(o, f"{where}/{n}").items()}
    return {where: x}


def differences(a, b):
    a, b = leaves(a), leaves(b)
    bits = lambda x, y: x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else repr(x) == repr(y)      # NaN equals NaN
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not bits(a[k], b[k])]


def all_of(folder): # all that a run leaves
    logs = {mode: {k: v for k, v in columns.items() if k not in TIMES} for mode, columns in read_log(folder).items()}
    files = {p.name: read_checkpoint(p) for p in sorted(folder.glob("*.pth"))}
    return {"log": logs, "files": files, "latest": latest(folder).name, "half": [p.name for p in folder.glob(".*")]}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, seconds = start(folder)
    assert code == 0
    return all_of(folder), seconds


def test_the_comparison_can_fail(whole):
    state = whole[0]["files"]["iter_45.pth"]
    assert {"EMA", "MixedPrecision", "Evaluate", "EarlyStop", "Log", "Schedule"} <= state["hooks"].keys()
    assert {n for n in whole[0]["files"] if not n.startswith("best_")} == {"best.pth", "ema.pth", "iter_44.pth", "iter_45.pth"}
    changed = {**state, "state_dict": {k: v.clone() for k, v in state["state_dict"].items()}}
    changed["state_dict"]["body.0.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1                 # one bit
    assert differences(state, changed) == ["/state_dict/body.0.weight"] and differences(state, state) == []
    middle = whole[0]["files"]["iter_44.pth"]
    assert middle["hooks"]["OptimizerStep"]["waiting"] == 2 and middle["loader"]["position"] == 2      # in mid-window, in mid-epoch
    assert middle["hooks"]["MixedPrecision"]["scale"] != 2.**20


def test_killed_at_twenty_random_moments(start, whole, tmp_path):
    rng, (wanted, seconds), at = random.Random(7), whole, []
    for i in range(14):                                                   # once, early to late …
        moment = (i + rng.random()) / 14 * seconds * .95
        for attempt in range(6):                                          # earlier, where the run was over before
            folder = tmp_path / f"{i}_{attempt}"
            code, _ = start(folder, moment * .7**attempt)
            if code: break
        assert code in (-signal.SIGKILL, 0)
        at.append(last(folder) if code else None)
        assert start(folder)[0] == 0
        assert differences(all_of(folder), wanted) == [], f"killed {i}, last checkpoint {at[-1]}"
    folder = tmp_path / "again"
    for i in range(6):                                                    # … and one run six times
        code, _ = start(folder, rng.uniform(.1, .45) * seconds)
        at.append(last(folder) if code else None)
    assert start(folder)[0] == 0
    assert differences(all_of(folder), wanted) == []
    assert sum(a is not None for a in at) >= 15 and len(set(at)) >= 6, at      # they did die, and in different places


def last(folder): # the iteration that a killed run will go on from; its checkpoint is whole
    try: path = latest(folder)
    except RuntimeError: return 0
    assert verify(path)
    return read_checkpoint(path)["meta"]["iter"]
