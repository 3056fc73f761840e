"""The small protocol: train one method on real pictures on a CPU, evaluate it, append a row to results/small/rows.jsonl.

    python benchmarks/small.py faster_rcnn                    # BCCD 320×240, about 20 minutes on one thread
    python benchmarks/small.py tv_retinanet --lr .01 --seed 1
    python benchmarks/small.py tv_retinanet --sweep           # 120 iterations at each of four rates, into sweep.jsonl
    python benchmarks/small.py --speed faster_rcnn tv_faster_rcnn   # alternating steps in one process: the ratio that counts

Both sides get the same pictures (uint8, cached after the resize) in the same order with the same flips, the same ImageNet
MobileNetV2, the same loop and evaluator. MobileNetV2: normalisation statistics and affines frozen; the first convolution and the stages of stride 2 and 4 frozen,
like stem and first stage of the published recipes. Box losses of the two-stage detectors: smooth L1 with beta 1/9, torchvision's.
"""
import argparse, datetime, json, math, os, platform, re, resource, sys, tempfile, time, zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch, torchvision
from fiddle import get_callable
from torch import nn
from PIL import Image, ImageDraw, ImageFilter
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator as TvAnchors
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from notebook_det.data.coco import CocoDetection
from notebook_det.data.loaders import make_loader
from notebook_det.data.proposals import collect, read_proposals, save_proposals
from notebook_det.data.transforms import RandomFlip, Resize
from notebook_det.evaluation.coco import CocoEvaluator, per_class, summary
from notebook_det.backbones.vgg import VGG
from notebook_det.foundations.recipes import Config, Partial, build, select
from notebook_det.foundations.structures import Instances
from notebook_det.losses.regression import L1Loss, SmoothL1Loss
from notebook_det.backbones.mobilenet import from_torchvision
from notebook_det.priors.points import regress_ranges
from notebook_det.layers.attention import ContextBlock, GeneralizedAttention
from notebook_det.layers.norm import batch_norm, group_norm
from notebook_det.layers.weight_standardisation import WSConv2d
from notebook_det.priors.default_boxes import DefaultBoxes
from notebook_det.zoo import anchor_free, attention, cascade, dcn, norms, recipes as zoo, retina_variants, roi_variants, ssd, trident, two_stage_more

COLORS = [230, 159, 0, 0, 60, 255, 0, 130, 60] # of outlines: RBC orange, WBC blue, platelets green; nuclei in turn
RATES, FROZEN = (.005, .01, .02, .04), 2
SHARED, OUT, BATCH = ROOT.parent/"shared/data", ROOT/"benchmarks/results/small", 4
WEIGHTS = SHARED/"weights/mobilenet_v2_1.0_224_quant_dequant_bnrecal_fp16.pth"

@dataclass
class Data:
    "Where the pictures are, and what a detector must know about them."
    folder:str; images:str; train:str; test:str
    size:tuple                     # (height, width) the pictures are resized to
    classes:int; scale:int         # anchor size / stride of the two-stage methods
    detections:int = 100           # per picture, also the evaluator's maxDets
    masks:bool = False

DATA = dict(
    bccd=Data("bccd", "JPEGImages", "annotations_coco/instances_trainval.json", "annotations_coco/instances_test.json", (240, 320), 3, 8),
    dsb=Data("dsb2018_mini", "images", "annotations/instances_train.json", "annotations/instances_val.json", (256, 256), 1, 2, 400, True))

# ---- pictures

class Cached(torch.utils.data.Dataset):
    "A data set read and resized once, kept as uint8 in memory; the loader's seed decides on the flips, whatever the model draws."
    def __init__(self, d, train, flip=None, extras=()): # flip: None: in training only
        folder = SHARED/d.folder
        self.source = CocoDetection(folder/(d.train if train else d.test), folder/d.images, transforms=Resize(size=d.size), masks=d.masks, extras=extras)
        self.items, self.flip = [self.source[i] for i in range(len(self.source))], RandomFlip(.5) if (train if flip is None else flip) else None
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.flip(*self.items[i]) if self.flip else self.items[i]

