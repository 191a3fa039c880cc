# SPDX-License-Identifier: MIT
"""Training: one plain loop per task, from data to test score.

    python train.py ave                              the toy, from nothing, in minutes
    python train.py ave --data AVE_Dataset           the paper's experiment on the real data
    python train.py predict runs/ave VIDEO.mp4
    python train.py report runs/*                    mean and spread of runs, beside the paper's

Toy data get the toy recipe below and real data the supplementary's; an option
overrides its entry. A run leaves in --out adapters.pt (what was trained, at the
best epoch on val), log.jsonl, result.json and, until done, state.pt for --resume."""
import argparse, collections, ctypes, json, multiprocessing, os, platform, shlex, sys, tempfile
import textwrap, time

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import torchaudio, torchvision
from torch.utils.flop_counter import FlopCounterMode

import data, lavish
from data import bar
from lavish import InputError

# The supplementary's settings. It does not give the epochs; others saw the best one early.
PAPER = dict(backbone="large", weights="imagenet", latents=16, reduction=4, groups=2, lr_decay=1.0,
             epochs=20, channels=256, hidden=512, moments=10, workers=4)
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
    run = Run(args)
    while len(run.log) < args.epochs:
        for frames, spectrograms, labels, *extra in run.batches():
            logits = run.forward(frames, spectrograms, *extra)
            # As released: binary cross-entropy of the softmax against the one-hot label.
            targets = F.one_hot(labels, logits.shape[-1]).float()
            run.step(F.binary_cross_entropy(logits.softmax(-1), targets))
        run.end_epoch()
    run.finish("accuracy per second")

def score_ave(args, model, loader):
    """-> (accuracy over all seconds, what to print: confusions as shares of all, what to keep)."""
    found, true = [], []
    for frames, spectrograms, labels, *extra in bar(loader, "score"):
        logits = model(*(x.to(args.device) for x in (frames, spectrograms, *extra)))
        found += logits.argmax(-1).tolist()
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
    p, event = model(frames[None], spectrograms[None])[0].softmax(-1).max(-1)
    names = [[*args.classes, "background"][k] for k in event]
    for t, (name, share) in enumerate(zip(names, p)):
        print(f"{t:4} to {t + 1:2} s  {name:40} {share:.2f}")
    text = [caption(f"{name} {share:.2f}") for name, share in zip(names, p)]
    write_grid([see(frames), hear(spectrograms), torch.stack(text)], 10, path)

# ---------------------------------------------------------------- AVS
def train_avs(args):
    """Audio-visual segmentation: settings -> result.json, and the first test clip as test.png."""
    run = Run(args)
    while len(run.log) < args.epochs:
        for frames, spectrograms, masks in run.batches():
            # S4 has a mask of the first frame only, so no other one is decoded to the end.
            logits = run.forward(frames, spectrograms, True)
            run.step(F.binary_cross_entropy_with_logits(logits, masks))
        run.end_epoch()
    run.finish("mean IoU")
    if process()[0] == 0:
        clip = (x.to(args.device) for x in run.loaders["test"].dataset[0][:2])
        predict_avs(args, run.model, *clip, os.path.join(args.out, "test.png"))

def score_avs(args, model, loader):
    """-> (mean IoU over all frames of a split, what to print, what else to keep)."""
    ious, fs, per_category = [], [], {}
    for frames, spectrograms, masks in bar(loader, "score"):
        logits = model(frames.to(args.device), spectrograms.to(args.device)).cpu().flatten(0, 1)
        ious += lavish.mask_iou(logits, masks.flatten(0, 1)).view(len(masks), -1).mean(1).tolist()
        fs.append(lavish.f_scores(logits, masks.flatten(0, 1)))
    # Averaged over the split, then maximised over the threshold. AVSBench maximises per batch and
    # averages those, so that its score rises as batches get smaller.
    ious, fs = gather(ious), torch.cat(gather([torch.cat(fs)]))                # (frames,255)
    f_score = (fs.sum(0) / max(len(fs), 1)).max().item()
    for iou, (_, category) in zip(ious, loader.dataset.clips):
        per_category.setdefault(f"mean IoU of {category}", []).append(iou)
    score = float(np.mean(ious))
    return score, {**{key: float(np.mean(per_category[key])) for key in sorted(per_category)},
                   f"mean IoU, {len(ious)} clips x 5 frames": score,
                   "F score (beta^2 = 0.3)": f_score}, {"f_score": f_score}

