"""Deformable convolutions in backbones and heads, deformable RoI pooling: against loops, against the ordinary kind, by name."""
import copy, math, os, pickle, subprocess, sys
from pathlib import Path
import pytest, torch
from notebook_det.engine.optim import named_kinds, param_groups
from notebook_det.foundations.recipes import Config, Partial, build, select
from notebook_det.foundations.structures import Instances
from notebook_det.layers.deformable import DeformConv2d
from notebook_det.ops import library, pool
from notebook_det.roi_heads.deform_pool import DeformRoIExtractor, DeformRoIPool
from notebook_det.roi_heads.extractors import RoIExtractor, to_rois
from notebook_det.zoo import anchor_free, dcn, recipes as zoo, retina_variants

K = 3
with_dcn, with_deform_pool = dcn.with_dcn, dcn.with_deform_pool
def places(model): return {n: m.conv_offset.out_channels for n,m in model.named_modules() if isinstance(m, DeformConv2d)} # layer → numbers per position
def meta(recipe):
    with torch.device("meta"): return build(recipe)


# ---- convolutions in a backbone

@pytest.mark.parametrize("modulated,sets", [(False, 1), (True, 1), (True, 4)])
def test_the_stages_that_were_asked_for(modulated, sets):
    got = places(meta(with_dcn(zoo.resnet(50), (False, False, True, True), modulated, sets)))
    assert got == {f"layer{s}.{i}.conv2": (27 if modulated else 18) * sets for s,n in ((3, 6), (4, 3)) for i in range(n)}


def test_any_backbone_of_residual_blocks_takes_it():
    assert len(places(meta(with_dcn(zoo.resnet(18), (True,) * 4)))) == 8                                 # basic blocks too
    net = meta(with_dcn(zoo.resnet(101, groups=32, width=4)))                                            # ResNeXt: groups of weights
    assert net.layer2[0].conv2.weight.shape == (256, 8, 3, 3) and net.layer2[0].conv2.conv_offset.weight.shape == (18, 256, 3, 3)
    assert (net.layer2[0].conv2.stride, net.layer2[1].conv2.stride) == (2, 1)                             # also where the stride is
    dilated = meta(with_dcn(zoo.faster_rcnn_dc5(50, K))).backbone.layer4[1].conv2
    assert (dilated.dilation, dilated.conv_offset.dilation, dilated.conv_offset.padding) == (2, (2, 2), (2, 2))
    c4 = places(meta(with_dcn(zoo.faster_rcnn_c4(50, K))))
    assert "roi_head.shared_head.layer4.2.conv2" in c4 and len(c4) == 4 + 6 + 3
    assert len(places(meta(with_dcn(zoo.faster_rcnn_c4(50, K), (False, True, True, False))))) == 4 + 6
    for wrong in (zoo.mobilenet_v2(), zoo.faster_rcnn(zoo.mobilenet_v2(), K)):
        with pytest.raises(ValueError, match="MobileNetV2 has no stages whose convolutions could become deformable"): with_dcn(wrong)