def loader(d, train, seed, extras=()): return make_loader(Cached(d, train, extras=extras), BATCH, train=train, workers=0, seed=seed, group_by_aspect=False)
def endless(batches):
    while True: yield from batches
# ---- torchvision's models

class Peer(nn.Module):
    "A torchvision detector that takes Images and Instances as ours do; `first` is the number of its first class."
    def __init__(self, model, first):
        super().__init__()
        self.model, self.first = model, first
    def forward(self, images, targets=None):
        pictures = [x[:, :h, :w].float()/255 for x,(h,w) in zip(images.tensor, images.sizes)]
        if targets is not None:
            masks = lambda t: {"masks": t.masks.to(torch.uint8)} if "masks" in t else {}
            return self.model(pictures, [dict(boxes=t.boxes, labels=t.labels + self.first, **masks(t)) for t in targets])
        return [self._instances(o, *s) for o,*s in zip(self.model(pictures), images.sizes, images.original_sizes or images.sizes)]
    def _instances(self, o, size, original):
        masks = {"masks": o["masks"][:,0] >= .5} if "masks" in o else {}
        assert not masks or tuple(size) == tuple(original), "masks at another size than the picture's own"
        zoom = o["boxes"].new_tensor([original[1]/size[1], original[0]/size[0]]*2)
        return Instances(o["boxes"]*zoom, o["labels"] - self.first, o["scores"], size=original, **masks)

TAPS = {"3": 24, "6": 32, "13": 96, "17": 320} # block of MobileNetV2: channels, at strides 4, 8, 16, 32
def imagenet(): return torch.load(WEIGHTS, weights_only=True)

def tv_backbone(levels, extra):
    net, keep = mobilenet_v2(num_classes=1001, norm_layer=FrozenBatchNorm2d), list(TAPS)[-levels:]
    net.load_state_dict(imagenet())
    net.features[:4].requires_grad_(False)     # the first convolution and the stages of stride 2 and 4, as frozen_stages=2 of ours
    return BackboneWithFPN(net.features, {k: k for k in keep}, [TAPS[k] for k in keep], 128, extra)

def same(d): # x/127.5 - 1, and no resize: the pictures come at their size
    return dict(image_mean=[.5]*3, image_std=[.5]*3, min_size=min(d.size), max_size=max(d.size), _skip_resize=True)

def tv_two_stage(d, masks=False):
    anchors = TvAnchors(tuple((s*d.scale,) for s in (4, 8, 16, 32, 64)), ((.5, 1., 2.),)*5)
    options = dict(num_classes=d.classes + 1, rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(list(TAPS), 7, 2), box_batch_size_per_image=128,
                   rpn_post_nms_top_n_train=500, rpn_post_nms_top_n_test=500, box_detections_per_img=d.detections, **same(d))
    if not masks: return Peer(FasterRCNN(tv_backbone(4, LastLevelMaxPool()), **options), first=1)
    model = MaskRCNN(tv_backbone(4, LastLevelMaxPool()), mask_roi_pool=MultiScaleRoIAlign(list(TAPS), 14, 2), mask_head=MaskRCNNHeads(128, (128,)*4, 1), **options)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(128, 128, d.classes + 1) # as wide as the pyramid, on both sides
    return Peer(model, first=1)

def tv_retinanet(d):
    sizes = tuple(tuple(s*2*2**(k/3) for k in range(3)) for s in (8, 16, 32, 64, 128))
    return Peer(RetinaNet(tv_backbone(3, LastLevelP6P7(320, 128)), d.classes, anchor_generator=TvAnchors(sizes, ((.5, 1., 2.),)*5),
                          detections_per_img=d.detections, **same(d)), first=0)

# ---- ours

