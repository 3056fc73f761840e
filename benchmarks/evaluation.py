"""COCO evaluation against pycocotools, in one run on one thread: python benchmarks/evaluation.py [--images N] [--out FILE]

Synthetic ground truth of 80 classes and 100 detections an image. Three ways from the same packed detections to the same
numbers, CPU time of this thread: `CocoEvaluator` with the fast library, `CocoEvaluator` with pycocotools, and pycocotools
as everybody calls it (loadRes, evaluate, accumulate). Ratios travel; absolute times belong to the machine.
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"
import argparse, contextlib, io, json, platform, sys, time
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch
from pycocotools.cocoeval import COCOeval

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from notebook_det.evaluation.coco import CocoEvaluator, fast_library, index_coco
from ops import machine

SEED, SIZE = 0, np.array([640., 480])


def boxes(rng, n): # sides between 8 and 300 pixels, anywhere in the picture
    wh = np.exp(rng.uniform(np.log(8), np.log(300), (n, 2))); xy = rng.uniform(0, 1, (n, 2))*(SIZE - wh)
    return np.concatenate([xy, xy + wh], 1)


def data(images, detections, classes):
    "Few classes a picture, as in COCO; half of the detections near an object, four fifths of those of its class."
    rng, annotations, found = np.random.default_rng(SEED), [], {}
    common = 1/np.arange(1, classes + 1)**.8; common /= common.sum()
    for i in range(1, images + 1):
        n = int(rng.poisson(7.3)); own = rng.choice(classes, 3, p=common); label, truth = own[rng.integers(0, 3, n)], boxes(rng, n)
        for b, k in zip(truth.tolist(), label.tolist()):
            w, h = b[2] - b[0], b[3] - b[1]
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=k, bbox=[b[0], b[1], w, h], area=.6*w*h, iscrowd=int(rng.random() < .01)))
        where, said = boxes(rng, detections), rng.choice(classes, detections, p=common)
        said = np.where(rng.random(detections) < .4, own[0], said)
        near = (rng.random(detections) < .5) & (n > 0)
        if n:
            k = rng.integers(0, n, detections); side = np.tile(truth[k, 2:] - truth[k, :2], 2)
            moved = truth[k] + rng.normal(0, 1, (detections, 4))*side*rng.exponential(.12, (detections, 1)); moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
            where, said = np.where(near[:, None], moved, where), np.where(near & (rng.random(detections) < .8), label[k], said)
        found[i] = dict(boxes=where.astype(np.float32).astype(float), scores=np.where(near, rng.beta(2, 3, detections), rng.beta(1, 8, detections)).round(4), labels=said)
    return index_coco([dict(id=i, width=640, height=480) for i in range(1, images + 1)], annotations, [dict(id=k, name=f"class {k}") for k in range(classes)]), found


def timed(f):
    start, wall = time.thread_time(), time.perf_counter(); out = f()
    return out, dict(cpu_s=time.thread_time() - start, wall_s=time.perf_counter() - wall)


def plain(truth, found):
    "pycocotools as its users call it, from arrays: its results are [image, x, y, width, height, score, category] rows."
    rows = np.concatenate([np.column_stack([np.full(len(f["scores"]), i), f["boxes"][:, :2], f["boxes"][:, 2:] - f["boxes"][:, :2], f["scores"], f["labels"]]) for i, f in found.items()])
    with contextlib.redirect_stdout(io.StringIO()):
        ev = COCOeval(truth, truth.loadRes(rows), "bbox"); ev.evaluate(); ev.accumulate()
    return ev


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--images", type=int, default=5000)
    args.add_argument("--detections", type=int, default=100, help="in each image")
    args.add_argument("--classes", type=int, default=80)
    args.add_argument("--repeat", type=int, default=3, help="times that the fast one runs; the median counts. The slow ones run once")
    args.add_argument("--out", default=str(Path(__file__).parent/"results"/"evaluation.json"))
    args = args.parse_args()
    if fast_library() is None: sys.exit("faster-coco-eval is not installed: pip install notebook_det[fast]")
    torch.set_num_threads(1)
    truth, found = data(args.images, args.detections, args.classes)
    def ours(fast): ev = CocoEvaluator(truth, fast=fast).merge(found); return lambda: (ev.compute(), ev.matched()["bbox"])[1]
    ours(True)()                                                                    # imports and first touches
    runs = [timed(ours(True)) for _ in range(args.repeat)]
    quick = runs[0][0]
    fast = dict(zip(("cpu_s", "wall_s"), np.median([[t["cpu_s"], t["wall_s"]] for _, t in runs], 0).tolist()), runs=args.repeat)
    slow_ev, slow = timed(ours(False))
    plain_ev, reference = timed(lambda: plain(truth, found))
    same = lambda ev: max(float(np.abs(quick.eval[k] - ev.eval[k]).max()) for k in ("precision", "recall"))
    rows = [dict(way="CocoEvaluator, faster-coco-eval", **fast), dict(way="CocoEvaluator, pycocotools", **slow, ratio=slow["cpu_s"]/fast["cpu_s"], largest_difference=same(slow_ev)),
            dict(way="pycocotools alone (loadRes, evaluate, accumulate)", **reference, ratio=reference["cpu_s"]/fast["cpu_s"], largest_difference=same(plain_ev))]
    rows = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    for r in rows: print(f"{r['way']:50} {r['cpu_s']:7.2f} s" + (f"  ratio {r['ratio']:5.1f}, largest difference {r['largest_difference']:.1g}" if "ratio" in r else ""), flush=True)
    versions = dict(python=platform.python_version(), numpy=np.__version__, **{k: version(k) for k in ("pycocotools", "faster-coco-eval")})
    out = dict(command=" ".join(["python benchmarks/evaluation.py", *sys.argv[1:]]), timing="CPU time of one thread; ratios to the first row", threads=1, seed=SEED, images=args.images,
               detections=args.images*args.detections, classes=args.classes, objects=len(truth.anns), difference="of all entries of precision and recall", versions=versions, machine=machine(), rows=rows)
    Path(args.out).write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("written to", os.path.relpath(args.out))
    return 0 if all(r.get("largest_difference", 0) <= 1e-6 and r.get("ratio", 5) >= 5 for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
