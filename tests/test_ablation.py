"""Studies: what a reader queues is what is trained, whatever is killed on the way; results are read from the disk."""
import csv, io, json, os, signal, sys, threading, time
from pathlib import Path
import pytest, torch
from notebook_det import explore
from notebook_det.data.toy import make_toy
from notebook_det.engine.checkpoint import latest, read_checkpoint
from notebook_det.engine.logs import read_log
from notebook_det.explore.ablation import (BOX_LOSSES, PRESETS, Panel, Study, fingerprint, held, holder, main, new_study, render, sign, table5, table6, table7, table8, table9, take, train_run, trouble, wait_for, Variant, grid)
from notebook_det.foundations.recipes import Config, build, diff, to_json
from notebook_det.foundations.variants import vary
from notebook_det.losses.regression import GIoULoss
from notebook_det.zoo import recipes as zoo

PAPER = Path(__file__).resolve().parents[2]/"shared/reference/paper_tables"


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp("pictures")/"toy", num_train=8, num_val=2, size=64)


def tiny(): # an Experiment that a core trains in a second
    e = zoo.recipe("retinanet_mobilenet")
    e.model = zoo.retinanet(zoo.mobilenet_v2(width=.25, norm_eval=False, norm_grad=True), out_channels=16)
    return e


def study(folder, toy, **settings):
    return new_study(folder, tiny(), toy.train, toy.images, toy.val, **dict(size=(64, 64), iterations=8, batch=2, seeds=(0,), evaluations=1, pictures=1, device="cpu") | settings)


@pytest.fixture
def ended():
    "Studies whose processes must not outlive a test."
    out = []
    yield out.append
    for s in out: s.stop(now=True)
    assert not any(s.workers() for s in out)


def test_what_is_queued(tmp_path, toy):
    s = study(tmp_path/"s", toy, seeds=(3, 5))
    s.grid({"schedule.lr": [.001, .002], "model.bbox_head.loss_bbox": ["GIoULoss", "L1Loss"]})
    names = ["base", *(f"lr={lr}, loss_bbox={loss}" for lr in (.001, .002) for loss in ("GIoULoss", "L1Loss"))]
    assert [(r.name, r.seed) for r in s.runs()] == [(n, seed) for seed in (3, 5) for n in names]         # all variants with one seed, then with the next
    assert {r.state for r in s.runs()} == {"waiting"} and "10 waiting" in repr(s)
    second = next(r for r in s.runs() if r.name == "lr=0.002, loss_bbox=GIoULoss")
    assert second.changes == [["model.bbox_head.loss_bbox", "L1Loss", "GIoULoss"], ["schedule.lr", "0.001", "0.002"]]
    assert second.recipe().model.bbox_head.num_classes == 3                                              # those of the pictures
    assert s.grid({"schedule.lr": [.001], "model.bbox_head.loss_bbox": ["GIoULoss"]}) == [] and len(s.runs()) == 10        # known already
    with pytest.raises(ValueError, match="another variant named 'base'"): s.add(Variant("base", (("schedule.lr", .5),)))
    with pytest.raises(ValueError, match=r"variant 'x': model.bbox_hed: .*did you mean bbox_head"): s.add(Variant("x", (("model.bbox_hed", 3),)))
    assert len(Study(tmp_path/"s").runs()) == 10 and not list((tmp_path/"s/runs").glob(".*"))
    with pytest.raises(ValueError, match="another variant named 'lr=0.123457'"): s.grid({"schedule.lr": [.1234567, .1234568]})      # one name for two: no seeds of one variant
    assert len(s.runs()) == 10 and len(s.grid({"schedule.lr": [.004, .004]})) == 2                       # the same twice is one run for each seed
    part = tmp_path/"s/runs/.013_x_seed0.part"; part.mkdir(); (part/"run.json").write_text('{"variant": "x", "seed": 0, "note": "", "changes": []}')      # killed while it wrote
    assert len(s.runs()) == 12
    base = json.loads((tmp_path/"s/base.json").read_text()); text = json.dumps(base); assert "GIoULoss" not in text and "L1Loss" in text
    (tmp_path/"s/base.json").write_text(text.replace("L1Loss", "GIoULoss"))
    with pytest.raises(ValueError, match="base.json has changed since 'base' was made"): Study(tmp_path/"s").add(Variant("y", (("schedule.lr", .1),)))


