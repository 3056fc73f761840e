"""Double-Head, Mask Scoring and Grid R-CNN against the plainest way to write their rules, and with whatever may be missing."""
import random
from functools import partial
import numpy as np
import pytest, torch
from test_roi_heads import H, K, W, Watch, around, boxes, features, objects
from notebook_det.backbones.resnet import Bottleneck
from notebook_det.detectors.tta import predict_views
from notebook_det.evaluation.coco import CocoEvaluator, index_coco
from notebook_det.foundations.recipes import build
from notebook_det.foundations.structures import Instances, Trace
from notebook_det.layers.norm import group_norm
from notebook_det.losses.classification import BCELoss, CrossEntropyLoss
from notebook_det.losses.masks import MaskLoss
from notebook_det.losses.regression import L1Loss, MSELoss, SmoothL1Loss
from notebook_det.ops.boxes import clip_boxes
from notebook_det.ops.masks import encode_rle, paste_masks
from notebook_det.priors.assigners import MaxIoUAssigner
from notebook_det.priors.coders import DeltaXYWH
from notebook_det.priors.samplers import RandomSampler
from notebook_det.roi_heads.bbox import BBoxHead, bbox_detections
from notebook_det.roi_heads.double import DoubleHead, DoubleRoIHead
from notebook_det.roi_heads.extractors import RoIExtractor, enlarged
from notebook_det.roi_heads.grid import GridHead, GridRoIHead, boxes_of, grid_targets, neighbours, shake, starts
from notebook_det.roi_heads.mask import MaskHead, mask_targets
from notebook_det.roi_heads.mask_scoring import MaskIoUHead, MaskScoringRoIHead, mask_iou_losses, real_iou, share_inside
from notebook_det.roi_heads.standard import RoISamples, StandardRoIHead
from notebook_det.zoo import recipes as zoo, roi_variants

CODER = DeltaXYWH(stds=(.1, .1, .2, .2))


def parts(low_quality=False, num=32): return dict(bbox_roi_extractor=RoIExtractor(7, (4, 8)), assigner=MaxIoUAssigner(.5, .5, .5, low_quality), sampler=RandomSampler(num, .25, add_gt=True))

def plain(**kw): return BBoxHead(K, CODER, CrossEntropyLoss(), in_channels=4, roi_size=7, fc_channels=16, **(dict(loss_bbox=L1Loss()) | kw))

def double(enlarge=1.3, **kw):
    torch.manual_seed(0)
    head = DoubleHead(K, CODER, CrossEntropyLoss(2.), SmoothL1Loss(weight=2.), partial(Bottleneck, planes=4), 4, num_blocks=2, conv_channels=16, fc_channels=16, enlarge=enlarge)
    return DoubleRoIHead(bbox_head=head, **(parts() | kw))

def scoring(**kw):
    torch.manual_seed(0)
    mask = dict(mask_roi_extractor=RoIExtractor(14, (4, 8)), mask_head=MaskHead(K, MaskLoss(), 4, 1, 8))
    return MaskScoringRoIHead(MaskIoUHead(K, MSELoss(.5), 4, num_convs=2, conv_channels=8, fc_channels=16), bbox_head=plain(), **(parts(True) | mask | kw))

def grid(max_rois=192, side=3, **kw):
    torch.manual_seed(0)
    head = GridHead(BCELoss(15.), 4, side, 4, num_convs=2, max_rois=max_rois, norm=partial(group_norm, groups=side**2))
    return GridRoIHead(RoIExtractor(14, (4, 8)), head, bbox_head=plain(loss_bbox=None), **(parts(True) | kw))

HEADS = dict(double=double, scoring=scoring, grid=grid)


# ---- all three

