"""Overlaps, soft suppression, pasting, run-length codes and deformable convolution: C++ against the references and torchvision, on
random and odd input; torch's own checks."""
import importlib.util, sys
from pathlib import Path
import numpy as np
import pytest, torch, torchvision
import torch._dynamo as dynamo
from hypothesis import HealthCheck, given, settings, strategies as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
from notebook_det.ops import boxes as B, deform_conv as D, library, masks as M, nms as N

REF = library.REFERENCES
few = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
inf, nan = float("inf"), float("nan")


def some_boxes(n, seed=0, spread=300., dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(n, 2, generator=g)*spread
    return torch.cat((c, c + 2 + torch.rand(n, 2, generator=g)*80), 1).to(dtype), torch.rand(n, generator=g).to(dtype)


def same(a, b): return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(77.), b.nan_to_num(77.))


# -------------------------------------------------------------------------------------------------------------------- overlaps

odd = st.one_of(st.integers(0, 6).map(float), st.floats(0, 8, width=32), st.sampled_from([0., -0., 1e30, 3e38, 1e-40, inf, -inf, nan]))
a_box = st.tuples(odd, odd, odd, odd)


@few
@given(st.lists(a_box, max_size=5), st.lists(a_box, max_size=40), st.booleans())
def test_overlaps_are_the_formula_bit_for_bit(a, b, double):
    a, b = (torch.tensor(x, dtype=torch.float64 if double else torch.float32).reshape(-1, 4) for x in (a, b))
    for kind, f in (("iou", B.box_iou), ("iof", B.box_iof), ("giou", B.box_giou)):
        assert same(f(a, b), B._overlap(a, b, kind, paired=False)), kind


def test_overlaps_sizes_layouts_gradients():
    for m in (0, 1, 15, 16, 17, 511, 512, 513, 1100):
        a, b = some_boxes(7)[0], some_boxes(m, 1)[0]
        assert same(B.box_giou(a, b), B._overlap(a, b, "giou", paired=False))
    wide = torch.zeros(7, 8); wide[:,::2] = a
    assert torch.equal(B.box_iou(wide[:,::2], b), B.box_iou(a, b))
    leaf = a.clone().requires_grad_()
    (g,) = torch.autograd.grad(B.box_giou(leaf, b).sum(), leaf); assert g.abs().sum() > 0
    with torch.no_grad(): assert not B.box_iou(leaf, b).requires_grad
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(B.box_iou(a, b), B.box_iou(a, b.clone()))
    for kind in range(3): torch.library.opcheck(B.overlaps_op, (a, b, kind))
    assert torch.equal(torch.compile(B.box_iou, fullgraph=True, backend="aot_eager")(a, b), B.box_iou(a, b))
    with pytest.raises(RuntimeError): B.overlaps_op(a, b.double(), 0) if library.has_kernel("box_overlaps") else (_ for _ in ()).throw(RuntimeError())


# ------------------------------------------------------------------------------------------------------------ soft suppression