def test_a_variant_that_would_change_nothing_is_refused(tmp_path, toy):
    s = study(tmp_path/"s", toy, lr=.01)
    with pytest.raises(ValueError, match="schedule.lr means nothing here, since lr=0.01"): s.grid({"schedule.lr": [.1, .2]})
    assert s.runs() == [] and len(s.grid({"schedule.momentum": [.8]})) == 2


def test_a_folder_is_one_study(tmp_path, toy):
    s = study(tmp_path/"s", toy)
    assert study(tmp_path/"s", toy).folder == s.folder                       # a notebook may be run again
    with pytest.raises(FileExistsError, match="another study .iterations 8, not 9"): study(tmp_path/"s", toy, iterations=9)
    with pytest.raises(FileNotFoundError, match="no study in"): Study(tmp_path/"nothing")
    for wrong, says in [(dict(iterations=0), "iterations=0"), (dict(seeds=()), "at least one"), (dict(seeds=(1, 1)), "each one once"), (dict(iteration=3), "no setting 'iteration'")]:
        with pytest.raises(ValueError, match=says): study(tmp_path/"t", toy, **wrong)
    with pytest.raises(ValueError, match="starts from an Experiment"): new_study(tmp_path/"t", tiny().model, toy.train, toy.images, toy.val)
    with pytest.raises(ValueError, match="processes=0"): s.start(0)
    with pytest.raises(ValueError, match="no variant 'x', only"): s.python("x")
    assert not (tmp_path/"t").exists()


def test_a_lock_dies_with_its_process(tmp_path):
    f = take(tmp_path/"lock")
    assert f is not None and take(tmp_path/"lock") is None and held(tmp_path/"lock")
    f.close()
    assert not held(tmp_path/"lock") and not held(tmp_path/"never")
    (tmp_path/"lock").write_text("1"); f = take(tmp_path/"lock")                # the last holder's number stands there no more …
    assert held(tmp_path/"lock") and holder(tmp_path/"lock") is None
    sign(f); assert holder(tmp_path/"lock") == os.getpid(); f.close()           # … and this one's once it has signed
    stop, wrong = threading.Event(), []
    def look():
        while not stop.is_set(): wrong.append(held(tmp_path/"lock"))
    lookers = [threading.Thread(target=look) for _ in range(3)]
    for t in lookers: t.start()
    time.sleep(.3); stop.set()
    for t in lookers: t.join()
    assert len(wrong) > 10 and not any(wrong)                                # who looks is not taken for who holds
    pid = os.fork()
    if not pid: take(tmp_path/"lock"); f = take(tmp_path/"lock2"); f.write(str(os.getpid())); f.flush(); time.sleep(60); os._exit(0)
    assert wait_for(lambda: holder(tmp_path/"lock2") == pid, 10)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    assert holder(tmp_path/"lock2") is None and not held(tmp_path/"lock2")