def ours(d, family):
    recipe = family(zoo.mobilenet_v2(frozen_stages=FROZEN), d.classes, pixels=zoo.tf_pixels(), out_channels=128)
    if hasattr(recipe, "bbox_head"):
        recipe.bbox_head.rule.max_detections = d.detections
        base = 3 if hasattr(recipe.bbox_head, "guide") else 2 # RetinaNet's anchors: half of COCO's; guided anchoring's one square per cell: the middle of such an octave
        for a in select(recipe.bbox_head, object):
            if getattr(a, "octave_base_scale", None) == 4: a.octave_base_scale = base
            elif getattr(a, "scales", None) == (4,): a.scales = (base,)
        if hasattr(recipe.bbox_head, "points"): recipe.bbox_head.assigner.ranges = regress_ranges(anchor_free.STRIDES, 4) # half of COCO's, as RetinaNet's anchors
    else:
        rpn = getattr(recipe, "rpn_head", None)         # Fast R-CNN has none
        if rpn is not None and hasattr(rpn, "anchors"): # guided anchoring makes its own, and fewer proposals
            rpn.anchors.scales, rpn.train_rule.max_proposals, rpn.test_rule.max_proposals = (d.scale,), 500, 500
        recipe.roi_head.sampler.num, recipe.roi_head.rule.max_detections = 128, d.detections
        for head in select(recipe, object): # torchvision's box loss where the recipe has L1; a method's own loss stays
            if isinstance(loss := getattr(head, "loss_bbox", None), Config) and get_callable(loss) is L1Loss: head.loss_bbox = Config(SmoothL1Loss, beta=1/9)
    model = build(recipe)
    own = model.backbone.state_dict()
    if "conv1.bn.weight" in own: # group norm starts from scratch
        model.backbone.load_state_dict({k: v for k,v in from_torchvision(imagenet()).items() if k in own}) # all but the last convolution, which is not used
    return model

def double_head(*args, **kw): # two blocks of 256 channels instead of four of 512, for the sake of time
    recipe = roi_variants.double_head_rcnn(*args, **kw)
    head = recipe.roi_head.bbox_head
    head.num_blocks, head.conv_channels, head.block.planes = 2, 256, 64
    return recipe

def grid_rcnn(*args, **kw): # points are learnt from 64 of a step's positive boxes instead of 192, for the sake of time
    recipe = roi_variants.grid_rcnn(*args, **kw)
    recipe.roi_head.grid_head.max_rois = 64
    return recipe

# ---- SSD and its family: default boxes for cells of 15 … 120 pixels

def boxes(levels, strides=(8, 16, 32, 64, 107, 320), sides=(16, 36, 64, 100, 140, 180, 240)):
    return Config(DefaultBoxes, strides[:levels], sides[:levels], sides[1:levels+1], [(2.,)] * levels)

def imagenet_start(model): # the backbone's MobileNetV2 from its ImageNet weights
    own = model.backbone.state_dict()
    model.backbone.load_state_dict({k: v for k,v in from_torchvision(imagenet()).items() if k in own})
    return model

def ssdlite(d): # maps at strides 8, 16, 32 from MobileNetV2, one more behind them
    backbone = zoo.mobilenet_v2(frozen_stages=FROZEN, out_indices=(2, 4, 6))
    return imagenet_start(build(ssd.ssdlite(d.classes, backbone, boxes(4), (128,), zoo.tf_pixels())))

def m2det(d): # four U-shaped modules of 32 channels on strides 8 and 16
    backbone = zoo.mobilenet_v2(frozen_stages=FROZEN, out_indices=(2, 4))
    return imagenet_start(build(ssd.m2det(backbone, d.classes, anchors=boxes(5), pixels=zoo.tf_pixels(), planes=32, levels=4, scales=5, base=(64, 64), thin=32)))

def ssd_vgg(d): # VGG-16 with a quarter of the channels, from scratch; SSD's neck and head, batch norm in the backbone
    return build(ssd.ssd(Config(VGG, 16, .25, norm=batch_norm), d.classes, anchors=boxes(6), pixels=zoo.torchvision_pixels()))

def scratchdet(d): # root-ResNet-18 with a quarter of the channels, from scratch
    return build(ssd.scratchdet(d.classes, 18, anchors=boxes(6), planes=16))

# ---- one-level detectors on their own backbones, from scratch

