"Evaluation: the published VOC numbers, TIDE's numbers, the fast twin, merging, and every diagnosis."
import builtins, contextlib, io, json, pickle
from pathlib import Path
import numpy as np, pytest, torch
from notebook_det.evaluation.coco import CocoEvaluator, choose_library, diagnosis, evaluate, fast_library, index_coco, per_class
from notebook_det.evaluation.errors import KINDS, best_score, confusion, curve, of_evaluator, truth_of
from notebook_det.evaluation.recall import ProposalRecall
from notebook_det.evaluation.voc import VocEvaluator, average_precision

GOLDEN = Path(__file__).resolve().parents[2]/"shared"/"data"/"eval_golden"


def scene(n=60, dets=25, classes=8, seed=0, crowds=.03, masks=False):
    "Pictures with objects and a mediocre detector's answers: (COCO, {image id: packed detections})."
    rng, anns, found = np.random.default_rng(seed), [], {}
    for i in range(1, n + 1):
        g = int(rng.poisson(5)); label = rng.integers(0, classes, g)
        wh = np.exp(rng.uniform(np.log(12), np.log(200), (g, 2))); xy = rng.uniform(0, 1, (g, 2))*([640, 480] - wh); truth = np.concatenate([xy, xy + wh], 1)
        for b, l in zip(truth, label):
            x1, y1, x2, y2 = b.tolist()
            anns.append(dict(id=len(anns), image_id=i, category_id=int(l), bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1)*(y2 - y1)*.7, iscrowd=int(rng.random() < crowds)))
            if masks: anns[-1]["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        if i == 7: continue                                                        # one picture is never looked at
        k = rng.integers(0, max(g, 1), dets); near = (rng.random(dets) < .6) & (g > 0)
        swh = np.exp(rng.uniform(np.log(12), np.log(200), (dets, 2))); sxy = rng.uniform(0, 1, (dets, 2))*([640, 480] - swh); box = np.concatenate([sxy, sxy + swh], 1)
        said = rng.integers(0, classes, dets)
        if g:
            moved = truth[k] + rng.normal(0, 1, (dets, 4))*np.tile(wh[k], 2)*rng.exponential(.12, (dets, 1))
            moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
            box, said = np.where(near[:, None], moved, box), np.where(near & (rng.random(dets) < .8), label[k], said)
        found[i] = dict(boxes=box, scores=(np.where(near, rng.beta(3, 2, dets), rng.beta(2, 5, dets))).round(2), labels=said)       # rounded: with ties
        if masks:
            m = torch.zeros(dets, 480, 640, dtype=torch.bool)
            for j, (x1, y1, x2, y2) in enumerate(box.clip(0, 640).astype(int).tolist()): m[j, y1:y2, x1:x2] = True
            found[i]["masks"] = m
    images = [dict(id=i, width=640, height=480) for i in range(1, n + 1)]
    return index_coco(images, anns, [dict(id=k, name=f"class {k}") for k in range(classes)]), found


def judged(truth, found, **kw):
    ev = CocoEvaluator(truth, **kw); ev.update(list(found), list(found.values())); return ev


# ---- VOC ----

def golden():
    images, anns, found = [], [], {}
    for f in sorted((GOLDEN/"groundtruths").glob("*.txt")):
        images.append({"id": f.stem})
        rows = lambda folder: np.array([[float(x) for x in l.split()[1:]] for l in (GOLDEN/folder/f.name).read_text().splitlines() if l.strip()])
        for x, y, w, h in rows("groundtruths").reshape(-1, 4).tolist(): anns.append(dict(id=len(anns), image_id=f.stem, category_id=1, bbox=[x, y, w, h]))
        d = rows("detections").reshape(-1, 5)
        found[f.stem] = dict(boxes=np.concatenate([d[:, 1:3], d[:, 1:3] + d[:, 3:]], 1), scores=d[:, 0], labels=np.zeros(len(d), int))
    return index_coco(images, anns, [{"id": 1, "name": "object"}]), found


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the published sample is not here")
@pytest.mark.parametrize("points, percent", [(11, 26.83983), (None, 24.56867)])
def test_voc_as_published(points, percent):
    truth, found = golden()
    assert len(truth.anns) == 15 and sum(len(f["scores"]) for f in found.values()) == 24
    ev = VocEvaluator(truth, iou=.3, points=points, inclusive=True); ev.update(list(found), list(found.values()))
    assert 100*ev.compute()["voc/AP30"] == pytest.approx(percent, abs=6e-6)


def voc_by_hand(truth, found, k, iou, points, inclusive):
    "VOC's rule as its development kit spells it out: one list over all images, object by object."
    one, objects, count = float(inclusive), {}, 0
    for i in truth.imgs:
        objects[i] = [([x, y, x + w, y + h], bool(a.get("iscrowd")), [False]) for a in truth.imgToAnns[i] if a["category_id"] == k for x, y, w, h in [a["bbox"]]]
        count += sum(not d for _, d, _ in objects[i])
    rows = sorted(((f["scores"][n], i, f["boxes"][n]) for i, f in found.items() for n in range(len(f["scores"])) if f["labels"][n] == k), key=lambda r: -r[0])
    hits = []
    for _, i, b in rows:
        best, chosen = -1., None
        for o in objects[i]:
            g = o[0]; w, h = min(b[2], g[2]) - max(b[0], g[0]) + one, min(b[3], g[3]) - max(b[1], g[1]) + one
            inter = max(w, 0)*max(h, 0); area = lambda x: (x[2] - x[0] + one)*(x[3] - x[1] + one)
            v = inter/(area(b) + area(g) - inter)
            if v > best: best, chosen = v, o
        if best < iou: hits.append(0)
        elif not chosen[1]: hits.append(int(not chosen[2][0])); chosen[2][0] = True
    tp, out = 0, []
    for n, h in enumerate(hits): tp += h; out.append((tp/count, tp/(n + 1)))
    if points: return sum(max((p for r, p in out if r >= t/10 - 1e-12), default=0) for t in range(11))/11
    ap, last = 0., 0.
    for n, (r, _) in enumerate(out): ap += (r - last)*max(p for _, p in out[n:]); last = r
    return ap


@pytest.mark.parametrize("points, inclusive", [(11, True), (None, False)])
def test_voc_by_hand(points, inclusive):
    truth, found = scene(crowds=.2)
    for f in found.values(): f["scores"] = f["scores"] + np.arange(len(f["scores"]))*1e-6          # no ties
    ev = VocEvaluator(truth, points=points, inclusive=inclusive); ev.update(list(found), list(found.values()))
    for k in range(8): assert ev.per_class()[f"class {k}"]["AP"] == pytest.approx(voc_by_hand(truth, found, k, .5, points, inclusive), abs=1e-12)
    assert ev.compute()["voc/AP50"] == pytest.approx(np.mean([c["AP"] for c in ev.per_class().values()]))


def test_voc_without_objects_or_detections():
    truth, found = scene(3)
    assert VocEvaluator(truth).compute()["voc/AP50"] == 0 and np.isnan(average_precision([0, 0], 0)) and average_precision([], 4) == 0
    nothing = VocEvaluator(index_coco([{"id": 1}], [], [{"id": 1, "name": "x"}])); assert np.isnan(nothing.compute()["voc/AP50"]) and "–" in nothing.table()
    with pytest.raises(ValueError, match="image 99 is not in the annotations"): VocEvaluator(truth).update([99], [found[1]])


# ---- the fast twin ----

@pytest.mark.skipif(fast_library() is None, reason="faster-coco-eval is not installed")
@pytest.mark.parametrize("kinds, limit", [(("bbox",), 100), (("bbox",), 7), (("segm", "bbox"), 100)])
def test_fast_equals_pycocotools(kinds, limit):
    truth, found = scene(30 if len(kinds) > 1 else 200, masks=len(kinds) > 1)
    fast, slow = (judged(truth, found, kinds=kinds, max_detections=limit, fast=f) for f in (True, False))
    assert type(fast.matched()[kinds[0]]) is not type(slow.matched()[kinds[0]])
    for kind in kinds:
        for k in ("precision", "recall"): np.testing.assert_allclose(fast.matched()[kind].eval[k], slow.matched()[kind].eval[k], atol=1e-12, rtol=0)
        assert per_class(fast, kind)["class 3"] == pytest.approx(per_class(slow, kind)["class 3"], nan_ok=True)
    assert fast.compute() == pytest.approx(slow.compute(), abs=1e-12, nan_ok=True) and fast.compute()["bbox/AP"] > .05


def test_without_the_fast_library(monkeypatch, capsys):
    real = builtins.__import__
    def without(name, *a, **k):
        if name.startswith("faster_coco_eval"): raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, "__import__", without)
    truth, found = scene(10); numbers = judged(truth, found, fast=True).compute()
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "notebook_det[fast]" in said[0] and numbers["bbox/AP"] > 0
    judged(truth, found).compute(); assert capsys.readouterr().out == ""                         # small and not asked for: not a word
    assert choose_library(None, 500_000) is None and "500,000 detections" in capsys.readouterr().out


