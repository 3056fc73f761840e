"""Operators against their peers, in one run: python benchmarks/ops.py [--quick] [--threads 1 2] [--growth] [--only WORD] [--out FILE]

On one thread CPU time of that thread (time.thread_time), on more of them wall time; ours and the peer's calls in turns, medians and
minima in milliseconds; a ratio is peer / ours. Absolute times belong to the machine; ratios travel. Every row was first checked
for equal results: identical where something is chosen, within the stated difference where sums are rounded. `--growth` times
small and large inputs too, on one thread, for the curves of the operators' notebooks.
"""
import os
import argparse, json, platform, statistics, sys, time
from itertools import chain
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
from notebook_det.ops.pool import deform_roi_pool, max_roi_pool
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


# Every function below gives cases of one size: operator, what it is asked, ours, the peer, the comparison of their results, the
# peer's name. The peer is what one would write with torch and torchvision, or our readable reference where those have nothing.
tv = torchvision.ops
seeded = lambda k=0: torch.Generator().manual_seed(SEED + k)
same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b)) if isinstance(a, tuple) else torch.equal(a, b)
within = lambda eps: lambda a, b: off(a, b) <= eps


def suppression(n):
    g = seeded()
    b, s = boxes_like_a_detector(n, g), torch.randperm(n, generator=g)/n                  # no ties: torchvision's last sort is not stable
    groups = torch.randint(0, 80, (n,), generator=g)
    yield "nms", dict(boxes=n, note="IoU 0.5"), lambda: nms(b, s, .5), lambda: tv.nms(b, s, .5), same, "torchvision"
    yield "batched_nms", dict(boxes=n, groups=80, note="IoU 0.5"), lambda: batched_nms(b, s, groups, .5), lambda: tv.batched_nms(b, s, groups, .5), same, "torchvision"
    yield ("batched_nms_top100", dict(boxes=n, groups=80, note="IoU 0.5, the best 100"), lambda: batched_nms(b, s, groups, .5, 100),
           lambda: tv.batched_nms(b, s, groups, .5)[:100], same, "torchvision")


def classwise(n): # the tail of a detector: n candidates, or all above a threshold
    g = seeded()
    b, p = boxes_like_a_detector(1000, g), (torch.randperm(80000, generator=g) + 1).div(80001).reshape(1000, 80)**4
    t = n if n < 1 else p.flatten().sort(descending=True).values[n].item()
    def tail():
        row, label = (p > t).nonzero().unbind(1)
        keep = tv.batched_nms(b[row], p[row, label], label, .5)[:100]
        return b[row[keep]], p[row[keep], label[keep]], label[keep], row[keep]
    yield ("multiclass_nms", dict(boxes=int((p > t).sum()), rows=1000, classes=80, note=f"candidates above {t:.3g}, IoU 0.5, the best 100"), lambda: multiclass_nms(b, p, t, .5, 100), tail, same, "torchvision")


def soft(n):
    g = seeded()
    b, s = boxes_like_a_detector(n, g), torch.rand(n, generator=g)
    for k, method in enumerate(("linear", "gaussian")):
        yield ("soft_nms", dict(boxes=n, note=method), lambda: soft_nms(b, s, .3, method)[1], lambda: REFERENCES["notebook_det::soft_nms"](b, s, .3, .5, 1e-3, k, -1)[1],
               within(1e-6), "the loop in Python")


def anchors_and_objects(n, objects):
    g, a = seeded(), retina_anchors()
    return a if n >= len(a) else a[torch.randperm(len(a), generator=g)[:n]], boxes_like_a_detector(objects, g)


def assignment(n, objects=50):
    anchors, boxes = anchors_and_objects(n, objects)
    matcher, what = Matcher(.5, .4, allow_low_quality_matches=True), dict(boxes=len(anchors), objects=objects, note="pos 0.5, neg 0.4, low-quality matches")
    reference = lambda: REFERENCES["notebook_det::max_iou_assign"](anchors, boxes, .5, -1., .4, 0., True, True)
    exact = lambda a, b: same(a, reference())                                              # the Matcher's low-quality rule is another one
    yield "max_iou_assign", what, lambda: max_iou_assign(anchors, boxes, .5, .4), lambda: matcher(tv.box_iou(boxes, anchors)), exact, "torchvision box_iou + Matcher"
    yield "max_iou_assign_reference", what, lambda: max_iou_assign(anchors, boxes, .5, .4), reference, same, "our readable reference in torch"


