"""Operators: C++ against the readable reference and torchvision, on random, tied and degenerate boxes; every instruction set;
the path without a compiler; torch's own checks."""
import hashlib, importlib, json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch, torchvision
from hypothesis import HealthCheck, given, settings, strategies as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
from notebook_det.ops import assign, boxes as B, library, masks as M, nms as N
from notebook_det.ops.assign import max_iou_assign
from notebook_det.ops.nms import batched_nms, multiclass_nms, nms, suppressors

REF = library.REFERENCES
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def some_boxes(n, seed=0, spread=300., dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(n, 2, generator=g)*spread
    return torch.cat((c, c + 2 + torch.rand(n, 2, generator=g)*80), 1).to(dtype), torch.rand(n, generator=g).to(dtype)


# ---------------------------------------------------------------------------------------------------------------- other worlds
# The same questions in other processes: fewer instructions, references on request, and a package without library or compiler.

QUESTIONS = """
import sys, json, hashlib, torch
sys.path.insert(0, sys.argv[1])
from notebook_det.ops.nms import nms, batched_nms, multiclass_nms
from notebook_det.ops.assign import max_iou_assign
from notebook_det.ops.library import operators
from notebook_det.ops import boxes as B, deform_conv as D, focal as F, masks as M, nms as N, roi as R
g = torch.Generator().manual_seed(5)
h, r = hashlib.sha1(), lambda *s: torch.rand(*s, generator=g)
def say(*tensors):
    for t in tensors: h.update(str((t.dtype, tuple(t.shape))).encode() + t.contiguous().numpy().tobytes())
for dtype in (torch.float32, torch.float64):
    for n in (0, 1, 3, 17, 64, 65, 700, 1500):
        c = r(n, 2)*300; b = torch.cat((c, c + 2 + r(n, 2)*80), 1).to(dtype); b = torch.where(r(n, 1) < .5, b.round(), b); s = (r(n)*50).round().to(dtype)
        for t in (0., .3, .5, .7, 1.): say(nms(b, s, t), nms(b, s, t, 9), batched_nms(b, s, (r(n)*7).long() - 3, t), batched_nms(b, s, (r(n)*3).long()*10**12, t, 20))
        p = r(n, 5).to(dtype); say(*multiclass_nms(b, p, .3, .5, 30), *multiclass_nms(b[:,None] + r(n, 5, 1).to(dtype)*9, p, .1, .6, -1))
        for G in (0, 1, 5, 40):
            for low, every in ((True, True), (True, False), (False, True)):
                o = torch.cat((b[torch.randperm(n, generator=g)[:G]], c[:2].repeat(1, 2).to(dtype))); say(*max_iou_assign(b, o, .6, .4, .1, low, every), *max_iou_assign(b, o, .5, (.1, .5), 0., low, every))
b = torch.cat((r(30, 2)*40, 40 + r(30, 2)*40), 1)
for f in (B.box_iou, B.box_iof, B.box_giou): say(f(b, b[:7]), f(b.double(), b.double()))
m = r(30, 9, 9); say(M.paste_masks(m, b, (70, 90))); h.update(str(M.paste_rle(m, b, (70, 90), .3)).encode())
say(*N.soft_nms(b, r(30)), *N.soft_nms(b, r(30), .4, "naive", groups=torch.arange(30) % 4))
near, sums = [], lambda *t: near.extend(float(v) for x in t for v in (x.sum(), x.abs().sum(), x.flatten()[0], x.flatten()[-1]))
sums(N.soft_nms(b, r(30), method="gaussian")[1])
for last in (0, 1):
    maps = [r(2, 20, n, n).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_() for n in (24, 12)]
    out = R.pyramid_roi_align(maps, torch.cat(((torch.arange(30) % 2)[:,None], b), 1), torch.arange(30) % 2, 7, (.25, .125)); sums(out, *torch.autograd.grad(out.square().sum(), maps))
    x, o, w, k = r(2, 8, 9, 9).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), r(2, 36, 9, 9)*4 - 2, r(6, 4, 3, 3), r(2, 18, 9, 9)
    leaves = [t.requires_grad_() for t in (x, o, w, k)]; out = D.deform_conv2d(x, o, w, None, 1, 1, 1, k); sums(out, *torch.autograd.grad(out.square().sum(), leaves))
x = (r(50, 9)*12 - 6).requires_grad_()
for gamma in (2., 1.5): s = F.sigmoid_focal_sum(x, torch.arange(50) % 10, r(50), gamma); sums(s[None], *torch.autograd.grad(s, x))
print(json.dumps([h.hexdigest(), near, operators()]))
"""

WORLDS = {"avx2": dict(NOTEBOOK_DET_ISA="1"), "baseline": dict(NOTEBOOK_DET_ISA="0"), "no compiler": dict(CXX="/nowhere/c++"), "here": {}}


@pytest.fixture(scope="module", autouse=True)
def worlds(tmp_path_factory):
    "Processes that answer while the other tests run."
    bare = tmp_path_factory.mktemp("bare")
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT/"notebook_det", bare/"notebook_det", ignore=skip); shutil.copytree(ROOT/"csrc", bare/"csrc", ignore=skip)
    def start(name, extra):
        env = {k: v for k, v in os.environ.items() if not k.startswith("NOTEBOOK_DET_")} | dict(OMP_NUM_THREADS="1", TORCH_EXTENSIONS_DIR=str(bare/"cache")) | extra
        where = bare if name == "no compiler" else ROOT
        return subprocess.Popen([sys.executable, "-c", QUESTIONS, str(where)], env=env, cwd=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = {name: start(name, extra) for name, extra in WORLDS.items() if name in ("no compiler", "here") or built()}
    yield running
    for p in running.values(): p.kill()


def built(): return library.operators().get("nms") == "C++"
def answer(p):
    if not hasattr(p, "said"): p.said = p.communicate(timeout=600)
    assert p.returncode == 0, p.said[1]
    return *json.loads(p.said[0].strip().splitlines()[-1]), p.said[1]


# ------------------------------------------------------------------------------------------------------------------------- NMS

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 65, 511, 513, 3000])
def test_nms_is_torchvisions(n, dtype):
    b, s = some_boxes(n, n, dtype=dtype)
    for t in (0., .3, .5, .7, 1.):
        want = torchvision.ops.nms(b, s, t)
        assert torch.equal(nms(b, s, t), want)
        assert torch.equal(nms(b, s, t, max_keep=7), want[:7])
        assert torch.equal(nms(b, s.fill_(.5) if t == .7 else s, t), torchvision.ops.nms(b, s, t))


