"Explorers without a browser: the error browser names the fault of a broken detector; clicks are part of the state."
import json
import numpy as np, pytest, torch
from notebook_det import explore
from notebook_det.data.coco import CocoDetection
from notebook_det.data.toy import make_toy
from notebook_det.evaluation.coco import diagnosis as strange
from notebook_det.explore import shell
from notebook_det.explore.errors import ErrorScene, boxes_of, diagnosis, items, render
from notebook_det.data.transforms import Compose, RandomFlip, Resize
from notebook_det.foundations.recipes import build
from notebook_det.foundations.structures import Instances
from notebook_det.zoo import recipes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    toy = make_toy(tmp_path_factory.mktemp("toy"), num_train=1, num_val=25, size=128)
    return CocoDetection(toy.val, toy.images)


def found(data, how, seed=0):
    "Detections made from the truth, a little inexact, then changed by `how`: Instances → Instances."
    rng, out = np.random.default_rng(seed), []
    for i in range(len(data)):
        t = data.target(i); t = t[~t.ignore]
        jitter = torch.from_numpy(rng.normal(0, .03, (len(t), 4))).float()*(t.boxes[:, 2:] - t.boxes[:, :2]).repeat(1, 2)
        out.append(how(Instances(t.boxes + jitter, t.labels, torch.from_numpy(rng.uniform(.5, 1, len(t))).float())))
    return out


def scaled(b, k): c, s = (b[:, :2] + b[:, 2:])/2, (b[:, 2:] - b[:, :2])/2*k; return torch.cat([c - s, c + s], 1)


def twice(f): return Instances(torch.cat([f.boxes, f.boxes + 1]), f.labels.repeat(2), torch.cat([f.scores, f.scores*.99 + .01]))


FAULTS = {   # how it is broken → (what dominates, what is said)
    "shifted": (lambda f: f.copy(boxes=f.boxes - torch.tensor([0, 8., 0, 8.])), "by wrong places", r"Boxes lie (7\.\d|8(\.\d)?) pixels too far up, at the median: with all of them put right, AP rises from \d+ to 100"),
    "shifted by a share": (lambda f: f.copy(boxes=f.boxes + .4*(f.boxes[:, 2:] - f.boxes[:, :2]).repeat(1, 2)*torch.tensor([1., 0, 1, 0])), "by wrong places", r"Boxes lie (0\.4|0\.39|0\.41) of their size too far right"),
    "too large": (lambda f: f.copy(boxes=scaled(f.boxes, 1.6)), "by wrong places", r"Boxes are 1\.(59|6|60|61) times as wide and 1\.(59|6|60|61) times as high"),
    "swapped": (lambda f: f.copy(labels=torch.tensor([0, 2, 1])[f.labels]), "by wrong classes", r"Classes are exchanged: square is called triangle \((\d+) of \1 times\), triangle is called square"),
    "never predicted": (lambda f: f[f.labels != 1], "no box came near", r"square is never predicted: its \d+ objects"),
    "one name for two": (lambda f: f.copy(labels=torch.where(f.labels == 2, 1, f.labels)), "by wrong classes", r"triangle is called square \((\d+) of \1 times\)"),
    "twice": (twice, "second boxes", r"second boxes on \d+ objects")}


@pytest.mark.parametrize("name", FAULTS)
def test_the_error_browser_names_the_fault(data, name):
    import re
    how, kind, words = FAULTS[name]
    scene = ErrorScene(found(data, how), data)
    said = diagnosis(scene)
    assert kind in said[0] and re.search(words, " ".join(said)), said
    theories = [s for s in said[1:] if s not in strange(scene.evaluator)]      # those are what every evaluation remarks
    assert re.search(words, theories[0]) and (len(theories) == 1 or name == "one name for two"), said           # nothing else is suspected


def test_a_good_detector_is_not_accused(data): assert diagnosis(ErrorScene(found(data, lambda f: f), data)) == ["AP at IoU 0.5 is 100.", "No kind of mistakes costs more than a point."]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_boxes_without_extent(data):
    said = diagnosis(ErrorScene(found(data, lambda f: f.copy(boxes=f.boxes[:, [0, 1, 0, 1]])), data))
    assert "no extent" in said[-1] and not [s for s in said if s.startswith("Boxes")]


