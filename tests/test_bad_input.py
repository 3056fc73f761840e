"""What a stranger's files and arguments can get wrong, end to end through the command line: one sentence that names the file or
the argument, an exit status that is not 0, nothing half-written."""
import json, os, resource, subprocess, sys
from pathlib import Path
import pytest, torch
from notebook_det.data.toy import make_toy
from notebook_det.zoo import cli

FAST = ("retinanet_mobilenet", "--size", 64, "--iterations", 1, "--batch", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a toy data set and a finished run, in which the tests work."
    here, was = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(here); os.environ["NDET_QUIET"] = "1"
    toy = make_toy(here/"toy", num_train=5, num_val=3, size=64, seed=1)
    cli.call(cli.train, *FAST, "--train", toy.train, "--val", toy.val, "--images", toy.images, "--out", "done")
    yield toy
    os.chdir(was)


def said(command, *argv, names=(), writes=None):
    "The one sentence a command ends with; it names what is wrong, and what it would have written is not there."
    before = {p for p in Path().rglob("*")}
    with pytest.raises(SystemExit) as e: cli.call(command, *argv)
    text = e.value.code
    assert isinstance(text, str) and len(text.splitlines()) == 1 and text.startswith(f"ndet-{command.__name__}: "), text
    for n in names: assert str(n) in text, text
    assert "Traceback" not in text and not list(Path().rglob("*.part")) and not list(Path().rglob(".*.part"))
    if writes is None: assert {p for p in Path().rglob("*")} == before, "something was left behind"
    return text


def edited(toy, name, **changes): # the toy set's training annotations, changed: {list: function of its records}
    data = json.loads(toy.train.read_text())
    for key, change in changes.items(): change(data[key])
    Path(name).write_text(json.dumps(data))
    return name


def train(home, ann=None, *more, names=(), writes=None):
    return said(cli.train, *FAST, "--train", ann or home.train, "--images", home.images, "--out", "new", *more, names=names, writes=writes)


# ---- annotations

@pytest.mark.parametrize("content,what", [('{"images": [', "is not valid json"), ("\x00\x01", "is not valid json"), ('{"images": []}', "no list of 'annotations'"), ("[1, 2]", "no list of 'images'"), ("", "is not valid json")])
def test_broken_json(home, content, what):
    Path("broken.json").write_text(content)
    for text in (train(home, "broken.json", names=["broken.json", what]), said(cli.test, "done", "--ann", "broken.json", "--images", home.images, names=["broken.json", what])): assert "--debug" not in text


def test_binary_instead_of_json(home):
    Path("photo.json").write_bytes(b"\xff\xd8\xff\xe0" * 9)
    train(home, "photo.json", names=["photo.json", "is not text"])


def test_missing_files(home):
    train(home, "nothing.json", names=["nothing.json", "does not exist"])
    said(cli.train, *FAST, "--train", home.train, "--images", "nowhere", names=["nowhere", "does not exist"])
    said(cli.train, "nothing.json", "--train", home.train, "--images", home.images, names=["nothing.json", "does not exist"])
    said(cli.test, "done", "--ann", home.val, "--images", "nowhere", names=["nowhere"])
    said(cli.predict, "done", "nothing.jpg", names=["nothing.jpg", "does not exist"])


@pytest.mark.parametrize("key", ["image", "category"])
def test_an_annotation_that_points_nowhere(home, key):
    name = edited(home, "nowhere.json", annotations=lambda a: a[2].update({f"{key}_id": 4711, "id": 99}))
    train(home, name, names=[name, "annotation 99", f"unknown {key}", "4711"])


@pytest.mark.parametrize("box", [[1, 2, float("nan"), 4], [1, 2, 3], "a box", None])
def test_a_box_that_is_none(home, box):
    name = edited(home, "boxes.json", annotations=lambda a: a[0].update(bbox=box, id=98))
    train(home, name, names=[name, "annotation 98", "four finite numbers"])


def test_boxes_without_area_are_left_out_and_counted(home, capsys):
    def flat(a):
        for r in a[:-1]: r.update(bbox=[*r["bbox"][:2], 0, 7])
    name = edited(home, "flat.json", annotations=flat)
    cli.call(cli.train, *FAST, "--train", name, "--images", home.images, "--out", "flat")
    n = len(json.loads(Path(name).read_text())["annotations"]) - 1
    assert f"left out of {name}: {n} annotations (no area)" in capsys.readouterr().out
    all_flat = edited(home, "all_flat.json", annotations=lambda a: [r.update(bbox=[5, 5, -3, 0]) for r in a])
    train(home, all_flat, names=[all_flat, "no picture with an object to learn from"])


# ---- pictures

def test_a_missing_picture_is_found_before_the_training(home):
    name = edited(home, "gone.json", images=lambda i: i[1].update(file_name="holiday.jpg"))
    train(home, name, names=["holiday.jpg", "does not exist"])


def test_an_unreadable_picture_stops_the_training_and_is_named(home):
    (home.images/"cut.jpg").write_bytes((home.images/"000000.jpg").read_bytes()[:300])
    name = edited(home, "cut.json", images=lambda i: [r.update(file_name="cut.jpg") for r in i])
    text = said(cli.train, *FAST, "--train", name, "--images", home.images, "--out", "cut_run", names=["cut.jpg"], writes=True)
    assert "image" in text and not list(Path("cut_run").glob("*.pth"))
    val = edited(home, "cut_val.json", images=lambda i: [r.update(file_name="cut.jpg") for r in i])
    said(cli.test, "done", "--ann", val, "--images", home.images, names=["cut.jpg"])


def test_a_picture_of_another_size_than_the_json_says(home):
    name = edited(home, "size.json", images=lambda i: [r.update(width=r["width"] + 7) for r in i])
    said(cli.test, "done", "--ann", name, "--images", home.images, names=[".jpg", "but the json says"])


def test_prediction_goes_on_after_an_unreadable_picture(home):
    Path("photos").mkdir(exist_ok=True)
    for k in (0, 1): (Path("photos")/f"{k}.jpg").write_bytes((home.images/f"00000{k}.jpg").read_bytes())
    (Path("photos")/"bad.png").write_text("no picture at all")
    said(cli.predict, "done", "photos", "--out", "seen", names=["1 of 3 pictures", "bad.png"], writes=True)
    assert sorted(p.name for p in Path("seen").iterdir()) == ["0001_0.jpg", "0002_1.jpg", "detections.json"]
    assert len(json.loads(Path("seen/detections.json").read_text())["images"]) == 2


# ---- classes

def test_class_counts_that_do_not_match(home):
    train(home, None, "--set", "model.bbox_head.num_classes=7", names=["3 class names", "7 classes"])
    said(cli.train, "mask_rcnn_mobilenet", "--train", home.train, "--images", home.images, "--out", "new", "--set", "model.roi_head.mask_head.num_classes=7", names=["the box head knows 3 classes, the mask head 7"])
    other = edited(home, "other.json", categories=lambda c: [r.update(name=f"thing {r['id']}") for r in c])
    said(cli.test, "done", "--ann", other, "--images", home.images, names=[other, "has no class 'circle'", "thing 10"])


# ---- checkpoints

def test_what_is_not_a_checkpoint(home):
    Path("notes.pth").write_text("the rate was too high"); Path("empty.pth").write_bytes(b""); Path("cut.pth").write_bytes(next(Path("done").glob("iter_*.pth")).read_bytes()[:9999])
    for name, what in (("notes.pth", "is not a checkpoint"), ("empty.pth", "is empty"), ("cut.pth", "is truncated"), ("gone.pth", "there is no checkpoint")):
        train(home, None, "--init", name, names=[name, what])
        said(cli.test, name, "--ann", home.val, "--images", home.images, names=[name, what])
        said(cli.predict, name, home.images, names=[name, what])


def test_a_checkpoint_of_something_else(home):
    torch.save({f"layer{i}.weight": torch.ones(3) for i in range(9)}, "other.pth")
    train(home, None, "--init", "other.pth", names=["other.pth", "is of another architecture than this SingleStage"])
    said(cli.predict, "other.pth", home.images, names=["other.pth", "does not say what detector it belongs to"])
    said(cli.predict, "other.pth", home.images, "--recipe", "retinanet_mobilenet", names=["other.pth", "another architecture"])
    said(cli.predict, next(Path("done").glob("iter_*.pth")), home.images, "--recipe", "faster_rcnn_mobilenet", names=["does not fit this TwoStage"])
    said(cli.train, "faster_rcnn_mobilenet", "--train", home.train, "--images", home.images, "--out", "done", "--resume", "--iterations", 2, "--size", 64, names=["done", "is of another model"], writes=True)


def test_code_in_a_checkpoint_is_not_run(home):
    class Bomb:
        def __reduce__(self): return eval, ("open('mark', 'w')",)
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Bomb()}, "bomb.pth")
    said(cli.predict, "bomb.pth", home.images, names=["bomb.pth", "could run code"])
    assert not Path("mark").exists()


