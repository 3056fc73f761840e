"Data and evaluation: bad input, exact resume, workers, memory, and agreement with pycocotools."
import contextlib, io, json, os, pickle, resource, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from notebook_det.data.coco import CocoDetection
from notebook_det.data.loaders import Batches, make_loader
from notebook_det.data.toy import make_toy
from notebook_det.data.transforms import Compose, RandomFlip, RandomResize, Resize, V2
from notebook_det.evaluation.coco import CocoEvaluator, diagnosis, evaluate
from notebook_det.evaluation.recall import ProposalRecall, greedy_ious
from notebook_det.foundations.structures import Images, Instances, check_target

REAL = Path(__file__).resolve().parents[2]/"shared"/"data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real data are not here")


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp("data")/"toy", 24, 12, size=128)


def raw(toy): return json.loads(toy.train.read_text())


# ---- bad input: one sentence that names file and record ----

def edit(path, value):
    def change(d):
        *way, last = path
        for k in way: d = d[k]
        if value is KeyError: del d[last]
        else: d[last] = value
    return change


BAD = [ # what is done to the json, what the sentence must say
    (edit(["annotations", 3, "image_id"], 999), "annotation 4 points to an unknown image, 999"),
    (edit(["annotations", 3, "category_id"], 77), "annotation 4 points to an unknown category, 77"),
    (edit(["annotations", 3, "image_id"], [1]), "annotation 4 points to an unknown image, [1]"),
    (edit(["annotations", 3, "bbox"], [1, 2, float("nan"), 4]), "annotation 4 (image "),
    (edit(["annotations", 3, "bbox"], [1, 2, float("inf"), 4]), "not four finite numbers"),
    (edit(["annotations", 3, "bbox"], [1, 2, 3]), "not four finite numbers"),
    (edit(["annotations", 3, "bbox"], "box"), "not four finite numbers"),
    (edit(["annotations", 3, "bbox"], None), "not four finite numbers"),
    (edit(["annotations", 3, "bbox"], KeyError), "annotation 4 has no 'bbox'"),
    (edit(["annotations", 3, "image_id"], KeyError), "annotation 4 has no 'image_id'"),
    (edit(["annotations", 3, "id"], 1), "more than one annotation has the id 1"),
    (edit(["images", 3, "id"], 0), "more than one image has the id 0"),
    (edit(["images", 3, "id"], 1.5), "one image has 1.5"),
    (edit(["images", 3, "file_name"], KeyError), "image 3 has no 'file_name'"),
    (edit(["categories", 1, "id"], 10), "more than one category has the id 10"),
    (edit(["categories", 1, "name"], "circle"), "two categories are called 'circle'"),
    (edit(["categories"], KeyError), "no list of 'categories'"),
    (edit(["annotations"], {}), "no list of 'annotations'"),
]


@pytest.mark.parametrize("change,say", BAD, ids=[s for _, s in BAD])
def test_bad_annotations(toy, tmp_path, change, say):
    d = raw(toy); change(d)
    file = tmp_path/"bad.json"; file.write_text(json.dumps(d))
    with pytest.raises(ValueError) as e: CocoDetection(file, toy.images)
    assert say in str(e.value) and "bad.json" in str(e.value) and "\n" not in str(e.value)


MASKS = [(edit(["annotations", 0, "segmentation"], KeyError), "annotation 1 (image 0) has no segmentation"),
         (edit(["annotations", 0, "segmentation"], {"size": [5, 5], "counts": "0"}), "a mask of size [5, 5] in an image of size")]