coordinate = st.one_of(st.integers(0, 6).map(float), st.floats(0, 8, width=32), st.sampled_from([0., -0., 1e30, -1e30, 3e38, 1e-40, float("inf"), -float("inf")]))
a_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
thresholds = st.sampled_from([0., 1e-7, .25, .3, 1/3, .5, .7, 1.])


@few
@given(st.lists(a_box, max_size=40), st.data(), thresholds)
def test_nms_adversarial(rows, data, t):
    "Ties, identical, inverted, empty, huge, tiny and infinite boxes: torchvision, the readable rule and C++ agree."
    n = len(rows)
    b = torch.tensor(rows, dtype=torch.float32).reshape(n, 4)
    s = torch.tensor(data.draw(st.lists(st.sampled_from([0., -0., .5, 1., float("inf"), -float("inf")]), min_size=n, max_size=n)))
    g = torch.tensor(data.draw(st.lists(st.sampled_from([0, 1, -9, 2**62, -2**62]), min_size=n, max_size=n)), dtype=torch.int64)
    want = torchvision.ops.nms(b, s, t)
    assert torch.equal(nms(b, s, t), want)
    order = s.sort(descending=True, stable=True).indices
    by = suppressors(b, s, t)
    assert torch.equal(order[by[order] == order], want)
    by = suppressors(b, s, t, g)
    assert torch.equal(batched_nms(b, s, g, t), order[by[order] == order])
    assert torch.equal(batched_nms(b, s, g, t, 3), order[by[order] == order][:3])


