"""RoIAlign and the focal loss: C++ against torchvision, the three-matrix definition and the formula; layouts, threads, gradients,
torch's own checks, bad input."""
import math, sys
from pathlib import Path
import pytest, torch, torchvision
from hypothesis import HealthCheck, given, settings, strategies as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
from notebook_det.losses.classification import FocalLoss, Loss
from notebook_det.ops import focal, library, pool, roi

REF = library.REFERENCES
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LAST = torch.channels_last


def scene(channels=5, rois=12, dtype=torch.float32, seed=0, shapes=((20, 27), (10, 14), (1, 1)), images=2):
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(images, channels, *s, generator=g).to(dtype) for s in shapes]
    c, wh = torch.rand(rois, 2, generator=g)*90 - 5, torch.rand(rois, 2, generator=g)**2*90
    r = torch.cat((torch.randint(0, images, (rois, 1), generator=g).float(), c - wh/2, c + wh/2), 1).to(dtype)
    if rois > 4: r[1,3], r[2,1:], r[3,1:] = r[1,1], torch.tensor([-500., -500, 900, 900]), torch.tensor([300., 300, 350, 340])
    return maps, r, torch.randint(0, len(shapes), (rois,), generator=g), [.25, .125, .125]


def loop(maps, rois, level, size, scales, ratio, aligned):
    out = rois.new_zeros(len(rois), maps[0].shape[1], *size)
    for k, (m, s) in enumerate(zip(maps, scales)):
        mine = level == k
        if mine.any(): out[mine] = torchvision.ops.roi_align(m, rois[mine], size, s, ratio, aligned)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels,layout", [(5, LAST), (5, torch.contiguous_format), (33, LAST), (70, torch.contiguous_format), (1, LAST)])
def test_roi_align_is_torchvisions(dtype, channels, layout):
    maps, rois, level, scales = scene(channels, dtype=dtype)
    maps = [m.contiguous(memory_format=layout).requires_grad_() for m in maps]
    for ratio, aligned, size in ((0, True, (7, 7)), (2, True, (3, 5)), (0, False, (1, 1)), (3, False, (2, 9))):
        got, want = roi.pyramid_roi_align(maps, rois, level, size, scales, ratio, aligned), loop(maps, rois, level, size, scales, ratio, aligned)
        assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
        eps = 2e-5 if dtype == torch.float32 else 1e-12
        assert (got - want).abs().max() < eps
        g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for a, b, m in zip(torch.autograd.grad(got, maps, g), torch.autograd.grad(want, maps, g), maps):
            assert (a - b).abs().max() < 5*eps and a.is_contiguous(memory_format=layout)


side = st.one_of(st.integers(-8, 70).map(float), st.floats(-30, 130, width=32), st.sampled_from([0., -0., 1e-30, 63.999996, 64., 1e4, -1e4]))


@pytest.mark.parametrize("dtype,channels", [(torch.float32, 1), (torch.float32, 19), (torch.float32, 64), (torch.float64, 5)])
def test_maps_that_are_turned_as_a_whole(dtype, channels):
    "Many boxes on maps of planes: each map is turned once, and every number is what channels last gives."
    maps, rois, level, scales = scene(channels, rois=120, dtype=dtype, shapes=((20, 27), (16, 16), (1, 3)))
    out = [roi.pyramid_roi_align([m.contiguous(memory_format=f) for m in maps], rois, level, (3, 5), scales) for f in (torch.contiguous_format, LAST)]
    assert torch.equal(*out) and torch.allclose(out[0], loop(maps, rois, level, (3, 5), scales, 0, True), atol=1e-5)
    one = roi.pyramid_roi_align(maps, rois[:1], level[:1], (3, 5), scales)                     # one box: only what lies under it
    assert torch.equal(one, out[0][:1])


