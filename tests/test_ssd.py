"""SSD and its family against other people's code, the plainest way to write their rules, and their authors' layer tables."""
import math
import pytest, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from notebook_det.backbones.resnet import ResNet, RootStem
from notebook_det.backbones.vgg import VGG
from notebook_det.dense_heads.ssd import hard_negatives
from notebook_det.foundations.recipes import Config, build
from notebook_det.foundations.structures import Images, Instances, Trace
from notebook_det.zoo import ssd
from test_dense import NoWaiting, any_number


def objects(n, side, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    xy, wh = torch.rand(n, 2, generator=g) * side * .7, 6 + torch.rand(n, 2, generator=g) * side * .5
    return Instances(torch.cat([xy, (xy + wh).clamp(max=side)], 1), torch.randint(k, (n,), generator=g))

def noise(n, side, seed=0): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))

def macs(f):
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops() // 2


# ---- SSD300 is torchvision's, number by number

@pytest.fixture(scope="module")
def pair(k=5):
    "torchvision's SSD300 and ours with its weights: background is its first class and our last one."
    from torchvision.models.detection import ssd300_vgg16
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=k + 1).eval()
    ours = build(ssd.ssd300(k)).eval()
    ours.bbox_head.anchors.limit = 300.                                              # theirs are cut to the picture's size
    layers = [m for m in theirs.backbone.modules() if isinstance(m, nn.Conv2d)]
    mine = [m for m in (*ours.backbone.modules(), *ours.neck.modules()) if isinstance(m, nn.Conv2d)]
    assert len(layers) == len(mine) == 23
    with torch.no_grad():
        for a, b in zip(layers, mine): b.load_state_dict(a.state_dict())
        ours.neck.l2_norm.weight.copy_(theirs.backbone.scale_weight)
        for a, b in zip(theirs.head.regression_head.module_list, ours.bbox_head.reg_convs): b[0].load_state_dict(a.state_dict())
        for a, b in zip(theirs.head.classification_head.module_list, ours.bbox_head.cls_convs):
            for name in ("weight", "bias"):
                v = getattr(a, name)
                getattr(b[0], name).copy_(v.unflatten(0, (-1, k + 1)).roll(-1, 1).flatten(0, 1))
    return theirs, ours

def theirs_raw(model, x, boxes, labels):
    maps = list(model.backbone(x).values())
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou
    anchors = model.anchor_generator(ImageList(x, [(300, 300)] * len(x)), maps)
    out = model.head(maps)
    matched = [model.proposal_matcher(box_iou(b, a)) for a, b in zip(anchors, boxes)]
    return out, anchors, matched, model.compute_loss([dict(boxes=b, labels=l) for b, l in zip(boxes, labels)], out, anchors, matched)

def test_ssd300_is_torchvisions(pair, monkeypatch):
    theirs, ours = pair
    x, truth = noise(2, 300), [objects(4, 300, 5, 1), objects(7, 300, 5, 2)]
    trace = Trace()
    with torch.no_grad():
        out, anchors, matched, want = theirs_raw(theirs, x, [t.boxes for t in truth], [t.labels + 1 for t in truth])
        raw = ours.bbox_head(ours.features(x))
        priors = ours.bbox_head.priors(raw["cls"])
        torch.testing.assert_close(torch.cat(priors), anchors[0], rtol=1e-5, atol=1e-3)
        monkeypatch.setattr(ours.bbox_head, "priors", lambda maps: anchors[0].split([len(p) for p in priors]))   # the last digits decide which of equally good boxes is best
        got = ours.bbox_head.losses(raw, truth, [(300, 300)] * 2, trace)
    cls = torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, 6) for m in raw["cls"]], 1).roll(1, -1)
    torch.testing.assert_close(cls, out["cls_logits"], rtol=1e-3, atol=1e-3)
    for a, m in zip(trace["assignments"], matched): assert torch.equal(torch.where(a.positive, a.gt_index, -1), m)
    torch.testing.assert_close(got["loss_cls"], want["classification"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["loss_bbox"], want["bbox_regression"], rtol=1e-4, atol=1e-4)

def test_ssd300_costs_what_torchvisions_costs():
    from torchvision.models.detection import SSD300_VGG16_Weights
    facts = SSD300_VGG16_Weights.COCO_V1.meta
    with torch.device("meta"):
        model = build(ssd.ssd300(90))
        assert sum(p.numel() for p in model.parameters()) == facts["num_params"]
        n = macs(lambda: model.bbox_head(model.features(torch.empty(1, 3, 300, 300))))
    assert n / 1e9 == pytest.approx(facts["_ops"], abs=.001)


# ---- targets and losses in plain Python, for the two without reference numbers

def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0.) * max(h, 0.)
    return both / ((a[2]-a[0])*(a[3]-a[1]) + (b[2]-b[0])*(b[3]-b[1]) - both)