@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_anything_may_be_missing(make):
    "Fifteen batches of 0 … 4 objects and 0 … 20 proposals an image, some ignored, some proposals without area."
    dice, g, h = random.Random(0), torch.Generator().manual_seed(3), make().train()
    for _ in range(15):
        o = [objects(dice.choice([0, 0, 1, 4]), g) for _ in range(2)]
        o = [x.copy(ignore=torch.rand(len(x), generator=g) < .3) if dice.random() < .3 else x for x in o]
        p = [torch.cat([boxes(dice.choice([0, 0, 1, 20]), g), around(x, dice.choice([0, 2]), g)]) for x in o]
        for x in p:
            if len(x) and dice.random() < .3: x[0, 2:] = x[0, :2]
        p, maps = [Instances(x, size=(H, W)) for x in p], features(2, g)
        h.zero_grad()
        losses = h.losses(maps, p, o, Trace())
        assert all(v.isfinite() and v.ndim == 0 for v in losses.values())
        sum(losses.values()).backward()
        assert all(q.grad is not None and q.grad.isfinite().all() for q in h.parameters())
        h.rule.score_threshold = .2
        for d in h.predict(maps, p, [(H, W)] * 2):
            assert (d.boxes >= 0).all() and (d.boxes <= torch.tensor([W, H, W, H])).all() and d.scores.isfinite().all()


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_seeds_watching_and_autocast(make):
    g, h = torch.Generator().manual_seed(5), make().eval()
    o, maps = [objects(3, g)], features(1, g)
    p = [Instances(torch.cat([boxes(30, g), around(o[0], 8, g)]), size=(H, W))]
    runs = []
    for trace in (None, Trace()): torch.manual_seed(7); runs.append(h.losses(maps, p, o, trace))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    with torch.autocast("cpu", torch.bfloat16): losses, found = h.losses(maps, p, o), h.predict(maps, p, [(H, W)])[0]
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values()) and found.boxes.dtype == found.scores.dtype == torch.float32


# ---- two heads

def test_the_convolutions_see_more_from_the_same_level():
    g, ex = torch.Generator().manual_seed(0), RoIExtractor(7, (4, 8), finest_scale=20)
    maps, b = features(1, g), torch.tensor([[10., 10, 48, 48], [10, 10, 51, 51], [60, 20, 61, 90]])
    assert ex.level(b).tolist() == [0, 1, 0] and ex.level(enlarged(b, 1.3)).tolist() == [1, 1, 0]
    wide = ex(maps, [b], enlarge=1.3)
    for i, level in enumerate(ex.level(b)):
        one = RoIExtractor(7, ((4, 8)[level],))([maps[level]], [enlarged(b[i:i+1], 1.3)])
        torch.testing.assert_close(wide[i:i+1], one)
    assert torch.equal(ex(maps, [b], enlarge=1), ex(maps, [b]))
    torch.testing.assert_close(enlarged(b, 1.3)[0], torch.tensor([4.3, 4.3, 53.7, 53.7]))

def test_each_branch_has_its_own_question():
    h = double().bbox_head.eval()
    g = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(5, 4, 7, 7, generator=g) for _ in range(3))
    one, other, third = h(a, b), h(a, c), h(c, b)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], third[1]) and not torch.equal(one[1], other[1]) and not torch.equal(one[0], third[0])
    turned = h(a.flip(-1), b)
    assert not torch.allclose(turned[0], one[0])                               # linear layers know left from right

def test_batch_norms_of_the_head_live():
    g, h = torch.Generator().manual_seed(2), double()
    o, maps = [objects(3, g)], features(1, g)
    p, before = [Instances(around(o[0], 6, g), size=(H, W))], {k: v.clone() for k, v in h.named_buffers()}
    h.eval().losses(maps, p, o)
    assert all(torch.equal(before[k], v) for k, v in h.named_buffers())
    h.train().losses(maps, p, o)
    assert all(not torch.equal(before[k], v) for k, v in h.named_buffers())
    h.losses(maps, [Instances(torch.zeros(0, 4), size=(H, W))], [o[0][:0]])                         # nothing to take statistics of
    assert all(v.isfinite().all() for v in h.buffers())