@torch.no_grad()
def predict_avs(args, model, frames, spectrograms, path):
    """Draws frames, spectrograms, and frames with what sounds in white; five seconds are a clip."""
    clips = zip(frames[None].split(5, 1), spectrograms[None].split(5, 1))
    logits = torch.cat([model(*clip)[0] for clip in clips])                    # (T,H,W)
    write_grid([see(frames), hear(spectrograms), mark(frames, logits)], 5, path)

# ---------------------------------------------------------------- pictures, tiles (T,3,H,W) in 0..1
TILE = 112  # pixels a side
def see(frames):
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return F.interpolate((frames.cpu() * std + mean).clamp(0, 1), (TILE, TILE), mode="bilinear")
def hear(spectrograms):
    heard = (0.4 + spectrograms.cpu() / 3).clamp(0, 1).transpose(1, 2).flip(1)  # time runs right
    return F.interpolate(heard[:, None].expand(-1, 3, -1, -1), (TILE, TILE))
def mark(frames, logits):
    masks = F.interpolate(logits.cpu()[:, None], (TILE, TILE), mode="bilinear")[:, 0] > 0
    return torch.stack([torchvision.utils.draw_segmentation_masks(frame, mask, 0.7, "white")
                        for frame, mask in zip(see(frames), masks)])
def caption(text):  # torchvision writes text beside boxes only
    box, paper = torch.tensor([[0, 0, TILE - 1, TILE - 1]]), torch.ones(3, TILE, TILE)
    return torchvision.utils.draw_bounding_boxes(paper, box, [textwrap.fill(text, 17)], "black")

def write_grid(rows, columns, path):
    """Rows of tiles, each broken after `columns`, as a PNG."""
    rows = [F.pad(row, [0] * 7 + [-len(row) % columns], value=1.0).split(columns) for row in rows]
    grid = torchvision.utils.make_grid(torch.cat(sum(zip(*rows), ())), columns, 4, pad_value=1)
    data.write_atomic(path, torchvision.io.encode_png((grid * 255).byte()).numpy().tobytes())
    print(f"drawn in {path}")

# ---------------------------------------------------------------- AVQA
def train_avqa(args):
    """Audio-visual question answering: settings -> result.json."""
    run = Run(args)
    while len(run.log) < args.epochs:
        for frames, spectrograms, question, answer, foreign in run.batches():
            logits, match = run.forward(frames, spectrograms, question, foreign)
            loss = F.cross_entropy(logits, answer)
            if match is not None:  # does this frame go with this sound? 1 for the real half
                real = torch.arange(len(match), device=args.device) < len(match) // 2
                loss = loss + 0.5 * F.cross_entropy(match, real.long())
            run.step(loss)
        run.end_epoch()
    run.finish("accuracy")

def score_avqa(args, model, loader):
    """-> (accuracy over all questions, what to print: by type, and what the words alone would score
    by the commonest training answer to the same words, or to any; what else to keep)."""
    right, questions, table = [], loader.dataset.questions, {}
    for *inputs, answer in (batch[:4] for batch in bar(loader, "score")):
        found = model(*(x.to(args.device) for x in inputs))[0].argmax(-1)
        right += (found.cpu() == answer).tolist()
    right, types = gather(right), sorted({q["type"] for q in questions})
    for modality, kind in sorted([*types, *{(modality, "average") for modality, _ in types}]):
        chosen = [r for r, q in zip(right, questions)
                  if q["type"] == (modality, kind) or (q["type"][0], "average") == (modality, kind)]
        table[f"{modality} {kind} ({len(chosen)})"] = float(np.mean(chosen))
    answers, score = {}, float(np.mean(right))
    for q in data.read_questions(os.path.join(args.data, "avqa-train.json")):
        for key in (tuple(q["words"]), None):
            answers.setdefault(key, []).append(q["answer"])
    guess = {key: max(dict.fromkeys(a), key=a.count) for key, a in answers.items()}
    words = [guess.get(tuple(q["words"]), guess[None]) == q["answer"] for q in questions]
    return score, {**table, f"accuracy, {len(right)} questions": score, "from the words of the "
                   "question alone": float(np.mean(words))}, {"per_type": table}

