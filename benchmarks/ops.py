"""Operators against their peers, in one run on one thread: python benchmarks/ops.py [--quick] [--out FILE]

CPU time of this thread (time.thread_time), ours and the peer's calls in turns, medians and minima in milliseconds;
a ratio is peer / ours. Absolute times belong to the machine; ratios travel. Every row was first checked for equal results.
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"
import argparse, json, platform, statistics, sys, time
from pathlib import Path
import torch, torchvision
from torchvision.models.detection._utils import Matcher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_det
from notebook_det.ops.assign import max_iou_assign
from notebook_det.ops.library import operators, REFERENCES
from notebook_det.ops.nms import batched_nms, multiclass_nms, nms

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


def measure(ours, peer, budget):
    "In turns: one call of the peer, then ours for about as long (50 calls at most), for about `budget` seconds of CPU."
    def once(f):
        t = time.thread_time(); f(); return (time.thread_time() - t)*1e3
    once(ours), once(peer)
    a, b = [once(ours)], [once(peer)]
    few = int(min(50, max(1, b[0]/max(a[0], 1e-3))))
    while (sum(a) + sum(b))/1e3 < budget or len(b) < 5: b.append(once(peer)); a += [once(ours) for _ in range(few)]
    return dict(ours_ms=statistics.median(a), peer_ms=statistics.median(b), ours_min_ms=min(a), peer_min_ms=min(b), ours_calls=len(a), peer_calls=len(b))


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


def machine():
    "What the times belong to, without names of hosts."
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = lambda k: next((l.split(":", 1)[1].strip() for l in info.splitlines() if l.startswith(k)), "")
    isa = [f for f in ("avx2", "avx512f", "avx512bw") if f in field("flags").split()]
    return dict(cpu=field("model name") or platform.processor(), cores=os.cpu_count(), isa=isa, system=f"{platform.system()} {platform.machine()}")


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--quick", action="store_true", help="smaller sizes, less time")
    args.add_argument("--out", default=str(Path(__file__).parent/"results"/"ops_cpu.json"))
    args = args.parse_args()
    torch.set_num_threads(1)
    rows = []
    for op, what, ours, peer, same, name in cases(args.quick):
        equal = bool(same(ours(), peer()))
        r = dict(op=op, **what, peer=name, equal=equal, **measure(ours, peer, .5 if args.quick else 6.))
        r |= dict(ratio=r["peer_ms"]/r["ours_ms"], ratio_of_minima=r["peer_min_ms"]/r["ours_min_ms"])
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()})
        print(f"{op:26} {what['boxes']:>7,} {what.get('objects', ''):>3} ours {r['ours_ms']:9.3f} ms  {name}: {r['peer_ms']:9.2f} ms  ratio {r['ratio']:6.1f}"
              f" (of minima {r['ratio_of_minima']:6.1f})  {'equal' if equal else 'NOT EQUAL'}", flush=True)
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, notebook_det=notebook_det.__version__)
    out = dict(command="python benchmarks/ops.py" + " --quick"*args.quick, timing="median CPU time of one thread, in turns: one call of the peer, up to 50 of ours", threads=1, seed=SEED,
               operators=operators(), versions=versions, machine=machine(), rows=rows)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("written to", os.path.relpath(args.out))
    return 0 if all(r["equal"] for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
