"""Fast R-CNN, OHEM, Soft-NMS and R-FCN against the plainest way to write them, and from a region proposal network's file to detections."""
import math, random
import pytest, torch, torchvision
from test_detectors import batch, finite, objects, picture
from notebook_det.data.coco import CocoDetection
from notebook_det.data.loaders import make_loader
from notebook_det.data.proposals import collect, read_proposals, save_proposals
from notebook_det.data.toy import make_toy
from notebook_det.data.transforms import Compose, RandomFlip, Resize
from notebook_det.foundations.recipes import Config, build
from notebook_det.foundations.structures import IGNORED, Assignment, Images, Instances, Trace
from notebook_det.ops.boxes import box_iou
from notebook_det.ops.detections import DetectionRule, best_of, suppress
from notebook_det.priors.samplers import OHEMSampler
from notebook_det.roi_heads.rfcn import PSRoIExtractor, votes
from notebook_det.zoo import recipes as zoo, two_stage_more as more
from notebook_det.zoo.checkpoints import convert, put

K = 3


def make(recipe, seed=0):
    torch.manual_seed(seed)
    return build(recipe)

def fast(**kw): return make(more.fast_rcnn(zoo.mobilenet_v2(), K, out_channels=32, **kw))
def with_proposals(images, targets, n=12):
    g = torch.Generator().manual_seed(3)
    near = [(t.boxes.repeat(n, 1) + torch.randn(n * len(t), 4, generator=g) * 4).clamp(min=0) for t in targets]
    near = [torch.cat([b[(b[:, 2:] > b[:, :2] + 2).all(1)], torch.tensor([[3., 3, 40, 30], [50, 20, 90, 60]])]) for b in near]
    return Images(torch.stack(images), [tuple(x.shape[-2:]) for x in images], proposals=[Instances(b) for b in near])


# ---- samplers that pick by loss

@pytest.mark.parametrize("fraction", [.25, .5, None])
def test_ohem_takes_the_dearest(fraction):
    dice = random.Random(0)
    for _ in range(30):
        n = dice.choice([0, 3, 40, 200])
        label = torch.tensor([dice.choice([0, 0, 0, 1, 2]) for _ in range(n)], dtype=torch.int8)
        cost = torch.tensor([dice.random() for _ in range(n)])
        s = OHEMSampler(16, fraction)(Assignment(torch.zeros(n).long(), label, torch.zeros(n)), cost)
        dearest = lambda kind, most: sorted((i for i in range(n) if label[i] in kind), key=lambda i: -cost[i])[:most]
        if fraction is None: want = dearest((0, 1), 16)
        else:
            pos = dearest((1,), int(16 * fraction))
            want = pos + dearest((0,), 16 - len(pos))
        assert set(s.index.tolist()) == set(want) and not (s.mask & (label == IGNORED)).any()

@pytest.mark.parametrize("joint", [False, True])
def test_the_head_trains_on_what_it_finds_hardest(joint):
    m = make(more.with_ohem(zoo.faster_rcnn(zoo.mobilenet_v2(), K, out_channels=32)))
    m.roi_head.sampler = OHEMSampler(20, None, by=("loss_cls", "loss_bbox")) if joint else OHEMSampler(20, .25)
    images, targets = batch()
    t = Trace(); m(images, targets, trace=t)
    for i in range(2):
        r = t["roi_head"][f"image {i}"]
        left, taken = ~r["sampled"].mask & (r["assignment"].label != IGNORED), r["sampled"].mask
        for kind in (r["assignment"].positive | r["assignment"].negative,) if joint else (r["assignment"].positive, r["assignment"].negative):
            if (kind & left).any() and (kind & taken).any(): assert r["cost"][kind & taken].min() >= r["cost"][kind & left].max()
    m.roi_head.sampler = OHEMSampler(10**6, 1., by=m.roi_head.sampler.by)                          # all are taken: costs are the shares in the loss
    t = Trace(); losses = m(images, targets, trace=t)
    n = [len(t["roi_head"][f"image {i}"]["cost"]) for i in range(2)]
    shares = sum((t["roi_head"][f"image {i}"]["cost"].sum() * n[i] for i in range(2))) / sum(n)     # each image's costs are divided by its own number
    torch.testing.assert_close(shares, sum(losses[k] for k in m.roi_head.sampler.by).detach(), rtol=1e-4, atol=1e-5)


