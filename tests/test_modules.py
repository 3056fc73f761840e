"""Every general module in a small detector of every family: it builds, trains a step (a finite loss, a gradient on every
parameter that learns) and predicts. The last test prints the table; `python tests/test_modules.py` prints it without pytest."""
import os, subprocess, sys
import pytest, torch
from notebook_det.foundations.recipes import Config, Partial, build, select
from notebook_det.foundations.structures import Instances
from notebook_det.layers.attention import ContextBlock
from notebook_det.layers.norm import group_norm, sync_batch_norm
from notebook_det.layers.weight_standardisation import WSConv2d
from notebook_det.losses.regression import BalancedL1Loss, L1Loss, SmoothL1Loss
from notebook_det.priors.samplers import BalancedSampler
from notebook_det.roi_heads.bbox import BBoxHead
from notebook_det.zoo import anchor_free, attention, cascade, dcn, hrnet, norms, recipes as zoo, retina_variants, ssd
from notebook_det.zoo.parts import takes

K, C = 3, 16


def narrow(depth=18, **kw): return zoo.resnet(depth, planes=8, frozen_stages=-1, **kw)


def quick(model):
    "A two-stage recipe with few proposals and a thin box head."
    model.rpn_head.train_rule.max_proposals = model.rpn_head.test_rule.max_proposals = 40
    for head in select(model, BBoxHead): head.fc_channels = 32
    for node in select(model.roi_head, object):
        if takes(node, "num", "pos_fraction"): node.num = 16
    return model


FAMILIES = { # backbone → recipe
    "RetinaNet": lambda b: zoo.retinanet(b, K, out_channels=C),
    "FCOS": lambda b: anchor_free.fcos(b, K, out_channels=32),
    "SSD": lambda b: ssd.ssd(b, K),
    "Faster R-CNN": lambda b: quick(zoo.faster_rcnn(b, K, out_channels=C)),
    "Mask R-CNN": lambda b: quick(zoo.mask_rcnn(b, K, out_channels=C)),
    "Cascade R-CNN": lambda b: quick(cascade.cascade_rcnn(b, K, out_channels=C)),
}
ONE_STAGE = ("RetinaNet", "FCOS", "SSD")


def family(name, *args, **kw): # arguments of `narrow`
    if name == "SSD": kw |= dict(out_indices=(1, 2), num_stages=3)          # reads two maps
    return FAMILIES[name](narrow(*args, **kw))


def normalised(norm, conv=None):
    "The norm wherever the detector has one to choose: SSD's maps are published without."
    def change(model):
        where = [p for p in norms.PLACES if any(takes(n, "norm") for n in norms.nodes_of(model, p))]
        return norms.with_norm(model, norm, conv, where)
    return change


def guided(model):
    if hasattr(model, "rpn_head"): model.rpn_head = retina_variants.ga_rpn_head(C)
    else: model.bbox_head = retina_variants.ga_retinanet(narrow(), K, out_channels=C).bbox_head
    return model


def balanced_neck(model):
    model.neck = retina_variants.balanced(model.neck, 1)
    return model


def balanced_loss(model):
    for node in select(model, object):
        if takes(node, "loss_bbox") and type(build(node.loss_bbox)) in (L1Loss, SmoothL1Loss): node.loss_bbox = Config(BalancedL1Loss)
    return model


def balanced_samples(model):
    for node in select(model.roi_head, object):
        if takes(node, "sampler"): node.sampler = Config(BalancedSampler, 16, .25, add_gt=True)
    return model


GN = Partial(group_norm, groups=4)
MODULES = {
    "DCN": dcn.with_dcn,
    "DCNv2, heads too": lambda m: dcn.with_dcn(m, modulated=True, heads=True),
    "group norm": normalised(GN),
    "weight standardisation": normalised(GN, WSConv2d),
    "synchronised BN": normalised(sync_batch_norm),
    "context block": lambda m: attention.with_context(m, 1/4),
    "context block on the maps": lambda m: attention.on_maps(m, Partial(ContextBlock, ratio=1/4)),
    "attention 0010": lambda m: attention.with_attention(m, "0010"),
    "attention 1111": lambda m: attention.with_attention(m, "1111"),
    "root stem": norms.with_root_stem,
    "guided anchors": guided,
    "balanced pyramid": balanced_neck,
    "balanced L1": balanced_loss,
    "balanced sampler": balanced_samples,
    "deformable RoI pooling": lambda m: dcn.with_deform_pool(m, fc_channels=16),
    "… with strengths (v2)": lambda m: dcn.with_deform_pool(m, modulated=True, fc_channels=16),
    "ResNeXt": None, "HRNet and its pyramid": None, "mixed precision": lambda m: m,
}
NOT = {("guided anchors", "FCOS"): "has points instead of anchors", ("guided anchors", "SSD"): "its boxes have the same shapes at every place by design",
       ("balanced pyramid", "SSD"): "its maps have different channels", ("balanced L1", "FCOS"): "its box loss is an overlap",
       ("HRNet and its pyramid", "SSD"): "makes its own pyramid, of two maps",
       **{("balanced sampler", f): "draws no samples" for f in ONE_STAGE},
       **{(m, f): "reads no boxes" for m in ("deformable RoI pooling", "… with strengths (v2)") for f in ONE_STAGE}}