# ---- parts of several processes ----

def test_merged_parts_equal_the_whole():
    truth, found = scene(); whole = judged(truth, found); ids = list(found)
    parts = [{i: found[i] for i in ids[k::3]} for k in range(3)]
    parts[2][ids[0]] = found[ids[0]]                                                              # what a padded sampler shows twice
    a, b, c = (judged(truth, p) for p in parts)
    assert a.merge(pickle.loads(pickle.dumps(c.state())), b).compute() == whole.compute() and len(a.found) == len(found)
    x, y = VocEvaluator(truth), VocEvaluator(truth)
    x.update(ids, list(found.values())); first = {i: found[i] for i in ids[:20]}; rest = {i: found[i] for i in ids[15:]}
    y.update(list(first), list(first.values())); z = VocEvaluator(truth); z.update(list(rest), list(rest.values()))
    assert y.merge(z).compute() == x.compute()
    r, s = ProposalRecall(truth), ProposalRecall(truth); r.update(ids, list(found.values())); s.update(ids[:9], list(found.values())[:9])
    t = ProposalRecall(truth); t.update(ids[5:], list(found.values())[5:]); assert s.merge(t.state()).compute() == pytest.approx(r.compute(), nan_ok=True)
    with pytest.raises(ValueError, match="image 99 is not"): a.merge({99: found[1]})


