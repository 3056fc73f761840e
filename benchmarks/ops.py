"""Operators against their peers, in one run: python benchmarks/ops.py [--quick] [--threads 1 2] [--only WORD] [--out FILE]

On one thread CPU time of that thread (time.thread_time), on more of them wall time; ours and the peer's calls in turns, medians and
minima in milliseconds; a ratio is peer / ours. Absolute times belong to the machine; ratios travel. Every row was first checked
for equal results: identical where something is chosen, within the stated difference where sums are rounded.
"""
import os
import argparse, json, platform, statistics, sys, time
from pathlib import Path
import torch, torchvision
from torchvision.models.detection._utils import Matcher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_det
from notebook_det.losses.classification import FocalLoss, Loss
from notebook_det.ops.assign import max_iou_assign
from notebook_det.ops.boxes import box_giou, box_iou
from notebook_det.ops.deform_conv import deform_conv2d
from notebook_det.ops.library import operators, REFERENCES
from notebook_det.ops.masks import encode_rle, paste_masks, paste_rle
from notebook_det.ops.nms import batched_nms, multiclass_nms, nms, soft_nms
from notebook_det.ops.roi import pyramid_roi_align

SEED = 0


def boxes_like_a_detector(n, g, objects=40, size=(800, 1333)):
    "70 % of the boxes crowd around some objects, the others lie anywhere."
    r, extent = lambda *s: torch.rand(*s, generator=g), torch.tensor([size[1], size[0]], dtype=torch.float32)
    c, wh = r(objects, 2)*extent, r(objects, 2)*200 + 20
    k, near = torch.randint(0, objects, (n,), generator=g), r(n, 1) < .7
    centre = torch.where(near, c[k] + (r(n, 2)-.5)*wh[k]*.5, r(n, 2)*extent)
    side = torch.where(near, wh[k]*(.7+.6*r(n, 2)), r(n, 2)*200 + 20)
    return torch.cat((centre - side/2, centre + side/2), 1)


