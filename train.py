# SPDX-License-Identifier: MIT
"""Training: one plain loop per task, from data to test score.

    python train.py ave                              the toy, from nothing
    python train.py ave --data AVE_Dataset           the paper's experiment
    python train.py eval runs/ave --split test       score a trained run
    python train.py predict runs/ave VIDEO.mp4       a trained run on videos
    python train.py report runs/*                    mean and spread of runs
    python train.py bench ave --latents 1 2 4        cost, on random data

The tasks are ave, avs, avqa, ucf101. What is not given comes from the recipe
below: the toy's for toy data, the supplementary's for any other. A run leaves
in --out adapters.pt (what was trained, at the best epoch on val), log.jsonl,
result.json and, until it is done, state.pt for --resume.

  data    --data D (toy/TASK, made if absent)   --workers N   --seed N
          --cache: keep decoded clips in memory; on for toys
          --extra-audio FILE: ave, features beside the sound's, .npy or .h5
  model   --backbone NAME of lavish.BACKBONES   --image-size S, in pixels
          --weights: imagenet, none, toy (nano's), or a file's path
          --modality: av, or v or a: one stream alone
          --latents M of an adapter (bench: M ...)   --groups G of convolutions
          --reduction R: width of a stage over that of its bottleneck
          --drop-path P: stochastic depth of the frozen backbone
  steps   --epochs N   --batch-size B of each process   --out O   --resume
          --lr --head-lr: Adam's; --lr-decay: factor on both after each epoch
  cost    --precision: fp32, or bf16 (autocast), the default on a GPU
          --compile: minutes at first, faster then   --device D
          --checkpoint-activations: less memory, more time
          bench --repeat N measured steps   --baseline: the released way as well
  others  eval --split: train, val, test   predict --question Q, with avqa"""
import argparse, collections, ctypes, importlib.util, json, multiprocessing, os, platform, shlex
import sys, tempfile, textwrap, time

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import torchaudio, torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
import data, lavish
from lavish import InputError, require

# The supplementary's. It gives no epochs; others saw the best one early (the authors' issue 25).
PAPER = dict(backbone="large", weights="imagenet", latents=16, reduction=4, groups=2, lr_decay=1.0,
             epochs=20, channels=256, hidden=512, moments=10, workers=4)  # the heads
# The same adapters on the toy backbone; a net this small wants larger steps.
TOY = dict(PAPER, backbone="nano", weights="toy", batch_size=8, channels=64, hidden=128, workers=0)
RECIPES = {
    ("ave", "real"): dict(PAPER, latents=2, reduction=8, batch_size=2, lr=5e-6, head_lr=4e-6),
    ("avs", "real"): dict(PAPER, batch_size=4, lr=1e-4, head_lr=1e-4),
    ("avqa", "real"): dict(PAPER, batch_size=1, lr=8e-5, head_lr=3e-6, epochs=10),
    # Of UCF101 only reduction and groups follow from the paper (its 7.4M); the rest is our guess.
    ("ucf101", "real"): dict(PAPER, backbone="videomae", weights="none", latents=2, batch_size=4,
                             lr=1e-4, head_lr=1e-3),
    ("ave", "toy"): dict(TOY, latents=2, reduction=8, lr=2e-3, head_lr=1e-3, epochs=7),
    ("avs", "toy"): dict(TOY, lr=3e-3, head_lr=1e-3, lr_decay=0.75, epochs=9),
    ("avqa", "toy"): dict(TOY, moments=2, lr=1.5e-3, head_lr=5e-4, lr_decay=0.9, epochs=8),
    ("ucf101", "toy"): dict(TOY, backbone="videomae_nano", weights="none",  # random does here
                            latents=2, lr=2e-3, head_lr=1e-3, epochs=8)}

# ---------------------------------------------------------------- AVE
def train_ave(args):
    """Audio-visual event localisation: settings -> result.json."""
    run = Run(args)  # data, model and optimiser
    while len(run.log) < args.epochs:  # the log has an entry for each that is done
        for frames, spectrograms, labels, *extra in run.batches():
            logits = run.forward(frames, spectrograms, *extra)                 # (B,10,29)
            # As released: binary cross-entropy of the softmax against the one-hot label.
            targets = F.one_hot(labels, logits.shape[-1]).float()              # (B,10,29)
            run.step(F.binary_cross_entropy(logits.softmax(-1), targets))
        run.end_epoch()  # scores on val, and keeps the best
    run.finish("accuracy per second")  # scores the best on test

def score_ave(args, model, loader):
    """-> (accuracy over all seconds, what to print: confusions as shares of all, what to keep)."""
    found, true = [], []
    for frames, spectrograms, labels, *extra in data.bar(loader, "score"):
        logits = model(*(x.to(args.device) for x in (frames, spectrograms, *extra)))
        found += logits.argmax(-1).tolist()                                    # (B,10) each
        true += labels.tolist()
    found, true = torch.tensor(gather(found)), torch.tensor(gather(true))      # (clips,10) each
    names, wrong = [*args.classes, "background"], found != true
    pairs = collections.Counter(zip(true[wrong].tolist(), found[wrong].tolist())).most_common(5)
    score, background = (x.float().mean().item() for x in (~wrong, true == len(args.classes)))
    return score, {**{f"{names[a]}, called {names[b]}": n / true.numel() for (a, b), n in pairs},
                   f"accuracy, {len(true)} clips x {true.shape[1]} s": score,
                   "if all were called background": background,
                   "if every clip's event filled it": 1 - background}, {}

