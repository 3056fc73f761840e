"""Several processes, one run. Under pytest this file starts itself under torchrun; under torchrun it does the job that its first argument names."""
import json, os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from notebook_det.data.coco import CocoDetection
from notebook_det.data.loaders import make_loader
from notebook_det.data.toy import make_toy
from notebook_det.data.transforms import RandomFlip, Resize, Compose
from notebook_det.engine.checkpoint import Checkpoint, read_checkpoint, resume
from notebook_det.engine.distributed import Together
from notebook_det.engine.logs import JsonLines, Log, read_log
from notebook_det.engine.optim import sgd
from notebook_det.engine.runner import Runner, seed_everything
from notebook_det.engine.train import Evaluate, Validate, standard_hooks
from notebook_det.evaluation.coco import CocoEvaluator, evaluate
from notebook_det.evaluation.recall import ProposalRecall
from notebook_det.foundations.ranks import gather, rank, world
from notebook_det.foundations.recipes import build
from notebook_det.foundations.structures import Instances
from notebook_det.zoo import anchor_free, parts, rcnn

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun")
FAST = {"OMP_NUM_THREADS": "1", "NDET_QUIET": "1"}


def torchrun(*argv, n=2, flags=(), timeout=600):
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *flags]
    return subprocess.run([*head, *map(str, argv)], capture_output=True, text=True, env={**os.environ, **FAST}, timeout=timeout)


# ---------------------------------------------------------------- what is run, alone and in two processes

class Drops(nn.Module):
    "A net whose randomness is its own in every process."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(.3), nn.Linear(32, 1))
        self.spare = nn.Parameter(torch.zeros(1))
    def forward(self, x, y, spare=True): return {"loss_fit": (self.net(x)[:, 0] - y).square().mean() + (self.spare.sum() if spare else 0)}


def numbers(n=32):
    g = torch.Generator().manual_seed(1)
    return TensorDataset(x := torch.randn(n, 6, generator=g), x.sin().sum(1))


def drops_run(us, folder, hooks=(), step=None, **length):
    torch.manual_seed(0)
    model, data = Drops(), numbers()
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, us.world, us.rank))
    run = Runner(model, loader, sgd(model, .05), [Checkpoint(iterations=2, keep=None), Log([JsonLines(folder)], 1), *hooks], folder=folder, **(length or {"iterations": 7}), **({"step": step} if step else {}))
    us.distribute(run)
    return run


def toy_set(folder, split="train", flip=True):
    toy = make_toy(folder, num_train=10, num_val=5, size=64)
    return CocoDetection(getattr(toy, split), toy.images, transforms=Compose(Resize((64, 64), keep_ratio=False), *[RandomFlip(.5)] * flip), masks=True)


