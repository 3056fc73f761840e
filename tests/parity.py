"""Do our networks compute what the reference computes?

    python tests/parity.py FOLDER [NAME …]      FOLDER holds `inputs.py` and `cases/*.json.gz` (or the cases themselves)

One line per case: features, losses, gradients, detections; "agree", or the worst deviation. Exit status 1 if any disagrees.
"""
import argparse, gzip, importlib.util, json, sys, time
from pathlib import Path
import numpy as np
import torch
from torch import nn
from fiddle import selectors
from notebook_det.foundations.recipes import build
from notebook_det.foundations.structures import Images, Instances
from notebook_det.dense_heads.guided import Guide
from notebook_det.priors.samplers import RandomSampler
from notebook_det.zoo import recipes as zoo
from notebook_det.ops.boxes import box_iou
from notebook_det.ops.detections import DetectionRule, ProposalRule


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


def compare_features(model, x, case, inputs):
    "Worst deviation of a pyramid level's values, in standard deviations of the level."
    got = model.features(x)
    if len(got) != len(case["features"]): return float("inf")
    return max(float(np.abs(np.array(inputs.sample(g)["values"]) - np.array(w["values"])).max()) / w["std"] for g, w in zip(got, case["features"]))


def compare_gradients(model, case):
    "Worst relative deviation of a gradient's norm, among those above a millionth of the largest; and whose it is."
    want = case["grad_norms"]
    floor = 1e-6 * max(want.values())
    have = {k: p.grad.norm().item() if p.grad is not None else 0. for k, p in model.named_parameters()}
    rows = [(abs(have[k] - w) / w, k) for k, w in want.items() if w > floor]
    return max(rows)


def compare_detections(found, want):
    "Share of the reference's detections that one of ours matches (label, IoU ≥ 0.99, score within 1e-3), and the worst mask area."
    total = matched = 0
    area = 0.
    for f, w in zip(found, want):
        boxes, scores, labels = torch.tensor(w["boxes"]).reshape(-1, 4), torch.tensor(w["scores"]), torch.tensor(w["labels"])
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


def run(name, case, inputs):
    "One case → (does it agree?, what to print)."
    torch.manual_seed(0)
    model, seed = build(adapted(case)), case["input"]
    wrong = fill(model, case, inputs)
    if wrong: return False, f"names, shapes: {wrong[:6]}{' …' if len(wrong) > 6 else ''} ({len(wrong)})"
    size = (seed["h"], seed["w"])
    images = Images(inputs.image(seed["seed"], seed["n"], *size), [size] * seed["n"])
    truth = [Instances(torch.from_numpy(t["boxes"]), torch.from_numpy(t["labels"]), masks=torch.from_numpy(t["masks"]).bool())
             for t in inputs.truth(seed["seed"], seed["n"], *size, case["num_classes"])]
    with torch.no_grad(): feature = compare_features(model.eval(), images.tensor, case, inputs)
    if {"losses", "predict"} <= set(case["case"].get("skip", ())):     # deformable RoI pooling: the reference has no CPU code for it
        return feature <= 1e-4, f"features {'agree' if feature <= 1e-4 else 'DIFFER'} ({feature:.1e}), names, shapes and what learns agree; there is nothing else in this case"
    model.train()
    losses = model(images, truth)
    total = sum(losses.values())
    own = lambda k: k if k in losses else k.removeprefix("rpn_")     # the reference marks the first stage's losses so
    want = {own(k): v for k, v in case["losses"].items() if k in losses or "loss" in k}
    loss = max((abs(losses[k].item() - v) / max(abs(v), 1e-6) if k in losses else float("inf")) for k, v in want.items())
    total.backward()
    grad, whose = compare_gradients(model, case)
    with torch.no_grad(): match, area = compare_detections(model.eval()(images), case["detections"])
    checks = [("features", feature, feature <= 1e-4), ("losses", loss, loss <= 1e-3), (f"gradients", grad, grad <= .01),
              ("detections", 1 - match, match >= .97), ("mask areas", area, area <= .02)]
    text = "  ".join(f"{n} {'agree' if ok else 'DIFFER'} ({v:.1e})" for n, v, ok in checks)
    if grad > .01: text += f"  worst gradient: {whose}"
    if loss > 1e-3: text += f"  losses: " + ", ".join(f"{k} {losses[k].item() if k in losses else None} ≠ {v}" for k, v in want.items())
    return all(ok for *_, ok in checks), text


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path); ap.add_argument("names", nargs="*")
    a = ap.parse_args(argv)
    cases = a.folder/"cases" if (a.folder/"cases").is_dir() else a.folder
    inputs, good = load_inputs(a.folder), True
    for name in a.names or sorted(p.name.removesuffix(".json.gz") for p in cases.glob("*.json.gz")):
        file, t = cases/f"{name}.json.gz", time.time()
        if not file.exists(): sys.exit(f"there is no case {name} in {cases}")
        case = json.loads(gzip.open(file).read())
        try: ok, text = run(name, case, inputs)
        except zoo.NotYet as e: ok, text = False, f"no recipe yet: {e}"
        good &= ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}  [{time.time() - t:.0f} s]", flush=True)
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
