"""FCOS and FSAF: every rule against the plainest way to write it, and the promises about shapes, precision and compilers."""
import copy, math, pickle
import pytest, torch
import torch.nn.functional as F
from test_dense import C, K, MAPS, SIZE, SIZES, STRIDES, NoWaiting, any_number, features, objects
from notebook_det.dense_heads.fcos import FCOSHead
from notebook_det.dense_heads.fsaf import FSAFHead
from notebook_det.foundations.structures import Instances, Trace
from notebook_det.layers.deformable import DeformConv, DeformConv2d
from notebook_det.losses.classification import BCELoss, FocalLoss
from notebook_det.losses.regression import GIoULoss, IoULoss, L1Loss
from notebook_det.layers.norm import group_norm
from notebook_det.ops.boxes import box_iou, paired_iou
from notebook_det.ops.detections import DetectionRule
from notebook_det.priors.anchors import AnchorGenerator
from notebook_det.priors.centres import CentreAssigner
from notebook_det.priors.coders import Distances
from notebook_det.priors.points import PointAssigner, PointGenerator, regress_ranges

RANGES = ((0, 12), (12, 24), (24, math.inf))

def fcos(radius=0., unit=None, **kw):
    parts = dict(points=PointGenerator(STRIDES), coder=Distances(unit), assigner=PointAssigner(STRIDES, RANGES, radius), loss_cls=FocalLoss(),
                 loss_bbox=IoULoss(), loss_centerness=BCELoss(), in_channels=C, feat_channels=C, stacked_convs=1, norm=lambda c: group_norm(c, 4))
    torch.manual_seed(0)
    return FCOSHead(K, **parts | kw)

def plus(): return fcos(1.5, 1, linear=True, centerness_on_reg=True, conv_bias=True, last_conv=DeformConv2d, loss_bbox=GIoULoss())

def fsaf(**kw):
    parts = dict(anchors=AnchorGenerator(STRIDES, (1.,), (1.,)), coder=Distances(4, "tblr"), assigner=CentreAssigner(K),
                 loss_cls=FocalLoss(reduction="none"), loss_bbox=IoULoss(reduction="none"), in_channels=C, feat_channels=C, stacked_convs=1)
    torch.manual_seed(0)
    return FSAFHead(K, **parts | kw)

HEADS = [fcos, plus, fsaf]
BATCHES = {"objects": lambda: [objects(4), objects(2, 1)], "one image empty": lambda: [objects(3), objects(0)], "all empty": lambda: [objects(0), objects(0)],
           "all ignored": lambda: [objects(2, ignore=torch.ones(2, dtype=torch.bool)), objects(1, ignore=torch.ones(1, dtype=torch.bool))]}
heads, batches = pytest.mark.parametrize("make", HEADS, ids=lambda f: f.__name__), pytest.mark.parametrize("batch", BATCHES)


# ---- who learns what: against loops

