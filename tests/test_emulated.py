"""The kernels for GPUs without a GPU: csrc/gpu_*.cu compiled by the C++ compiler with csrc/emulate.h in CUDA's place, and asked what
tests/kernels.py asks. The same files that nvcc compiles, launches included; threads and blocks run one at a time, in three orders.

NDET_EMULATED_FLAGS adds compiler flags (tools/sanitize.py does: index errors then end the process)."""
import ctypes, fcntl, hashlib, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[1]
for p in (str(ROOT), str(ROOT/"tests")):
    if p not in sys.path: sys.path.insert(0, p)
import kernels
from notebook_det.ops import assign, focal, library, nms, pool, roi

CXX = shutil.which((os.environ.get("CXX") or "c++").split()[0])
pytestmark = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="no C++ compiler")
CU = sorted((ROOT/"csrc").glob("gpu_*.cu"))
HOME = "notebook_det_emulated"

BROKEN = """
namespace ndet { namespace gpu { namespace broken {
__global__ void next(const float* x, float* y, bool wait) {               // y[t] = x of the neighbour, by way of shared memory
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  s[t] = x[t];
  if (wait) __syncthreads();
  y[t] = s[(t + 1) % 64];
}
__global__ void some(float* y) { if (threadIdx.x < 3) __syncthreads(); y[threadIdx.x] = 1; }
Tensor run(const Tensor& x, int64_t which) {
  const On on(x);
  Tensor y = ts::empty_like(x);
  if (which < 2) launch(on, next, 1, 64, data<float>(x), out<float>(y), which == 1);
  else launch(on, some, 1, 64, out<float>(y));
  return y;
}
} } }
STABLE_TORCH_LIBRARY_IMPL(HOME, DEVICE, m) { m.impl("broken", TORCH_BOX(&ndet::gpu::broken::run)); }
"""