# ---- masks that are graded

def masks_and_boxes(seed, n=12, h=40, w=50):
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, h, w, generator=g) < .4
    return masks, boxes(n, g, h, w) + torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)

@pytest.mark.parametrize("chunk", [1, 4000, 2**24])
def test_share_inside_is_counting(chunk):
    masks, b, which = masks_and_boxes(0)
    b = torch.cat([b, torch.tensor([[-9., -9, 3, 3], [45, 35, 90, 90], [50, 40, 60, 60], [7.9, 7.9, 7.95, 7.95], [-1e4, -5, 1e4, 1e4]])]); which = torch.cat([which, torch.tensor([0, 1, 2, 0, 1])])
    want = []
    for (x1, y1, x2, y2), i in zip(b.tolist(), which.tolist()):
        x1, x2 = (min(max(int(v), 0), 50) for v in (x1, x2)); y1, y2 = (min(max(int(v), 0), 40) for v in (y1, y2))
        want.append(masks[i, y1:y1 + max(y2 - y1, 1), x1:x1 + max(x2 - x1, 1)].sum() / masks[i].sum())
    torch.testing.assert_close(share_inside(masks, b, which, chunk), torch.stack(want))
    assert share_inside(masks[:0], b[:0], which[:0]).shape == (0,) and share_inside(torch.zeros(3, 4, 4, dtype=torch.bool), b, which).sum() == 0

def test_masks_are_never_gathered():
    "192 boxes on two masks of a megapixel: three tables of the masks, not 192 copies."
    masks, b = torch.ones(2, 1000, 1000, dtype=torch.bool), torch.tensor([[100., 100, 600, 700]]).repeat(192, 1)
    with Watch() as watch: share = share_inside(masks, b, torch.arange(192) % 2)
    assert watch.largest <= 2 * 1001 * 1001 and torch.allclose(share, torch.tensor(.3))

def test_the_real_iou_counts_what_the_box_cuts_off():
    "Against masks at full size: a disc, seen through boxes that cut it, drawn as well as 28 × 28 cells can."
    y, x = torch.arange(120)[:, None] + .5, torch.arange(140)[None] + .5
    disc = ((x - 70)**2 + (y - 60)**2 < 45**2)[None]
    b = torch.tensor([[25., 15, 115, 105], [25, 15, 70, 105], [40, 20, 130, 90], [0, 0, 140, 120]])
    s = RoISamples(b, torch.zeros(4, dtype=torch.long), b, torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool))
    target = mask_targets([s], [Instances(b[:1], masks=disc)], 28)
    got = real_iou((target - .5) * 9, target, share_inside(disc, b, s.gt_index))
    drawn = paste_masks(target, b, (120, 140))
    want = (drawn & disc).flatten(1).sum(1) / (drawn | disc).flatten(1).sum(1)
    torch.testing.assert_close(got, want, rtol=0, atol=.06)
    assert got[1] < .55 and got[0] > .95
    assert real_iou(torch.full((1, 4, 4), -9.), torch.zeros(1, 4, 4), torch.zeros(1)).item() == 0.         # nothing drawn, nothing there

def test_the_loss_is_the_written_rule():
    "METHODS 8.4: mean squared error over those whose real IoU is above zero, times a half; the threshold is on the logit."
    g = torch.Generator().manual_seed(3)
    h, o = scoring(), objects(3, g)
    roi = around(o, 3, g); n = len(roi); who = torch.arange(3).repeat(4)[:n]
    s = RoISamples(roi, o.labels[who], o.boxes[who], who, torch.zeros(n, dtype=torch.bool))
    x, logits = torch.randn(n, 4, 14, 14, generator=g), torch.randn(n, K, 28, 28, generator=g)
    logits[0] = -5.                                                            # draws nothing: not learnt
    target = mask_targets([s], [o], 28)
    got = mask_iou_losses(h.mask_iou_head, x, logits, target, [s], [o])["loss_mask_iou"]
    share, errors = share_inside(o.masks, roi, who), []
    for i in range(n):
        drawn, t = logits[i, s.labels[i]] > .5, target[i] > 0
        both = (drawn & t).sum(); real = both / (drawn.sum() + t.sum() / share[i] - both)
        guess = h.mask_iou_head(x[i:i+1], logits[i:i+1, s.labels[i]])[0, s.labels[i]]
        if real > 0: errors.append((guess - real)**2)
    assert len(errors) == n - 1
    torch.testing.assert_close(got, .5 * torch.stack(errors).mean())