@pytest.mark.parametrize("change,say", MASKS, ids=[s for _, s in MASKS])
def test_bad_masks(toy, change, say):
    d = raw(toy); change(d)
    with pytest.raises(ValueError, match=say.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")): CocoDetection(d, toy.images, masks=True)
    CocoDetection(d, toy.images)        # without masks nobody is disturbed


def test_missing_and_broken_files(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.json does not exist"): CocoDetection(tmp_path/"gone.json", toy.images)
    with pytest.raises(FileNotFoundError, match="gone does not exist"): CocoDetection(toy.train, tmp_path/"gone")
    cut = tmp_path/"cut.json"; cut.write_text(json.dumps(raw(toy), indent=1)[:5000])
    with pytest.raises(ValueError, match=r"cut.json is not valid json: .* in line \d+"): CocoDetection(cut, toy.images)
    (tmp_path/"x.json").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="x.json is not text"): CocoDetection(tmp_path/"x.json", toy.images)
    with pytest.raises(ValueError, match="has no class 'dragon'; it has circle"): CocoDetection(toy.train, toy.images, classes=["circle", "dragon"])
    with pytest.raises(ValueError, match="named twice"): CocoDetection(toy.train, toy.images, classes=["circle", "circle"])


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_is_one_sentence(toy, tmp_path, damage, workers):
    d = raw(toy); good = toy.images/d["images"][9]["file_name"]
    folder = tmp_path/"images"; folder.mkdir()
    for r in d["images"]: os.link(toy.images/r["file_name"], folder/r["file_name"])
    bad = folder/good.name; bad.unlink()
    if damage == "empty": bad.write_bytes(b"")
    if damage == "half": bad.write_bytes(good.read_bytes()[:good.stat().st_size//2])
    if damage == "text": bad.write_text("not a picture")
    with pytest.raises(OSError) as e: list(make_loader(CocoDetection(d, folder), 4, workers=workers))
    assert good.name in str(e.value) and "image 9 of" in str(e.value) and "Traceback" not in str(e.value) and "\n" not in str(e.value)


def test_unusual_boxes_are_counted(toy):
    d = raw(toy); a = d["annotations"]
    h, w = d["images"][0]["height"], d["images"][0]["width"]
    for k, b in enumerate([[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, -3, 9], [5, 5, .5, 9], [w+1, 5, 9, 9], [-20, 5, 9, 9]]): a.append({"id": 1000+k, "image_id": 0, "category_id": 10, "bbox": b})
    a += [{"id": 2000, "image_id": 0, "category_id": 10, "bbox": [5, 5, 9, 9], "ignore": 1}, {"id": 2001, "image_id": 0, "category_id": 10, "bbox": [-5, -5, 9, 9]}]
    ds, before = CocoDetection(d, toy.images), CocoDetection(toy.train, toy.images)
    assert {k: v for k, v in ds.report.items() if v} == {"marked ignore": 1, "no area": 3, "thinner than a pixel": 1, "outside the image": 2}
    assert len(ds.target(0)) == len(before.target(0)) + 1     # the last one sticks out and stays
    check_target(ds.target(0), (h, w), 3)


def test_size_that_does_not_fit(toy):
    d = raw(toy); d["images"][2]["width"] += 1
    with pytest.raises(OSError, match="its boxes would not fit"): CocoDetection(d, toy.images)[2]


def test_sizes_from_files(toy):
    d = raw(toy)
    for r in d["images"]: del r["height"], r["width"]
    assert (CocoDetection(d, toy.images).sizes == CocoDetection(toy.train, toy.images).sizes).all()


# ---- reader against pycocotools ----

@needs_real
@pytest.mark.parametrize("ann,images", [("fruits_nuts/trainval.json", "fruits_nuts/images"), ("dsb2018_mini/annotations/instances_val.json", "dsb2018_mini/images"),
                                        ("coco_permissive/annotations/instances_val.json", "coco_permissive/val")])
def test_same_as_pycocotools(ann, images):
    with contextlib.redirect_stdout(io.StringIO()): coco = COCO(str(REAL/ann))
    ds = CocoDetection(REAL/ann, REAL/images, masks=True)
    assert ds.image_ids == [r["id"] for r in coco.dataset["images"]]
    for i in range(0, len(ds), 5):
        image, t = ds[i]
        anns = coco.loadAnns(t.ids.tolist())
        assert image.dtype == torch.uint8 and image.shape[1:] == t.size == t.masks.shape[1:]
        assert [ds.category_ids[k] for k in t.labels] == [a["category_id"] for a in anns] and t.ignore.tolist() == [bool(a["iscrowd"]) for a in anns]
        assert torch.equal(t.boxes, torch.tensor([[a["bbox"][0], a["bbox"][1], a["bbox"][0]+a["bbox"][2], a["bbox"][1]+a["bbox"][3]] for a in anns], dtype=torch.float64).reshape(-1, 4).float())
        for m, a in zip(t.masks, anns): assert (m.numpy() == coco.annToMask(a).astype(bool)).all()


# ---- order, augmentation, resume ----

def equal(a, b):
    for (x, u), (y, v) in zip(a, b, strict=True):
        assert torch.equal(x.tensor, y.tensor) and x.sizes == y.sizes and [t.image_id for t in u] == [t.image_id for t in v]
        for s, t in zip(u, v): assert all(torch.equal(s[k], t[k]) for k in s.keys())


def augmented(toy):
    from torchvision.transforms import v2
    return CocoDetection(toy.train, toy.images, masks=True, transforms=Compose(RandomResize([(96, 64), (128, 96)], "range"), RandomFlip(), V2(v2.RandomPhotometricDistort()), V2(v2.RandomIoUCrop())))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resume_in_mid_epoch(toy, workers, stop):
    ds = augmented(toy)
    plain = make_loader(ds, 3, seed=5)
    whole = [list(plain), list(plain)]
    first = make_loader(ds, 3, seed=5, workers=workers); first.set_epoch(1)
    it = iter(first)
    for _ in range(stop): next(it)
    state = json.loads(json.dumps(first.state_dict()))        # primitives only
    assert state["position"] == stop                          # what was used, not what was fetched ahead
    again = make_loader(ds, 3, seed=5, workers=workers); again.load_state_dict(state); again.set_epoch(1); again.batch_sampler.set_epoch(1)
    equal(list(again), whole[1][stop:])
    assert again.state_dict()["epoch"] == 2


def test_spawned_workers_give_the_same(toy):
    from notebook_det.data.loaders import Collate, Loader
    ds = augmented(toy)
    spawned = Loader(ds, Batches(len(ds), 3, seed=5), num_workers=1, collate_fn=Collate(), multiprocessing_context="spawn")
    equal(list(spawned), list(Loader(ds, Batches(len(ds), 3, seed=5), collate_fn=Collate())))


def test_the_models_random_numbers_are_left_alone(toy):
    ds = augmented(toy); loader = make_loader(ds, 4)
    torch.manual_seed(0); np.random.seed(0); before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in range(2): list(loader)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_epochs_differ_and_cover_everything(toy):
    loader = make_loader(CocoDetection(toy.train, toy.images), 4)
    orders = [[t.image_id for _, ts in loader for t in ts] for _ in range(3)]
    assert all(set(o) == set(range(24)) for o in orders) and len({tuple(o) for o in orders}) == 3
    assert all(len({w > h for h, w in images.sizes}) == 1 for images, _ in loader)


def test_dropped_objects_are_counted_across_workers(toy):
    from torchvision.transforms import v2
    counts = []
    for workers in (0, 2):
        crop = V2(v2.RandomIoUCrop())
        n = sum(len(t) for _, ts in make_loader(CocoDetection(toy.train, toy.images, transforms=crop), 4, workers=workers) for t in ts)
        counts.append((n, int(crop.dropped)))
    assert counts[0] == counts[1] and counts[0][1] > 0


def test_annotations_are_held_compactly(tmp_path):
    "20,000 pictures with 140,000 boxes: read in seconds, a few MB, and what a worker gets is no more than that."
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(20_000)]
    boxes = rng.uniform(1, 200, (140_000, 4)).round(2).tolist()
    anns = [{"id": k, "image_id": k // 7, "category_id": k % 80, "bbox": b, "area": b[2]*b[3], "iscrowd": 0} for k, b in enumerate(boxes)]
    d = {"images": images, "annotations": anns, "categories": [{"id": i, "name": f"c{i}"} for i in range(80)]}
    file = tmp_path/"big.json"; file.write_text(json.dumps(d))
    start = time.process_time(); ds = CocoDetection(file, tmp_path); seconds = time.process_time() - start
    assert seconds < 20 and len(pickle.dumps(ds)) < 14e6
    assert torch.equal(ds.target(19_999).ids, torch.arange(139_993, 140_000))


# ---- evaluation ----

def noisy(t, rng, classes):
    t = t[~t.ignore]; t = t[torch.from_numpy(rng.random(len(t)) > .15)]
    side = (t.boxes[:, 2:] - t.boxes[:, :2]).repeat(1, 2)
    twice = torch.from_numpy(rng.integers(0, max(len(t), 1), len(t)//2))
    boxes = torch.cat([t.boxes + side*torch.from_numpy(rng.normal(0, .06, (len(t), 4))).float(), t.boxes[twice]])
    labels = torch.cat([t.labels, torch.from_numpy(rng.integers(0, classes, len(twice)))])
    masks = {} if t.masks is None else dict(masks=torch.cat([t.masks.roll(1, -1), t.masks[twice]]))
    return Instances(boxes, labels, torch.from_numpy(rng.random(len(boxes)).round(2)).float(), **masks)      # rounded: with ties


def official(gt, rows, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        ev = COCOeval(gt, gt.loadRes([{k: v for k, v in r.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for r in rows]), kind)
        ev.evaluate(); ev.accumulate(); ev.summarize()
    return ev.stats


@needs_real
@pytest.mark.parametrize("ann,images,kinds", [("bccd/annotations_coco/instances_test.json", "bccd/JPEGImages", ("bbox",)), ("dsb2018_mini/annotations/instances_val.json", "dsb2018_mini/images", ("bbox", "segm")),
                                              ("coco_permissive/annotations/instances_val.json", "coco_permissive/val", ("bbox", "segm"))])
def test_same_numbers_as_pycocotools(ann, images, kinds):
    ds, rng = CocoDetection(REAL/ann, REAL/images, masks="segm" in kinds), np.random.default_rng(0)
    ev = CocoEvaluator(ds, kinds)
    for i in rng.permutation(len(ds)): ev.update([ds.image_ids[i]], [noisy(ds.target(i), rng, len(ds.classes))])
    with contextlib.redirect_stdout(io.StringIO()): gt = COCO(str(REAL/ann))
    for kind in kinds:
        mine = np.array([v for k, v in ev.compute().items() if k.startswith(kind)])
        theirs = official(gt, ev.results(), kind)
        np.testing.assert_allclose(np.nan_to_num(mine, nan=-1), theirs, atol=1e-12, rtol=0)


@needs_real
def test_perfect_detections_of_many_cells():
    ds = CocoDetection(REAL/"dsb2018_mini/annotations/instances_val.json", REAL/"dsb2018_mini/images", masks=True)
    out = {}
    for n in (100, 400):
        ev = CocoEvaluator(ds, ("bbox", "segm"), max_detections=n)
        for i in range(len(ds)): t = ds.target(i); ev.update([t.image_id], [dict(boxes=t.boxes, labels=t.labels, scores=torch.ones(len(t)), masks=t.masks[:, None].float())])
        out[n] = ev.compute()
    assert out[400]["bbox/AP"] == pytest.approx(1, abs=1e-12) and out[400]["segm/AP"] == pytest.approx(1, abs=1e-12) and out[100]["bbox/AR100"] < 1


def test_annotation_zero_can_be_found():
    gt = COCO(); gt.dataset = {"images": [{"id": 0, "height": 9, "width": 9}], "categories": [{"id": 0, "name": "x"}], "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}]}
    gt.createIndex()
    found = Instances(torch.tensor([[1., 1, 6, 6]]), torch.tensor([0]), torch.tensor([.9]))
    ev = CocoEvaluator(gt); ev.update([0], [found]); assert ev.compute()["bbox/AP"] == pytest.approx(1)
    assert official(gt, ev.results(), "bbox")[0] == 0           # the trap in pycocotools


def test_json_round_trip(toy, tmp_path):
    ds, rng = CocoDetection(toy.val, toy.images, masks=True), np.random.default_rng(1)
    ev = CocoEvaluator(ds, ("bbox", "segm"))
    ev.update(ds.image_ids, [noisy(ds.target(i), rng, 3) for i in range(len(ds))])
    ev.save(tmp_path/"results.json")
    rows = json.loads((tmp_path/"results.json").read_text())
    assert {r["category_id"] for r in rows} <= {10, 20, 40} and not list(tmp_path.glob("*.part"))
    for kind in ("bbox", "segm"): np.testing.assert_allclose(np.nan_to_num([v for k, v in ev.compute().items() if k.startswith(kind)], nan=-1), official(ds.coco(), rows, kind), atol=1e-12, rtol=0)


def test_no_detections_and_half_of_the_images(toy):
    ds = CocoDetection(toy.val, toy.images)
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    ev = CocoEvaluator(ds); ev.update(ds.image_ids[:6], [none]*6)
    assert ev.compute()["bbox/AP"] == 0 and len(diagnosis(ev)) == 2 and "Nothing was detected in 6 images" in ev.table() and "<table>" in ev._repr_html_()
    assert CocoEvaluator(ds).compute()["bbox/AP50"] == 0        # not even updated


def test_evaluate_torchvision_model(toy):
    "A detector with background as label 0 and another convention, through `call` and `category_ids`."
    ds = CocoDetection(toy.val, toy.images)
    class Tv(torch.nn.Module):
        def forward(self, images):
            assert isinstance(images, list) and images[0].dtype == torch.float32 and not self.training
            return [dict(boxes=t.boxes, labels=t.labels + 1, scores=torch.ones(len(t))) for t in self.truth(images)]
        def truth(self, images):
            out = [ds.target(k)[~ds.target(k).ignore] for k in range(self.at, self.at + len(images))]; self.at += len(images); return out
    m = Tv().train(); m.at = 0
    call = lambda model, images: model([x[:, :h, :w].float()/255 for x, (h, w) in zip(images.tensor, images.sizes)])
    ev = CocoEvaluator(ds, category_ids=[None, *ds.category_ids])
    assert evaluate(m, make_loader(ds, 5, train=False), ev, call=call)["bbox/AP"] == pytest.approx(1) and m.training


def test_recall_is_the_greedy_rule():
    rng = np.random.default_rng(0)
    for _ in range(50):
        iou = torch.from_numpy(rng.random((rng.integers(0, 6), rng.integers(0, 12))))
        left, out = iou.clone(), torch.zeros(len(iou), dtype=iou.dtype)
        for _ in range(min(iou.shape)):                          # spelled out pair by pair
            best = max(((left[g, n].item(), -g, -n) for g in range(iou.shape[0]) for n in range(iou.shape[1])))
            g, n = -best[1], -best[2]; out[g] = best[0]; left[g] = -1; left[:, n] = -1
        assert torch.equal(greedy_ious(iou), out)


def test_recall_of_the_truth_is_one(toy):
    ds = CocoDetection(toy.val, toy.images); r = ProposalRecall(ds)
    r.update(ds.image_ids, [dict(boxes=ds.target(i).boxes, scores=torch.ones(len(ds.target(i)))) for i in range(len(ds))])
    assert r.compute()["AR100"] == pytest.approx(1)


# ---- rules of the house ----

def test_neither_models_nor_engine():
    code = ("import sys, notebook_det.data.coco, notebook_det.data.toy, notebook_det.data.loaders, notebook_det.data.transforms, notebook_det.evaluation.recall;"
            "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('notebook_det.')};"
            "print(sorted(rooms - {'foundations', 'ops', 'data', 'evaluation', '_C', '_modidx'}))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