@pytest.mark.parametrize("radius", [0, .6, 1.5])
@pytest.mark.parametrize("n", [0, 1, 8])
def test_points_are_assigned_as_written(radius, n):
    "METHODS 7.4: inside, within the level's range, near the centre; of several the smallest."
    o = objects(n, 3)
    cells, level = PointGenerator(STRIDES)(MAPS), []
    a = PointAssigner(STRIDES, RANGES, radius)(torch.cat(cells), o)
    want = []
    for s, (lo, hi), (h, w) in zip(STRIDES, RANGES, MAPS):
        for i in range(h * w):
            x, y, best = (i % w + .5) * s, (i // w + .5) * s, (math.inf, -1)
            for g, (x1, y1, x2, y2) in enumerate(o.boxes.tolist()):
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                near = not radius or max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < radius * s
                if min(sides) > 0 and lo <= max(sides) <= hi and near: best = min(best, ((x2 - x1) * (y2 - y1), g))
            want.append(best[1])
    assert a.label.tolist() == [int(g >= 0) for g in want] and a.gt_index.tolist() == [max(g, 0) for g in want]
    assert n < 8 or a.positive.sum() > 5

def test_published_ranges():
    assert regress_ranges((8, 16, 32, 64, 128)) == ((0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))
    with pytest.raises(ValueError, match="2 ranges for 3 strides"): PointAssigner(STRIDES, RANGES[:2])

def iof(p, b): # share of p in b
    w, h = min(p[2], b[2]) - max(p[0], b[0]), min(p[3], b[3]) - max(p[1], b[1])
    return max(w, 0) * max(h, 0) / ((p[2] - p[0]) * (p[3] - p[1]))

@pytest.mark.parametrize("core,shadow", [(.2, .2), (.5, .9)])
@pytest.mark.parametrize("n", [0, 1, 8, 40])
def test_centre_regions_are_assigned_as_written(core, shadow, n):
    "METHODS 3.5, prior by prior."
    o, ignored = objects(n, 4), torch.rand(n, generator=torch.Generator().manual_seed(n)) < .2
    priors = torch.cat(AnchorGenerator(STRIDES, (1.,), (1.,))(MAPS))
    a = CentreAssigner(K, core, shadow)(priors, o.copy(ignore=ignored))
    scaled = lambda b, f: ((b[0]+b[2])/2 - f*(b[2]-b[0])/2, (b[1]+b[3])/2 - f*(b[3]-b[1])/2, (b[0]+b[2])/2 + f*(b[2]-b[0])/2, (b[1]+b[3])/2 + f*(b[3]-b[1])/2)
    inside = lambda x, y, b: b[0] < x < b[2] and b[1] < y < b[3]
    boxes, labels = o.boxes.tolist(), o.labels.tolist()
    real = [g for g in range(n) if not ignored[g]]
    for p, index, label, dark in zip(priors.tolist(), a.gt_index.tolist(), a.label.tolist(), a.shadow):
        x, y = (p[0] + p[2]) / 2, (p[1] + p[3]) / 2
        mine = [g for g in real if inside(x, y, boxes[g]) and iof(p, scaled(boxes[g], core)) > .01]
        rims = [g for g in real if g not in mine and iof(p, scaled(boxes[g], shadow)) > .01]
        owner = min(mine, key=lambda g: (boxes[g][2]-boxes[g][0]) * (boxes[g][3]-boxes[g][1])) if mine else None
        shaded = {labels[g] for g in rims + mine if g != owner}
        if owner is not None and labels[owner] in shaded: owner = None
        want = 2 if any(inside(x, y, scaled(boxes[g], .5)) for g in range(n) if ignored[g]) else int(owner is not None)
        assert label == want and index == (owner if want == 1 else 0) and set(dark.nonzero().flatten().tolist()) == shaded

def test_assigners_know_validity_and_bound_their_memory():
    import resource
    o, priors = objects(3000, 1), torch.cat(PointGenerator((1,))([(50, 100)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rule in (PointAssigner((1,), ((0, math.inf),)), CentreAssigner(K)):
        valid = torch.rand(len(priors), generator=torch.Generator().manual_seed(0)) < .5
        a, b = rule(priors, o), rule(priors, o, valid)
        assert torch.equal(b.label, torch.where(valid, a.label, 2)) and torch.equal(b.gt_index, torch.where(valid, a.gt_index, 0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000       # as whole matrices: 60 MB for each number of a pair, and there are two dozen


# ---- losses: against loops

def test_fcos_losses_by_hand():
    head, batch = fcos(1.5), BATCHES["objects"]()
    raw, trace = head(features()), Trace()
    got = head.losses(raw, batch, [SIZE] * 2, trace)
    cls, box, middle = (torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, c) for m in raw[k]], 1) for k, c in (("cls", K), ("box", 4), ("centerness", 1)))
    cells = torch.cat(PointGenerator(STRIDES)(MAPS))
    x, y = (cells[:, 0] + cells[:, 2]) / 2, (cells[:, 1] + cells[:, 3]) / 2
    positive, sums, weight = 0, dict(loss_cls=0., loss_bbox=0., loss_centerness=0.), 0.
    for b, (o, a) in enumerate(zip(batch, trace["assignments"])):
        for i in range(len(cells)):
            hot = torch.zeros(K)
            if a.positive[i]:
                t, (l, u, r, d) = o.boxes[a.gt_index[i]], box[b, i]
                hot[o.labels[a.gt_index[i]]] = 1; positive += 1
                dist = torch.stack([x[i] - t[0], y[i] - t[1], t[2] - x[i], t[3] - y[i]])
                c = ((dist[0::2].min() / dist[0::2].max()) * (dist[1::2].min() / dist[1::2].max())).sqrt()
                weight += c
                sums["loss_bbox"] += -c * paired_iou(torch.stack([x[i] - l, y[i] - u, x[i] + r, y[i] + d]), t).clamp(1e-6).log()
                sums["loss_centerness"] += F.binary_cross_entropy_with_logits(middle[b, i, 0], c)
            p = cls[b, i].sigmoid()
            sums["loss_cls"] += (-.25 * hot * (1-p)**2 * p.log() - .75 * (1-hot) * p**2 * (1-p).log()).sum()
    assert positive > 5
    for k, n in (("loss_cls", positive), ("loss_bbox", weight), ("loss_centerness", positive)): torch.testing.assert_close(got[k], sums[k] / n, rtol=1e-4, atol=1e-5)

def test_fsaf_chooses_levels_by_loss():
    "METHODS 7.5, by loops: means per object and level, the least wins, the others' own-class loss is taken out."
    head, batch = fsaf(assigner=CentreAssigner(K, .6, .8)), [objects(4), objects(3, 1)]
    raw, trace = head(features()), Trace()
    got = head.losses(raw, batch, [SIZE] * 2, trace)
    cls, box = (torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, c) for m in raw[k]], 1) for k, c in (("cls", K), ("box", 4)))
    priors, coder = torch.cat(head.priors(raw["cls"])), Distances(4, "tblr")
    level = sum(([i] * h * w for i, (h, w) in enumerate(MAPS)), [])
    focal = lambda z, hot: torch.where(hot, -.25 * (1 - z.sigmoid())**2 * F.logsigmoid(z), -.75 * z.sigmoid()**2 * F.logsigmoid(-z))
    total, kept, several = dict(loss_cls=0., loss_bbox=0.), 0, 0
    for b, (o, a) in enumerate(zip(batch, trace["assignments"])):
        hot = torch.zeros(len(priors), K, dtype=torch.bool); hot[a.positive, o.labels[a.gt_index[a.positive]]] = True
        f = focal(cls[b], hot) * ~a.shadow
        iou = -paired_iou(coder.decode(priors, box[b].clamp(min=1e-4)), o.boxes[a.gt_index]).clamp(1e-6).log()
        for g in range(len(o)):
            rows = {l: [i for i in range(len(priors)) if a.positive[i] and a.gt_index[i] == g and level[i] == l] for l in range(3)}
            cost = {l: sum(f[i].sum() + iou[i] for i in r) / len(r) for l, r in rows.items() if r}
            if not cost: continue
            best = min(cost, key=cost.get); several += len(cost) > 1; kept += len(rows[best])
            assert trace["level"][b][g] == best
            for l, c in cost.items(): torch.testing.assert_close(trace["level_losses"][b][l, g], c.detach(), rtol=1e-4, atol=1e-5)
            total["loss_bbox"] += sum(iou[i] for i in rows[best])
            for l, r in rows.items():
                for i in r:
                    if l != best: f = f * ~((torch.arange(len(priors)) == i)[:, None] & hot)
        total["loss_cls"] += f.sum()
    assert several > 2
    for k in total: torch.testing.assert_close(got[k], total[k] / kept, rtol=1e-4, atol=1e-5)

