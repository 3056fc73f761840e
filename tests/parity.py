"""Do our networks compute what the reference computes?

    python tests/parity.py FOLDER [NAME …]      FOLDER holds `inputs.py` and `cases/*.json.gz` (or the cases themselves)
    python tests/parity.py --double FOLDER NAME …  how far both are from float64, and what the last bit of the pictures does

One line per case: features, losses, gradients, detections; "agree", or the worst deviation. Exit status 1 if any disagrees, other than those that are known to miss a limit (see `SENSITIVE`).
"""
import argparse, gzip, importlib.util, json, sys, time
from contextlib import contextmanager
from unittest import mock
from pathlib import Path
import numpy as np
import torch
from torch import nn
from fiddle import selectors
from notebook_det.foundations.recipes import build
from notebook_det.foundations.structures import Images, Instances
from notebook_det.dense_heads import rpn
from notebook_det.dense_heads.guided import Guide
from notebook_det.priors.samplers import RandomSampler
from notebook_det.zoo import recipes as zoo
from notebook_det.ops.boxes import box_iou, clip_boxes
from notebook_det.ops.detections import DetectionRule, ProposalRule
from notebook_det.ops.nms import batched_nms
from notebook_det.roi_heads import bbox


def load_inputs(folder):
    "The functions that make weights, images and ground truth: `inputs.py` beside the cases or one folder up."
    for f in (folder/"inputs.py", folder.parent/"inputs.py"):
        if f.exists():
            spec = importlib.util.spec_from_file_location("parity_inputs", f)
            module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
            return module
    sys.exit(f"no inputs.py in {folder} or above it")


def adapted(case):
    "The published recipe with the differences that the cases' README names."
    recipe = zoo.recipe(case["published"]).model
    for node in selectors.select(recipe, RandomSampler, check_nonempty=False): node.num, node.pos_fraction, node.max_neg_per_pos = 1_000_000, 1., -1
    for node in selectors.select(recipe, ProposalRule, check_nonempty=False): node.pre_nms, node.max_proposals = 200, 100
    for path, value in case["case"].get("overrides", {}).items(): override_reference(recipe, path, value)
    return recipe


def override_reference(recipe, path, value):
    "A dotted path of the reference's configuration, in our recipe. The cases override score thresholds and the weight of guided anchoring's location loss only."
    if path.endswith("score_thr"):
        for node in selectors.select(recipe, DetectionRule): node.score_threshold = value
    elif path.endswith("loss_loc.loss_weight"):
        for node in selectors.select(recipe, Guide): node.loss_loc.weight = value
    else: raise zoo.NotYet(f"the override {path}")


def fill(model, case, inputs):
    "Weights by name and shape; says which names or shapes differ."
    state, want = model.state_dict(), {k: tuple(v) for k, v in case["state"].items()}
    have = {k: tuple(v.shape) for k, v in state.items()}
    wrong = [f"missing {k}" for k in want.keys() - have] + [f"extra {k}" for k in have.keys() - want] + \
            [f"{k} {have[k]} ≠ {want[k]}" for k in want.keys() & have if have[k] != want[k]]
    if wrong: return sorted(wrong)
    scale = case["case"].get("norm_scale", 1.)
    model.load_state_dict({k: v if k.rsplit(".", 1)[-1] in inputs.KEPT else torch.from_numpy(np.asarray(inputs.fill(k, s, scale)))
                           for (k, s), v in zip(have.items(), state.values())})
    learns = {k for k, p in model.named_parameters() if p.requires_grad}
    return [f"trainable differs: {sorted(learns ^ set(case['trainable']))[:4]}"] if learns != set(case["trainable"]) else []


