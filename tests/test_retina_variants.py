"""GHM, guided anchors and the balanced pyramid against the plainest way to write them, and in the places where they are used."""
import copy
import pytest, torch
from test_dense import BATCHES, C, K, MAPS, SIZES, STRIDES, NoWaiting, any_number, boxes, features, objects, retina
from notebook_det.dense_heads.guided import GARPNHead, GARetinaHead, Guide, location_targets
from notebook_det.foundations.recipes import build
from notebook_det.foundations.structures import Assignment, Instances, Trace
from notebook_det.losses.classification import BCELoss, FocalLoss
from notebook_det.losses.ghm import GHMCLoss, GHMRLoss
from notebook_det.losses.regression import BalancedL1Loss, BoundedIoULoss, SmoothL1Loss
from notebook_det.necks.bfp import BFP, NonLocal
from notebook_det.ops.boxes import box_iou
from notebook_det.ops.detections import ProposalRule
from notebook_det.priors.anchors import AnchorGenerator
from notebook_det.priors.assigners import ApproxMaxIoUAssigner, MaxIoUAssigner
from notebook_det.priors.coders import DeltaXYWH
from notebook_det.priors.samplers import BalancedSampler, RandomSampler
from notebook_det.zoo import recipes as zoo, retina_variants


def guide(**kw):
    squares, approxs = AnchorGenerator(STRIDES, (1.,), (2.,)), AnchorGenerator(STRIDES, octave_base_scale=2, scales_per_octave=3)
    return Guide(squares, approxs, DeltaXYWH(max_ratio=1e6), ApproxMaxIoUAssigner(.5, .4, .4), RandomSampler(64, .5), FocalLoss(), BoundedIoULoss(), **kw)

def ga_retina(**kw):
    torch.manual_seed(0)
    return GARetinaHead(K, guide(**kw), DeltaXYWH(), MaxIoUAssigner(.5, .5), FocalLoss(), SmoothL1Loss(.04), in_channels=C, feat_channels=C, stacked_convs=1)

def ga_rpn(**kw):
    torch.manual_seed(0)
    return GARPNHead(guide(**kw), DeltaXYWH(), MaxIoUAssigner(.7, .3, .3), RandomSampler(64, .5), BCELoss(), SmoothL1Loss(), in_channels=C, feat_channels=C)

def ghm(**kw): return retina(loss_cls=GHMCLoss(), loss_bbox=GHMRLoss(), **kw)

HEADS = dict(ghm=ghm, ga_retina=ga_retina, ga_rpn=ga_rpn)


# ---- GHM

def ghm_by_loops(elements, g, take, bins, momentum, acc):
    "METHODS 3.7, bin by bin; the counts in `acc` move on."
    weight, n = torch.zeros_like(g), 0
    for i in range(bins):
        here = (g >= i / bins) & ((g < (i + 1) / bins) | (i == bins - 1)) & take
        if not here.any(): continue
        n += 1
        acc[i] = momentum * acc[i] + (1 - momentum) * here.sum()
        weight[here] = 1 / acc[i]
    return (elements * weight).sum() / max(n, 1)

@pytest.mark.parametrize("momentum", [0., .75])
def test_ghm_is_the_written_rule(momentum):
    torch.manual_seed(0)
    loss, acc, box, box_acc = GHMCLoss(30, momentum), torch.zeros(30), GHMRLoss(.02, 10, momentum), torch.zeros(10)
    for step in range(4):
        logits, target, w = torch.randn(50, K) * 3, torch.randint(K + 1, (50,)), (torch.rand(50) > .3).float()
        truth = (target[:, None] == torch.arange(K)).float()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        want = ghm_by_loops(bce, (logits.sigmoid() - truth).abs(), (w[:, None] > 0).expand(50, K), 30, momentum, acc)
        torch.testing.assert_close(loss(logits, target, w), want)
        torch.testing.assert_close(GHMCLoss(30, 0)(logits, target, w), GHMCLoss(30, 0)(logits, truth, w))
        d = torch.randn(50, 4) * .1
        asl = (d**2 + .02**2).sqrt() - .02
        want = ghm_by_loops(asl, d.abs() / (d**2 + .02**2).sqrt(), (w[:, None] > 0).expand(50, 4), 10, momentum, box_acc)
        torch.testing.assert_close(box(d, torch.zeros(50, 4), w), 10 * want)
    if momentum: assert torch.equal(loss.acc_sum, acc) and torch.equal(box.acc_sum, box_acc)