# ---- soft suppression

def softly(boxes, scores, method, threshold=.5, sigma=.5, least=1e-3):
    "One class, one box after the other, as Bodla et al. write it."
    left, out = [(s.item(), i) for i, s in enumerate(scores)], []
    while left:
        s, i = max(left, key=lambda v: (v[0], -v[1])); left.remove((s, i)); out.append((i, s))
        overlap = {j: box_iou(boxes[i:i+1], boxes[j:j+1]).item() for _, j in left}
        factor = lambda o: (1 - o if o >= threshold else 1.) if method == "linear" else float(torch.tensor(-o * o / sigma).exp())
        left = [(v * factor(overlap[j]), j) for v, j in left]
        left = [(v, j) for v, j in left if v >= least]
    return out

@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_a_soft_rule_is_the_written_one(method):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        xy = torch.rand(25, 2, generator=g) * 40
        boxes, scores = torch.cat([xy, xy + 15 + 25 * torch.rand(25, 2, generator=g)], 1), torch.rand(25, 2, generator=g)
        rule = DetectionRule(.1, 0, .5, -1, soft=method)
        want = []
        for c in range(2):
            ok = (scores[:, c] > .1).nonzero().flatten()
            want += [(s, ok[i].item(), c) for i, s in softly(boxes[ok], scores[ok, c], method)]
        want.sort(reverse=True)
        b, s, l, row = best_of(boxes, scores, rule)
        assert row.tolist() == [w[1] for w in want] and l.tolist() == [w[2] for w in want] and torch.equal(b, boxes[row])
        torch.testing.assert_close(s, torch.tensor([w[0] for w in want]), rtol=1e-4, atol=1e-5)
        r, c = (scores > .1).nonzero().unbind(1)
        keep, low = suppress(boxes[r], scores[r, c], c, rule)
        assert r[keep].tolist() == row.tolist(); torch.testing.assert_close(low, s)

def test_recipes_that_suppress_softly():
    assert zoo.recipe("m2det_vgg16_320").model.bbox_head.rule.soft == "linear"
    m = make(more.with_soft_nms(zoo.retinanet(zoo.mobilenet_v2(), K, out_channels=32), "gaussian")).eval()
    m.bbox_head.rule.score_threshold = 0.
    found = m([picture()])[0]
    m.bbox_head.rule.soft = None
    hard = m([picture()])[0]
    assert (found.scores.diff() <= 0).all() and found.scores[0] == hard.scores[0] and not torch.equal(found.boxes[:50], hard.boxes[:50])


# ---- Fast R-CNN

def test_the_second_stage_of_faster_rcnn_alone():
    "With the boxes that Faster R-CNN's own first stage proposes, the same losses and the same detections."
    both = make(zoo.faster_rcnn(zoo.mobilenet_v2(), K, out_channels=32)).eval()
    alone = fast().eval()
    alone.load_state_dict({k: v for k, v in both.state_dict().items() if not k.startswith("rpn_head.")})
    images, targets = [picture(), picture(seed=1)], [objects(2), objects(3, seed=1)]
    x = both.normalize(images)
    raw = both.rpn_head(both.features(x.tensor))
    given = Images(torch.stack(images), x.sizes, proposals=both.rpn_head.propose(raw, x.sizes, both.rpn_head.test_rule))
    for a, b in zip(both(images), alone(given)): assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)
    given.proposals = both.rpn_head.propose(raw, x.sizes, both.rpn_head.train_rule)
    torch.manual_seed(1); want = both.roi_head.losses(both.features(x.tensor), given.proposals, targets)
    torch.manual_seed(1); got = alone(given, targets)
    assert all(torch.equal(want[k], got[k]) for k in want)
    torch.manual_seed(1); brought = alone(images, [t.copy(proposals=p) for t, p in zip(targets, given.proposals)])    # targets may bring them
    assert all(torch.equal(brought[k], got[k]) for k in got)