def test_fsaf_says_what_it_needs():
    with pytest.raises(ValueError, match="reduction='none'"): fsaf(loss_cls=FocalLoss())
    with pytest.raises(ValueError, match="reduction='none'"): fsaf(loss_bbox=L1Loss(reduction="none"))
    with pytest.raises(ValueError, match="3 classes, its assigner 5"): fsaf(assigner=CentreAssigner(5))

@heads
@batches
def test_every_parameter_has_a_gradient(make, batch):
    head = make()
    losses = head.losses(head(features()), BATCHES[batch](), SIZES)
    assert all(l.ndim == 0 and l.isfinite() for l in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())

@heads
def test_shares_add_up_and_watching_changes_nothing(make):
    head, f, trace = make(), features(), Trace()
    plain, losses = head.losses(head(f), BATCHES["objects"](), SIZES), head.losses(head(f), BATCHES["objects"](), SIZES, trace)
    for k, v in losses.items():
        assert torch.equal(v, plain[k]) and trace[k].shape == (2, sum(h * w for h, w in MAPS))
        torch.testing.assert_close(trace[k].sum(), v.detach(), rtol=1e-4, atol=1e-6)

@heads
def test_the_padding_does_not_matter(make):
    head = make(); raw = head(features(1))
    rough = {k: [m.clone() for m in v] for k, v in raw.items()}
    for v in rough.values():
        for m, s in zip(v, STRIDES): m[:, :, -(-50 // s):], m[..., -(-80 // s):] = 5., 5.
    a, b = head.losses(raw, [objects(3)], [(50, 80)]), head.losses(rough, [objects(3)], [(50, 80)])
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- detections

def test_centreness_ranks_but_does_not_admit():
    "METHODS 7.4: the threshold looks at the class alone; ranking and suppression at class times centreness."
    head = fcos(rule=DetectionRule(.3, 100, .99, 100))
    raw = dict(cls=[torch.full((1, K, 1, 2), -9.), *(torch.full((1, K, 1, 1), -9.) for _ in STRIDES[1:])], box=[torch.full((1, 4, *s), 4.) for s in ((1, 2), (1, 1), (1, 1))],
               centerness=[torch.zeros(1, 1, *s) for s in ((1, 2), (1, 1), (1, 1))])
    raw["cls"][0][0, 1] = torch.tensor([[2., 1.]]); raw["centerness"][0][0, 0] = torch.tensor([[-4., 3.]])
    found = head.predict(raw, [(8, 16)])[0]
    want = torch.tensor([2., 1.]).sigmoid() * torch.tensor([-4., 3.]).sigmoid()
    torch.testing.assert_close(found.scores, want.flip(0))                       # both are there; 0.016 is below the threshold, 0.88 was above
    assert found.boxes.tolist() == [[8, 0, 16, 8], [0, 0, 8, 8]] and found.labels.tolist() == [1, 1]

@heads
def test_batched_is_one_by_one(make):
    head = make(); raw = head(features()); head.rule.score_threshold = .005
    found = head.predict(raw, SIZES)
    for i in range(2):
        f = head.predict({k: [m[i:i+1] for m in v] for k, v in raw.items()}, SIZES[i:i+1])[0]
        assert len(f) and all(torch.equal(f[k], found[i][k]) for k in ("boxes", "labels", "scores"))


# ---- precision, shapes, compilers, copies

@heads
def test_float64_and_autocast(make):
    head, f, batch = make(), features(), BATCHES["objects"]()
    want = head.losses(head(f), batch, SIZES)
    with torch.autocast("cpu", torch.bfloat16): raw = head(f); got, found = head.losses(raw, batch, SIZES), head.predict(raw, SIZES)
    assert raw["cls"][0].dtype == torch.bfloat16 and found[0].boxes.dtype == found[0].scores.dtype == torch.float32
    for k in want: assert got[k].dtype == torch.float32; torch.testing.assert_close(got[k], want[k], rtol=.05, atol=.01)
    head = head.double(); exact = head.losses(head(features(dtype=torch.float64)), batch, SIZES)
    for k in want: assert exact[k].dtype == torch.float64; torch.testing.assert_close(exact[k].float(), want[k], rtol=1e-4, atol=1e-5)

@heads
@batches
def test_a_training_step_never_waits(make, batch):
    head, f, batch = make(), features(), BATCHES[batch]()
    with NoWaiting(): sum(head.losses(head(f), batch, SIZES).values()).backward()

@heads
def test_forward_and_losses_compile_as_one_graph(make):
    torch._dynamo.reset()
    head, f, graphs = make(), features(), []
    step = lambda f, batch, sizes: head.losses(head(f), batch, sizes)
    def count(gm, inputs): graphs.append(gm); return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)
    fast = torch.compile(step, fullgraph=True, backend=count)
    for counts in ((4, 2), (1, 0), (0, 0), (9, 1)):
        batch = any_number([objects(n, i) for i, n in enumerate(counts)])
        got, want = fast(f, batch, SIZES), step(f, batch, SIZES)
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-5)
    sum(got.values()).backward()
    assert all(p.grad is not None for p in head.parameters()) and len(graphs) == 1