def test_ghm_by_hand():
    loss = GHMCLoss(10, 0.)(torch.tensor([[-2., 1], [.5, 3]]), torch.tensor([[0., 1], [1, 0]]))   # METHODS 14: each in a bin of its own
    assert loss.item() == pytest.approx(.990714, abs=1e-6)

@pytest.mark.parametrize("training", [True, False])
def test_ghm_remembers_in_training_only_and_says_the_same_in_both_modes(training):
    head, f, batch = ghm().train(training), features(), BATCHES["objects"]()
    other = copy.deepcopy(head).train(not training)
    for _ in range(2):
        before = [b.clone() for b in head.buffers()]
        trace = Trace()
        watched, plain, mirrored = copy.deepcopy(head).losses(head(f), batch, SIZES, trace), head.losses(head(f), batch, SIZES), other.losses(head(f), batch, SIZES)
        for k in plain: assert torch.equal(plain[k], watched[k]) and torch.equal(plain[k], mirrored[k])
        for k in ("loss_cls", "loss_bbox"): torch.testing.assert_close(trace[k].sum(), plain[k].detach(), rtol=1e-4, atol=1e-6)
        assert any(not torch.equal(a, b) for a, b in zip(before, head.buffers())) == training
        other.load_state_dict(head.state_dict())

def test_ghm_does_not_look_at_avg_factor():
    x, t = torch.randn(5, K), torch.randint(K + 1, (5,))
    assert torch.equal(GHMCLoss(10, 0)(x, t), GHMCLoss(10, 0)(x, t, avg_factor=7.))
    with pytest.raises(ValueError, match="momentum must be"): GHMCLoss(10, 1.)


# ---- balanced L1 (METHODS 14)

@pytest.mark.parametrize("beta,rows", [(1., {.1: .03135, .5: .40057, 1.: 1.07859, 2.: 2.57859}), (.11, {.05: .09120, .11: .18859, .5: .77359})])
def test_balanced_l1_by_hand(beta, rows):
    d = torch.tensor([[*rows]])
    torch.testing.assert_close(BalancedL1Loss(beta=beta, reduction="none")(d, 0*d), torch.tensor([[*rows.values()]]), rtol=0, atol=1e-5)


# ---- guided anchors

def places_by_loops(gts, maps, strides, smallest, centre=.2, surround=.5):
    "METHODS 7.7 with slices; where regions meet, the centre wins over the surroundings (section 3.2 of the paper)."
    there, near = ([torch.zeros(m, dtype=torch.bool) for m in maps] for _ in range(2))
    for x1, y1, x2, y2 in gts.tolist():
        level = int(torch.tensor((((x2-x1)*(y2-y1))**.5 / smallest)).log2().add(.5).floor().clamp(0, len(maps) - 1))
        for l in range(len(maps)):
            for ratio, grid, on in ((centre, there, l == level), (surround, near, abs(l - level) <= 1)):
                r, s = (1 - ratio) / 2, strides[l]
                a, b, c, d = (round(v) for v in (((1-r)*x1 + r*x2)/s, ((1-r)*y1 + r*y2)/s, (r*x1 + (1-r)*x2)/s, (r*y1 + (1-r)*y2)/s))
                if on: grid[l][b:d+1, a:c+1] = True
    weight = [torch.where(t, 1., torch.where(n, 0., .1)) for t, n in zip(there, near)]
    return [torch.cat([m.flatten() for m in v]) for v in (there, weight)]

@pytest.mark.parametrize("seed,n", [(0, 1), (1, 4), (2, 12), (3, 0)])
def test_places_are_the_written_rule(seed, n):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=g) * 60; gts = torch.cat([xy, xy + 5 + torch.rand(n, 2, generator=g) * 90], 1)
    maps = [(20, 22), (10, 11), (5, 6)]
    for got, want in zip(location_targets(Instances(gts), maps, STRIDES, 16.), places_by_loops(gts, maps, STRIDES, 16.)): assert torch.equal(got, want)