@few
@given(st.lists(st.tuples(st.integers(0, 1), side, side, side, side), min_size=1, max_size=6), st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(1, 7))
def test_roi_align_is_three_matrices(rows, ratio, aligned, h, w):
    "Inverted, empty, far and identical boxes too."
    rois, f = torch.tensor(rows, dtype=torch.float64), torch.randn(2, 3, 8, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if not aligned: rois[:,3:] = torch.maximum(rois[:,1:3], rois[:,3:])
    off = .5 if aligned else 0
    for layout in (LAST, torch.contiguous_format):
        got = roi.roi_align(f.contiguous(memory_format=layout), rois, (h, w), 1/8, ratio, aligned)
        for r, out in zip(rois.tolist(), got):
            x1, y1, x2, y2 = (v/8 - off for v in r[1:])
            V, U = (roi.axis_weights(lo, hi, n, size, ratio, aligned).double() for lo, hi, n, size in ((y1, y2, h, 8), (x1, x2, w, 11)))
            if math.ceil((x2 - x1)/w) > 500 or math.ceil((y2 - y1)/h) > 500: continue       # thousands of points in float32: the definition itself is off
            assert (out - V @ f[int(r[0])] @ U.T).abs().max() < 2e-3


def test_roi_align_huge_box_is_quick():
    "A box of a billion pixels asks for 10¹⁶ points; those outside the map are not visited."
    if not built(): pytest.skip("torchvision's kernel makes a list of all of them")
    f = torch.ones(1, 2, 9, 9)
    for layout in (LAST, torch.contiguous_format):
        out = roi.roi_align(f.contiguous(memory_format=layout), torch.tensor([[0., -1e9, -1e9, 1e9, 1e9]]), 3)
        assert out.isfinite().all() and out[0,0,1,1] > 0 and out[0,0,0,0] == 0


def built(): return library.has_kernel("roi_align")


def test_roi_align_does_not_depend_on_threads():
    maps, rois, level, scales = scene(64, 900, shapes=((60, 70), (30, 35), (15, 18)))
    for layout in (LAST, torch.contiguous_format):
        m = [x.contiguous(memory_format=layout).requires_grad_() for x in maps]
        answers = []
        for threads in (1, 3):
            before = torch.get_num_threads(); torch.set_num_threads(threads)
            try:
                out = roi.pyramid_roi_align(m, rois, level, (14, 14), scales)
                answers.append((out, *torch.autograd.grad(out, m, torch.ones_like(out))))
            finally: torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(*answers))


def test_roi_align_empty_and_half():
    maps, rois, level, scales = scene()
    assert roi.pyramid_roi_align(maps, rois[:0], level[:0], 7, scales).shape == (0, 5, 7, 7)
    m = [x.requires_grad_() for x in maps]
    for g in torch.autograd.grad(roi.pyramid_roi_align(m, rois[:0], level[:0], 7, scales).sum(), m): assert g.abs().sum() == 0
    assert roi.roi_align(torch.zeros(1, 0, 4, 4), torch.tensor([[0., 0, 0, 2, 2]]), 2).shape == (1, 0, 2, 2)
    low = [x.detach().bfloat16() for x in maps]
    got = roi.pyramid_roi_align(low, rois, level, 7, scales)
    assert got.dtype == torch.bfloat16 and torch.equal(got, roi.pyramid_roi_align([x.float() for x in low], rois, level, 7, scales).bfloat16())
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(roi.pyramid_roi_align(low, rois, level, 7, scales), got)


def test_roi_align_bad_input():
    maps, rois, level, scales = scene()
    bad = rois.clone(); bad[4,2] = float("nan")
    for call in (roi.align_op, REF["notebook_det::roi_align"]):
        rest = (2, 2, scales, 0, True)
        with pytest.raises(RuntimeError, match="RoI 4 .*not finite"): call(maps, bad, level, *rest)
        with pytest.raises(RuntimeError, match="level"): call(maps, rois, level + 3, *rest)
        with pytest.raises(RuntimeError, match="image that is not there"): call(maps, rois + torch.tensor([2., 0, 0, 0, 0]), level, *rest)
        with pytest.raises(RuntimeError, match="as many scales"): call(maps, rois, level, 2, 2, scales[:2], 0, True)


def test_roi_align_torchs_checks():
    maps, rois, level, scales = scene(3, 4, shapes=((6, 7), (4, 5)))
    level = level.clamp(max=1); scales = scales[:2]
    for layout in (LAST, torch.contiguous_format):
        m = [x.contiguous(memory_format=layout).requires_grad_() for x in maps]
        torch.library.opcheck(roi.align_op, (m, rois, level, 3, 2, scales, 0, True))
        torch.library.opcheck(roi.align_backward_op, (torch.randn(4, 3, 3, 2), [x.detach() for x in m], rois, level, 3, 2, scales, 0, True))
    d = [x.detach()[:1,:2].double().requires_grad_() for x in maps]
    rois[:,0] = 0
    assert torch.autograd.gradcheck(lambda a, b: roi.pyramid_roi_align([a, b], rois, level, 2, scales, 0), tuple(d))

    class Two(torch.nn.Module):
        def forward(self, a, b, r, l): return roi.pyramid_roi_align([a, b], r, l, 3, (.25, .125)).square()
    leaf = [x.detach().clone().requires_grad_() for x in maps]
    compiled = torch.compile(Two(), fullgraph=True, backend="aot_eager")
    for n in (4, 3):
        want, got = Two()(*maps, rois[:n], level[:n]), compiled(*leaf, rois[:n], level[:n])
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got.sum(), leaf), torch.autograd.grad(Two()(*leaf, rois[:n], level[:n]).sum(), leaf)): assert torch.equal(a, b)
    assert torch.equal(torch.export.export(Two(), (*maps, rois, level)).module()(*maps, rois, level), Two()(*maps, rois, level))