def losses(run): return run.log()["train"]["loss"]
def weights(run): return read_checkpoint(run.folder)["state_dict"]
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_kill_stop_and_resume(tmp_path, toy, ended):
    "A worker is killed, its study stopped and resumed, a run's process is killed: in the end all is as if nothing had happened."
    variants = Variant("slower", (("schedule.lr", .0005),)), Variant("cannot be built", (("model.neck.in_channels", (1, 2, 3, 4)),)), Variant("giou", (("model.bbox_head.loss_bbox", Config(GIoULoss)),))
    s = study(tmp_path/"größer & anders", toy, iterations=48); ended(s)
    s.add(*variants)
    base, slower, broken, giou = s.runs()
    begun = lambda r: any(r.folder.glob("iter_*.pth"))
    (worker,) = s.start(1)
    assert len(s.workers()) == 1 and s.start(1) == []                          # one is there already
    assert wait_for(lambda: begun(base) or worker.poll() is not None, 180) and base.state == "running", s.folder
    os.killpg(worker.pid, signal.SIGKILL); worker.wait(10)                     # the worker and the run's process, at once
    assert wait_for(lambda: base.state != "running", 5) and base.state == "interrupted" and not s.workers() and slower.state == "waiting"
    s.start(1)
    assert wait_for(lambda: begun(slower) or not s.workers(), 180) and slower.state == "running"
    assert base.state == "done"
    s.stop(); assert s.wait(180)
    assert slower.state == "interrupted" and giou.state == "waiting" and "1 done, 1 interrupted, 2 waiting" in repr(Study(s.folder))
    at = read_checkpoint(slower.folder)["meta"]["iter"]
    assert 0 < at < 48
    s.start(2)                                                                  # two side by side
    assert len(s.workers()) == 2
    assert wait_for(lambda: begun(giou) and holder(giou.folder/"lock") or not s.workers(), 180) and giou.state == "running"
    os.kill(holder(giou.folder/"lock"), signal.SIGKILL)                         # as a system without memory does
    assert s.wait(180)
    assert [r.state for r in s.runs()] == ["done", "done", "failed", "failed"]
    assert "signal 9: was there too little memory?" in giou.reason and "neck" in broken.reason + json.dumps(broken.changes) and broken.reason and "\n" not in broken.reason
    assert (slower.log()["train"]["iter"][-1], slower.result["iterations"]) == (48, 48)
    assert {r.name for r in s.retry()} == {"cannot be built", "giou"}
    assert giou.state == "interrupted" and train_run(giou, s) == "done" and train_run(broken, s) == "failed"

    quiet = study(tmp_path/"quiet", toy, iterations=48)
    quiet.add(*variants)
    for run, other in zip(quiet.runs()[:2], (base, slower)):
        assert train_run(run, quiet) == "done"
        assert losses(run) == losses(other) and run.result["metrics"] == other.result["metrics"] and same(weights(run), weights(other))
    assert not same(weights(base), weights(slower))                             # the comparison can fail