def test_scores_are_for_masks_and_boxes_keep_theirs():
    g, h = torch.Generator().manual_seed(4), scoring(); h.rule.score_threshold = .2
    std = StandardRoIHead(h.bbox_roi_extractor, h.bbox_head, h.assigner, h.sampler, h.mask_roi_extractor, h.mask_head, rule=h.rule)
    maps, p = features(2, g), [Instances(boxes(20, g)) for _ in range(2)]
    t = Trace()
    for got, want in zip(h.predict(maps, p, [(H, W)] * 2, [(2*H, 2*W)] * 2, t), std.predict(maps, p, [(H, W)] * 2, [(2*H, 2*W)] * 2)):
        assert torch.equal(got.boxes, want.boxes) and torch.equal(got.masks, want.masks) and torch.equal(got.box_scores, want.scores) and len(got)
        assert not torch.equal(got.scores, want.scores)
    x = h.roi_features(maps, [d.boxes for d in t["detections"]], h.mask_roi_extractor)
    labels = torch.cat([d.labels for d in t["detections"]]); rows = torch.arange(len(labels))
    guess = h.mask_iou_head(x, h.mask_head(x)[rows, labels])[rows, labels]
    found, _ = h.complete(maps, t["detections"])
    torch.testing.assert_close(torch.cat([f.scores for f in found]), torch.cat([d.scores for d in t["detections"]]) * guess)

def test_boxes_are_evaluated_by_the_class_masks_by_their_grade():
    "Two boxes, one right: by the class's score it comes first, by the mask's last."
    right = torch.zeros(40, 40, dtype=torch.bool); right[:20, :20] = True
    truth = index_coco([{"id": 0, "height": 40, "width": 40}], [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0, "segmentation": encode_rle(right)}], [{"id": 1, "name": "cell"}])
    e = CocoEvaluator(truth, kinds=("bbox", "segm"))
    e.update([0], [Instances(torch.tensor([[0., 0, 20, 20], [20, 20, 40, 40]]), torch.zeros(2, dtype=torch.long), torch.tensor([.1, .6]), torch.stack([right, right.flip(0, 1)]), box_scores=torch.tensor([.9, .8]))])
    out = e.compute()
    assert out["bbox/AP"] == pytest.approx(1.) and out["segm/AP"] == pytest.approx(.5)

def test_heads_must_agree_about_classes():
    r = roi_variants.ms_rcnn(zoo.mobilenet_v2(), K, out_channels=32); r.roi_head.mask_iou_head.num_classes = 5
    with pytest.raises(ValueError, match="the mask head knows 3 classes, the mask IoU head 5"): build(r)


# ---- grid points

def test_neighbours():
    assert neighbours(3) == [[1, 3], [0, 2, 4], [1, 5], [0, 4, 6], [1, 3, 5, 7], [2, 4, 8], [3, 7], [4, 6, 8], [5, 7]]
    assert [len(n) for n in neighbours(2)] == [2] * 4 and starts(3, 28).tolist() == [0, 14, 28]

