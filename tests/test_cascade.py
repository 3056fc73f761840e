"""Cascades: what goes from stage to stage, what learns from what, and the recipes of every published row."""
import pytest, torch
from torch import tensor
from torch.nn import functional as F
from notebook_det.dense_heads.semantic import SemanticHead, semantic_target
from notebook_det.foundations.recipes import Config, build, diff, from_json, to_json
from notebook_det.foundations.structures import Instances, Trace
from notebook_det.losses.classification import CrossEntropyLoss
from notebook_det.losses.masks import MaskLoss
from notebook_det.losses.regression import SmoothL1Loss
from notebook_det.ops.boxes import box_iou
from notebook_det.priors.coders import DeltaXYWH
from notebook_det.roi_heads.bbox import BBoxHead
from notebook_det.roi_heads.cascade import mask_probabilities, refine, vote
from notebook_det.zoo import cascade, parts, recipes as zoo

K, SIZE = 3, (96, 128)


def thin(recipe, channels=16):
    for h in recipe.roi_head.bbox_head: h.fc_channels = channels
    return recipe


def head_of(family, seed=0, **kw): # only the part behind the pyramid, of 16 channels
    torch.manual_seed(seed)
    return build(thin(family(zoo.mobilenet_v2(), K, out_channels=16, **kw)).roi_head)


def world(n=2, seed=0): # features of a pyramid, proposals and objects of n images
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, 16, SIZE[0] // s, SIZE[1] // s, generator=g) for s in (4, 8, 16, 32)] + [torch.randn(n, 16, 2, 2, generator=g)]
    boxes = tensor([[8., 10, 60, 70], [50., 30, 120, 90]])
    masks = torch.zeros(2, *SIZE, dtype=torch.bool); masks[0, 10:70, 8:60], masks[1, 30:90, 50:120] = True, True
    objects = Instances(boxes, tensor([0, 2]), masks=masks, semantic=torch.zeros(SIZE, dtype=torch.uint8))
    shaken = boxes.repeat(20, 1) + torch.randn(40, 4, generator=g) * 8
    shaken = torch.cat([shaken[:, :2].clamp(min=0), torch.maximum(shaken[:, 2:], shaken[:, :2].clamp(min=0) + 4).minimum(tensor([128., 96]))], 1)
    return features, [Instances(shaken, size=SIZE)] * n, [objects] * n


def bbox(k, **kw): return BBoxHead(k, DeltaXYWH(stds=(.1, .1, .2, .2)), CrossEntropyLoss(), SmoothL1Loss(), in_channels=4, fc_channels=8, **kw)


def test_refine_by_hand():
    "One tenth of the width to the right; then twice as high, cut at the image's edge."
    boxes, cls = tensor([[10., 10, 50, 30], [10, 10, 50, 30]]), tensor([[0., 1, 0], [3, 0, 0]])
    agnostic = tensor([[1., 0, 0, 0], [0, 0, 0, 5 * torch.tensor(2.).log()]])
    torch.testing.assert_close(refine(bbox(2, class_agnostic=True), cls, agnostic, boxes, (35, 100)), tensor([[14., 10, 54, 30], [10, 0, 50, 35]]))
    each = torch.zeros(2, 8); each[0, 4], each[0, 0], each[1, 0] = 1, -1, 1                        # deltas per class: the likeliest foreground class's …
    torch.testing.assert_close(refine(bbox(2), cls, each, boxes, (35, 100))[:, 0], tensor([14., 14]))
    torch.testing.assert_close(refine(bbox(2), cls, each, boxes, (35, 100), tensor([0, 2]))[:, 0], tensor([6., 14]))   # … or the known one's; background has none


