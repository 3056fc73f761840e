"""The engine where a notebook should not go: processes that are killed, disks that are full, files that are torn."""
import ast, math, os, pty, random, signal, subprocess, sys, textwrap, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from notebook_det.engine import checkpoint as ckpt
from notebook_det.engine.checkpoint import Checkpoint, CheckpointError, latest, read_checkpoint, resume, save_checkpoint
from notebook_det.engine.hooks import Hook, HookError, POINTS, Priority
from notebook_det.engine.logs import JsonLines, Log, read_log
from notebook_det.engine.watch import NonFinite, NonFiniteWatch, replay
from notebook_det.engine.optim import adamw, sgd
from notebook_det.engine.schedules import CosineDecay, Schedule, StepDecay, lr_curve
from notebook_det.engine.runner import Runner, seed_everything
from notebook_det.engine.train import Evaluate, standard_hooks

ROOT = Path(__file__).resolve().parents[1]


class Noisy(Dataset):
    "Every item draws from all three generators, as augmentations do."
    def __len__(self): return 22
    def __getitem__(self, i): return torch.full((4,), i / 22) + .1 * torch.randn(4) + random.random() + np.random.rand(), torch.tensor(i / 22)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 1))
    def forward(self, x, y=None):
        out = self.net(x)[:, 0]
        return out if y is None else {"loss_fit": (out - y).square().mean(), "loss_size": .01 * out.abs().mean()}


class Stateful:
    "A sampler that can write down where it is."
    def __init__(self, n): self.n, self.epoch, self.at, self.start, self.told = n, 0, 0, 0, []
    def set_epoch(self, epoch): self.epoch = epoch; self.told.append(epoch)
    def __len__(self): return self.n
    def __iter__(self):
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        start, self.start = self.start, 0
        for self.at in range(start, self.n): yield order[self.at]
    def state_dict(self): return {"at": self.at + 1}
    def load_state_dict(self, state): self.start = state["at"]


def new_run(folder=None, length=None, sampler=None, every=5, optimizer=adamw, extra=(), **k):
    torch.manual_seed(0)
    model, data = Net(), Noisy()
    loader = DataLoader(data, 4, shuffle=sampler is None, sampler=sampler)
    hooks = standard_hooks(Schedule(CosineDecay(), by="iteration", warmup=6), max_norm=1., log_every=4, bar=False, writers=[JsonLines(folder)] if folder else [],
                           save={"iterations": every} if folder else False, evaluate=lambda m: {"noise": torch.rand(1) + random.random() + m.net[0].weight.sum()}, best="noise")
    return Runner(model, loader, optimizer(model, lr=.02), [*hooks, *extra], folder=folder, **(length or {"iterations": 24}), **k)


def same(a, b):
    "Bitwise equality of nested states."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(a, b):
    a, b = (ckpt._plain(r.state_dict()) if isinstance(r, Runner) else r for r in (a, b))
    for k in ("state_dict", "optimizer", "rng"): assert same(a[k], b[k]), k
    for k in ("epoch", "iter", "inner_iter"): assert a["meta"][k] == b["meta"][k], k


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("make_sampler", [lambda: None, lambda: Stateful(22)], ids=["any loader", "stateful sampler"])
def test_resume_after_every_iteration(make_sampler):
    whole = new_run(sampler=make_sampler(), length={"iterations": 14}).run()
    for stop in (1, 2, 5, 6, 7, 11, 12, 13):                      # 6 batches in an epoch: borders and middles
        first = new_run(sampler=make_sampler(), length={"iterations": 14})
        first.on("after_train_iter", lambda r: r.iter + 1 == stop and r.stop(), "LOWEST")
        state = ckpt._plain(first.run().state_dict())
        seed_everything(1234 + stop)
        second = new_run(sampler=make_sampler(), length={"iterations": 14})
        second.load_state_dict(state)
        assert_same_end(second.run(), whole)


def test_resume_uses_the_sampler_and_not_the_data():
    sampler = Stateful(22)
    first = new_run(sampler=sampler, length={"iterations": 9}).run()
    loaded, second = [], new_run(sampler=Stateful(22), length={"iterations": 12})
    get = second.loader.dataset.__class__.__getitem__
    second.loader.dataset.__class__ = type("Counted", (Noisy,), {"__getitem__": lambda self, i: loaded.append(i) or get(self, i)})
    second.load_state_dict(first.state_dict())
    second.run()
    assert len(loaded) == 10                                      # batches 4, 5 and 6 of the second pass; the last has 2 of 22
    assert second.loader.sampler.told == [1]