def targets_by_loops(b, gts, side=3, cells=28, radius=1):
    "METHODS 8.5, point by point."
    whole, out = 2 * cells, torch.zeros(len(b), side**2, cells, cells)
    for r, ((x1, y1, x2, y2), gt) in enumerate(zip(b, gts)):
        w, h = x2 - x1, y2 - y1
        x1, y1, w, h = x1 - w/2, y1 - h/2, 2*w, 2*h
        if w <= side or h <= side: continue
        for i in range(side):
            for j in range(side):
                fx, fy = 1 - i/(side-1), 1 - j/(side-1)
                cx = int((fx*gt[0] + (1-fx)*gt[2] - x1) / w * whole); cy = int((fy*gt[1] + (1-fy)*gt[3] - y1) / h * whole)
                for x in range(cx - radius, cx + radius + 1):
                    for y in range(cy - radius, cy + radius + 1):
                        u, v = x - round(i * cells / (side-1)), y - round(j * cells / (side-1))
                        if 0 <= x < whole and 0 <= y < whole and 0 <= u < cells and 0 <= v < cells and (x-cx)**2 + (y-cy)**2 <= radius**2: out[r, i*side + j, v, u] = 1
    return out

@pytest.mark.parametrize("side,radius", [(3, 1), (3, 2), (2, 1)])
def test_targets_are_the_written_rule(side, radius):
    g = torch.Generator().manual_seed(side)
    gts = boxes(12, g); b = gts + torch.randn(12, 4, generator=g) * 8
    b = torch.cat([b[(b[:, 2:] > b[:, :2] + 2).all(1)], torch.tensor([[5., 5, 6, 50], [5, 5, 5, 5]])]); gts = gts[torch.arange(len(b)) % 12]
    assert torch.equal(grid_targets(b, gts, side, 28, radius), targets_by_loops(b, gts, side, 28, radius))

def test_boxes_come_back_from_their_points():
    "Half a cell is lost at most: a 28th of the box a side."
    g = torch.Generator().manual_seed(1)
    gts = boxes(20, g, least=20.); wh = (gts[:, 2:] - gts[:, :2]).repeat(1, 2)
    b = gts + (torch.rand(20, 4, generator=g) - .5) * .3 * wh
    sharp = (grid_targets(b, gts, radius=0) - .5) * 20
    got = boxes_of(sharp, b)
    assert ((got - gts).abs() <= .51 / 28 * (b[:, 2:] - b[:, :2]).repeat(1, 2)).all()