def faster_rcnn_c4(d): # ResNet-50 with a quarter of the channels; anchors of 16 … 128 pixels; RoIs of 8 × 8
    recipe = zoo.from_scratch(zoo.faster_rcnn_c4(50, d.classes, planes=16))
    recipe.rpn_head.anchors.scales, recipe.roi_head.bbox_roi_extractor.output_size = (1, 2, 4, 8), 8
    return one_level(recipe, d)

def rfcn(d, ohem): # ResNet-18 with half of the channels, stride 8; nine places in a box; anchors of 16 … 128 pixels
    recipe = two_stage_more.rfcn(18, d.classes, ohem, bins=3, stride=8, scales=(2, 4, 8, 16), planes=32, style="pytorch", pixels=zoo.torchvision_pixels())
    return one_level(zoo.from_scratch(recipe), d)

def one_level(recipe, d):
    recipe.rpn_head.train_rule.max_proposals = recipe.rpn_head.test_rule.max_proposals = 300
    recipe.roi_head.sampler.num, recipe.roi_head.rule.max_detections = 128, d.detections
    for head in (recipe.rpn_head, recipe.roi_head.bbox_head): head.loss_bbox = Config(SmoothL1Loss, beta=1/9)
    return build(recipe)

def tridentnet(d): # ResNet-50 with a quarter of the channels, from scratch; anchors of 16 … 128 pixels; RoIs of 8 × 8, 64 a branch
    recipe = zoo.from_scratch(trident.tridentnet(50, d.classes, planes=16))
    recipe.rpn_head.anchors.scales, recipe.roi_head.bbox_roi_extractor.output_size = (1, 2, 4, 8), 8
    recipe.rpn_head.test_rule.max_proposals, recipe.roi_head.sampler.num, recipe.roi_head.rule.max_detections = 300, 64, d.detections
    recipe.roi_head.sampler.add_gt = True # as the other methods here: before the proposals are any good, there is something to learn from
    for head in (recipe.rpn_head, recipe.roi_head.bbox_head): head.loss_bbox = Config(SmoothL1Loss, beta=1/9)
    return build(recipe)

def deformed_pool(*a, modulated=True, **kw): return dcn.with_deform_pool(zoo.faster_rcnn(*a, **kw), modulated, fc_channels=256)

# ---- proposals from a file

def first_stage(d, a): # → proposals of the training and of the test pictures, read from files that a region proposal network wrote
    recipe = zoo.rpn(zoo.mobilenet_v2(frozen_stages=FROZEN), zoo.tf_pixels(), 128)
    head = recipe.bbox_head
    head.anchors.scales, head.loss_bbox = (d.scale,), Config(SmoothL1Loss, beta=1/9)
    head.train_rule.max_proposals = head.test_rule.max_proposals = 500
    torch.manual_seed(a.seed)
    model, files = imagenet_start(build(recipe)), Path(tempfile.mkdtemp())
    print("first the region proposal network", flush=True)
    train(model, loader(d, True, a.seed), Method(None, "", .01, a.iterations or 300))
    model.eval()
    found = [collect(model, make_loader(Cached(d, k, flip=False), BATCH, train=False)) for k in (True, False)]
    return [read_proposals(save_proposals(p, files/f"{i}.npz")) for i,p in enumerate(found)]

# ---- general modules in Faster R-CNN: normalised pyramid and heads (two convolutions and a linear layer); context and attention on the backbone's maps

def faster_gn(*args, conv=None, **kw): return norms.with_norm(norms.conv_heads(zoo.faster_rcnn(*args, **kw), 2), group_norm, conv, ("neck", "head"))
def faster_scratch(*args, **kw): return zoo.from_scratch(norms.with_norm(norms.conv_heads(zoo.faster_rcnn(*args, **kw), 2), Partial(group_norm, groups=8)))
def faster_maps(*args, make, **kw): return attention.on_maps(zoo.faster_rcnn(*args, **kw), make)

