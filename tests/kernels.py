"""What is asked of every kernel for GPUs, wherever it runs: tests/test_emulated.py asks the files as compiled for a CPU, tests/test_cuda.py a GPU.

A case takes `ops`, the namespace whose operators are on trial, and `dev`, where its tensors are to be. It asks twice the same: the
operator, and the readable reference on the CPU. What is chosen must be equal; what is summed, within the stated difference."""
import torch
from notebook_det.ops import assign, focal, library, nms, pool, roi

REF, LAST, PLANES = {k.partition("::")[2]: v for k, v in library.REFERENCES.items() if k.startswith("notebook_det::")}, torch.channels_last, torch.contiguous_format
NAMES = ("nms", "batched_nms", "multiclass_nms", "nms_fixed", "max_iou_assign", "roi_align", "roi_align_backward", "max_roi_pool", "deform_roi_pool", "deform_roi_pool_backward", "focal_loss", "focal_loss_backward")
NEAR = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 3e-5, torch.float64: 1e-11}
FLOATS, ALL = (torch.float32, torch.float64), tuple(NEAR)
NAN, INF = float("nan"), float("inf")
CASES = []


def case(f): CASES.append(f); return f
def gen(seed): return torch.Generator().manual_seed(seed)
def wide(dtype): return torch.float64 if dtype == torch.float64 else torch.float32
def to(dev, x): return type(x)(to(dev, v) for v in x) if isinstance(x, (tuple, list)) else x.to(dev) if torch.is_tensor(x) else x
def lying(x, dev): return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=dev).copy_(x)   # on another device with the same strides


def same(got, want, **note):
    got, want = ([x] if torch.is_tensor(x) else list(x) for x in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want): assert g.dtype == w.dtype and g.shape == w.shape and torch.equal(g.cpu(), w), note


def close(got, want, eps, scale=1., **note):
    "Relative to the largest number, at least 1."
    got, want = ([x] if torch.is_tensor(x) else list(x) for x in (got, want))
    for g, w in zip(got, want):
        assert g.shape == w.shape, note
        if not w.numel(): continue
        g, w = g.cpu().double(), w.double()
        off = (g - w).abs().max().item()
        assert off <= eps*scale*max(1., w.abs().max().item()), (off, note)