def train_retinanet(us, folder, batch):
    "Five steps of a real detector with frozen norms; half of the pictures lose their objects, so that shares differ."
    torch.manual_seed(0)
    model = build(rcnn.retinanet(parts.mobilenet_v2(), 3, out_channels=16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = Runner(model, make_loader(toy_set(folder/"toy"), batch, seed=3), sgd(model, .02), standard_hooks(max_norm=10., log_every=1, save={"iterations": 5}, bar=False, writers=[JsonLines(folder)]), iterations=5, folder=folder)
    us.distribute(run)
    run.run()
    return {k: v - before[k] for k, v in model.state_dict().items() if v.is_floating_point()}


def guess(_, images): # detections that depend on the picture alone
    out = []
    for x, size in zip(images.tensor, images.original_sizes):
        g = torch.Generator().manual_seed(int(x.long().sum()))
        xy = torch.rand(20, 2, generator=g) * 40
        out.append(Instances(torch.cat([xy, xy + 8 + torch.rand(20, 2, generator=g) * 30], 1), torch.randint(0, 3, (20,), generator=g), torch.rand(20, generator=g), size=size))
    return out


def measure(folder):
    ds = toy_set(folder/"toy", "val", flip=False)
    judges = CocoEvaluator(ds), ProposalRecall(ds)
    loader = make_loader(ds, 1, train=False)
    return [evaluate(None, loader, j, call=guess) for j in judges], sorted(map(str, judges[0].found)), len(loader)


RECIPES = {"retinanet": lambda: rcnn.retinanet(parts.mobilenet_v2(), 3, out_channels=16), "fcos": lambda: anchor_free.fcos(parts.mobilenet_v2(), 3, out_channels=64),
           "faster_rcnn": lambda: rcnn.faster_rcnn(parts.mobilenet_v2(), 3, out_channels=16), "mask_rcnn": lambda: rcnn.mask_rcnn(parts.mobilenet_v2(), 3, out_channels=16)}


def train_with_empty(us, name):
    "Two steps in which only the first process has objects, then one in which nobody has."
    torch.manual_seed(0)
    model = build(RECIPES[name]())
    def picture(full):
        box = torch.tensor([[8., 8, 40, 44]])[:int(full)]
        mask = torch.zeros(int(full), 64, 64, dtype=torch.bool); mask[:, 8:44, 8:40] = True
        return [torch.full((3, 64, 64), 99, dtype=torch.uint8)], [Instances(box, torch.zeros(int(full), dtype=torch.int64), masks=mask)]
    batches, seen = [picture(full and us.rank == 0) for full in (True, True, False)], []
    run = Runner(model, batches, sgd(model, .005), epochs=1).on("after_train_iter", lambda r: seen.append(r.loss.item()), "LOW")
    us.distribute(run)
    run.run()
    return seen, sum(p.detach().double().abs().sum().item() for p in model.parameters())


# ---------------------------------------------------------------- jobs, under torchrun

def job_all(us, folder):
    out = {}
    moved = train_retinanet(us, folder/"retinanet", 2)
    if us.rank == 0: torch.save(moved, folder/"moved.pt")
    out["metrics"], out["found"], out["batches"] = measure(folder/"retinanet")
    whole = drops_run(us, folder/"whole").run()
    drops_run(us, folder/"part", iterations=5).run()
    (folder/"part").joinpath("latest").write_text("iter_4.pth") if us.rank == 0 else None
    gather(0)
    seed_everything(77 + us.rank)
    again = drops_run(us, folder/"part")
    out["resumed"] = (resume(again), again.at.iter)
    again.run()
    out["same"] = all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))
    out["dropout differs"] = len(set(gather(torch.rand(1).item())))
    stopped = drops_run(us, folder/"stopped").on("after_train_iter", lambda r: us.rank == 1 and r.iter == 2 and r.stop("enough"), "LOW").run()
    out["stopped"] = (stopped.at.iter, stopped.stopped)
    judged = drops_run(us, folder/"judged", [Evaluate(lambda m: {"rank": us.rank, "two": 2.}, iterations=5)], iterations=5).run()
    out["judged"] = {k: v for k, v in judged.metrics.items() if k != "time"}
    out["shares"] = refused_loader(us)
    for name in RECIPES: out[name] = train_with_empty(us, name)
    (folder/f"out{us.rank}.json").write_text(json.dumps(out))


def job_kill(us, folder):
    drops_run(us, folder/"run").on("before_train_iter", lambda r: us.rank == 1 and r.iter == 5 and os.kill(os.getpid(), signal.SIGKILL)).run()


def job_raise(us, folder):
    def trouble(r):
        if us.rank == 1 and r.iter == 3: raise ValueError("a trouble of its own")
    drops_run(us, folder/"run").on("before_train_iter", trouble, name="trouble").run()


def job_unused(us, folder): drops_run(us, folder/"run", step=lambda model, batch: model(*batch, spare=us.rank == 0)).run()


def refused_loader(us): # made for one process, in two
    model = Drops()
    try: us.distribute(Runner(model, make_loader([(torch.zeros(3, 8, 8), {})], rank=0, world=1), sgd(model, .1), epochs=1)).run()
    except RuntimeError as e: return str(e)


if __name__ == "__main__":
    with Together("cpu", timeout=300) as us: globals()[f"job_{sys.argv[1]}"](us, Path(sys.argv[2]))


# ---------------------------------------------------------------- tests

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    toy_set(folder/"retinanet"/"toy")
    r = torchrun(__file__, "all", folder)
    assert r.returncode == 0, r.stderr[-3000:]
    return folder, [json.loads((folder/f"out{k}.json").read_text()) for k in (0, 1)], r