@pytest.mark.parametrize("modulated", [False, True])
def test_it_starts_as_the_network_that_it_replaces(modulated):
    "Offsets of zero; strengths of one half, which twice the weight makes up for."
    torch.manual_seed(0)
    plain, bent = build(zoo.resnet(50, planes=8)).eval(), build(with_dcn(zoo.resnet(50, planes=8), modulated=modulated)).eval()
    state = {k: v * (1 + modulated) if k.endswith("conv2.weight") and "layer1" not in k else v for k,v in plain.state_dict().items()}
    missing, unexpected = bent.load_state_dict(state, strict=False)
    assert unexpected == [] and all("conv_offset" in k for k in missing) and len(missing) == 2 * 13
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a,b in zip(plain(x), bent(x)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_stages_freeze_offsets_too():
    net = build(with_dcn(zoo.resnet(18, planes=8, frozen_stages=2), (True,) * 4))
    assert {n.split(".")[0] for n,p in net.named_parameters() if p.requires_grad} == {"layer3", "layer4"}


# ---- in heads

HEADS = dict(rpn=(lambda b: zoo.rpn(b, out_channels=32), ["bbox_head.rpn_conv"]),
             retinanet=(lambda b: zoo.retinanet(b, K, out_channels=32), ["bbox_head.cls_convs.3.conv", "bbox_head.reg_convs.3.conv"]),
             fcos=(lambda b: anchor_free.fcos(b, K, out_channels=64), ["bbox_head.cls_convs.3.conv", "bbox_head.reg_convs.3.conv"]),
             fsaf=(lambda b: anchor_free.fsaf(b, K, out_channels=32), ["bbox_head.cls_convs.3.conv", "bbox_head.reg_convs.3.conv"]),
             mask_rcnn=(lambda b: zoo.mask_rcnn(b, K, out_channels=32), ["rpn_head.rpn_conv"] + [f"roi_head.mask_head.convs.{i}.conv" for i in range(4)]))

@pytest.mark.parametrize("name", HEADS)
def test_heads_train_a_step_and_predict(name):
    make, want = HEADS[name]
    torch.manual_seed(0)
    model = build(with_dcn(make(zoo.mobilenet_v2()), (), modulated=True, deform_groups=2, heads=True))
    assert list(places(model)) == want
    image, target = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)], [Instances(torch.tensor([[10., 10, 60, 50]]), torch.tensor([1]), masks=torch.ones(1, 64, 96, dtype=torch.bool))]
    losses = model(image, target)
    sum(losses.values()).backward()
    assert [n for n,p in model.named_parameters() if p.requires_grad and p.grad is None] == [] and all(v.isfinite() for v in losses.values())
    assert places(model) and all(model.get_submodule(n).conv_offset.weight.grad.abs().sum() > 0 for n in want)
    assert len(model.eval()(image)) == 1


def test_without_heads_they_stay_what_they_are():
    assert all(n.startswith("backbone.") for n in places(meta(with_dcn(zoo.mask_rcnn(zoo.resnet(18), K)))))
    fcos = meta(anchor_free.improved(anchor_free.fcos(zoo.resnet(50), K), dcn=True))
    assert set(places(fcos).values()) == {27} and len(places(fcos)) == 13 + 2


# ---- deformable RoI pooling: the operator

def by_loops(f, roi, offset, mask, bins, scale, ratio, gamma): # f [B,C,H,W] → [C,bins,bins]; one number at a time, as METHODS 3.9 says it
    image, x1, y1, x2, y2 = int(roi[0]), *(v * scale - .5 for v in roi[1:])
    (C, H, W), w, h = f.shape[1:], x2 - x1, y2 - y1
    out = f.new_zeros(C, bins, bins)
    def read(y, x):
        if not (-1 <= y <= H and -1 <= x <= W): return f.new_zeros(C)
        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
        a, b = min(int(y), H - 2), min(int(x), W - 2)
        m = f[image]
        return sum(m[:, a + i, b + j] * (1 - abs(y - a - i)) * (1 - abs(x - b - j)) for i in (0, 1) for j in (0, 1))
    ny, nx = ratio or math.ceil(h / bins), ratio or math.ceil(w / bins)
    for p in range(bins):
        for q in range(bins):
            dx, dy = (0, 0) if offset is None else (gamma * w * offset[0, p, q].item(), gamma * h * offset[1, p, q].item())
            values = [read(y1 + dy + (p + (i + .5) / ny) * h / bins, x1 + dx + (q + (j + .5) / nx) * w / bins) for i in range(ny) for j in range(nx)]
            out[:, p, q] = sum(values) / max(ny * nx, 1) * (1 if mask is None else mask[p, q])
    return out


