"""DESIGN's promises, for every kind of detector in the zoo: small backbones, small pictures, few steps."""
import copy, io, pickle
import pytest, torch
from notebook_det.backbones.vgg import VGG
from notebook_det.foundations.recipes import Config, Partial, build
from notebook_det.foundations.structures import Images, Instances, Trace
from notebook_det.layers.norm import group_norm
from notebook_det.layers.weight_standardisation import WSConv2d
from notebook_det.zoo import anchor_free, attention, cascade, dcn, hrnet, norms, recipes as zoo, retina_variants, roi_variants, ssd, trident, two_stage_more

K = 3
RECIPES = {
    "rpn": lambda: zoo.rpn(zoo.mobilenet_v2(), out_channels=32),
    "retinanet": lambda: zoo.retinanet(zoo.mobilenet_v2(), K, out_channels=32),
    "retinanet_r18": lambda: zoo.retinanet(zoo.resnet(18), K, out_channels=32),
    "faster_rcnn": lambda: zoo.faster_rcnn(zoo.mobilenet_v2(), K, out_channels=32),
    "mask_rcnn": lambda: zoo.mask_rcnn(zoo.mobilenet_v2(), K, out_channels=32),
    "fcos": lambda: anchor_free.fcos(zoo.mobilenet_v2(), K, out_channels=64),
    "fcos_plus": lambda: anchor_free.improved(anchor_free.fcos(zoo.resnet(18), K, out_channels=64), dcn=True),
    "fsaf": lambda: anchor_free.fsaf(zoo.mobilenet_v2(), K, out_channels=32),
    "ssd": lambda: ssd.ssd(Config(VGG, 11, .125), K),
    "ssdlite": lambda: ssd.ssdlite(K),
    "scratchdet": lambda: ssd.scratchdet(K, 18),
    "m2det": lambda: ssd.m2det(Config(VGG, 11, .125), K, pixels=zoo.torchvision_pixels(), planes=16, levels=2),
}
RECIPES |= {name: lambda f=f: f(zoo.mobilenet_v2(), K, out_channels=32) for name, f in
            dict(retinanet_ghm=retina_variants.ghm_retinanet, libra_retinanet=retina_variants.libra_retinanet, ga_retinanet=retina_variants.ga_retinanet).items()}
RECIPES |= {"faster_rcnn_dcn": lambda: dcn.with_dcn(zoo.faster_rcnn(zoo.resnet(18), K, out_channels=32), modulated=True, deform_groups=2, heads=True),
            "mask_rcnn_mdpool": lambda: dcn.with_deform_pool(zoo.mask_rcnn(zoo.mobilenet_v2(), K, out_channels=32), modulated=True, fc_channels=32)}
RECIPES["ga_rpn"] = lambda: retina_variants.ga_rpn(zoo.mobilenet_v2(), out_channels=32)
RECIPES |= {f.__name__: lambda f=f: f(zoo.mobilenet_v2(), K, out_channels=32) for f in (roi_variants.double_head_rcnn, roi_variants.ms_rcnn, roi_variants.grid_rcnn)}
RECIPES |= {"cascade_mask_rcnn": lambda: thin(cascade.cascade_mask_rcnn(zoo.mobilenet_v2(), K, out_channels=32)),
            "htc": lambda: thin(cascade.htc(zoo.mobilenet_v2(), K, out_channels=32, num_labels=4))}
RECIPES |= {"faster_rcnn_hrnet": lambda: hrnet.with_hrfpn(zoo.faster_rcnn(hrnet.hrnet(4, planes=8, modules=(1, 1, 1), blocks=1), K, out_channels=32)),
            "fcos_hrnet": lambda: hrnet.with_hrfpn(anchor_free.fcos(hrnet.hrnet(4, planes=8, modules=(1, 1, 1), blocks=1), K, out_channels=64)),
            "tridentnet": lambda: trident.tridentnet(50, K, planes=4)}
RECIPES |= {
    "faster_rcnn_ohem": lambda: two_stage_more.with_ohem(zoo.faster_rcnn(zoo.mobilenet_v2(), K, out_channels=32)),
    "faster_rcnn_soft_nms": lambda: two_stage_more.with_soft_nms(zoo.faster_rcnn(zoo.mobilenet_v2(), K, out_channels=32)),
    "rfcn": lambda: two_stage_more.rfcn(18, K, bins=3, stride=8, scales=(2, 4, 8, 16), planes=8, style="pytorch", pixels=zoo.torchvision_pixels())}