# ------------------------------------------------------------------------------------------------------------------ focal loss

logit = st.one_of(st.floats(-12, 12, width=32), st.sampled_from([0., -0., 50., -50., 104., -104., 1e30, -1e30]))


@few
@given(st.integers(1, 40), st.data(), st.sampled_from([0., .5, 1., 2., 5.]), st.sampled_from([0., .25, 1.]), st.sampled_from(["none", "rows", "each"]), st.booleans())
def test_focal_is_the_formula(k, data, gamma, alpha, how, double):
    dtype = torch.float64 if double else torch.float32
    n = data.draw(st.integers(1, 4))
    x = torch.tensor(data.draw(st.lists(logit, min_size=n*k, max_size=n*k))).to(dtype).reshape(n, k).requires_grad_()
    y = torch.tensor(data.draw(st.lists(st.integers(0, k), min_size=n, max_size=n)))
    g = torch.Generator().manual_seed(n)
    w = {"none": None, "rows": torch.rand(n, generator=g), "each": torch.rand(n, k, generator=g)}[how]
    got = focal.sigmoid_focal_sum(x, y, w, gamma, alpha)
    want = REF["notebook_det::focal_loss"](x.detach(), y, None if w is None else w.to(dtype), gamma, alpha)
    assert torch.allclose(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-8, atol=1e-7)
    slope = REF["notebook_det::focal_loss_backward"](torch.tensor(.5, dtype=dtype), x.detach(), y, None if w is None else w.to(dtype), gamma, alpha)
    far = x.detach().abs() > 1e20                                                                     # 0·∞ in the formula
    assert torch.allclose(torch.autograd.grad(got*.5, x)[0][~far], slope[~far], rtol=1e-4, atol=1e-6)


def test_focal_loss_module_is_the_same_either_way():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 21, generator=g).mul(4).requires_grad_(), torch.randint(0, 22, (300,), generator=g)
    for reduction, avg in (("mean", None), ("mean", 7.), ("mean", torch.tensor(3.)), ("sum", None)):
        for w in (None, torch.rand(300, generator=g), torch.rand(300, 21, generator=g)):
            loss = FocalLoss(weight=.7, reduction=reduction)
            a, b = loss(x, y, w, avg), Loss.forward(loss, x, y, w, avg)
            assert torch.allclose(a, b, rtol=2e-6)
            assert torch.allclose(torch.autograd.grad(a, x)[0], torch.autograd.grad(b, x)[0], rtol=1e-5, atol=1e-8)


def test_focal_does_not_depend_on_threads():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200_000, 80, generator=g).requires_grad_(), torch.randint(0, 81, (200_000,), generator=g)
    answers, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try: s = focal.sigmoid_focal_sum(x, y); answers.append((s, *torch.autograd.grad(s, x)))
        finally: torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers)) or not built()