@dataclass
class Method:
    build:callable; data:str; rate:float; iterations:int = 600
    clip:float = 10. # largest gradient norm, 0: none
    first:callable = None # what must be there before: → extras of the training and of the test set
    like:str = None # the method whose training this one shares to the last bit; only detection differs

METHODS = dict(
    faster_rcnn=Method(partial(ours, family=zoo.faster_rcnn), "bccd", .01), tv_faster_rcnn=Method(tv_two_stage, "bccd", .01),
    retinanet=Method(partial(ours, family=zoo.retinanet), "bccd", .01, 1200), tv_retinanet=Method(tv_retinanet, "bccd", .01, 1200),
    fcos=Method(partial(ours, family=anchor_free.fcos), "bccd", .01, 1200), fsaf=Method(partial(ours, family=anchor_free.fsaf), "bccd", .01, 1200),
    fcos_improved=Method(partial(ours, family=lambda *a, **kw: anchor_free.improved(anchor_free.fcos(*a, **kw))), "bccd", .01, 1200),
    retinanet_ghm=Method(partial(ours, family=retina_variants.ghm_retinanet), "bccd", .01, 1200), ga_retinanet=Method(partial(ours, family=retina_variants.ga_retinanet), "bccd", .01, 1200),
    libra_retinanet=Method(partial(ours, family=retina_variants.libra_retinanet), "bccd", .01, 1200),
    ssdlite=Method(ssdlite, "bccd", .01, 1200), m2det=Method(m2det, "bccd", .04, 1200),
    ssd_vgg=Method(ssd_vgg, "bccd", .01, 1200), scratchdet=Method(scratchdet, "bccd", .04, 1200),
    double_head=Method(partial(ours, family=double_head), "bccd", .01), grid_rcnn=Method(partial(ours, family=grid_rcnn), "bccd", .01),
    ms_rcnn=Method(partial(ours, family=roi_variants.ms_rcnn), "dsb", .02),
    cascade_rcnn=Method(partial(ours, family=cascade.cascade_rcnn), "bccd", .01), cascade_mask_rcnn=Method(partial(ours, family=cascade.cascade_mask_rcnn), "dsb", .02),
    htc_without_semantic=Method(partial(ours, family=cascade.htc_without_semantic), "dsb", .02),
    faster_rcnn_dpool=Method(partial(ours, family=partial(deformed_pool, modulated=False)), "bccd", .01), faster_rcnn_mdpool=Method(partial(ours, family=deformed_pool), "bccd", .01),
    fcos_dcn=Method(partial(ours, family=lambda *a, **kw: anchor_free.improved(dcn.with_dcn(anchor_free.fcos(*a, **kw), (), modulated=True, heads=True))), "bccd", .01, 1200),
    tridentnet=Method(tridentnet, "bccd", .04), faster_rcnn_c4=Method(faster_rcnn_c4, "bccd", .04),
    rfcn=Method(partial(rfcn, ohem=False), "bccd", .04), rfcn_ohem=Method(partial(rfcn, ohem=True), "bccd", .04),
    fast_rcnn=Method(partial(ours, family=two_stage_more.fast_rcnn), "bccd", .01, first=first_stage),
    **{n: Method(partial(ours, family=f), "bccd", .01, like="faster_rcnn" if n == "faster_rcnn_soft_nms" else None) for n,f in dict(libra_faster_rcnn=retina_variants.libra_faster_rcnn, ga_faster_rcnn=retina_variants.ga_faster_rcnn,
        faster_rcnn_ohem=lambda *a, **kw: two_stage_more.with_ohem(zoo.faster_rcnn(*a, **kw)), faster_rcnn_soft_nms=lambda *a, **kw: two_stage_more.with_soft_nms(zoo.faster_rcnn(*a, **kw))).items()},
    faster_rcnn_gn=Method(partial(ours, family=faster_gn), "bccd", .01), faster_rcnn_gn_ws=Method(partial(ours, family=partial(faster_gn, conv=WSConv2d)), "bccd", .01),
    faster_rcnn_scratch=Method(partial(ours, family=faster_scratch), "bccd", .02, 1200),
    faster_rcnn_gcnet=Method(partial(ours, family=partial(faster_maps, make=Partial(ContextBlock, ratio=1/4))), "bccd", .01),
    faster_rcnn_attention=Method(partial(ours, family=partial(faster_maps, make=Partial(GeneralizedAttention, kind="0010"))), "bccd", .01),
    mask_rcnn=Method(partial(ours, family=zoo.mask_rcnn), "dsb", .02), tv_mask_rcnn=Method(partial(tv_two_stage, masks=True), "dsb", .02))