def match(priors, boxes):
    "Prior → object or None: the best object from one half on; then every object claims its first best prior, later objects last."
    table = [[overlap(p, b) for b in boxes] for p in priors]
    out = [max(range(len(boxes)), key=lambda j: row[j]) if boxes and max(row) >= .5 else None for row in table]
    for j in range(len(boxes)):
        column = [row[j] for row in table]
        out[column.index(max(column))] = j
    return out

def smooth(d): return .5*d*d if abs(d) < 1 else abs(d) - .5

def by_hand(priors, cls, box, boxes, labels, k):
    "One image's sums of classification and box loss, and its number of positives."
    owner = match(priors, boxes)
    entropy = [math.log(sum(math.exp(v) for v in row)) - row[k if o is None else labels[o]] for row, o in zip(cls, owner)]
    positive = [i for i, o in enumerate(owner) if o is not None]
    negative = sorted((entropy[i] for i, o in enumerate(owner) if o is None), reverse=True)[:3*len(positive)]
    total = 0.
    for i in positive:
        (a, b, c, d), (e, f, g, h) = priors[i], boxes[owner[i]]
        w, t = c - a, d - b
        target = ((e+g-a-c)/2/w/.1, (f+h-b-d)/2/t/.1, math.log((g-e)/w)/.2, math.log((h-f)/t)/.2)
        total += sum(smooth(p - q) for p, q in zip(box[i], target))
    return sum(entropy[i] for i in positive) + sum(negative), total, len(positive)

def squares(side, strides, small, large, limit=None):
    "Six boxes a cell as the authors' loops write them, (x1, y1, x2, y2) in pixels; maps halve as 3×3 convolutions of stride 2 do."
    out, n = [], side // strides[0]
    for k, (s, a, b) in enumerate(zip(strides, small, large)):
        if k: n = (n - 1)//2 + 1 if k < len(strides) - 1 else n - 2
        for y in range(n):
            for x in range(n):
                wh = [(a, a), (math.sqrt(a*b),)*2] + [p for r in (2, 3) for p in ((a*math.sqrt(r), a/math.sqrt(r)), (a/math.sqrt(r), a*math.sqrt(r)))]
                wh = [(min(w, limit or w), min(h, limit or h)) for w, h in wh]
                out += [((x+.5)*s - w/2, (y+.5)*s - h/2, (x+.5)*s + w/2, (y+.5)*s + h/2) for w, h in wh]
    return out

def test_m2dets_targets_by_hand():
    recipe = ssd.m2det(Config(VGG, 11, .125), 4, pixels=ssd.torchvision_pixels(), planes=8, levels=2, base=(16, 16), thin=8)
    torch.manual_seed(0); model = build(recipe).double().eval()
    shares = (.08, .15, .33, .51, .69, .87, 1.05)
    want = squares(320, (8, 16, 32, 64, 107, 320), [320*s for s in shares[:-1]], [320*s for s in shares[1:]], 320.)
    assert len(want) == 6 * (40**2 + 20**2 + 10**2 + 5**2 + 3**2 + 1)
    agree(model, torch.tensor(want, dtype=torch.float64), 320)

def test_scratchdets_targets_by_hand():
    torch.manual_seed(0); model = build(ssd.scratchdet(4, 18, planes=8)).double().eval()
    priors = torch.cat(model.bbox_head.priors([torch.empty(0, 1, n, n, dtype=torch.float64) for n in (38, 19, 10, 5, 3, 1)]))
    assert len(priors) == 8732
    agree(model, priors, 300)