# ---- kinds of mistakes ----

def test_errors_have_the_same_ap_as_pycocotools():
    truth, found = scene(150); ev = judged(truth, found, fast=False); e = of_evaluator(ev)
    assert e.ap() == pytest.approx(ev.compute()["bbox/AP50"], abs=1e-12)
    for iou in (.6, .75): assert of_evaluator(ev, iou=iou).ap() == pytest.approx(np.mean([v for v in ev.matched()["bbox"].eval["precision"][round((iou - .5)/.05), :, :, 0, -1].mean(0) if v > -1]), abs=1e-12)



def test_errors_agree_with_tide():
    "Counts and prices as tidecv 1.0.1 gave them for this scene (its grid of recalls differs from COCO's in the last digit: hundredths of a point)."
    truth, found = scene(200, crowds=0, seed=3)
    found = {i: {**f, "scores": f["scores"] + np.random.default_rng(len(f["scores"])).random(len(f["scores"]))*1e-3 + i*1e-7} for i, f in found.items()}     # no ties
    e = of_evaluator(judged(truth, found))
    assert e.counts() == {"class": 514, "location": 352, "both": 234, "duplicate": 1212, "background": 1846, "missed": 67}
    theirs = {"class": 10.486, "location": 6.421751, "both": 1.056472, "duplicate": 7.243855, "background": 2.040554, "missed": 3.158775, "false alarms": 41.63718, "not found": 7.429174}
    assert 100*e.ap() == pytest.approx(43.387573, abs=.01) and {k: 100*v for k, v in e.costs().items()} == pytest.approx(theirs, abs=.01)


def test_errors_of_masks():
    truth, found = scene(12, masks=True); ev = judged(truth, found, kinds=("bbox", "segm"), fast=False)
    e = of_evaluator(ev, "segm"); assert e.ap() == pytest.approx(ev.compute()["segm/AP50"], abs=1e-12)
    with pytest.raises(ValueError, match="collected bbox, not 'segm'"): of_evaluator(judged(truth, {i: {k: v for k, v in f.items() if k != "masks"} for i, f in found.items()}), "segm")