def some(dtype=torch.float64, channels=3, bins=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(2, channels, 9, 11, generator=g, dtype=dtype)
    rois = torch.tensor([[0., 3.1, 2.3, 25.7, 21.9], [1, 0, 0, 43.7, 35.3], [1, 20.3, 11.1, 28.9, 39.7], [0, -9.3, -5.2, 14.4, 9.1]], dtype=dtype)
    return f, rois, torch.randn(4, 2, bins, bins, generator=g, dtype=dtype), torch.rand(4, bins, bins, generator=g, dtype=dtype)


@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_pooling_is_its_definition(version, ratio):
    f, rois, offset, mask = some()
    offset, mask = offset if version else None, mask if version == 2 else None
    got = pool.deform_roi_pool(f, rois, offset, 3, .25, ratio, .3, mask)
    for i,roi in enumerate(rois.tolist()):
        want = by_loops(f, roi, None if offset is None else offset[i], None if mask is None else mask[i], 3, .25, ratio, .3)
        torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [0, 2])
def test_pooling_gradients(ratio):
    f, rois, offset, mask = some(channels=2, bins=2)
    leaves = [t.requires_grad_() for t in (f[:, :, :4, :5].clone(), offset, mask)]
    assert torch.autograd.gradcheck(lambda f, o, m: pool.deform_roi_pool(f, rois, o, 2, .12, ratio, .1, m), leaves)
    assert torch.autograd.gradcheck(lambda f, o: pool.deform_roi_pool(f, rois[:0], o, 2, .12), (leaves[0], offset.detach()[:0].requires_grad_()))
    assert torch.autograd.gradcheck(lambda f: pool.deform_roi_pool(f, rois, None, 2, .12, ratio), leaves[0])


def test_pooling_passes_torchs_checks():
    for dtype in (torch.float32, torch.float64):
        f, rois, offset, _ = some(dtype, bins=2)
        for o in (offset.requires_grad_(), None):
            for r,p in ((rois, o), (rois[:0], None if o is None else o.detach()[:0])):
                torch.library.opcheck(pool.deform_op, (f.requires_grad_(), r, p, 2, 2, .25, 2, .1))
                torch.library.opcheck(pool.deform_backward_op, (torch.randn(len(r), 2, 2, 3, dtype=dtype), f.detach(), r, None if p is None else p.detach(), 2, 2, .25, 2, .1))


def test_pooling_compiles_exports_and_keeps_precision():
    f, rois, offset, mask = some(torch.float32)
    run = lambda f, o, m: pool.deform_roi_pool(f, rois, o, 3, .25, 0, .1, m).square()
    leaves = [t.requires_grad_() for t in (f, offset, mask)]
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    assert torch.equal(got, want)
    for a,b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)): torch.testing.assert_close(a, b)
    class Layer(torch.nn.Module):
        def forward(self, f, o, m): return run(f, o, m)
    leaves = [t.detach() for t in leaves]
    assert torch.equal(torch.export.export(Layer(), tuple(leaves)).module()(*leaves), want)
    low = pool.deform_roi_pool(f.detach().bfloat16(), rois, offset.detach(), 3, .25)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), pool.deform_roi_pool(f.detach().bfloat16().float(), rois, offset.detach(), 3, .25), rtol=1e-2, atol=1e-2)


def test_all_of_this_holds_without_the_kernels():
    "The same tests on the readable references, in a process that never loads the library."
    if os.environ.get("NOTEBOOK_DET_OPS") == "0": return
    assert library.has_kernel("deform_roi_pool") or not library.LOADED.endswith(".so")
    env = os.environ | dict(NOTEBOOK_DET_OPS="0", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    r = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "pooling or extractor"], env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.returncode == 0 and "[100%]" in r.stdout, r.stdout[-2000:] + r.stderr[-2000:]


# ---- deformable RoI pooling: the extractor

