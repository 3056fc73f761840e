"""HRNet with its pyramid, TridentNet: what no notebook should carry. DESIGN's promises for detectors on them are in test_detectors.py."""
import pytest, torch
import torch.nn.functional as F
from notebook_det.backbones.hrnet import HRNet
from notebook_det.backbones.resnet import ResNet
from notebook_det.backbones.trident import TridentResNet
from notebook_det.detectors.tta import predict_views
from notebook_det.detectors.trident import merge_branches, of_size, zoom_of
from notebook_det.foundations.recipes import Config, build, from_json, to_json
from notebook_det.foundations.structures import IGNORED, NEGATIVE, POSITIVE, Images, Instances, Trace
from notebook_det.layers.norm import group_norm
from notebook_det.necks.hrfpn import HRFPN
from notebook_det.ops.boxes import box_iou
from notebook_det.ops.detections import DetectionRule
from notebook_det.zoo import anchor_free, hrnet, recipes as zoo, trident


def narrow(**kw):
    torch.manual_seed(0)
    return HRNet(**dict(dict(width=4, planes=8, modules=(1, 1, 1), blocks=1), **kw)).eval()


# ---- HRNet

def test_any_size_is_the_padded_picture():
    net, x = narrow(), torch.randn(2, 3, 45, 71)
    padded = F.pad(x, (0, 96 - 71, 0, 64 - 45))
    with torch.no_grad():
        for a, b in zip(net(x), net(padded)): assert torch.equal(a, b)
        assert [tuple(m.shape[2:]) for m in net(torch.randn(1, 3, 1, 1))] == [(8, 8), (4, 4), (2, 2), (1, 1)]
        assert [len(m) for m in net(torch.zeros(0, 3, 32, 32))] == [0] * 4


def test_every_stream_hears_every_other():
    "With only one stream changed before the last exchange, all maps change; without exchange they would not."
    net = narrow()
    module = net.stage4[-1]
    x = [torch.randn(1, c, 32 >> i, 32 >> i) for i, c in enumerate(net.channels)]
    with torch.no_grad():
        plain = module(x)
        for j in range(4):
            other = module([v + (i == j) * torch.randn_like(v) for i, v in enumerate(x)])
            assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, other)), j