@few
@given(st.integers(0, 150), st.sampled_from(N.METHODS), st.sampled_from([.1, .3, .5, 1.]), st.sampled_from([-1, 0, 1, 7]), st.integers(0, 99), st.booleans())
def test_soft_nms_is_its_loop(n, method, t, most, seed, double):
    b, s = some_boxes(n, seed, 150., torch.float64 if double else torch.float32)
    b[n//2:] = b[n//2:].round(); s[::3] = (s[::3]*5).round()/5                                        # ties, identical scores, zeros
    index, got = N.soft_nms(b, s, t, method, .5, 1e-3, max_keep=most)
    want, w = REF["notebook_det::soft_nms"](b, s, t, .5, 1e-3, N.METHODS.index(method), most)
    assert (got - w).abs().max().item() < 1e-6 if len(w) else len(got) == 0
    if method != "gaussian": assert torch.equal(index, want) and torch.equal(got, w)                 # exponentials differ in their last bit
    assert (got[1:] <= got[:-1] + 1e-6).all() and (got >= 1e-3).all()


odd_box = st.tuples(*[st.one_of(st.integers(0, 6).map(float), st.sampled_from([0., 1e30, -1e30, 3e38, 1e-40, inf, -inf]))]*4)


@few
@given(st.lists(odd_box, max_size=20), st.data(), st.sampled_from(["linear", "naive"]))
def test_soft_nms_adversarial(rows, data, method):
    b = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    s = torch.tensor(data.draw(st.lists(st.sampled_from([0., -0., .001, .5, 1., inf, -inf]), min_size=len(rows), max_size=len(rows))))
    for a, c in zip(N.soft_nms(b, s, .3, method), REF["notebook_det::soft_nms"](b, s, .3, .5, 1e-3, N.METHODS.index(method), -1)): assert torch.equal(a, c)


def test_soft_nms_naive_is_nms_and_groups():
    b, s = some_boxes(400)
    assert torch.equal(N.soft_nms(b, s, .500001, "naive", min_score=1e-9)[0], N.nms(b, s, .5))
    g = torch.arange(400) % 3*10**12
    index, got = N.soft_nms(b, s, .4, groups=g)
    for k in g.unique():
        mine = (g == k).nonzero().flatten(); i, v = N.soft_nms(b[mine], s[mine], .4)
        assert torch.equal(index[g[index] == k], mine[i]) and torch.equal(got[g[index] == k], v)
    p = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    for bb in (b[:60], b[:60,None] + torch.rand(60, 4, 1)):
        boxes, v, label, row = N.multiclass_soft_nms(bb, p, .3, .5, 25)
        assert len(v) == 25 and (v <= p[row, label] + 1e-7).all() and torch.equal(boxes, bb[row] if bb.ndim == 2 else bb[row, label])
    torch.library.opcheck(N.soft_nms_op, (b[:30], s[:30], .3, .5, 1e-3, 1, -1)); torch.library.opcheck(N.soft_nms_op, (b[:0], s[:0], .3, .5, 1e-3, 0, -1))
    for bad in (lambda: N.soft_nms(b*nan, s), lambda: N.soft_nms(b, s*nan)):
        with pytest.raises(RuntimeError, match="not a number"): bad()
    with dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for x, y in zip(torch.compile(lambda b, s: N.soft_nms(b, s)[1]*2, fullgraph=True, backend="aot_eager")(b, s)[None], (N.soft_nms(b, s)[1]*2)[None]): assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------------------------- pasting and codes

@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.sampled_from([.5, .01, .99, 1., 1/3]), st.integers(0, 10**6), st.booleans())
def test_paste_and_codes(h, w, H, W, t, seed, coarse):
    "Every pixel is the reference's, every code pycocotools', for noise, flat masks and odd boxes."
    g = torch.Generator().manual_seed(seed)
    m, c = torch.rand(8, h, w, generator=g), torch.rand(8, 2, generator=g)*60 - 20
    b = torch.cat((c, c + torch.rand(8, 2, generator=g)**2*70), 1)
    if coarse: m, b = (m*4).round()/4, b.round()
    m[1], m[2] = t, 1.; b[3], b[4,2], b[5,1], b[6] = torch.tensor([-5000., -4000, 6000, 7000]), inf, nan, torch.tensor([9., 9, 9, 20])
    m[7,0,0] = nan
    pixels = M.paste_masks(m, b, (H, W), t)
    assert torch.equal(pixels, REF["notebook_det::paste_masks"](m, b, H, W, t))
    codes = M.paste_rle(m, b, (H, W), t)
    assert codes == M.encode_rle(pixels)


def test_paste_operators():
    g = torch.Generator().manual_seed(0)
    m, b = torch.rand(5, 28, 28, generator=g), some_boxes(5)[0]
    torch.library.opcheck(M.paste_op, (m, b, 90, 120, .5)); torch.library.opcheck(M.paste_rle_op, (m, b, 90, 120, .5))
    assert torch.equal(torch.compile(M.paste_masks, fullgraph=True, backend="aot_eager")(m, b, (90, 120)), M.paste_masks(m, b, (90, 120)))
    assert torch.equal(M.paste_masks(m.half(), b, (90, 120)), M.paste_masks(m.half().float(), b, (90, 120)))
    big = M.paste_rle(m, b*40, (4000, 5000)); assert [r["size"] for r in big] == [[4000, 5000]]*5
    assert [int(M.decode_rle(r).sum()) for r in M.paste_rle(m, b, (400, 420))] == M.paste_masks(m, b, (400, 420)).sum((1, 2)).tolist()
    before = torch.get_num_threads(); torch.set_num_threads(3)
    try: assert M.paste_rle(m.repeat(200, 1, 1), b.repeat(200, 1)*6, (800, 1000)) == big[:0] + M.paste_rle(m, b*6, (800, 1000))*200
    finally: torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ deformable convolution

