"""Our kernels on a GPU: what tests/kernels.py asks, beside the references; torch's own checks, gradients, autocast, no word to the host,
and the reference path where there is no kernel. Without a GPU, tests/test_emulated.py asks the same of the same files."""
import sys
from contextlib import contextmanager
from pathlib import Path
import pytest, torch, torchvision

ROOT = Path(__file__).resolve().parents[1]
for p in (str(ROOT), str(ROOT/"tests")):
    if p not in sys.path: sys.path.insert(0, p)
import kernels
from notebook_det.ops import focal, library, nms, pool, roi
from notebook_det.ops.assign import max_iou_assign

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
built = pytest.mark.skipif(torch.cuda.is_available() and not library.has_kernel("nms", "CUDA"), reason="the library was built without kernels for GPUs")
OPS, DEV = torch.ops.notebook_det, "cuda"


@contextmanager
def no_word():
    "An error where the host waits for the GPU."
    torch.cuda.synchronize(); torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode("default")


@built
def test_every_operator_has_its_kernel():
    assert {n for n, k in library.operators("CUDA").items() if k == "CUDA"} == set(kernels.NAMES)


@built
@pytest.mark.parametrize("device", [f"cuda:{k}" for k in range(max(1, min(2, torch.cuda.device_count())))])        # the second is not the current one
@pytest.mark.parametrize("case", kernels.CASES, ids=lambda f: f.__name__)
def test_a_kernel_is_its_reference(case, device): case(OPS, device)


@built
def test_nothing_is_read_before_it_was_written():
    torch.use_deterministic_algorithms(True)                                # fills new tensors with NaN
    try:
        for case in kernels.CASES: case(OPS, DEV)
    finally: torch.use_deterministic_algorithms(False)


@built
@pytest.mark.parametrize("n", [2_000, 20_000, 50_000])
def test_nms_of_many(n):
    "Several slabs of words; the same boxes as on the CPU, and the same again."
    g = kernels.gen(n)
    c = torch.rand(n, 2, generator=g)*1000
    b, s, groups = torch.cat((c, c + 5 + torch.rand(n, 2, generator=g)*60), 1), torch.rand(n, generator=g), torch.randint(0, 80, (n,), generator=g)
    there = [x.to(DEV) for x in (b, s, groups)]
    for keep in (-1, 1000):
        kernels.same(OPS.nms(*there[:2], .5, keep), OPS.nms(b, s, .5, keep)); kernels.same(OPS.batched_nms(*there, .5, keep), OPS.batched_nms(b, s, groups, .5, keep))
    kernels.same(nms.nms(*there[:2], .5), torchvision.ops.nms(b, s, .5))


@built
def test_assignment_of_many():
    g = kernels.gen(0)
    c, d = torch.rand(200_000, 2, generator=g)*1300, torch.rand(3000, 2, generator=g)*1300
    p, o = torch.cat((c, c + 8 + torch.rand(200_000, 2, generator=g)*100), 1), torch.cat((d, d + 8 + torch.rand(3000, 2, generator=g)*60), 1)
    torch.cuda.reset_peak_memory_stats()
    p_, o_ = p.to(DEV), o.to(DEV)
    before = torch.cuda.memory_allocated()
    got = max_iou_assign(p_, o_, .5, .4)
    assert torch.cuda.max_memory_allocated() - before < 50e6                # the matrix would take 2.4 GB
    kernels.same(got, max_iou_assign(p, o, .5, .4))


@built
def test_suppression_and_assignment_do_not_wait():
    b, s = (x.to(DEV) for x in kernels.some_boxes(700, 0))
    groups = torch.arange(700, device=DEV) % 3
    with no_word():
        kept = nms.nms_fixed(b, s, .5, 100), nms.nms_fixed(b, s, .5, 100, groups)
        matched = max_iou_assign(b, b[:20], .5, .4), max_iou_assign(b, b[:20], .5, .4, assign_all=False)
        with pytest.raises(RuntimeError): nms.nms(b, s, .5)                 # this one has to: its answer has a length. So the switch works
    assert kept[0][1] > 0 and kept[1][1] >= kept[0][1] and matched[0][1].sum() > 0


@built
def test_a_trace_shows_no_wait():
    "torch's switch knows of torch's own waits; the profiler sees every call of the CUDA runtime."
    b, s = (x.to(DEV) for x in kernels.some_boxes(3000, 0))
    groups = torch.arange(3000, device=DEV) % 3
    assert kernels.trace(lambda: nms.nms(b, s, .5))[0]                       # this one has to: the trace works
    for f in (lambda: nms.nms_fixed(b, s, .5, 100), lambda: nms.nms_fixed(b, s, .5, -1, groups), lambda: max_iou_assign(b, b[:20], .5, .4), lambda: max_iou_assign(b, b[:20], .5, .4, assign_all=False)):
        waits, launches = kernels.trace(f)
        assert not waits and launches > 1