@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0)])
def test_fast_rcnn_keeps_the_promises(counts):
    images, targets = [picture(seed=i) for i in range(2)], [objects(n, seed=i) for i, n in enumerate(counts)]
    m, given = fast(), with_proposals(images, targets)
    before = {k: v.clone() for k, v in m.eval().state_dict().items()}
    assert finite(m(given, targets)) and all(torch.equal(before[k], v) for k, v in m.state_dict().items())
    losses = m.train()(given, targets)
    assert finite(losses)
    sum(losses.values()).backward()
    assert [k for k, p in m.named_parameters() if p.requires_grad and p.grad is None] == []
    m.eval(); m.roi_head.rule.score_threshold = .2
    both = m(given)
    for i in range(2):
        one = m(Images(given.tensor[i:i+1], given.sizes[i:i+1], proposals=given.proposals[i:i+1]))[0]
        torch.testing.assert_close(one.boxes, both[i].boxes, rtol=1e-3, atol=1e-2)
    nothing = Images(given.tensor, given.sizes, proposals=[Instances(torch.zeros(0, 4))] * 2)
    assert [len(d) for d in m(nothing)] == [0, 0] and finite(m(nothing, targets))

def test_fast_rcnn_says_what_it_needs():
    m, (images, targets) = fast(), batch()
    for call in (lambda: m(images, targets), lambda: m(images), lambda: m.predict(images[0]), lambda: m.predict((images[0], torch.zeros(1, 4)))):
        with pytest.raises(ValueError, match="Fast R-CNN has no proposal network of its own"): call()
    with pytest.raises(ValueError, match="image 1 of the batch has a box that cannot be read"):
        m(Images(torch.stack([images[0]] * 2), [(96, 128)] * 2, proposals=[Instances(torch.ones(1, 4) * torch.tensor([1, 1, 9, 9])), Instances(torch.tensor([[9., 9, 1, 1]]))]))

def test_predict_takes_boxes_in_the_photos_own_pixels():
    m = fast(test_scale=(128, 96)).eval(); m.roi_head.rule.score_threshold = 0.
    boxes = torch.tensor([[10., 10, 60, 70], [40, 20, 120, 90], [-5, -5, 300, 300]])
    small = m.predict([(picture(), boxes)])[0]
    large = m.predict([(picture().repeat_interleave(2, 1).repeat_interleave(2, 2), Instances(boxes * 2)), (picture(), boxes.numpy())], batch_size=2)
    assert [f.size for f in large] == [(192, 256), (96, 128)] and len(small) == 9                    # three boxes, three classes
    torch.testing.assert_close(large[0].boxes, small.boxes * 2, rtol=1e-3, atol=.5); torch.testing.assert_close(large[1].boxes, small.boxes)