def predict_avqa(args, model, frames, spectrograms, asked):
    """Prints the three likeliest answers."""
    words = asked.strip().rstrip("?\uff1f").split(" ")
    question = data.encode(words, args.vocabulary)[None].to(args.device)
    p = model(frames[None], spectrograms[None], question)[0][0].softmax(-1)
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
    for frames, spectrograms, label, audible in bar(loader, "score"):
        action = model(frames.to(args.device), spectrograms.to(args.device)).argmax(-1).cpu()
        found += zip((action == label).tolist(), audible.tolist())
    found = np.array(gather(found))
    table = {f"accuracy, {kind} sound": float(found[found[:, 1] == it, 0].mean())
             for kind, it in (("with", True), ("without", False)) if it in found[:, 1]}
    return (accuracy := float(found[:, 0].mean())), {
        **table, f"accuracy, {len(found)} clips": accuracy}, {}

# ---------------------------------------------------------------- a trained run
def load_run(args):
    """(settings, model) of a run's folder, on --device."""
    run = argparse.Namespace(**lavish.load_file(os.path.join(args.run, "adapters.pt"))["settings"])
    run.device, run.out, run.compile = args.device, args.run, False
    model = build(run)
    prepare(run, model)
    load_checkpoint(run, model)
    return run, model.eval()

def evaluate(args):
    """Scores a trained run on a split."""
    run, model = load_run(args)
    run.data, fact = args.data or run.data, data.DATASETS[run.task].fact
    known, dataset = vars(run)[fact], open_split(run, args.split)
    if known != vars(dataset)[fact]:
        raise InputError(f"{run.data} has other {fact} than {args.run} was trained with")
    loader = torch.utils.data.DataLoader(dataset, run.batch_size, num_workers=args.workers or 0)
    for text, value in score(run, model, loader)[1].items():
        print(f"{text:45} {value:.4f}")
    print(f"Next, on a video of yours: python train.py predict {shlex.quote(args.run)} VIDEO")

@torch.no_grad()
def predict(args):
    """A trained run on videos as they come, through a temporary extraction."""
    run, model = load_run(args)
    if run.task not in PREDICT or vars(run).get("extra_audio"):
        raise InputError("predict is for ave (without --extra-audio), avs and avqa")
    if (run.task == "avqa") != bool(args.question):
        raise InputError("--question goes with a run of avqa, and with no other")
    for video in args.video:
        with tempfile.TemporaryDirectory() as folder:
            name = data.extract_video(video, folder)
            paths, wav = data.video_files(folder, name)
            seconds = data.seconds_of(data.read_wav(wav), len(paths))
            if run.task == "avqa":
                at = data.moments(len(paths), run.moments)
                paths, seconds = [paths[k] for k in at], seconds[at]
            clip = data.read_clip(paths, seconds, run.image_size, run.stats)
        print(video)
        PREDICT[run.task](run, model, *(x.to(run.device) for x in clip), args.question or
                          os.path.join(args.out, f"{name}-{run.task}.png"))
    print(f"Next, on a data set: python train.py eval {shlex.quote(args.run)} --data FOLDER")

# ---------------------------------------------------------------- cost
def bench(args):
    """The cost of a task on random data at any size: a row for each of --latents, with --baseline
    beside the released way of computing the same, each measured in a process of its own."""
    print(args.head, args.backbone, f"batch {args.batch_size}", args.precision, args.device,
          "\n            GFLOP a clip  clips/s, median (min to max)               GB +  of matrix\n"
          "latents      eval  train  training           evaluation           weights       rate")
    rows = []
    for m, released in [(args.latents[0], True)] * args.baseline + [(m, 0) for m in args.latents]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(row := pool.apply(measure, (args, m, released)))
        speeds = ["{1:.3g} ({0:.3g}-{2:.3g})".format(*row[k]) for k in ("train", "eval")]
        print(f"{m:3} {'released' * released:8} {row['gflop']:6.1f} {row['step_gflop']:6.1f}  "
              f"{speeds[0]:18} {speeds[1]:18} {row['peak']:4.1f} +{row['weights']:4.1f} "
              f"{row['share']:4.0%}", flush=True)
    if args.baseline:
        faster = [rows[1][key][1] / rows[0][key][1] for key in ("train", "eval")]
        print("times the released: training {:.2f}, evaluation {:.2f}, peak memory {:.2f}".format(
            *faster, rows[1]["peak"] / rows[0]["peak"]))
    if args.out:
        data.write_lines([json.dumps({"settings": vars(args), "rows": rows})], args.out)