@heads
def test_the_head_exports(make):
    head, f = make().eval(), tuple(features(1))
    with torch.no_grad(): want, got = head(f), torch.export.export(head, (f,)).module()(f)
    for k in want:
        for a, b in zip(want[k], got[k]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@heads
def test_copies_are_equal_and_independent(make):
    head, f = make(), features()
    want = head.predict(head(f), SIZES)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(want, other.predict(other(f), SIZES)))
        other.rule.iou_threshold = .123
        assert head.rule.iou_threshold != .123 != make().rule.iou_threshold


# ---- deformable convolution: against loops

@pytest.mark.parametrize("groups,deform_groups,stride,dilation,modulated", [(1, 1, 1, 1, True), (2, 1, 2, 1, True), (1, 2, 1, 2, True), (2, 4, 1, 1, False)])
def test_deformable_convolution_by_loops(groups, deform_groups, stride, dilation, modulated):
    g = torch.Generator().manual_seed(0)
    m = DeformConv2d(4, 6, 3, stride, dilation, dilation, groups, deform_groups=deform_groups, modulated=modulated).double()
    for p in m.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * .3
    x = torch.randn(1, 4, 5, 6, generator=g, dtype=torch.float64)
    got, where = m(x)[0], m.conv_offset(x)[0]
    def at(c, y, x_): # bilinear, 0 outside
        y0, x0, v = math.floor(y), math.floor(x_), 0.
        for i, a in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
            for j, b in ((x0, x0 + 1 - x_), (x0 + 1, x_ - x0)):
                if 0 <= i < 5 and 0 <= j < 6: v += a * b * x[0, c, i, j].item()
        return v
    for o in range(6):
        for i in range(got.shape[1]):
            for j in range(got.shape[2]):
                v = m.bias[o].item()
                for k in range(4 // groups):
                    c = (o // (6 // groups)) * (4 // groups) + k
                    d = c // (4 // deform_groups)
                    for t in range(9):
                        dy, dx = where[2 * (9 * d + t), i, j].item(), where[2 * (9 * d + t) + 1, i, j].item()
                        s = where[18 * deform_groups + 9 * d + t, i, j].sigmoid().item() if modulated else 1.
                        v += m.weight[o, k, t // 3, t % 3].item() * s * at(c, i * stride + (t // 3 - 1) * dilation + dy, j * stride + (t % 3 - 1) * dilation + dx)
                assert abs(v - got[o, i, j].item()) < 1e-9

def test_deformable_convolution_starts_ordinary_and_is_refused_politely():
    m, x = DeformConv2d(8, 6, 3, padding=1, groups=2), torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(m(x), .5 * F.conv2d(x, m.weight, None, 1, 1, groups=2))
    m, offset = DeformConv(8, 6, 3, padding=1, deform_groups=2), torch.zeros(2, 36, 9, 11)
    torch.testing.assert_close(m(x, offset), F.conv2d(x, m.weight, m.bias, 1, 1))
    assert list(m.state_dict()) == ["weight", "bias"] and m(x[:0], offset[:0]).shape == (0, 6, 9, 11)
    with pytest.raises(ValueError, match="cannot be split into 3 groups"): DeformConv2d(8, 6, 3, groups=3)