def compile_into(folder):
    "One file of all kernels; compiled once, however many processes run these tests."
    flags = ["-std=c++20", "-O1", *[f for f in (ROOT/"csrc/flags.txt").read_text().split() if f != "-O3"], "-fPIC", "-shared", "-w", "-DNDET_WORDS=2048", *os.environ.get("NDET_EMULATED_FLAGS", "").split()]
    flags += [f for p in include_paths() for f in ("-isystem", p)] + ["-I", str(ROOT/"csrc")]
    libs = [f"-L{p}" for p in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    text = "".join(f'#include "{p.name}"\n' for p in CU) + BROKEN
    key = hashlib.sha1((text + " ".join(flags) + library.sources_hash(ROOT/"csrc") + torch.__version__).encode()).hexdigest()[:12]
    so = folder/f"emulated-{key}.so"
    with open(folder/"emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not so.exists():
            (folder/"emulated.cpp").write_text(text)
            made = subprocess.run([CXX, *flags, str(folder/"emulated.cpp"), *libs, "-o", str(so) + ".part"], capture_output=True, text=True)
            assert made.returncode == 0, made.stderr[-4000:]
            os.replace(str(so) + ".part", so)
    return so


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    "The namespace of the emulated operators, and the library to set the order of threads."
    base = tmp_path_factory.getbasetemp()
    so = compile_into(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
    for full, reference in list(library.REFERENCES.items()):
        space, _, name = full.partition("::")
        if space != "notebook_det" or name not in kernels.NAMES: continue
        schema = str(getattr(torch.ops.notebook_det, name).default._schema).partition("::")[2]
        library.define(schema, reference, library.FAKES[full], *library.GRADIENTS[full], namespace=HOME)
    library.define("broken(Tensor x, int which) -> Tensor", None, None, namespace=HOME)
    torch.ops.load_library(str(so))
    return getattr(torch.ops, HOME), ctypes.CDLL(str(so))


@pytest.fixture
def ops(emulated): emulated[1].emulate_order(0); return emulated[0]


@pytest.fixture
def instead(ops, monkeypatch):
    "The package's functions call the emulated operators."
    for module, names in ((nms, ("nms", "batched_nms", "multiclass_nms", "nms_fixed")), (assign, ("max_iou_assign",))):
        for n in names: monkeypatch.setattr(module, n + "_op", getattr(ops, n).default)
    for module, name, op in ((roi, "align_op", "roi_align"), (roi, "align_backward_op", "roi_align_backward"), (pool, "max_op", "max_roi_pool"), (pool, "deform_op", "deform_roi_pool"),
                             (pool, "deform_backward_op", "deform_roi_pool_backward"), (focal, "focal_op", "focal_loss"), (focal, "focal_backward_op", "focal_loss_backward")):
        monkeypatch.setattr(module, name, getattr(ops, op).default)


def test_every_kernel_is_on_trial(ops):
    "What the files register is what tests/kernels.py asks, and the emulation has it."
    assert sorted(re.findall(r'm\.impl\("(\w+)"', "".join(p.read_text() for p in CU))) == sorted(kernels.NAMES)
    for name in kernels.NAMES: assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{HOME}::{name}", "CPU")


@pytest.mark.parametrize("order", [0, 1, 2], ids=["ascending", "descending", "shuffled"])
@pytest.mark.parametrize("case", kernels.CASES, ids=lambda f: f.__name__)
def test_a_kernel_is_its_reference(case, order, emulated):
    ops, lib = emulated
    lib.emulate_order(order)
    before = lib.emulate_launches()
    case(ops, "cpu")
    assert lib.emulate_launches() > before


@pytest.mark.parametrize("case", kernels.CASES, ids=lambda f: f.__name__)
def test_nothing_is_read_before_it_was_written(case, ops):
    "torch fills new tensors with NaN and the largest whole numbers."
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        case(ops, "cpu")
    finally: torch.use_deterministic_algorithms(False)


def test_the_emulation_can_fail(emulated):
    "A missing barrier gives an answer that hangs on the order of threads; a barrier that some threads miss is refused."
    ops, lib = emulated
    x = torch.arange(64.)
    def answers(which): return [(lib.emulate_order(o), ops.broken(x, which))[1] for o in (0, 1, 2)]
    assert all(torch.equal(a, x.roll(-1)) for a in answers(1)) and not all(torch.equal(a, x.roll(-1)) for a in answers(0))
    with pytest.raises(RuntimeError, match="wait at a barrier"): ops.broken(x, 2)
    assert all(torch.equal(a, x.roll(-1)) for a in answers(1))                                # and works again afterwards


def test_sums_without_atomics_have_one_order(emulated):
    "The loss and the gradient of an offset have the same bits in every order of threads."
    ops, lib = emulated
    x, label = torch.randn(300, 37, generator=kernels.gen(0)), torch.randint(0, 38, (300,), generator=kernels.gen(1))
    maps, rois, _, _ = kernels.scene(100)
    offset, y = torch.randn(12, 2, 2, 2, generator=kernels.gen(2)), torch.randn(12, 2, 2, 100, generator=kernels.gen(3))
    def ask(order):
        lib.emulate_order(order)
        return ops.focal_loss(x, label, None, 2., .25), ops.deform_roi_pool_backward(y, maps[0], rois, offset, 2, 2, .25, 2, .1)[1]
    first = ask(0)
    for order in (1, 2): assert all(torch.equal(a, b) for a, b in zip(first, ask(order)))


def test_gradients(instead):
    "gradcheck through the package's functions, with the emulated kernels under them."
    g = kernels.gen(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
    rois, level = torch.tensor([[0., 4, 4, 17, 13], [0, 1, 2, 30, 23], [0, -6, 3, 9, 40]]), torch.tensor([0, 1, 0])
    for layout in (kernels.LAST, kernels.PLANES):
        assert torch.autograd.gradcheck(lambda a, b: roi.pyramid_roi_align([a.contiguous(memory_format=layout), b.contiguous(memory_format=layout)], rois, level, 2, (.25, .125)), (r(1, 2, 6, 7), r(1, 2, 4, 5)))
    box = torch.tensor([[0., 1.3, 1.1, 4.2, 3.9]])
    assert torch.autograd.gradcheck(lambda f, o, m: pool.deform_roi_pool(f, box, o, 2, 1., 2, mask=m), (r(1, 2, 5, 6), r(1, 2, 2, 2), r(1, 2, 2)))
    assert torch.autograd.gradcheck(lambda f: pool.max_roi_pool(f, box, 2), (r(1, 2, 5, 6),))
    labels, w = torch.tensor([0, 3, 4, 4, 1, 4]), torch.rand(6, generator=g, dtype=torch.float64)
    for gamma in (2., 1.5): assert torch.autograd.gradcheck(lambda x: focal.sigmoid_focal_sum(x, labels, w, gamma), (r(6, 4),))


def test_torchs_checks(ops):
    b, s = kernels.some_boxes(30, 1)
    maps, rois, level, scales = kernels.scene(3, 4, shapes=((6, 7), (4, 5)))
    level, scales, leaves = level.clamp(max=1), scales[:2], [m.clone().requires_grad_() for m in maps]
    f, o = maps[0].clone().requires_grad_(), torch.randn(4, 2, 2, 2, generator=kernels.gen(0)).requires_grad_()
    for op, args in ((ops.nms, (b, s, .5, -1)), (ops.nms_fixed, (b, s, None, .5, 7)), (ops.max_iou_assign, (b, b[:3], .5, -1., .4, 0., True, True)), (ops.roi_align, (leaves, rois, level, 3, 2, scales, 0, True)),
                     (ops.roi_align_backward, (torch.randn(4, 3, 3, 2), maps, rois, level, 3, 2, scales, 0, True)), (ops.deform_roi_pool, (f, rois, o, 2, 2, .25, 2, .1)),
                     (ops.max_roi_pool, (f, rois, 2, 2, .25)), (ops.focal_loss, (torch.randn(5, 3, requires_grad=True), torch.arange(5) % 4, None, 2., .25))):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_cuda_is_where_its_headers_are(tmp_path, monkeypatch):
    "A link in a folder of programs is not CUDA's home; setup.py looks in the same way."
    scope = {"os": os, "shutil": shutil, "Path": Path}
    text = (ROOT/"setup.py").read_text()
    exec(text[text.index("def cuda_home"):text.index("def operators")], scope)
    real, programs = tmp_path/"cuda-1", tmp_path/"programs"
    for d in (real/"bin", real/"include", programs): d.mkdir(parents=True)
    (real/"bin"/"nvcc").write_text("#!/bin/sh\n"); (real/"bin"/"nvcc").chmod(0o755); (real/"include"/"cuda_runtime.h").touch(); (programs/"nvcc").symlink_to(real/"bin"/"nvcc")
    for name in ("CUDA_HOME", "CUDA_PATH"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(programs))
    assert library.cuda_home() == real and scope["cuda_home"]() == str(real)
    monkeypatch.setenv("CUDA_HOME", str(programs))                          # wrong: no headers there
    assert library.cuda_home() == real and scope["cuda_home"]() == str(real)
    (real/"include"/"cuda_runtime.h").unlink()
    assert library.cuda_home() != real
    monkeypatch.setattr(library, "cuda_home", lambda: None); assert not library.for_gpu()
