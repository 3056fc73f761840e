"""Everything there is to do on a machine with a GPU, from a bare checkout: python benchmarks/gpu.py [--quick] [--no-build] [--out FILE]

Builds csrc/ with its kernels for GPUs, runs tests/test_cuda.py, and times the operators beside torchvision's CUDA operators. Needs
torch, torchvision, pytest and a CUDA compiler. One JSON file comes out, in $OUT or benchmarks/results/, written anew after every step;
without a GPU it says so and ends. Times are those of CUDA events, ours and the peer's calls in turns, medians in milliseconds; a ratio
is peer / ours. What is wrong is listed at the end (and under "wrong" in the file), and the exit status is 1: a build or test that
failed, a test that was skipped, an operator without its kernel, an unequal result, a row slower than torchvision, a wait."""
import argparse, json, os, platform, re, signal, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for p in (ROOT, ROOT/"tests", ROOT/"benchmarks"): sys.path.insert(0, str(p))
SEED = 0


def run(seconds, *args, **env):
    "A Python program in the root of the checkout: its exit status, and what it said; 124 where it took too long."
    env = os.environ | dict(PATH=os.environ["PATH"] + os.pathsep + str(Path(sys.executable).parent)) | env          # ninja, where the environment is not activated
    p = subprocess.Popen([sys.executable, *args], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: said, _ = p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); return 124, p.communicate()[0] + f"\nno end after {seconds} s"
    return p.returncode, said


def build():
    "The library of this checkout, in place; seconds and the end of what the compilers said."
    start = time.time()
    status, said = run(400, "setup.py", "build_ext", "--inplace", NOTEBOOK_DET_CUDA="1", NOTEBOOK_DET_OPS="1")
    print(f"built in {time.time() - start:.0f} s" if status == 0 else said[-4000:], flush=True)
    return dict(ok=status == 0, seconds=round(time.time() - start), said="" if status == 0 else said[-4000:])


def tests():
    "Counts of tests/test_cuda.py, and the end of its report. A skipped test is no success: all that are asked can run here."
    start = time.time()
    status, said = run(300, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT), str(ROOT/"tests"/"test_cuda.py"))
    last = [line for line in said.splitlines() if re.search(r" in [\d.]+s\b", line)][-1:]
    count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", "".join(last))}
    ok = status == 0 and count.get("passed", 0) > 0 and not count.get("skipped")
    print("tests:", count, "" if ok else said[-4000:], flush=True)
    return dict(ok=ok, seconds=round(time.time() - start), **count, said="" if ok else said[-12000:])


