"""How fast pictures come: our loader, torchvision's reference detection pipeline, and bare JPEG decoding, in one run on one thread.

    python benchmarks/loader.py [--images N] [--rounds N] [--workers 0 1] [--size 1333 800] [--out FILE]

All arms read the same JPEGs of COCO (or generated ones of 640×480, where those are not at hand) in the same batches of two, mirror half of
them and resize to fit 1333×800; at the end stands what a detector's first convolution takes: one normalised float32 batch. torchvision does
the last two steps inside its models (`GeneralizedRCNNTransform`), so they are counted on both sides. CPU time of this process and its
loader processes, arms in turns, medians over the rounds. Ratios are peer / ours.
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"
import argparse, json, platform, re, resource, statistics, sys, tempfile, time
from pathlib import Path
import numpy as np, torch, torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import notebook_det
from notebook_det.data.coco import CocoDetection
from notebook_det.data.loaders import Batches, Collate, Loader, start_worker
from notebook_det.data.transforms import Compose, RandomFlip, Resize, clip_and_drop
from notebook_det.detectors.base import Normalize

COCO = ROOT.parent/"shared"/"data"/"coco_permissive"


def pictures(n, folder):
    "A json and a folder of n JPEGs."
    if COCO.is_dir():
        d = json.loads((COCO/"annotations"/"instances_val.json").read_text())
        seen = {a["image_id"] for a in d["annotations"] if not a.get("iscrowd")}                   # torchvision's reference drops pictures without objects
        d["images"] = [r for r in d["images"] if r["id"] in seen][:n]; keep = {r["id"] for r in d["images"]}; d["annotations"] = [a for a in d["annotations"] if a["image_id"] in keep]
        images, source = COCO/"val", "COCO val, openly licensed part"
    else:
        from notebook_det.data.toy import make_toy
        toy = make_toy(folder/"toy", n, 1, size=640); d, images, source = json.loads(toy.train.read_text()), toy.images, "generated"
    file = folder/"images.json"; file.write_text(json.dumps(d))
    return file, images, source


class Reference(Dataset):
    "torchvision's reference pipeline (references/detection, `hflip`) on its own CocoDetection; backends as there."
    def __init__(self, file, images, backend):
        self.backend, base = backend, torchvision.datasets.CocoDetection(images, file)
        tail = [v2.ToDtype(torch.float, scale=True), v2.ConvertBoundingBoxFormat("XYXY"), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
        if backend == "v2 tensor": base = torchvision.datasets.wrap_dataset_for_transforms_v2(torchvision.datasets.CocoDetection(images, file, transforms=v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), *tail])), target_keys=("boxes", "labels", "image_id"))
        if backend == "v2 pil": base = torchvision.datasets.wrap_dataset_for_transforms_v2(torchvision.datasets.CocoDetection(images, file, transforms=v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage(), *tail])), target_keys=("boxes", "labels", "image_id"))
        self.base = base
    def __len__(self): return len(self.base)
    def __getitem__(self, draw):
        i = draw[0] if isinstance(draw, tuple) else draw
        if self.backend != "v1": return self.base[i]
        image, anns = self.base[i]                       # its first generation: plain tensors, boxes by hand
        b = torch.tensor([a["bbox"] for a in anns], dtype=torch.float32).reshape(-1, 4)
        b[:, 2:] += b[:, :2]; w, h = image.size
        b[:, 0::2].clamp_(0, w); b[:, 1::2].clamp_(0, h)
        target = dict(boxes=b, labels=torch.tensor([a["category_id"] for a in anns], dtype=torch.int64))
        image = F.pil_to_tensor(image)
        if torch.rand(1) < .5:
            image = image.flip(-1); target["boxes"][:, [0, 2]] = w - target["boxes"][:, [2, 0]]
        return F.to_dtype(image, torch.float, scale=True), target


class Bare(Dataset):
    "Nothing but decoding."
    def __init__(self, files, how): self.files, self.how = files, how
    def __len__(self): return len(self.files)
    def __getitem__(self, draw):
        f = self.files[draw[0] if isinstance(draw, tuple) else draw]
        if self.how == "tensor": decode_jpeg(read_file(str(f)), mode=ImageReadMode.RGB)
        else: Image.open(f).convert("RGB")
        return 0


class Long(Batches):
    "The batches of an epoch several times, so that the start of loader processes weighs little."
    times = 1
    def draws(self): return super().draws()*self.times
    def __len__(self): return super().__len__()*self.times


def lists(batch): return tuple(zip(*batch))
def nothing(batch): return len(batch)


def arms(file, images, scale, workers):
    "name → one pass over all pictures."
    busy = dict(worker_init_fn=start_worker) if workers else {}
    ours = CocoDetection(file, images, transforms=Compose(Resize(scale), RandomFlip()))
    Long.times = 2 if workers else 1
    again = lambda: Long(len(ours), 2, seed=0, groups=(ours.sizes[:, 1] > ours.sizes[:, 0]).astype(int))
    normalize, reference = Normalize(), GeneralizedRCNNTransform(min(scale), max(scale), [.485, .456, .406], [.229, .224, .225])
    files = [ours.file(i) for i in range(len(ours))]
    def our(finish):
        for x, t in Loader(ours, again(), num_workers=workers, collate_fn=Collate(32), **busy):
            if finish: normalize(x)
    def peer(data):
        for x, t in DataLoader(data, batch_sampler=again(), num_workers=workers, collate_fn=lists, **busy): reference(list(x), [{k: v for k, v in o.items()} for o in t])
    def bare(data):
        for _ in DataLoader(data, batch_sampler=again(), num_workers=workers, collate_fn=nothing, **busy): pass
    out = {"ours": lambda: our(True), "ours, as bytes": lambda: our(False)}
    out |= {f"torchvision, {b}": (lambda d=Reference(file, images, b): peer(d)) for b in ("v1", "v2 pil", "v2 tensor")}
    return out | {f"decoding, {h}": (lambda d=Bare(files, h): bare(d)) for h in ("tensor", "pil")}, ours


def cpu(): # of this process and of its children that have ended
    return sum(getattr(r, k) for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) for k in ("ru_utime", "ru_stime"))


def stages(ours, scale, rounds):
    "Where our time goes: each step alone, milliseconds of CPU for a picture, the median of the rounds."
    resize, flip, collate, normalize, target = Resize(scale), RandomFlip(1.), Collate(32), Normalize(), {}
    def step(f):
        t = time.process_time(); out = f(); return out, (time.process_time() - t)*1e3
    rows = []
    for _ in range(rounds):
        r = dict.fromkeys(("decode", "objects", "resize", "flip", "collate", "normalise"), 0.)
        for i in range(0, len(ours) - 1, 2):
            pair = []
            for k in (i, i+1):
                image, a = step(lambda: ours.image(k)); t, b = step(lambda: ours.target(k))
                (image, t), c = step(lambda: resize(image, t)); (image, t), d = step(lambda: flip(image, t))
                pair.append((image, t)); r["decode"] += a; r["objects"] += b; r["resize"] += c; r["flip"] += d/2      # every second one
            batch, e = step(lambda: collate(pair)); _, f = step(lambda: normalize(batch[0]))
            r["collate"] += e; r["normalise"] += f
        rows.append({k: v/(len(ours)//2*2) for k, v in r.items()})
    return {k: statistics.median(r[k] for r in rows) for k in rows[0]}


def run(n, rounds, workers, scale, folder):
    file, images, source = pictures(n, folder)
    rows, parts = [], None
    for w in workers:
        table, ours = arms(file, images, scale, w)
        times = {k: [] for k in table}
        for k in table: table[k]()                                          # files into the cache
        for r in range(rounds):
            for k in list(table)[r % len(table):] + list(table)[:r % len(table)]:
                
                    a, b, n = cpu(), time.perf_counter(), len(ours)*Long.times
                    table[k](); times[k].append(((cpu() - a)/n*1e3, (time.perf_counter() - b)/n*1e3))
        peer = min((k for k in table if k.startswith("torchvision")), key=lambda k: statistics.median(t for t, _ in times[k]))
        m = {k: statistics.median(t for t, _ in v) for k, v in times.items()}
        for k, v in times.items(): rows.append(dict(arm=k, workers=w, cpu_ms=round(m[k], 3), min_ms=round(min(t for t, _ in v), 3), wall_ms=round(statistics.median(t for _, t in v), 3), images_per_cpu_second=round(1e3/m[k], 1), peer_over_this=round(m[peer]/m[k], 3)))
        print(f"{w} workers: " + " · ".join(f"{k} {m[k]:.2f} ms" for k in m) + f" → {m[peer]/m['ours']:.2f}× the fastest of torchvision's ({peer})", flush=True)
        parts = parts or {k: round(v, 3) for k, v in stages(ours, scale, rounds).items()}
    if 0 in workers and 1 in workers: parts["transfer"] = round(max(0., *(a["cpu_ms"] - b["cpu_ms"] for a in rows for b in rows if a["arm"] == b["arm"] == "ours, as bytes" and (a["workers"], b["workers"]) == (1, 0))), 3)
    return rows, parts, source, ours


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=46); p.add_argument("--rounds", type=int, default=7); p.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    p.add_argument("--size", type=int, nargs=2, default=[1333, 800]); p.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"results"/"loader.json")
    a = p.parse_args()
    torch.set_num_threads(1); torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder: rows, parts, source, ours = run(a.images, a.rounds, a.workers, tuple(a.size), Path(folder))
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    d = dict(what="CPU milliseconds for a picture, from file to normalised float batch", source=source, images=len(ours), mean_pixels=int(np.prod(ours.sizes, 1).mean()), scale=a.size, batch=2, rounds=a.rounds,
             machine=dict(cpu=re.search(r"model name\s*: (.*)|$", info)[1] or platform.machine(), threads=1, system=f"{platform.system()} {platform.machine()}"),
             versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, notebook_det=notebook_det.__version__), rows=rows, stages_ms=parts)
    a.out.parent.mkdir(parents=True, exist_ok=True); a.out.write_text(json.dumps(d, indent=1) + "\n")


if __name__ == "__main__": main()
