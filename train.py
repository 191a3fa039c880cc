# SPDX-License-Identifier: MIT
"""Training: one plain loop per task, from data to test score.

    python train.py ave                                     the toy, from nothing, in minutes
    python train.py ave --data AVE_Dataset                  the paper's experiment on the real data

Toy data get the toy recipe below and real data the supplementary's numbers; each option overrides
its entry. A run leaves in --out: adapters.pt (what was trained, at the best epoch on val),
log.jsonl (one object per epoch) and result.json.
"""
import argparse
import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import data
import lavish
from data import bar
from lavish import InputError

PAPER = dict(backbone="large", weights="imagenet", image_size=192, lr_decay=1.0, workers=4)
TOY = dict(backbone="nano", weights="toy", image_size=48, workers=0)
RECIPES = {
    # The supplementary's settings. It does not give the epochs; others saw the best one early.
    ("ave", "real"): dict(PAPER, latents=2, reduction=8, groups=2, batch_size=2, lr=5e-6,
                          head_lr=4e-6, epochs=20),
    ("avs", "real"): dict(PAPER, latents=16, reduction=4, groups=2, batch_size=4, lr=1e-4,
                          head_lr=1e-4, channels=256, epochs=20),
    ("avqa", "real"): dict(PAPER, latents=16, reduction=4, groups=2, batch_size=1, lr=8e-5,
                           head_lr=3e-6, hidden=512, moments=10, epochs=10),
    # The same adapters on the toy backbone; a net this small wants larger steps.
    ("ave", "toy"): dict(TOY, latents=2, reduction=8, groups=2, batch_size=8, lr=2e-3,
                         head_lr=1e-3, lr_decay=1.0, epochs=7),
    ("avs", "toy"): dict(TOY, latents=16, reduction=4, groups=2, batch_size=8, lr=3e-3,
                         head_lr=1e-3, lr_decay=0.75, channels=64, epochs=9),
    ("avqa", "toy"): dict(TOY, latents=16, reduction=4, groups=2, batch_size=8, lr=1.5e-3,
                          head_lr=5e-4, lr_decay=0.9, hidden=128, moments=2, epochs=8)}

TORCHVISION = "https://download.pytorch.org/models/swin_v2_{}.pth"
MICROSOFT = ("https://github.com/SwinTransformer/storage/releases/download/v2.0.0/"
             "swinv2_{}_patch4_window12_192_22k.pth")
IMAGENET = {"tiny": TORCHVISION.format("t-b137f0e2"), "small": TORCHVISION.format("s-637d8ceb"),
            "base": TORCHVISION.format("b-781e5279"), "base12": MICROSOFT.format("base"),
            "large": MICROSOFT.format("large")}

# ---------------------------------------------------------------- AVE

