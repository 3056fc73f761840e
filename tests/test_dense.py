"""Dense heads and what they stand on, where a notebook would only be made longer: every rule against the plainest way to write it, and the promises about shapes, precision and compilers."""
import copy, pickle
import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from notebook_det.backbones.resnet import ResNet
from notebook_det.dense_heads.base import dense_detections, flat, per_prior_losses, strongest
from notebook_det.dense_heads.retina import RetinaHead
from notebook_det.dense_heads.rpn import RPNHead
from notebook_det.foundations.structures import Instances, Trace
from notebook_det.losses.classification import BCELoss, FocalLoss
from notebook_det.losses.regression import BoundedIoULoss, GIoULoss, IoULoss, L1Loss, SmoothL1Loss
from notebook_det.necks.fpn import FPN
from notebook_det.ops.boxes import box_iof, box_iou
from notebook_det.ops.detections import DetectionRule, ProposalRule
from notebook_det.priors.anchors import AnchorGenerator
from notebook_det.priors.assigners import MaxIoUAssigner
from notebook_det.priors.coders import DeltaXYWH
from notebook_det.priors.samplers import RandomSampler

SIZE, SIZES = (64, 96), [(64, 96), (50, 80)]
STRIDES, C, K = (8, 16, 32), 8, 3
MAPS = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]


def boxes(n, seed=0, size=SIZE, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=g) * torch.tensor([size[1] - 24., size[0] - 24.])
    return torch.cat([xy, xy + 8 + torch.rand(n, 2, generator=g) * 16], 1).to(dtype)

def objects(n, seed=0, **kw): return Instances(boxes(n, seed), torch.randint(K, (n,), generator=torch.Generator().manual_seed(seed)), **kw)

def retina(**kw):
    parts = dict(anchors=AnchorGenerator(STRIDES, octave_base_scale=2, scales_per_octave=2), coder=DeltaXYWH(), assigner=MaxIoUAssigner(.5, .4),
                 loss_cls=FocalLoss(), loss_bbox=L1Loss(), in_channels=C, feat_channels=C, stacked_convs=1)
    torch.manual_seed(0)
    return RetinaHead(K, **parts | kw)

def rpn(**kw):
    parts = dict(anchors=AnchorGenerator(STRIDES, scales=(2,)), coder=DeltaXYWH(), assigner=MaxIoUAssigner(.7, .3, .3), sampler=RandomSampler(32, .5),
                 loss_cls=BCELoss(), loss_bbox=L1Loss(), in_channels=C, feat_channels=C)
    torch.manual_seed(0)
    return RPNHead(**parts | kw)

def features(b=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, C, *m, generator=g).to(dtype) for m in MAPS]

BATCHES = {"objects": lambda: [objects(4), objects(2, 1)], "one image empty": lambda: [objects(3), objects(0)], "all empty": lambda: [objects(0), objects(0)],
           "all ignored": lambda: [objects(2, ignore=torch.ones(2, dtype=torch.bool)), objects(1, ignore=torch.ones(1, dtype=torch.bool))]}


# ---- assignment, sampling: against loops

def assign_by_loops(priors, gts, pos, neg, min_pos, low_quality, assign_all):
    "METHODS 3.5, word for word, with a matrix. IoU 0 claims nothing."
    lo, hi = neg if isinstance(neg, tuple) else (-1., neg)
    if not len(gts): return [0] * len(priors), [0] * len(priors)
    m = box_iou(priors, gts)
    label, index = [], []
    for row in m:
        best = row.max().item()
        label.append(1 if best >= pos else 0 if lo <= best < hi else 2); index.append(row.argmax().item())
    if low_quality:
        for g in range(len(gts)):
            best = m[:, g].max().item()
            if best <= 0 or best < min_pos: continue
            for a in (range(len(priors)) if assign_all else [m[:, g].argmax().item()]):
                if m[a, g].item() == best: label[a], index[a] = 1, g
    return label, [i if l == 1 else 0 for i, l in zip(index, label)]

@pytest.mark.parametrize("rule", [(.5, .4, 0., True, True), (.7, .3, .3, True, True), (.5, .5, .5, False, True), (.5, .5, 0., True, False), (.5, (.1, .5), 0., True, True)])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_assigner_is_the_written_rule(rule, n):
    pos, neg, min_pos, low, every = rule
    g = torch.Generator().manual_seed(n)
    priors, gts = boxes(120, 3).round(), boxes(n, 4).round()            # rounded: ties happen
    ignore, valid = torch.rand(n, generator=g) < .3, torch.rand(120, generator=g) < .8
    a = MaxIoUAssigner(pos, neg, min_pos, low, every)(priors, Instances(gts, ignore=ignore), valid)
    real, kept = (~ignore).nonzero().flatten(), valid.nonzero().flatten()
    label, index = assign_by_loops(priors[kept], gts[real], pos, neg, min_pos, low, every)
    assert a.label[kept].tolist() == label and (a.label[~valid] == 2).all()
    assert a.gt_index[kept].tolist() == [real[i].item() if l == 1 else 0 for i, l in zip(index, label)]