def test_focal_torchs_checks():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=g, requires_grad=True), torch.randint(0, 5, (9,), generator=g)
    for w in (None, torch.rand(9), torch.rand(9, 4)):
        torch.library.opcheck(focal.focal_op, (x, y, w, 1.5, .25))
        torch.library.opcheck(focal.focal_backward_op, (torch.ones(()), x.detach(), y, w, 2., .25))
        assert torch.autograd.gradcheck(lambda x: focal.sigmoid_focal_sum(x, y, w, 2., .25), (x.detach().double().requires_grad_(),))
    f = lambda x, y: focal.sigmoid_focal_sum(x, y)*2
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x, y), x)[0], torch.autograd.grad(f(x, y), x)[0])
    slope, = torch.autograd.grad(focal.sigmoid_focal_sum(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second"): slope.sum().backward()
    loss = FocalLoss()
    assert torch.allclose(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y), loss(x, y), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- other ways to pool

@few
@given(st.lists(st.tuples(st.integers(0, 1), side, side, side, side), max_size=4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_pools_are_their_references(rows, h, w, double, seed):
    dtype = torch.float64 if double else torch.float32
    rois = torch.tensor(rows, dtype=dtype).reshape(-1, 5).clamp(-200, 200); rois[:,0] = rois[:,0].clamp(0, 1)
    g = torch.Generator().manual_seed(seed)
    f, o = torch.randn(2, 5, 9, 12, generator=g).to(dtype), torch.randn(len(rois), 2, h, w, generator=g).to(dtype)
    f = f.mul(4).round() if seed % 2 else f.contiguous(memory_format=LAST)                            # equal values: the first wins
    for a, b in zip(pool.max_op(f, rois, h, w, 1/8), REF["notebook_det::max_roi_pool"](f, rois, h, w, 1/8)): assert torch.equal(a, b)
    for ratio, offset in ((2, o), (0, None), (1, o)):
        args = (f, rois, offset, h, w, 1/8, ratio, .1)
        a, b = pool.deform_op(*args), REF["notebook_det::deform_roi_pool"](*args)
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-3 if not double else 1e-9)
        if seed % 2 == 0 and double:
            grad = torch.randn(a.shape, generator=g).to(dtype)
            for p, q in zip(pool.deform_backward_op(grad, *args), REF["notebook_det::deform_roi_pool_backward"](grad, *args)): assert torch.allclose(p, q, atol=1e-7)


def test_nothing_comes_back_from_bins_without_a_pixel():
    "A GPU answers -1 for a box of an image that is not there; its gradient must not go anywhere."
    class Ctx: shape, saved_tensors = (2, 3, 4, 5), (torch.tensor([[0., 0, 0, 9, 9], [7, 0, 0, 9, 9]]), torch.full((2, 1, 1, 3), -1, dtype=torch.int32))
    Ctx.saved_tensors[1][0] = 6
    slope = pool._max_backward(Ctx, torch.ones(2, 1, 1, 3), None)[0]
    assert slope.shape == Ctx.shape and slope.sum() == 3 and (slope[0,:,1,1] == 1).all()


def test_pools_torchs_checks():
    maps, rois, *_ = scene(3, 4, shapes=((6, 7),)); f = maps[0]; rois[:,1:] = rois[:,1:].clamp(2, 20)
    o = torch.randn(4, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(pool.max_op, (f.requires_grad_(), rois, 3, 2, .25))
    for offset in (o.requires_grad_(), None):
        torch.library.opcheck(pool.deform_op, (f, rois, offset, 3, 2, .25, 2, .1))
        torch.library.opcheck(pool.deform_backward_op, (torch.randn(4, 3, 2, 3), f.detach(), rois, None if offset is None else o.detach(), 3, 2, .25, 2, .1))
    run = lambda f, o: pool.deform_roi_pool(f, rois, o, (3, 2), .25, mask=torch.full((4, 3, 2), .5)).square() + pool.max_roi_pool(f, rois, (3, 2), .25)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(f, o).sum(), (f, o)), torch.autograd.grad(run(f, o).sum(), (f, o))): assert torch.allclose(a, b, atol=1e-6)
    answers, before = [], torch.get_num_threads()
    big, many = torch.randn(2, 64, 30, 40, requires_grad=True), rois.repeat(300, 1); moved = torch.randn(1200, 2, 7, 7, requires_grad=True)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try: out = pool.deform_roi_pool(big, many, moved, 7, .5); answers.append((out, *torch.autograd.grad(out, (big, moved), torch.ones_like(out))))
        finally: torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers))


@pytest.mark.parametrize("far", [1e15, 1e30, 3e38])
@pytest.mark.parametrize("ratio", [0, 2])
def test_boxes_without_end(far, ratio):
    "Boxes so large that no point can be told from the next one (or whose width is no number) give finite values, at once; so does an offset that is no number."
    if not library.has_kernel("roi_align"): pytest.skip("the definition in torch lists all points of a box")
    maps, rois = torch.rand(1, 4, 20, 20), torch.tensor([[0, -far, 0., far, 9.], [0, far, far, far, far], [0, -far, -far, far, far]])
    for m in (maps, maps.contiguous(memory_format=LAST)): assert roi.roi_align(m, rois, 7, 1., ratio).isfinite().all()
    nowhere = torch.full((3, 2, 7, 7), math.nan)
    for o in (None, nowhere): assert pool.deform_roi_pool(maps, rois, o, 7, 1., ratio).isfinite().all()