RECIPES["faster_rcnn_gn_ws"] = lambda: norms.with_norm(norms.conv_heads(zoo.faster_rcnn(zoo.resnet(18, planes=16), K, out_channels=32), 1), Partial(group_norm, groups=8), WSConv2d)
RECIPES["retinanet_attention"] = lambda: attention.with_attention(attention.with_context(zoo.retinanet(zoo.resnet(18, planes=16), K, out_channels=32)))
HEAVY = {"faster_rcnn_c4": lambda: zoo.faster_rcnn_c4(50, K), "faster_rcnn_dc5": lambda: zoo.faster_rcnn_dc5(50, K)}


def thin(recipe): # three box heads of 64 neurons instead of 1,024
    for head in recipe.roi_head.bbox_head: head.fc_channels = 64
    return recipe


def make(name):
    torch.manual_seed(0)
    return build({**RECIPES, **HEAVY}[name]())


def picture(h=96, w=128, seed=0): return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def objects(n=2, h=96, w=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=g) * torch.tensor([w*.4, h*.4])
    wh = torch.rand(n, 2, generator=g) * torch.tensor([w*.4, h*.4]) + 16
    boxes = torch.cat([xy, (xy + wh).minimum(torch.tensor([w, h]))], 1)
    y, x = torch.arange(h)[:, None] + .5, torch.arange(w)[None] + .5
    masks = torch.stack([(x > b[0]) & (x < b[2]) & (y > b[1]) & (y < b[3]) for b in boxes]) if n else torch.zeros(0, h, w, dtype=torch.bool)
    return Instances(boxes.reshape(-1, 4), torch.randint(0, K, (n,), generator=g), masks=masks, image_id=f"pic{seed}", semantic=((y // 16 + x // 16) % 4).to(torch.uint8))


def batch(): return [picture(seed=0), picture(80, 112, seed=1)], [objects(2), objects(3, 80, 112, seed=1)]


def finite(losses): return all(v.ndim == 0 and torch.isfinite(v) for v in losses.values())


@pytest.fixture(params=RECIPES)
def model(request): return make(request.param)


def test_trains_a_step(model):
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    images, targets = batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = model.train()(images, targets)
    assert finite(losses)
    sum(losses.values()).backward(); opt.step()
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("counts", [(0, 2), (0, 0)])
def test_images_without_objects(model, counts):
    targets = [objects(n, seed=i) for i, n in enumerate(counts)]
    losses = model.train()([picture(seed=i) for i in range(2)], targets)
    assert finite(losses)
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_losses_in_eval_mode_change_nothing(model):
    images, targets = batch()
    before = {k: v.clone() for k, v in model.eval().state_dict().items()}
    assert finite(model(images, targets))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(isinstance(d, Instances) for d in model.train()(images))     # and predictions in training mode


def test_same_seed_same_losses(model):
    images, targets = batch()
    runs = []
    for m in (copy.deepcopy(model), model):                        # each its own: GHM's losses remember in training
        torch.manual_seed(5); runs.append(m(images, targets))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("h,w", [(1, 1), (1500, 32), (33, 65)])
def test_odd_sizes(model, h, w):
    assert finite(model([picture(h, w)], [Instances(torch.tensor([[0., 0, w, h]]), torch.tensor([0]), masks=torch.ones(1, h, w, dtype=torch.bool), semantic=torch.zeros(h, w, dtype=torch.uint8))]))
    out = model.eval()([picture(h, w)])[0]
    assert len(out) == 0 or (out.boxes[:, 2:].amax(0) <= torch.tensor([w, h]) + 1e-3).all()


def test_batched_equals_one_by_one(model):
    model.eval()
    images = [picture(seed=0), picture(seed=1)]
    both, single = model(images), [model([x])[0] for x in images]
    for a, b in zip(both, single):
        assert len(a) == len(b)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)
        same = torch.isclose(a.boxes[:, None], b.boxes, rtol=1e-3, atol=1e-2).all(2) & torch.isclose(a.scores[:, None], b.scores, rtol=1e-3, atol=1e-4)   # [N,N]: equal scores may stand in another order
        assert same.any(0).all() and same.any(1).all()


@pytest.mark.parametrize("model", [n for n, f in RECIPES.items() if hasattr(getattr(f(), "bbox_head", None), "rule")], indirect=True)
def test_the_padding_finds_nothing(model):
    "Cells beyond the picture, there because of a bigger neighbour in the batch, may shout as they like (dense heads)."
    head = model.bbox_head
    images, quiet, shout = [picture(64, 64), picture(128, 160, seed=1)], head.forward, [0]
    def forward(features):
        raw = quiet(features)
        for m, stride in zip(raw["cls"], head.anchors.strides):
            y, x = (torch.arange(n) * stride >= 64 for n in m.shape[-2:])
            m[0, 0][y[:, None] | x] = 30.
            shout[0] += int((y[:, None] | x).sum())
        return raw
    want = model.eval()(images)[0]
    head.forward = forward
    got = model(images)[0]
    assert shout[0] > 10 and len(got) == len(want)
    torch.testing.assert_close(got.boxes, want.boxes); torch.testing.assert_close(got.scores, want.scores)


def test_input_kinds_agree(model):
    "uint8, float 0 … 1 as torchvision, a stacked tensor, Images; dict targets."
    images, targets = [picture(seed=0), picture(seed=1)], [objects(2), objects(1, seed=1)]
    kinds = [images, [x / 255 for x in images], torch.stack(images), Images(torch.stack(images), [(96, 128)] * 2)]
    torch.manual_seed(1); want = model.eval()(kinds[0], targets)   # in eval mode no loss remembers the call before
    for x in kinds[1:]:
        torch.manual_seed(1); got = model(x, [dict(boxes=t.boxes, labels=t.labels, masks=t.masks, semantic=t.semantic) for t in targets])
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-3, atol=1e-4)


def test_autocast(model):
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16): losses, found = model(images, targets), model.eval()(images)
    assert finite(losses) and all(v.dtype == torch.float32 for v in losses.values())
    assert all(d.boxes.dtype == torch.float32 and torch.isfinite(d.boxes).all() for d in found)