def test_from_a_proposal_network_to_detections_through_a_file(tmp_path):
    "An RPN learns toy pictures, writes its file; Fast R-CNN learns from it, and finds what it learnt."
    toy = make_toy(tmp_path/"toy", num_train=6, num_val=2, size=128)
    data = lambda *extras, flip=0.: CocoDetection(toy.train, toy.images, transforms=Compose(Resize((96, 96)), RandomFlip(flip)), extras=extras)
    def learn(m, loader, steps, lr):
        opt, curve = torch.optim.AdamW(m.parameters(), lr), []
        while len(curve) < steps:
            for images, targets in loader:
                loss = sum(m(images, targets).values()); opt.zero_grad(); loss.backward(); opt.step(); curve.append(loss.item())
        return curve
    rpn = make(zoo.from_scratch(zoo.rpn(zoo.mobilenet_v2(), out_channels=16)))
    rpn.bbox_head.anchors.scales = (4,); rpn.bbox_head.test_rule.max_proposals = 60
    learn(rpn, make_loader(data(), 3), 12, 2e-3)
    file = save_proposals(collect(rpn.eval(), make_loader(data(), 4, train=False)), tmp_path/"rpn.npz")
    again = read_proposals(file, most=40)
    assert len(again) == len(data()) and all(0 < len(again[k]) <= 40 for k in data().image_ids)
    m = make(zoo.from_scratch(more.fast_rcnn(zoo.mobilenet_v2(), 3, out_channels=16)))
    curve = learn(m, make_loader(data(again, flip=.5), 3), 20, 2e-3)
    assert sum(curve[-4:]) < .8 * sum(curve[:4]), curve
    images, targets = next(iter(make_loader(data(again), 6, train=False)))
    found = m.eval()(images)
    assert len(found) == 6 and all(f.size == t.original_size for f, t in zip(found, targets))          # in the pixels of the files


# ---- R-FCN

def rfcn(ohem=True, **kw): return make(more.rfcn(18, K, ohem=ohem, bins=3, stride=8, scales=(2, 4, 8, 16), planes=8, style="pytorch", pixels=zoo.torchvision_pixels(), **kw))