def test_random_boxes_are_not_explained_away(data):
    rng = np.random.default_rng(0)
    def noise(f):
        xy = torch.from_numpy(rng.uniform(0, 100, (8, 2))).float()
        return Instances(torch.cat([xy, xy + torch.from_numpy(rng.uniform(5, 40, (8, 2))).float()], 1), torch.from_numpy(rng.integers(0, 3, 8)), torch.from_numpy(rng.random(8)).float())
    assert not [s for s in diagnosis(ErrorScene(found(data, noise), data)) if s.startswith(("Boxes lie", "Boxes are", "Classes are exchanged")) or "never" in s]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "The same pictures with 120 classes, which have odd names; one picture is without objects."
    toy = make_toy(tmp_path_factory.mktemp("many"), num_train=1, num_val=60, size=128)
    j = json.loads(toy.val.read_text())
    j["categories"] = [{"id": i + 1, "name": f"<b>{i}</b> &"} for i in range(120)]
    empty = j["images"][0]["id"]
    j["annotations"] = [{**a, "category_id": n % 120 + 1} for n, a in enumerate(a for a in j["annotations"] if a["image_id"] != empty)]
    toy.val.write_text(json.dumps(j))
    return CocoDetection(toy.val, toy.images)


def test_many_classes(many):
    there = {int(k) for i in range(len(many)) for k in many.target(i).labels[~many.target(i).ignore]}
    silent = len([k for k in there if k < 60]); assert silent > 40
    half = ErrorScene(found(many, lambda f: f[f.labels >= 60]), many)
    never = [s for s in diagnosis(half) if "never predicted" in s]
    assert len(never) == 1 and f"and {silent - 5} more are never predicted" in never[0] and f"cannot exceed {100*(1 - silent/len(there)):.0f}." in never[0]      # each alone costs about one point
    box = explore.errors(half); box.set(kind="missed", score=.3, picked=0)
    for kind in ("missed", "class", "background"): box.set(kind=kind); assert "<pre" not in box.picture.value
    assert "<b>" not in box.picture.value and "&lt;b&gt;" in box.picture.value
    nothing = explore.errors([f[:0] for f in found(many, lambda f: f)], many)
    assert "Nothing was detected" in nothing.picture.value and "<pre" not in nothing.picture.value


def test_one_class(data):
    j = json.loads(open(data.annotations).read())
    j["categories"] = [{"id": 1, "name": "thing"}]
    for a in j["annotations"]: a["category_id"] = 1
    file = data.folder/"one.json"; file.write_text(json.dumps(j))
    one = CocoDetection(file, data.folder)
    assert diagnosis(ErrorScene(found(one, lambda f: f), one))[1:] == ["No kind of mistakes costs more than a point."]
    box = explore.errors(found(one, FAULTS["shifted"][0]), one)
    assert "pixels too far up" in box.picture.value and "<pre" not in box.picture.value


def test_no_theory_without_a_fault(data):
    "What follows from how many there are of a class is no fault of the detector."
    often = lambda f: Instances(torch.cat([f.boxes, torch.tensor([[0., 0, 6, 6]] * 3)]), torch.cat([f.labels, torch.full((3,), int(torch.bincount(f.labels, minlength=3).argmax()) if len(f) else 0)]), torch.cat([f.scores, torch.full((3,), .99)]))
    one = lambda f: often(f.copy(labels=torch.zeros_like(f.labels)))
    j = json.loads(open(data.annotations).read())
    for a in j["annotations"]: a["category_id"] = j["categories"][0]["id"]
    file = data.folder/"mostly.json"; file.write_text(json.dumps(j))
    mostly = CocoDetection(file, data.folder)
    assert "by boxes on nothing" in diagnosis(ErrorScene(found(mostly, one), mostly))[0]
    assert not [s for s in diagnosis(ErrorScene(found(mostly, one), mostly)) if "on nothing are called" in s]
    assert [s for s in diagnosis(ErrorScene(found(data, lambda f: often(f).copy(labels=torch.cat([f.labels, torch.zeros(3, dtype=torch.int64)]))), data)) if "boxes on nothing are called circle" in s]      # where the class is one of three it is one


def test_bars_open_their_images_one_after_another(data):
    scene = ErrorScene(found(data, FAULTS["shifted"][0]), data)
    box = explore.errors(scene)
    assert box.state()["kind"] == "location" and "data-set=" in box.picture.value
    n, seen = len(scene.images("location")), set()
    for k in range(n):
        box.set(number=k); seen.add(box.picture.below.value)
        assert f"image {k + 1} of {n} with “location”" in box.picture.value and box.picture.value == str(render(scene, **box.state()))
    assert len(seen) == n > 5                                                               # each has a photograph of its own
    box.clicked.value = json.dumps({"set": {"kind": "missed", "number": 0, "picked": -1}, "n": 1})
    assert box.state()["kind"] == "missed" and box.picture.value == str(render(scene, **box.state()))