def test_ignored_regions_take_priors_away_before_anybody_claims_them():
    priors, o = boxes(200, 5), objects(6, 6, ignore=torch.tensor([True, False, True, False, False, False]))
    a = MaxIoUAssigner(.5, .4, ignore_iof=.5)(priors, o)
    inside = box_iof(priors, o.boxes[o.ignore]).amax(1) > .5
    b = MaxIoUAssigner(.5, .4)(priors, Instances(o.boxes[~o.ignore]), ~inside)
    assert inside.any() and torch.equal(a.label, b.label)
    assert torch.equal(o.boxes[a.gt_index[a.positive]], o.boxes[~o.ignore][b.gt_index[b.positive]])

def test_sampler_never_takes_what_it_must_not():
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        label = torch.randint(3, (int(torch.randint(1, 200, (), generator=g)),), generator=g, dtype=torch.int8)
        a = MaxIoUAssigner(.5, .4)(boxes(len(label)), objects(0)); a.label = label
        num, frac, cap = int(torch.randint(1, 100, (), generator=g)), torch.rand((), generator=g).item(), int(torch.randint(-1, 4, (), generator=g))
        s = RandomSampler(num, frac, cap)(a, g)
        p, n = int(a.positive.sum()), int(a.negative.sum())
        want = min(p, int(num * frac)); room = num - want
        if cap >= 0: room = min(room, cap * max(1, want))
        assert (len(s.pos), len(s.neg)) == (want, min(n, room))
        assert a.positive[s.pos].all() and a.negative[s.neg].all() and len(set(s.index.tolist())) == len(s) == len(s.index)

def test_coder_round_trip_float64():
    p, b = boxes(500, 1, dtype=torch.float64), boxes(500, 2, dtype=torch.float64)
    for coder in (DeltaXYWH(), DeltaXYWH((.1, 0, -.1, .2), (.1, .1, .2, .2))): torch.testing.assert_close(coder.decode(p, coder.encode(p, b)), b, rtol=1e-9, atol=1e-9)


# ---- losses

@pytest.mark.parametrize("make", [retina, rpn, lambda: retina(loss_bbox=GIoULoss(weight=2.)), lambda: rpn(loss_bbox=SmoothL1Loss(1/9), allowed_border=0)], ids=["retina", "rpn", "giou", "border"])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_parameter_has_a_gradient(make, batch):
    head = make()
    losses = head.losses(head(features()), BATCHES[batch](), SIZES)
    assert all(l.ndim == 0 and l.isfinite() for l in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())

@pytest.mark.parametrize("loss_bbox", [L1Loss(weight=3.), SmoothL1Loss(.11), GIoULoss(), IoULoss(), BoundedIoULoss(weight=10.)], ids=lambda l: type(l).__name__)
@pytest.mark.parametrize("make", [retina, rpn])
def test_shares_of_the_priors_add_up(make, loss_bbox):
    head, trace = make(loss_bbox=loss_bbox), Trace()
    torch.manual_seed(3)
    losses = head.losses(head(features()), BATCHES["objects"](), SIZES, trace)
    for name, key in ((head.cls_name, "loss_cls"), (head.box_name, "loss_bbox")):
        assert trace[key].shape == (2, sum(map(len, trace["priors"])))
        torch.testing.assert_close(trace[key].sum(), losses[name].detach(), rtol=1e-4, atol=1e-6)
    assert loss_bbox.reduction == "mean" and len(trace["assignments"]) == 2
    positive = torch.stack([a.positive for a in trace["assignments"]])
    assert not trace["loss_bbox"][~positive].any()
    if head.sampler is not None: assert not trace["loss_cls"][~torch.stack([s.mask for s in trace["sampled"]])].any()