def measure(args, latents, released):
    """One row of bench, in a process of its own: a dict."""
    args.latents, start = latents, peak_memory(args.device)
    if released:
        as_released()
        args.precision, args.compile, args.checkpoint_activations = "fp32", False, False
    else:
        keep_memory(args.checkpoint_activations)
    vars(args).update(task=args.head, classes=range(28), mask_size=224, extra_audio=None,
                      vocabulary={"words": range(93), "answers": range(42), "length": 14})
    row = {"latents": latents, "released": released, **gflop(args, released)}
    model, inputs, more = random_task(args, args.device, released)
    forward, optimizer = prepare(args, model.train())
    def step():
        backward(forward(*inputs, *more))
        optimizer.step()
        optimizer.zero_grad()
    row["weights"] = sum(t.nbytes for t in model.state_dict().values()) / 1e9
    row["train"] = speed(args, step)
    row["peak"] = (peak_memory(args.device) - start) / 1e9 - row["weights"]
    model.eval()
    row["eval"] = speed(args, torch.no_grad()(lambda: model(*inputs)))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(4096, 4096, device=args.device, dtype=dtype)  # the machine's own rate:
    rate = speed(args, lambda: a @ a)[1] / args.batch_size * 2 * 4096 ** 3 / 1e9
    return {**row, "share": row["train"][1] * row["step_gflop"] / rate}

def random_task(args, device, released=False):
    """On random data: (model, inputs of an evaluation, what a training step adds to them)."""
    T = {"ave": 10, "avs": 5, "avqa": args.moments, "ucf101": 16}[args.task]
    with torch.device(device):
        model, B, S = build(args), args.batch_size, args.image_size
        inputs = [torch.randn(B, T, 3, S, S), torch.randn(B, T, S, S)[:, ::1 + (T == 16)]]
        if args.task == "avqa":
            inputs.append(torch.ones(B, args.vocabulary["length"], dtype=torch.long))
        if args.task == "ave" and args.extra_audio:
            inputs.append(torch.randn(B, T, 128))
    # Of S4's frames the loss wants the first; the release decodes them all.
    return model, inputs, {"avs": [not released], "avqa": inputs[:1]}.get(args.task, [])

def gflop(args, released=False):
    """GFLOP of a clip, in an evaluation and in a training step, counted on shapes alone."""
    plain = {**vars(args), "weights": "none", "precision": "fp32", "checkpoint_activations": False}
    model, inputs, more = random_task(argparse.Namespace(**plain), "meta", released)
    counted, step = {}, lambda: backward(model(*inputs, *more))
    for key, run in (("gflop", lambda: model(*inputs)), ("step_gflop", step)):
        with FlopCounterMode(display=False) as counter:
            run()
        counted[key] = counter.get_total_flops() / args.batch_size / 1e9
    return counted
def backward(outputs):
    outputs = outputs if isinstance(outputs, tuple) else [outputs]
    sum(x.square().mean() for x in outputs if x is not None).backward()

def speed(args, run):
    """[least, median, most] clips a second over --repeat runs, after one to warm up."""
    clock = [time.perf_counter()]
    for _ in range(args.repeat + 1):
        run()
        if args.device != "cpu":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
    return [float(args.batch_size / q) for q in np.quantile(np.diff(clock)[1:], (1, 0.5, 0))]