def maps(levels=4, channels=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, channels, 256 // 4 // 2**i, 320 // 4 // 2**i, generator=g, dtype=dtype) for i in range(levels)]

TWO = [torch.tensor([[300., 10, 310, 250], [5, 5, 45, 40], [10, 20, 310, 250], [100, 100, 230, 250]]), torch.tensor([[40., 60, 180, 190], [7, 9, 20, 200]])]


def test_extractor_starts_as_average_roi_align():
    levels = maps()
    want = RoIExtractor()(levels, TWO)
    torch.testing.assert_close(DeformRoIExtractor(channels=8)(levels, TWO), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(DeformRoIExtractor(channels=8, modulated=True)(levels, TWO), want / 2, rtol=1e-4, atol=1e-5)     # every bin counts half


def stirred(**kw): # an extractor whose last layers are not zero
    torch.manual_seed(0)
    ex = DeformRoIExtractor(3, channels=8, fc_channels=16, **kw)
    for n,p in ex.named_parameters():
        if n.endswith(("offset_fc.4.weight", "mask_fc.2.weight")): torch.nn.init.normal_(p, std=.5)
    return ex


@pytest.mark.parametrize("modulated", [False, True])
def test_extractor_is_two_poolings_and_some_linear_layers(modulated):
    levels, ex = maps(), stirred(modulated=modulated)
    got, rois = ex(levels, TWO), to_rois(TWO)
    which = ex.level(rois[:, 1:])
    assert which.unique().tolist() == [0, 1, 2]                                                             # one level has nothing to do
    with torch.no_grad():
        for out,roi,l in zip(got, rois, which.tolist()):
            layer, scale = ex.roi_layers[l], 1 / ex.strides[l]
            flat = by_loops(levels[l], roi.tolist(), None, None, 3, scale, 0, .1).flatten()
            offset = layer.offset_fc(flat).view(2, 3, 3)
            assert offset.abs().max() > .05
            mask = layer.mask_fc(flat).view(3, 3) if modulated else None
            torch.testing.assert_close(out, by_loops(levels[l], roi.tolist(), offset, mask, 3, scale, 0, .1), rtol=1e-3, atol=1e-4)


def test_extractor_keeps_the_order_of_the_boxes():
    levels, ex = maps(), stirred()
    want, back = ex(levels, TWO), [torch.arange(len(b) - 1, -1, -1) for b in TWO]
    got = ex(levels, [b[i] for b,i in zip(TWO, back)])
    torch.testing.assert_close(torch.cat([g[i] for g,i in zip(got.split([4, 2]), back)]), want)


@pytest.mark.parametrize("boxes", [TWO, [TWO[0][:1], TWO[1][:0]], [TWO[0][:0]] * 2])
def test_extractor_gives_every_parameter_a_gradient(boxes):
    ex, levels = stirred(modulated=True), [m.requires_grad_() for m in maps()]
    out = ex(levels, boxes)
    assert out.shape == (sum(map(len, boxes)), 8, 3, 3)
    out.sum().backward()
    assert [n for n,p in ex.named_parameters() if p.grad is None] == [] and all(m.grad is not None for m in levels)


def test_extractor_types_and_copies():
    levels, ex = maps(), stirred(modulated=True)
    want = ex(levels, TWO)
    torch.testing.assert_close(copy.deepcopy(ex).double()([m.double() for m in levels], [b.double() for b in TWO]), want.double(), rtol=1e-3, atol=1e-4)
    for other in (copy.deepcopy(ex), pickle.loads(pickle.dumps(ex))): assert torch.equal(other(levels, TWO), want)
    with torch.autocast("cpu", torch.bfloat16): low = ex(levels, TWO)
    assert low.dtype == torch.float32 and (low - want).abs().max() < .05 * want.abs().max()
    with pytest.raises(ValueError, match="4 strides got 2 feature maps"): ex(levels[:2], TWO)
    with pytest.raises(ValueError, match="image 1 of the batch has a box that cannot be read"): ex(levels, [TWO[0], TWO[1].flip(1)])


def test_names_as_published():
    names = {k: tuple(v.shape) for k,v in meta(Config(DeformRoIPool, modulated=True)).state_dict().items()}
    assert names == {"offset_fc.0.weight": (1024, 12544), "offset_fc.0.bias": (1024,), "offset_fc.2.weight": (1024, 1024), "offset_fc.2.bias": (1024,), "offset_fc.4.weight": (98, 1024),
                     "offset_fc.4.bias": (98,), "mask_fc.0.weight": (1024, 12544), "mask_fc.0.bias": (1024,), "mask_fc.2.weight": (49, 1024), "mask_fc.2.bias": (49,)}


# ---- recipes

def test_with_deform_pool_changes_the_extractor_only():
    a, b = zoo.faster_rcnn(zoo.resnet(18), K, out_channels=64), with_deform_pool(zoo.faster_rcnn(zoo.resnet(18), K, out_channels=64), modulated=True, gamma=.2)
    node = b.roi_head.bbox_roi_extractor
    assert (node.channels, node.modulated, node.gamma, node.strides) == (64, True, .2, (4, 8, 16, 32))
    b.roi_head.bbox_roi_extractor = a.roi_head.bbox_roi_extractor
    assert a == b
    both = meta(with_deform_pool(with_dcn(zoo.mask_rcnn(zoo.resnet(18), K, out_channels=64))))
    assert type(both.roi_head.mask_roi_extractor) is RoIExtractor and len(both.roi_head.bbox_roi_extractor.roi_layers) == 4


NAMES = {"faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco": (False, 1, 3), "faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco": (True, 4, 3), "mask-rcnn_r101-mdconv-c4-c5_fpn_2x_coco": (True, 1, 2),
         "cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco": (False, 1, 3), "mask-rcnn_r50_fpn_fp16_dconv_c3-c5_1x_coco": (False, 1, 3)}

@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_which_convolutions(name):
    e, (modulated, sets, stages) = zoo.recipe(name), NAMES[name]
    made = [c for c in e.model.backbone.conv2 if c is not None]
    assert len(made) == stages and all((c.modulated, c.deform_groups) == (modulated, sets) for c in made) and e.model.backbone.conv2[0] is None
    assert e.schedule.amp == ("fp16" in name) and e.data.masks == ("mask" in name) and e.schedule.epochs == (24 if "_2x" in name else 12)


def test_other_names_belong_to_others():
    for name in ("faster-rcnn_r50_fpn_1x_coco", "mask-rcnn_r50_fpn_1x_coco", "cascade-rcnn_r50_fpn_1x_coco", "faster-rcnn_r50-attn1111-dcn_fpn_1x_coco"): assert dcn.NAME.fullmatch(name) is None
    for name,modulated in (("faster-rcnn_r50_fpn_dpool_1x_coco", False), ("faster-rcnn_r50_fpn_mdpool_1x_coco", True)):
        model = zoo.recipe(name).model
        assert model.roi_head.bbox_roi_extractor.modulated == modulated and not any(model.backbone.conv2)


# ---- how fast offsets learn

def test_offsets_have_a_rate_of_their_own():
    model = build(with_dcn(zoo.retinanet(zoo.resnet(18), K, out_channels=32), heads=True))
    rates = {n: (g["lr"], g["weight_decay"]) for g in param_groups(model, 1., 1., bias_lr=2., bias_decay=0., offset_lr=.1, norm_decay=.5) for n,_ in g["params"]}
    assert all((rates[n] == (.1, 1.)) == ("conv_offset" in n) for n in rates)                               # an offset's bias is no bias: its decay stays
    assert rates["bbox_head.cls_convs.3.conv.bias"] == rates["bbox_head.retina_cls.bias"] == (2., 0.)         # but that of the convolution itself is one
    assert rates["backbone.layer3.0.bn2.bias"] == (1., .5)
    kinds = {n: k for n,_,k in named_kinds(build(retina_variants.ga_retinanet(zoo.resnet(18), K, out_channels=32)))}
    assert kinds["bbox_head.feature_adaption_cls.conv_offset.weight"] == "weight"                            # not the child of a convolution