def boxes_by_loops(logits, b):
    out = []
    for p, (x1, y1, x2, y2) in zip(logits.sigmoid(), b):
        w, h, at = x2 - x1, y2 - y1, []
        for k in range(9):
            row, col = divmod(p[k].argmax().item(), 28)
            at.append((p[k].max(), (col + (k // 3) * 14 + .5) / 28 * w + x1 - w/2, (row + (k % 3) * 14 + .5) / 28 * h + y1 - h/2))
        mean = lambda ks, c: sum(at[k][0] * at[k][c] for k in ks) / sum(at[k][0] for k in ks)
        out.append(torch.stack([mean((0, 1, 2), 1), mean((0, 3, 6), 2), mean((6, 7, 8), 1), mean((2, 5, 8), 2)]))
    return torch.stack(out)

def test_edges_are_the_weighed_mean_of_their_points():
    g = torch.Generator().manual_seed(2)
    logits, b = torch.randn(7, 9, 28, 28, generator=g), boxes(7, g)
    torch.testing.assert_close(boxes_of(logits, b), boxes_by_loops(logits, b))

def test_messages_are_the_written_rule():
    g, h = torch.Generator().manual_seed(3), grid().grid_head
    x = torch.randn(2, 36, 7, 7, generator=g)
    near = {(i, j): [(i-1, j), (i, j-1), (i, j+1), (i+1, j)] for i in range(3) for j in range(3)}
    own = {(i, j): x[:, 4*(3*i+j):4*(3*i+j) + 4] for i, j in near}
    for trans in (h.forder_trans, h.sorder_trans):
        before = dict(own) if trans is h.forder_trans else told
        told = {p: own[p] + sum(trans[3*p[0] + p[1]][k](before[n]) for k, n in enumerate(n for n in near[p] if n in near)) for p in near}
    torch.testing.assert_close(h.fuse(x), torch.cat([told[i, j] for i in range(3) for j in range(3)], 1))

def test_shaking_stays_within_bounds():
    b = torch.tensor([[40., 30, 80, 60]]).repeat(500, 1)
    torch.manual_seed(0); s = shake(b, (H, W))
    centre, wh = (s[:, :2] + s[:, 2:]) / 2 - torch.tensor([60., 45]), s[:, 2:] - s[:, :2]
    assert (centre.abs() <= .15 * torch.tensor([40., 30]) + 1e-4).all() and centre.abs().amax(0)[0] > 5.5
    assert (wh <= 1.15 * torch.tensor([40., 30]) + 1e-4).all() and (wh >= .85 * torch.tensor([40., 30]) - 1e-4).all()
    edge = shake(torch.tensor([[-9., -9, W + 9, H + 9]]), (H, W))
    assert (edge >= 0).all() and (edge <= torch.tensor([W-1., H-1, W-1, H-1])).all() and shake(b[:0], (H, W)).shape == (0, 4)

def test_no_more_boxes_than_allowed_are_trained_on():
    g, h = torch.Generator().manual_seed(4), grid(max_rois=5)
    o, maps, t = [objects(4, g)], features(1, g), Trace()
    h.losses(maps, [Instances(around(o[0], 8, g), size=(H, W))], o, t)
    assert t["samples"][0].num_pos == 8 and len(t["grid_boxes"]) == len(t["grid_targets"]) == 5 and t["grid_logits"].shape == (5, 9, 28, 28)

def test_the_box_head_leaves_boxes_alone():
    g, h = torch.Generator().manual_seed(5), plain(loss_bbox=None)
    assert "fc_reg.weight" not in h.state_dict()
    b = boxes(9, g) + 6; found = bbox_detections(h, torch.randn(9, K + 1, generator=g), h(torch.randn(9, 4, 7, 7, generator=g))[1], b, (H, W), grid().rule)
    torch.testing.assert_close(found.boxes, clip_boxes(b, (H, W))[found.roi])

def test_detections_are_moved_and_not_suppressed_again():
    g, h, t = torch.Generator().manual_seed(6), grid(), Trace()
    maps, p = features(1, g), [Instances(boxes(30, g), size=(H, W))]
    h.rule.score_threshold = 0.
    out, found = h.predict(maps, p, [(H, W)], trace=t)[0], t["detections"][0]
    assert len(out) == len(found) > 5 and torch.equal(out.scores, found.scores) and torch.equal(out.labels, found.labels) and not torch.allclose(out.boxes, found.boxes)
    logits = h.grid_head(h.roi_features(maps, [found.boxes], h.grid_roi_extractor))
    torch.testing.assert_close(out.boxes, clip_boxes(boxes_of(logits, found.boxes), (H, W)))


# ---- in a detector

def test_several_views():
    photo = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0).numpy()
    made = {f.__name__: build(f(zoo.mobilenet_v2(), K, out_channels=32, test_scale=None)) for f in (roi_variants.double_head_rcnn, roi_variants.ms_rcnn, roi_variants.grid_rcnn)}
    assert predict_views(made["double_head_rcnn"], photo, scales=(1.,)).size == (64, 80)
    for name in ("ms_rcnn", "grid_rcnn"):
        with pytest.raises(NotImplementedError, match="several views cannot be merged"): predict_views(made[name], photo, scales=(1.,))

@pytest.mark.parametrize("name", [*roi_variants.SMALL])
def test_small_recipes(name):
    e = zoo.recipe(name, 2)
    with torch.device("meta"): model = build(e.model)
    assert model.num_classes == 2 and all(p.requires_grad for p in model.parameters()) and e.data.masks == (name == "ms_rcnn_mobilenet")