def test_a_click_picks_what_is_under_it(data):
    scene = ErrorScene(found(data, FAULTS["swapped"][0]), data)
    box = explore.errors(scene)
    image = scene.images("class")[0]
    d, o = items(scene, image, "class", .3)
    for i, (x1, y1, x2, y2) in enumerate(boxes_of(scene, image, d, o)):
        box.set(picked=-1); box.clicked.value = json.dumps(dict(x=(x1 + x2)/2, y=(y1 + y2)/2, n=i))
        x, y, picked = (x1 + x2)/2, (y1 + y2)/2, box.state()["picked"]
        here = boxes_of(scene, image, d, o)[picked]
        assert here[0] <= x <= here[2] and here[1] <= y <= here[3] and 'class="chosen"' in box.picture.value


def test_a_sheet_travels_only_when_it_has_changed(data):
    scene = ErrorScene(found(data, FAULTS["swapped"][0]), data)
    box, sent = explore.errors(scene), []
    box.picture.below.observe(lambda c: sent.append("below"), "value"); box.picture.above.observe(lambda c: sent.append("above"), "value")
    box.controls["picked"].value = 0; box.controls["score"].value = .7
    assert set(sent) == {"above"} and len(box.picture.below.value) > 2000 and "data:" not in box.picture.above.value
    box.controls["number"].value = 1
    assert sent.count("below") == 1


def full(data): return max(range(len(data)), key=lambda i: len(data.target(i)))              # the picture with most objects


def changed(recipe, path, value): # a recipe with one argument changed, "rpn_head.assigner.pos_iou" for example
    *nodes, name = path.split(".")
    node = recipe
    for n in nodes: node = getattr(node, n)
    assert getattr(node, name) != value
    setattr(node, name, value)
    return recipe


NODES = {   # explorer: (detector, argument of its recipe, another value)
    "anchors": (recipes.faster_rcnn, "rpn_head.assigner.pos_iou", .3),
    "proposals": (recipes.faster_rcnn, "rpn_head.train_rule.iou_threshold", .2),
    "assignment": (recipes.retinanet, "bbox_head.assigner.pos_iou", .2),
    "nms": (recipes.retinanet, "bbox_head.rule.iou_threshold", .1),
    "roi_align": (recipes.faster_rcnn, "roi_head.bbox_roi_extractor.output_size", 3),
    "losses": (recipes.retinanet, "bbox_head.loss_cls.gamma", 0.)}


@pytest.mark.parametrize("name", NODES)
def test_a_changed_node_of_the_recipe_shows_in_the_picture(data, name):
    "Explorers read what the training code does, not a drawing of it."
    family, path, value = NODES[name]
    image, target = data[full(data)]
    def seen(*change):
        torch.manual_seed(0)
        recipe = family(recipes.mobilenet_v2(), 3, out_channels=32)
        model = build(changed(recipe, *change) if change else recipe)
        if name == "nms": model.bbox_head.rule.score_threshold = .001                       # of a detector that has learnt nothing
        box = getattr(explore, name)(model, image, *([] if name == "nms" else [target]))
        if name == "nms": box.set(step=10**6)
        if name == "anchors": box.set(view="positive", level=1)
        return box.picture.value
    assert seen() == seen() != seen(path, value)


def test_a_changed_transform_shows_in_the_pipeline_strip(data):
    image, target = data[full(data)]
    seen = lambda p: explore.pipeline(Compose([Resize((96, 96)), RandomFlip(p)]), image, target).picture.value
    assert seen(0.) == seen(0.) != seen(1.)


def test_a_changed_mask_threshold_shows_in_the_answer(data):
    image, target = CocoDetection(data.annotations, data.folder, masks=True)[full(data)]
    def seen(threshold):
        torch.manual_seed(0)
        recipe = recipes.mask_rcnn(recipes.mobilenet_v2(), 3, out_channels=32)
        recipe.roi_head.mask_threshold = threshold
        box = explore.masks(image, target, build(recipe))
        box.set(what="answered")
        return box.picture.value
    assert seen(.5) == seen(.5) != seen(.45)