def layer(groups=1, sets=1, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), masked=True, dtype=torch.float64, channels=8, images=2, size=(9, 11), spread=2., seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    h, w = ((n + 2*p - d*(k-1) - 1)//s + 1 for n, p, d, k, s in zip(size, padding, dilation, kernel, stride)); cells = kernel[0]*kernel[1]
    x, o, weight = rand(images, channels, *size), (rand(images, 2*sets*cells, h, w).detach()*spread).requires_grad_(), rand(3*groups, channels//groups, *kernel)
    return x, o, weight, rand(3*groups), stride, padding, dilation, rand(images, sets*cells, h, w) if masked else None


@few
@given(st.sampled_from([(1, 1), (2, 4), (4, 2), (8, 8), (1, 2)]), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
       st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(1, 2), st.integers(1, 2)), st.booleans(), st.booleans(), st.sampled_from([.3, 2., 20.]), st.booleans(), st.integers(0, 99))
def test_deform_conv_is_torchvisions(gs, kernel, stride, padding, dilation, masked, double, spread, last, seed):
    x, o, w, b, *geometry, m = layer(*gs, kernel, stride, padding, dilation, masked, torch.float64 if double else torch.float32, spread=spread, seed=seed)
    if last: x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [t for t in (x, o, w, b, m) if t is not None]
    got, want = D.deform_conv2d(x, o, w, b, *geometry, m), torchvision.ops.deform_conv2d(x, o, w, b, *geometry, m)
    eps = 1e-9 if double else 2e-4
    assert got.shape == want.shape and (got - want).abs().max() < eps and (not last or got.is_contiguous(memory_format=torch.channels_last))
    y = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=want.dtype)
    for p, q in zip(torch.autograd.grad(got, leaves, y), torch.autograd.grad(want, leaves, y)): assert (p - q).abs().max() < 5*eps


def test_deform_rows_are_the_reference():
    x, o, w, b, stride, padding, dilation, m = (t.detach() if isinstance(t, torch.Tensor) else t for t in layer(2, 4, (3, 2)))
    for mask in (m, None):
        for first, count in ((0, 5), (100, 62), (0, 0)):
            args = (x, o, mask, [3, 2, 1, 1, 1, 1, 1, 1], 2, first, count)
            rows, want = D.rows_op(*args), REF["notebook_det::deform_rows"](*args)
            assert torch.allclose(rows, want, atol=1e-12)
            g, grads = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=rows.dtype), []
            for f in (D.rows_backward_op, REF["notebook_det::deform_rows_backward"]):
                to = [None if t is None else torch.zeros_like(t, memory_format=torch.channels_last if t is x else torch.contiguous_format) for t in (x, o, mask)]
                f(g, *args[:-1], *to); grads.append(to)
            assert all(p is q is None or torch.allclose(p, q, atol=1e-11) for p, q in zip(*grads))


def test_deform_conv_in_pieces_and_threads(monkeypatch):
    args = layer(2, 2, dtype=torch.float32, channels=32, size=(40, 50))
    want = D.deform_conv2d(*args); y = torch.ones_like(want); leaves = [*args[:4], args[-1]]; grads = torch.autograd.grad(want, leaves, y)
    def pieces(x, offset, cells):
        for first in range(0, 2*40*50, 700): yield first, min(700, 4000 - first)
    monkeypatch.setattr(D, "_pieces", pieces)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try: got = D.deform_conv2d(*args); g = torch.autograd.grad(got, leaves, y)
        finally: torch.set_num_threads(before)
        assert torch.allclose(got, want, atol=1e-4) and all(torch.allclose(p, q, atol=2e-3, rtol=1e-4) for p, q in zip(g, grads))


@few
@given(st.integers(1, 3), st.sampled_from([(8, 1), (8, 4), (40, 2), (300, 3)]), st.sampled_from([3, 17, 32, 75]), st.sampled_from([(3, 3), (1, 1), (2, 3)]), st.tuples(st.integers(1, 2), st.integers(1, 2)),
       st.booleans(), st.sampled_from([.3, 2., 20.]), st.sampled_from([(1, 1), (7, 9), (13, 21)]), st.integers(0, 99))
