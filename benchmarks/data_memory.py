"""What annotations cost in memory, at the size of COCO's training set, in the process that reads them and in the one that loads pictures.

    python benchmarks/data_memory.py [--images 118287] [--annotations 860001] [--epochs 3] [--out FILE]

A made-up json of that size is read by our reader, and by pycocotools' COCO, which keeps the json's dicts. One loader process then asks for the
objects of every picture, epoch after epoch (no picture is read). Measured after each epoch: memory that belongs to a process alone (private
pages). Python writes a reference count whenever it looks at an object, so dicts that were shared at the start are copied, page by page.
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"
import argparse, contextlib, gc, io, json, pickle, platform, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import notebook_det
from notebook_det.data.coco import CocoDetection


def make(file, images, annotations):
    "A json with boxes everywhere, numbers of digits as in COCO's."
    rng = np.random.default_rng(0)
    owner, box = np.sort(rng.integers(0, images, annotations)), rng.uniform(2, 200, (annotations, 4)).round(2)
    with open(file, "w") as f:
        f.write('{"images": [' + ",".join(f'{{"id": {i*4+9}, "file_name": "{i*4+9:012d}.jpg", "height": 480, "width": 640}}' for i in range(images)))
        f.write('], "categories": [' + ",".join(f'{{"id": {i}, "name": "class {i}"}}' for i in range(1, 81)) + '], "annotations": [')
        for k in range(annotations):
            x, y, w, h = box[k].tolist()
            f.write(f'{"," if k else ""}{{"id": {k+1000}, "image_id": {int(owner[k])*4+9}, "category_id": {k % 80 + 1}, "bbox": [{x}, {y}, {w}, {h}], "area": {w*h:.3f}, "iscrowd": 0}}')
        f.write("]}")


def private(pid="self"):
    rows = dict(r.split(":") for r in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(rows[k].split()[0]) for k in ("Private_Clean", "Private_Dirty"))/1024


class Ours(Dataset):
    def __init__(self, ds): self.ds = ds
    def __len__(self): return len(self.ds)
    def __getitem__(self, i): return len(self.ds.target(i))


class Dicts(Dataset):
    def __init__(self, coco): self.coco, self.ids = coco, list(coco.imgs)
    def __len__(self): return len(self.ids)
    def __getitem__(self, i): return len(torch.tensor([a["bbox"] for a in self.coco.loadAnns(self.coco.getAnnIds(self.ids[i]))]).reshape(-1, 4))


def read(kind, file, folder):
    t = time.process_time()
    if kind == "ours": out = Ours(CocoDetection(file, folder))
    else:
        from pycocotools.coco import COCO
        with contextlib.redirect_stdout(io.StringIO()): out = Dicts(COCO(str(file)))
    return out, time.process_time() - t


def run(kind, file, folder, epochs, want):
    "In a process of its own, so that nothing else lies in memory."
    gc.collect(); before = private()
    data, seconds = read(kind, file, folder); gc.collect()
    row = dict(kind=kind, read_cpu_s=round(seconds, 2), held_mb=round(private() - before, 1), sent_mb=round(len(pickle.dumps(data))/2**20, 1), epochs=[])
    loader = DataLoader(data, batch_size=500, num_workers=1, collate_fn=sum, persistent_workers=True)
    for e in range(epochs):
        t = time.perf_counter(); n = sum(loader)
        assert n == want, f"{n} objects instead of {want}"
        row["epochs"].append(dict(worker_mb=round(private(loader._iterator._workers[0].pid), 1), main_mb=round(private(), 1), wall_s=round(time.perf_counter() - t, 1)))
    print(json.dumps(row), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=118_287); p.add_argument("--annotations", type=int, default=860_001); p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"results"/"data_memory.json"); p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return run(a.one[0], a.one[1], Path(a.one[1]).parent, a.epochs, a.annotations)
    import subprocess
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"instances.json"; make(file, a.images, a.annotations)
        rows = [json.loads(subprocess.run([sys.executable, __file__, "--one", kind, str(file), "--epochs", str(a.epochs), "--annotations", str(a.annotations)], check=True, capture_output=True, text=True).stdout.splitlines()[-1]) for kind in ("ours", "pycocotools")]
        size = file.stat().st_size/2**20
    for r in rows: print(f"{r['kind']:12} read in {r['read_cpu_s']} s CPU, holds {r['held_mb']} MB; the loader process: " + ", ".join(f"{e['worker_mb']} MB" for e in r["epochs"]))
    d = dict(what="memory of annotations: MB that belong to a process alone", images=a.images, annotations=a.annotations, json_mb=round(size, 1), rows=rows, versions=dict(python=platform.python_version(), torch=torch.__version__, notebook_det=notebook_det.__version__))
    a.out.parent.mkdir(parents=True, exist_ok=True); a.out.write_text(json.dumps(d, indent=1) + "\n")


if __name__ == "__main__": main()