def cases(quick):
    "Operator, what is asked, ours, the peer, are they equal?, the peer's name."
    import torch, torchvision
    from ops import boxes_like_a_detector, off, retina_anchors
    from torchvision.models.detection._utils import Matcher
    from notebook_det.ops.assign import max_iou_assign
    from notebook_det.ops.focal import sigmoid_focal_sum
    from notebook_det.ops.library import REFERENCES
    from notebook_det.ops.nms import batched_nms, multiclass_nms, nms, nms_fixed
    from notebook_det.ops.pool import deform_roi_pool, max_roi_pool
    from notebook_det.ops.roi import pyramid_roi_align
    g, tv, dev = torch.Generator().manual_seed(SEED), torchvision.ops, "cuda"
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b)) if isinstance(a, tuple) else torch.equal(a, b)
    within = lambda eps: lambda a, b: off(a, b) <= eps
    rand = lambda *s: torch.randn(*s, generator=g).to(dev)
    for n in (2000, 10000) if quick else (1000, 2000, 10000, 50000):
        b, s, groups = boxes_like_a_detector(n, g).to(dev), (torch.randperm(n, generator=g)/n).to(dev), torch.randint(0, 80, (n,), generator=g).to(dev)
        on_cpu = REFERENCES["notebook_det::nms"](b.cpu(), s.cpu(), .5, -1)                   # torchvision's on a CPU: on a GPU it rounds a product and a sum at once, and shifts groups
        yield f"nms {n}", lambda: nms(b, s, .5), lambda: tv.nms(b, s, .5), lambda x, _: torch.equal(x.cpu(), on_cpu), "torchvision"
        yield (f"nms {n}, the best 1000, no sync", lambda: nms_fixed(b, s, .5, 1000)[0], lambda: tv.nms(b, s, .5)[:1000],
               lambda x, _: torch.equal(x[x >= 0].cpu(), on_cpu[:1000]), "torchvision")
        yield (f"batched_nms {n}, 80 groups", lambda: batched_nms(b, s, groups, .5), lambda: tv.batched_nms(b, s, groups, .5),
               lambda x, _: torch.equal(x.cpu(), REFERENCES["notebook_det::batched_nms"](b.cpu(), s.cpu(), groups.cpu(), .5, -1)), "torchvision")
    b, p = boxes_like_a_detector(1000, g).to(dev), ((torch.randperm(80000, generator=g) + 1).div(80001).reshape(1000, 80)**4).to(dev)
    def detector_tail(t):
        row, label = (p > t).nonzero().unbind(1)
        keep = tv.batched_nms(b[row], p[row, label], label, .5)[:100]
        return b[row[keep]], p[row[keep], label[keep]], label[keep], row[keep]
    for t in (.5, .05, .001): yield f"multiclass_nms 1000 × 80 above {t}, 100", lambda: multiclass_nms(b, p, t, .5, 100), lambda: detector_tail(t), lambda x, _: same((x[3].cpu(), x[2].cpu()), REFERENCES["notebook_det::multiclass_nms"](b.cpu(), p.cpu(), t, .5, 100)), "torchvision"
    anchors = retina_anchors().to(dev)
    for G in (7, 50, 300):
        o, matcher = boxes_like_a_detector(G, g).to(dev), Matcher(.5, .4, allow_low_quality_matches=True)
        reference = lambda: REFERENCES["notebook_det::max_iou_assign"](anchors, o, .5, -1., .4, 0., True, True)
        yield f"max_iou_assign 201600 × {G}", lambda: max_iou_assign(anchors, o, .5, .4), lambda: matcher(tv.box_iou(o, anchors)), lambda a, _: same(a, reference()), "torchvision box_iou + Matcher"
    R, C = (200, 64) if quick else (1000, 256)
    maps = [rand(1, C, 800//s, 1344//s) for s in (4, 8, 16, 32)]; scales = [1/4, 1/8, 1/16, 1/32]
    r = boxes_like_a_detector(R, g, size=(800, 1344)); r[:,0::2].clamp_(0, 1344); r[:,1::2].clamp_(0, 800)
    level = ((r[:,2] - r[:,0])*(r[:,3] - r[:,1])).clamp(min=0).sqrt().div(56).add(1e-6).log2().floor().clamp(0, 3).long().to(dev)
    rois = torch.cat((torch.zeros(R, 1), r), 1).to(dev)
    def loop(maps, rois, bins):
        out = maps[0].new_zeros(len(rois), C, bins, bins)
        for k, (m, s) in enumerate(zip(maps, scales)):
            mine = (level == k).nonzero().flatten(); out[mine] = tv.roi_align(m, rois[mine].to(m.dtype), bins, s, 0, True)
        return out
    near = lambda a, b, eps: ((a.float() - b.float()).norm() <= eps*b.float().norm()).item()
    for dtype, eps in ((torch.float32, 1e-4), (torch.float16, 2e-3)):                       # both beside torchvision in float32: in half precision it rounds the boxes, and in float32 places to 3e-5 of a pixel
        for layout, name in ((torch.channels_last, "channels last"), (torch.contiguous_format, "planes")):
            for bins in (7, 14):
                here, plain = [m.detach().to(dtype).contiguous(memory_format=layout) for m in maps], [m.to(dtype) for m in maps]
                what = f"{R} × {C} × {bins} × {bins}, {str(dtype)[6:]}, {name}"
                yield f"roi_align {what}", lambda: pyramid_roi_align(here, rois, level, bins, scales), lambda: loop(plain, rois, bins), lambda a, _: near(a, loop([m.float() for m in plain], rois, bins), eps), "torchvision, level by level"
                leaves, theirs = [m.requires_grad_() for m in here], [m.clone().requires_grad_() for m in plain]
                ours, peer, y = pyramid_roi_align(leaves, rois, level, bins, scales), loop(theirs, rois, bins), rand(R, C, bins, bins).to(dtype)
                exact = [m.detach().float().requires_grad_() for m in plain]
                slopes = torch.autograd.grad(loop(exact, rois, bins), exact, y.float())
                yield (f"roi_align backward {what}", lambda: torch.autograd.grad(ours, leaves, y, retain_graph=True), lambda: torch.autograd.grad(peer, theirs, y, retain_graph=True),
                       lambda a, _: all(near(x, z, eps) for x, z in zip(a, slopes)), "torchvision, level by level")
    f, few = maps[2].detach().contiguous(memory_format=torch.channels_last), rois[:50]
    offset = torch.randn(50, 2, 7, 7, generator=g).to(dev)
    ref = lambda name, *a: REFERENCES[f"notebook_det::{name}"](*a)
    yield f"deform_roi_pool 50 × {C} × 7 × 7", lambda: deform_roi_pool(f, few, offset, 7, 1/16), lambda: ref("deform_roi_pool", f, few, offset, 7, 7, 1/16, 0, .1), lambda a, b: off(a, b.permute(0, 3, 1, 2)) < 1e-3, "our reference in torch"
    yield f"deform_roi_pool {R} × {C} × 7 × 7, no offsets", lambda: deform_roi_pool(f, rois, None, 7, 1/16), lambda: tv.roi_align(f, rois, 7, 1/16, 0, True), within(1e-3), "torchvision roi_align"
    yield f"max_roi_pool {R} × {C} × 7 × 7", lambda: max_roi_pool(f, rois, 7, 1/16), lambda: tv.roi_pool(f, rois, 7, 1/16), lambda a, b: a.shape == b.shape and torch.equal(a[:20], ref("max_roi_pool", f, rois[:20], 7, 7, 1/16)[0].permute(0, 3, 1, 2)), "torchvision roi_pool (another rule)"
    n = 20_000 if quick else 201_600
    labels = torch.where(torch.rand(n, generator=g) < .01, torch.randint(0, 80, (n,), generator=g), 80).to(dev)
    hot = torch.nn.functional.one_hot(labels, 81)[:,:80].float()
    for dtype in (torch.float32, torch.float16):
        x = (rand(n, 80) - 3).to(dtype).requires_grad_()
        eager = lambda: tv.sigmoid_focal_loss(x, hot.to(dtype), reduction="sum" if dtype == torch.float32 else "none")
        run = lambda f: lambda: torch.autograd.grad(f().float().sum(), x)
        exact, = torch.autograd.grad(tv.sigmoid_focal_loss(z := x.detach().float().requires_grad_(), hot, reduction="sum"), z)
        equal = lambda a, _: off(a[0].float(), exact) <= (1e-5 if dtype == torch.float32 else 2e-3)
        yield f"focal_loss {n} × 80, {str(dtype)[6:]}, both ways", run(lambda: sigmoid_focal_sum(x, labels)), run(eager), equal, "torchvision, one-hot"
        if not quick:
            compiled = torch.compile(lambda x, hot: tv.sigmoid_focal_loss(x, hot, reduction="none").float().sum())
            try: compiled(x, hot)
            except Exception as e: print("torch.compile:", type(e).__name__); continue
            yield f"focal_loss {n} × 80, {str(dtype)[6:]}, both ways", run(lambda: sigmoid_focal_sum(x, labels)), run(lambda: compiled(x, hot)), equal, "torchvision under torch.compile"


def measure(ours, peer, seconds):
    "In turns; medians of GPU time and of the host's time until the answer is there."
    import torch
    def once(f):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(); start = time.perf_counter(); a.record(); f(); b.record(); torch.cuda.synchronize()
        return a.elapsed_time(b), (time.perf_counter() - start)*1e3
    for _ in range(3): once(ours), once(peer)
    rows, end = [], time.time() + seconds
    while len(rows) < 5 or time.time() < end and len(rows) < 200: rows.append((*once(ours), *once(peer)))
    return dict(zip(("ours_ms", "ours_wall_ms", "peer_ms", "peer_wall_ms"), (statistics.median(c) for c in zip(*rows))), calls=len(rows))


def table(quick, seconds):
    "Rows, one after the other; the last one names what broke, if the cases themselves did."
    all_cases = cases(quick)
    while True:
        try: op, ours, peer, equal, name = next(all_cases)
        except StopIteration: return
        except Exception as e: yield dict(op="the cases after this", peer="", equal=False, error=f"{type(e).__name__}: {e}"[:300]); return
        try: row = dict(op=op, peer=name, equal=bool(equal(ours(), peer())), **measure(ours, peer, seconds))
        except Exception as e: row = dict(op=op, peer=name, equal=False, error=f"{type(e).__name__}: {e}"[:300])
        else: row |= dict(ratio=row["peer_ms"]/row["ours_ms"])
        took = f"ours {row['ours_ms']:8.3f} ms  {name}: {row['peer_ms']:8.3f} ms  ratio {row['ratio']:6.2f}" if "ratio" in row else row["error"]
        print(f"{op:58} {took}  {'equal' if row['equal'] else 'NOT EQUAL'}", flush=True)
        yield {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def waits():
    "What waits for the GPU in a profiler's trace: in `nms`, which has to, and in the operators that promise not to."
    import torch
    from kernels import trace
    from ops import boxes_like_a_detector, retina_anchors
    from notebook_det.ops.assign import max_iou_assign
    from notebook_det.ops.nms import nms, nms_fixed
    g = torch.Generator().manual_seed(SEED)
    b, s, o, anchors = boxes_like_a_detector(10000, g).cuda(), torch.rand(10000, generator=g).cuda(), boxes_like_a_detector(50, g).cuda(), retina_anchors().cuda()
    calls = {"nms": lambda: nms(b, s, .5), "nms_fixed": lambda: nms_fixed(b, s, .5, 1000), "max_iou_assign": lambda: max_iou_assign(anchors, o, .5, .4)}
    return {name: dict(zip(("waits", "launches"), trace(f))) for name, f in calls.items()}


def wrong(out):
    "A sentence for everything that is not as it should be."
    from kernels import NAMES
    if not out["tests"]["ok"]: yield f"tests/test_cuda.py: {({k: v for k, v in out['tests'].items() if k != 'said'})}"
    missing = [n for n in NAMES if out["operators"].get(n) != "CUDA"]
    if missing: yield f"no kernel for a GPU: {', '.join(missing)}"
    if isinstance(out["host"], str): yield f"no trace: {out['host']}"
    elif not out["host"]["nms"]["waits"]: yield "the trace does not show the wait of nms, so it shows nothing"
    else: yield from (f"{n} waits: {', '.join(out['host'][n]['waits'])}" for n in ("nms_fixed", "max_iou_assign") if out["host"][n]["waits"])
    for r in out["rows"]:
        if not r["equal"]: yield f"{r['op']}: not equal {r.get('error', '')}"
        elif r["ratio"] < 1 and "torchvision" in r["peer"]: yield f"{r['op']}: slower than {r['peer']} (ratio {r['ratio']})"


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--quick", action="store_true", help="smaller sizes, less time")
    args.add_argument("--no-build", action="store_true", help="the library is there already")
    args.add_argument("--seconds", type=float, help="for each row, about")
    args.add_argument("--out", default=str(Path(os.environ.get("OUT") or ROOT/"benchmarks"/"results")/"gpu.json"))
    args = args.parse_args()
    import torch
    if not torch.cuda.is_available(): print("no GPU here: nothing to do"); return 0
    out = dict(command=" ".join(["python benchmarks/gpu.py", *sys.argv[1:]]), timing="medians of CUDA events, in turns; wall: of the host, until the answer is there", seed=SEED)
    save = lambda: (Path(args.out).parent.mkdir(parents=True, exist_ok=True), Path(args.out).write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))
    if not args.no_build:
        out["build"] = build(); save()
        if not out["build"]["ok"]: print("WRONG: the library was not built"); return 1
    out["tests"] = tests(); save()                                                         # a crash later does not cost what was learnt
    import torchvision, notebook_det
    from notebook_det.ops.library import LOADED, operators
    import notebook_det.ops.assign, notebook_det.ops.focal, notebook_det.ops.nms, notebook_det.ops.pool, notebook_det.ops.roi
    props = torch.cuda.get_device_properties(0)
    out |= dict(operators=operators("CUDA"), gpu=dict(name=props.name, capability=f"{props.major}.{props.minor}", processors=props.multi_processor_count), system=f"{platform.system()} {platform.machine()}",
                versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, cuda=torch.version.cuda, notebook_det=notebook_det.__version__))
    if "reference" in LOADED: print(LOADED)
    try: out["host"] = waits(); print("waits:", out["host"], flush=True)
    except Exception as e: out["host"] = f"{type(e).__name__}: {e}"[:300]
    save()
    out["rows"] = []
    for row in table(args.quick, args.seconds or (.2 if args.quick else 1.)): out["rows"].append(row); save()
    out["wrong"] = list(wrong(out)); save()
    print("written to", os.path.relpath(args.out), *("\nWRONG: " + w for w in out["wrong"]))
    return 1 if out["wrong"] else 0


if __name__ == "__main__": sys.exit(main())
