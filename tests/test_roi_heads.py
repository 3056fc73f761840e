"""The second stage against torchvision, against slow and plain versions of itself, and against whatever may be missing: boxes, objects, levels."""
import random
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign
from notebook_det.foundations.structures import Instances, Trace
from notebook_det.losses.classification import CrossEntropyLoss
from notebook_det.losses.masks import MaskLoss
from notebook_det.losses.regression import GIoULoss, L1Loss, SmoothL1Loss
from notebook_det.ops.boxes import box_iou
from notebook_det.ops.masks import crop_masks
from notebook_det.priors.assigners import MaxIoUAssigner
from notebook_det.priors.coders import DeltaXYWH
from notebook_det.priors.samplers import RandomSampler
from notebook_det.roi_heads.bbox import BBoxHead, bbox_losses
from notebook_det.roi_heads.extractors import RoIExtractor
from notebook_det.roi_heads.mask import MaskHead, mask_losses
from notebook_det.roi_heads.standard import RoISamples, StandardRoIHead, sample_rois

K, H, W = 3, 96, 128


def boxes(n, g, h=H, w=W, least=6.):
    xy = torch.rand(n, 2, generator=g) * torch.tensor([w, h]) * .7
    return torch.cat([xy, (xy + least + torch.rand(n, 2, generator=g) * torch.tensor([w, h]) * .6).minimum(torch.tensor([w, h]))], 1)


def objects(n, g, **kw):
    b = boxes(n, g)
    y, x = torch.arange(H)[:, None] + .5, torch.arange(W)[None] + .5
    masks = [(x > a[0]) & (x < a[2]) & (y > a[1]) & (y < a[3]) for a in b]
    return Instances(b, torch.randint(0, K, (n,), generator=g), masks=torch.stack(masks) if n else torch.zeros(0, H, W, dtype=torch.bool), **kw)


def around(o, n, g): # proposals near the objects
    b = o.boxes.repeat(n, 1)
    b = b + torch.randn(b.shape, generator=g) * 4
    return b[(b[:, 2:] > b[:, :2]).all(1)]


def head(masks=True, num=32, fraction=.25, add_gt=True, loss=None, **kw):
    bbox = BBoxHead(K, DeltaXYWH(stds=(.1, .1, .2, .2)), CrossEntropyLoss(), loss or L1Loss(), in_channels=4, roi_size=7, fc_channels=16, **kw)
    more = dict(mask_roi_extractor=RoIExtractor(14, (4, 8)), mask_head=MaskHead(K, MaskLoss(), 4, 1, 8)) if masks else {}
    return StandardRoIHead(RoIExtractor(7, (4, 8)), bbox, MaxIoUAssigner(.5, .5, .5, masks), RandomSampler(num, fraction, add_gt=add_gt), **more)