def test_nms_decides_at_the_threshold():
    "100,000 pairs whose IoU is within a few units in the last place of the threshold."
    g = torch.Generator().manual_seed(0)
    n = 25000
    for t in (.3, .5, .7, 1/3):
        a = torch.rand(n, 2, generator=g)*1000; a = torch.cat((a, a + 1 + torch.rand(n, 2, generator=g)*300), 1)
        b = a.clone(); b[:,3] = a[:,1] + (a[:,3] - a[:,1])*(t + 3e-7*torch.randn(n, generator=g))
        pairs, pair = torch.stack((a, b), 1).reshape(-1, 4), torch.arange(2*n)//2
        inter = (b[:,2]-b[:,0])*(b[:,3]-b[:,1]); iou = inter/(B.box_area(a) + B.box_area(b) - inter)
        kept = torch.zeros(2*n, dtype=torch.bool)
        kept[batched_nms(pairs, torch.arange(2*n, 0, -1).float(), pair, t)] = True
        assert kept[::2].all() and torch.equal(~kept[1::2], iou.double() > t)
        assert .05 < (iou.double() > t).float().mean() < .95


@pytest.mark.parametrize("n,k", [(0, 3), (1, 1), (40, 3), (300, 20)])
def test_multiclass(n, k):
    b, _ = some_boxes(n, 1)
    p = torch.rand(n, k, generator=torch.Generator().manual_seed(2)).mul(30).round().div(30)          # many ties
    own = b[:,None] + torch.rand(n, k, 1, generator=torch.Generator().manual_seed(3))*20
    for bb in (b, own):
        for t, m in ((.05, 100), (.5, 10), (.9, -1), (2., 5), (0., 0)):
            index, labels = REF["notebook_det::multiclass_nms"](bb, p, t, .5, m)
            got = multiclass_nms(bb, p, t, .5, m)
            assert torch.equal(got[3], index) and torch.equal(got[2], labels) and torch.equal(got[1], p[index, labels])
            assert torch.equal(got[0], bb[index] if bb.ndim == 2 else bb[index, labels])


def test_moved_apart_is_group_by_group(): # the way groups are kept apart on a GPU
    b, s = some_boxes(400, 4)
    g = torch.randint(-3, 4, (400,), generator=torch.Generator().manual_seed(1))*10**9
    assert torch.equal(N._moved_apart(b, s, g, .5), N._group_by_group(b, s, g, .5))