# ---- training and evaluation, the same for both sides

def optimiser(model, rate, iterations):
    warmup = min(100, 1 + iterations//3)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=.9, weight_decay=1e-4)
    return sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda i: min(1, (i+1)/warmup)*.1**sum(i >= f*iterations for f in (.75, .92)))

def step(model, batch, sgd, clip=0):
    "One step of a plain torchvision-style loop; returns its losses."
    losses = model(*batch)
    loss = sum(losses.values())
    sgd.zero_grad()
    loss.backward()
    if clip: nn.utils.clip_grad_norm_([p for g in sgd.param_groups for p in g["params"]], clip)
    sgd.step()
    return {k: float(v.detach()) for k,v in {**losses, "loss": loss}.items()}

def timed(f, *a): # its result, and (CPU, wall) seconds
    cpu, wall = time.process_time(), time.perf_counter()
    r = f(*a)
    return r, (time.process_time() - cpu, time.perf_counter() - wall)

def train(model, batches, m, every=20):
    sgd, schedule = optimiser(model, m.rate, m.iterations)
    times, seen, curve, begin, crc = [], [], [], time.perf_counter(), 0
    model.train()
    for i,batch in zip(range(1, m.iterations + 1), endless(batches)):
        crc = zlib.crc32(batch[0].tensor.contiguous().numpy(), crc)
        losses, t = timed(step, model, batch, sgd, m.clip)
        if not losses["loss"] < 1e4: raise FloatingPointError(f"iteration {i}: the loss is {losses['loss']}; try a smaller --lr")
        times.append(t); seen.append(losses)
        if i % every == 0 or i == m.iterations:
            mean = {k: round(sum(s[k] for s in seen)/len(seen), 4) for k in losses}
            curve.append(dict(iteration=i, lr=round(schedule.get_last_lr()[0], 6), **mean)); seen = []
            left = (time.perf_counter() - begin)/i*(m.iterations - i)/60
            print(f"{i}/{m.iterations}", *(f"{k} {v:.3f}" for k,v in mean.items()), f"{median(t[0] for t in times):.2f} s/it", f"{left:.1f} min left", sep="  ", flush=True)
        schedule.step()
    return curve, times, crc

@torch.no_grad()
def test(model, batches, d):
    evaluator = CocoEvaluator(batches.dataset.source, kinds=("bbox", "segm") if d.masks else ("bbox",), max_detections=d.detections)
    times, pictures = [], []
    model.eval()
    for images,targets in batches:
        found, t = timed(model, images)
        times.append([x/len(found) for x in t])
        evaluator.update([t.image_id for t in targets], found)
        pictures += list(zip(images.tensor, images.sizes, found))
    short = lambda row, head="": {head + k: round(row[k], 4) for k in ("AP", "AP50", "AP75", "APs", "APm", "APl") if not math.isnan(row[k])}
    metrics = {}
    for kind,ev in evaluator.matched().items():
        head = "" if kind == "bbox" else "mask_"
        metrics |= short(summary(ev), head) | {head + "per_class": {c: short(r) for c,r in per_class(evaluator, kind).items()}}
    return metrics, times, pictures

