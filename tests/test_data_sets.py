"Readers, sets of sets, augmentation, proposals, memory and the doctor: what no notebook should carry."
import json, os, pickle, resource, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from notebook_det.data.augment import MinIoUCrop, PhotoMetricDistortion, ssd_transform
from notebook_det.data.coco import CocoDetection
from notebook_det.data.doctor import examine
from notebook_det.data.folder import TableDetection
from notebook_det.data.loaders import Batches, draw, make_loader
from notebook_det.data.proposals import Proposals, read_proposals, save_proposals
from notebook_det.data.semantic import SemanticMaps
from notebook_det.data.sets import Concat, Pick, repeat, repeat_factors
from notebook_det.data.toy import make_toy
from notebook_det.data.transforms import Compose, RandomFlip, RandomResize, Resize
from notebook_det.data.voc import COORDINATES, VocDetection
from notebook_det.evaluation.coco import CocoEvaluator, evaluate
from notebook_det.foundations.structures import Instances
from notebook_det.ops.boxes import box_iou
from notebook_det.ops.images import fit_size

REAL = Path(__file__).resolve().parents[2]/"shared"/"data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real data are not here")


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp("data")/"toy", 24, 12, size=128)


def same_batches(a, b):
    for (x, u), (y, v) in zip(a, b, strict=True):
        assert torch.equal(x.tensor, y.tensor) and x.sizes == y.sizes
        for s, t in zip(u, v): assert torch.equal(s.boxes, t.boxes) and torch.equal(s.labels, t.labels)


# ---- VOC's XML and COCO's json are the same data set ----

def cells(split, **kw):
    xml = VocDetection(REAL/"bccd", split, ["RBC", "WBC", "Platelets"], COORDINATES, **kw)
    js = CocoDetection(REAL/f"bccd/annotations_coco/instances_{split}.json", REAL/"bccd/JPEGImages", **kw)
    return xml, js


@needs_real
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_xml_is_json(split):
    a, b = cells(split)
    assert a.classes == b.classes and (a.sizes == b.sizes).all() and [a.file(i).name for i in range(len(a))] == [b.file(i).name for i in range(len(b))]
    for i in range(len(a)):
        s, t = a.target(i), b.target(i)
        assert torch.equal(s.boxes, t.boxes) and torch.equal(s.labels, t.labels) and torch.equal(s.ignore, t.ignore)


@needs_real
def test_faster_rcnn_through_xml_and_json():
    "The same pictures, losses and weights after training, and the same AP, bit for bit."
    from notebook_det.engine.optim import sgd
    from notebook_det.foundations.recipes import build
    from notebook_det.zoo.recipes import recipe
    out = []
    for ds, test in zip(cells("train", transforms=Compose(Resize((160, 120)), RandomFlip())), cells("test", transforms=Resize((160, 120)))):
        torch.manual_seed(0)
        e = recipe("faster_rcnn_mobilenet", 3); model = build(e.model); model.test_scale = (160, 120)
        opt, losses = sgd(model, .005), []
        for (images, targets), _ in zip(make_loader(ds, 2, seed=3), range(3)):
            loss = sum(model(images, targets).values()); opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
        few = Pick(test, range(6)); model.roi_head.rule.score_threshold = 0.
        out.append((losses, evaluate(model.eval(), make_loader(few, 2, train=False), CocoEvaluator(few)), torch.cat([p.flatten() for p in model.parameters()])))
    (l1, m1, p1), (l2, m2, p2) = out
    assert l1 == l2 and torch.equal(p1, p2) and np.array_equal(list(m1.values()), list(m2.values()), equal_nan=True)


@needs_real
def test_same_average_precision_through_xml_and_json():
    "Detections that are neither perfect nor useless."
    a, b = cells("test"); rng, found = np.random.default_rng(0), {}
    for i in range(len(a)):
        t = a.target(i); t = t[torch.from_numpy(rng.random(len(t)) > .2)]
        found[i] = Instances(t.boxes + torch.from_numpy(rng.normal(0, 6, (len(t), 4))).float(), t.labels, torch.from_numpy(rng.random(len(t))).float())
    numbers = []
    for ds in (a, b):
        ev = CocoEvaluator(ds)
        for i, f in found.items(): ev.update([ds.image_ids[i]], [f])
        numbers.append(ev.compute())
    assert numbers[0].keys() == numbers[1].keys() and .1 < numbers[0]["bbox/AP"] < .9
    np.testing.assert_array_equal(list(numbers[0].values()), list(numbers[1].values()))