def semantic(h, w):
    "The class of every pixel that HTC's cases learn; nobody else looks at it."
    return (torch.arange(h * w).reshape(h, w) // 997 % 183).to(torch.uint8)


def compare_features(model, x, case, inputs):
    "Worst deviation of a pyramid level's values, in standard deviations of the level."
    got = model.features(x)
    if len(got) != len(case["features"]): return float("inf")
    return max(float(np.abs(np.array(inputs.sample(g)["values"]) - np.array(w["values"])).max()) / w["std"] for g, w in zip(got, case["features"]))


def norms(model): return {k: p.grad.norm().item() if p.grad is not None else 0. for k, p in model.named_parameters()}


def compare_gradients(have, case):
    "Worst relative deviation of a gradient's norm, among those above a millionth of the largest; and whose it is."
    want = case["grad_norms"]
    floor = 1e-6 * max(want.values())
    return max((abs(have[k] - w) / w, k) for k, w in want.items() if w > floor)


def compare_detections(found, want, size):
    """Share of the reference's detections that one of ours matches (label, IoU ≥ 0.99, score within 1e-3), and the worst mask area.
    Compared is what lies in the picture: the reference's grid head cuts a copy of its boxes and returns what sticks out, too."""
    total = matched = 0
    area = 0.
    for f, w in zip(found, want):
        boxes, scores, labels = clip_boxes(torch.tensor(w["boxes"]).reshape(-1, 4), size), torch.tensor(w["scores"]), torch.tensor(w["labels"])
        total += max(len(boxes), len(f))
        if not len(boxes) or not len(f): continue
        ok = (box_iou(boxes, f.boxes) >= .99) & (labels[:, None] == f.labels) & ((scores[:, None] - f.scores).abs() < 1e-3)
        used = set()
        for i, row in enumerate(ok):
            j = next((j for j in row.nonzero().flatten().tolist() if j not in used), None)
            if j is None: continue
            used.add(j); matched += 1
            if w.get("mask_areas") is not None and "masks" in f:
                a, b = f.masks[j].sum().item(), w["mask_areas"][i]
                area = max(area, abs(a - b) / max(b, 50))
    return (matched / total if total else 1.), area


LIMITS = dict(features=1e-4, gradients=.01, areas=.02)

# Fifty weight-standardised layers amplify rounding. `--double` measures it: the reference's own float32 features are 2.8e-4 and 3.2e-4 from float64, ours
# 2.5e-4, and when the last bit of the pictures changes, ours move by 2.6e-4 (a plain Faster R-CNN: 3.0e-6, 2.4e-6 and 3.1e-6). Even an exact network
# would be 3e-4 from the reference. So two cases miss the limit of 1e-4 and are reported as MISSED, not as agreeing (tests: xfail); beyond a second limit,
# which is what the arithmetic allows, they fail. (Leaving out the epsilon of a standardised kernel is 3e-3 and more.) The third has living batch norms, which
# divide by the deviation of 2 · 6 · 8 values: it agrees here (gradients 5e-3), but the last bit of the pictures moves a gradient by 6e-3 of the 1e-2 allowed.
WEIGHTS, NORMS = dict(LIMITS, features=1e-3, areas=.1), dict(LIMITS, gradients=.05, areas=.1)
SENSITIVE = dict(gn_ws_mask_rcnn_r50=WEIGHTS, gn_ws_faster_rcnn_x50_32x4d=WEIGHTS, gcnet_mask_rcnn_r50_syncbn_r4=NORMS)


# Random weights saturate the scores of some networks: objectness is rounded to a few values below 1 (of the 100 proposals that gcnet's second picture keeps,
# 15 share a score), and in Libra's second stage RoIs of less than two pixels' height at the border read the same feature row: up to four have bitwise the same scores. Which of two equal boxes suppresses the other is then
# a matter of the sorting algorithm: ours is stable (the lower index first), the reference calls torch's plain sort, which is not. In that order these cases agree.
TIES = ("libra_faster_rcnn_r50", "gcnet_mask_rcnn_r50_syncbn_r4")

def sorted_nms(boxes, scores, groups, iou_threshold, max_keep=-1):
    "Suppression that takes equal scores in the order of torch's plain sort over all groups."
    order = scores.sort(descending=True).indices
    return order[batched_nms(boxes[order], torch.arange(len(order), 0, -1.), groups[order], iou_threshold, max_keep)]

def sorted_propose(levels, coder, size, rule, trace=None):
    "Proposals likewise: levels with more anchors than wanted are sorted and cut, the others stay in their order."
    scores, boxes, level = [], [], []
    for l, (s, d, p) in enumerate(levels):
        i = s.sort(descending=True).indices[:rule.pre_nms] if len(s) > rule.pre_nms else torch.arange(len(s))
        scores.append(s[i]); boxes.append(clip_boxes(coder.decode(p[i], d[i]), size)); level.append(torch.full_like(i, l))
    scores, boxes, level = map(torch.cat, (scores, boxes, level))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero().flatten()
    keep = keep[sorted_nms(boxes[keep], scores[keep], level[keep], rule.iou_threshold, rule.max_proposals)]
    return Instances(boxes[keep], scores=scores[keep], size=size)

def sorted_best(boxes, scores, rule):
    row, label = (scores > rule.score_threshold).nonzero().unbind(1)
    pairs, s = boxes[row, label], scores[row, label]
    keep = sorted_nms(pairs, s, label, rule.iou_threshold, rule.max_detections)
    return pairs[keep], s[keep], label[keep], row[keep]

@contextmanager
def order_of(name):
    "Within: equal scores come in the reference's order, where a case has many."
    if name not in TIES: yield
    else:
        with mock.patch.object(rpn, "propose", sorted_propose), mock.patch.object(bbox, "best_of", sorted_best): yield


def prepared(case, inputs):
    "What a case is about: model, what is wrong with its names, pictures, objects."
    torch.manual_seed(0)
    model, seed = build(adapted(case)), case["input"]
    wrong, size = fill(model, case, inputs), (seed["h"], seed["w"])
    images = Images(inputs.image(seed["seed"], seed["n"], *size), [size] * seed["n"])
    if case["case"].get("proposals"): images.proposals = [Instances(torch.from_numpy(t["boxes"])) for t in inputs.truth(seed["seed"] + 100, seed["n"], *size, case["num_classes"], per_image=40)]
    truth = [Instances(torch.from_numpy(t["boxes"]), torch.from_numpy(t["labels"]), masks=torch.from_numpy(t["masks"]).bool(), semantic=semantic(*size))
             for t in inputs.truth(seed["seed"], seed["n"], *size, case["num_classes"])]
    return model, wrong, images, truth


def exactness(case, inputs):
    """How good the numbers are that are compared: features of the reference's float32 and of ours beside the same network in float64; and the worst
    gradient, and the features, when the pictures change by the last bit of a float32. Nobody can agree with numbers better than they agree with themselves."""
    def features(kind, change=lambda x: x):
        model, _, images, _ = prepared(case, inputs)
        with torch.no_grad(): return [np.array(inputs.sample(f)["values"]) for f in model.to(kind).eval().features(change(images.tensor).to(kind))]
    def gradients(change):
        model, _, images, truth = prepared(case, inputs)
        images.tensor = change(images.tensor)
        sum(model.train()(images, truth).values()).backward()
        return norms(model)
    exact, last_bit = features(torch.float64), lambda x: x.nextafter(torch.full_like(x, torch.inf))
    far = lambda have, other=exact: max(float(np.abs(h - o).max()) / w["std"] for h, o, w in zip(have, other, case["features"]))
    ours = features(torch.float32)
    return dict(reference=far([np.array(w["values"]) for w in case["features"]]), ours=far(ours), moved=far(features(torch.float32, last_bit), ours), last_bit=compare_gradients(gradients(last_bit), dict(grad_norms=gradients(lambda x: x)))[0])


def run(name, case, inputs):
    "One case → (does it agree? None: it misses a limit, as `SENSITIVE` says it may; what to print)."
    model, wrong, images, truth = prepared(case, inputs)
    if wrong: return False, f"names, shapes: {wrong[:6]}{' …' if len(wrong) > 6 else ''} ({len(wrong)})"
    size = images.sizes[0]
    limit, allowed = LIMITS, SENSITIVE.get(name, LIMITS)
    with torch.no_grad(): feature = compare_features(model.eval(), images.tensor, case, inputs)
    if {"losses", "predict"} <= set(case["case"].get("skip", ())):     # deformable RoI pooling: the reference has no CPU code for it
        return feature <= 1e-4, f"features {'agree' if feature <= 1e-4 else 'DIFFER'} ({feature:.1e}), names, shapes and what learns agree; there is nothing else in this case"
    with torch.no_grad(): ours, _ = compare_detections(model(images), case["detections"], size) if name in TIES else (None, None)
    with order_of(name):
        with torch.no_grad(): match, area = compare_detections(model(images), case["detections"], size)   # first: living batch norms learn from the next line
        losses = model.train()(images, truth)
    sum(losses.values()).backward()
    checks, notes = [("features", feature, "features")], ""
    if name in TIES: notes += f"  (equal scores in the reference's order; detections in ours: {1 - ours:.1e})"
    if "losses" not in case["case"].get("skip", ()):                   # Grid R-CNN's are random
        own = lambda k: k if k in losses else k.removeprefix("rpn_")   # the reference marks the first stage's losses so
        want = {own(k): v for k, v in case["losses"].items() if k in losses or "loss" in k}
        loss = max((abs(losses[k].item() - v) / max(abs(v), 1e-6) if k in losses else float("inf")) for k, v in want.items())
        grad, whose = compare_gradients(norms(model), case)
        checks += [("losses", loss, 1e-3), ("gradients", grad, "gradients")]
        if grad > limit["gradients"]: notes += f"  worst gradient: {whose}"
        if loss > 1e-3: notes += f"  losses: " + ", ".join(f"{k} {losses[k].item() if k in losses else None} ≠ {v}" for k, v in want.items())
    checks += [("detections", 1 - match, .03), ("mask areas", area, "areas")]
    held = lambda v, bound, by: v <= (by[bound] if isinstance(bound, str) else bound)
    text = "  ".join(f"{n} {'agree' if held(v, b, limit) else f'MISSED, below {allowed[b]:g}' if held(v, b, allowed) else 'DIFFER'} ({v:.1e})" for n, v, b in checks)
    return (True if all(held(v, b, limit) for _, v, b in checks) else None if all(held(v, b, allowed) for _, v, b in checks) else False), text + notes


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--double", action="store_true", help="compare with float64 instead")
    ap.add_argument("folder", type=Path); ap.add_argument("names", nargs="*")
    a = ap.parse_args(argv)
    cases = a.folder/"cases" if (a.folder/"cases").is_dir() else a.folder
    inputs, good = load_inputs(a.folder), True
    for name in a.names or sorted(p.name.removesuffix(".json.gz") for p in cases.glob("*.json.gz")):
        file, t = cases/f"{name}.json.gz", time.time()
        if not file.exists(): sys.exit(f"there is no case {name} in {cases}")
        case = json.loads(gzip.open(file).read())
        if a.double:
            print(f"{name}: features of the reference {{reference:.1e}} from float64, ours {{ours:.1e}}; the last bit of the pictures moves ours by {{moved:.1e}}, a gradient by {{last_bit:.1e}}".format(**exactness(case, inputs)), flush=True); continue
        try: ok, text = run(name, case, inputs)
        except zoo.NotYet as e: ok, text = False, f"no recipe yet: {e}"
        good &= ok is not False
        print(f"{ {True: 'ok  ', None: 'miss', False: 'FAIL'}[ok]} {name}: {text}  [{time.time() - t:.0f} s]", flush=True)
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