@pytest.mark.parametrize("family", [cascade.cascade_rcnn, cascade.htc_without_semantic])
def test_each_stage_learns_from_the_boxes_of_the_one_before(family):
    roi, (features, proposals, objects), t = head_of(family), world(), Trace()
    torch.manual_seed(1); losses = roi.losses(features, proposals, objects, t)
    assert all(f"s{i}.loss_bbox" in losses for i in range(3))
    given = proposals
    for i, head in enumerate(roi.bbox_head):
        for k, s in enumerate(t[f"stage {i}"]["samples"]):
            pool = torch.cat([objects[k].boxes, given[k].boxes])
            assert all((pool == b).all(1).any() for b in s.boxes) and s.is_gt.sum() == 2           # the objects are put among them at every stage
        cls, reg = head(roi.bbox_roi_extractor(features, [s.boxes for s in t[f"stage {i}"]["samples"]]))
        n = [len(s.boxes) for s in t[f"stage {i}"]["samples"]]
        given = [Instances(head.coder.decode(s.boxes, r, SIZE)[~s.is_gt]) for s, r in zip(t[f"stage {i}"]["samples"], reg.split(n))]
    assert t["samples"] is t["stage 0"]["samples"]                                                 # where explorers look
    share = t["stage 1"]["loss_cls"].sum() * .5
    torch.testing.assert_close(losses["s1.loss_cls"], share)                                       # a stage's weight


def test_moved_boxes_carry_no_gradient():
    roi, (features, proposals, objects) = head_of(cascade.cascade_rcnn), world()
    roi.losses(features, proposals, objects)["s2.loss_bbox"].backward()
    assert all(p.grad is None for p in roi.bbox_head[0].parameters()) and roi.bbox_head[2].fc_reg.weight.grad.abs().sum() > 0


def test_the_test_averages_scores_and_takes_the_last_boxes():
    roi, (features, proposals, _) = head_of(cascade.cascade_rcnn), world(1)
    boxes, scores = proposals[0].boxes, []
    with torch.no_grad():
        for h in roi.bbox_head:
            start = boxes
            cls, reg = h(roi.bbox_roi_extractor(features, [boxes]))
            scores.append(cls); boxes = h.coder.decode(boxes, reg, SIZE)
        votes, last, before = vote(roi, features, [proposals[0].boxes], [SIZE])
    torch.testing.assert_close(votes, sum(scores) / 3); torch.testing.assert_close(last, reg); torch.testing.assert_close(before[0], start)
    roi.rule.score_threshold, roi.rule.iou_threshold = 0., 1.
    found = roi.predict(features, proposals, [SIZE])[0]
    best = (sum(scores) / 3).softmax(1)[:, :-1].max()
    torch.testing.assert_close(found.scores[0], best)
    assert (box_iou(found.boxes, boxes).amax(1) > .999).all()


def test_masks_of_a_cascade_are_averaged_and_htc_has_the_choice():
    for family, stages in ((cascade.cascade_mask_rcnn, [0, 1, 2]), (cascade.htc_without_semantic, [2])):
        roi, (features, _, objects) = head_of(family), world(1)
        for average in (False, True):
            if family is not cascade.cascade_mask_rcnn: roi.average_masks = average
            assert list(roi.mask_stages) == ([0, 1, 2] if average else stages)
    x = roi.roi_features(features, [objects[0].boxes], roi.mask_roi_extractor)
    each = [m[torch.arange(2), objects[0].labels].sigmoid() for m in roi.mask_logits(x, range(3))]
    torch.testing.assert_close(mask_probabilities(roi, features, objects[:1])[0], sum(each) / 3)


def test_masks_flow_from_stage_to_stage():
    "The last stage's mask loss teaches the first head's convolutions, but not its answer; a plain cascade's teaches nobody else."
    for family, flows in ((cascade.htc_without_semantic, True), (cascade.cascade_mask_rcnn, False)):
        roi, (features, proposals, objects) = head_of(family), world()
        roi.losses(features, proposals, objects)["s2.loss_mask"].backward()
        first = roi.mask_head[0]
        assert (first.convs[0].conv.weight.grad is not None) == flows and first.conv_logits.weight.grad is None
        assert hasattr(roi.mask_head[1], "conv_res") == flows and not hasattr(first, "conv_res")


def test_masks_learn_on_refined_boxes():
    "Interleaved: a stage's masks are trained on boxes that this stage has moved; in a plain cascade on those it was given."
    roi, (features, proposals, objects), t = head_of(cascade.htc_without_semantic), world(), Trace()
    roi.losses(features, proposals, objects, t)
    given, moved = t["stage 0"]["image 0"]["boxes"], t["stage 0"]["masks"]["image 0"]["boxes"]
    assert not torch.equal(given[2:], moved[2:]) and torch.equal(given[:2], moved[:2])             # the objects are still in front
    assert torch.equal(moved[2:], t["stage 1"]["image 0"]["boxes"][2:])                            # and the next stage starts from the same