TABLE = {}


def batch(size=64):
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, size, size, dtype=torch.bool); mask[:, 8:40, 6:38] = True
    return images, [Instances(torch.tensor([[6., 8, 38, 40]]), torch.tensor([1]), masks=mask) for _ in range(2)]


def recipe(module, name):
    "The family's detector with the module in it."
    if module == "ResNeXt": return family(name, 50, groups=2, width=64)
    if module == "HRNet and its pyramid": return hrnet.with_hrfpn(FAMILIES[name](hrnet.hrnet(8, planes=8, modules=(1, 1, 1), blocks=1)))
    return MODULES[module](family(name))


def works(module, name):
    "Builds, trains a step and predicts; returns the detector."
    torch.manual_seed(0)
    model, mixed = build(recipe(module, name)).train(), torch.autocast("cpu", torch.bfloat16, enabled=module == "mixed precision")
    images, targets = batch(96 if module == "mixed precision" else 64)   # torch's bfloat16 on CPUs leaves weight gradients of stride 2 on maps of width 1 uninitialised
    learns = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    opt = torch.optim.SGD([p for _, p in learns], 1e-3)
    with mixed: losses = model(images, targets)
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values()), losses
    sum(losses.values()).backward()
    assert [n for n, p in learns if p.grad is None or not p.grad.isfinite().all()] == []
    opt.step()
    with mixed: found = model.eval()(images)
    assert len(found) == 2 and all(torch.isfinite(f.boxes).all() for f in found)
    return model


def text():
    "The table: ✓ works, – does not apply."
    rows = [("", *FAMILIES), *((m, *(TABLE.get((m, f), "?") for f in FAMILIES)) for m in MODULES)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)) for r in rows) + "\n" + "\n".join(f"– {m}, {f}: {why}" for (m, f), why in NOT.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("module", MODULES)
def test_trains_and_predicts(module, name):
    if (module, name) in NOT: TABLE[module, name] = "–"; return
    plain, model = build(family(name)), works(module, name)
    parts = lambda m: {(n, type(p).__name__, tuple(p.shape)) for n, p in m.named_parameters()} | {type(p).__name__ for p in m.modules()}
    if module == "balanced sampler": assert type(model.roi_head.sampler).__name__ == "BalancedSampler"
    elif module != "mixed precision": assert parts(plain) != parts(model)          # the module is really there
    TABLE[module, name] = "✓"


def test_the_table_is_full(capsys):
    "After the tests above, in one run: every pair works, or says why there is nothing to try."
    if len(TABLE) < 2: pytest.skip("run the whole file")
    with capsys.disabled(): print("\n" + text())
    assert {k for k, v in TABLE.items() if v == "–"} <= set(NOT)


SYNC = """
import sys, torch, torch.distributed as dist
from notebook_det.layers.norm import sync_batch_norm, batch_norm
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
x = torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
weigh = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
mine = slice(0, 2) if rank == 0 else slice(2, 5)                    # the shares are not alike
a, b = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
sync, whole = sync_batch_norm(4), batch_norm(4)
y, z = sync(a), whole(b)
(y * weigh[mine]).sum().backward(); (z * weigh).sum().backward()
torch.testing.assert_close(y, z[mine], rtol=1e-4, atol=1e-4)
torch.testing.assert_close(a.grad, b.grad[mine], rtol=1e-3, atol=1e-4)
for k, v in sync.state_dict().items():
    if "running" in k or "batches" in k: torch.testing.assert_close(v, whole.state_dict()[k], rtol=1e-4, atol=1e-4)
grad = sync.weight.grad.clone(); dist.all_reduce(grad)
torch.testing.assert_close(grad, whole.weight.grad, rtol=1e-3, atol=1e-3)
dist.barrier(); dist.destroy_process_group()                        # gloo's threads must not outlive the interpreter
"""


def test_synchronised_norm_is_the_norm_of_the_whole_batch(tmp_path):
    "Two processes with two and three pictures: outputs, gradients and statistics are those of one with five."
    run = [subprocess.Popen([sys.executable, "-c", SYNC, str(r), str(tmp_path/"meet")], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) for r in range(2)]
    said = [p.communicate(timeout=120)[1] for p in run]
    assert [p.returncode for p in run] == [0, 0], said[0][-2000:] + said[1][-2000:]


if __name__ == "__main__":
    for m in MODULES:
        for f in FAMILIES: TABLE[m, f] = "–" if (m, f) in NOT else "✓" if works(m, f) else "?"
    print(text())