CHILD = textwrap.dedent("""
    import sys
    sys.path.insert(0, {tests!r})
    from test_engine import *
    run = new_run({folder!r}, length={{"epochs": 4}}, every=2)
    resume(run)
    run.on("after_train_iter", lambda r: print(r.iter, flush=True) or time.sleep(.02), "LOWEST")
    {more}
    run.run()
""")


def child(folder, more=""):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = CHILD.format(tests=str(ROOT / "tests"), folder=str(folder), more=more)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def test_killed_and_resumed_in_new_processes(tmp_path):
    "kill -9 in mid-epoch from outside, then while a checkpoint is half on the disk; a third process ends the same to the last bit."
    whole = new_run(tmp_path / "whole", length={"epochs": 4}, every=2).run()
    folder = tmp_path / "torn"
    p = child(folder)
    for line in p.stdout:
        if int(line) == 9: p.send_signal(signal.SIGKILL); break
    p.communicate()
    assert p.returncode == -signal.SIGKILL
    p = child(folder, "run.on('after_train_iter', lambda r: r.iter == 14 and setattr(ckpt, '_seal', lambda f: f.flush() or os.kill(os.getpid(), 9)))")
    out, err = p.communicate()                                     # dies in the middle of writing
    assert p.returncode == -signal.SIGKILL and int(out.split()[0]) in (8, 10), err
    before = latest(folder)
    assert before.name == "iter_14.pth" and ckpt.verify(before) and list(folder.glob(".*.part"))
    last = new_run(folder, length={"epochs": 4}, every=2)
    assert resume(last) and last.at == (2, 14, 2)
    last.run()
    assert_same_end(read_checkpoint(folder), read_checkpoint(tmp_path / "whole"))
    assert not list(folder.glob(".*.part"))
    a, b = read_log(tmp_path / "whole"), read_log(folder)
    for mode in a:
        for k in a[mode].keys() - {"time", "data_time", "memory", "eta"}: assert a[mode][k] == b[mode][k], (mode, k)
    assert read_checkpoint(folder / "best.pth")["meta"]["iter"] == read_checkpoint(tmp_path / "whole" / "best.pth")["meta"]["iter"]


def test_project_loader_resumes_in_mid_epoch(tmp_path):
    "The data chapter's loader, with worker processes: order and augmentation go on."
    loaders = pytest.importorskip("notebook_det.data.loaders")
    from notebook_det.foundations.structures import Instances

    class Tiny(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 2, 3)
        def forward(self, images, targets): return {"loss": (self.conv(images.tensor.float() / 255).mean() - sum(len(t) for t in targets)).square()}

    def make(workers, n):
        torch.manual_seed(0)
        model = Tiny()
        return Runner(model, loaders.make_loader(Photos(), batch_size=2, workers=workers, seed=3), sgd(model, .01), iterations=n)

    whole = make(0, 9).run()
    for workers in (0, 2):
        state = ckpt._plain(make(workers, 4).run().state_dict())                     # 3 batches in an epoch
        second = make(workers, 9)
        second.load_state_dict(state)
        assert same(ckpt._plain(second.run().state_dict())["state_dict"], ckpt._plain(whole.state_dict())["state_dict"]), workers
        assert second.loader.state_dict()["position"] == 0


class Photos(Dataset):
    sizes = [(32, 40)] * 6
    def __len__(self): return 6
    def __getitem__(self, i):
        from notebook_det.foundations.structures import Instances
        return torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8), Instances(torch.tensor([[1., 1., 9., 9.]] * (i % 3)).reshape(-1, 4), torch.zeros(i % 3, dtype=torch.long), image_id=i)


def test_evaluating_changes_nothing():
    a = new_run(length={"epochs": 2}).run()
    b = new_run(length={"epochs": 2}, extra=[type("Often", (Evaluate,), {})(lambda m: {"x": torch.rand(1)}, iterations=1)]).run()
    assert same(a.state_dict()["state_dict"], b.state_dict()["state_dict"])


# ---------------------------------------------------------------- bad files

def test_truncated_checkpoints(tmp_path):
    run = new_run(tmp_path, every=8).run()
    path = latest(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for n in {0, 1, 21, 22, 70, 71, 72, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(25))}:
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError) as e: resume(new_run(tmp_path))
        assert path.name in str(e.value) and "\n" not in str(e.value)
        assert "older ones beside it: iter_8.pth, iter_16.pth" in str(e.value)
    path.write_bytes(whole)
    again = new_run(tmp_path)
    assert resume(again, tmp_path / "iter_16.pth")
    assert_same_end(again.run(), run)