def retina_anchors(h=800, w=1344):
    out = []
    for s in (8, 16, 32, 64, 128):
        ratio, scale = torch.meshgrid(torch.tensor([.5, 1, 2]), 4*s*2**(torch.arange(3)/3), indexing="ij")
        half = torch.stack((scale/ratio**.5, scale*ratio**.5), -1).reshape(-1, 2)/2
        y, x = torch.meshgrid(torch.arange(-(-h//s))*s, torch.arange(-(-w//s))*s, indexing="ij")
        c = torch.stack((x, y), -1).reshape(-1, 1, 2)
        out.append(torch.cat((c - half, c + half), -1).reshape(-1, 4))
    return torch.cat(out)


def measure(ours, peer, budget, clock):
    "In turns: one call of the peer, then ours for about as long (50 calls at most), for about `budget` seconds."
    def once(f):
        t = clock(); f(); return (clock() - t)*1e3
    once(ours), once(peer)
    a, b = [once(ours)], [once(peer)]
    few = int(min(50, max(1, b[0]/max(a[0], 1e-3))))
    while (sum(a) + sum(b))/1e3 < budget or len(b) < (5 if b[0] < 400 else 3): b.append(once(peer)); a += [once(ours) for _ in range(few)]
    return dict(ours_ms=statistics.median(a), peer_ms=statistics.median(b), ours_min_ms=min(a), peer_min_ms=min(b), ours_calls=len(a), peer_calls=len(b))


def off(a, b):
    "Largest difference of two results, a tensor or several."
    a, b = (x if isinstance(x, (tuple, list)) else (x,) for x in (a, b))
    return max((x - y).abs().max().item() for x, y in zip(a, b))


def cases(quick):
    g = torch.Generator().manual_seed(SEED)
    sizes = (2000, 10000) if quick else (2000, 10000, 50000)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b)) if isinstance(a, tuple) else torch.equal(a, b)
    tv = torchvision.ops
    for n in sizes:
        b, s = boxes_like_a_detector(n, g), torch.rand(n, generator=g)
        yield "nms", dict(boxes=n, note="IoU 0.5"), lambda: nms(b, s, .5), lambda: tv.nms(b, s, .5), same, "torchvision"
    for n in sizes:
        b, s = boxes_like_a_detector(n, g), torch.randperm(n, generator=g)/n              # no ties: torchvision's last sort is not stable
        groups = torch.randint(0, 80, (n,), generator=g)
        yield "batched_nms", dict(boxes=n, groups=80, note="IoU 0.5"), lambda: batched_nms(b, s, groups, .5), lambda: tv.batched_nms(b, s, groups, .5), same, "torchvision"
        yield ("batched_nms_top100", dict(boxes=n, groups=80, note="IoU 0.5, the best 100"), lambda: batched_nms(b, s, groups, .5, 100),
               lambda: tv.batched_nms(b, s, groups, .5)[:100], same, "torchvision")
    b = boxes_like_a_detector(1000, g)
    p = (torch.randperm(80000, generator=g) + 1).div(80001).reshape(1000, 80)**4
    def detector_tail(t):
        row, label = (p > t).nonzero().unbind(1)
        keep = tv.batched_nms(b[row], p[row, label], label, .5)[:100]
        return b[row[keep]], p[row[keep], label[keep]], label[keep], row[keep]
    for n in sizes:
        t = p.flatten().sort(descending=True).values[n].item()
        yield ("multiclass_nms", dict(boxes=n, rows=1000, classes=80, note=f"candidates above {t:.3g}, IoU 0.5, the best 100"),
               lambda: multiclass_nms(b, p, t, .5, 100), lambda: detector_tail(t), same, "torchvision")
    anchors = retina_anchors()
    for G in (7, 50):
        objects = boxes_like_a_detector(G, g)
        matcher = Matcher(.5, .4, allow_low_quality_matches=True)
        what = dict(boxes=len(anchors), objects=G, note="pos 0.5, neg 0.4, low-quality matches")
        reference = lambda: REFERENCES["notebook_det::max_iou_assign"](anchors, objects, .5, -1., .4, 0., True, True)
        exact = lambda a, b: same(a, reference())                                          # the Matcher's low-quality rule is another one
        yield ("max_iou_assign", what, lambda: max_iou_assign(anchors, objects, .5, .4), lambda: matcher(tv.box_iou(objects, anchors)), exact,
               "torchvision box_iou + Matcher")
        yield ("max_iou_assign_reference", what, lambda: max_iou_assign(anchors, objects, .5, .4), reference, same, "our readable reference in torch")


def more_cases(quick):
    "The operators that came later; every peer is what one would write with torch and torchvision."
    g, tv = torch.Generator().manual_seed(SEED + 1), torchvision.ops
    rand = lambda *s: torch.randn(*s, generator=g)
    within = lambda eps: lambda a, b: off(a, b) <= eps
    # soft suppression
    b, s = boxes_like_a_detector(1000, g), torch.rand(1000, generator=g)
    for k, method in enumerate(("linear", "gaussian")):
        yield ("soft_nms", dict(boxes=1000, note=method), lambda: soft_nms(b, s, .3, method)[1], lambda: REFERENCES["notebook_det::soft_nms"](b, s, .3, .5, 1e-3, k, -1)[1],
               within(1e-6), "the loop in Python")
    # overlaps of all pairs
    anchors, objects = retina_anchors(), boxes_like_a_detector(50, g)
    for f, peer in ((box_iou, tv.box_iou), (box_giou, tv.generalized_box_iou)):
        yield f.__name__, dict(boxes=len(anchors), objects=50, note=f.__name__), lambda: f(anchors, objects), lambda: peer(anchors, objects), within(2e-6), "torchvision"
    # RoIAlign: 1,000 boxes, four levels of 256 channels
    R, C = (200, 64) if quick else (1000, 256)
    maps = [rand(1, C, 800//s, 1344//s) for s in (4, 8, 16, 32)]; scales = [1/4, 1/8, 1/16, 1/32]
    r = boxes_like_a_detector(R, g, size=(800, 1344)); r = torch.stack((r[:,0].clamp(0, 1344), r[:,1].clamp(0, 800), r[:,2].clamp(0, 1344), r[:,3].clamp(0, 800)), 1)
    level = ((r[:,2] - r[:,0])*(r[:,3] - r[:,1])).clamp(min=0).sqrt().div(56).add(1e-6).log2().floor().clamp(0, 3).long()
    rois = torch.cat((torch.zeros(R, 1), r), 1)
    def loop(maps, rois, level):
        out = rois.new_zeros(len(rois), C, 7, 7)
        for k, (m, s) in enumerate(zip(maps, scales)):
            mine = (level == k).nonzero().flatten(); out[mine] = tv.roi_align(m, rois[mine], 7, s, 0, True)
        return out
    for layout, name in ((torch.channels_last, "channels last"), (torch.contiguous_format, "planes")):
        here = [m.contiguous(memory_format=layout) for m in maps]
        yield ("roi_align", dict(boxes=R, note=f"forward, {C} channels, 7 × 7, four levels, {name}"), lambda: pyramid_roi_align(here, rois, level, 7, scales), lambda: loop(maps, rois, level),
               within(1e-4), "torchvision, level by level")
        few, leaves, theirs = R//2, [m.requires_grad_() for m in here], [m.clone().requires_grad_() for m in maps]
        ours, peer, y = pyramid_roi_align(leaves, rois[:few], level[:few], 7, scales), loop(theirs, rois[:few], level[:few]), rand(few, C, 7, 7)
        yield ("roi_align_backward", dict(boxes=few, note=f"backward, {C} channels, 7 × 7, four levels, {name}"), lambda: torch.autograd.grad(ours, leaves, y, retain_graph=True),
               lambda: torch.autograd.grad(peer, theirs, y, retain_graph=True), within(5e-4), "torchvision, level by level")
    del maps, here, leaves, theirs, ours, peer
    # focal loss, forward and backward
    n = 20_000 if quick else 201_600
    x, labels, loss = (rand(n, 80) - 3).requires_grad_(), torch.where(torch.rand(n, generator=g) < .01, torch.randint(0, 80, (n,), generator=g), 80), FocalLoss(reduction="sum")
    hot = torch.nn.functional.one_hot(labels, 81)[:,:80].float()
    run = lambda f: lambda: torch.autograd.grad(f(), x)
    for name, peer in (("the formula in torch", lambda: Loss.forward(loss, x, labels)), ("torchvision, one-hot", lambda: tv.sigmoid_focal_loss(x, hot, reduction="sum"))):
        yield "focal_loss", dict(boxes=n, classes=80, note="forward and backward"), run(lambda: loss(x, labels)), run(peer), within(1e-5), name
    del x, hot
    # deformable convolution, v2
    C, (h, w) = (64, (40, 50)) if quick else (256, (100, 168))
    x, offset, weight, mask, y = (t.requires_grad_() for t in (rand(1, C, h, w), rand(1, 18, h, w)*2, rand(C, C, 3, 3)*.02, torch.rand(1, 9, h, w, generator=g), rand(1, C, h, w)))
    leaves, last = (x, offset, weight, mask), x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    note = f"{C} channels, 3 × 3, {h} × {w} places, v2"
    with torch.no_grad():
        yield ("deform_conv2d", dict(boxes=h*w, note="forward, " + note), lambda: deform_conv2d(last.detach(), offset.detach(), weight.detach(), None, 1, 1, 1, mask.detach()),
               lambda: tv.deform_conv2d(x.detach(), offset.detach(), weight.detach(), None, 1, 1, 1, mask.detach()), within(1e-3), "torchvision")
    ours, peer = deform_conv2d(last, offset, weight, None, 1, 1, 1, mask), tv.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)
    yield ("deform_conv2d_backward", dict(boxes=h*w, note="backward, " + note), lambda: torch.autograd.grad(ours, (last, *leaves[1:]), y, retain_graph=True),
           lambda: torch.autograd.grad(peer, leaves, y, retain_graph=True), within(2e-2), "torchvision")
    del ours, peer
    # masks: a hundred soft discs in boxes of 40 to 340 pixels
    from torchvision.models.detection.roi_heads import paste_masks_in_image
    line = torch.linspace(-1, 1, 28); angle, radius = torch.atan2(line[:,None], line[None]), (line[:,None]**2 + line[None]**2).sqrt()
    masks = torch.stack([torch.sigmoid(8*(.8 + .15*torch.sin(3*angle + k) - radius)) for k in range(100)])
    c = torch.rand(100, 2, generator=g)*torch.tensor([1100., 600.]); boxes = torch.cat((c, c + 40 + torch.rand(100, 2, generator=g)*300), 1); size = (800, 1333)
    by_hand = lambda: paste_masks_in_image(masks[:,None], boxes, size)[:,0] > .5
    mostly = lambda a, b: (a != b).float().mean().item() < 1e-3                            # torchvision's rule is another one: whole pixels, an expanded box
    yield "paste_masks", dict(boxes=100, note="100 masks to 800 × 1333, bool"), lambda: paste_masks(masks, boxes, size), by_hand, mostly, "torchvision"
    yield ("paste_rle", dict(boxes=100, note="100 masks to 800 × 1333, run-length codes"), lambda: paste_rle(masks, boxes, size), lambda: encode_rle(by_hand()),
           lambda a, b: a == encode_rle(paste_masks(masks, boxes, size)), "torchvision + pycocotools")


def machine():
    "What the times belong to, without names of hosts."
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = lambda k: next((l.split(":", 1)[1].strip() for l in info.splitlines() if l.startswith(k)), "")
    isa = [f for f in ("avx2", "avx512f", "avx512bw") if f in field("flags").split()]
    return dict(cpu=field("model name") or platform.processor(), cores=os.cpu_count(), isa=isa, system=f"{platform.system()} {platform.machine()}")


def table(quick, threads, only, seconds):
    "Rows of one number of threads."
    torch.set_num_threads(threads)
    rows, clock = [], time.thread_time if threads == 1 else time.perf_counter
    for op, what, ours, peer, same, name in (c for f in (cases, more_cases) for c in f(quick)):
        if only and not any(w in op for w in only): continue
        r = dict(op=op, **what, peer=name, equal=bool(same(ours(), peer())), **measure(ours, peer, seconds, clock))
        r |= dict(ratio=r["peer_ms"]/r["ours_ms"], ratio_of_minima=r["peer_min_ms"]/r["ours_min_ms"])
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()})
        print(f"{op:26} {what['boxes']:>7,} {what.get('objects', ''):>3} ours {r['ours_ms']:9.3f} ms  {name}: {r['peer_ms']:9.2f} ms  ratio {r['ratio']:6.1f}"
              f" (of minima {r['ratio_of_minima']:6.1f})  {'equal' if r['equal'] else 'NOT EQUAL'}  {what.get('note', '')}", flush=True)
    return rows


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--quick", action="store_true", help="smaller sizes, less time")
    args.add_argument("--threads", type=int, nargs="+", default=[1], help="one table for each number: 1, or 1 2")
    args.add_argument("--only", nargs="+", help="operators whose name contains one of these words; the other rows of the file stay")
    args.add_argument("--seconds", type=float, help="for each row, about")
    args.add_argument("--out", default=str(Path(__file__).parent/"results"/"ops_cpu.json"))
    args = args.parse_args()
    tables = {n: table(args.quick, n, args.only, args.seconds or (.5 if args.quick else 6.)) for n in args.threads}
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, notebook_det=notebook_det.__version__)
    out = dict(command=" ".join(["python benchmarks/ops.py", *sys.argv[1:]]), timing="medians of calls in turns, one of the peer, up to 50 of ours; one thread: its CPU time, more: wall time", seed=SEED,
               operators=operators(), versions=versions, machine=machine())
    old = json.loads(Path(args.out).read_text()) if args.only and Path(args.out).exists() else {}
    for n, rows in tables.items():
        key = "rows" if n == 1 else f"rows_{n}_threads"
        kept = [r for r in old.get(key, []) if not any(w in r["op"] for w in args.only or ())] if old else []
        out[key] = kept + rows
    out = {**{k: v for k, v in old.items() if k.startswith("rows")}, **out}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("written to", os.path.relpath(args.out))
    return 0 if all(r["equal"] for rows in tables.values() for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