def predict_ave(args, model, frames, spectrograms, path):
    """Prints the event of each second, and draws frames, spectrograms and events as a strip."""
    p, event = model(frames[None], spectrograms[None])[0].softmax(-1).max(-1)  # (T,) each
    names = [[*args.classes, "background"][k] for k in event]
    for t, (name, share) in enumerate(zip(names, p)):
        print(f"{t:4} to {t + 1:2} s  {name:40} {share:.2f}")
    text = torch.stack([caption(f"{name} {share:.2f}") for name, share in zip(names, p)])
    write_grid([see(frames), hear(spectrograms), text], 10, path)

# ---------------------------------------------------------------- AVS
def train_avs(args):
    """Audio-visual segmentation: settings -> result.json, and the first test clip as test.png."""
    run = Run(args)
    while len(run.log) < args.epochs:
        for frames, spectrograms, masks in run.batches():
            # S4 has a mask of the first frame only, so no other one is decoded to the end.
            logits = run.forward(frames, spectrograms, True)                   # (B,1,H,W)
            run.step(F.binary_cross_entropy_with_logits(logits, masks))  # masks (B,1,H,W)
        run.end_epoch()
    run.finish("mean IoU")
    if process()[0] == 0:
        clip = (x.to(args.device) for x in run.loaders["test"].dataset[0][:2])
        predict_avs(args, run.model, *clip, os.path.join(args.out, "test.png"))

def score_avs(args, model, loader):
    """-> (mean IoU over all frames of a split, what to print, what else to keep)."""
    ious, fs, per_category = [], [], {}
    for frames, spectrograms, masks in data.bar(loader, "score"):
        logits = model(frames.to(args.device), spectrograms.to(args.device)).cpu().flatten(0, 1)
        ious += mask_iou(logits, masks.flatten(0, 1)).view(len(masks), -1).mean(1).tolist()
        fs.append(f_scores(logits, masks.flatten(0, 1)))                       # (n,255)
    ious, fs = gather(ious), torch.cat(gather([torch.cat(fs)]))                # (frames,255)
    # AVSBench maximises per batch and averages that: its score rises as batches get smaller.
    f_score = (fs.sum(0) / max(len(fs), 1)).max().item()
    for iou, (_, category) in zip(ious, loader.dataset.clips):
        per_category.setdefault(f"mean IoU of {category}", []).append(iou)
    score = float(np.mean(ious))
    return score, {**{key: float(np.mean(per_category[key])) for key in sorted(per_category)},
                   f"mean IoU, {len(ious)} clips x 5 frames": score,
                   "F score (beta^2 = 0.3)": f_score}, {"f_score": f_score}

def mask_iou(logits, masks):
    """Logits and 0/1 masks (N,H,W) -> IoU of each frame (N,), as AVSBench counts it: an empty
    mask scores the share of pixels predicted empty."""
    p, m = logits.flatten(1) > 0, masks.flatten(1) > 0                         # (N,H*W)
    iou = (p & m).sum(1) / (p | m).sum(1).clamp(min=1)
    return torch.where(m.any(1), iou, (~p).float().mean(1))

def f_scores(logits, masks, beta2=0.3, thresholds=255):
    """Logits, 0/1 masks (N,H,W) -> (1 + b) P R / (b P + R) of those with a mask, (n,thresholds)."""
    p, m = logits.sigmoid().flatten(1), masks.flatten(1)
    p, m = p[m.any(1)], m[m.any(1)]                                            # (n,H*W)
    # How many pixels, of all and of the mask, reach each threshold: a histogram from the top.
    level = torch.bucketize(p, torch.linspace(0, 1, thresholds), right=True)
    counts = torch.zeros(2, len(p), thresholds + 1).scatter_add_(
        2, level.expand(2, -1, -1), torch.stack([m, torch.ones_like(m)]))
    hits, found = counts.flip(2).cumsum(2).flip(2)[..., 1:]                    # (n,thresholds)
    return (1 + beta2) * hits / (beta2 * m.sum(1, keepdim=True) + found)  # P hits/found, R hits/m

@torch.no_grad()
def predict_avs(args, model, frames, spectrograms, path):
    """Draws frames, spectrograms, and frames with what sounds in white; five seconds are a clip."""
    clips = zip(frames[None].split(5, 1), spectrograms[None].split(5, 1))      # (1,5,...) each
    logits = torch.cat([model(*clip)[0] for clip in clips])                    # (T,H,W)
    write_grid([see(frames), hear(spectrograms), mark(frames, logits)], 5, path)

# ---------------------------------------------------------------- AVQA
def train_avqa(args):
    """Audio-visual question answering: settings -> result.json."""
    run = Run(args)
    while len(run.log) < args.epochs:
        for frames, spectrograms, question, answer, foreign in run.batches():
            logits, match = run.forward(frames, spectrograms, question, foreign)
            loss = F.cross_entropy(logits, answer)  # of (B,answers)
            if match is not None:  # does this frame go with this sound? 1 for the real half
                real = torch.arange(len(match), device=args.device) < len(match) // 2
                loss = loss + 0.5 * F.cross_entropy(match, real.long())
            run.step(loss)
        run.end_epoch()
    run.finish("accuracy")