def peak_memory(device):
    """Bytes: of the GPU, or of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def as_released():
    """From here on this process computes as the authors' release does: a pass per stream, position
    biases anew in every block, convolutions between transposes, TPAVI over all pairs of pixels."""
    def forward(net, frames, spectrograms):
        v, a = map(net.backbone.embed, (frames, spectrograms[:, None].expand(-1, 3, -1, -1)))
        stages, adapters = [], iter(net.adapters)
        for blocks, merge in net.backbone.stages:
            for block in blocks:
                for branch, lav in zip(net.backbone.branches(block), next(adapters)):
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

def report(args):
    """Runs grouped by what differs between them, but for seeds: the mean of the test scores, its
    spread and count, with parameters, GFLOP of a clip and seconds, beside the paper's score."""
    runs = [json.loads("\n".join(data.read_lines(f"{run}/result.json"))) for run in args.runs]
    for run in runs:
        run.update({key: it for key, it in run.pop("settings").items() if key not in run})
    keys = ("backbone image_size weights data latents reduction groups extra_audio precision "
            "drop_path lr head_lr batch_size").split()
    varied = [key for key in keys if len({str(run.get(key)) for run in runs}) > 1]
    names = lambda run: [str(run.get(key)) for key in ("task", "modality", *varied)]
    print(*(f"{key:9}" for key in ("task", "modality", *varied)),
          "    test  +- std   n  trainable   GFLOP seconds  paper")
    for group in sorted({tuple(names(run)) for run in runs}):
        some = [run for run in runs if tuple(names(run)) == group]
        first, tests = some[0], [run["test"] for run in some]
        case = group[:2] + ("VGGish",) * bool(first.get("extra_audio"))
        spread = f"{np.std(tests, ddof=1):7.3f}" if len(tests) > 1 else "      -"
        print(*(f"{name:9}" for name in group), f"{np.mean(tests):8.3f} {spread} {len(tests):3} "
              f"{first['trainable_parameters'] / 1e6:9.2f}M {first.get('gflop', np.nan):7.2f} "
              f"{np.mean([run['seconds'] for run in some]):7.0f}  {lavish.PUBLISHED.get(case, '')}")
    print("The paper's scores are its own, on the real data.")

# ---------------------------------------------------------------- what the loops share
def build_net(args):
    """The frozen backbone with its adapters, as the settings say."""
    if args.backbone.startswith("videomae") and args.task != "ucf101":
        raise InputError(f"{args.backbone} takes clips of 16 frames, which only ucf101 has")
    backbone = lavish.make_backbone(args.backbone, args.image_size, load_weights(args))
    if args.precision == "bf16":
        lavish.keep_matrices_in_bf16(backbone)
    try:
        return lavish.Lavish(backbone, args.latents, args.reduction, args.groups, args.modality,
                             args.drop_path, args.checkpoint_activations)
    except ValueError as error:  # the adapter's own words about its dim
        raise InputError(f"--reduction and --groups do not fit {args.backbone}: {error}") from None

def build(args):
    """The model of a task, as the settings say."""
    torch.manual_seed(args.seed)
    net = build_net(args)
    if args.task == "ave":
        return lavish.AVE(net, len(args.classes) + 1, extra=128 if args.extra_audio else 0)
    if args.task == "ucf101":
        return lavish.UCF101(net, len(args.classes))
    if args.task == "avs":  # widths of the whole decoder scale with --channels; 256 as released
        scale = lambda *widths: [int(w * args.channels / 256) for w in widths]
        return lavish.AVS(net, args.mask_size, args.channels, scale(64, 128, 320, 512),
                          scale(128, 32))
    return lavish.AVQA(net, len(args.vocabulary["words"]), len(args.vocabulary["answers"]),
                       args.hidden)