def test_float64(model):
    images, targets = batch()
    losses = model.double()(images, targets)
    assert finite(losses) and all(v.dtype == torch.float64 for v in losses.values())
    assert model.eval()(images)[0].boxes.dtype == torch.float64


def test_copies(model):
    images, _ = batch()
    want = model.eval()(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(want, other(images)))
    buf = io.BytesIO(); torch.save(model.state_dict(), buf); buf.seek(0)
    assert all(r == [] for r in model.load_state_dict(torch.load(buf, weights_only=True)))


def test_ignored_objects_are_not_learnt(model):
    images, targets = [picture()], objects(3)
    some = targets.copy(ignore=torch.tensor([False, True, True]))
    rule = getattr(getattr(model, "bbox_head", None), "assigner", None)
    if hasattr(rule, "ignore_scale"): rule.ignore_scale = 0.                # by default FSAF keeps quiet in their middle, which is not background either
    torch.manual_seed(0); a = model.eval()(images, [some])
    torch.manual_seed(0); b = model(images, [targets[torch.tensor([0])]])
    for k in a: torch.testing.assert_close(a[k], b[k])
    assert finite(model(images, [targets.copy(ignore=torch.ones(3, dtype=torch.bool))]))


BAD = {"NaN": [float("nan"), 1, 9, 9], "inverted": [9, 9, 1, 1], "zero-area": [5, 5, 5, 9], "outside": [300, 300, 340, 340]}

@pytest.mark.parametrize("kind", BAD)
def test_bad_boxes_are_named(kind):
    t = Instances(torch.tensor([[1., 1, 20, 20], BAD[kind]]), torch.tensor([0, 1]), image_id="cat.jpg", ids=torch.tensor([11, 42]))
    with pytest.raises(ValueError, match="cat.jpg.*annotation 42"): make("retinanet")([picture()], [t])