def score_avqa(args, model, loader):
    """-> (accuracy over all questions, what to print: by type, and what the words alone would score
    by the commonest training answer to the same words, or to any; what else to keep)."""
    right, questions, by_type = [], loader.dataset.questions, collections.defaultdict(list)
    for *inputs, answer in (batch[:4] for batch in data.bar(loader, "score")):
        found = model(*(x.to(args.device) for x in inputs))[0].argmax(-1)      # (B,)
        right += (found.cpu() == answer).tolist()
    score = float(np.mean(right := gather(right)))
    for is_right, (modality, kind) in zip(right, (q["type"] for q in questions)):
        for key in (f"{modality} {kind}", f"{modality} average"):
            by_type[key].append(is_right)
    table = {f"{key} ({len(x)})": float(np.mean(x)) for key, x in sorted(by_type.items())}
    answers = collections.defaultdict(collections.Counter)
    for q in data.read_questions(os.path.join(args.data, "avqa-train.json")):
        for words in (tuple(q["words"]), "any"):
            answers[words][q["answer"]] += 1  # how often each was right
    guesses = [answers.get(tuple(q["words"]), answers["any"]).most_common(1)[0][0]
               for q in questions]
    words_alone = float(np.mean([a == q["answer"] for a, q in zip(guesses, questions)]))
    return score, {**table, f"accuracy, {len(right)} questions": score,
                   "from the words of the question alone": words_alone}, {"per_type": table}

def predict_avqa(args, model, frames, spectrograms, asked):
    """Prints the three likeliest answers."""
    words = asked.strip().rstrip("?\uff1f").split(" ")  # a "?", or the full-width one of the data
    question = data.encode(words, args.vocabulary)[None].to(args.device)       # (1,W)
    p = model(frames[None], spectrograms[None], question)[0][0].softmax(-1)    # (answers,)
    for share, k in zip(*p.topk(min(3, len(p)))):
        print(f"  {args.vocabulary['answers'][k]:40} {share:.2f}")

# ---------------------------------------------------------------- UCF101
def train_ucf101(args):
    """Action recognition: settings -> result.json."""
    run = Run(args)
    while len(run.log) < args.epochs:
        for frames, spectrograms, label, _ in run.batches():
            run.step(F.cross_entropy(run.forward(frames, spectrograms), label))
        run.end_epoch()
    run.finish("accuracy")

def score_ucf101(args, model, loader):
    """-> (accuracy over all clips, what to print: also of those with sound and without, {})."""
    found = []  # (is it right, has it sound) of each clip
    for frames, spectrograms, label, audible in data.bar(loader, "score"):
        action = model(frames.to(args.device), spectrograms.to(args.device)).argmax(-1).cpu()
        found += zip((action == label).tolist(), audible.tolist())
    right, audible = np.array(gather(found)).T                                 # (clips,) each
    table = {f"accuracy, {len(right[chosen])} clips {kind}": float(right[chosen].mean())
             for kind, chosen in (("without sound", ~audible), ("with sound", audible),
                                  ("in all", audible | True)) if chosen.any()}
    return float(right.mean()), table, {}