def test_votes_are_torchvisions_pooling():
    "Position-sensitive pooling and the mean of all places, box by box."
    m = rfcn().eval()
    images, _ = batch()
    t = Trace(); m(images, trace=t)
    maps, given = t["roi_head"]["maps"], t["roi_head"]["proposals"]
    rois = torch.cat([torch.cat([torch.full((len(p), 1), float(i)), p.boxes], 1) for i, p in enumerate(given)])
    want = torchvision.ops.PSRoIPool((3, 3), 1/8)(maps, rois).mean((2, 3))
    got = PSRoIExtractor(3, 8)([maps], [p.boxes for p in given])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    cls, reg = m.roi_head.bbox_head(got)
    assert cls.shape == (len(rois), K + 1) and reg.shape == (len(rois), 4)
    for r in (0, len(rois)//2, len(rois) - 1):                                                       # one box by hand: each place from its own map
        x1, y1, x2, y2 = (math.floor(v / 8 + .5) for v in rois[r, 1:].tolist())
        step, (H, W), votes = (max(y2 - y1, 1) / 3, max(x2 - x1, 1) / 3), maps.shape[-2:], []
        span = lambda k, lo, step, size: slice(*(min(max(f(v * step) + lo, 0), size - 1) for f, v in ((math.floor, k), (math.ceil, k + 1))))
        for k in range(9):
            cell = maps[int(rois[r, 0]), k::9][:, span(k // 3, y1, step[0], H), span(k % 3, x1, step[1], W)]
            votes.append(cell.mean((1, 2)) if cell.numel() else torch.zeros(K + 5))
        torch.testing.assert_close(torch.cat([cls[r], reg[r]]), torch.stack(votes).mean(0), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("bins,scale", [(1, 1.), (3, 1/8), (7, 1/16)])
def test_summed_area_tables_say_what_the_operator_says(bins, scale):
    "Boxes of any size, on edges between cells, outside of the picture; in double precision, too; the gradient takes the other way."
    g = torch.Generator().manual_seed(bins)
    maps = torch.randn(2, 5 * bins**2, 13, 17, generator=g) * 10 + 5
    wh, xy = torch.rand(60, 2, generator=g) * torch.tensor([20., 16]) / scale, (torch.rand(60, 2, generator=g) * 1.4 - .2) * torch.tensor([17., 13]) / scale
    xy[:20], wh[:20] = (xy[:20] * scale * 2).round() / 2 / scale, (wh[:20] * scale * 2).round() / 2 / scale         # halves of cells
    rois = torch.cat([torch.randint(2, (60, 1), generator=g).float(), xy, xy + wh], 1)
    for m in (maps, maps.double(), maps.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(votes(m, rois, bins, scale), torchvision.ops.ps_roi_pool(m, rois.to(m.dtype), bins, scale).mean((2, 3)), rtol=1e-5, atol=1e-5)
    leaf = maps.clone().requires_grad_()
    votes(leaf, rois, bins, scale).square().sum().backward()
    assert leaf.grad.abs().sum() > 0

def test_rfcn_has_nothing_to_learn_behind_the_pooling():
    m = rfcn()
    assert list(m.roi_head.bbox_roi_extractor.parameters()) == []
    x = torch.randn(5, K + 5, requires_grad=True)
    names = {k for k, _ in m.roi_head.bbox_head.named_parameters()}
    m.roi_head.bbox_head(x)[0].sum().backward()
    assert all(p.grad is None for p in m.roi_head.bbox_head.parameters()) and {k.split(".")[0] for k in names} == {"conv_new", "rfcn_cls", "rfcn_bbox"}

def test_rfcn_as_published():
    m = zoo.recipe("rfcn_r50_ohem_coco").model
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in build(m).state_dict().items()}
    head = "roi_head.bbox_head."
    assert shapes[head + "conv_new.weight"] == (1024, 2048, 1, 1) and shapes[head + "rfcn_cls.weight"] == (49*81, 1024, 1, 1) and shapes[head + "rfcn_bbox.weight"] == (49*4, 1024, 1, 1)
    assert shapes["rpn_head.rpn_conv.weight"] == (512, 1024, 3, 3)
    small = build(more.rfcn(18, K, planes=4))
    assert [b.conv1.dilation for b in small.roi_head.shared_head.layer4] == [(2, 2)] * 2              # stride 16, dilated
    assert zoo.recipe("rfcn_r101").model.roi_head.sampler.pos_fraction == .25

def test_rfcn_reads_each_picture_once(monkeypatch):
    m, (images, targets), calls = rfcn(), batch(), []
    real = type(m.roi_head.shared_head).forward
    monkeypatch.setattr(type(m.roi_head.shared_head), "forward", lambda self, x: calls.append(len(x)) or real(self, x))
    m(images, targets)                                                                                # OHEM judges all boxes on the same maps
    assert calls == [2]


def test_a_classifiers_weights_reach_the_stage_behind_the_proposals():
    "R-FCN and C4 keep the backbone's last stage in their second stage; a different number of classes leaves the score maps out."
    classifier = torchvision.models.resnet50(weights=None).state_dict()
    for recipe in (more.rfcn(50, K), zoo.faster_rcnn_c4(50, K)):
        with torch.device("meta"): model = build(recipe)
        state, notes = convert(dict(classifier), model)
        assert {k for k in model.state_dict() if ".layer" in k} <= state.keys() and "of a classifier: only the backbone" in notes
        assert torch.equal(state["roi_head.shared_head.layer4.2.conv3.weight"], classifier["layer4.2.conv3.weight"])
    a, b = (make(more.rfcn(18, k, planes=4, bins=3)) for k in (2, K))
    report = put(b, a.state_dict(), "two classes")
    assert {n for n, *_ in report.left_out} == {f"roi_head.bbox_head.rfcn_cls.{k}" for k in ("weight", "bias")} and "the file knows 2 classes, the model 3" in report.notes[0]


def test_patterns_belong_to_one_family_only():
    mine = ["fast-rcnn_r50_fpn_1x_coco", "fast-rcnn_r101-caffe_fpn_2x", "ga-fast-rcnn_r50-caffe_fpn_1x_coco", "faster-rcnn_r50_fpn_ohem_1x_coco", "faster-rcnn_r50_fpn_soft-nms_1x_coco", "rfcn_r50", "rfcn_r101_ohem_coco", *more.SMALL]
    for name in mine: assert [f.__name__ for f in zoo.MODULES if f.NAME.fullmatch(name) or name in f.SMALL] == [more.__name__], name
    assert not [r["name"] for r in zoo.table() if more.NAME.fullmatch(zoo.stem(r))]                    # none of them has published weights