def train_ave(args):
    """Audio-visual event localisation: settings -> test accuracy over all seconds."""
    start = time.time()
    sets, loaders = open_data(args, data.AVE)
    torch.manual_seed(args.seed)
    classes = len(sets["train"].categories) + 1
    model = lavish.AVE(build_net(args), classes)
    forward, optimizer = prepare(args, model)
    best, log = -1.0, []
    for epoch in range(1, args.epochs + 1):
        epoch_start, losses = time.time(), []
        model.train()
        loaders["train"].sampler.set_epoch(epoch)
        for frames, spectrograms, labels in bar(loaders["train"], f"epoch {epoch}/{args.epochs}"):
            logits = forward(frames.to(args.device), spectrograms.to(args.device))
            # As released: binary cross-entropy of the softmax against the one-hot label.
            targets = F.one_hot(labels.to(args.device), classes).float()
            loss = F.binary_cross_entropy(logits.softmax(-1), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        val = score_ave(model, loaders["val"], args.device)
        best = end_epoch(args, model, optimizer, log, losses, val, best, epoch_start)
    load_checkpoint(args, model)
    test = score_ave(model, loaders["test"], args.device)
    labels = torch.stack([sets["test"].labels(i) for i in range(len(sets["test"]))])
    background = (labels == classes - 1).float().mean().item()
    finish(args, model, start, "accuracy per second", test,
           {f"test accuracy, {len(labels)} clips x 10 s": test,
            "if all were called background": background,
            "if every clip's event filled it": 1 - background})

@torch.no_grad()
def score_ave(model, loader, device):
    """The share of seconds with the right label, over all seconds of a split."""
    settle(model)
    right = []
    for frames, spectrograms, labels in bar(loader, "score"):
        found = model(frames.to(device), spectrograms.to(device)).argmax(-1).cpu()
        right += (found == labels).float().mean(1).tolist()
    return float(np.mean(gather(right)))

# ---------------------------------------------------------------- AVS

def train_avs(args):
    """Audio-visual segmentation: settings -> mean IoU over all test frames, and the F score."""
    start = time.time()
    sets, loaders = open_data(args, data.AVSBench)
    torch.manual_seed(args.seed)
    scale = args.channels / 256  # of the whole decoder; 1 as released
    model = lavish.AVS(build_net(args), sets["train"].mask_size, args.channels,
                       [int(w * scale) for w in (64, 128, 320, 512)],
                       [int(w * scale) for w in (128, 32)])
    forward, optimizer = prepare(args, model)
    best, log = -1.0, []
    for epoch in range(1, args.epochs + 1):
        epoch_start, losses = time.time(), []
        model.train()
        loaders["train"].sampler.set_epoch(epoch)
        for frames, spectrograms, masks in bar(loaders["train"], f"epoch {epoch}/{args.epochs}"):
            # S4 has a mask of the first frame only, so no other one is decoded to the end.
            logits = forward(frames.to(args.device), spectrograms.to(args.device), True)
            loss = F.binary_cross_entropy_with_logits(logits, masks.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        val, _ = score_avs(model, loaders["val"], args.device)
        best = end_epoch(args, model, optimizer, log, losses, val, best, epoch_start)
    load_checkpoint(args, model)
    test, f_score = score_avs(model, loaders["test"], args.device)
    if process()[0] == 0:
        picture_avs(model, sets["test"], args)
    finish(args, model, start, "mean IoU", test,
           {f"test mean IoU, {len(sets['test'])} clips x 5 frames": test,
            "test F score (beta^2 = 0.3)": f_score}, f_score=f_score)

@torch.no_grad()
def score_avs(model, loader, device):
    """(mean IoU over all frames of a split, F score)."""
    settle(model)
    ious, f_score = [], FScore()
    for frames, spectrograms, masks in bar(loader, "score"):
        logits = model(frames.to(device), spectrograms.to(device)).cpu().flatten(0, 1)
        ious += mask_iou(logits, masks.flatten(0, 1)).view(len(masks), -1).mean(1).tolist()
        f_score.update(logits, masks.flatten(0, 1))
    f_score.total, f_score.frames = (sum(gather([x])) for x in (f_score.total, f_score.frames))
    return float(np.mean(gather(ious))), f_score.compute()

def mask_iou(logits, masks):
    """Logits and 0/1 masks (N,H,W) -> IoU of each frame (N,), as AVSBench counts it: an empty
    mask scores the share of pixels predicted empty."""
    p, m = logits.flatten(1) > 0, masks.flatten(1) > 0                         # (N,H*W)
    iou = (p & m).sum(1) / (p | m).sum(1).clamp(min=1)
    return torch.where(m.any(1), iou, (~p).float().mean(1))

class FScore:
    """(1 + b) P R / (b P + R) with b = 0.3, at the best of 255 thresholds; frames with an empty
    mask do not count. Averaged over the split and THEN maximised; AVSBench maximises per batch
    and averages those, so that its score rises as batches get smaller."""

    def __init__(self, beta2=0.3, thresholds=255):
        self.beta2, self.frames = beta2, 0
        self.thresholds, self.total = torch.linspace(0, 1, thresholds), torch.zeros(thresholds)

    def update(self, logits, masks):
        """Logits and 0/1 masks (N,H,W)."""
        p, m = logits.sigmoid().flatten(1), masks.flatten(1)
        p, m = p[m.any(1)], m[m.any(1)]                                        # (n,H*W)
        # One histogram over the thresholds, of the pixels and of those in the mask, then summed
        # from the top: how many pixels reach each threshold.
        level = torch.bucketize(p, self.thresholds, right=True)
        counts = torch.stack([m, torch.ones_like(m)])                          # (2,n,H*W)
        histogram = torch.zeros(2, len(p), len(self.thresholds) + 1)
        histogram.scatter_add_(2, level.expand_as(counts), counts)
        hits, found = histogram.flip(2).cumsum(2).flip(2)[..., 1:]             # (n,thresholds)
        # With P = hits / found and R = hits / |mask|:
        f = (1 + self.beta2) * hits / (self.beta2 * m.sum(1, keepdim=True) + found)
        self.total, self.frames = self.total + f.sum(0), self.frames + len(p)

    def compute(self):
        return (self.total.max() / max(self.frames, 1)).item()

@torch.no_grad()
def picture_avs(model, dataset, args, clips=6, tile=96):
    """Test clips as rows of a PNG in --out: frames, spectrograms, true masks, predicted masks."""
    rows = []
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    for i in range(min(clips, len(dataset))):
        frames, spectrograms, masks = dataset[i]
        found = model(frames[None].to(args.device), spectrograms[None].to(args.device))[0].cpu() > 0
        seen = F.interpolate((frames * std + mean).clamp(0, 1), masks.shape[1:], mode="bilinear")
        marked = torch.stack([torchvision.utils.draw_segmentation_masks(
            (frame * 255).byte(), mask, 0.7, "white") for frame, mask in zip(seen, found)]) / 255
        heard = (0.4 + spectrograms / 3).clamp(0, 1).transpose(1, 2).flip(1)  # time runs right
        tiles = [seen, heard[:, None].expand(-1, 3, -1, -1), masks[:, None].expand(-1, 3, -1, -1),
                 marked]
        rows += [F.interpolate(images, (tile, tile)) for images in tiles]
    grid = torchvision.utils.make_grid(torch.cat(rows), 4 * dataset.seconds, 4, pad_value=1)
    data.write_atomic(os.path.join(args.out, "test.png"),
                      torchvision.io.encode_png((grid * 255).byte()).numpy().tobytes())

# ---------------------------------------------------------------- AVQA

def train_avqa(args):
    """Audio-visual question answering: settings -> test accuracy, per type and over all."""
    start = time.time()
    sets, loaders = open_data(args, data.MusicAVQA, moments=args.moments)
    args.vocabulary = sets["train"].vocabulary  # so that the checkpoint holds it
    torch.manual_seed(args.seed)
    model = lavish.AVQA(build_net(args), len(args.vocabulary["words"]),
                        len(args.vocabulary["answers"]), args.hidden)
    forward, optimizer = prepare(args, model)
    best, log = -1.0, []
    for epoch in range(1, args.epochs + 1):
        epoch_start, losses = time.time(), []
        model.train()
        loaders["train"].sampler.set_epoch(epoch)
        for batch in bar(loaders["train"], f"epoch {epoch}/{args.epochs}"):
            frames, spectrograms, question, answer, foreign = (x.to(args.device) for x in batch)
            logits, match = forward(frames, spectrograms, question, foreign)
            loss = F.cross_entropy(logits, answer)
            if match is not None:  # does this frame go with this sound? 1 for the real half
                real = torch.arange(len(match), device=args.device) < len(match) // 2
                loss = loss + 0.5 * F.cross_entropy(match, real.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        val = float(np.mean(score_avqa(model, loaders["val"], args.device)))
        best = end_epoch(args, model, optimizer, log, losses, val, best, epoch_start)
    load_checkpoint(args, model)
    right = score_avqa(model, loaders["test"], args.device)
    table, per_type = {}, {}
    for modality, kind in sorted({q["type"] for q in sets["test"].questions}):
        per_type.setdefault(modality, []).append(kind)
    for modality, kinds in per_type.items():
        for kind in (*kinds, "average"):
            chosen = [r for r, q in zip(right, sets["test"].questions)
                      if q["type"][0] == modality and kind in (q["type"][1], "average")]
            table[f"{modality} {kind} ({len(chosen)})"] = float(np.mean(chosen))
    test = float(np.mean(right))
    finish(args, model, start, "accuracy", test,
           {**table, f"test accuracy, {len(right)} questions": test,
            "from the words of the question alone": words_alone(sets)}, per_type=table)

@torch.no_grad()
def score_avqa(model, loader, device):
    """For each question of a split, whether it is answered rightly."""
    settle(model)
    right = []
    for *batch, answer in bar(loader, "score"):
        right += (model(*(x.to(device) for x in batch))[0].argmax(-1).cpu() == answer).tolist()
    return gather(right)

def words_alone(sets):
    """Test accuracy of the commonest training answer to the same words, or to any if unknown."""
    answers = {}
    for q in sets["train"].questions:
        for key in (tuple(q["words"]), None):
            answers.setdefault(key, []).append(q["answer"])
    guess = {key: max(dict.fromkeys(a), key=a.count) for key, a in answers.items()}
    return float(np.mean([guess.get(tuple(q["words"]), guess[None]) == q["answer"]
                          for q in sets["test"].questions]))

# ---------------------------------------------------------------- cost

def bench(args):
    """The cost of a task on random data at any size: a row for each of --latents, with --baseline
    beside the released way of computing the same. Each row is measured in a process of its own.
    """
    if args.head == "loader":
        return bench_loader(args)
    print(args.head, args.backbone, f"batch {args.batch_size}", args.precision, args.device,
          "\n            GFLOP a clip  clips/s, median (min to max)               GB +  of matrix\n"
          "latents      eval  train  training           evaluation           weights       rate")
    rows, spawn = [], multiprocessing.get_context("spawn")
    cases = [(args.latents[0], True)] * args.baseline + [(m, False) for m in args.latents]
    for m, released in cases:
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            rows.append(row := pool.submit(measure, args, m, released).result())
        speeds = ["{1:.3g} ({0:.3g}-{2:.3g})".format(*row[k]) for k in ("train", "eval")]
        print(f"{m:3} {'released' * released:8} {row['gflop']:6.0f} {row['step_gflop']:6.0f}  "
              f"{speeds[0]:18} {speeds[1]:18} {row['peak']:4.1f} +{row['weights']:4.1f} "
              f"{row['share']:4.0%}", flush=True)
    if args.baseline:
        ratio = lambda key: rows[1][key][1] / rows[0][key][1]
        print(f"times the released: training {ratio('train'):.2f}, evaluation {ratio('eval'):.2f}, "
              f"peak memory {rows[1]['peak'] / rows[0]['peak']:.2f}")
    if args.out:
        data.write_atomic(args.out, json.dumps({"settings": vars(args), "rows": rows}).encode())

def measure(args, latents, released):
    """One row of bench, in a process of its own: a dict."""
    args.latents, start = latents, peak_memory(args.device)
    if released:
        as_released()
        args.precision, args.compile, args.checkpoint_activations = "fp32", False, False
    else:
        keep_memory()
    head = {"ave": lavish.AVE, "avs": lavish.AVS, "avqa": lavish.AVQA}[args.head]

    def build(args, device):
        with torch.device(device):
            model, T, B = head(build_net(args)), 5 if args.head == "avs" else 10, args.batch_size
            S = model.net.backbone.image_size
            inputs = [torch.randn(B, T, 3, S, S), torch.randn(B, T, S, S)]
            inputs += [torch.ones(B, 14, dtype=torch.long)] * (args.head == "avqa")
            # Of S4's frames the loss wants the first; the release decodes them all.
            return model, inputs, {"ave": [], "avs": [not released], "avqa": inputs[:1]}[args.head]

    def step(forward, inputs, more, optimizer=None):
        outputs = forward(*inputs, *more)
        sum(x.square().mean() for x in (outputs if args.head == "avqa" else [outputs])).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    counted = {**vars(args), "precision": "fp32", "checkpoint_activations": False}
    model, inputs, more = build(argparse.Namespace(**counted), "meta")  # shapes without memory
    row = {"latents": latents, "released": released}
    for key, run in (("gflop", lambda: model(*inputs)),
                     ("step_gflop", lambda: step(model, inputs, more))):
        with FlopCounterMode(display=False) as counter:
            run()
        row[key] = counter.get_total_flops() / args.batch_size / 1e9
    torch.manual_seed(args.seed)
    model, inputs, more = build(args, args.device)
    forward, optimizer = prepare(args, model)
    row["weights"] = sum(t.nbytes for t in model.state_dict().values()) / 1e9
    model.train()
    row["train"] = speed(args, lambda: step(forward, inputs, more, optimizer))
    row["peak"] = (peak_memory(args.device) - start) / 1e9 - row["weights"]
    model.eval()
    with torch.no_grad():
        row["eval"] = speed(args, lambda: model(*inputs))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(4096, 4096, device=args.device, dtype=dtype)  # the machine's own rate:
    rate = speed(args, lambda: a @ a)[1] / args.batch_size * 2 * 4096 ** 3 / 1e9
    return {**row, "share": row["train"][1] * row["step_gflop"] / rate}

def speed(args, run):
    """[least, median, most] clips a second over --repeat runs, after one to warm up."""
    seconds = []
    for _ in range(args.repeat + 1):
        start = time.perf_counter()
        run()
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return [float(args.batch_size / q) for q in np.quantile(seconds[1:], (1, 0.5, 0))]

def peak_memory(device):
    """Bytes: of the GPU, or of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

def as_released():
    """From here on this process computes as the authors' release does: a pass per stream, position
    biases anew in every block, convolutions between transposes, TPAVI over all pairs of pixels."""
    def forward(net, frames, spectrograms):
        v, a = map(net.backbone.embed, (frames, spectrograms[:, None].expand(-1, 3, -1, -1)))
        stages, adapters = [], iter(net.adapters)
        for blocks, merge in net.backbone.stages:
            for block in blocks:
                for branch, lav in zip(block.branches(), next(adapters)):
                    v, a = v + branch(v) + lav["visual"](v, a), a + branch(a) + lav["audio"](a, v)
            stages.append((v, a))
            v, a = merge(v), merge(a)
        stages[-1] = tuple(map(net.backbone.norm, stages[-1]))
        return tuple(zip(*stages))

    def tpavi(self, x, audio):
        (B, T, _), (C, H, W) = audio.shape, x.shape[1:]
        video = x.movedim(1, -1).reshape(B, -1, C)                             # (B,T*H*W,C)
        sound = self.align(audio).repeat_interleave(H * W, 1)                  # (B,T*H*W,C)
        weights = self.theta(video) @ self.phi(sound).transpose(1, 2) / video.shape[1]
        y = self.bn(self.out(weights @ self.g(video)).flatten(0, 1))
        return self.norm(video.flatten(0, 1) + y).view(-1, H, W, C).movedim(-1, 1)

    lavish.Lavish.forward, lavish.TPAVI.forward = forward, tpavi
    lavish.LavishAdapter.convolve = staticmethod(lambda z, conv: conv(z.t()[None])[0].t())
    lavish.WindowAttention.bias = lavish.WindowAttention.compute_bias
    lavish.attend = lambda q, k, v, bias: (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v

def bench_loader(args):
    """Clips a second of AVE's loader, beside a loop that opens the wav anew for each second."""
    dataset = data.AVE(args.data, "train", args.image_size)
    dataset = torch.utils.data.Subset(dataset, range(min(len(dataset), 24 * args.repeat)))

    def rate(clips):
        start = time.perf_counter()
        for _ in clips:
            pass
        return len(dataset) / (time.perf_counter() - start)

    ours = rate(torch.utils.data.DataLoader(dataset, 4, num_workers=args.workers))
    read, of_a_second = data.AVE.sound, range(data.AVE.seconds)
    data.AVE.sound = lambda self, i: torch.stack([read(self, i)[t] for t in of_a_second])
    naive = rate(dataset)
    print(f"{args.data}, {args.image_size} px, {args.workers} workers: {ours:.1f} clips/s, a wav "
          f"opened per second {naive:.1f}: {ours / naive:.1f} times")

# ---------------------------------------------------------------- what the loops share

def build_net(args):
    """The frozen backbone with its adapters, as the settings say."""
    backbone = lavish.swin_v2(args.backbone, args.image_size, load_weights(args))
    if args.precision == "bf16":  # autocast would cast the frozen weights anew in every pass
        for name, parameter in backbone.named_parameters():
            if parameter.dim() > 1 and not re.search("cpb_mlp|logit_scale", name):
                parameter.data = parameter.data.bfloat16()
    try:
        return lavish.Lavish(backbone, args.latents, args.reduction, args.groups, args.modality,
                             args.drop_path, args.checkpoint_activations)
    except ValueError as error:  # the adapter's own words about its dim
        raise InputError(f"--reduction and --groups do not fit {args.backbone}: {error}") from None

def load_weights(args):
    """The backbone's state dict by --weights: None for "none", nano's own for "toy", the published
    ones for "imagenet" (kept in torch.hub's folder and taken from there next time), or a file."""
    if args.weights == "toy":  # beside the toy data sets, for all of them
        folder = os.path.dirname(os.path.abspath(args.data))
        return load_file(pretrain_nano(os.path.join(folder, "nano.pt"), args.device))
    if args.weights != "imagenet":
        return None if args.weights == "none" else load_file(args.weights)
    if args.backbone not in IMAGENET:
        raise InputError(f"no ImageNet weights are known for the backbone {args.backbone!r}; there "
                         f"are for {', '.join(IMAGENET)}; or give a file's path")
    url = IMAGENET[args.backbone]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:  # urllib's URLError is one
        raise InputError(f"cannot download the weights ({error}); fetch {url} elsewhere and put "
                         f"it into {torch.hub.get_dir()}/checkpoints") from None

def load_file(path):
    """torch.load for tensors alone: a file from a stranger cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no weights at {path}; check the path, or give 'imagenet'") from None
    except Exception as error:  # what torch raises for a file that is none is not documented
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a checkpoint of tensors ({reason})") from None

@torch.random.fork_rng()  # a run that finds it done starts from the same random state
def pretrain_nano(path, device, steps=700, batch=32, lr=1e-3):
    """What ImageNet is to the paper's backbone: the nano Swin-V2 learns 60 kinds of toy IMAGES.

    No sound is involved. Done once; returns the path of the weights.
    """
    if os.path.exists(path):
        return path
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    backbone = lavish.swin_v2("nano").to(device)
    head = nn.Linear(backbone.dims[-1], 60).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    mean, std = (torch.tensor(v, device=device)[:, None, None]
                 for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    right = []
    for _ in bar(range(steps), "pretraining nano on toy images"):
        images, labels = data.toy_images(batch, backbone.image_size, rng)
        logits = head(backbone((images.to(device) / 255 - mean) / std)[-1].mean(1))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels.to(device)).backward()
        optimizer.step()
        schedule.step()
        right.append((logits.argmax(1).cpu() == labels).float().mean().item())
    print(f"nano pretrained on toy images: {np.mean(right[-100:]):.3f} right, of 60 kinds")
    data.save_atomic(backbone.cpu().state_dict(), path)
    return path

def prepare(args, model):
    """What the options ask of a model: -> (what to call in training, the optimiser)."""
    model.to(args.device)
    if args.precision == "bf16":
        for module in model.modules():
            if isinstance(module, lavish.WindowAttention):
                module.bias()  # kept from here on, in fp32
        model.forward = torch.autocast(args.device.split(":")[0], torch.bfloat16)(model.forward)
    if args.compile:  # block by block: blocks of one shape share the compiled code
        model.net.update = torch.compile(model.net.update)
    in_net = {id(p) for p in model.net.parameters()}
    head = [p for p in model.parameters() if id(p) not in in_net]
    optimizer = torch.optim.Adam([{"params": trainable(model.net), "lr": args.lr},
                                  {"params": head, "lr": args.head_lr}])
    if not dist.is_initialized():
        return model, optimizer
    # It averages the gradients of what is trainable. Batch norms see their own process's clips.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False), optimizer

def settle(model):
    """Ready to score: the first process's batch-norm statistics on all, as in its checkpoint."""
    model.eval()
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

def gather(items):
    """The items of all processes, in the order of the data set: process r has every r-th one."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

def process():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]

def open_data(args, kind, **settings):
    """The three splits and their loaders, with every file known to be there."""
    os.makedirs(args.out, exist_ok=True)
    sets = {split: kind(args.data, split, args.image_size, **settings)
            for split in ("train", "val", "test")}
    loaders, (rank, processes) = {}, process()
    for split, dataset in sets.items():
        if short := data.check_files(dataset):
            print(f"{len(short)} {split} sounds end early: silence follows, first {short[0]}")
        if args.cache:
            dataset = [dataset[i] for i in bar(range(len(dataset)), f"read {split}")]
        # The order of an epoch follows from the seed and the epoch's number. Nothing is drawn when
        # an item is read, so that the number of workers does not matter.
        sampler = (torch.utils.data.DistributedSampler(dataset, processes, rank, seed=args.seed)
                   if split == "train" else range(rank, len(dataset), processes))
        loaders[split] = torch.utils.data.DataLoader(
            dataset, args.batch_size, sampler=sampler, num_workers=args.workers,
            persistent_workers=args.workers > 0, pin_memory=args.device != "cpu")
    return sets, loaders

def end_epoch(args, model, optimizer, log, losses, val, best, start):
    """Log an epoch, keep the model if it is the best on val, decay. Returns the best val so far."""
    log.append({"epoch": len(log) + 1, "loss": float(np.mean(losses)), "val": val,
                "seconds": time.time() - start})
    print("epoch {epoch:3}   loss {loss:.4f}   val {val:.4f}   {seconds:5.1f} s".format(**log[-1]),
          "  best so far" if val > best else "", flush=True)
    if process()[0] == 0:
        if val > best:  # chosen on val; the released AVE and AVS code choose on test
            data.save_atomic({"settings": vars(args), "trained": lavish.trained_state_dict(model)},
                             os.path.join(args.out, "adapters.pt"))
        data.write_atomic(os.path.join(args.out, "log.jsonl"),
                          "".join(json.dumps(entry) + "\n" for entry in log).encode())
    for group in optimizer.param_groups:
        group["lr"] *= args.lr_decay
    return max(val, best)

def load_checkpoint(args, model):
    if dist.is_initialized():
        dist.barrier()  # until the first process has written it
    path = os.path.join(args.out, "adapters.pt")
    lavish.load_trained_state_dict(model, load_file(path)["trained"],
                                   f"{path} is of another configuration")

def finish(args, model, start, metric, test, table, **more):
    """Write result.json, print the closing table and the command to type next."""
    if process()[0]:
        return
    counts = lavish.count_parameters(model)
    seconds = time.time() - start
    result = {"task": args.task, "modality": args.modality, "metric": metric, "test": test,
              "seconds": seconds, "seed": args.seed, "trainable_parameters": counts[0],
              "total_parameters": counts[1], "settings": vars(args), **more,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "torchvision": torchvision.__version__,
                           "torchaudio": torchaudio.__version__, "numpy": np.__version__}}
    data.write_atomic(os.path.join(args.out, "result.json"), json.dumps(result, indent=1).encode())
    print()
    for text, score in table.items():
        print(f"{text:45} {score:.4f}")
    print(f"{'trainable of all parameters':45} {counts[0]:,} of {counts[1]:,}\n"
          f"{'time':45} {seconds:.0f} s\n\n"
          f"{args.out} holds adapters.pt, log.jsonl, result.json")

def command_line():
    """The parser of all commands."""
    net = argparse.ArgumentParser(add_help=False)  # what a net is made of
    option = net.add_argument
    option("--backbone", help=", ".join(lavish.SWIN_V2))
    option("--weights", help="imagenet, none, toy (nano on toy images), or a checkpoint's path")
    option("--image-size", type=positive, help="pixels a side, of frames and spectrograms")
    option("--reduction", type=positive, help="width of a stage over width of its bottleneck")
    option("--groups", type=positive, help="groups of the bottleneck's convolutions")
    option("--modality", choices=("av", "v", "a"), default="av",
           help="v or a: the other stream is out, adapters and all")
    option("--drop-path", type=float, default=0.0,
           help="stochastic depth of the frozen backbone (0.1 in the released code)")
    option("--batch-size", type=positive, help="clips in a step, of each process")
    option("--precision", choices=("fp32", "bf16"), help="bf16: autocast; the default on a GPU")
    option("--compile", action="store_true", help="torch.compile; the first step takes minutes")
    option("--checkpoint-activations", action="store_true",
           help="about half the memory, for a third more computing")
    option("--seed", type=int, default=0)
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run = argparse.ArgumentParser(add_help=False, parents=[net])  # and how it is trained
    option = run.add_argument
    option("--latents", type=positive, help="latent tokens per adapter")
    option("--data", help="data set folder; toy data if not given, made where absent")
    option("--lr", type=float, help="of the adapters")
    option("--head-lr", type=float, help="of the head")
    option("--lr-decay", type=float, help="factor on both after each epoch; 1 in the paper")
    option("--epochs", type=positive)
    option("--workers", type=int, help="processes that load data")
    option("--cache", action="store_true", help="keep decoded clips in memory; on for toys")
    option("--out", help="folder for the results")

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("ave", parents=[run], help="audio-visual event localisation")
    avs = tasks.add_parser("avs", parents=[run], help="audio-visual segmentation")
    avs.add_argument("--channels", type=positive, help="width of the mask decoder")
    avqa = tasks.add_parser("avqa", parents=[run], help="audio-visual question answering")
    avqa.add_argument("--hidden", type=positive, help="width of the head")
    avqa.add_argument("--moments", type=positive, help="seconds taken from a video")
    cost = tasks.add_parser("bench", parents=[net], help="speed and memory on random data")
    cost.add_argument("head", choices=("ave", "avs", "avqa", "loader"), help="what to measure")
    cost.add_argument("--latents", type=positive, nargs="+", help="a row for each")
    cost.add_argument("--repeat", type=positive, default=3, help="measured steps")
    cost.add_argument("--baseline", action="store_true", help="the released way as well")
    cost.add_argument("--data", default="toy/ave", help="for the loader")
    cost.add_argument("--workers", type=int, default=2, help="for the loader")
    cost.add_argument("--out", help="a JSON file for the figures")
    return parser

def parse(arguments=None):
    """The settings: what the command line gives, and for the rest the recipe of task and data."""
    args = command_line().parse_args(arguments)
    if args.precision is None:
        gpu = args.device.startswith("cuda") and torch.cuda.is_available()
        args.precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    if args.task == "bench":
        recipe = RECIPES["ave" if args.head == "loader" else args.head, "real"]
        return fill(args, {**recipe, "weights": "none", "batch_size": 1,
                           "latents": [recipe["latents"]]})
    if args.data is None:
        args.data = f"toy/{args.task}"
        if not os.path.exists(args.data):
            print(f"no {args.data} yet: making the toy data")
            data.make_toy(args.task, args.data)
    toy = os.path.exists(os.path.join(args.data, "toy.json"))
    args.cache = args.cache or toy
    args.out = args.out or f"runs/{args.task}"
    return fill(args, RECIPES[args.task, "toy" if toy else "real"])

def keep_memory():
    """glibc gives large tensors back to the system at once and gets new ones page by page, zeroed:
    up to a fifth of a step on a CPU. Told so, it keeps them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: freed memory stays

def positive(text):
    """An argparse type; the message names it."""
    if int(text) < 1:
        raise ValueError
    return int(text)

def fill(args, recipe):
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return args

def main(arguments=None):
    try:
        keep_memory()
        if "RANK" in os.environ:  # torchrun started several of us
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        rank, processes = process()
        if rank:
            sys.stdout = open(os.devnull, "w")
            dist.barrier()  # the first one makes toy data and weights, if any
        args = parse(arguments)
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here; leave the option out")
        if processes > 1:
            if args.device == "cuda":
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            load_weights(args)
            if rank == 0:
                dist.barrier()
        {"ave": train_ave, "avs": train_avs, "avqa": train_avqa, "bench": bench}[args.task](args)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is read-only
        # From a worker process the message comes with its trace; the last line is ours.
        line = str(error).rstrip().split("\n")[-1].removeprefix("lavish.InputError: ")
        print(f"train.py: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the best epoch so far is in --out", file=sys.stderr)
        sys.exit(130)

if __name__ == "__main__":
    main()