def test_two_processes_equal_one_with_twice_the_batch(done, tmp_path):
    folder, _, _ = done
    with Together("cpu") as us: one = train_retinanet(us, tmp_path, 4)
    two = torch.load(folder/"moved.pt", weights_only=True)
    assert max(v.abs().max() for v in one.values()) > 1e-3          # it learns
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-5
    a, b = (read_log(f)["train"] for f in (tmp_path, folder/"retinanet"))
    assert a["iter"] == b["iter"] == [1, 2, 3, 4, 5] and len((folder/"retinanet"/"log.jsonl").read_text().splitlines()) == 6
    assert all(abs(x - y) < 1e-4 * x for k in ("loss", "loss_cls", "loss_bbox", "grad_norm") for x, y in zip(a[k], b[k]))


def test_gathered_evaluation_equals_that_of_one_process(done):
    folder, (first, second), _ = done
    metrics, found, batches = measure(folder/"retinanet")
    assert first["metrics"] == second["metrics"] == json.loads(json.dumps(metrics)) and metrics[0]["bbox/AP50"] > 0
    assert first["found"] == found and len(found) == 5 and batches == 5 and (first["batches"], second["batches"]) == (3, 2)


def test_resume_is_exact_in_two_processes(done):
    for out in done[1]: assert out["resumed"] == [True, 4] and out["same"] and out["dropout differs"] == 2


def test_all_stop_together(done):
    for out in done[1]: assert out["stopped"] == [3, "enough"]


def test_numbers_of_an_evaluation_are_means(done):
    for out in done[1]: assert out["judged"] == {"rank": .5, "two": 2.}


def test_a_loader_for_one_process_is_refused_in_two(done):
    for out in done[1]: assert "the loader shares the pictures among 1, but there are 2 processes" in out["shares"]


@pytest.mark.parametrize("name", RECIPES)
def test_pictures_without_objects_in_one_process(done, name):
    (seen, size), other = (out[name] for out in done[1])
    assert [seen, size] == other and len(seen) == 3 and all(v == v and v < 1e4 for v in seen)


def ours(r): # what the processes themselves said, without torchrun's report
    noise = ("W1", "W0", "E1", "E0", "Traceback", "  ", "torch.distributed.elastic", "=", "-", "Failures", "Root", "[", "/", "*", "notebook_det:")
    return [l for l in r.stderr.splitlines() if l.strip() and not l.startswith(noise) and "FAILED" not in l]


def test_a_killed_process_ends_the_job_with_one_sentence(tmp_path):
    r = torchrun(__file__, "kill", tmp_path)
    said = ours(r)
    assert r.returncode != 0 and len(said) == 1 and "pair.cc" not in r.stderr and "[rank" not in r.stderr, r.stderr
    assert said[0].startswith("process 0 of 2, iteration 6: another process is gone") and "iter_4.pth" in said[0]
    assert "Signal 9 (SIGKILL)" in r.stderr             # torchrun's report
    assert read_checkpoint(tmp_path/"run")["meta"]["iter"] == 4


@pytest.mark.parametrize("job, sentence", [("raise", "hook trouble, before_train_iter, iteration 4 (epoch 1): a trouble of its own"), ("unused", "1 parameters took no part in the losses of process 1 (first: spare)")])
def test_only_the_first_to_fail_speaks(tmp_path, job, sentence):
    r = torchrun(__file__, job, tmp_path)
    errors = [l for l in r.stderr.splitlines() if "Error: " in l and "ChildFailedError" not in l]
    assert r.returncode != 0 and sentence in errors[-1] and "pair.cc" not in r.stderr and len({l[:7] for l in errors}) == 1, r.stderr


def test_ndet_train_under_torchrun(tmp_path):
    toy_set(tmp_path/"toy")
    toy = make_toy(tmp_path/"toy", num_train=10, num_val=5, size=64)
    r = torchrun(Path(sys.executable).with_name("ndet-train"), "retinanet_mobilenet", "--train", toy.train, "--val", toy.val, "--images", toy.images, "--iterations", 2, "--size", 64, "--batch", 1, "--device", "cpu", "--init", "none", "--out", tmp_path/"run", flags=["--no-python"])
    assert r.returncode == 0, r.stderr[-3000:]
    assert "2 iterations on cpu in each of 2 processes" in r.stdout and "0.0005 = 0.001 × 2 / 4" in r.stdout and r.stdout.count("iter 2/2  loss") == 1
    modes = [json.loads(l)["mode"] for l in (tmp_path/"run"/"log.jsonl").read_text().splitlines()]
    assert sorted(modes) == ["setup", "start", "train", "train", "val"] and (tmp_path/"run"/"results.txt").exists()
    assert read_checkpoint(tmp_path/"run")["meta"]["iter"] == 2
