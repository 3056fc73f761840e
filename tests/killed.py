"""A run to be killed at any moment, and a server that starts it in forked processes, so that torch is imported only once.

`python killed.py` reads lines [folder, seconds until signal 9 or null] and answers [exit status, seconds]."""
import json, os, sys, time, traceback
os.environ["NDET_QUIET"] = "1"
import torch
from torch import nn
from torch.utils.data import Dataset
from notebook_det.data.loaders import make_loader
from notebook_det.engine.amp import MixedPrecision, loss_scaler
from notebook_det.engine.average import EMA
from notebook_det.engine.checkpoint import resume
from notebook_det.engine.logs import JsonLines
from notebook_det.engine.optim import adamw
from notebook_det.engine.runner import Runner
from notebook_det.engine.schedules import CosineDecay, Schedule
from notebook_det.engine.train import EarlyStop, Evaluate, standard_hooks
from notebook_det.foundations.structures import Instances


class Photos(Dataset):
    "26 pictures with a random number of objects; every look at one draws random numbers, as augmentations do."
    sizes = [(16, 16)] * 26
    def __len__(self): return 26
    def __getitem__(self, i):
        n = int(torch.randint(0, 3, ()))
        return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), Instances(torch.tensor([[1., 1., 9., 9.]] * n).reshape(-1, 4), torch.zeros(n, dtype=torch.long), image_id=i)


class Counter(nn.Module):
    "How many objects are there? Batch normalisation and dropout, so that buffers and random numbers matter."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 1))
    def forward(self, images, targets):
        out = self.body(images.tensor.float() / 255)[:, 0].float()
        wanted = torch.tensor([float(len(t)) for t in targets])
        return {"loss_count": (out - wanted).square().mean(), "loss_size": .01 * out.abs().mean()}


def new(folder, iterations=45):
    "Everything that has a state: accumulated gradients, a scaler that changes, an average, a schedule, the best models, an early stop."
    torch.manual_seed(0)
    model, amp = Counter(), MixedPrecision("fp16")
    amp.saved = {**loss_scaler("cpu").state_dict(), "scale": 2.**20, "growth_interval": 4}
    judge = lambda m: {"size": float(m.body[0].weight.detach().abs().sum() + torch.rand(1))}
    hooks = standard_hooks(Schedule(CosineDecay(), by="iteration", warmup=9), max_norm=1., accumulate=3, ema=.95, log_every=4, writers=[JsonLines(folder)], bar=False,
                           save={"iterations": 4, "keep": 2}, evaluate=judge, evaluate_every={"iterations": 10}, best="size", keep_best=2, early_stop=50)
    return Runner(model, make_loader(Photos(), batch_size=4, seed=5), adamw(model, .01), [*hooks, amp], iterations=iterations, folder=folder)


def go(folder):
    torch.set_num_threads(1)
    run = new(folder)
    resume(run)
    run.on("after_train_iter", lambda r: time.sleep(.003), "LOWEST")
    run.run()


def serve():
    for line in sys.stdin:
        folder, delay = json.loads(line)
        start, pid = time.time(), os.fork()
        if not pid:
            try: go(folder); os._exit(0)
            except BaseException: traceback.print_exc(); os._exit(1)
        if delay is not None: time.sleep(delay); os.kill(pid, 9)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps([os.waitstatus_to_exitcode(status), time.time() - start]), flush=True)


if __name__ == "__main__": serve()