def trace(f):
    "Of a call that has been warmed up: names of what waits for the GPU or copies to the host, in the profiler's trace; kernels launched."
    from torch.profiler import ProfilerActivity, profile
    f(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p: f()
    names = [e.name for e in p.events()]                              # the profiler itself ends with a cudaDeviceSynchronize
    return sorted({n for n in names if "Synchronize" in n and n != "cudaDeviceSynchronize" or "DtoH" in n or n in ("aten::item", "aten::nonzero")}), sum("LaunchKernel" in n for n in names)


def raises(f, words):
    try: f()
    except RuntimeError as e: assert words in str(e), e
    else: raise AssertionError(f"no error: {words}")


def some_boxes(n, seed, dtype=torch.float32, spread=300.):
    "A third of the boxes on whole pixels, some without area, some twice; scores with ties."
    g = gen(seed)
    c = torch.rand(n, 2, generator=g)*spread
    b = torch.cat((c, c + 2 + torch.rand(n, 2, generator=g)*80), 1)
    b = torch.where(torch.rand(n, 1, generator=g) < .33, b.round(), b)
    if n > 10: b[3], b[7,2:], b[8] = b[2], b[7,:2], 0.
    return b.to(dtype), (torch.rand(n, generator=g)*50).round().to(dtype)


# --------------------------------------------------------------------------------------------------------- suppression

@case
def nms_is_the_references(ops, dev):
    for dtype in FLOATS:
        for n in (1, 3, 64, 65, 500):
            b, s = some_boxes(n, n, dtype)
            for t in (0., .3, .5, 1.):
                for keep in (-1, 9): same(ops.nms(b.to(dev), s.to(dev), t, keep), REF["nms"](b, s, t, keep), n=n, t=t, keep=keep)


@case
def nms_inside_groups(ops, dev):
    for dtype, n in ((torch.float32, 500), (torch.float64, 130)):
        b, s = some_boxes(n, n + 1, dtype)
        for groups in (torch.randint(-3, 4, (n,), generator=gen(1)), torch.randint(0, 3, (n,), generator=gen(2))*10**12):
            for keep in (-1, 20): same(ops.batched_nms(*to(dev, (b, s, groups)), .4, keep), REF["batched_nms"](b, s, groups, .4, keep), keep=keep)


@case
def nms_of_a_table(ops, dev):
    for dtype in FLOATS:
        b, _ = some_boxes(60, 5, dtype)
        p = torch.rand(60, 5, generator=gen(6)).to(dtype); p[4] = p[5]
        own = b[:,None] + torch.rand(60, 5, 1, generator=gen(7)).to(dtype)*9
        for boxes in (b, own):
            for least, keep in ((.3, 30), (.3, -1), (2., 5), (-1., 7), (.5, 0)): same(ops.multiclass_nms(*to(dev, (boxes, p)), least, .5, keep), REF["multiclass_nms"](boxes, p, least, .5, keep), least=least, keep=keep)


@case
def nms_of_a_fixed_size(ops, dev):
    b, s = some_boxes(200, 9)
    groups = torch.randint(0, 3, (200,), generator=gen(3))
    for g in (None, groups):
        for keep in (-1, 0, 1, 64, 500): same(ops.nms_fixed(*to(dev, (b, s, g)), .4, keep), REF["nms_fixed"](b, s, g, .4, keep), keep=keep)


@case
def nms_at_the_edges(ops, dev):
    none = torch.zeros(0, 4, device=dev), torch.zeros(0, device=dev)
    same(ops.nms(*none, .5, -1), torch.zeros(0, dtype=torch.int64)); same(ops.nms_fixed(*none, None, .5, 3), (torch.full((3,), -1), torch.tensor(0)))
    same(ops.multiclass_nms(none[0], torch.zeros(0, 3, device=dev), .1, .5, 9), (torch.zeros(0, dtype=torch.int64),)*2)
    same(ops.multiclass_nms(torch.zeros(5, 4, device=dev), torch.zeros(5, 0, device=dev), .1, .5, 9), (torch.zeros(0, dtype=torch.int64),)*2)                          # no classes
    same(ops.nms(torch.zeros(300, 4, device=dev), torch.arange(300., device=dev), 0., -1), torch.arange(299, -1, -1))                     # without area: all stay
    one = torch.tensor([[0., 0, 10, 10]])
    same(ops.nms(one.repeat(300, 1).to(dev), torch.zeros(300, device=dev), .5, -1), torch.tensor([0]))                                 # all alike: the first
    b, s = one.repeat(4, 1) + torch.arange(4.)[:,None]*20, torch.tensor([-INF, 0., INF, -0.])
    same(ops.nms(*to(dev, (b, s)), .5, -1), torch.tensor([2, 1, 3, 0]))
    x = torch.tensor([[0., 0, 10, 10], [0, 0, 3, 10]])                                                                              # float32(0.3) is above 0.3
    same(ops.nms(*to(dev, (x, torch.tensor([.9, .8]))), .3, -1), torch.tensor([0]))
    far = torch.tensor([[-INF, 0, INF, 5], [0., 0, 3, 3], [3, 3, 0, 0]])
    same(ops.nms(*to(dev, (far, torch.tensor([3., 2, 1]))), .5, -1), REF["nms"](far, torch.tensor([3., 2, 1]), .5, -1))


@case
def nms_and_what_is_not_a_number(ops, dev):
    b, s = some_boxes(100, 4)
    bad_b, bad_s = b.clone(), s.clone(); bad_b[70,2], bad_s[3] = NAN, NAN
    for boxes, scores, words in ((bad_b, s, "boxes hold"), (b, bad_s, "scores hold")):
        raises(lambda: ops.nms(*to(dev, (boxes, scores)), .5, -1), words)
        raises(lambda: ops.multiclass_nms(*to(dev, (boxes, scores[:,None])), 1., .5, -1), words)
        index, count = ops.nms_fixed(*to(dev, (boxes, scores)), None, .5, 30)
        assert count < 0 and (index == -1).all()


# ---------------------------------------------------------------------------------------------------------- assignment

@case
def assignment_is_the_references(ops, dev):
    for dtype in FLOATS:
        b, _ = some_boxes(700, 1, dtype)
        for G in (1, 5, 300):
            o = torch.cat((b[torch.randperm(700, generator=gen(G))[:G]], some_boxes(12, 8, dtype)[0], b[:1] + 5000, b[2:3]))       # the last twice, one that nothing touches
            for low, every in ((True, True), (True, False), (False, True)):
                for pos, lo, hi, least in ((.6, -1., .4, .1), (.5, .1, .5, 0.), (.95, -1., .3, 1e-6)):
                    same(ops.max_iou_assign(*to(dev, (b, o)), pos, lo, hi, least, low, every), REF["max_iou_assign"](b, o, pos, lo, hi, least, low, every), G=G, low=low, every=every, pos=pos)


@case
def assignment_of_priors_that_tie(ops, dev):
    y, x = torch.meshgrid(torch.arange(0., 128, 4), torch.arange(0., 160, 4), indexing="ij")
    p = torch.stack((x - 16, y - 16, x + 16, y + 16), -1).reshape(-1, 4)
    o = torch.tensor([[20., 20, 34, 34], [20, 20, 34, 34], [8, 8, 40, 40], [-5, -5, 300, 300], [50, 50, 50, 50], [90, 3, 94, 80]])
    for low, every in ((True, True), (True, False)):
        for least in (0., .01): same(ops.max_iou_assign(*to(dev, (p, o)), .5, -1., .4, least, low, every), REF["max_iou_assign"](p, o, .5, -1., .4, least, low, every), every=every, least=least)


@case
def assignment_at_the_edges(ops, dev):
    b, _ = some_boxes(50, 2)
    none = b[:0]
    for p, o in ((b, none), (none, b), (none, none)): same(ops.max_iou_assign(*to(dev, (p, o)), .5, -1., .4, 0., True, True), REF["max_iou_assign"](p, o, .5, -1., .4, 0., True, True))
    p = torch.cat((b, torch.tensor([[-INF, -INF, INF, INF], [NAN, 0., 5, 5], [0., 0, NAN, 9]])))
    gt_index, label, iou = ops.max_iou_assign(*to(dev, (p, b[:7])), .5, -1., .4, .01, True, True)                            # NaN is not refused, it overlaps nothing
    same((x[:50] for x in (gt_index, label, iou)), REF["max_iou_assign"](b, b[:7], .5, -1., .4, .01, True, True)); assert (iou[50:] == 0).all() and (label[50:] == 0).all()


# ------------------------------------------------------------------------------------------------------------ RoIAlign

def scene(channels=5, rois=12, dtype=torch.float32, seed=0, shapes=((20, 27), (10, 14), (1, 1)), images=2):
    "Maps of three levels; boxes inside, outside, huge, without width."
    g = gen(seed)
    maps = [torch.randn(images, channels, *s, generator=g).to(dtype) for s in shapes]
    c, wh = torch.rand(rois, 2, generator=g)*90 - 5, torch.rand(rois, 2, generator=g)**2*90
    r = torch.cat((torch.randint(0, images, (rois, 1), generator=g).float(), c - wh/2, c + wh/2), 1)
    if rois > 4: r[1,3], r[2,1:], r[3,1:] = r[1,1], torch.tensor([-500., -500, 900, 900]), torch.tensor([300., 300, 350, 340])
    return maps, r.to(wide(dtype)), torch.randint(0, len(shapes), (rois,), generator=g), [.25, .125, .125]


def align(ops, dev, maps, rois, level, *rest, note=""):
    "Forward and backward, beside the reference in float32 at least."
    dtype, work = maps[0].dtype, [m.to(wide(maps[0].dtype)) for m in maps]
    args = (*to(dev, (rois, level)), *rest)
    there = [lying(m, dev) for m in maps]
    got, want = ops.roi_align(there, *args), REF["roi_align"](work, rois, level, *rest)
    assert got.dtype == dtype and got.is_contiguous(); close(got, want, NEAR[dtype], note=note)
    y = torch.randn(want.shape, generator=gen(1)).to(dtype)
    for g, w, m in zip(ops.roi_align_backward(y.to(dev), there, *args), REF["roi_align_backward"](y.to(wide(dtype)), work, rois, level, *rest), maps):
        assert g.dtype == dtype and g.is_contiguous(memory_format=LAST if m.is_contiguous(memory_format=LAST) else PLANES); close(g, w, NEAR[dtype], 4., note=note)


@case
def roi_align_is_torchvisions(ops, dev):
    for dtype in FLOATS:
        for channels, layout in ((5, LAST), (5, PLANES), (33, LAST), (140, LAST), (1, LAST)):
            maps, rois, level, scales = scene(channels, dtype=dtype)
            maps = [m.contiguous(memory_format=layout) for m in maps]
            for ratio, aligned, size in ((0, True, (7, 7)), (2, True, (3, 5)), (0, False, (1, 1)), (3, False, (2, 9))): align(ops, dev, maps, rois, level, *size, scales, ratio, aligned, note=(dtype, channels, layout, ratio))


@case
def roi_align_in_half_precision(ops, dev):
    for dtype in (torch.float16, torch.bfloat16):
        for layout in (LAST, PLANES):
            maps, rois, level, scales = scene(36, dtype=dtype, seed=2)
            align(ops, dev, [m.contiguous(memory_format=layout) for m in maps], rois, level, 4, 3, scales, 0, True, note=(dtype, layout))


@case
def roi_align_of_many_bins_and_any_layout(ops, dev):
    maps, rois, level, scales = scene(6, 5)
    align(ops, dev, [m.contiguous(memory_format=LAST) for m in maps], rois, level, 14, 14, scales, 2, True)                       # seven blocks of bins a RoI
    mixed = [maps[0].contiguous(memory_format=LAST), maps[1], maps[2]]
    align(ops, dev, mixed, rois, level, 3, 3, scales, 0, True)
    got = ops.roi_align([to(dev, m)[:,::2,:,1:] for m in (maps[0].repeat(1, 1, 1, 2),)], *to(dev, (rois, level*0)), 3, 3, scales[:1], 2, True)          # a view with gaps
    close(got, REF["roi_align"]([maps[0].repeat(1, 1, 1, 2)[:,::2,:,1:].contiguous()], rois, level*0, 3, 3, scales[:1], 2, True), 3e-5)


@case
def roi_align_reads_nothing_outside(ops, dev):
    "Boxes, images and levels that are not there give zeros; a box of a billion pixels is quick."
    maps, rois, level, scales = scene(5, 9)
    bad = [(0, 0, -1.), (1, 0, 2.), (2, 3, NAN), (3, 1, INF), (4, 0, NAN), (5, 0, 1e30)]
    for r, k, v in bad: rois[r,k] = v
    level[6], level[7] = -1, 3
    rois[8,1:], level[8] = torch.tensor([-1e9, -1e9, 1e9, 1e9]), 0
    for layout in (LAST, PLANES):
        there = [to(dev, m).contiguous(memory_format=layout) for m in maps]
        args = (there, *to(dev, (rois, level)), 3, 3, scales, 0, True)
        got = ops.roi_align(*args)
        assert (got[:8] == 0).all() and got[8].isfinite().all() and (got[8,:,1,1] != 0).all() and (got[8,:,0,0] == 0).all()
        grads = ops.roi_align_backward(torch.ones_like(got), *args)
        assert all(g.isfinite().all() for g in grads) and (grads[1] == 0).all() and (grads[2] == 0).all()
    empty = ops.roi_align(there, *to(dev, (rois[:0], level[:0])), 7, 7, scales, 0, True)
    assert empty.shape == (0, 5, 7, 7) and all((g == 0).all() for g in ops.roi_align_backward(empty, there, *to(dev, (rois[:0], level[:0])), 7, 7, scales, 0, True))
    assert ops.roi_align([torch.zeros(1, 0, 4, 4, device=dev)], torch.zeros(1, 5, device=dev), torch.zeros(1, dtype=torch.int64, device=dev), 2, 2, [1.], 0, True).shape == (1, 0, 2, 2)
    raises(lambda: ops.roi_align(there, *to(dev, (rois, level)), 2, 2, scales[:2], 0, True), "as many scales"); raises(lambda: ops.roi_align(there, *to(dev, (rois.double(), level)), 2, 2, scales, 0, True), "float32")


# ------------------------------------------------------------------------------------------------------ deformable, maximum

@case
def deformable_pooling_is_the_references(ops, dev):
    for dtype in ALL:
        maps, rois, _, _ = scene(70 if dtype == torch.float32 else 6, dtype=dtype)
        offset = torch.randn(12, 2, 3, 4, generator=gen(5)).to(dtype)
        f, work = maps[0], maps[0].to(wide(dtype))
        for o in (None, offset):
            for ratio in (0, 2):
                rest = (3, 4, .25, ratio, .1)
                wo = None if o is None else o.to(wide(dtype))
                args, wargs = (*to(dev, (f, rois, o)), *rest), (work, rois, wo, *rest)
                got, want = ops.deform_roi_pool(*args), REF["deform_roi_pool"](*wargs)
                assert got.dtype == dtype; close(got, want, NEAR[dtype], dtype=dtype, ratio=ratio)
                y = torch.randn(want.shape, generator=gen(6)).to(dtype)
                got = ops.deform_roi_pool_backward(y.to(dev), *args)
                assert got[0].is_contiguous(memory_format=LAST); close(got, REF["deform_roi_pool_backward"](y.to(wide(dtype)), *wargs), NEAR[dtype], 10., dtype=dtype, ratio=ratio)


@case
def deformable_pooling_at_the_edges(ops, dev):
    maps, rois, _, _ = scene(300, 6)
    f = maps[0].to(dev)
    for r, k, v in ((0, 0, -1.), (1, 0, 2.), (2, 3, NAN), (3, 1, INF)): rois[r,k] = v
    o = torch.zeros(6, 2, 2, 2); o[4,0,0,0], o[4,1,1,1], o[5,0] = NAN, INF, 1e30
    for ratio in (0, 2):
        got = ops.deform_roi_pool(f, *to(dev, (rois, o)), 2, 2, .25, ratio, .1)
        assert got.isfinite().all() and (got[:4] == 0).all() and (got[4,0,0] == 0).all() and (got[5] == 0).all()
        df, do = ops.deform_roi_pool_backward(torch.ones_like(got), f, *to(dev, (rois, o)), 2, 2, .25, ratio, .1)
        assert df.isfinite().all() and do.isfinite().all() and (do[:4] == 0).all()
    huge = torch.tensor([[0., -1e9, -1e9, 1e9, 1e9]], device=dev)
    assert ops.deform_roi_pool(f, huge, None, 3, 3, 1., 0, .1).isfinite().all()
    assert ops.deform_roi_pool(f, huge, torch.full((1, 2, 3, 3), NAN, device=dev), 3, 3, 1., 0, .1).eq(0).all()
    got = ops.deform_roi_pool(f, huge[:0], None, 2, 3, 1., 0, .1); assert got.shape == (0, 2, 3, 300)
    df, do = ops.deform_roi_pool_backward(got, f, huge[:0], None, 2, 3, 1., 0, .1); assert (df == 0).all() and do.shape == (0, 2, 2, 3)


@case
def maximum_pooling_is_the_references(ops, dev):
    for dtype in FLOATS:
        maps, rois, _, _ = scene(70, dtype=dtype)
        f = maps[0]; f[0,:3] = 0.                                                                                             # ties: the first pixel
        same(ops.max_roi_pool(*to(dev, (f, rois)), 3, 4, .25), REF["max_roi_pool"](f, rois, 3, 4, .25))
    rois[0,0], rois[1,2] = 7, NAN
    got, best = ops.max_roi_pool(*to(dev, (f, rois)), 3, 4, .25); assert (got[:2] == 0).all() and (best[:2] == -1).all()


# ---------------------------------------------------------------------------------------------------------- focal loss

@case
def focal_loss_is_the_formula(ops, dev):
    for dtype in ALL:
        for n, k in ((50, 9), (110, 80), (7, 1), (0, 3)):
            x, label = (torch.randn(n, k, generator=gen(n))*4).to(dtype), torch.randint(0, k + 1, (n,), generator=gen(n + 1))
            for w in (None, torch.rand(n, generator=gen(2)).to(dtype), torch.rand(n, k, generator=gen(3)).to(dtype)):
                for gamma in (2., 1.5, 0.):
                    up = lambda t: None if t is None else t.to(wide(dtype))
                    got = ops.focal_loss(*to(dev, (x, label, w)), gamma, .25); assert got.dtype == wide(dtype)
                    close(got, REF["focal_loss"](up(x), label, up(w), gamma, .25), 1e-5 if dtype != torch.float64 else 1e-12, dtype=dtype, n=n)
                    scale = torch.tensor(.7, dtype=wide(dtype))
                    got = ops.focal_loss_backward(*to(dev, (scale, x, label, w)), gamma, .25); assert got.dtype == dtype
                    close(got, REF["focal_loss_backward"](scale, up(x), label, up(w), gamma, .25), NEAR[dtype], dtype=dtype, n=n)


@case
def focal_loss_at_the_edges(ops, dev):
    x, label = torch.tensor([[-1e30, 1e30, 100., -100.], [0., -0., 1e-30, 50.]], device=dev), torch.tensor([0, 9], device=dev)             # 9: no column, as 4
    total, slope = ops.focal_loss(x, label, None, 2., .25), ops.focal_loss_backward(torch.tensor(1., device=dev), x, label, None, 2., .25)
    assert total.isfinite() and slope.isfinite().all(); close(slope[0], torch.tensor([-.25, .75, .75, 0]), 1e-5)
    t = x.t().contiguous().t(); assert torch.equal(ops.focal_loss(t, label, None, 2., .25), total)                                      # another layout
    raises(lambda: ops.focal_loss(x, label[:1], None, 2., .25), "logits must be"); raises(lambda: ops.focal_loss(x, label, x.double(), 2., .25), "weights must be")