# ---------------------------------------------------------------- what the loops share
class Run:
    """A model in training, and what is kept of it after each epoch. state.pt holds all that
    --resume needs to go on, bit for bit on one machine with one process."""
    def __init__(self, args):
        self.args, self.start, self.loaders = args, time.time(), open_data(args)
        self.model = build(args)
        self.forward, self.optimizer = prepare(args, self.model)
        self.log, self.best, self.state = [], -1.0, os.path.join(args.out, "state.pt")
        require(args.resume or not os.path.exists(self.state), f"{self.state} is of a run that is "
                "not done: add --resume to go on, or choose another --out")
        if args.resume:
            self.resume()
    def resume(self):
        """Back to the end of the last epoch that state.pt knows."""
        saved, now = data.load_file(self.state), vars(self.args)
        other = {key for key in now if now[key] != saved["settings"].get(key)}
        other -= {"out", "resume", "epochs", "workers", "cache", "data"}
        require(not other, f"{self.state} is of a run with other settings: {', '.join(other)}")
        lavish.load_trained_state_dict(self.model, saved["trained"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.log, self.best = saved["log"], saved["best"]
        self.start -= sum(entry["seconds"] for entry in self.log)  # time spent so far counts
        torch.set_rng_state(saved["random"])  # of dropout and stochastic depth
        torch.cuda.set_rng_state_all(saved["random_cuda"])
    def batches(self):
        """The batches of an epoch, on the device; the model is in training."""
        self.epoch_start, self.losses, epoch = time.time(), [], len(self.log) + 1
        loader = self.loaders["train"]
        self.model.train()
        loader.sampler.set_epoch(epoch)  # another order in each
        for batch in data.bar(loader, f"epoch {epoch}/{self.args.epochs}"):
            yield [x.to(self.args.device) for x in batch]
    def step(self, loss):
        """One step of Adam; a loss that is not finite ends the run before it does harm."""
        self.losses.append(loss.item())  # waits for a GPU
        require(np.isfinite(self.losses[-1]), f"the loss is {self.losses[-1]} in epoch "
                f"{len(self.log) + 1}, step {len(self.losses)}; try a lower --lr")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
    def end_epoch(self):
        """Scores on val, logs, decays; keeps the state, and the model if it is the best so far."""
        args, val = self.args, score(self.args, self.model, self.loaders["val"])[0]
        self.log.append({"epoch": len(self.log) + 1, "loss": float(np.mean(self.losses)),
                         "val": val, "seconds": time.time() - self.epoch_start})
        print("epoch {epoch:3}   loss {loss:.4f}   val {val:.4f}   {seconds:5.1f} s".format(
            **self.log[-1]), "  best so far" if val > self.best else "", flush=True)
        for group in self.optimizer.param_groups:
            group["lr"] *= args.lr_decay
        better, self.best = val > self.best, max(val, self.best)
        if process()[0]:
            return
        kept = {"settings": vars(args), "trained": lavish.trained_state_dict(self.model)}
        if better:  # chosen on val; the released AVE and AVS code choose on test
            data.save_atomic(kept, os.path.join(args.out, "adapters.pt"))
        data.write_lines(map(json.dumps, self.log), os.path.join(args.out, "log.jsonl"))
        data.save_atomic({
            **kept, "log": self.log, "best": self.best, "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all()}, self.state)  # [] without a GPU
    def finish(self, metric):
        """Tests the best epoch's model; result.json, a table, and the command to type next."""
        args, (trained, total) = self.args, lavish.count_parameters(self.model)
        if dist.is_initialized():
            dist.barrier()  # until the first process has written it
        load_checkpoint(args, self.model)
        loader = self.loaders["test"]
        flops, (test, table, more) = count_flops(lambda: score(args, self.model, loader))
        if process()[0]:
            return
        seconds, out = time.time() - self.start, shlex.quote(args.out)
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, torchaudio, np)}
        result = {"task": args.task, "modality": args.modality, "metric": metric, "test": test,
                  "seconds": seconds, "seed": args.seed, "trainable_parameters": trained,
                  "total_parameters": total, "settings": vars(args), **more,
                  "gflop": flops / len(loader.sampler) / 1e9,
                  "versions": {"python": platform.python_version(), **versions}}
        data.write_lines([json.dumps(result, indent=1)], os.path.join(args.out, "result.json"))
        os.remove(self.state)  # nothing is left to resume
        print("\ntest", *(f"{text:45} {value:.4f}" for text, value in table.items()), sep="\n")
        print(f"{'trainable of all parameters':45} {trained:,} of {total:,}\n"
              f"{'time':45} {seconds:.0f} s\n\n{out} holds adapters.pt, log.jsonl, result.json\n"
              f"Next: python train.py eval {out}")

def load_checkpoint(args, model):
    """The best epoch's adapters and head, from --out into a model of the same settings."""
    trained = data.load_file(path := os.path.join(args.out, "adapters.pt"))["trained"]
    lavish.load_trained_state_dict(model, trained, f"{path} is of another configuration")

@torch.no_grad()
def score(args, model, loader):
    """-> (score, {text: number} to print, what else to keep), of all processes together."""
    model.eval()
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)  # the statistics of the first process, as in its checkpoint
    return SCORE[args.task](args, model, loader)

def gather(items):
    """The items of all processes, in the order of the data set: process r has every r-th one."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()  # a list of each process
    dist.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

def process():  # -> (rank, number of processes)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

SCORE = {"ave": score_ave, "avs": score_avs, "avqa": score_avqa, "ucf101": score_ucf101}
PREDICT = {"ave": predict_ave, "avs": predict_avs, "avqa": predict_avqa}

# ---------------------------------------------------------------- model and data, by the settings
def build_net(args):  # the frozen backbone with its adapters
    require(args.task == "ucf101" or "videomae" not in args.backbone, "VideoMAE is for ucf101")
    backbone = lavish.make_backbone(args.backbone, args.image_size)
    if weights := load_weights(args):
        lavish.load_pretrained(backbone, weights)
    try:
        return lavish.Lavish(backbone, args.latents, args.reduction, args.groups, args.modality,
                             args.drop_path, args.checkpoint_activations)
    except ValueError as error:  # the adapter's own words about its dim
        raise InputError(f"--reduction and --groups do not fit {args.backbone}: {error}") from None

def build(args):
    """The model of a task."""
    torch.manual_seed(args.seed)  # adapters and head start from it
    net, words = build_net(args), vars(args).get("vocabulary")  # of AVQA alone
    scale = lambda *widths: [int(w * args.channels / 256) for w in widths]  # all of the decoder
    heads = {
        "ave": lambda: lavish.AVE(net, len(args.classes) + 1, extra=128 * bool(args.extra_audio)),
        "avs": lambda: lavish.AVS(net, args.mask_size, args.channels, scale(64, 128, 320, 512),
                                  scale(128, 32)),
        "avqa": lambda: lavish.AVQA(net, len(words["words"]), len(words["answers"]), args.hidden),
        "ucf101": lambda: lavish.UCF101(net, len(args.classes))}
    return heads[args.task]()

def load_weights(args):
    """The backbone's state dict by --weights: None for "none", nano's own for "toy", the published
    ones for "imagenet" (kept in torch.hub's folder and taken from there next time), or a file."""
    if args.weights == "toy":  # beside the toy data sets, for all of them
        file = os.path.join(os.path.dirname(os.path.abspath(args.data)), "nano.pt")
        return data.load_file(pretrain_nano(file, args.device))
    if args.weights != "imagenet":
        return None if args.weights == "none" else data.load_file(args.weights)
    name = lavish.BACKBONES[args.backbone][-1]
    require(name, f"no ImageNet weights known of {args.backbone!r}; give a file's path")
    url = ("https://github.com/SwinTransformer/storage/releases/download/v2.0.0/swinv2_"
           f"{name}_patch4_window12_192_22k.pth" if name in ("base", "large") else
           torchvision.models.get_model_weights(name).DEFAULT.url)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:  # urllib's URLError is one
        raise InputError(f"cannot download the weights ({error}); fetch {url} elsewhere and put "
                         f"it into {torch.hub.get_dir()}/checkpoints") from None

@torch.random.fork_rng()  # a run that finds it done starts from the same random state
def pretrain_nano(path, device, steps=700, batch=32, lr=1e-3):
    """In ImageNet's place: the nano Swin-V2 learns 60 kinds of toy IMAGES, no sound. Done once."""
    if os.path.exists(path):
        return path
    torch.manual_seed(0)
    rng, right = np.random.default_rng(0), []
    backbone = lavish.make_backbone("nano").to(device)
    head = nn.Linear(backbone.dims[-1], 60).to(device)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr,
                                  weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in data.bar(range(steps), "pretraining nano on toy images"):
        images, labels = data.toy_images(batch, backbone.image_size, rng)
        images = torchvision.transforms.functional.normalize(
            images.to(device) / 255, data.IMAGENET_MEAN, data.IMAGENET_STD)
        logits = head(backbone(images)[-1].mean(1))                            # (batch,60)
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
        # Autocast keeps no casts of frozen weights: it would cast them anew in every pass.
        for name, parameter in model.net.backbone.named_parameters():
            if parameter.dim() > 1 and "cpb_mlp" not in name and "logit_scale" not in name:
                parameter.data = parameter.data.bfloat16()
        model.forward = torch.autocast(args.device.split(":")[0], torch.bfloat16)(model.forward)
    if args.compile:  # block by block, each of which is compiled for itself
        torch._dynamo.config.cache_size_limit = 100
        model.net.update = torch.compile(model.net.update)  # see Lavish.update
    adapters = [p for p in model.net.parameters() if p.requires_grad]  # the backbone is frozen
    head = [p for name, p in model.named_parameters() if not name.startswith("net.")]
    optimizer = torch.optim.Adam([{"params": adapters, "lr": args.lr},
                                  {"params": head, "lr": args.head_lr}])
    if dist.is_initialized():  # averages gradients; batch norms see their own process's clips
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return model, optimizer

def open_split(args, split):
    """One split, with every file known to be there. What a model must know of its data (its `fact`
    and the spectrograms' statistics) becomes part of the settings, and so of the checkpoint."""
    known, fact = vars(args), data.DATASETS[args.task].fact
    more = {"ave": ["extra_audio"], "avqa": ["vocabulary", "moments"]}.get(args.task, [])
    dataset = data.DATASETS[args.task](args.data, split, args.image_size,
                                       **{key: known.get(key) for key in more})
    dataset.stats = known.setdefault("stats", dataset.stats)
    found, known[fact] = data.survey(dataset), vars(dataset)[fact]
    if missing := found["missing"]:
        raise InputError(f"{len(missing)} of {len(data.one_per_sound(dataset))} clips lack files, "
                         f"first {missing[0]}; {dataset.remedy}")
    if short := found["short"]:
        print(f"{len(short)} {split} sounds end early: silence follows, first {short[0]}")
    return dataset

def open_data(args):
    """The loaders of the three splits."""
    os.makedirs(args.out, exist_ok=True)
    loaders, (rank, processes) = {}, process()  # what is scored is dealt out in turn
    for split in ("train", "val", "test"):
        dataset = open_split(args, split)
        if args.cache:  # a toy clip is read once, not once per epoch
            dataset.kept = [dataset[i] for i in data.bar(range(len(dataset)), f"read {split}")]
        # An epoch's order follows from seed and number; nothing is drawn when an item is read.
        sampler = (torch.utils.data.DistributedSampler(dataset, processes, rank, seed=args.seed)
                   if split == "train" else range(rank, len(dataset), processes))
        loaders[split] = torch.utils.data.DataLoader(
            dataset, args.batch_size, sampler=sampler, num_workers=args.workers,
            persistent_workers=args.workers > 0, pin_memory=args.device != "cpu")
    return loaders

# ---------------------------------------------------------------- a trained run
def load_run(args):
    """(settings, model) of the folder args.run, which training left, on --device."""
    run = argparse.Namespace(**data.load_file(os.path.join(args.run, "adapters.pt"))["settings"])
    run.device, run.out, run.compile = args.device, args.run, False  # not as it was trained
    model = build(run)
    prepare(run, model)  # device and precision
    load_checkpoint(run, model)
    return run, model.eval()

def evaluate(args):
    """Scores a trained run on a split of its data set, or of another one with the same classes."""
    run, model = load_run(args)
    run.data, fact = args.data or run.data, data.DATASETS[run.task].fact
    known, dataset = vars(run)[fact], open_split(run, args.split)  # of training, of this split
    require(known == vars(dataset)[fact], f"{run.data} has other {fact} than {args.run} knows")
    loader = torch.utils.data.DataLoader(dataset, run.batch_size, num_workers=args.workers or 0)
    print(*(f"{t:45} {value:.4f}" for t, value in score(run, model, loader)[1].items()), sep="\n")
    print(f"Next, beside other runs: python train.py report {shlex.quote(args.run)} RUN ...")

@torch.no_grad()
def predict(args):
    """A trained run on videos as they come, through a temporary extraction."""
    run, model = load_run(args)
    require(run.task in PREDICT and not vars(run).get("extra_audio"),
            "predict is for ave (without --extra-audio), avs and avqa")
    require((run.task == "avqa") == bool(args.question), "--question goes with avqa, always")
    for video in args.video:
        with tempfile.TemporaryDirectory() as folder:
            name = data.extract_video(video, folder)
            paths, wav = data.video_files(folder, name)
            seconds = data.seconds_of(data.read_wav(wav), len(paths))          # (T,16000)
            if run.task == "avqa":
                at = data.moments(len(paths), run.moments)
                paths, seconds = [paths[k] for k in at], seconds[at]
            clip = data.read_clip(paths, seconds, run.image_size, run.stats)
        print(video)
        PREDICT[run.task](run, model, *(x.to(run.device) for x in clip), args.question or
                          os.path.join(args.out or "", f"{name}-{run.task}.png"))
    print(f"Next, on a data set: python train.py eval {shlex.quote(args.run)} --data FOLDER")

# Scores of the paper's Table 1 and the supplementary's Tables 2 and 3.
PUBLISHED = {("ave", "v"): 0.753, ("ave", "av"): 0.811, ("ave", "av", "VGGish"): 0.824,
             ("avs", "v"): 0.721, ("avs", "av"): 0.801, ("avqa", "v"): 0.632, ("avqa", "av"): 0.771,
             ("ucf101", "av"): 0.926}

def report(args):
    """Runs grouped by what differs between them, but for seeds: the mean of the test scores, its
    spread and count, with parameters, GFLOP of a clip and seconds, beside the paper's score."""
    runs = []
    for path in (os.path.join(run, "result.json") for run in args.runs):
        try:
            result = json.loads("\n".join(data.read_lines(path)))
            runs.append({**result["settings"], **result})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no result of a run ({error!r}); leave it out") from None
    keys = ("backbone image_size weights data latents reduction groups extra_audio precision "
            "drop_path lr head_lr batch_size").split()  # those that vary are shown
    varied = [key for key in keys if len({(run["task"], str(run.get(key))) for run in runs}) >
              len({run["task"] for run in runs})]  # within a task
    names = lambda run: tuple(str(run.get(key)) for key in ("task", "modality", *varied))
    print(*(f"{key:10}" for key in ("task", "modality", *varied)),
          "    test  +- std   n  trainable   GFLOP seconds  paper")
    for group in sorted({names(run) for run in runs}):
        some = [run for run in runs if names(run) == group]
        first, tests = some[0], [run["test"] for run in some]  # one per seed
        case = group[:2] + ("VGGish",) * bool(first.get("extra_audio"))
        spread = f"{np.std(tests, ddof=1):7.3f}" if len(tests) > 1 else "      -"
        print(*(f"{name:10}" for name in group), f"{np.mean(tests):8.3f} {spread} {len(tests):3} "
              f"{first['trainable_parameters'] / 1e6:9.2f}M {first.get('gflop', np.nan):7.2f} "
              f"{np.mean([run['seconds'] for run in some]):7.0f}  {PUBLISHED.get(case, '')}")

# ---------------------------------------------------------------- pictures: tiles (T,3,H,W) in 0..1
TILE = 112  # pixels a side

def see(frames):
    """Frames as read (T,3,S,S), without their normalisation."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return F.interpolate((frames.cpu() * std + mean).clamp(0, 1), (TILE, TILE), mode="bilinear")

def hear(spectrograms):
    """Spectrograms (T,S,S) as people draw them: time runs right and pitch up."""
    heard = (0.4 + spectrograms.cpu() / 3).clamp(0, 1).transpose(1, 2).flip(1)
    return F.interpolate(heard[:, None].expand(-1, 3, -1, -1), (TILE, TILE))   # (T,3,112,112)

def mark(frames, logits):
    """Frames under the white masks that the logits (T,H,W) say."""
    masks = F.interpolate(logits.cpu()[:, None], (TILE, TILE), mode="bilinear")[:, 0] > 0
    return torch.stack([torchvision.utils.draw_segmentation_masks(frame, mask, 0.7, "white")
                        for frame, mask in zip(see(frames), masks)])

def caption(text):  # on a white tile; torchvision writes beside boxes only
    box, paper = torch.tensor([[0, 0, TILE - 1, TILE - 1]]), torch.ones(3, TILE, TILE)
    return torchvision.utils.draw_bounding_boxes(paper, box, [textwrap.fill(text, 17)], "black")

def write_grid(rows, columns, path):
    """Rows of tiles, each broken after `columns`, as a PNG."""
    rows = [F.pad(row, [0] * 7 + [-len(row) % columns], value=1.0).split(columns) for row in rows]
    grid = torchvision.utils.make_grid(torch.cat(sum(zip(*rows), ())), columns, 4, pad_value=1)
    data.write_atomic(path, torchvision.io.encode_png((grid * 255).byte()).numpy().tobytes())
    print(f"drawn in {path}")

# ---------------------------------------------------------------- cost
def bench(args):
    """The cost of a task on random data: a row for each of --latents, with --baseline beside the
    released way of computing the same, each in a process of its own (for the peak of memory)."""
    print(args.head, args.backbone, f"batch {args.batch_size}", args.precision, args.device,
          "\n            GFLOP a clip  clips/s, median (min to max)               GB +  of matrix\n"
          "latents      eval  train  training           evaluation           weights       rate")
    rows, cases = [], [(m, False) for m in args.latents]
    if args.baseline:
        require(importlib.util.find_spec("pytest") and args.modality == "av",
                "--baseline is in the tests, for both streams: install pytest")
        cases.insert(0, (args.latents[0], True))
    for m, released in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(row := pool.apply(measure, (args, m, released)))
        speeds = ["{1:.3g} ({0:.3g}-{2:.3g})".format(*row[k]) for k in ("train", "eval")]
        print(f"{m:3} {'released' * released:8} {row['gflop']:6.1f} {row['step_gflop']:6.1f}  "
              f"{speeds[0]:18} {speeds[1]:18} {row['peak']:4.1f} +{row['weights']:4.1f} "
              f"{row['share']:4.0%}", flush=True)
    if args.baseline:
        old, new = ([row["train"][1], row["eval"][1], row["peak"]] for row in rows[:2])
        print("times the released: training {:.2f}, evaluation {:.2f}, peak memory {:.2f}".format(
            *np.divide(new, old)))
    if args.out:
        data.write_lines([json.dumps({"settings": vars(args), "rows": rows})], args.out)

def measure(args, latents, released):
    """One row of bench: a dict. share: of the machine's own rate of matrix products."""
    vars(args).update(task=args.head, latents=latents, classes=range(28), mask_size=224,
                      vocabulary={"words": range(93), "answers": range(42)}, extra_audio=None)
    start, B, S = peak_memory(args.device), args.batch_size, args.image_size  # before anything
    T = {"ave": 10, "avs": 5, "avqa": args.moments, "ucf101": 16}[args.task]
    if released:
        import test_lavish  # which proves that it computes the same
        test_lavish.as_released()
        args.precision, args.compile, args.checkpoint_activations = "fp32", False, False
    else:
        keep_memory(args.checkpoint_activations)
    with torch.device(args.device):
        model, heard = build(args), T // 2 if args.task == "ucf101" else T     # one for two frames
        inputs = [torch.randn(B, T, 3, S, S), torch.randn(B, heard, S, S)]
        inputs += [torch.ones(B, 14, dtype=torch.long)] * (args.task == "avqa")  # a long question
    # AVQA trains with foreign frames; AVS on the first one, though the release decodes them all.
    more = {"avqa": inputs[:1], "avs": [not released]}.get(args.task, [])
    forward, optimizer = prepare(args, model.train())
    def step():
        outputs = forward(*inputs, *more)
        outputs = outputs if isinstance(outputs, tuple) else [outputs]
        sum(x.square().mean() for x in outputs if x is not None).backward()
        optimizer.step()
        optimizer.zero_grad()
    row = {"latents": latents, "released": released, "train": speed(args, step)}
    row["weights"] = sum(t.nbytes for t in model.state_dict().values()) / 1e9  # GB
    row["peak"] = (peak_memory(args.device) - start) / 1e9 - row["weights"]    # beyond them
    model.eval()  # in which nothing is computed twice
    evaluation = torch.no_grad()(lambda: model(*inputs))
    row["eval"] = speed(args, evaluation)
    row["gflop"], row["step_gflop"] = (count_flops(f)[0] / B / 1e9 for f in (evaluation, step))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(4096, 4096, device=args.device, dtype=dtype)
    rate = speed(args, lambda: a @ a)[1] / B * 2 * 4096 ** 3 / 1e9             # GFLOP/s
    return {**row, "share": row["train"][1] * row["step_gflop"] / rate}

def count_flops(run):
    """(operations of the matrix products and convolutions in run(), what run() returns)"""
    torch.backends.mha.set_fastpath_enabled(False)  # the counter knows no fused attention on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return counter.get_total_flops(), result

def speed(args, run):
    """[least, median, most] clips a second over --repeat runs, after one to warm up."""
    clock = [time.perf_counter()]
    for _ in range(args.repeat + 1):
        run()
        if args.device != "cpu":
            torch.cuda.synchronize()  # a GPU answers before it is done
        clock.append(time.perf_counter())
    return [float(args.batch_size / q) for q in np.quantile(np.diff(clock)[1:], (1, 0.5, 0))]

def peak_memory(device):  # -> bytes, of the GPU or of this process
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not
    unit = 1 if sys.platform == "darwin" else 1024  # the Mac counts bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

# ---------------------------------------------------------------- the command line
def command_line():
    """The parser of all commands; what the options mean is said at the top."""
    text = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser, run = argparse.ArgumentParser(**text), "ave avs avqa ucf101"
    commands = parser.add_subparsers(dest="task", required=True, metavar="COMMAND")
    command = {name: commands.add_parser(name, **text)
               for name in f"{run} bench eval predict report".split()}
    def option(names, *flags, **settings):
        for name in names.split():
            for flag in flags:
                command[name].add_argument(flag, **settings)
    def positive(text):  # argparse's message names it
        if int(text) < 1:
            raise ValueError
        return int(text)
    option("bench", "head", choices=SCORE)
    option("eval predict", "run")
    option("predict", "video", nargs="+")
    option("report", "runs", nargs="+")  # folders that training left
    net = run + " bench"  # what has a network of its own
    option(run + " eval", "--data")  # the toy, or what the run had, if not given
    option(run + " eval", "--workers", type=int)
    option(run, "--cache", "--resume", action="store_true")
    option("ave", "--extra-audio")
    option(net, "--backbone", "--weights", "--out")
    option(net, "--image-size", "--reduction", "--groups", "--batch-size", type=positive)  # recipe
    option(run, "--latents", "--epochs", type=positive)
    option("bench", "--latents", type=positive, nargs="+")
    option(net, "--modality", choices=("av", "v", "a"), default="av")  # as in Table 1
    option(net, "--drop-path", type=float, default=0.0)  # 0.1 in the released code
    option(run, "--lr", "--head-lr", "--lr-decay", type=float)
    option(net, "--seed", type=int, default=0)
    option(net, "--precision", choices=("fp32", "bf16"))  # by the device, see parse
    option(net, "--compile", "--checkpoint-activations", action="store_true")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    option(net + " eval predict", "--device", default=gpu)
    option("bench", "--repeat", type=positive, default=3)
    option("bench", "--baseline", action="store_true")
    option("eval", "--split", choices=("train", "val", "test"), default="test")
    option("predict", "--question", "--out")
    return parser

def parse(arguments=None):
    """The settings: what the command line gives, and for the rest the recipe of task and data."""
    args = command_line().parse_args(arguments)
    if args.task in ("eval", "predict", "report"):
        return args
    if args.task == "bench":
        recipe = {**RECIPES[args.head, "real"], "weights": "none", "batch_size": 1}
        recipe["latents"] = [recipe["latents"]]  # a row for each
    else:
        if args.data is None and not os.path.exists(f"toy/{args.task}"):
            data.make_toy(args.task, f"toy/{args.task}")
        args.data, args.out = args.data or f"toy/{args.task}", args.out or f"runs/{args.task}"
        toy = os.path.exists(os.path.join(args.data, "toy.json"))
        recipe = {**RECIPES[args.task, "toy" if toy else "real"]}
        args.cache = args.cache or toy
    bf16 = "cuda" in args.device and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    recipe["precision"] = "bf16" if bf16 else "fp32"
    vars(args).update({k: value for k, value in recipe.items() if vars(args).get(k) is None})
    with torch.device("meta"):  # a backbone or size that does not exist ends here, before any data
        args.image_size = lavish.make_backbone(args.backbone, args.image_size).image_size
    return args

def keep_memory(lean):
    """glibc gives large tensors back, then gets new ones page by page, zeroed: a fifth of a step on
    a CPU. So it keeps them; with `lean` only those below 4 MB, because kept ones leave holes."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, value in ({-3: 2 ** 22} if lean else {-4: 0, -1: 2 ** 31 - 1}).items():
            libc.mallopt(name, value)  # M_MMAP_THRESHOLD; M_MMAP_MAX, M_TRIM_THRESHOLD

def main(arguments=None):
    """Run one command; what the user can mend ends in one line and exit code 2."""
    try:
        gpu = torch.cuda.is_available()
        if "RANK" in os.environ:  # torchrun started several of us
            dist.init_process_group("nccl" if gpu else "gloo")
            if gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        rank, processes = process()
        if rank:
            sys.stdout = open(os.devnull, "w")  # one process talks
            dist.barrier()  # until the first one has made toy data and weights, if any
        args = parse(arguments)
        require(gpu or "cuda" not in vars(args).get("device", ""),
                "--device cuda: torch sees no GPU here; leave the option out")
        keep_memory(vars(args).get("checkpoint_activations"))
        if processes > 1 and rank == 0:
            load_weights(args)  # downloads or pretrains, if need be
            dist.barrier()
        {"ave": train_ave, "avs": train_avs, "avqa": train_avqa, "ucf101": train_ucf101,
         "bench": bench, "eval": evaluate, "predict": predict, "report": report}[args.task](args)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is read-only
        # From a worker process the message comes with its trace; the last line is ours.
        line = str(error).rstrip().split("\n")[-1].removeprefix("lavish.InputError: ")
        sys.exit(print(f"train.py: {line}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("stopped; --resume goes on after the last epoch", file=sys.stderr) or 130)

if __name__ == "__main__":
    main()