def test_the_location_branch_learns_the_right_way_round():
    head = ga_retina()
    f, batch, trace = features(), BATCHES["objects"](), Trace()
    head.losses(head(f), batch, SIZES, trace)
    there = trace["there"].split([h*w for h, w in MAPS], 1)
    def loss(sign): # raw maps that say "here" exactly where an anchor should be, or exactly where not
        raw = {**head(f), "loc": [sign * (t.view(2, 1, *m) * 8. - 4) for t, m in zip(there, MAPS)]}
        torch.manual_seed(0); return head.losses(raw, batch, SIZES)["loss_loc"].item()
    assert loss(1) < .01 * loss(-1)

def test_unlikely_places_are_left_out():
    head, rpn = ga_retina(threshold=.5).eval(), ga_rpn(threshold=.5).eval()
    raw = {**head(features()), "loc": [torch.full((2, 1, *m), -9.) for m in MAPS]}
    head.rule.score_threshold = 0.
    assert [len(f) for f in head.predict(raw, SIZES)] == [0, 0]
    raw["loc"][1][0, 0, 2, 3] = 9.
    assert [len(f) > 0 for f in head.predict(raw, SIZES)] == [True, False] and len(head.predict(raw, SIZES)[0]) <= K
    raw = {**rpn(features()), "loc": raw["loc"]}
    assert [len(p) for p in rpn.propose(raw, SIZES, rpn.test_rule)] == [1, 0]
    assert all(len(p) > 20 for p in rpn.propose(raw, SIZES, rpn.train_rule))                   # … but not while training

def test_anchors_are_stretched_squares():
    head = ga_retina()
    raw = head(features())
    for shape, square, made in zip(raw["shape"], head.priors(raw["cls"]), head.starts(raw)):
        s = shape.permute(0, 2, 3, 1).reshape(2, -1, 2)
        centre, side = (square[:, :2] + square[:, 2:]) / 2, square[:, 2:] - square[:, :2]
        torch.testing.assert_close(made, torch.cat([centre - side * s.exp() / 2, centre + side * s.exp() / 2], -1).detach())
        assert not made.requires_grad


# ---- shapes, waiting, compilers

@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_training_step_never_waits_and_reaches_every_parameter(name, batch):
    head, f, batch = HEADS[name](), features(), BATCHES[batch]()
    with NoWaiting():
        losses = head.losses(head(f), batch, SIZES)
        sum(losses.values()).backward()
    assert all(l.ndim == 0 and l.isfinite() for l in losses.values())
    assert [k for k, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

@pytest.mark.parametrize("name", ["ghm", "ga_retina"])
def test_forward_and_losses_compile_as_one_graph(name):
    torch._dynamo.reset()
    head, f, graphs = HEADS[name](), features(), []
    step = lambda f, batch, sizes: head.losses(head(f), batch, sizes)
    def count(gm, inputs): graphs.append(gm); return gm
    fast, start = torch.compile(step, fullgraph=True, backend=count), copy.deepcopy(head.state_dict())
    for counts in ((4, 2), (1, 0)):
        batch = any_number([objects(n, i) for i, n in enumerate(counts)])
        head.load_state_dict(start); torch.manual_seed(2); got, after = fast(f, batch, SIZES), [b.clone() for b in head.buffers()]
        head.load_state_dict(start); torch.manual_seed(2); want = step(f, batch, SIZES)
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(after, head.buffers()))
    assert len(graphs) == 1