def test_bad_input_is_named():
    m = make("mask_rcnn")
    with pytest.raises(ValueError, match="label outside 0 … 2"): m([picture()], [objects(1).copy(labels=torch.tensor([7]))])
    with pytest.raises(ValueError, match="no 'masks'"): m([picture()], [Instances(torch.tensor([[1., 1, 9, 9]]), torch.tensor([0]))])
    with pytest.raises(ValueError, match="2 images but 1 targets"): m([picture(), picture()], [objects(1)])
    with pytest.raises(ValueError, match="image 1 must be"): m([picture(), torch.zeros(1, 5, 5, dtype=torch.uint8)])
    with pytest.raises(TypeError, match="predict"): m(["a.jpg"])
    with pytest.raises(ValueError, match="at least one"): m([])


def test_class_count_must_match():
    r = RECIPES["mask_rcnn"](); r.roi_head.mask_head.num_classes = 5
    with pytest.raises(ValueError, match="box head knows 3 classes, the mask head 5"): build(r)
    r = RECIPES["faster_rcnn"](); r.classes = ["cat", "dog"]
    with pytest.raises(ValueError, match="2 class names for a detector of 3 classes"): build(r)


def test_detections_in_the_pictures_own_pixels():
    "A picture twice as large gives boxes twice as large; masks have the picture's size."
    m = make("mask_rcnn").eval()
    m.roi_head.rule.score_threshold = 0.
    small, large = Images(picture()[None], [(96, 128)]), Images(picture()[None], [(96, 128)], [(192, 256)])
    a, b = m(small)[0], m(large)[0]
    torch.testing.assert_close(a.boxes * 2, b.boxes)
    assert a.masks.shape[1:] == (96, 128) and b.masks.shape[1:] == (192, 256)
    m.test_scale = (256, 192)
    p = m.predict([picture(192, 256).permute(1, 2, 0).numpy(), picture(40, 60)], batch_size=2)
    assert p[0].size == (192, 256) and p[1].size == (40, 60) and p[1].masks.shape[1:] == (40, 60)


def test_trace_tells_what_was_decided():
    m, (images, targets), t = make("faster_rcnn"), batch(), Trace()
    torch.manual_seed(0); losses = m(images, targets, trace=t)
    torch.manual_seed(0); plain = m(images, targets)
    assert all(torch.equal(losses[k], plain[k]) for k in plain)             # watching changes nothing
    rpn, roi = t["rpn_head"], t["roi_head"]
    assert len(rpn["assignments"]) == 2 and len(roi["samples"]) == 2
    torch.testing.assert_close(rpn["loss_cls"].sum(), losses["loss_rpn_cls"], rtol=1e-4, atol=1e-6)    # the shares add up
    assert len(rpn["image 0"]["topk"]) >= len(rpn["image 0"]["nms"]) > 0


@pytest.mark.parametrize("name", HEAVY)
def test_one_level_variants(name):
    m = make(name)
    losses = m.train()([picture(64, 64)], [objects(2, 64, 64)])
    assert finite(losses)
    sum(losses.values()).backward()
    assert [k for k, p in m.named_parameters() if p.requires_grad and p.grad is None] == []
    assert len(m.eval()([picture(64, 64)])) == 1


def test_plain_torchvision_loop_and_torchmetrics():
    "torchvision's reference loop trains our detector unchanged; torchmetrics reads our detections as they are."
    images = [picture(seed=i) // 4 for i in range(4)]
    targets = [objects(2, seed=i) for i in range(4)]
    for x, t in zip(images, targets):
        for b, l in zip(t.boxes.round().int().tolist(), t.labels.tolist()): x[l, b[1]:b[3], b[0]:b[2]] = 255   # each class has its colour
    model = make("faster_rcnn").train()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.02, momentum=.9)
    curve = []
    for _ in range(12):
        loss_dict = model([x / 255 for x in images], [dict(boxes=t.boxes, labels=t.labels) for t in targets])
        losses = sum(loss for loss in loss_dict.values())
        opt.zero_grad(); losses.backward(); opt.step()
        curve.append(losses.item())
    assert curve[-1] < .8 * curve[0], curve
    metrics = pytest.importorskip("torchmetrics.detection")
    ap = metrics.MeanAveragePrecision()
    ap.update(model.eval()(images), targets)
    perfect = metrics.MeanAveragePrecision()
    perfect.update([t.copy(scores=torch.ones(len(t))) for t in targets], targets)
    assert 0 <= ap.compute()["map"] <= 1 and perfect.compute()["map"] > .99