def test_a_malicious_file_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save({"state_dict": {}, "meta": Evil()}, tmp_path / "epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"epoch_1.pth was not read: it holds posix.system, and reading that could run code"): read_checkpoint(tmp_path / "epoch_1.pth")
    assert not (tmp_path / "owned").exists()


def test_wrong_kinds(tmp_path):
    def says(text, f):
        with pytest.raises(CheckpointError, match=text) as e: f()
        assert "\n" not in str(e.value)
    run = new_run(tmp_path / "a").run()
    says("there is no checkpoint", lambda: resume(new_run(tmp_path / "b"), tmp_path / "nothing.pth"))
    (tmp_path / "photo.pth").write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    says("photo.pth is not a checkpoint: it begins with", lambda: read_checkpoint(tmp_path / "photo.pth"))
    torch.save(run.model.state_dict(), tmp_path / "weights.pth")
    says("weights.pth cannot be resumed, because it has no meta, ", lambda: resume(run, tmp_path / "weights.pth"))
    wider = new_run(tmp_path / "c")
    wider.model.net[4] = nn.Linear(16, 3)
    says(r"is of another model: 2 tensors of another shape \(first: net.4.weight is \[1, 16\] there and \[3, 16\] here\)", lambda: resume(wider, tmp_path / "a"))
    says("does not fit this run", lambda: resume(new_run(tmp_path / "c", optimizer=lambda m, lr: torch.optim.SGD([{"params": [p]} for p in m.parameters()], lr)), tmp_path / "a"))
    stopped = new_run(tmp_path / "d", length={"iterations": 8}).run()
    other = new_run(tmp_path / "e")
    other.loader = DataLoader(Noisy(), 2)
    says("after batch 2 of 6 of an epoch, but this loader has 11 batches", lambda: resume(other, tmp_path / "d"))


def test_only_plain_values(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\['meta'\]\['when'\] is a datetime"):
        import datetime
        save_checkpoint({"meta": {"when": datetime.datetime.now()}, "state_dict": {}}, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []
    run = new_run(tmp_path, meta={"classes": ["a", "b"]}).run()
    raw = torch.load(latest(tmp_path), weights_only=True)                       # plain torch reads it
    assert raw["meta"]["classes"] == ["a", "b"] and raw["state_dict"].keys() == run.model.state_dict().keys()


# ---------------------------------------------------------------- full disk

def no_space(*_): raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("when", ["size limit", "while flushing", "while renaming", "pointer"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, when):
    import resource
    run = new_run(tmp_path, every=5)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(r):
        if r.iter != 6: return
        if when == "size limit": resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limit[1]))
        if when == "while flushing": monkeypatch.setattr(ckpt.os, "fsync", no_space)
        if when == "while renaming": monkeypatch.setattr(ckpt.os, "replace", no_space)
        if when == "pointer":
            real = ckpt.write_atomic
            monkeypatch.setattr(ckpt, "write_atomic", lambda path, write: real(path, no_space if Path(path).name == "latest" else write))
    run.on("after_train_iter", fill)
    try:
        with pytest.raises(HookError, match="hook Checkpoint, after_train_iter, iteration 10 .* could not be written: (No space left on device|File too large). What was there before is untouched") as e: run.run()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    monkeypatch.undo()
    assert "\n" not in str(e.value) and not list(tmp_path.glob(".*"))
    assert latest(tmp_path).name == "iter_5.pth" and ckpt.verify(latest(tmp_path))
    again = new_run(tmp_path)
    assert resume(again) and again.at.iter == 5
    again.run()


# ---------------------------------------------------------------- hooks

def test_every_point_in_order():
    said, run = [], new_run(length={"epochs": 2})
    for p in POINTS: run.on(p, lambda r, p=p: said.append(p))
    run.run()
    one = ["before_train_epoch", *["before_train_iter", "after_train_iter"] * 6, "after_train_epoch", "before_val_epoch", "after_val_epoch"]
    # at NORMAL an own function comes before the evaluation at LOW
    assert said == ["before_run", *one, *one, "after_run"]
    said.clear()
    run.validate(DataLoader(Noisy(), 11))
    assert said == ["before_val_epoch", *["before_val_iter", "after_val_iter"] * 2, "after_val_epoch"]


def test_priorities_and_registration_order():
    said, run = [], Runner(nn.Linear(1, 1), [torch.ones(1, 1)], iterations=1, step=lambda m, b: {"loss": m(b).sum()})
    rng, want = random.Random(1), []
    for i in range(60):
        p = rng.choice([*Priority, *range(0, 101, 7)])
        want.append((int(p), i))
        run.on("before_run", lambda r, i=i: said.append(i), p)
    run.run()
    assert said == [i for _, i in sorted(want)]
    assert [int(p) for p in Priority] == [0, 10, 30, 40, 50, 60, 70, 90, 100]


@pytest.mark.parametrize("point", POINTS)
def test_a_failing_hook_says_where(point, tmp_path):
    class Bad(Hook): pass
    setattr(Bad, point, lambda self, runner: {}["missing"])
    run = new_run(tmp_path, length={"epochs": 1}, every=2, extra=[Bad()])
    if point.endswith("val_iter"): run.on("after_train_epoch", lambda r: r.validate(DataLoader(Noisy(), 11)))
    with pytest.raises(HookError, match=f"^hook Bad, {point}") as e: run.run()
    assert isinstance(e.value.__cause__, KeyError) and "KeyError: 'missing'" in str(e.value)
    if point == "before_train_iter": assert "iteration 1 (epoch 1)" in str(e.value)
    if point == "after_train_epoch": assert "after iteration 6 (epoch 1)" in str(e.value)
    assert point in POINTS[:3] or point == "after_train_iter" or read_checkpoint(tmp_path)          # the last good state is there


def test_two_hooks_of_one_name():
    with pytest.raises(ValueError, match="already a hook named Schedule; give one of them another `name`"): new_run(extra=[Schedule()])


def test_non_finite_names_loss_and_iteration(tmp_path):
    run = new_run(tmp_path, every=5)
    step = run.step
    def breaks(model, batch):
        losses = step(model, batch)
        return {**losses, "loss_size": losses["loss_size"] * (math.nan if run.iter == 6 else 1)}
    run.step = breaks
    with pytest.raises(HookError, match=r"in iteration 7 \(epoch 2\) the loss was no longer finite: loss_size is nan") as e: run.run()
    assert latest(tmp_path).name == "iter_5.pth"
    assert all(v.isfinite().all() for v in read_checkpoint(tmp_path)["state_dict"].values())


def test_compiled_models_keep_their_names():
    model = torch.compile(Net())
    run = Runner(model, [torch.ones(1)], iterations=1)
    assert "net.0.weight" in run.state_dict()["state_dict"]
    run.load_state_dict(run.state_dict())


# ---------------------------------------------------------------- schedules, arrows, bars

def test_golden_rates():
    rates = lr_curve(Schedule(StepDecay((8, 11)), warmup=500), .02, 12 * 600, 600)
    assert [rates[i] for i in (0, 250, 499, 500)] == pytest.approx([2e-5, .01001, .01996, .02], rel=2e-4)
    assert [rates[i * 600] for i in (7, 8, 10, 11)] == pytest.approx([.02, .002, .002, .0002])


def test_engine_imports_foundations_only():
    for f in (ROOT / "notebook_det" / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(f.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("notebook_det")):
                assert node.level == 1 or (node.module or "").removeprefix("notebook_det.").split(".")[0] in ("foundations", "engine"), (f.name, node.module)


def test_bar_in_a_real_terminal(monkeypatch):
    from notebook_det.foundations.progress import progress
    monkeypatch.delenv("NDET_QUIET", raising=False)
    ours, theirs = pty.openpty()
    shown = b""
    def read():
        nonlocal shown
        try:
            while piece := os.read(ours, 4096): shown += piece
        except OSError: pass
    reader = threading.Thread(target=read, daemon=True); reader.start()
    with os.fdopen(theirs, "w") as tty:
        monkeypatch.setattr(sys, "stderr", tty)
        for _ in progress(range(9), label="sheep"): time.sleep(.1)
        monkeypatch.undo()
    reader.join(2); os.close(ours)
    text = shown.decode()
    assert "sheep" in text and "/9" in text and " left" in text and text.endswith("\r\x1b[K")
    assert "1/9" not in text                                                      # silent for the first half second


def test_no_bar_in_a_pipe(capfd):
    from notebook_det.foundations.progress import progress
    for _ in progress(range(7), label="sheep"): time.sleep(.1)
    out = capfd.readouterr()
    assert out.out == out.err == ""