def test_layout_norms_and_frozen_parts():
    x = torch.randn(1, 3, 40, 64).to(memory_format=torch.channels_last)
    with torch.no_grad(): assert all(m.is_contiguous(memory_format=torch.channels_last) for m in narrow().to(memory_format=torch.channels_last)(x))
    gn = narrow(width=8, norm=lambda c: group_norm(c, 4))
    assert "gn2.weight" in gn.state_dict() and not any("running" in k for k in gn.state_dict())
    learns = lambda net: {n.split(".")[0] for n, p in net.train().named_parameters() if p.requires_grad}
    everything = {"conv1", "bn1", "conv2", "bn2", "layer1", "transition1", "stage2", "transition2", "stage3", "transition3", "stage4"}
    assert learns(narrow()) == everything
    assert learns(narrow(frozen_stages=0)) == everything - {"conv1", "bn1", "conv2", "bn2"}
    assert learns(narrow(frozen_stages=2)) == {"transition2", "stage3", "transition3", "stage4"}
    assert not any(m.training for m in narrow().train().modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert all(m.training for m in narrow(norm_eval=False).train().modules())


def test_compiles_whole_and_exports():
    net, x = narrow(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want, whole = net(x), torch.compile(net, fullgraph=True, backend="eager")(x)
        program = torch.export.export(net, (x,)).module()
        for got in (whole, program(x)):
            for a, b in zip(got, want): torch.testing.assert_close(a, b)


# ---- its pyramid

@pytest.mark.parametrize("stride", [1, 2])
def test_hrfpn_as_defined(stride):
    "Upsample by powers of two, concatenate, 1×1; averages over 2^i × 2^i, 3×3: another way to write the same."
    torch.manual_seed(0)
    neck = HRFPN((4, 8, 16, 32), 12, 5, stride=stride)
    maps = [torch.randn(2, c, 48 >> i, 80 >> i) for i, c in enumerate((4, 8, 16, 32))]
    whole = torch.cat([m if i == 0 else F.interpolate(m, scale_factor=2**i, mode="bilinear", align_corners=False) for i, m in enumerate(maps)], 1)
    x = neck.reduction_conv.conv(whole)
    want = [F.conv2d(F.avg_pool2d(x, 2**i), c.conv.weight, c.conv.bias, stride=stride, padding=1) for i, c in enumerate(neck.fpn_convs)]
    for a, b in zip(neck(maps), want): torch.testing.assert_close(a, b)
    assert [k for k, _ in neck.named_children()] == ["reduction_conv", "fpn_convs"]


def test_hrfpn_of_any_maps():
    neck = HRFPN((4, 8), 6, 5)
    for h, w in ((1, 1), (1, 40), (7, 5), (33, 18)):
        out = neck([torch.randn(1, 4, h, w), torch.randn(1, 8, -(-h // 2), -(-w // 2))])
        assert tuple(out[0].shape) == (1, 6, h, w) and all(min(o.shape[2:]) >= 1 for o in out)
    with pytest.raises(ValueError, match="takes 2 maps, got 3"): neck([torch.randn(1, 4, 8, 8)] * 3)


def test_recipes_of_hrnet():
    m = lambda name: hrnet.experiment(hrnet.NAME.fullmatch(name))
    assert m("fcos_hrnetv2p-w18_4xb4-1x_coco") is None and m("faster-rcnn_hrnetv2p-w18-gn-head-1x_coco") is None   # never published in this form
    assert m("fcos_hrnetv2p-w18-gn-head_ms-640-800-4xb4-2x_coco").data.scales == ((1333, 640), (1333, 800))
    assert m("htc_hrnetv2p-w18_20e_coco").data.masks and not m("cascade-rcnn_hrnetv2p-w18-20e_coco").data.masks
    e = zoo.recipe("faster_rcnn_hrnet", 3)
    assert to_json(from_json(to_json(e))) == to_json(e)
    assert all(p.requires_grad for p in build(e.model).parameters())


# ---- TridentNet's backbone

def test_a_branch_is_a_dilated_resnet():
    "Each branch gives what a plain ResNet with that dilation in its third stage gives, from the same state dict."
    torch.manual_seed(0)
    net = TridentResNet(50, planes=4, zero_init_residual=False).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        every, = net(x, range(3))
        for i, d in enumerate(net.branches):
            plain = ResNet(50, planes=4, num_stages=3, out_indices=(2,), style="caffe", dilations=(1, 1, d)).eval()
            plain.load_state_dict(net.state_dict())
            want, = plain(x)
            torch.testing.assert_close(every[2*i:2*i + 2], want)
            torch.testing.assert_close(net(x, (i,))[0], want)
        torch.testing.assert_close(net(x)[0], every[2:4])                     # the middle one where nothing is said
        assert net(torch.zeros(0, 3, 32, 32), range(3))[0].shape == (0, 64, 2, 2)
    assert net.channels == (64,) and net.strides == (16,)


def test_what_trident_refuses():
    with pytest.raises(ValueError, match="ResNet-18 has none"): TridentResNet(18)
    with pytest.raises(ValueError, match="there is no ResNet-51"): TridentResNet(51)
    with pytest.raises(ValueError, match="branch 3: there are 3"): TridentResNet(50, branch=3)
    with pytest.raises(ValueError, match="2 ranges of sizes for 3 branches"): build(trident.tridentnet(planes=4, ranges=((0, 90), (30, 1e5))))


# ---- the detector

def make(**kw):
    torch.manual_seed(0)
    recipe = trident.scale_aware(trident.tridentnet(50, 3, planes=4), **kw)
    recipe.backbone.zero_init_residual = False                                # else every block is an identity at first, and all branches are alike
    return build(recipe).eval()


def picture(h=96, w=128, seed=0): return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
SMALL_AND_LARGE = Instances(torch.tensor([[4., 4, 28, 28], [10, 6, 120, 90]]), torch.tensor([0, 2]))


def test_each_branch_learns_its_own_sizes():
    "Sides 24 and 96: the first branch learns one, the last the other; anchors that would find the other's object are left alone."
    model, t = make(ranges=((0., 40.), (20., 110.), (60., 1e5))), Trace()
    model([picture()], [SMALL_AND_LARGE], trace=t)
    anchors = torch.cat(t["rpn_head"]["priors"])
    iou = box_iou(anchors, SMALL_AND_LARGE.boxes)
    for a, own in zip(t["rpn_head"]["assignments"], ((0,), (0, 1), (1,))):
        assert set(a.gt_index[a.label == POSITIVE].tolist()) == set(own)
        other = [i for i in (0, 1) if i not in own]
        if other: assert (a.label[iou[:, other[0]] > .3] == IGNORED).all() and (iou[:, other[0]] > .3).any()
        assert (a.label == NEGATIVE).any()
    for s, (low, high) in zip(t["roi_head"]["samples"], model.ranges):
        side = ((s.boxes[:, 2:] - s.boxes[:, :2]).prod(1)).sqrt()
        assert ((side > low) & (side < high)).all()


def test_sizes_are_those_on_disk():
    big = SMALL_AND_LARGE.copy(size=(96, 128), original_size=(192, 256))
    assert zoom_of(big) == .5 and zoom_of(SMALL_AND_LARGE) == 1.
    assert of_size(big.boxes, 0, 90, zoom_of(big)).tolist() == [True, False] and of_size(big.boxes, 0, 90).tolist() == [True, False]
    assert of_size(big.boxes, 40, 1e5, zoom_of(big)).tolist() == [True, True] and of_size(big.boxes, 40, 1e5).tolist() == [False, True]


def test_objects_of_nobody():
    "No branch answers for the objects, or no proposal has a branch's size: finite losses, and a gradient everywhere."
    model = make(ranges=((3000., 4000.), (3000., 4000.), (3000., 4000.)))
    losses = model.train()([picture(), picture(seed=1)], [SMALL_AND_LARGE] * 2)
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_all_branches_are_merged():
    model = make()
    model.roi_head.rule.score_threshold = 0.
    x = Images(torch.stack([picture(), picture(seed=1)]), [(96, 128)] * 2, [(192, 256)] * 2)
    both, single = model(x), [model(Images(x.tensor[i:i+1], [(96, 128)], [(192, 256)]))[0] for i in range(2)]
    for a, b in zip(both, single):
        assert a.size == (192, 256) and 0 < len(a) <= 100
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)
    model.all_branches = False
    fast = model(x)[0]
    model.backbone.branch = 0
    assert not torch.equal(fast.boxes[:3], model(x)[0].boxes[:3])             # another branch, another answer


def test_several_views():
    "Test-time augmentation asks one branch; with all of them it says that it cannot."
    model = make()
    with pytest.raises(NotImplementedError, match="set all_branches to False"): predict_views(model, picture())
    model.all_branches, model.test_scale = False, (128, 96)
    assert len(predict_views(model, picture(), scales=(1.,), flip=False)) == len(model.predict(picture()))


def test_merging_by_hand():
    box = lambda s, x=0.: [x, 0., x + s, s]
    one = Instances(torch.tensor([box(50), box(200, 300)]), torch.tensor([0, 0]), torch.tensor([.9, .8]), size=(400, 600))
    two = Instances(torch.tensor([box(52), box(50)]), torch.tensor([0, 1]), torch.tensor([.95, .6]), size=(400, 600))
    rule = DetectionRule(.05, 0, .5, 100)
    out = merge_branches([one, two], rule)
    assert out.scores.tolist() == pytest.approx([.95, .8, .6]) and out.labels.tolist() == [0, 0, 1] and out.size == (400, 600)
    out = merge_branches([one, two], rule, ((0, 90), (60, 1e5)))              # 200 is too large for the first, all of the second's too small
    assert out.scores.tolist() == pytest.approx([.9])
    rule.max_detections = 2
    assert len(merge_branches([one, two], rule)) == 2


def test_recipes_of_tridentnet():
    m = lambda name: trident.experiment(trident.NAME.fullmatch(name))
    assert m("tridentnet_x101-32x4d_1x_coco") is None and m("tridentnet_r50_1x_coco") is None     # Caffe's ResNets only
    e = m("tridentnet_r50-caffe_ms-3x_coco")
    assert (e.schedule.epochs, e.schedule.milestones, len(e.data.scales)) == (36, (28, 34), 6)
    full = trident.scale_aware(zoo.recipe("tridentnet_r101-caffe_1x_coco", 3).model)
    with torch.device("meta"): assert build(from_json(to_json(full))).ranges[1] == (30, 160)