# ---- memory ----

def private(pid): # bytes that belong to a process alone
    rows = dict(r.split(":") for r in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(rows[k].split()[0]) for k in ("Private_Clean", "Private_Dirty")) * 1024


class Blank(CocoDetection): # everything but the pictures
    def image(self, i): return torch.zeros(3, 32, 32, dtype=torch.uint8)


def annotations(n): # as in a COCO file: n pictures with seven boxes each
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(n)]
    boxes = np.random.default_rng(0).uniform(1, 200, (7 * n, 4)).round(2).tolist()
    anns = [{"id": k, "image_id": k // 7, "category_id": k % 80, "bbox": b, "area": b[2]*b[3], "iscrowd": 0} for k, b in enumerate(boxes)]
    return {"images": images, "annotations": anns, "categories": [{"id": i, "name": f"c{i}"} for i in range(80)]}


def two_epochs(folder, n): # → MB by which the loading process and this one grow in the second
    ds = Blank(annotations(n), folder)
    ds.annotations = None
    loader, seen = make_loader(ds, 200, workers=1), []
    for _ in range(2):
        assert sum(len(t) for _, t in loader) == n
        seen.append((private(loader._iterator._workers[0].pid), private(os.getpid())))
    print(json.dumps(dict(grown=[(b - a)/2**20 for a, b in zip(*seen)], pickled=len(pickle.dumps(ds)))))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_workers_do_not_copy_annotations(tmp_path):
    "20,000 pictures, 140,000 boxes, two epochs: no process grows, neither the main one nor the one that loads. In a process of its own: what else pytest holds would count, too."
    run = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import test_data_sets as t; t.two_epochs(sys.argv[2], 20_000)", str(Path(__file__).parent), str(tmp_path)],
                         capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert max(said["grown"]) < 6, f"grown by {said['grown']} MB in an epoch"
    assert said["pickled"] < 14e6


# ---- order, repetition, sharing ----

def test_augmentation_does_not_depend_on_the_process(toy):
    for f in (ssd_transform(96), Compose(RandomResize([(96, 64), (128, 96)], "range"), RandomFlip(), PhotoMetricDistortion(), MinIoUCrop())):
        ds = CocoDetection(toy.train, toy.images, transforms=f)
        whole = list(make_loader(ds, 4, seed=2, repeats=np.linspace(1, 2, 24)))
        same_batches(whole, list(make_loader(ds, 4, seed=2, workers=2, repeats=np.linspace(1, 2, 24))))
        first = make_loader(ds, 4, seed=2, repeats=np.linspace(1, 2, 24))
        for k, _ in enumerate(first, 1):
            if k == 3: state = first.state_dict(); break
        rest = make_loader(ds, 4, seed=2, repeats=np.linspace(1, 2, 24)); rest.load_state_dict(state)
        same_batches(list(rest), whole[3:])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_repeats_are_shared_like_everything_else(world):
    groups, repeats = np.arange(50) % 2, np.linspace(1, 3, 50)
    parts = [Batches(50, 4, True, groups, 7, r, world, repeats) for r in range(world)]
    assert len({len(p) for p in parts}) == 1 and all(len(list(p)) == len(p) for p in parts)
    draws = [d for p in parts for b in p for d in b]
    assert len(set(draws)) == len(draws)                                # no picture with the same seed twice
    counts = np.bincount([i for i, _ in draws], minlength=50)
    scale = np.array([len([i for i, _ in draws if i % 2 == g])/repeats[groups == g].sum() for g in (0, 1)])[groups]
    assert (counts >= 1).all() and (np.abs(counts - repeats*scale) < 1 + 1e-9).all()


def test_draws_never_miss_or_exceed():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, b = int(rng.integers(1, 40)), int(rng.integers(1, 9))
        r = 1 + rng.exponential(1, n)*(rng.random(n) < .5)
        got = np.bincount(draw(np.arange(n), r, b, rng), minlength=n); total = int(np.ceil(r.sum()/b - 1e-9))*b
        assert got.sum() == total and (np.abs(got - r*total/r.sum()) < 1 + 1e-9).all() and (got >= 1).all()


def test_range_and_value_follow_the_paper():
    "Section 5.3: 'value' draws one of the scales, 'range' the short edge between two, the long edge being their common one."
    torch.manual_seed(0)
    value, spread = RandomResize([(1333, 640), (1333, 800)], "value"), RandomResize([(1333, 640), (1333, 800)], "range")
    assert {value.new_size(480, 640) for _ in range(50)} == {fit_size(480, 640, (1333, 640)), fit_size(480, 640, (1333, 800))}
    short = {min(spread.new_size(480, 640)) for _ in range(4000)}
    assert short == set(range(640, 801))
    both = RandomResize([(1600, 400), (1400, 1400)], "range"); sides = [both.new_size(1000, 1000)[0] for _ in range(3000)]    # a square follows the short edge
    assert min(sides) == 400 and max(sides) == 1400


def test_crop_keeps_its_promise():
    torch.manual_seed(0); rng = np.random.default_rng(1)
    for least in (.1, .3, .5):
        f, met = MinIoUCrop((least,)), 0
        for _ in range(60):
            h, w = (int(v) for v in rng.integers(40, 200, 2))
            a = torch.from_numpy(rng.uniform(.1, .9, (2 if least < .3 else 1, 2, 2)).astype(np.float32)).sort(1).values*torch.tensor([w, h]); boxes = a.reshape(-1, 4)
            boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 2)
            for _ in range(80):
                patch, keep = f.try_patch(h, w, boxes, least)
                if patch is None: continue
                met += 1; l, t, r, b = patch; c = (boxes[:, :2] + boxes[:, 2:])/2
                assert 0 <= l < r <= w and 0 <= t < b <= h and (box_iou(boxes, torch.tensor([patch]).float()) >= least).all()
                assert keep.tolist() == [l < x < r and t < y < b for x, y in c.tolist()] and keep.any()
        assert met > 5


# ---- what comes with a picture ----

def test_proposals_and_maps_through_workers(toy, tmp_path):
    from PIL import Image
    plain = CocoDetection(toy.train, toy.images)
    for i in range(len(plain)): Image.fromarray(np.full(plain.target(i).size, i, np.uint8)).save(tmp_path/f"{plain.file(i).stem}.png")
    found = {k: (torch.rand(9, 2).repeat(1, 2).sort(1).values*60 + torch.tensor([0, 0, 9, 9]), torch.rand(9)) for k in plain.image_ids}
    file = save_proposals(Proposals.of(found), tmp_path/"p.npz")
    ds = CocoDetection(toy.train, toy.images, extras=[SemanticMaps(tmp_path), read_proposals(file, 5)], transforms=Compose(Resize((64, 48)), RandomFlip()))
    for images, targets in make_loader(ds, 4, workers=2):
        assert len(images.proposals) == 4
        for p, t, (h, w) in zip(images.proposals, targets, images.sizes):
            assert len(p) <= 5 and t.semantic.shape == (h, w) and t.semantic.unique().tolist() == [t.image_id]
            assert (p.boxes >= 0).all() and (p.boxes <= torch.tensor([w, h, w, h])).all()
    moved = images.to("meta"); assert moved.proposals[0].boxes.is_meta and moved.sizes == images.sizes


def test_a_model_hands_proposals_on(toy):
    "Normalisation keeps what belongs to the question."
    from notebook_det.detectors.base import Normalize
    p = Proposals.of({k: (torch.ones(1, 4), torch.ones(1)) for k in range(24)})
    images, _ = next(iter(make_loader(CocoDetection(toy.train, toy.images, extras=[lambda f, t: t.copy(proposals=Instances(torch.tensor([[1., 1, 9, 9]]), scores=torch.ones(1)))]), 2)))
    assert len(Normalize()(images).proposals) == 2 and Normalize()(images).original_sizes == images.original_sizes


# ---- bad input: one sentence ----

def sentence(e, *words):
    text = str(e.value); assert "\n" not in text and all(w in text for w in words), text


def test_nothing_to_learn(toy):
    d = json.loads(toy.train.read_text())
    for change, why in ((lambda a: {**a, "bbox": [1, 1, 0, 5], "area": 0}, "no area"), (lambda a: {**a, "ignore": 1}, "marked ignore")):
        ds = CocoDetection({**d, "annotations": [change(a) for a in d["annotations"]]}, toy.images)
        with pytest.raises(ValueError) as e: make_loader(ds)
        sentence(e, "no object to learn from", why, "circle, square, triangle")
        with pytest.raises(ValueError) as e: make_loader(repeat(ds, 2))
        sentence(e, "no object to learn from")
        assert len(list(make_loader(ds, 8, train=False))) == 3          # but there is something to predict on
    with pytest.raises(ValueError) as e: make_loader(CocoDetection(toy.train, toy.images, keep_empty=False, min_size=10_000))
    sentence(e, "has no image", toy.train.name)


def test_classes_that_do_not_match(toy):
    a = CocoDetection(toy.train, toy.images)
    for other in (["square", "circle", "triangle"], ["circle", "square"]):
        with pytest.raises(ValueError) as e: Concat(a, CocoDetection(toy.val, toy.images, classes=other))
        sentence(e, "the classes do not match", toy.train.name, toy.val.name, "classes=[…]")
    with pytest.raises(ValueError) as e: VocDetection(toy.images.parent, "train", classes=["Circle", "square"])
    sentence(e, "names the class 'Circle'", "they name circle, square, triangle")


class Dying(CocoDetection):
    def image(self, i):
        if i == 11: os._exit(3) if self.how == "exit" else os.kill(os.getpid(), 9)
        return super().image(i)


@pytest.mark.parametrize("how,says", [("exit", "ended with status 3"), ("kill", "was killed (SIGKILL)")])
def test_a_process_that_dies_is_named_with_its_picture(toy, how, says):
    ds = Dying(toy.train, toy.images); ds.how = how
    with pytest.raises(RuntimeError) as e: list(make_loader(ds, 4, workers=2))
    sentence(e, "loader process", says, "000011.jpg")


def test_an_error_of_ones_own_names_the_picture(toy):
    def strange(image, t): return image, t.copy(boxes=t.boxes[5]) if t.image_id == 13 else t
    for workers in (0, 1):
        with pytest.raises((IndexError, ValueError)) as e: list(make_loader(CocoDetection(toy.train, toy.images, transforms=strange), 4, workers=workers))
        assert "000013.jpg" in str(e.value) + "".join(getattr(e.value, "__notes__", []))


@pytest.mark.parametrize("text,say", [("image,x1,y1,x2,y2,class\na.jpg,1,2,x,4,cat", "line 2"), ("image,x1,y1,x2,y2\na.jpg,1,2,3,4", "no column 'class'"), ("\n\n", "is empty")])
def test_bad_tables(tmp_path, text, say):
    (tmp_path/"t.csv").write_text(text)
    with pytest.raises(ValueError) as e: TableDetection(tmp_path/"t.csv", tmp_path)
    sentence(e, "t.csv", say)


def test_a_proposal_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"pwned"),)
    np.savez(tmp_path/"p.npz", keys=np.array([1]), ends=np.array([0]), boxes=np.array([Evil()], dtype=object), scores=np.zeros(0))
    with pytest.raises(ValueError) as e: read_proposals(tmp_path/"p.npz")
    sentence(e, "p.npz cannot be read"); assert not (tmp_path/"pwned").exists()


# ---- the doctor ----

@pytest.mark.parametrize("box", [[float("nan"), 1, 5, 5], [1, 1, float("inf"), 5], [1, 1, 5], "box", None, [9, 9, 0, 5], [9, 9, -4, 5], [900, 9, 5, 5]], ids=str)
def test_what_the_reader_refuses_the_doctor_cures(toy, box):
    d = json.loads(toy.train.read_text()); n = len(d["annotations"])
    d["annotations"].append({"id": 99999, "image_id": 3, "category_id": 10, "bbox": box, "iscrowd": 0})
    report = examine((d, toy.images), pictures=False)
    data, dropped = report.clean()
    assert sum(dropped.values()) == 1 and len(data["annotations"]) == n and str(report)
    assert sum(CocoDetection(data, toy.images).report.values()) == 0


@needs_real
def test_the_doctor_finds_the_known_twins():
    report = examine({s: cells(s)[1] for s in ("train", "val")})
    assert [f.note for f in report.of("in two parts")] and {"BloodImage_00038.jpg", "BloodImage_00037.jpg"} <= set(report.of("in two parts")[0].note.split())
    assert len(report.of("in two parts")) == 1 and not {k for k in report.counts if k in ("missing", "unreadable", "other size")}