def agree(model, priors, side, k=4):
    x, truth = noise(2, side, 3).double(), [objects(3, side, k, 4), objects(5, side, k, 5)]
    for t in truth: t.boxes = t.boxes.double()
    with torch.no_grad():
        raw = model.bbox_head(model.features(x))
        got = model.bbox_head.losses(raw, truth, [(side, side)] * 2)
    torch.testing.assert_close(torch.cat(model.bbox_head.priors(raw["cls"])), priors, rtol=1e-6, atol=1e-4)
    cls, box = (torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, c) for m in raw[name]], 1) for name, c in (("cls", k+1), ("box", 4)))
    rows = [by_hand(priors.tolist(), c.tolist(), b.tolist(), t.boxes.tolist(), t.labels.tolist(), k) for c, b, t in zip(cls, box, truth)]
    n = sum(r[2] for r in rows)
    assert n > 10
    assert got["loss_cls"].item() == pytest.approx(sum(r[0] for r in rows) / n, rel=1e-6)
    assert got["loss_bbox"].item() == pytest.approx(sum(r[1] for r in rows) / n, rel=1e-6)


# ---- layer tables of ScratchDet and M2Det: sizes, parameters and multiplications counted from the table alone

class Table:
    "Convolutions listed one by one; counts weights (a norm has two numbers per channel) and multiplications."
    def __init__(self): self.weights = self.macs = 0
    def conv(self, c, o, k, n, stride=1, pad=None, dilation=1, bias=False, norm=True):
        m = (n + 2*(dilation*(k//2) if pad is None else pad) - dilation*(k-1) - 1)//stride + 1
        self.weights += c*o*k*k + bias*o + norm*2*o
        self.macs += c*o*k*k*m*m
        return m
    def block(self, c, o, n, stride=1, pad=1): # two 3×3 and, where the shape changes, a 1×1
        m = self.conv(c, o, 3, n, stride, pad); self.conv(o, o, 3, m)
        if stride > 1 or c != o or pad == 0: self.conv(c, o, 1, m)
        return m
    def vgg(self, n):
        c = 3
        for i, (count, o) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
            for _ in range(count): self.conv(c, o, 3, n, bias=True, norm=False); c = o
            if i == 3: shallow = n
            if i < 4: n = -(-n // 2)
        self.conv(512, 1024, 3, n, dilation=6, bias=True, norm=False); self.conv(1024, 1024, 1, n, bias=True, norm=False)
        return shallow, n

def scratchdet_table(side, counts=(3, 4, 6, 3), k=80):
    t, maps = Table(), []
    for c in (3, 64, 64): n = t.conv(c, 64, 3, side)
    n, c = side // 2, 64                                                             # 2×2 pooling
    for i, count in enumerate(counts):
        o = 64 * 2**i
        for j in range(count): n, c = t.block(c, o, n, 2 if i and not j else 1), o
        if i >= 2: maps.append((o, n))
    for s, p in ((2, 1), (2, 1), (2, 1), (1, 0)) if side == 300 else ((2, 1),) * 5: n, c = t.block(c, 128, n, s, p), 128; maps.append((c, n))
    few = (0, 4, 5) if side == 300 else (0, 5, 6)
    for i, (c, n) in enumerate(maps):
        for out in (k + 1, 4): t.conv(c, out * (4 if i in few else 6), 3, n)
    return t, maps

def m2det_table(side, levels=8, planes=256, k=80):
    t = Table()
    shallow, deep = t.vgg(side)
    t.conv(512, 256, 3, shallow); t.conv(1024, 512, 1, deep); t.conv(768, 128, 1, shallow)
    for level in range(levels):
        first, sizes = 128 + planes * (level > 0), [shallow]
        for i in range(4): sizes.append(t.conv(planes if i else first, planes, 3, sizes[-1], 2, 1))
        sizes.append(t.conv(planes, planes, 3, sizes[-1], 1, 0))
        t.conv(planes, planes, 1, sizes[-1])
        for i, n in enumerate(reversed(sizes[:-1])): t.conv(first if i == 4 else planes, planes, 3, n); t.conv(planes, planes, 1, n)
    c = planes * levels
    t.weights += 2*c + c*(c//16) + c//16 + (c//16)*c + c                             # the norm of the finest map, channel attention
    t.macs += 2*c*(c//16) * 6
    for n in sizes[:6]:
        for out in (k + 1, 4): t.conv(c, 6 * out, 3, n, bias=True, norm=False)
    return t, [(c, n) for n in sizes[:6]]

@pytest.mark.parametrize("recipe, table, side", [(lambda s: ssd.scratchdet(size=s), scratchdet_table, 300), (lambda s: ssd.scratchdet(size=s), scratchdet_table, 512),
                                                 (lambda s: ssd.m2det_vgg(size=s), m2det_table, 320), (lambda s: ssd.m2det_vgg(size=s), m2det_table, 512)],
                         ids=["scratchdet300", "scratchdet512", "m2det320", "m2det512"])
def test_sizes_parameters_and_multiplications(recipe, table, side, capsys):
    want, maps = table(side)
    with torch.device("meta"):
        model = build(recipe(side)).eval()
        out = model.features(torch.empty(1, 3, side, side))
        assert [tuple(m.shape[1:]) for m in out] == [(c, n, n) for c, n in maps]
        parameters = sum(p.numel() for p in model.parameters())
        assert parameters == want.weights
        assert macs(lambda: model.bbox_head(model.features(torch.empty(1, 3, side, side)))) == want.macs
    with capsys.disabled(): print(f"\n{parameters/1e6:.1f} M parameters, {want.macs/1e9:.1f} G multiplications, maps {[n for _, n in maps]}", end=" ")

def test_m2dets_resnet_keeps_stride_16():
    with torch.device("meta"):
        model = build(ssd.m2det_resnet())
        assert model.backbone.channels == (512, 2048) and model.backbone.strides == (8, 16)
        assert [m.shape[-1] for m in model.backbone(torch.empty(1, 3, 320, 320))] == [40, 20]

def test_a_root_stem_in_another_detector():
    from notebook_det.zoo import rcnn
    model = build(rcnn.retinanet(Config(ResNet, 18, stem=RootStem, out_indices=(1, 2, 3), frozen_stages=-1), 3, out_channels=32))
    assert model.backbone.strides == (4, 8, 16)


# ---- shapes, waiting, compilers, devices

def small(): torch.manual_seed(0); return build(ssd.ssd(Config(VGG, 11, .0625), 3))

@pytest.mark.parametrize("counts", [(4, 2), (0, 3), (0, 0)])
def test_a_training_step_never_waits(counts):
    head = small().bbox_head
    maps = [torch.randn(2, c, n, n) for c, n in zip((32, 64, 512, 256, 256, 256), (10, 5, 3, 2, 1, 1))]
    with NoWaiting(): sum(head.losses(head(maps), [objects(n, 80, 3, n) for n in counts], [(80, 80)] * 2).values()).backward()
    assert all(p.grad is not None for p in head.parameters())

def test_network_and_losses_compile_as_one_graph():
    torch._dynamo.reset()
    model, x = small(), noise(2, 80)
    step = lambda x, batch: model.bbox_head.losses(model.bbox_head(model.features(x)), batch, [(80, 80)] * 2)
    fast = torch.compile(step, fullgraph=True, backend="eager")
    for counts in ((4, 2), (1, 0), (0, 0)):
        batch = any_number([objects(n, 80, 3, n) for n in counts])
        got, want = fast(x, batch), step(x, batch)
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("recipe", [lambda: ssd.ssd(Config(VGG, 11, .0625), 3), lambda: ssd.ssdlite(3), lambda: ssd.scratchdet(3, 18, planes=8),
                                    lambda: ssd.m2det(Config(VGG, 11, .0625), 3, planes=8, levels=2)], ids=["ssd", "ssdlite", "scratchdet", "m2det"])
def test_the_dense_path_exports(recipe):
    class Dense(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model.bbox_head(self.model.features(x))
    torch.manual_seed(0)
    model, x = Dense(build(recipe()).eval()), noise(1, 96)
    with torch.no_grad(): want, got = model(x), torch.export.export(model, (x,)).module()(x)
    for k in want:
        for a, b in zip(want[k], got[k]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

def test_predict_makes_every_picture_the_same_size():
    model = small().eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda m, x: seen.append(tuple(x[0].shape[-2:])))
    found = model.predict([torch.zeros(3, 80, 200, dtype=torch.uint8), torch.zeros(3, 333, 50, dtype=torch.uint8)])
    assert seen == [(300, 300)] * 2 and [f.size for f in found] == [(80, 200), (333, 50)]
    assert all((f.boxes <= torch.tensor([f.size[1], f.size[0]] * 2) + 1e-3).all() for f in found)

def test_only_as_many_negatives_as_there_are():
    loss = torch.tensor([[.1, 5., 2., 3.], [9., 9., 9., 9.]])
    positive = torch.tensor([[True, True, False, False], [False] * 4])
    assert hard_negatives(loss, positive, ~positive).tolist() == [[False, False, True, True], [False] * 4]
    assert hard_negatives(loss[:1], positive[:1], torch.tensor([[False, False, False, True]])).tolist() == [[False, False, False, True]]