def load_weights(args):
    """The backbone's state dict by --weights: None for "none", nano's own for "toy", the published
    ones for "imagenet" (kept in torch.hub's folder and taken from there next time), or a file."""
    if args.weights == "toy":  # beside the toy data sets, for all of them
        file = os.path.join(os.path.dirname(os.path.abspath(args.data)), "nano.pt")
        return lavish.load_file(pretrain_nano(file, args.device))
    if args.weights != "imagenet":
        return None if args.weights == "none" else lavish.load_file(args.weights)
    name = lavish.BACKBONES.get(args.backbone, [None])[-1]
    if not name:
        raise InputError(f"no ImageNet weights known of {args.backbone!r}; give a file's path")
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
    rng = np.random.default_rng(0)
    backbone = lavish.make_backbone("nano").to(device)
    head = nn.Linear(backbone.dims[-1], 60).to(device)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr,
                                  weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    right = []
    for _ in bar(range(steps), "pretraining nano on toy images"):
        images, labels = data.toy_images(batch, backbone.image_size, rng)
        images = torchvision.transforms.functional.normalize(
            images.to(device) / 255, data.IMAGENET_MEAN, data.IMAGENET_STD)
        logits = head(backbone(images)[-1].mean(1))
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
    if args.compile:  # block by block, each of which is compiled for itself
        torch._dynamo.config.cache_size_limit = 100
        model.net.update = torch.compile(model.net.update)
    in_net = {id(p) for p in model.net.parameters()}
    head = [p for p in model.parameters() if id(p) not in in_net]
    optimizer = torch.optim.Adam([{"params": lavish.trainable(model.net), "lr": args.lr},
                                  {"params": head, "lr": args.head_lr}])
    if not dist.is_initialized():
        return model, optimizer
    # It averages the gradients of what is trainable. Batch norms see their own process's clips.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False), optimizer

@torch.no_grad()
def score(args, model, loader):
    model.eval()  # -> (score, {text: number} to print, what else to keep)
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)  # the statistics of the first process, as in its checkpoint
    return SCORE[args.task](args, model, loader)

