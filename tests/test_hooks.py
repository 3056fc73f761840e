"""Hooks together: what a run leaves when something goes wrong, and that extras change nothing they should not."""
import math, subprocess, sys, textwrap
from pathlib import Path
import pytest, torch
from torch import nn
from notebook_det.engine.amp import MixedPrecision
from notebook_det.engine.average import EMA
from notebook_det.engine.checkpoint import CheckpointError, latest, read_checkpoint, resume
from notebook_det.engine.hooks import Hook, HookError, POINTS
from notebook_det.engine.logs import LivePlot, Log, TensorBoard
from notebook_det.engine.optim import scale_lr, sgd
from notebook_det.engine.runner import OptimizerStep, Runner
from notebook_det.engine.schedules import Schedule, StepDecay
from notebook_det.engine.train import EarlyStop, Evaluate, Validate, standard_hooks
from notebook_det.engine.watch import NonFinite, NonFiniteWatch, Profile, image_ids, replay
from notebook_det.foundations.structures import Images, Instances

ROOT = Path(__file__).resolve().parents[1]


class Tiny(nn.Module):
    "Takes what a detector takes: Images and Instances."
    def __init__(self): super().__init__(); self.conv, self.drop, self.fc = nn.Conv2d(3, 4, 3), nn.Dropout(.1), nn.Linear(4, 1)
    def forward(self, images, targets):
        out = self.fc(self.drop(self.conv(images.tensor).mean((2, 3))))[:, 0]
        area = torch.stack([(t.boxes[:, 2:] - t.boxes[:, :2]).prod(1).sum() for t in targets])
        return {"loss_size": (out - area).square().mean(), "loss_log": area.log().mean() * out.mean()}


def batches(n=6, bad=None):
    g = torch.Generator().manual_seed(0)
    def one(i, j): return Instances(torch.tensor([[0., 0., 1., 1. if (i, j) != (bad, 1) else 0.]]), torch.zeros(1, dtype=torch.long), image_id=100 * i + j)
    return [(Images(torch.rand(2, 3, 8, 8, generator=g), [(8, 8)] * 2), [one(i, j) for j in (0, 1)]) for i in range(n)]


def new(folder=None, *hooks, bad=None, n=12, lr=.05, **k):
    torch.manual_seed(0)
    model = Tiny()
    return Runner(model, batches(bad=bad), sgd(model, lr), [*standard_hooks(writers=[], bar=False, save={"iterations": 2} if folder else False, **k), *hooks], iterations=n, folder=folder)


def weights(r): return torch.cat([p.detach().flatten() for p in r.model.parameters()])