def draw(pictures, path, limit=100_000):
    "Six test pictures with the detections above 0.5 (outlines of masks where there are any), as one PNG of at most 100 kB."
    shown = pictures[::max(1, len(pictures)//6)][:6]
    photos, (h, w) = to_pil_image(make_grid([x[:, :h, :w] for x,(h,w),_ in shown], 3, 0)).filter(ImageFilter.MedianFilter(3)), shown[0][1]
    for zoom,colors in ((2, 24), (1.5, 24), (1, 48), (1, 24), (.75, 48), (.75, 24), (.5, 24)):
        page = photos.resize((int(3*w*zoom), int(2*h*zoom)), Image.LANCZOS).quantize(colors, dither=Image.Dither.NONE)
        page.putpalette(page.getpalette()[:3*colors] + COLORS)  # photos in few colours, outlines in their own
        pen = ImageDraw.Draw(page)
        for i,(_,_,o) in enumerate(shown):
            o, left, top, scale = o[o.scores > .5], i%3*w*zoom, i//3*h*zoom, zoom*h/o.size[0]
            for k,(label,(x1,y1,x2,y2)) in enumerate(zip(o.labels.tolist(), (o.boxes*scale).tolist())):
                if "masks" not in o: pen.rectangle((left + x1, top + y1, left + x2, top + y2), outline=colors + label, width=2); continue
                m = nn.functional.interpolate(o.masks[k][None, None].float(), size=(int(h*zoom), int(w*zoom)))
                edge = (m > 0) & (-nn.functional.max_pool2d(-m, 3, 1, 1) == 0)
                pen.bitmap((left, top), Image.fromarray(edge[0, 0].numpy()), fill=colors + k%3)
        page.save(path, optimize=True)
        if path.stat().st_size <= limit: return

# ---- what is written down

def setting(a):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)|$", info)[1] or platform.machine()
    return dict(seed=a.seed, frozen_stages=FROZEN, threads=torch.get_num_threads(), machine=f"{cpu}, {os.cpu_count()} cores",
                versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__),
                command=re.sub(r" --keep[ =]\S+", "", " ".join(["python benchmarks/small.py", *sys.argv[1:]])), date=f"{datetime.date.today()}")

def seconds(name, times): return {f"{name}_{kind}": round(median(t[i] for t in times), 4) for i,kind in enumerate(("cpu", "wall"))}

def append(row, file):
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT/file, "a") as f: f.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1), flush=True)

def make(name, a):
    torch.manual_seed(a.seed)
    return METHODS[name].build(DATA[METHODS[name].data])

def run(name, a, rate):
    m = METHODS[name]
    m = replace(m, rate=rate or m.rate, iterations=a.iterations or (120 if a.sweep else m.iterations), clip=m.clip if a.clip is None else a.clip)
    d, model, row = DATA[m.data], make(name, a), dict(method=name, data=m.data, iterations=m.iterations, batch=BATCH, lr=m.rate, clip=m.clip, **setting(a))
    print(f"{name}: {m.iterations} iterations of {BATCH}, rate {m.rate:g}, gradient norm at most {m.clip or 'anything'}, seed {a.seed}, {m.data}", flush=True)
    extras = [[e] for e in m.first(d, a)] if m.first else [(), ()]
    try: curve, times, crc = train(model, loader(d, True, a.seed, extras[0]), m)
    except FloatingPointError as e:
        if a.sweep: return append(row | dict(failed=str(e)), "sweep.jsonl")
        sys.exit(f"{name}: {e}")
    metrics, test_times, pictures = test(model, loader(d, False, a.seed, extras[1]), d)
    params, stem = list(model.parameters()), f"{name}_lr{m.rate:g}_clip{m.clip:g}_i{m.iterations}_seed{a.seed}"
    row |= dict(**metrics, loss=curve[-1]["loss"], **seconds("s_per_iteration", times), **seconds("inference_s_per_image", test_times),
                peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, parameters=sum(p.numel() for p in params),
                trained=sum(p.numel() for p in params if p.requires_grad), pictures_crc=crc, run=stem)
    append(row, "sweep.jsonl" if a.sweep else "rows.jsonl")
    if a.sweep: return
    draw(pictures, OUT/f"{stem}.png")
    (OUT/f"{stem}.curve.json").write_text(json.dumps(curve))
    if a.keep: Path(a.keep).mkdir(parents=True, exist_ok=True); torch.save(model.state_dict(), Path(a.keep)/f"{name}.pt")