def test_deform_product_is_the_reference(images, channels, out, kernel, stride, masked, spread, size, seed):
    g, (C, sets), cells = torch.Generator().manual_seed(seed), channels, kernel[0]*kernel[1]
    h, w = ((n + 2 - k)//s + 1 for n, k, s in zip(size, kernel, stride))
    x, o, weight = torch.randn(images, C, *size, generator=g), torch.randn(images, 2*sets*cells, h, w, generator=g)*spread, torch.randn(out, C, *kernel, generator=g)/(C*cells)**.5
    m, geometry = torch.rand(images, sets*cells, h, w, generator=g) if masked else None, [*kernel, *stride, 1, 1, 1, 1]
    want = REF["notebook_det::deform_product"](*(None if t is None else t.double() for t in (x, o, m, weight)), geometry)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try: got = D.product_op(x, o, m, weight, geometry)
        finally: torch.set_num_threads(before)
        assert got.shape == (images*h*w, out) and (got - want).abs().max() < 2e-4


def test_deform_product_at_the_edges():
    args = lambda x, o, w: (x, o, None, w, [3, 3, 1, 1, 1, 1, 1, 1])
    x, o, w = torch.randn(2, 8, 5, 6), torch.zeros(2, 18, 5, 6), torch.randn(4, 8, 3, 3)
    assert D.product_op(*args(x[:0], o[:0], w)).shape == (0, 4) and D.product_op(*args(x, o, w[:0])).shape == (60, 0)
    assert torch.equal(D.product_op(*args(x[:, :0], o, w[:, :0])), torch.zeros(60, 4))
    for value in (inf, -inf, nan, 1e38): assert torch.equal(D.product_op(*args(x, torch.full_like(o, value), w)), torch.zeros(60, 4))
    wide = torch.randn(1, 32, 100, 168); o, w = torch.randn(1, 18, 100, 168), torch.randn(40, 32, 3, 3)              # more than 20 ms: the places are shared out
    before = torch.get_num_threads(); got = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try: got.append(D.product_op(*args(wide.repeat(1, 4, 1, 1), o, w.repeat(2, 4, 1, 1))))
        finally: torch.set_num_threads(before)
    assert torch.equal(*got)                                                                                            # whoever sums, the order is the same
    torch.library.opcheck(D.product_op, args(x, torch.randn(2, 18, 5, 6), torch.randn(4, 8, 3, 3)))
    if library.has_kernel("deform_product"):
        for wrong in (args(x, torch.zeros(2, 18, 5, 6), torch.randn(4, 7, 3, 3)), args(x.double(), torch.zeros(2, 18, 5, 6).double(), torch.randn(4, 8, 3, 3).double())):
            with pytest.raises(RuntimeError, match="deform_product: "): D.product_op(*wrong)


def test_deform_torchs_checks():
    for masked in (True, False):
        x, o, w, b, stride, padding, dilation, m = layer(2, 1, masked=masked, channels=4, images=1, size=(4, 5))
        op = (x, w, o, m, [3, 3, *stride, *padding, *dilation], 2)
        torch.library.opcheck(D.deform_op, op)
        torch.library.opcheck(D.deform_backward_op, (torch.randn(1, 6, 4, 5).double(), *(t.detach() if isinstance(t, torch.Tensor) else t for t in op)))
        assert torch.autograd.gradcheck(lambda x, o, w: D.deform_conv2d(x, o, w, b, stride, padding, dilation, m), (x, o, w))
    f = lambda x, o, w: D.deform_conv2d(x, o, w, None, 1, 1).square()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for leaf in (x, last):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(leaf, o, w); want = f(leaf, o, w)
        assert torch.equal(got, want)
        for p, q in zip(torch.autograd.grad(got.sum(), (leaf, o, w)), torch.autograd.grad(want.sum(), (leaf, o, w))): assert torch.allclose(p, q)
    class Layer(torch.nn.Module):
        def forward(self, x, o, w): return f(x, o, w)
    assert torch.equal(torch.export.export(Layer(), (x, o, w)).module()(x, o, w), f(x, o, w))
    with torch.autocast("cpu", torch.bfloat16):
        low = D.deform_conv2d(x.bfloat16(), o.float(), w.float(), None, 1, 1); assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_deform_odd_offsets():
    x, o, w, b, *_ = layer(dtype=torch.float32, masked=False, images=1)
    for value in (inf, -inf, nan, 1e38, -1e38, 1e9):
        bad = torch.full_like(o, value)
        if library.has_kernel("deform_rows"): assert torch.equal(D.deform_conv2d(x, bad, w, None, 1, 1), torch.zeros(1, 3, 9, 11))


# --------------------------------------------------------------------------------------------------- notebooks leave nothing behind

def test_a_notebook_does_not_leave_its_functions_behind():
    "A notebook defines the operators anew; its functions lose their names when its kernel ends, and must not stay registered."
    spec = importlib.util.spec_from_file_location("conftest_of_the_root", ROOT/"conftest.py")
    conftest = importlib.util.module_from_spec(spec); spec.loader.exec_module(conftest)
    before = {k: dict(getattr(library, k)) for k in ("REFERENCES", "FAKES", "GRADIENTS")}
    with conftest.unchanged():
        scope = {}
        exec("import torch\nfrom notebook_det.ops.library import define\ndef f(*a): return torch.zeros(0)\n"
             "define('nms(Tensor boxes, Tensor scores, float iou_threshold, int max_keep) -> Tensor', f, f)", scope)
        assert library.FAKES["notebook_det::nms"] is scope["f"]
    for k, entries in before.items(): assert entries.items() <= getattr(library, k).items()