# ---- places

def test_a_full_disk_leaves_the_old_checkpoint(home):
    cli.call(cli.train, *FAST, "--train", home.train, "--images", home.images, "--out", "full")
    old = Path("full/iter_1.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))     # no file may grow beyond that: as a disk that is full
    try:
        said(cli.train, "retinanet_mobilenet", "--size", 64, "--iterations", 2, "--batch", 2, "--train", home.train, "--images", home.images,
             "--out", "full", "--resume", names=["full/iter_2.pth", "could not be written", "What was there before is untouched"], writes=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("full/iter_1.pth").read_bytes() == old and not Path("full/iter_2.pth").exists()
    cli.call(cli.predict, "full", home.images/"000000.jpg", "--out", "after")          # and it works


def test_folders_that_cannot_be_written(home):
    Path("file").write_text("")
    said(cli.train, *FAST, "--train", home.train, "--images", home.images, "--out", "file", names=["file"])
    said(cli.predict, "done", home.images/"000000.jpg", "--out", "file", names=["file"])
    said(cli.train, *FAST, "--train", home.train, "--images", home.images, "--out", "done", names=["done", "already holds a run"])


# ---- arguments

@pytest.mark.parametrize("more,what", [(("--size", "large"), "--size large"), (("--epochs", 3), "not both"), (("--lr", -1), "--lr"), (("--batch", 0), "--batch"), (("--device", "toaster"), "--device toaster"),
                                       (("--set", "model.nek.act=1"), "did you mean neck"), (("--set", "schedule"), "path.to.argument=value"), (("--val", "no.json"), "no.json"), (("--workers", -1), "--workers")])
def test_arguments(home, more, what): train(home, None, *more, names=[what])


def test_the_console_script_itself(home):
    "Through the installed program: status 1, one line on stderr, no traceback; and help that says what it is for."
    run = lambda *a: subprocess.run([sys.executable, "-c", "import sys; from notebook_det.zoo.cli import predict\nif __name__ == '__main__': sys.argv[0] = 'ndet-predict'; predict()", *map(str, a)], capture_output=True, text=True)
    program = Path(sys.executable).with_name("ndet-predict")
    if program.exists(): run = lambda *a: subprocess.run([str(program), *map(str, a)], capture_output=True, text=True)
    out = run("gone.pth", "a.jpg")
    assert (out.returncode, out.stderr.strip()) == (1, "ndet-predict: there is no checkpoint gone.pth"), out
    out = run("--help")
    assert out.returncode == 0 and "folders of pictures" in out.stdout