@built
def test_tensors_of_two_devices_are_refused():
    "A kernel that was given an address of the host would end the process."
    b, s = kernels.some_boxes(20, 0)
    maps, rois, level, scales = kernels.scene(4)
    x, labels, one, offset = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), torch.ones(()), torch.zeros(12, 2, 3, 3)
    for op, tensors, rest in ((OPS.nms, (b, s), (.5, -1)), (OPS.nms_fixed, (b, s, labels.repeat(4)), (.5, 9)), (OPS.multiclass_nms, (b, s[:,None]), (.1, .5, 9)), (OPS.max_iou_assign, (b, b[:3]), (.5, -1., .4, 0., True, True)),
                              (OPS.roi_align, (maps, rois, level), (3, 3, scales, 0, True)), (OPS.max_roi_pool, (maps[0], rois), (3, 3, .25)), (OPS.deform_roi_pool, (maps[0], rois, offset), (3, 3, .25, 2, .1)),
                              (OPS.focal_loss, (x, labels, x), (2., .25)), (OPS.focal_loss_backward, (one, x, labels, None), (2., .25))):
        for k in range(len(tensors)):
            if tensors[k] is not None: kernels.raises(lambda: op(*[kernels.to(DEV, t) if i == k else t for i, t in enumerate(tensors)], *rest), "one device")
    torch.cuda.synchronize()


@built
def test_pooling_and_loss_do_not_wait():
    maps, rois, level, scales = kernels.scene(16)
    maps, rois, level = [m.to(DEV).requires_grad_() for m in maps], rois.to(DEV), level.to(DEV)
    offset = torch.zeros(12, 2, 7, 7, device=DEV, requires_grad=True)
    x, labels = torch.randn(500, 9, device=DEV, requires_grad=True), torch.randint(0, 10, (500,), device=DEV)
    with no_word(): (roi.pyramid_roi_align(maps, rois, level, 7, scales).sum() + pool.deform_roi_pool(maps[0], rois, offset, 7, .25).sum() + focal.sigmoid_focal_sum(x, labels)).backward()
    assert maps[0].grad.abs().sum() > 0 and offset.grad.isfinite().all() and x.grad.abs().sum() > 0


@built
def test_a_graph_replays():
    "Fixed shapes and no waiting: the kernels can be recorded once and replayed on other numbers."
    b, s = (x.to(DEV) for x in kernels.some_boxes(300, 0))
    b2, s2 = (x.to(DEV) for x in kernels.some_boxes(300, 1))
    stream = torch.cuda.Stream(); stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream): nms.nms_fixed(b, s, .5, 50); max_iou_assign(b, b[:5], .5, .4)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = nms.nms_fixed(b, s, .5, 50), max_iou_assign(b, b[:5], .5, .4)
    b.copy_(b2); s.copy_(s2); graph.replay(); torch.cuda.synchronize()
    for got, want in zip(out, (nms.nms_fixed(b2, s2, .5, 50), max_iou_assign(b2, b2[:5], .5, .4))): kernels.same(got, [w.cpu() for w in want])


@built
def test_torchs_checks():
    d = lambda *t: kernels.to(DEV, t)
    b, s = d(*kernels.some_boxes(30, 1))
    maps, rois, level, scales = kernels.scene(3, 4, shapes=((6, 7), (4, 5)))
    rois, level = d(rois, level.clamp(max=1)); scales = scales[:2]
    offset, x, labels = torch.randn(4, 2, 2, 2, device=DEV, requires_grad=True), torch.randn(5, 3, device=DEV, requires_grad=True), torch.arange(5, device=DEV) % 4
    for layout in (kernels.LAST, kernels.PLANES):
        m = [t.to(DEV).contiguous(memory_format=layout).requires_grad_() for t in maps]
        still = [t.detach() for t in m]
        for op, args in ((OPS.nms, (b, s, .5, -1)), (OPS.nms_fixed, (b, s, None, .5, 7)), (OPS.multiclass_nms, (b, torch.rand(30, 4, device=DEV), .3, .5, 9)), (OPS.max_iou_assign, (b, b[:3], .5, -1., .4, 0., True, True)),
                         (OPS.roi_align, (m, rois, level, 3, 2, scales, 0, True)), (OPS.roi_align_backward, (torch.randn(4, 3, 3, 2, device=DEV), still, rois, level, 3, 2, scales, 0, True)),
                         (OPS.roi_align, ([t.half() for t in still], rois, level, 3, 2, scales, 0, True)), (OPS.deform_roi_pool, (m[0], rois, offset, 2, 2, .25, 2, .1)), (OPS.max_roi_pool, (m[0], rois, 2, 2, .25)),
                         (OPS.focal_loss, (x, labels, None, 2., .25)), (OPS.focal_loss, (x.detach().bfloat16(), labels, None, 2., .25))):
            torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@built