def test_results_are_read_from_the_disk(tmp_path, toy):
    s = study(tmp_path/"s", toy, iterations=3, seeds=(0, 1))
    s.add(Variant("long", (("schedule.epochs", 48),), note="twice"), Variant("diverges", (("schedule.lr", 1e30),)))
    for r in s.runs():
        if r.name != "long" or not r.seed: train_run(r, s)
    s = Study(s.folder)
    table = {row["variant"]: row for row in s.table()}
    assert {n: (row["runs"], row["done"], row["failed"]) for n, row in table.items()} == {"base": (2, 2, 0), "long": (2, 1, 0), "diverges": (2, 0, 2)}
    runs = {(r["variant"], r["seed"]): r for r in s.rows()}
    two = [runs["base", k]["bbox/AP"] for k in (0, 1)]
    assert table["base"]["bbox/AP"] == sum(two) / 2 and table["base"]["bbox/AP sd"] == pytest.approx(abs(two[0] - two[1]) / 2**.5) and table["long"]["bbox/AP sd"] is None
    assert "not finite" in table["diverges"]["reason"] or "nan" in table["diverges"]["reason"].lower(), table["diverges"]["reason"]
    assert [r.result["iterations"] for r in s.runs() if r.state == "done"] == [3, 6, 3]              # twice the epochs: twice the iterations
    assert all(runs["base", 0][k] > 0 for k in ("s_per_iteration", "s_per_image", "memory", "parameters"))
    text = s.csv(tmp_path/"t.csv")
    assert (tmp_path/"t.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [r["variant"] for r in rows] == ["base", "long", "diverges"] and float(rows[0]["bbox/AP"]) == table["base"]["bbox/AP"] and rows[1]["bbox/AP sd"] == "" and rows[1]["note"] == "twice"
    assert rows[1]["changes"] == "schedule.epochs: 24 → 48" and len(list(csv.DictReader(io.StringIO(s.csv(runs=True))))) == 6
    done = s.runs()[0]
    saved = read_checkpoint(done.folder)
    assert "optimizer" not in saved and {"recipe", "classes"} <= saved["meta"].keys()                 # half the size; `zoo.load(folder)` needs no more
    look = json.loads(next((done.folder/"looks").glob("*.json")).read_text())
    assert look["iter"] == 3 and Path(look["pictures"][0]["file"]).is_file() and len(look["pictures"]) == 1


def test_a_worker_that_cannot_work_says_why(tmp_path, toy, ended, monkeypatch):
    s = study(tmp_path/"s", toy); ended(s)
    s.add()
    (s.folder/"base.json").write_text("{}")
    s.start(1)
    assert s.wait(180) and "is not a recipe" in trouble(s)


def pretend(run, ap, losses, evaluations): # a run's folder as a training leaves it; ap None: it is still under way
    rows = [{"mode": "train", "iter": i, "epoch": 1, "loss": x, "time": 1.} for i, x in enumerate(losses)] + [{"mode": "val", "iter": i, "epoch": 1, "bbox/AP": x} for i, x in enumerate(evaluations)]
    (run.folder/"log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if ap is not None: (run.folder/"result.json").write_text(json.dumps({"metrics": {"bbox/AP": ap}}))


def test_a_mean_is_of_all_seeds(tmp_path, toy, monkeypatch):
    from notebook_det.explore import ablation
    s = study(tmp_path/"s", toy, seeds=(0, 1, 2))
    s.add(Variant("first", (("schedule.lr", .1),)), base=False); s.add(Variant("last", (("schedule.lr", .2),)))
    for r in s.runs():
        if r.name == "last": pretend(r, (.1, .2, .6)[r.seed], [3.] * 4, [.1])
        elif r.name == "base": pretend(r, .5, [2.] * 4 if r.seed else [8.] * 2, [.5])
    table = {row["variant"]: row for row in s.table()}
    assert table["last"]["bbox/AP"] == pytest.approx(.3) and table["last"]["bbox/AP sd"] == pytest.approx(.07**.5) and table["first"]["bbox/AP"] is None      # ((.2² + .1² + .3²)/2)^½
    drawn = []
    monkeypatch.setattr(ablation, "chart", lambda lines, *a: drawn.extend(lines) or ablation.caption("")); render(s, "curves", smooth=0.)
    strong = {l.name: (l.x, l.y) for l in drawn if not l.faint and not l.points}
    assert strong == {"first": ([], []), "base": ([0, 1], [4., 4.]), "last": ([0, 1, 2, 3], [3.] * 4)}             # where a seed ends the mean does: no jump from 4 to 2
    marks = str(render(s)).partition("stroke-dasharray")[0].rpartition("M")[2].split()[0]
    last = max(float(c.split('"')[0]) for c in str(render(s)).split('<circle cx="')[1:]); first = min(float(c.split('"')[0]) for c in str(render(s)).split('<circle cx="')[1:])
    assert float(marks) == pytest.approx(first + (last - first) * .8, abs=.2)                                      # the thin line marks the base (.5 of .1 … .6), which is not the first row


def test_names_are_no_html(tmp_path, toy):
    s = study(tmp_path/"s", toy)
    s.add(Variant("<b onload=x>&", (("schedule.lr", .1),), note="<i>note</i>"))
    for r in s.runs(): pretend(r, .5, [1.], [.5])
    (s.runs()[0].folder/"error.json").write_text('{"error": "<script>"}')
    for view in ("table", "curves", "pictures", "change"):
        text = str(render(s, view)); assert "<b " not in text and "<i>" not in text and "<script" not in text
    assert "&lt;b onload=x&gt;&amp;" in render(s) and "&lt;i&gt;note" in render(s)


def test_what_goes_wrong_in_the_widget_is_said(tmp_path, toy, monkeypatch):
    s = study(tmp_path/"s", toy)
    panel = Panel(s, every=600.); panel.ticker.stop()
    says = lambda button: (panel.buttons[button].click(), panel.message.value)[1]
    assert "written: table.csv" in says("csv") and (s.folder/"table.csv").exists()               # the first thing that is pressed
    assert "nothing is waiting" in says("start") and not s.workers()
    s.add(); panel.look(); before = panel.picture.value
    run = s.runs()[0]; known = run.folder/"run.json"
    (run.folder/".result.json.part").touch(); now = fingerprint(s); (run.folder/".result.json.part").unlink(); assert fingerprint(s) == now      # half written: not looked at
    text = known.read_text(); known.write_text("{"); panel.look(); assert "there is no run in" in panel.message.value and panel.picture.value == before
    known.write_text(text); (run.folder/"error.json").write_text('{"error": "lost"}'); panel.look(); assert "lost" in panel.picture.value      # it goes on
    monkeypatch.setattr("notebook_det.explore.ablation.about", lambda *a: 1 / 0)
    panel.builder.tree.value = panel.builder.tree.options[-1][1]; assert "division by zero" in panel.message.value
    panel.box.close()


def test_a_stopped_study_says_so_in_the_terminal(tmp_path, toy):
    s = study(tmp_path/"s", toy); s.add(); s.stop()
    with pytest.raises(SystemExit, match="told to stop; remove .*stop"): main([str(s.folder)])


def test_without_locks_or_widgets(tmp_path, toy, monkeypatch):
    s = study(tmp_path/"s", toy)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="needs ipywidgets .pip install"): explore.ablation(s)
    with pytest.raises(ImportError, match="needs ipywidgets"): explore.run(s.folder)
    assert "no run yet" in render(s)                                                            # the still picture stands
    monkeypatch.setitem(sys.modules, "fcntl", None); monkeypatch.delitem(sys.modules, "notebook_det.explore.ablation"); monkeypatch.delattr(explore, "ablation")
    with pytest.raises(ImportError, match="needs file locks .fcntl."): explore.ablation
    assert explore.run.render and explore.errors.render                                         # the others do without


def rebuilt(s, name):
    here = os.getcwd(); os.chdir(s.folder)
    try: scope = {}; exec(s.python(name), scope); return scope["recipe"]
    finally: os.chdir(here)


BASES = {table5: "faster-rcnn_r50_fpn_1x_coco", table6: "mask-rcnn_r50_fpn_1x_coco", table7: "mask-rcnn_r50_fpn_1x_coco", table8: "mask-rcnn_r50_fpn_2x_coco", table9: "rpn_r50_fpn_1x_coco"}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.__name__)
def test_presets(preset, tmp_path, toy):
    "Every variant of the paper's studies is a recipe that builds, and Python that makes it again."
    s = new_study(tmp_path/"s", BASES[preset], toy.train, toy.images, toy.val, seeds=(0,))
    variants = preset(s.base)
    assert len(variants) == dict(table5=21, table6=5, table7=10, table8=7, table9=6)[preset.__name__] and len({v.name for v in variants}) == len(variants)
    s.add(variants)
    recipes = {r.name: r.recipe() for r in s.runs()}
    assert len({to_json(r) for r in recipes.values()}) >= len(variants)          # the base is one of some tables
    for name, recipe in recipes.items():
        assert list(diff(rebuilt(s, name), recipe)) == []
        with torch.device("meta"): build(recipe.model if preset in (table6, table7) else [n for n in (recipe.data, getattr(recipe.model, "roi_head", None), getattr(recipe.model, "rpn_head", None)) if n is not None])


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's tables are not here")
@pytest.mark.parametrize("number", range(5, 10))
def test_notes_are_the_papers_numbers(number):
    rows = list(csv.DictReader(io.StringIO((PAPER/f"table{number}.csv").read_text())))
    preset = globals()[f"table{number}"]
    notes = [v.note for v in preset(zoo.recipe(BASES[preset]))]
    if number == 5: want = [f"paper: AP {float(r[k])}" for r in rows for k in ("lw1", "lw2", "lw5", "lw10") if r[k]]
    elif number == 9: want = [f"paper: AR1000 {float(r['ar1000'])}" for r in rows]
    else: want = [f"paper: box AP {float(r['ap_box'])}, mask AP {float(r['ap_mask'])}" for r in rows]
    assert notes == want
    if number == 5: assert list(BOX_LOSSES) == [r["reg_loss"] for r in rows]


@pytest.mark.parametrize("preset, name, says", [(table5, "retinanet_r50_fpn_1x_coco", "this recipe has no model.roi_head"), (table6, "retinanet_mobilenet", "starts from scratch"),
                                                (table7, "faster-rcnn_r50-caffe_c4-1x_coco", "no model.neck"), (table8, "ssd300_coco", "keep_ratio"), (table9, "fcos_r50-caffe_fpn_gn-head_1x_coco", "has no allowed_border"),
                                                (table5, "cascade-rcnn_r50_fpn_1x_coco", "no model.roi_head.bbox_head")])
def test_presets_say_what_a_recipe_lacks(preset, name, says):
    with pytest.raises(ValueError, match=says): preset(zoo.recipe(name))