def test_lazy_walk_crosses_chunks():
    "With a top-k the kernel sorts piece by piece; here nearly everything is suppressed, so that it needs all pieces."
    b, s = some_boxes(9000, 6, spread=40.)
    assert torch.equal(nms(b, s, .1, 60), torchvision.ops.nms(b, s, .1)[:60])
    g = torch.randint(0, 5, (9000,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(batched_nms(b, s, g, .1, 200), N._group_by_group(b, s, g, .1)[:200])


# ------------------------------------------------------------------------------------------------------------------ assignment

def both(*args):
    got = max_iou_assign(*args)
    priors, objects, pos, neg, low_pos, low, every = args
    lo, hi = neg if isinstance(neg, tuple) else (-1., neg)
    want = REF["notebook_det::max_iou_assign"](priors, objects, pos, lo, hi, low_pos, low, every)
    for a, b in zip(got, want): assert a.dtype == b.dtype and torch.equal(a, b)
    return got


def naive(priors, objects, pos, neg, min_pos, low, every):
    "METHODS, to the letter: one object after the other."
    iou = B.box_iou(priors, objects).nan_to_num(0.)
    best, arg = iou.max(1)
    lo, hi = neg if isinstance(neg, tuple) else (-1., neg)
    gt, label = torch.zeros(len(priors), dtype=torch.int64), torch.full((len(priors),), 2, dtype=torch.int8)
    label[(best >= lo) & (best < hi)] = 0
    label[best >= pos] = 1; gt[best >= pos] = arg[best >= pos]
    for k in range(len(objects) if low else 0):
        top = iou[:,k].max()
        if top < torch.tensor(min_pos, dtype=top.dtype): continue
        who = (iou[:,k] == top) if every else torch.arange(len(priors)) == iou[:,k].argmax()
        label[who] = 1; gt[who] = k
    return gt, label, best


@few
@given(st.lists(a_box, min_size=1, max_size=90), st.lists(a_box, min_size=1, max_size=9), st.sampled_from([.3, .5, .7, 0.]),
       st.sampled_from([.3, (.1, .5), (0., .3)]), st.sampled_from([0., .2, .5]), st.booleans(), st.booleans(), st.booleans())
def test_assign_adversarial(p, o, pos, neg, min_pos, low, every, double):
    dtype = torch.float64 if double else torch.float32
    p, o = torch.tensor(p, dtype=dtype), torch.tensor(o, dtype=dtype)
    got = both(p, o, pos, neg, min_pos, low, every)
    for a, b in zip(got, naive(p, o, pos, neg, min_pos, low, every)): assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assign_random(n, dtype):
    p, _ = some_boxes(n, n, dtype=dtype)
    for G in (1, 3, 30):
        o = torch.cat((some_boxes(G, 99, dtype=dtype)[0], p[:2], p[:2]))                               # some fit exactly, twice
        for low, every in ((True, True), (True, False), (False, True)): both(p, o, .7, .3, .3, low, every)


def test_assign_pieces(monkeypatch):
    "The reference gives the same in one piece and in many."
    p, o = some_boxes(300, 1)[0].round(), some_boxes(20, 2)[0].round()
    one = REF["notebook_det::max_iou_assign"](p, o, .5, -1., .4, 0., True, False)
    real = assign._pieces
    monkeypatch.setattr(assign, "_pieces", lambda p, o: real(p, o, pairs=140))
    for a, b in zip(one, REF["notebook_det::max_iou_assign"](p, o, .5, -1., .4, 0., True, False)): assert torch.equal(a, b)


def test_assign_memory_is_bounded():
    "200,000 priors × 3,000 objects: the matrix would take 2.4 GB."
    import resource
    if not built(): pytest.skip("on the reference path this takes a while")
    y, x = torch.meshgrid(torch.arange(200.)*4, torch.arange(1000.)*4, indexing="ij")
    c = torch.stack((x, y), -1).reshape(-1, 2); p = torch.cat((c - 16, c + 16), 1)
    o = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(0))[:3000]] + 1.5
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gt, label, iou = max_iou_assign(p, o, .7, .3, .3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 120_000                       # kB
    assert set(gt[label == 1].tolist()) == set(range(3000))


# -------------------------------------------------------------------------------------------------------- torch's own questions

OPS = torch.ops.notebook_det


def samples():
    b, s = some_boxes(40)
    yield OPS.nms.default, (b, s, .5, -1)
    yield OPS.batched_nms.default, (b, s, torch.arange(40) % 3, .5, 5)
    yield OPS.multiclass_nms.default, (b, torch.rand(40, 3, generator=torch.Generator().manual_seed(0)), .3, .5, 10)
    yield OPS.max_iou_assign.default, (b, b[:5] + 1, .5, -1., .4, 0., True, True)


def test_opcheck():
    for op, args in samples():
        torch.library.opcheck(op, args)
        torch.library.opcheck(op, tuple(a[:0] if isinstance(a, torch.Tensor) else a for a in args), test_utils=("test_schema", "test_faketensor"))


def test_compile_and_export():
    import torch._dynamo
    b, s = some_boxes(60)
    def tail(b, s):
        k = nms(b, s, .5)
        return b[k], s[k].sum(), max_iou_assign(b, b[:4], .5, .4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(tail, fullgraph=True, backend="aot_eager")
        for n in (60, 30):
            for x, y in zip(tail(b[:n], s[:n])[:2], compiled(b[:n], s[:n])[:2]): assert torch.equal(x, y)
        torch._dynamo.reset()
    class Two(torch.nn.Module):
        def forward(self, b, o): return max_iou_assign(b, o, .5, .4)
    for x, y in zip(torch.export.export(Two(), (b, b[:5])).module()(b, b[:5]), max_iou_assign(b, b[:5], .5, .4)): assert torch.equal(x, y)


def test_autocast_and_gradients():
    b, s = some_boxes(30)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(nms(b, s, .5), torchvision.ops.nms(b, s, .5))
    leaf = b.clone().requires_grad_()
    boxes, scores, labels, index = multiclass_nms(leaf, s[:,None].expand(-1, 2), .2, .5)
    boxes.sum().backward(); assert leaf.grad.abs().sum() == 4*len(index)
    assert not max_iou_assign(leaf, b[:3], .5, .4)[2].requires_grad


def test_not_a_number_is_refused():
    b, s = some_boxes(200)
    for at in (0, 130, 199):
        bad, worse = b.clone(), s.clone(); bad[at, at % 4] = float("nan"); worse[at] = float("nan")
        for call in (lambda: nms(bad, s, .5), lambda: nms(b, worse, .5), lambda: batched_nms(bad, s, s.long(), .5), lambda: multiclass_nms(b, worse[:,None], .5, .5),
                     lambda: max_iou_assign(bad, b[:3], .5, .4), lambda: max_iou_assign(b, bad, .5, .4)):
            with pytest.raises(RuntimeError, match=r"^(nms|max_iou_assign): .* not a number \(NaN\)$"): call()
    for name in ("nms", "batched_nms", "max_iou_assign"):                                             # the references say the same
        args = {"nms": (bad, s, .5, -1), "batched_nms": (bad, s, s.long(), .5, -1), "max_iou_assign": (bad, b[:3], .5, -1., .4, 0., True, True)}[name]
        with pytest.raises(RuntimeError, match="not a number"): REF[f"notebook_det::{name}"](*args)


def test_strided_inputs():
    b, s = some_boxes(64)
    wide = torch.zeros(64, 8); wide[:,::2] = b
    assert torch.equal(nms(wide[:,::2], s, .5), nms(b, s, .5)) and torch.equal(nms(b.T.contiguous().T, s, .5), nms(b, s, .5))
    for x, y in zip(max_iou_assign(wide[:,::2], b.flip(0)[:5], .5, .4), max_iou_assign(b, b.flip(0)[:5].clone(), .5, .4)): assert torch.equal(x, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    b, s = some_boxes(500); g = (s*9).long()
    d = lambda *t: [x.cuda() for x in t]
    assert torch.equal(nms(*d(b, s), .5).cpu(), nms(b, s, .5)) and torch.equal(batched_nms(*d(b, s, g), .5).cpu(), batched_nms(b, s, g, .5))
    for x, y in zip(max_iou_assign(*d(b, b[:20] + 2), .5, .4), max_iou_assign(b, b[:20] + 2, .5, .4)): assert torch.equal(x.cpu(), y)


# ----------------------------------------------------------------------------------------------------------------- the library

def test_defining_again_is_harmless():
    b, s = some_boxes(20)
    want = nms(b, s, .5)
    for module in (library, N, assign): importlib.reload(module)
    assert torch.equal(importlib.import_module("notebook_det.ops.nms").nms(b, s, .5), want)


def test_stale_library_is_not_loaded(tmp_path, monkeypatch):
    shutil.copytree(ROOT/"csrc", tmp_path/"csrc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path/"notebook_det").mkdir()
    monkeypatch.setattr(library, "PACKAGE", tmp_path/"notebook_det")
    folder = library.sources(); assert folder == tmp_path/"csrc"
    so = tmp_path/"notebook_det"/"_C.abi3.so"; so.write_bytes(b"\x7fELF " + library.sources_hash(folder).encode())
    assert library.prebuilt(folder) == so
    (folder/"nms.cpp").write_text((folder/"nms.cpp").read_text() + "\n")
    assert library.prebuilt(folder) is None


def test_setup_reckons_the_same_hash():
    scope = {"hashlib": hashlib, "ROOT": ROOT}
    text = (ROOT/"setup.py").read_text()
    exec(text[text.index("def sources_hash"):text.index("def operators")], scope)
    assert scope["sources_hash"]() == library.sources_hash(ROOT/"csrc")


# ----------------------------------------------------------------------------------------------------------------------- masks

def test_paste_region_is_the_whole():
    from torch.nn.functional import grid_sample
    g = torch.Generator().manual_seed(0)
    H, W = 61, 83
    for size in (1, 7, 28):
        m = torch.rand(30, size, size, generator=g); c = torch.rand(30, 2, generator=g)*120 - 30
        b = torch.cat((c, c + .01 + torch.rand(30, 2, generator=g)**3*90), 1)
        x, y = (torch.arange(W) + .5)[None], (torch.arange(H) + .5)[None]
        x = (x - b[:,:1])/(b[:,2:3] - b[:,:1])*2 - 1; y = (y - b[:,1:2])/(b[:,3:] - b[:,1:2])*2 - 1
        grid = torch.stack((x[:,None,:].expand(-1, H, -1), y[:,:,None].expand(-1, -1, W)), 3)
        full = grid_sample(m[:,None], grid, align_corners=False)[:,0]
        for t in (.5, .01, .99): assert torch.equal(M.paste_masks(m, b, (H, W), t), full >= t)


def test_crop_is_roi_align_on_each_mask():
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 40, 50, generator=g) > .5
    b, index = some_boxes(20, 3, spread=30.)[0], torch.randint(0, 5, (20,), generator=g)
    want = torchvision.ops.roi_align(masks[index].float()[:,None], [x[None] for x in b], 14, aligned=True)[:,0] >= .5
    assert torch.equal(M.crop_masks(masks, b, 14, index), want.float()) and torch.equal(M.crop_masks(masks, b, 14, index, chunk=4000), want.float())
    assert torch.equal(M.crop_masks(masks[index], b, 14), want.float())


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_rle_round_trip(h, w, seed):
    from pycocotools import mask as coco
    m = np.random.default_rng(seed).random((h, w)) > .5
    code = M.encode_rle(torch.from_numpy(m))
    assert code["counts"].encode() == coco.encode(np.asfortranarray(m.astype(np.uint8)))["counts"]
    assert np.array_equal(M.decode_rle(code).numpy(), m)
    runs, flat = [0], m.T.reshape(-1)
    for i, v in enumerate(flat):
        if v != (len(runs) % 2 == 0): runs.append(0)
        runs[-1] += 1
    assert np.array_equal(M.decode_rle(dict(size=[h, w], counts=runs)).numpy(), m)


# -------------------------------------------------------------------------------------------------------------- the other worlds

def close(a, b): return len(a) == len(b) > 80 and np.allclose(a, b, rtol=1e-4, atol=1e-4)

def test_every_world_gives_the_same_answers(worlds):
    digest, near, ops, _ = answer(worlds["here"])
    assert ops["nms"] == ("C++" if built() else "reference")
    for name in ("avx2", "baseline"):
        if name in worlds: assert answer(worlds[name])[0] == digest and close(answer(worlds[name])[1], near), name


def test_without_a_compiler(worlds):
    digest, near, ops, err = answer(worlds["no compiler"])
    assert set(ops.values()) == {"reference"}
    lines = [l for l in err.splitlines() if "notebook_det" in l]
    assert len(lines) == 1 and "readable references" in lines[0] and "no C++ compiler" in lines[0], err
    assert answer(worlds["here"])[0] == digest                                                        # what chooses: bit for bit
    assert close(answer(worlds["here"])[1], near)                                                     # what sums: but for rounding