@pytest.mark.parametrize("name", ["ga_retina", "ga_rpn"])
def test_precision(name):
    head, double, f, batch = HEADS[name](), HEADS[name]().double(), features(), BATCHES["objects"]()
    torch.manual_seed(1); want = head.losses(head(f), batch, SIZES)
    torch.manual_seed(1); high = double.losses(double([x.double() for x in f]), batch, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        raw = head(f); torch.manual_seed(1); low = head.losses(raw, batch, SIZES)
        assert head.predict(raw, SIZES)[0].boxes.dtype == torch.float32
    for k in want:
        assert high[k].dtype == torch.float64 and low[k].dtype == torch.float32
        torch.testing.assert_close(high[k].float(), want[k], rtol=1e-3, atol=1e-4); torch.testing.assert_close(low[k], want[k], rtol=.05, atol=.02)


# ---- the balanced pyramid

def test_the_balanced_pyramid_is_the_written_rule():
    torch.manual_seed(0)
    bfp, levels = BFP(8, 4, 1), [torch.randn(2, 8, *s) for s in ((17, 22), (9, 11), (5, 6), (3, 3))]
    torch.nn.init.normal_(bfp.refine.conv_out.conv.weight)
    up, down, r = torch.nn.functional.interpolate, torch.nn.functional.adaptive_max_pool2d, bfp.refine
    mean = (down(levels[0], (9, 11)) + levels[1] + up(levels[2], (9, 11)) + up(levels[3], (9, 11))) / 4
    g, theta, phi = (m(mean).flatten(2) for m in (r.g, r.theta, r.phi))                          # [B,C,n]
    y = mean + r.conv_out(torch.einsum("bcj,bij->bci", g, torch.einsum("bci,bcj->bij", theta, phi).softmax(-1)).view(mean.shape))
    want = [levels[0] + up(y, (17, 22)), levels[1] + y, levels[2] + down(y, (5, 6)), levels[3] + down(y, (3, 3))]
    for a, b in zip(bfp(levels), want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes 4 levels, got 3"): bfp(levels[:3])
    with pytest.raises(ValueError, match="refine_level 4 does not exist"): BFP(8, 4, 4)
    x = torch.randn(1, 8, 4, 5)
    assert torch.equal(NonLocal(8)(x), x)                                                        # starts as if it were not there


# ---- balanced samples (METHODS 3.6)

def test_balanced_samples_follow_the_quotas():
    g = torch.Generator().manual_seed(0)
    for trial in range(20):
        n = int(torch.randint(50, 400, (1,), generator=g))
        iou = torch.rand(n, generator=g) * .9 * (torch.rand(n, generator=g) > .3)
        label = torch.where(iou >= .5, 1, 0).to(torch.int8)
        a = Assignment(torch.where(label == 1, torch.randint(4, (n,), generator=g), 0), label, iou)
        s = BalancedSampler(64, .25)(a, g)
        assert not (s.positive & ~a.positive).any() and not (s.negative & ~a.negative).any()
        pos = min(16, int(a.positive.sum())); room = 64 - pos
        assert (int(s.positive.sum()), int(s.negative.sum())) == (pos, min(room, int(a.negative.sum())))
        there = a.gt_index[a.positive].bincount(minlength=4); taken = a.gt_index[s.pos].bincount(minlength=4); quota = round(16 / int((there > 0).sum())) + 1
        if int(a.positive.sum()) > 16: assert all(t <= max(quota, 16 - sum(min(quota, int(x)) for x in there) + quota) for t in taken.tolist())
        width, hard = float(iou.max()) / 3, a.negative & (iou > 0)
        if int(hard.sum()) > room:
            assert (iou[s.neg] > 0).all()
            for b in range(3):
                inside = hard & ((iou / width).long().clamp(max=2) == b)
                assert int((s.negative & inside).sum()) >= min(room // 3, int(inside.sum()))
    assert torch.equal(BalancedSampler(64, .25)(a, torch.Generator().manual_seed(3)).index, BalancedSampler(64, .25)(a, torch.Generator().manual_seed(3)).index)


# ---- in two stages

def test_parts_serve_a_second_stage():
    "A Faster R-CNN whose proposals come from guided anchors, on a balanced pyramid."
    recipe = zoo.faster_rcnn(zoo.mobilenet_v2(), K, out_channels=32)
    recipe.rpn_head, recipe.neck = retina_variants.ga_rpn_head(32), retina_variants.balanced(recipe.neck, 2)
    torch.manual_seed(0)
    model = build(recipe)
    pictures, targets = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)] * 2, BATCHES["objects"]()
    losses = model(pictures, targets)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_anchor_loc", "loss_anchor_shape", "loss_cls", "loss_bbox"}
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == [] and len(model.eval()(pictures)) == 2