def test_every_detection_gets_one_verdict_and_every_object_is_found_missed_or_near(tmp_path):
    truth, found = scene(80); e = of_evaluator(judged(truth, found)); d, o = e.detections, e.objects
    assert len(d) == sum(len(f["scores"]) for f in found.values()) and len(o) == len(truth.anns)
    assert len(e.of("right")) == o["found"].sum() and not (o["found"] & o["missed"]).any() and not (o["ignore"] & (o["found"] | o["missed"])).any()
    near = {(r["image"], r["object"]) for k in ("class", "location") for r in e.of(k)}
    for r in o[~o["found"] & ~o["missed"] & ~o["ignore"]]: assert (r["image"], r["row"]) in near
    for k in KINDS:
        by = e.images(k); assert sum(map(len, by.values())) == e.counts()[k]
        for i, rows in by.items(): assert {e.image_ids[n] for n in rows["image"]} == {i}
    e.save(tmp_path/"errors.json"); saved = json.loads((tmp_path/"errors.json").read_text())
    assert {k: len(v) for k, v in saved["mistakes"].items()} == e.counts() and saved["AP"] == e.ap()
    row = saved["mistakes"]["class"][0]; f = found[row["image_id"]]; assert f["scores"][row["row"]] == row["score"] and f"class {f['labels'][row['row']]}" == row["class"]


def test_each_mistake_is_recognised():
    "One picture with one of each kind, made by hand."
    objects = [[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 500, 100], [0, 200, 100, 300], [200, 200, 300, 300]]
    ann = lambda i, b, k: dict(id=i, image_id=1, category_id=k, bbox=[b[0], b[1], b[2] - b[0], b[3] - b[1]])
    truth = index_coco([dict(id=1, width=640, height=480)], [ann(i, b, k) for i, (b, k) in enumerate(zip(objects, (0, 0, 0, 1, 1)))], [dict(id=k, name=n) for k, n in enumerate("ab")])
    rows = [([0, 0, 100, 100], 0, .9, "right"), ([0, 0, 100, 95], 0, .8, "duplicate"), ([240, 0, 340, 100], 0, .7, "location"), ([400, 0, 500, 100], 1, .6, "class"),
            ([40, 200, 140, 300], 0, .5, "both"), ([550, 400, 600, 450], 1, .4, "background")]
    e = of_evaluator(judged(truth, {1: dict(boxes=np.array([r[0] for r in rows], float), labels=np.array([r[1] for r in rows]), scores=np.array([r[2] for r in rows]))}))
    for k in (*KINDS[:5], "right"): assert [tuple(found["row"] for found in e.of(k))] == [tuple(n for n, r in enumerate(rows) if r[3] == k)]
    assert e.of("missed")["row"].tolist() == [3, 4] and e.of("class")["object"].tolist() == [2] and e.of("location")["object"].tolist() == [1]


def test_confusion_counts_everything_once():
    truth, found = scene(60); names = list(range(1, 61)); none = dict(boxes=np.zeros((0, 4)), labels=np.zeros(0, int), scores=np.zeros(0))
    m = confusion([truth_of(judged(truth, found).truth, i) for i in names], [found.get(i, none) for i in names], 8, score=.4)
    label = [a["category_id"] for a in truth.anns.values() if not a["iscrowd"]]
    assert m[:8].sum(1).tolist() == np.bincount(label, minlength=8).tolist() and m[8, 8] == 0          # every object has one place in its row
    strong = sum(int((f["scores"] >= .4).sum()) for f in found.values()); assert 0 < strong - m[:, :8].sum() < strong*.2      # the others lie in crowds