def again(name, a):
    "Detections of kept weights are evaluated anew, after a change of what a trained network predicts: its row and picture are replaced."
    rows = [json.loads(line) for line in (OUT/"rows.jsonl").read_text().splitlines()]
    source = METHODS[name].like or name
    row = next(r for r in rows if r["method"] == source)
    if source != name: # a row of its own, with the other's training
        rows, row = [r for r in rows if r["method"] != name], dict(row, method=name, trained_as=source, command=re.sub(r" --test[ =]\S+", " --test FOLDER", setting(a)["command"]), run=row["run"].replace(source, name, 1))
        rows.append(row)
        (OUT/f"{row['run']}.curve.json").write_text((OUT/f"{row['run'].replace(name, source, 1)}.curve.json").read_text())
    d, model, extras = DATA[row["data"]], make(name, a), METHODS[name].first
    if extras: sys.exit(f"{name}: its proposals were not kept")
    model.load_state_dict(torch.load(Path(a.test)/f"{source}.pt", weights_only=True))
    metrics, times, pictures = test(model, loader(d, False, a.seed), d)
    print(f"{name}: AP {row['AP']} → {metrics['AP']}, AP50 {row['AP50']} → {metrics['AP50']}", flush=True)
    row |= dict(**metrics, **seconds("inference_s_per_image", times), tested=f"{datetime.date.today()}")
    (OUT/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw(pictures, OUT/f"{row['run']}.png")

def speed(names, a, warm=3):
    "Steps of both in turn in one process, so that what else the machine does hits both alike."
    models, d, kept = [make(n, a) for n in names], DATA[METHODS[names[0]].data], [Path(a.keep or "")/f"{n}.pt" for n in names]
    trained = bool(a.keep) and all(k.exists() for k in kept)
    if trained: [m.load_state_dict(torch.load(k, weights_only=True), strict=False) for m,k in zip(models, kept)]
    sgds, row = [optimiser(m, 1e-3, 10**6)[0] for m in models], dict(speed=names, pairs=a.pairs, trained=trained, batch=BATCH)
    for what in ("iteration", "image"):
        learn, times = what == "iteration", ([], [])
        for i,batch in zip(range(warm + a.pairs), endless(loader(d, learn, a.seed))):
            for k in (0, 1) if i % 2 else (1, 0):
                models[k].train(learn)
                with torch.set_grad_enabled(learn): _, t = timed(step, models[k], batch, sgds[k]) if learn else timed(models[k], batch[0])
                if i >= warm: times[k].append([x if learn else x/len(batch[0]) for x in t])
            print(f"{what} {i + 1}/{warm + a.pairs}", flush=True)
        for n,t in zip(names, times): row[n] = row.get(n, {}) | seconds(f"s_per_{what}", t)
        row |= {f"ratio_{what}_{kind}": round(median(p[j]/o[j] for o,p in zip(*times)), 3) for j,kind in enumerate(("cpu", "wall"))}
    append(row | setting(a), "speed.jsonl")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("method", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--speed", action="store_true", help="METHOD and PEER in turn: ratio of time per iteration and per image (above 1: METHOD is faster)")
    p.add_argument("--sweep", action="store_true", help="120 iterations at each of the rates " + ", ".join(map(str, RATES)))
    p.add_argument("--iterations", type=int); p.add_argument("--seed", type=int, default=0); p.add_argument("--lr", type=float)
    p.add_argument("--clip", type=float, help="largest gradient norm; 0: none"); p.add_argument("--threads", type=int, default=1)
    p.add_argument("--pairs", type=int, default=12); p.add_argument("--keep", help="folder for the trained weights; --speed starts from them")
    p.add_argument("--test", metavar="FOLDER", help="no training: evaluate the weights that --keep FOLDER left there, and replace the rows' results")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.speed: speed(a.method, a)
    elif a.test: [again(n, a) for n in a.method]
    else: [run(n, a, rate) for n in a.method for rate in (RATES if a.sweep else [a.lr])]
