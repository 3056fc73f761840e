"""What do 100 more boxes cost? The second stages of R-FCN and of Faster R-CNN (on a pyramid, and C4), timed with few and with many RoIs.

    python benchmarks/rfcn.py                    # ResNet-50, 600 × 800 pictures, 80 classes, one thread; about two minutes; into results/rfcn.json
    python benchmarks/rfcn.py --rounds 9 --device cuda

R-FCN's claim (section 2.2): "the RoI-wise subnetwork is nearly cost-free", since all that learns lies in front of the pooling. Measured is each second stage on given
features, until class scores and deltas are there (no suppression, which depends on the scores). The stages take turns, so that whatever else the machine does hits all of
them; a stage's cost is the slope of a line through the medians: seconds per 100 RoIs. What R-FCN pays instead is the intercept: its last stage and its score maps, once.
"""
import argparse, datetime, json, os, platform, sys, time
from pathlib import Path
from statistics import median
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch, torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from notebook_det.foundations.recipes import build
from notebook_det.zoo import recipes as zoo, two_stage_more

OUT, SIZE = ROOT/"benchmarks/results/rfcn.json", (600, 800)

def boxes(n, g):
    wh = 32 + 300 * torch.rand(n, 2, generator=g)
    xy = torch.rand(n, 2, generator=g) * (torch.tensor([800., 600]) - wh).clamp(min=0)
    return torch.cat([xy, (xy + wh).minimum(torch.tensor([800., 600]))], 1)

def stages(device): # name → (second stage, its features, numbers of RoIs)
    g, out = torch.Generator().manual_seed(0), {}
    maps = lambda channels, *strides: [torch.randn(1, channels, -(-SIZE[0]//s), -(-SIZE[1]//s), generator=g).to(device, memory_format=torch.channels_last) for s in strides]
    recipes = dict(rfcn=(two_stage_more.rfcn(50), maps(1024, 16), (100, 300, 500, 1000)), faster_rcnn_fpn=(zoo.faster_rcnn(zoo.resnet(50)), maps(256, 4, 8, 16, 32), (100, 300, 500, 1000)),
                   faster_rcnn_c4=(zoo.faster_rcnn_c4(50), maps(1024, 16), (10, 20, 40)))
    for name,(recipe, features, counts) in recipes.items():
        torch.manual_seed(0)
        out[name] = build(recipe.roi_head).eval().to(device, memory_format=torch.channels_last), features, counts
    return out

def timed(head, features, rois, device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.process_time   # CPU seconds: nobody else's work is counted
    wait(); t = clock()
    maps = head.maps(features) if hasattr(head, "maps") else features
    wait(); middle = clock()
    head.look(maps, [rois])
    wait(); end = clock()
    return end - middle, middle - t                 # for the RoIs; for the whole picture

def line(points): # [(x, y)] → slope and intercept of the least squares
    n, mx, my = len(points), sum(x for x,_ in points)/len(points), sum(y for _,y in points)/len(points)
    slope = sum((x - mx)*(y - my) for x,y in points) / sum((x - mx)**2 for x,_ in points)
    return slope, my - slope*mx

@torch.inference_mode()
def measure(rounds, device):
    all_, g, times, once = stages(device), torch.Generator().manual_seed(1), {}, {}
    for i in range(rounds + 1):
        for name,(head, features, counts) in all_.items():
            for n in counts:
                roi, picture = timed(head, features, boxes(n, g).to(device), device)
                if i: times.setdefault((name, n), []).append(roi); once.setdefault(name, []).append(picture)   # the first round warms up
        print(f"round {i} of {rounds}", flush=True)
    rows = {}
    for name,(_, _, counts) in all_.items():
        points = [(n, median(times[name, n])) for n in counts]
        slope, rest = line(points)
        rows[name] = dict(seconds_per_100_rois=round(100*slope, 5), seconds_per_picture=round(median(once[name]), 4), points={n: round(s, 5) for n,s in points})
    return rows

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5); p.add_argument("--device", default="cpu"); p.add_argument("--threads", type=int, default=1); p.add_argument("--out", type=Path, default=OUT)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rows = measure(a.rounds, a.device)
    cheap = rows["rfcn"]["seconds_per_100_rois"]
    result = dict(stages=rows, ratio={k: round(v["seconds_per_100_rois"]/cheap, 1) for k,v in rows.items() if k != "rfcn"}, size=SIZE, classes=80, device=a.device, threads=a.threads, rounds=a.rounds,
                  machine=f"{platform.machine()}, {os.cpu_count()} cores", versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__), date=f"{datetime.date.today()}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