def test_curves_end_where_recall_does():
    truth, found = scene(60); ev = judged(truth, found, fast=False); e = of_evaluator(ev)
    for k in range(8):
        c = curve(e, k); r = ev.matched()["bbox"].eval["recall"][0, k, 0, -1]
        assert c["recall"][-1] == pytest.approx(r) and (np.diff(c["scores"]) < 0).all() and (np.diff(c["recall"]) >= 0).all()
        score, f1, p, r = best_score(e, k); assert f1 == pytest.approx(2*p*r/(p + r)) and f1 == pytest.approx(c["f1"].max()) and score in c["scores"]
    assert np.isnan(best_score(of_evaluator(judged(truth, {})), 0)[0]) and of_evaluator(judged(truth, {})).ap() == 0


# ---- what is wrong ----

def good(seed=0):
    truth, found = scene(40, dets=12, classes=4, crowds=0, seed=seed)
    rng = np.random.default_rng(1); out = {}
    for i in truth.imgs:
        rows = truth.imgToAnns[i]; b = np.array([a["bbox"] for a in rows]).reshape(-1, 4); b = np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1)
        extra = rng.uniform(0, 400, (2, 2)); extra = np.concatenate([extra, extra + 50], 1)
        out[i] = dict(boxes=np.concatenate([b + rng.normal(0, 1.5, b.shape), extra]), labels=np.append([a["category_id"] for a in rows], [0, 1]).astype(int), scores=rng.uniform(.3, 1, len(b) + 2))
    return truth, out


def change(**how): return lambda f, size: {**f, **{k: v(f[k], size) for k, v in how.items()}}


center = lambda b, s: np.concatenate([(b[:, :2] + b[:, 2:])/2, b[:, 2:] - b[:, :2]], 1)
BROKEN = {
    "nothing": (change(boxes=lambda b, s: b[:0], labels=lambda l, s: l[:0], scores=lambda x, s: x[:0]), "Nothing was detected in 40 images"),
    "xywh": (change(boxes=lambda b, s: np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1)), "look like (x, y, width, height)"),
    "cxcywh": (change(boxes=center), "look like (centre x, centre y, width, height)"),
    "yxyx": (change(boxes=lambda b, s: b[:, [1, 0, 3, 2]]), "look like (y1, x1, y2, x2)"),
    "fractions": (change(boxes=lambda b, s: b/np.array([640, 480]*2)), "look like fractions of the picture"),
    "larger": (change(boxes=lambda b, s: b*800/480), "look like those of pictures 1.67 times as large"),
    "smaller": (change(boxes=lambda b, s: b*.4), "look like those of pictures 0.4 times as large"),
    "square": (change(boxes=lambda b, s: b*np.array([300/640, 300/480]*2)), "look like those of pictures resized to about 300 pixels for both sides"),
    "plus one": (change(labels=lambda l, s: l + 1), "labels are off by one"),
    "minus one": (change(labels=lambda l, s: l - 1), "its label minus 1"),
    "other order": (change(labels=lambda l, s: np.array([2, 0, 3, 1])[l]), "classes are in another order than in training: class 0 is called class 2"),
    "no numbers": (change(boxes=lambda b, s: b*np.nan), "boxes are not numbers"),
    "no scores": (change(scores=lambda x, s: x*np.nan), "scores are not numbers"),
    "weak": (change(scores=lambda x, s: x*.01, boxes=lambda b, s: np.random.default_rng(len(b)).uniform(0, 100, b.shape)), "The highest of"),
    "one score": (change(scores=lambda x, s: x*0 + .5, labels=lambda l, s: l + 1), "have the same score, 0.5")}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said(name):
    how, words = BROKEN[name]; truth, found = good()
    assert diagnosis(judged(truth, found)) == []
    said = diagnosis(judged(truth, {i: how(f, None) for i, f in found.items()}))
    assert any(words in s for s in said), said
    places, labels = [s for s in said if "look like" in s], [s for s in said if s.startswith("The labels") or s.startswith("The classes")]
    assert len(places) == ("look like" in words) and len(labels) == (name in ("plus one", "minus one", "other order", "one score")), said      # and nothing else is suspected


def test_category_ids_instead_of_positions():
    truth, found = good(); data = truth.dataset
    for c in data["categories"]: c["id"] = 10*c["id"] + 1
    for a in data["annotations"]: a["category_id"] = 10*a["category_id"] + 1
    said = diagnosis(judged(index_coco(**data), {i: {**f, "labels": 10*f["labels"] + 1} for i, f in found.items()}))
    assert any("category ids of the json file" in s for s in said)