def features(n, g, **kw): return [torch.randn(n, 4, H//s, W//s, generator=g, **kw) for s in (4, 8)]


class Watch(TorchDispatchMode):
    "Notes the largest tensor that an operator makes, and how often a shape depends on data."
    def __init__(self): super().__init__(); self.largest, self.nonzero = 0, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nonzero += func.overloadpacket is torch.ops.aten.nonzero
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and not x._is_view(): self.largest = max(self.largest, x.numel())
        return out


def test_levels_and_values_are_torchvisions():
    g = torch.Generator().manual_seed(0)
    maps = {str(i): torch.randn(2, 3, 640//s, 800//s, generator=g) for i, s in enumerate((4, 8, 16, 32))}
    two = [boxes(60, g, 640, 800), torch.cat([boxes(40, g, 640, 800, least=2), torch.tensor([[2., 3, 790, 620]])])]
    want = MultiScaleRoIAlign(list(maps), 7, 2)(maps, two, [(640, 800)] * 2)
    got = RoIExtractor(7, sampling_ratio=2, aligned=False)(list(maps.values()), two)
    assert len(RoIExtractor().level(torch.cat(two)).unique()) == 4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_extractor_gradients():
    g = torch.Generator().manual_seed(1)
    ex, two = RoIExtractor(2, (4, 8), finest_scale=7), [boxes(4, g, 24, 32).double(), boxes(3, g, 24, 32).double()]
    maps = [torch.randn(2, 2, 24//s, 32//s, generator=g, dtype=torch.float64, requires_grad=True) for s in (4, 8)]
    assert set(ex.level(torch.cat(two)).tolist()) == {0, 1}
    assert torch.autograd.gradcheck(lambda *m: ex(m, two), maps)


def test_losses_are_torchvisions():
    "Background first there, last here; smooth L1 with beta 1/9 divided by all boxes in both."
    g = torch.Generator().manual_seed(2)
    coder, n = DeltaXYWH(stds=(.1, .1, .2, .2)), 20
    h = BBoxHead(K, coder, CrossEntropyLoss(), SmoothL1Loss(beta=1/9), in_channels=1, roi_size=1, num_fcs=0)
    labels = torch.cat([torch.randint(0, K, (8,), generator=g), torch.full((12,), K)])
    roi, gt = boxes(n, g), boxes(n, g)
    target = torch.where(labels[:, None] < K, gt, roi)
    cls, reg = torch.randn(n, K + 1, generator=g), torch.randn(n, 4 * K, generator=g)
    got = bbox_losses(h, cls, reg, [RoISamples(roi, labels, target, torch.zeros(8, dtype=torch.long), labels < 0)])
    theirs = fastrcnn_loss(cls[:, [K, *range(K)]], torch.cat([torch.zeros(n, 4), reg], 1), [(labels + 1) % (K + 1)], [coder.encode(roi, target)])
    for a, b in zip((got["loss_cls"], got["loss_bbox"]), theirs): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("add_gt", [False, True])
def test_sampling_against_a_plain_version(add_gt):
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        o = objects(4, g, ignore=torch.rand(4, generator=g) < .3)
        p = torch.cat([boxes(20, g), around(o, 6, g)])
        s = sample_rois(Instances(p), o, MaxIoUAssigner(.5, .5, .5, False), RandomSampler(10_000, 1., add_gt=add_gt), K)
        real = [i for i in range(4) if not o.ignore[i]]
        iou = box_iou(p, o.boxes)
        want = [(o.boxes[i], i) for i in real] if add_gt else []
        for k in range(len(p)):
            i = max(real, key=lambda j: iou[k, j].item(), default=None)
            want.append((p[k], i if i is not None and iou[k, i] >= .5 else None))
        want = [w for w in want if w[1] is not None] + [w for w in want if w[1] is None]
        assert torch.equal(s.boxes, torch.stack([b for b, _ in want])) and s.gt_index.tolist() == [i for _, i in want if i is not None]
        assert s.labels.tolist() == [K if i is None else o.labels[i].item() for _, i in want]
        assert torch.equal(s.targets, torch.stack([b if i is None else o.boxes[i] for b, i in want]))
        assert s.is_gt.sum() == (len(real) if add_gt else 0)


@pytest.mark.parametrize("masks,loss", [(True, None), (False, GIoULoss(weight=10.))])
def test_anything_may_be_missing(masks, loss):
    "Forty batches of 0 … 4 objects and 0 … 20 proposals an image, some ignored, some proposals without area."
    dice, g = random.Random(0), torch.Generator().manual_seed(3)
    torch.manual_seed(0); h = head(masks, loss=loss)
    for _ in range(40):
        o = [objects(dice.choice([0, 0, 1, 4]), g) for _ in range(2)]
        o = [x.copy(ignore=torch.rand(len(x), generator=g) < .3) if dice.random() < .3 else x for x in o]
        p = [torch.cat([boxes(dice.choice([0, 0, 1, 20]), g), around(x, dice.choice([0, 2]), g)]) for x in o]
        for x in p:
            if len(x) and dice.random() < .3: x[0, 2:] = x[0, :2]
        p, maps = [Instances(x) for x in p], features(2, g)
        h.zero_grad()
        losses = h.losses(maps, p, o, Trace())
        assert all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        assert all(q.grad is not None and q.grad.isfinite().all() for q in h.parameters())
        h.rule.score_threshold = .2
        for d in h.predict(maps, p, [(H, W)] * 2):
            assert (d.boxes >= 0).all() and (d.boxes <= torch.tensor([W, H, W, H])).all() and (not masks or d.masks.shape == (len(d), H, W))


def test_a_batch_is_the_weighed_mean_of_its_images():
    g = torch.Generator().manual_seed(4)
    h = head(num=10_000, fraction=1.)
    o, maps = [objects(2, g), objects(4, g)], features(2, g)
    p = [Instances(torch.cat([boxes(10, g), around(x, 3, g)])) for x in o]
    t = Trace(); both = h.losses(maps, p, o, t)
    alone = [h.losses([m[i:i+1] for m in maps], p[i:i+1], o[i:i+1]) for i in range(2)]
    n, pos = [[f(s) for s in t["samples"]] for f in (lambda s: len(s.boxes), lambda s: s.num_pos)]
    for k, w in (("loss_cls", n), ("loss_bbox", n), ("loss_mask", pos)):
        torch.testing.assert_close(both[k], (alone[0][k] * w[0] + alone[1][k] * w[1]) / sum(w))


def test_seeds_and_gradients_of_proposals():
    g = torch.Generator().manual_seed(5)
    h, o, maps = head(num=16), [objects(3, g)], features(1, g)
    p = torch.cat([boxes(30, g), around(o[0], 8, g)]).requires_grad_()
    runs = []
    for _ in range(2):
        torch.manual_seed(7); runs.append(h.losses(maps, [Instances(p)], o))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    sum(runs[0].values()).backward()
    assert p.grad is None                                                      # proposals are data


def test_autocast():
    g = torch.Generator().manual_seed(6)
    h, o, maps = head(), [objects(3, g)], features(1, g)
    p = [Instances(around(o[0], 6, g))]
    with torch.autocast("cpu", torch.bfloat16): losses, found = h.losses(maps, p, o), h.predict(maps, p, [(H, W)])[0]
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values()) and found.boxes.dtype == torch.float32


def test_mask_targets_never_copy_full_size_masks():
    "192 boxes on two masks of a megapixel: gathered, they would be 192 million numbers."
    g = torch.Generator().manual_seed(8)
    size = (1000, 1000)
    o = Instances(torch.tensor([[100., 100, 600, 700], [300, 200, 900, 900]]), torch.tensor([0, 1]), masks=torch.zeros(2, *size, dtype=torch.bool))
    o.masks[0, 100:700, 100:600] = True; o.masks[1, 200:900, 300:900] = True
    n = 192
    who = torch.arange(n) % 2
    roi = o.boxes[who] + torch.randn(n, 4, generator=g) * 20
    s = RoISamples(roi, o.labels[who], o.boxes[who], who, torch.zeros(n, dtype=torch.bool))
    with Watch() as watch: loss = mask_losses(MaskHead(2, MaskLoss(), 4, 1, 4), torch.zeros(n, 2, 28, 28), [s], [o])["loss_mask"]
    assert watch.largest <= 2 * 1000 * 1000 and abs(loss.item() - 0.6931) < 1e-3
    one_by_one = torch.cat([crop_masks(o.masks[i:i+1], b[None], 28) for i, b in zip(who[:6], roi)])
    assert torch.equal(one_by_one, crop_masks(o.masks, roi[:6], 28, index=who[:6]))


def test_how_often_shapes_depend_on_data():
    "On a GPU each of these is a wait: two for an image's sample, none in the extractor beside the counts of the levels."
    g = torch.Generator().manual_seed(9)
    o = objects(3, g); p = Instances(torch.cat([boxes(40, g), around(o, 6, g)]))
    with Watch() as watch: sample_rois(p, o, MaxIoUAssigner(.5, .5, .5, False), RandomSampler(16, .25, add_gt=True), K)
    assert watch.nonzero == 2
    with Watch() as watch: RoIExtractor(7, (4, 8))(features(1, g), [p.boxes])
    assert watch.nonzero == 0