def overlaps(n, objects=50):
    anchors, boxes = anchors_and_objects(n, objects)
    for f, peer in ((box_iou, tv.box_iou), (box_giou, tv.generalized_box_iou)):
        yield f.__name__, dict(boxes=len(anchors), objects=objects, note=f.__name__), lambda: f(anchors, boxes), lambda: peer(anchors, boxes), within(2e-6), "torchvision"


def rois_like_a_detector(R, g): # [R,5] and each one's level
    r = boxes_like_a_detector(R, g, size=(800, 1344)); r = torch.stack((r[:,0].clamp(0, 1344), r[:,1].clamp(0, 800), r[:,2].clamp(0, 1344), r[:,3].clamp(0, 800)), 1)
    level = ((r[:,2] - r[:,0])*(r[:,3] - r[:,1])).clamp(min=0).sqrt().div(56).add(1e-6).log2().floor().clamp(0, 3).long()
    return torch.cat((torch.zeros(R, 1), r), 1), level


def roi(R, C=256, layouts=((torch.channels_last, "channels last"), (torch.contiguous_format, "planes"))):
    g, scales = seeded(1), [1/4, 1/8, 1/16, 1/32]
    maps, (rois, level) = [torch.randn(1, C, 800//s, 1344//s, generator=g) for s in (4, 8, 16, 32)], rois_like_a_detector(R, g)
    def loop(maps, rois, level):
        out = rois.new_zeros(len(rois), C, 7, 7)
        for k, (m, s) in enumerate(zip(maps, scales)):
            mine = (level == k).nonzero().flatten(); out[mine] = tv.roi_align(m, rois[mine], 7, s, 0, True)
        return out
    for layout, name in layouts:
        here, note = [m.contiguous(memory_format=layout) for m in maps], f"{C} channels, 7 × 7, four levels, {name}"
        yield ("roi_align", dict(boxes=R, note="forward, " + note), lambda: pyramid_roi_align(here, rois, level, 7, scales), lambda: loop(maps, rois, level), within(1e-4), "torchvision, level by level")
        few, leaves, theirs = max(1, R//2), [m.requires_grad_() for m in here], [m.clone().requires_grad_() for m in maps]
        ours, peer, y = pyramid_roi_align(leaves, rois[:few], level[:few], 7, scales), loop(theirs, rois[:few], level[:few]), torch.randn(few, C, 7, 7, generator=g)
        yield ("roi_align_backward", dict(boxes=few, note="backward, " + note), lambda: torch.autograd.grad(ours, leaves, y, retain_graph=True),
               lambda: torch.autograd.grad(peer, theirs, y, retain_graph=True), within(5e-4), "torchvision, level by level")


def pooling(R, C=256):
    g = seeded(1)
    last = torch.randn(1, C, 100, 168, generator=g).contiguous(memory_format=torch.channels_last)
    (rois, _), offset = rois_like_a_detector(R, g), torch.randn(R, 2, 7, 7, generator=g)*.1
    yield ("deform_roi_pool", dict(boxes=R, note=f"{C} channels, 7 × 7, 4 × 4 points"), lambda: deform_roi_pool(last, rois, offset, 7, 1/8, 4), lambda: REFERENCES["notebook_det::deform_roi_pool"](last, rois, offset, 7, 7, 1/8, 4, .1).permute(0, 3, 1, 2),
           within(1e-4), "our readable reference in torch")
    yield ("max_roi_pool", dict(boxes=R, note=f"{C} channels, 7 × 7"), lambda: max_roi_pool(last, rois, 7, 1/8), lambda: REFERENCES["notebook_det::max_roi_pool"](last, rois, 7, 7, 1/8)[0].permute(0, 3, 1, 2),
           same, "our readable reference in torch")


def focal(n, classes=80):
    g = seeded(1)
    x, labels, loss = (torch.randn(n, classes, generator=g) - 3).requires_grad_(), torch.where(torch.rand(n, generator=g) < .01, torch.randint(0, classes, (n,), generator=g), classes), FocalLoss(reduction="sum")
    hot, run = torch.nn.functional.one_hot(labels, classes + 1)[:,:classes].float(), lambda f: lambda: torch.autograd.grad(f(), x)
    for name, peer in (("the formula in torch", lambda: Loss.forward(loss, x, labels)), ("torchvision, one-hot", lambda: tv.sigmoid_focal_loss(x, hot, reduction="sum"))):
        yield "focal_loss", dict(boxes=n, classes=classes, note="forward and backward"), run(lambda: loss(x, labels)), run(peer), within(1e-5), name


def deform(h, w, C=256):
    g = seeded(1)
    rand = lambda *s: torch.randn(*s, generator=g)
    x, offset, weight, mask, y = (t.requires_grad_() for t in (rand(1, C, h, w), rand(1, 18, h, w)*2, rand(C, C, 3, 3)*.02, torch.rand(1, 9, h, w, generator=g), rand(1, C, h, w)))
    leaves, last = (x, offset, weight, mask), x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    note = f"{C} channels, 3 × 3, {h} × {w} places, v2"
    with torch.no_grad():
        yield ("deform_conv2d", dict(boxes=h*w, note="forward, " + note), lambda: deform_conv2d(last.detach(), offset.detach(), weight.detach(), None, 1, 1, 1, mask.detach()),
               lambda: tv.deform_conv2d(x.detach(), offset.detach(), weight.detach(), None, 1, 1, 1, mask.detach()), within(1e-3), "torchvision")
    ours, peer = deform_conv2d(last, offset, weight, None, 1, 1, 1, mask), tv.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)
    yield ("deform_conv2d_backward", dict(boxes=h*w, note="backward, " + note), lambda: torch.autograd.grad(ours, (last, *leaves[1:]), y, retain_graph=True),
           lambda: torch.autograd.grad(peer, leaves, y, retain_graph=True), within(2e-2), "torchvision")


def pasting(n, size=(800, 1333)): # soft discs in boxes of 40 to 340 pixels
    from torchvision.models.detection.roi_heads import paste_masks_in_image
    line = torch.linspace(-1, 1, 28); angle, radius = torch.atan2(line[:,None], line[None]), (line[:,None]**2 + line[None]**2).sqrt()
    masks, g = torch.stack([torch.sigmoid(8*(.8 + .15*torch.sin(3*angle + k) - radius)) for k in range(n)]), seeded(1)
    c = torch.rand(n, 2, generator=g)*torch.tensor([1100., 600.]); boxes = torch.cat((c, c + 40 + torch.rand(n, 2, generator=g)*300), 1)
    by_hand, note = lambda: paste_masks_in_image(masks[:,None], boxes, size)[:,0] > .5, f"{n} masks to {size[0]} × {size[1]}, "
    mostly = lambda a, b: (a != b).float().mean().item() < 1e-3                            # torchvision's rule is another one: whole pixels, an expanded box
    yield "paste_masks", dict(boxes=n, note=note + "bool"), lambda: paste_masks(masks, boxes, size), by_hand, mostly, "torchvision"
    yield ("paste_rle", dict(boxes=n, note=note + "run-length codes"), lambda: paste_rle(masks, boxes, size), lambda: encode_rle(by_hand()),
           lambda a, b: a == encode_rle(paste_masks(masks, boxes, size)), "torchvision + pycocotools")


def cases(quick):
    "The table: each operator at the size that detectors have (`quick`: smaller)."
    sizes = (2000, 10000) if quick else (2000, 10000, 50000)
    yield from chain(*map(suppression, sizes), *map(classwise, (*sizes, .001)), assignment(201_600, 7), assignment(201_600), soft(1000), overlaps(201_600))
    yield from chain(*((roi(200, 64), pooling(50, 64), focal(20_000), deform(40, 50, 64)) if quick else (roi(1000), pooling(100), focal(201_600), deform(100, 168))), pasting(100))


def growing(quick):
    "The curves: small inputs and large ones."
    last = lambda R: roi(R, layouts=((torch.channels_last, "channels last"),))
    for f, sizes in ((suppression, (100, 1000, 10_000, 50_000)), (classwise, (100, 1000, 10_000, 50_000)), (soft, (30, 100, 300, 1000)), (assignment, (200, 2000, 20_000, 201_600)),
                     (overlaps, (200, 2000, 20_000, 201_600)), (last, (2, 20, 200, 1000)), (pooling, (2, 20, 200)), (focal, (200, 2000, 20_000, 201_600)), (lambda h: deform(h, 2*h), (5, 10, 20, 40, 80)), (pasting, (1, 10, 100))):
        for n in sizes[:2] if quick else sizes: yield from (c for c in f(n) if c[1]["note"] != "gaussian")


def machine():
    "What the times belong to, without names of hosts."
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = lambda k: next((l.split(":", 1)[1].strip() for l in info.splitlines() if l.startswith(k)), "")
    isa = [f for f in ("avx2", "avx512f", "avx512bw") if f in field("flags").split()]
    return dict(cpu=field("model name") or platform.processor(), cores=os.cpu_count(), isa=isa, system=f"{platform.system()} {platform.machine()}")


def table(all_cases, threads, only, seconds):
    "Rows of one number of threads."
    torch.set_num_threads(threads)
    rows, clock = [], time.thread_time if threads == 1 else time.perf_counter
    for op, what, ours, peer, agree, name in all_cases:
        if only and not any(w in op for w in only): continue
        r = dict(op=op, **what, peer=name, equal=bool(agree(ours(), peer())), **measure(ours, peer, seconds, clock))
        r |= dict(ratio=r["peer_ms"]/r["ours_ms"], ratio_of_minima=r["peer_min_ms"]/r["ours_min_ms"])
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()})
        print(f"{op:26} {what['boxes']:>7,} {what.get('objects', ''):>3} ours {r['ours_ms']:9.3f} ms  {name}: {r['peer_ms']:9.2f} ms  ratio {r['ratio']:6.1f}"
              f" (of minima {r['ratio_of_minima']:6.1f})  {'equal' if r['equal'] else 'NOT EQUAL'}  {what.get('note', '')}", flush=True)
    return rows


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--quick", action="store_true", help="smaller sizes, less time")
    args.add_argument("--threads", type=int, nargs="+", default=[1], help="one table for each number: 1, or 1 2")
    args.add_argument("--growth", action="store_true", help="also small and large inputs, about a second each")
    args.add_argument("--only", nargs="+", help="operators whose name contains one of these words; the other rows of the file stay")
    args.add_argument("--seconds", type=float, help="for each row, about")
    args.add_argument("--out", default=str(Path(__file__).parent/"results"/"ops_cpu.json"))
    args = args.parse_args()
    tables = {"rows" if n == 1 else f"rows_{n}_threads": table(cases(args.quick), n, args.only, args.seconds or (.5 if args.quick else 6.)) for n in args.threads}
    if args.growth: tables["growth"] = table(growing(args.quick), 1, args.only, args.seconds or (.2 if args.quick else 1.))
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, notebook_det=notebook_det.__version__)
    out = dict(command=" ".join(["python benchmarks/ops.py", *sys.argv[1:]]), timing="medians of calls in turns, one of the peer, up to 50 of ours; one thread: its CPU time, more: wall time", seed=SEED,
               operators=operators(), versions=versions, machine=machine())
    old = json.loads(Path(args.out).read_text()) if args.only and Path(args.out).exists() else {}
    for key, rows in tables.items():
        kept = [r for r in old.get(key, []) if not any(w in r["op"] for w in args.only or ())] if old else []
        out[key] = kept + rows
    out = {**{k: v for k, v in old.items() if k.startswith(("rows", "growth"))}, **out}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("written to", os.path.relpath(args.out))
    return 0 if all(r["equal"] for rows in tables.values() for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