def test_pictures_of_different_sizes_resized_by_their_shorter_side():
    rng, images, anns, found = np.random.default_rng(0), [], [], {}
    for i in range(30):
        w, h = rng.integers(200, 900, 2).tolist(); images.append(dict(id=i, width=w, height=h))
        b = rng.uniform(.05, .4, (3, 4)); b[:, 2:] += .15; b *= np.array([w, h]*2)/1.
        b = np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1)
        anns += [dict(id=len(anns) + k, image_id=i, category_id=0, bbox=[x1, y1, x2 - x1, y2 - y1]) for k, (x1, y1, x2, y2) in enumerate(b.tolist())]
        found[i] = dict(boxes=b*800/min(w, h), labels=np.zeros(3, int), scores=rng.random(3))
    said = diagnosis(judged(index_coco(images, anns, [dict(id=0, name="x")]), found))
    assert any("resized to about 800 pixels for the shorter side" in s for s in said), said


def test_a_useless_detector_is_not_explained_away():
    "Random boxes: no theory about formats, sizes or labels may fit."
    truth, found = good(); rng = np.random.default_rng(0)
    for f in found.values():
        xy = rng.uniform(0, 400, (20, 2)); f.update(boxes=np.concatenate([xy, xy + rng.uniform(10, 200, (20, 2))], 1), labels=rng.integers(0, 4, 20), scores=rng.random(20))
    assert not [s for s in diagnosis(judged(truth, found)) if "look like" in s or "labels" in s or "order" in s.split(":")[0]]


class Weak(torch.nn.Module):
    "Finds one thing, of score .03, under a threshold as ours or as torchvision's."
    def __init__(self, attribute): super().__init__(); setattr(self, attribute, .05); self.attribute = attribute
    def forward(self, images):
        keep = .03 > getattr(self, self.attribute); assert not self.training
        return [dict(boxes=torch.tensor([[1., 1, 9, 9]])[:keep], labels=torch.zeros(1, dtype=torch.int64)[:keep], scores=torch.tensor([.03])[:keep]) for _ in range(len(images))]



@pytest.mark.parametrize("attribute", ["score_threshold", "score_thresh"])
def test_the_highest_score_below_the_threshold_is_told(attribute):
    truth, _ = scene(30)
    target = lambda i: type("Target", (), {"image_id": i})()
    loader = [(torch.zeros(3, 3, 8, 8), [target(i) for i in range(k, k + 3)]) for k in range(1, 31, 3)]
    model = Weak(attribute).train(); ev = CocoEvaluator(truth)
    assert evaluate(model, iter(loader), ev)["bbox/AP"] == 0 and getattr(model, attribute) == .05 and model.training
    assert any("in 21 images the highest score is 0.03, below the model's threshold 0.05" in s for s in diagnosis(ev))
    ev.reset(); assert not ev.note


def test_the_command_line_writes_mistakes_and_speed(tmp_path, capsys, monkeypatch):
    from notebook_det.data.toy import make_toy
    from notebook_det.zoo import cli
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("NDET_QUIET", "1")
    toy = make_toy(tmp_path/"toy", num_train=4, num_val=3, size=64)
    cli.call(cli.train, "retinanet_mobilenet", "--size", 64, "--iterations", 1, "--batch", 2, "--train", toy.train, "--images", toy.images, "--out", "run"); capsys.readouterr()
    cli.call(cli.test, "run", "--ann", toy.val, "--images", toy.images, "--errors", "mistakes", "--speed")
    said = capsys.readouterr().out
    assert "boxes" in said and "circle" in said and "AP if there were none" in said and "images/s" in said                    # per class, kinds, speed
    assert "the highest score is" in said                                                                                   # one step of training finds nothing: by how much?
    saved = json.loads((tmp_path/"mistakes/boxes.json").read_text()); assert saved["counts"]["missed"] == len(saved["mistakes"]["missed"]) > 0
    assert (tmp_path/"mistakes/boxes.png").read_bytes()[:4] == b"\x89PNG" and not list(tmp_path.rglob("*.part"))