def gather(items):
    """The items of all processes, in the order of the data set: process r has every r-th one."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
def process():  # (rank, number of processes)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def open_split(args, split):
    """One split, with every file known to be there. What a model must know of its data (its `fact`
    and the spectrograms' statistics) becomes part of the settings, and so of the checkpoint."""
    known, fact = vars(args), data.DATASETS[args.task].fact
    more = {"avqa": [known.get("vocabulary"), args.moments], "ave": [known.get("extra_audio")]}
    more = more.get(args.task, [])
    dataset = data.DATASETS[args.task](args.data, split, args.image_size, *more)
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
    loaders, (rank, processes) = {}, process()
    for split in ("train", "val", "test"):
        dataset = open_split(args, split)
        if args.cache:
            dataset.kept = [dataset[i] for i in bar(range(len(dataset)), f"read {split}")]
        # The order of an epoch follows from the seed and the epoch's number. Nothing is drawn when
        # an item is read, so that the number of workers does not matter.
        sampler = (torch.utils.data.DistributedSampler(dataset, processes, rank, seed=args.seed)
                   if split == "train" else range(rank, len(dataset), processes))
        loaders[split] = torch.utils.data.DataLoader(
            dataset, args.batch_size, sampler=sampler, num_workers=args.workers,
            persistent_workers=args.workers > 0, pin_memory=args.device != "cpu")
    return loaders

class Run:
    """What the loops share: a model in training, and what is kept of it after each epoch. state.pt
    holds all that --resume needs to go on, bit for bit on one machine with one process."""
    def __init__(self, args):
        self.args, self.start, self.loaders = args, time.time(), open_data(args)
        self.model = build(args)
        self.forward, self.optimizer = prepare(args, self.model)
        self.log, self.best, self.state = [], -1.0, os.path.join(args.out, "state.pt")
        if args.resume:
            self.resume()
        elif os.path.exists(self.state):
            raise InputError(f"{self.state} is of a run not done: add --resume to go on, or choose "
                             "another --out")
    def resume(self):
        saved, now = lavish.load_file(self.state), vars(self.args)
        other = {key for key in now if now[key] != saved["settings"].get(key)}
        if other := sorted(other - {"out", "resume", "epochs", "workers", "cache", "data"}):
            raise InputError(f"{self.state} is of a run with other settings: {', '.join(other)}")
        lavish.load_trained_state_dict(self.model, saved["trained"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.log, self.best = saved["log"], saved["best"]
        self.start -= sum(entry["seconds"] for entry in self.log)
        torch.set_rng_state(saved["random"])
        torch.cuda.set_rng_state_all(saved["random_cuda"])
    def batches(self):
        """The batches of an epoch, on the device; the model is in training."""
        self.epoch_start, self.losses, epoch = time.time(), [], len(self.log) + 1
        loader = self.loaders["train"]
        self.model.train()
        loader.sampler.set_epoch(epoch)
        for batch in bar(loader, f"epoch {epoch}/{self.args.epochs}"):
            yield [x.to(self.args.device) for x in batch]
    def step(self, loss):
        """One step of Adam; a loss that is not finite ends the run before it does harm."""
        self.losses.append(loss.item())
        if not np.isfinite(self.losses[-1]):
            raise InputError(f"the loss is {self.losses[-1]} in epoch {len(self.log) + 1}, step "
                             f"{len(self.losses)}; try a lower --lr. --out is as the epoch before")
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
        kept = {"settings": vars(args), "trained": lavish.trained_state_dict(self.model)}
        if process()[0] == 0:
            if better:  # chosen on val; the released AVE and AVS code choose on test
                data.save_atomic(kept, os.path.join(args.out, "adapters.pt"))
            data.write_lines(map(json.dumps, self.log), os.path.join(args.out, "log.jsonl"))
            data.save_atomic({
                **kept, "log": self.log, "best": self.best, "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all(),  # [] without a GPU
                "optimizer": self.optimizer.state_dict()}, self.state)
    def finish(self, metric):
        """Tests the best epoch's model; result.json, a table, and the command to type next."""
        args, counts = self.args, lavish.count_parameters(self.model)
        if dist.is_initialized():
            dist.barrier()  # until the first process has written it
        load_checkpoint(args, self.model)
        test, table, more = score(args, self.model, self.loaders["test"])
        if process()[0]:
            return
        seconds, out = time.time() - self.start, shlex.quote(args.out)
        verb = f"predict {out} VIDEO" if args.task in PREDICT else f"report {out}"
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, torchaudio, np)}
        result = {"task": args.task, "modality": args.modality, "metric": metric, "test": test,
                  "seconds": seconds, "seed": args.seed, "trainable_parameters": counts[0],
                  "total_parameters": counts[1], "settings": vars(args), **gflop(args), **more,
                  "versions": {"python": platform.python_version(), **versions}}
        data.write_lines([json.dumps(result, indent=1)], os.path.join(args.out, "result.json"))
        os.remove(self.state)
        print("\ntest", *(f"{text:45} {score:.4f}" for text, score in table.items()), sep="\n")
        print(f"{'trainable of all parameters':45} {counts[0]:,} of {counts[1]:,}\n"
              f"{'time':45} {seconds:.0f} s\n\n{out} holds adapters.pt, log.jsonl, result.json\n"
              f"Next: python train.py {verb}")

def load_checkpoint(args, model):
    trained = lavish.load_file(path := os.path.join(args.out, "adapters.pt"))["trained"]
    lavish.load_trained_state_dict(model, trained, f"{path} is of another configuration")

SCORE = {"ave": score_ave, "avs": score_avs, "avqa": score_avqa, "ucf101": score_ucf101}
PREDICT = {"ave": predict_ave, "avs": predict_avs, "avqa": predict_avqa}

def command_line():
    """The parser of all commands: TASK, bench, eval, predict, report."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", required=True)
    command = {name: commands.add_parser(name, help=text) for name, text in dict(
        ave="event localisation", avs="segmentation", avqa="question answering",
        ucf101="action recognition", bench="speed and memory, random data", report="table of runs",
        eval="score a trained run", predict="a trained run on your videos").items()}

    def option(names, *flags, **settings):
        for name in names.split():
            command[name].add_argument(*flags, **settings)
    run, net = "ave avs avqa ucf101", "ave avs avqa ucf101 bench"
    option("bench", "head", choices=SCORE, help="what to measure")
    option("report", "runs", nargs="+", help="folders that training left")
    option("ave", "--extra-audio", help="features (rows of Annotations.txt, 10, 128): .npy or .h5")
    option("eval predict", "run", help="a folder that training left")
    option("predict", "video", nargs="+", help="anything that ffmpeg reads")
    option(net, "--backbone", help=", ".join(lavish.BACKBONES))
    option(net, "--weights", help="imagenet, none, toy (nano on toy images), or a file's path")
    option(net, "--image-size", type=positive, help="side of frames and spectrograms, pixels")
    option(run, "--latents", type=positive, help="latent tokens per adapter")
    option("bench", "--latents", type=positive, nargs="+", help="a row for each")
    option(net, "--reduction", type=positive, help="width of a stage over that of its bottleneck")
    option(net, "--groups", type=positive, help="groups of the bottleneck's convolutions")
    option(net, "--modality", choices=("av", "v", "a"), default="av", help="v, a: one stream alone")
    option(net, "--drop-path", type=float, default=0.0, help="stochastic depth of the backbone")
    option(net, "--batch-size", type=positive, help="clips in a step, of each process")
    option(run, "--lr", type=float, help="of the adapters")
    option(run, "--head-lr", type=float, help="of the head")
    option(run, "--lr-decay", type=float, help="factor on both after each epoch; 1 in the paper")
    option(run, "--epochs", type=positive)
    option(net, "--precision", choices=("fp32", "bf16"), help="bf16: autocast; default on a GPU")
    option(net, "--compile", action="store_true", help="torch.compile: minutes, then faster")
    option(net, "--checkpoint-activations", action="store_true", help="less memory, more time")
    option(net, "--seed", type=int, default=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option(net + " eval predict", "--device", default=device)
    option(run + " eval", "--data", help="data set folder; toy data, or the run's, if not given")
    option("eval", "--split", choices=("train", "val", "test"), default="test")
    option(run + " eval", "--workers", type=int, help="processes that load data")
    option(run, "--cache", action="store_true", help="keep decoded clips in memory; on for toys")
    option("predict", "--question", help="for avqa")
    option("bench", "--repeat", type=positive, default=3, help="measured steps")
    option("bench", "--baseline", action="store_true", help="the released way as well")
    option(run + " bench", "--out", help="folder for the results; of bench, a JSON file")
    option("predict", "--out", default=".", help="folder for the pictures")
    option(run, "--resume", action="store_true", help="go on with the run in --out that stopped")
    return parser

def parse(arguments=None):
    """The settings: what the command line gives, and for the rest the recipe of task and data."""
    args = command_line().parse_args(arguments)
    if args.task in ("eval", "predict", "report"):
        return args
    if args.precision is None:
        gpu = args.device.startswith("cuda") and torch.cuda.is_available()
        args.precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    if args.task == "bench":
        recipe = {**RECIPES[args.head, "real"], "weights": "none", "batch_size": 1}
        recipe["latents"] = [recipe["latents"]]
    else:
        if args.data is None:
            args.data = f"toy/{args.task}"
            if not os.path.exists(args.data):
                print(f"no {args.data} yet: making the toy data")
                data.make_toy(args.task, args.data)
        toy = os.path.exists(os.path.join(args.data, "toy.json"))
        args.cache, args.out = args.cache or toy, args.out or f"runs/{args.task}"
        recipe = RECIPES[args.task, "toy" if toy else "real"]
    for key, value in recipe.items():
        if vars(args).get(key) is None:
            setattr(args, key, value)
    if args.image_size is None:  # as the weights were trained
        args.image_size = lavish.BACKBONES.get(args.backbone, [0])[-2:][0]
    return args

def keep_memory(lean):
    """glibc gives large tensors back, then gets new ones page by page, zeroed: a fifth of a step on
    a CPU. So it keeps them; with `lean` only those below 4 MB, because kept ones leave holes."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, value in ({-3: 2 ** 22} if lean else {-4: 0, -1: 2 ** 31 - 1}).items():
            libc.mallopt(name, value)  # M_MMAP_THRESHOLD; M_MMAP_MAX, M_TRIM_THRESHOLD

def positive(text):  # an argparse type, whose message names it
    if int(text) < 1:
        raise ValueError
    return int(text)

def main(arguments=None):
    try:
        if "RANK" in os.environ:  # torchrun started several of us
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        rank, processes = process()
        if rank:
            sys.stdout = open(os.devnull, "w")
            dist.barrier()  # the first one makes toy data and weights, if any
        args = parse(arguments)
        keep_memory(vars(args).get("checkpoint_activations"))
        if vars(args).get("device", "").startswith("cuda") and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here; leave the option out")
        if processes > 1:
            if args.device == "cuda":
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            load_weights(args)
            if rank == 0:
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
