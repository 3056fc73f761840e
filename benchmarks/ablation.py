"""One part of Faster R-CNN exchanged, everything else as in the small protocol: 120 iterations, two seeds, one row each in results/small/ablation.jsonl.

    python benchmarks/ablation.py samplers losses              # all 9 variants with seeds 0 and 1: 18 runs of under 3 minutes on one thread
    python benchmarks/ablation.py ohem giou@5 --seeds 0        # some of them; a loss may be given another weight

Runs that are already written down are skipped. `samplers`: which proposals the second stage trains on (box loss: the protocol's smooth L1 with beta 1/9).
`losses`: the second stage's box loss (random samples), with the weight that was best in the paper's table 5.
"""
import argparse, json, sys
from dataclasses import replace
from functools import partial
import torch
import small
from notebook_det.foundations.recipes import Config
from notebook_det.losses.regression import BalancedL1Loss, BoundedIoULoss, GIoULoss, IoULoss, L1Loss, SmoothL1Loss
from notebook_det.priors.samplers import BalancedSampler, OHEMSampler
from notebook_det.zoo import recipes as zoo

SAMPLERS = dict(random=None, ohem=OHEMSampler, iou_balanced=BalancedSampler)
LOSSES = dict(smooth_l1=(SmoothL1Loss, 2), l1=(L1Loss, 2), balanced_l1=(BalancedL1Loss, 1), iou=(IoULoss, 2), giou=(GIoULoss, 2), bounded_iou=(BoundedIoULoss, 10))
FILE, ITERATIONS = "ablation.jsonl", 120

class ExactL1(L1Loss): "L1 that the protocol does not replace by its smooth one."

def variant(name): # "ohem", "giou" or "giou@5" → what the row says about it, and a family for `small.ours`
    kind, _, weight = name.partition("@")
    if kind in SAMPLERS: return dict(study="samplers", variant=kind), partial(exchanged, sampler=SAMPLERS[kind])
    loss, best = LOSSES[kind]
    weight = float(weight or best)
    return dict(study="losses", variant=kind, weight=weight), partial(exchanged, loss=Config(ExactL1 if loss is L1Loss else loss, weight=weight))

def exchanged(*args, sampler=None, loss=None, **kw):
    recipe = zoo.faster_rcnn(*args, **kw)
    if sampler: recipe.roi_head.sampler = Config(sampler, 128, .25, add_gt=True)
    if loss: recipe.roi_head.bbox_head.loss_bbox = loss
    return recipe

def done(row): # is there such a row?
    file = small.OUT/FILE
    rows = [json.loads(l) for l in file.read_text().splitlines()] if file.exists() else []
    return any(all(r.get(k) == v for k,v in row.items()) for r in rows)

def run(name, seed, iterations):
    row, family = variant(name)
    row |= dict(seed=seed, iterations=iterations)
    if done(row): return print(f"{name}, seed {seed}: is there already", flush=True)
    m, d = replace(small.METHODS["faster_rcnn"], iterations=iterations), small.DATA["bccd"]
    torch.manual_seed(seed)
    model = small.ours(d, family)
    print(f"{name}, seed {seed}: {iterations} iterations", flush=True)
    curve, times, crc = small.train(model, small.loader(d, True, seed), m)
    metrics, test_times, _ = small.test(model, small.loader(d, False, seed), d)
    setting = small.setting(argparse.Namespace(seed=seed)) | dict(command=" ".join(["python benchmarks/ablation.py", *sys.argv[1:]]))
    small.append(setting | row | dict(lr=m.rate, **metrics, curve=curve, **small.seconds("s_per_iteration", times), pictures_crc=crc), FILE)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="+", help=f"samplers, losses, or some of {', '.join([*SAMPLERS, *LOSSES])}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1]); p.add_argument("--iterations", type=int, default=ITERATIONS)
    a = p.parse_args()
    torch.set_num_threads(1)
    names = [n for w in a.what for n in dict(samplers=SAMPLERS, losses=LOSSES).get(w, [w])]
    unknown = [n for n in names if n.partition("@")[0] not in {**SAMPLERS, **LOSSES}]
    if unknown: p.error(f"there is no variant {unknown[0]!r}: choose from {', '.join([*SAMPLERS, *LOSSES])}")
    for seed in a.seeds:
        for n in names: run(n, seed, a.iterations)