def test_semantic_features_reach_boxes_and_masks():
    roi, (features, proposals, objects) = head_of(cascade.htc, num_labels=4), world()
    losses = roi.losses(features, proposals, objects)
    weight = roi.semantic_head.conv_embedding.conv.weight
    for k in ("s0.loss_cls", "s0.loss_bbox", "s2.loss_mask"):
        g, = torch.autograd.grad(losses[k], weight, retain_graph=True)
        assert g.abs().sum() > 0, k
    assert torch.autograd.grad(losses["loss_semantic_seg"], weight, allow_unused=True)[0] is None  # its own loss teaches the other branch
    none = head_of(cascade.htc_without_semantic)
    assert none.semantic_head is None and "loss_semantic_seg" not in none.losses(features, proposals, objects)


def test_semantic_target_by_hand():
    m = torch.arange(9 * 10, dtype=torch.uint8).reshape(9, 10)
    want = tensor([[0, 8, 255], [80, 88, 255]])
    assert torch.equal(semantic_target([m], (2, 3), 8, 100)[0], want)                              # every eighth pixel; the padding is unknown
    with pytest.raises(ValueError, match="image 1 of the batch has no semantic map"): semantic_target([m, None], (2, 3), 8, 100)
    with pytest.raises(ValueError, match="pixel of class 88; this head knows 0 … 79"): semantic_target([m], (2, 3), 8, 80)


def test_semantic_loss_is_the_mean_over_all_pixels():
    head, logits = SemanticHead(4, CrossEntropyLoss(.2), 8, 8, num_levels=2), torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    m = torch.full((16, 16), 255, dtype=torch.uint8); m[0, 0], m[8, 8] = 3, 1                      # two of four pixels are known
    want = .2 * (F.cross_entropy(logits[0, :, 0, 0][None], tensor([3])) + F.cross_entropy(logits[0, :, 1, 1][None], tensor([1]))) / 4
    torch.testing.assert_close(head.losses(logits, [m])["loss_semantic_seg"], want)
    logits.requires_grad_()
    nothing = head.losses(logits, [torch.full_like(m, 255)])["loss_semantic_seg"]
    nothing.backward(); assert nothing == 0 and (logits.grad == 0).all()
    with pytest.raises(ValueError, match="2 levels got 1"): head([torch.zeros(1, 8, 4, 4)])


def test_what_does_not_fit_is_refused():
    r = cascade.cascade_rcnn(zoo.mobilenet_v2(), K, out_channels=16)
    r.roi_head.assigners = r.roi_head.assigners[:2]
    with pytest.raises(ValueError, match="one of each: 3 bbox_head, 2 assigners, 3 weights"): build(r.roi_head)
    r = cascade.cascade_mask_rcnn(zoo.mobilenet_v2(), K, out_channels=16)
    r.roi_head.mask_head[1].num_classes = 5
    with pytest.raises(ValueError, match=r"same classes: bbox_head \[3, 3, 3\], mask_head \[3, 5, 3\]"): build(r.roi_head)


def test_number_of_classes_reaches_every_head_and_leaves_the_pixels_alone():
    e = zoo.recipe("htc_r50_fpn_1x_coco", ["cat", "dog"])
    assert [h.num_classes for h in e.model.roi_head.bbox_head + e.model.roi_head.mask_head] == [2] * 6
    assert e.model.roi_head.semantic_head.num_labels == 183


@pytest.mark.parametrize("name, millions", [("cascade-rcnn_r50_fpn_1x_coco", 69_394_766), ("cascade-mask-rcnn_r50_fpn_1x_coco", 77_324_606), ("htc_r50_fpn_1x_coco", 80_258_293)])
def test_parameters_as_published(name, millions):
    with torch.device("meta"): assert sum(p.numel() for p in build(zoo.recipe(name).model).parameters()) == millions