def test_gradients():
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(DEV).requires_grad_()
    g, check = kernels.gen(0), lambda f, x: torch.autograd.gradcheck(f, x, nondet_tol=1e-9)
    rois, level = torch.tensor([[0., 4, 4, 17, 13], [0, 1, 2, 30, 23], [0, -6, 3, 9, 40]], device=DEV), torch.tensor([0, 1, 0], device=DEV)
    for layout in (kernels.LAST, kernels.PLANES):
        assert check(lambda a, b: roi.pyramid_roi_align([a.contiguous(memory_format=layout), b.contiguous(memory_format=layout)], rois, level, 2, (.25, .125)), (r(1, 2, 6, 7), r(1, 2, 4, 5)))
    box = torch.tensor([[0., 1.3, 1.1, 4.2, 3.9]], device=DEV)
    assert check(lambda f, o, m: pool.deform_roi_pool(f, box, o, 2, 1., 2, mask=m), (r(1, 2, 5, 6), r(1, 2, 2, 2), r(1, 2, 2))) and check(lambda f: pool.max_roi_pool(f, box, 2), (r(1, 2, 5, 6),))
    labels, w = torch.tensor([0, 3, 4, 4, 1, 4], device=DEV), torch.rand(6, dtype=torch.float64, device=DEV)
    for gamma in (2., 1.5): assert check(lambda x: focal.sigmoid_focal_sum(x, labels, w, gamma), (r(6, 4),))


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    "Half precision goes in and comes out, and is summed in float32."
    maps, rois, level, scales = kernels.scene(32, seed=3)
    rois, level = rois.to(DEV), level.to(DEV)
    x, labels = (torch.randn(300, 9, generator=kernels.gen(1))*3).to(DEV), torch.randint(0, 10, (300,), generator=kernels.gen(2)).to(DEV)
    weight = torch.eye(32, device=DEV)[:,:,None,None]
    def step(half):
        m = [t.to(DEV).requires_grad_() for t in maps]
        with torch.autocast("cuda", dtype, enabled=half):
            f = [torch.nn.functional.conv2d(t, weight) for t in m]
            pooled, moved = roi.pyramid_roi_align(f, rois, level, 7, scales), pool.deform_roi_pool(f[0], rois, None, 7, .25)
            loss = focal.sigmoid_focal_sum(x.to(f[0].dtype), labels)
        assert pooled.dtype == moved.dtype == (dtype if half else torch.float32) and loss.dtype == torch.float32
        (pooled.float().square().sum() + moved.float().sum() + loss).backward()
        return [pooled, moved, loss[None], *[t.grad for t in m]]
    for got, want in zip(step(True), step(False)): assert ((got.float() - want).norm() / want.norm()) < kernels.NEAR[dtype]*2


@built
def test_determinism_is_asked_for():
    maps, rois, level, scales = kernels.scene(4)
    m = [t.to(DEV).requires_grad_() for t in maps]
    out = roi.pyramid_roi_align(m, rois.to(DEV), level.to(DEV), 3, scales)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="roi_align: on a GPU"): out.sum().backward()
    finally: torch.use_deterministic_algorithms(False)
    x, labels = torch.randn(20_000, 80, device=DEV), torch.randint(0, 81, (20_000,), device=DEV)
    assert len({focal.sigmoid_focal_sum(x, labels).item() for _ in range(5)}) == 1


@built
def test_compiled():
    maps, rois, level, scales = kernels.scene(4)
    m, rois, level = [t.to(DEV).requires_grad_() for t in maps], rois.to(DEV), level.to(DEV)
    f = torch.compile(lambda m, r, l: roi.pyramid_roi_align(m, r, l, 3, scales).square().sum(), fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(f(m, rois, level), m), torch.autograd.grad(roi.pyramid_roi_align(m, rois, level, 3, scales).square().sum(), m)): kernels.close(got, want.cpu(), 1e-5)
    b, s = (x.to(DEV) for x in kernels.some_boxes(50, 1))
    fixed = torch.compile(lambda b, s: nms.nms_fixed(b, s, .5, 20), fullgraph=True, backend="aot_eager")
    kernels.same(fixed(b, s), [x.cpu() for x in nms.nms_fixed(b, s, .5, 20)])


@pytest.mark.parametrize("name", ["nms", "batched_nms", "multiclass_nms", "max_iou_assign", "roi_align", "focal_loss"])
def test_references_run_on_a_gpu(name):
    "What is taken where the library has no kernels for GPUs."
    b, s = kernels.some_boxes(300, 2)
    maps, rois, level, scales = kernels.scene()
    x, labels = torch.randn(50, 9, generator=kernels.gen(0)), torch.randint(0, 10, (50,), generator=kernels.gen(1))
    args = {"nms": (b, s, .5, -1), "batched_nms": (b, s, torch.arange(300) % 4, .5, -1), "multiclass_nms": (b, torch.rand(300, 3, generator=kernels.gen(2)), .3, .5, 50), "max_iou_assign": (b, b[:9], .5, -1., .4, 0., True, True),
            "roi_align": (maps, rois, level, 7, 7, scales, 0, True), "focal_loss": (x, labels, None, 2., .25)}[name]
    kernels.close(kernels.REF[name](*kernels.to(DEV, args)), kernels.REF[name](*args), 1e-4)