def test_a_box_without_area_is_named_and_replayed_elsewhere(tmp_path):
    run = new(tmp_path, bad=4)
    with pytest.raises(NonFinite, match=r"^in iteration 5 \(epoch 1\) the loss was no longer finite: loss_log is -?inf; it arises in the computation of loss_log itself, after all modules; images 400, 401; the batch is in ") as e: run.run()
    assert "\n" not in str(e.value) and weights(run).isfinite().all() and latest(tmp_path).name == "iter_4.pth"
    file = tmp_path / "nonfinite_iter_5.pth"
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})
        from test_hooks import *
        run = new()
        found = replay({str(file)!r}, run)
        print(found.bad, image_ids(run.batch), {{k: float(v) for k, v in read_checkpoint({str(file)!r})['losses'].items()}} == found.losses)""")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.split("\n")[0] == "['loss_log'] [400, 401] True", out.stderr
    again = new(tmp_path)                                                # with repaired data the run goes on
    assert resume(again) and again.at.iter == 4
    assert weights(again.run()).equal(weights(new().run()))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_watch_in_half_precision(tmp_path, amp):
    run = new(tmp_path, bad=4, amp=amp)
    with pytest.raises(NonFinite, match="in iteration 5 .* loss_log is"): run.run()
    assert weights(run).isfinite().all() and latest(tmp_path).name == "iter_4.pth"


def test_the_watch_sees_any_batch_of_a_window(tmp_path):
    run = new(tmp_path, bad=4, accumulate=3)
    with pytest.raises(NonFinite, match="in iteration 5 .* images 400, 401"): run.run()
    assert image_ids(replay(tmp_path / "nonfinite_iter_5.pth", new()) and read_checkpoint(tmp_path / "nonfinite_iter_5.pth")["batch"][1]) == [400, 401]


def test_lookers_on_change_no_bit(tmp_path):
    plain = Runner(Tiny(), [], iterations=0)
    torch.manual_seed(0)
    model = Tiny()
    plain = Runner(model, batches(), sgd(model, .05), iterations=12).run()
    more = new(tmp_path, Profile(2, 2), Validate(batches(2), iterations=1, best="loss", keep=2), EarlyStop("loss", 99, lower=True), ema=.9, tensorboard=True, live=True,
               evaluate=lambda m: {"x": float(torch.rand(1))}, best="x", keep_best=2).run()
    assert weights(more).equal(weights(plain))


def test_every_point_takes_any_callable_in_one_line():
    said, run = [], new()
    for p in POINTS: run.on(p, lambda r, p=p: said.append(p), priority=17)
    run.run(); run.validate(batches(1))
    assert set(said) == set(POINTS)
    assert all(any(e.priority == 17 for e in run.timeline.entries[p]) for p in POINTS)


def test_show_prints_all_hooks(capsys):
    run = new(None, EMA(.9), MixedPrecision(), evaluate=lambda m: {})
    run.show()
    text = capsys.readouterr().out
    for name in run.timeline.hooks: assert name in text
    assert text.index("MixedPrecision 0") < text.index("NonFiniteWatch 10") < text.index("OptimizerStep 40") < text.index("EMA 43")


@pytest.mark.parametrize("point", ["after_train_iter", "before_val_epoch"])
def test_a_failing_hook_leaves_the_last_good_state(tmp_path, point):
    class Bad(Hook): pass
    def fail(self, runner):
        if runner.iter == 6: raise ZeroDivisionError("by me")
    setattr(Bad, point, fail)
    run = new(tmp_path, Bad(), ema=.5, evaluate=lambda m: {"a": 1.}, evaluate_every={"iterations": 1})
    with pytest.raises(HookError, match=rf"^hook Bad, {point}.*(iteration 7|after iteration 6) .*ZeroDivisionError: by me") as e: run.run()
    assert "\n" not in str(e.value) and latest(tmp_path).name == "iter_6.pth"
    again = new(tmp_path, ema=.5)
    assert resume(again)
    assert weights(again.run()).equal(weights(new(ema=.5).run()))


def test_checkpoints_of_other_recipes(tmp_path):
    new(tmp_path, n=4).run()
    other = new(tmp_path)
    other.optimizer = sgd(other.model, .05, modules={"fc": .1})
    with pytest.raises(CheckpointError, match=r"iter_4.pth does not fit this run: the optimiser's groups differ: .* there is .* here"): resume(other)
    class Wide(Tiny):
        def __init__(self): super().__init__(); self.fc2 = nn.Linear(1, 1)
    wide = Runner(Wide(), batches(), iterations=4, folder=tmp_path)
    with pytest.raises(CheckpointError, match="is of another model: 2 tensors missing"): resume(wide)


def test_a_scaled_rate_is_in_the_log():
    said, run = [], None
    model = Tiny()
    optimizer = sgd(model, .02)
    scale_lr(optimizer, batch=4)
    Runner(model, batches(), optimizer, [Log([lambda r, _: said.append(r)]), Schedule(StepDecay((1,)))], iterations=8).run()
    assert said[0]["rate"] == "learning rate 0.005 = 0.02 × 4 / 16 images a step" and said[-1]["lr"] == pytest.approx(.0005)


def test_live_curves_are_redrawn_in_place(monkeypatch):
    import IPython.display, notebook_det.engine.logs as logs
    shown = []
    class Handle:
        def update(self, fig): shown.append("again")
    monkeypatch.setattr(logs, "where_to_draw", lambda: "notebook")
    monkeypatch.setattr(IPython.display, "display", lambda fig, display_id: shown.append("first") or Handle())
    run = new(None)
    run.add(type("Curves", (Log,), {})([LivePlot(seconds=0)], every=2)).run()
    assert shown == ["first"] + ["again"] * 5


def test_event_files_need_their_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(HookError, match="hook Log, before_run: .*this log needs the package tensorboard: pip install tensorboard"): new(tmp_path, tensorboard=True).run()