def test_schedules_and_pipelines_as_published():
    def of(name): e = zoo.recipe(name); return (e.schedule.epochs, e.schedule.milestones, e.schedule.lr, e.schedule.batch), (e.data.scales, e.data.mode, e.data.masks), e.pretrained
    one, wide = ((1333, 800),), ((1600, 400), (1600, 1400))
    assert of("cascade-rcnn_r50_fpn_1x_coco") == ((12, (8, 11), .02, 16), (one, "value", False), "torchvision:resnet50")
    assert of("cascade-rcnn_x101_64x4d_fpn_20e_coco") == ((20, (16, 19), .02, 16), (one, "value", False), "openmmlab:resnext101_64x4d")
    assert of("cascade-mask-rcnn_r101-caffe_fpn_ms-3x_coco") == ((36, (27, 33), .02, 16), (((1333, 640), (1333, 800)), "range", True), "caffe:resnet101")
    assert of("htc_x101-32x4d_fpn_16xb1-20e_coco") == ((20, (16, 19), .02, 16), (one, "value", True), "openmmlab:resnext101_32x4d")
    name = "htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400-16xb1-20e_coco"
    assert of(name) == ((20, (16, 19), .02, 16), (wide, "range", True), "openmmlab:resnext101_64x4d")
    assert [c is not None for c in zoo.recipe(name).model.backbone.conv2] == [False, True, True, True]
    assert zoo.recipe(name).data.semantic and zoo.recipe("htc-without-semantic_r50_fpn_1x_coco").data.semantic is None
    assert diff(zoo.recipe(name), from_json(to_json(zoo.recipe(name)))) == []
    caffe = zoo.recipe("cascade-mask-rcnn_x101-32x8d_fpn_ms-3x_coco").model
    assert caffe.normalize.bgr and not caffe.backbone.norm_grad


def test_a_name_belongs_to_its_family_alone():
    for r in parts.table():
        mine = cascade.NAME.fullmatch(parts.stem(r)) is not None
        assert mine == (r["family"] in ("cascade_rcnn", "htc")), r["name"]


def test_a_picture_without_a_map_is_named():
    roi, (features, proposals, objects) = head_of(cascade.htc, num_labels=4), world()
    with pytest.raises(ValueError, match="image 1 of the batch has no semantic map"): roi.losses(features, proposals, [objects[0], objects[1].copy(semantic=None)])


def test_training_reads_the_maps(tmp_path):
    "`data.semantic` names a folder: its maps come with the pictures, through the same flips."
    import json, numpy as np
    from PIL import Image
    from notebook_det.zoo.cli import training_set
    (tmp_path/"maps").mkdir()
    a = np.zeros((40, 60, 3), np.uint8); a[:, :20] = 255
    Image.fromarray(a).save(tmp_path/"one.jpg"); Image.fromarray(a[..., 0] // 255 * 7).save(tmp_path/"maps/one.png")
    (tmp_path/"ann.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="one.jpg", height=40, width=60)], categories=[dict(id=1, name="x")],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 20, 40], area=800, iscrowd=0)])))
    data = parts.Data(((60, 40),), flip=1., semantic=str(tmp_path/"maps"))
    image, target = training_set(tmp_path/"ann.json", tmp_path, data)[0]
    assert target.semantic.shape == (40, 60) and (target.semantic[:, 40:] == 7).all() and (target.semantic[:, :40] == 0).all()
    with pytest.raises(FileNotFoundError, match="folder of semantic maps"): training_set(tmp_path/"ann.json", tmp_path, parts.Data(semantic=str(tmp_path/"none")))


def test_weights_of_the_papers_time_are_read(tmp_path):
    "Heads at the top level, background first: the renamed file gives the same detections."
    from notebook_det.zoo.checkpoints import load_checkpoint
    torch.manual_seed(0)
    recipe = thin(cascade.htc(zoo.mobilenet_v2(), K, out_channels=16, num_labels=4))
    model, other = build(recipe).eval(), build(recipe).eval()
    old = {}
    for k, v in model.state_dict().items():
        if ".fc_cls." in k: v = torch.cat([v[-1:], v[:-1]])
        elif "mask_head" in k and ".conv_logits." in k: v = torch.cat([torch.zeros_like(v[:1]), v])
        old[k.removeprefix("roi_head.")] = v
    torch.save(dict(state_dict=old, meta={}), tmp_path/"htc_v1.pth")
    load_checkpoint(other, tmp_path/"htc_v1.pth")
    want, got = model.state_dict(), other.state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_several_views_are_refused_in_words():
    model = build(thin(cascade.cascade_rcnn(zoo.mobilenet_v2(), K, out_channels=16)))
    from notebook_det.detectors.tta import predict_views
    with pytest.raises(NotImplementedError, match="CascadeRoIHead: use predict"): predict_views(model, torch.zeros(3, 64, 64, dtype=torch.uint8))