def test_a_trace_changes_nothing():
    head, f = retina(), features()
    a, b = head.losses(head(f), BATCHES["objects"](), SIZES), head.losses(head(f), BATCHES["objects"](), SIZES, Trace())
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_the_padding_does_not_matter():
    head, f = retina(), features(1)
    raw = head(f)
    rough = {k: [m.clone() for m in v] for k, v in raw.items()}
    for v in rough.values():
        for m, s in zip(v, STRIDES): m[:, :, -(-50 // s):], m[..., -(-80 // s):] = 5., 5.
    a, b = head.losses(raw, [objects(3)], [(50, 80)]), head.losses(rough, [objects(3)], [(50, 80)])
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_batched_is_one_by_one():
    head = retina()
    raw, batch = head(features()), BATCHES["objects"]()
    one = lambda i: {k: [m[i:i+1] for m in v] for k, v in raw.items()}
    trace = Trace(); both = head.losses(raw, batch, SIZES, trace)
    n = [max(1, int(a.positive.sum())) for a in trace["assignments"]]
    alone = [head.losses(one(i), batch[i:i+1], SIZES[i:i+1]) for i in range(2)]
    for k in both: torch.testing.assert_close(both[k] * sum(n), sum(a[k] * m for a, m in zip(alone, n)))
    head.rule.score_threshold = .005
    found = head.predict(raw, SIZES)
    for i in range(2):
        f = head.predict(one(i), SIZES[i:i+1])[0]
        assert len(f) and all(torch.equal(f[k], found[i][k]) for k in ("boxes", "labels", "scores"))
        assert (f.boxes[:, 2] <= SIZES[i][1]).all() and (f.boxes[:, 3] <= SIZES[i][0]).all()


# ---- precision

@pytest.mark.parametrize("make", [retina, rpn])
def test_float64(make):
    head, single, batch = make().double(), make(), BATCHES["objects"]()
    torch.manual_seed(1); a = head.losses(head(features(dtype=torch.float64)), batch, SIZES)
    torch.manual_seed(1); b = single.losses(single(features()), batch, SIZES)
    for k in a:
        assert a[k].dtype == torch.float64
        torch.testing.assert_close(a[k].float(), b[k], rtol=1e-4, atol=1e-5)
    assert head.predict(head(features(dtype=torch.float64)), SIZES)[0].boxes.dtype == torch.float64

@pytest.mark.parametrize("make", [retina, rpn])
def test_autocast_computes_losses_and_boxes_in_float32(make):
    head, f, batch = make(), features(), BATCHES["objects"]()
    torch.manual_seed(1); want = head.losses(head(f), batch, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        raw = head(f)
        torch.manual_seed(1); got = head.losses(raw, batch, SIZES)
        found = head.predict(raw, SIZES)
    assert raw["cls"][0].dtype == torch.bfloat16
    for k in want:
        assert got[k].dtype == torch.float32
        torch.testing.assert_close(got[k], want[k], rtol=.03, atol=.01)
    assert found[0].boxes.dtype == found[0].scores.dtype == torch.float32
    sum(got.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


# ---- shapes, waiting, compilers

class NoWaiting(TorchDispatchMode):
    "Refuses what makes a program wait for the device, or a shape depend on numbers."
    refused = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "is_nonzero", "item")
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert not any(name == r or name.startswith("_unique") for r in self.refused), name
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]): raise AssertionError("index by a mask")
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize("make", [retina, rpn, lambda: retina(loss_bbox=GIoULoss(), assigner=MaxIoUAssigner(.5, .4, ignore_iof=.5), allowed_border=0)], ids=["retina", "rpn", "ignoring"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_training_step_never_waits(make, batch):
    head, f, batch = make(), features(), BATCHES[batch]()
    with NoWaiting(): sum(head.losses(head(f), batch, SIZES).values()).backward()
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting(): torch.ones(3).nonzero()

def any_number(batch): # one graph for all numbers of objects, also 0 and 1
    for o in batch:
        for v in (o.boxes, o.labels): torch._dynamo.decorators.mark_unbacked(v, 0)
    return batch

@pytest.mark.parametrize("make,backend", [(retina, "aot_eager"), (rpn, "eager")])
def test_forward_and_losses_compile_as_one_graph(make, backend):
    torch._dynamo.reset()
    head, f, graphs = make(), features(), []
    step = lambda f, batch, sizes: head.losses(head(f), batch, sizes)
    def count(gm, inputs):
        graphs.append(gm)
        return gm if backend == "eager" else torch._dynamo.lookup_backend(backend)(gm, inputs)
    fast = torch.compile(step, fullgraph=True, backend=count)
    for counts in ((4, 2), (1, 0), (0, 0), (9, 1)):
        batch = any_number([objects(n, i) for i, n in enumerate(counts)])
        torch.manual_seed(2); got = fast(f, batch, SIZES)
        torch.manual_seed(2); want = step(f, batch, SIZES)
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-5)
    sum(got.values()).backward()
    assert all(p.grad is not None for p in head.parameters()) and len(graphs) == 1

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ResNet(18); self.neck = FPN(self.backbone.channels, C, 3, start_level=1)
        self.head = retina()
    def forward(self, x): return self.head(self.neck(self.backbone(x)))

def test_the_dense_path_exports():
    net, x = Net().eval(), torch.randn(1, 3, *SIZE)
    program = torch.export.export(net, (x,))
    with torch.no_grad(): want, got = net(x), program.module()(x)
    for k in want:
        for a, b in zip(want[k], got[k]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    head, maps = net.head, [m.detach() for m in want["cls"]]
    torch.testing.assert_close(torch.export.export(Anchors(head), (maps,)).module()(maps), torch.cat(head.priors(maps)))

class Anchors(nn.Module): # anchors from the maps, as an exported program needs them
    def __init__(self, head): super().__init__(); self.head = head
    def forward(self, maps): return torch.cat(self.head.priors(maps))


# ---- from scores to detections

def test_strongest_is_topk():
    for seed, (a, k, n) in enumerate([(1, 1, 5), (50, 7, 3), (300, 80, 100), (300, 2, 1000), (0, 4, 3)]):
        s = torch.randn(a, k, generator=torch.Generator().manual_seed(seed))
        value, row, label = strongest(s, n)
        assert torch.equal(value, s.flatten().topk(min(n, s.numel())).values) and torch.equal(s[row, label], value)

def test_detections_are_the_written_rule():
    "METHODS 3.8 and 7.2: per level score > 0.05, the best pairs, NMS per class, the best hundred."
    g, size = torch.Generator().manual_seed(0), (64, 96)
    levels = [(torch.randn(n, K, generator=g) - 2, torch.randn(n, 4, generator=g) * .2, boxes(n, n)) for n in (300, 80)]
    rule = DetectionRule(.2, 40, .5, 12)
    got = dense_detections(levels, DeltaXYWH(), size, rule)
    pool = []
    for s, d, p in levels:
        b = DeltaXYWH().decode(p, d, size)
        pairs = sorted(((s[i, c].sigmoid().item(), c, b[i]) for i in range(len(s)) for c in range(K)), key=lambda x: -x[0])[:40]
        pool += [x for x in pairs if x[0] > .2]
    kept = []
    for score, c, box in sorted(pool, key=lambda x: -x[0]):
        if all(c != o[1] or box_iou(box[None], o[2][None]).item() <= .5 for o in kept): kept.append((score, c, box))
    kept = kept[:12]
    torch.testing.assert_close(got.scores, torch.tensor([k[0] for k in kept])); assert got.labels.tolist() == [k[1] for k in kept]
    torch.testing.assert_close(got.boxes, torch.stack([k[2] for k in kept]))

def test_an_image_smaller_than_a_cell():
    head, p = retina(rule=DetectionRule(0., 100, .5, 10)), rpn()
    f = [torch.randn(1, C, 1, 1) for _ in STRIDES]
    for h in (head, p):
        sum(h.losses(h(f), [Instances(torch.tensor([[0., 0, 1, 1]]), torch.tensor([0]))], [(1, 1)]).values()).backward()
        assert all(q.grad is not None for q in h.parameters())
    assert (head.predict(head(f), [(1, 1)])[0].boxes <= 1).all() and len(p.propose(p(f), [(1, 1)], ProposalRule())[0]) <= 9

def test_memory_is_bounded():
    "3,000 ignored regions against 20,000 priors: with matrices as a whole this takes 2 GB, in pieces less than a quarter of one."
    import resource
    o = Instances(boxes(3000, 1, (800, 1300)), ignore=torch.ones(3000, dtype=torch.bool))
    priors = boxes(20_000, 2, (800, 1300))
    from notebook_det.priors.assigners import share_inside
    share_inside(priors[:2000], o.boxes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    share = share_inside(priors, o.boxes)
    assert share.shape == (20_000,) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


# ---- copies

@pytest.mark.parametrize("make", [retina, rpn])
def test_copies_are_equal_and_independent(make):
    head, f = make(), features()
    want = head.predict(head(f), SIZES)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        got = other.predict(other(f), SIZES)
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(want, got))
        rule = "rule" if hasattr(other, "rule") else "test_rule"
        getattr(other, rule).iou_threshold = .123
        assert getattr(head, rule).iou_threshold != .123 and getattr(make(), rule).iou_threshold != .123
    for part in (head.anchors, head.coder, head.assigner): assert vars(pickle.loads(pickle.dumps(part))) == vars(copy.deepcopy(part)) == vars(part)
