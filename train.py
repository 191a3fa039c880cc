# SPDX-License-Identifier: MIT
"""Training: one plain loop per task, from data to test score.

    python train.py ave                              the toy, from nothing
    python train.py ave --data AVE_Dataset           the paper's experiment
    python train.py eval runs/ave --split test       score a trained run
    python train.py predict runs/ave VIDEO.mp4       a trained run on videos
    python train.py report runs/*                    mean and spread of runs
    python train.py bench ave --latents 2            cost, on random data

The tasks are ave, avs, avqa, ucf101. `python train.py TASK --help` lists the settings; those not
given come from the task's recipe: the toy's for toy data, the paper's for any other.

A run leaves in --out
    adapters.pt   what was trained, of the epoch that is best on val
    log.jsonl     loss, val score and seconds of each epoch
    result.json   test score, settings, versions; when it is there, the run is done
    test.png      the first test clip, as the trained net sees it
    state.pt      for --resume, until the run is done

Read the settings and train_ave first; the other three loops differ where their tasks do.

Glossary
    settings    all that a run is told, an instance of Settings
    given       {setting: value} of the options on the command line
    facts       what the model must know of its data: classes or vocabulary, mask size, statistics
                of the spectrograms; the checksum of the frozen weights; AVQA's commonest answers
    loaders     {split: batches}; a batch is [frames, spectrograms, ...] as the Dataset gives them
    log         a list of {"loss", "val", "seconds"}, an entry for each epoch that is done
    scores      {what: number}, the score of the task among them (see METRIC)
    B, T, S, M  clips in a batch, seconds of a clip, pixels of an image's and of a mask's side
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import data
import lavish
from data import progress
from lavish import InputError, require

# ---------------------------------------------------------------- settings and recipes
# One dataclass holds all settings. A recipe is an instance of it: the paper's for real data, the
# toy's for toys. The command line replaces single fields; settings_of fills in device, precision
# and image size.


def setting(default, meaning, task=None, **argument):
    """A field of Settings: what it means, for --help, and the one task that has it, if not all."""
    metadata = {"help": meaning, "task": task, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """All that a run is told. Each field is an option of the command line."""

    task: str  # ave, avs, avqa or ucf101

    # Paths and machine. On the same data only seed, device and precision change a result.
    data: str = setting("", "folder of the data set; the toy's is made if it is not there")
    out: str = setting(
        "", "folder for the run's files; runs/ and the name of the data's unless given"
    )
    seed: int = setting(0, "start of adapters and head, order of the clips, dropout")
    workers: int = setting(4, "processes that read clips")
    cache: bool = setting(False, "keep decoded clips in memory; with --workers 0")
    device: str = setting("cpu", "cpu or cuda")
    precision: str = setting(
        "fp32", "bf16: autocast, the default on GPUs that have it", choices=("fp32", "bf16")
    )
    resume: bool = setting(False, "go on with a run that was stopped")

    # The net. The defaults are what the supplementary gives for AVS and AVQA.
    backbone: str = setting("large", "a name of lavish.BACKBONES")
    weights: str = setting("imagenet", "imagenet, toy (nano's), none (random), or a file")
    image_size: int = setting(0, "pixels a side; 0: what the backbone was published for")
    modality: str = setting("av", "both streams, or one alone", choices=("av", "v", "a"))
    latents: int = setting(16, "latent tokens m of an adapter; 0: late fusion by the head alone")
    reduction: int = setting(4, "r: width of a stage over that of its bottleneck")
    groups: int = setting(2, "channel groups of the bottleneck's convolutions")
    one_direction: bool = setting(False, "vision reads sound, sound reads nothing")
    drop_path: float = setting(0.0, "stochastic depth of the frozen branches")
    checkpoint_activations: bool = setting(False, "less memory, more time")

    # The training.
    epochs: int = setting(30, "at most")
    patience: int = setting(0, "stop after so many epochs without a better val score; 0: never")
    batch_size: int = setting(1, "clips of a step, in each process")
    lr: float = setting(1e-4, "Adam's learning rate for the adapters")
    head_lr: float = setting(1e-4, "that for the head")
    linear_decay: bool = setting(False, "all rates fall linearly to zero")

    # What one task alone has.
    extra_audio: str = setting("", "an .npy of features beside the sound's", task="ave")
    tpavi: bool = setting(False, "AVSBench's own audio-visual block too", task="avs")
    first_second: bool = setting(
        False, "train on the first second of a clip: a fifth of the work", task="avs"
    )
    channels: int = setting(256, "width of the decoder", task="avs")
    moments: int = setting(10, "seconds of a video that are looked at", task="avqa")
    hidden: int = setting(512, "width of the head", task="avqa")
    grounding_lr: float = setting(3e-6, "rate for grounding, match and answer", task="avqa")

    # What one command alone has.
    split: str = setting("test", "eval: what to score", choices=("train", "val", "test"))
    question: str = setting("", "predict: what to ask of a video, with avqa")
    repeat: int = setting(3, "bench: measured steps")


# The supplementary's settings, on Swin-V2-L at 192 px. It states no epochs; they are the release's,
# and so is the patience of AVE and AVQA.
# AVE: ten seconds a clip, two latents; more of them did not help the paper (Figure 1).
PAPER_AVE = Settings(
    "ave",
    latents=2,
    reduction=8,
    batch_size=2,
    lr=5e-6,  # of the adapters
    head_lr=4e-6,
    epochs=50,  # AVE/README.md:30
    patience=5,
)
# AVS: five seconds a clip and a decoder of 19M, which learns as fast as the adapters.
PAPER_AVS = Settings(
    "avs",
    batch_size=4,
    lr=1e-4,
    head_lr=1e-4,
    epochs=30,  # AVS/README.md:14; its early stop never fires, avs_s4/train.py:281
)
# AVQA: ten moments of a minute, so that one clip fills a GPU.
PAPER_AVQA = Settings(
    "avqa",
    batch_size=1,
    lr=8e-5,
    head_lr=8e-5,  # not in the supplementary; released: main_avst.py:289
    grounding_lr=3e-6,  # "the grounding modules and the final prediction layer"
    epochs=30,  # AVQA/README.md:14
    patience=5,
)
# UCF101, the supplementary's Table 2, by VideoMAE.
PAPER_UCF101 = Settings(
    "ucf101",
    backbone="videomae",
    weights="",  # must be given: nobody publishes them under a fixed address
    batch_size=4,  # this and the rest is our guess: the paper tells r and groups alone, by its 7.4M
    latents=2,
    lr=1e-4,
    head_lr=1e-3,
    epochs=20,
)
PAPER = {"ave": PAPER_AVE, "avs": PAPER_AVS, "avqa": PAPER_AVQA, "ucf101": PAPER_UCF101}

# The same adapters on a toy backbone. A net this small wants larger steps, and (but for ucf101)
# rates that fall: the gates start at zero and have to open within the first epochs, and the rest
# has to settle.
NANO = {"backbone": "nano", "weights": "toy", "workers": 0, "cache": True, "batch_size": 8}
TOY_AVE = dataclasses.replace(
    PAPER_AVE,
    **NANO,
    lr=2e-2,
    head_lr=1e-3,
    linear_decay=True,
    epochs=7,
    patience=0,
)
TOY_AVS = dataclasses.replace(
    PAPER_AVS,
    **NANO,
    latents=2,
    reduction=8,
    channels=64,
    first_second=True,
    lr=1e-2,
    head_lr=1e-3,
    linear_decay=True,
    epochs=20,
)
TOY_AVQA = dataclasses.replace(
    PAPER_AVQA,
    **NANO,
    latents=2,
    reduction=8,
    moments=1,
    hidden=128,
    lr=4e-3,
    head_lr=7e-4,
    grounding_lr=7e-4,
    linear_decay=True,
    epochs=10,
    patience=0,
)
TOY_UCF101 = dataclasses.replace(
    PAPER_UCF101,
    **{**NANO, "backbone": "videomae_nano", "weights": "none"},  # random does here
    lr=2e-3,
    head_lr=1e-3,
    epochs=8,
)
TOY = {"ave": TOY_AVE, "avs": TOY_AVS, "avqa": TOY_AVQA, "ucf101": TOY_UCF101}

# ---------------------------------------------------------------- AVE
# The four loops are alike on purpose: read this one, then look for what the others do differently.


def train_ave(settings):
    """Audio-visual event localisation: settings -> a run in settings.out.

    Clips of ten seconds; each second is one of the events or background, and counts alike."""
    facts = {}  # what the model must know of its data, kept with what is trained
    loaders = open_loaders(settings, facts)
    model, forward, optimizer, log = start_run(settings, facts)

    while not is_over(settings, log):
        start = start_epoch(settings, log, model, optimizer, loaders["train"])
        losses = []  # of each step
        for batch in progress(loaders["train"], epoch_name(log)):
            frames, spectrograms, labels, *extra = on_device(settings, *batch)
            with autocast(settings):
                logits = forward(frames, spectrograms, *extra)  # (B,10,29)
            check_finite(logits, log)
            # Binary cross-entropy of the softmax against the one-hot label, as the release has it
            # (AVE/nets/net_trans.py:425, main_trans.py:219); cross_entropy is another loss.
            targets = F.one_hot(labels, logits.shape[-1]).float()  # (B,10,29)
            loss = F.binary_cross_entropy(logits.softmax(-1), targets)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        scores = evaluate_ave(settings, facts, model, loaders["val"])
        end_epoch(settings, facts, model, optimizer, log, losses, scores, start)

    finish(settings, facts, model, log, loaders["test"])


def evaluate_ave(settings, facts, model, loader):
    """Score a model on a split, as Tian et al. do: every second of every clip counts alike.

    -> {what: number}: accuracy over all seconds and, to compare it with, that of "background"
    everywhere, and that of knowing the event of each clip but not when it is."""
    found = []
    true = []
    for logits, (_, _, labels, *_) in outputs(settings, model, loader):
        found.extend(logits.argmax(-1).tolist())  # (B,10), of logits (B,10,29)
        true.extend(labels.tolist())  # (B,10)
    found = np.array(gather(found))  # (clips,10)
    true = np.array(gather(true))  # (clips,10)
    background = len(facts["classes"])  # the number of its label
    return {
        "accuracy": float((found == true).mean()),
        "if all were called background": float((true == background).mean()),
        "if each event lasted the whole clip": float((true != background).mean()),
    }


# ---------------------------------------------------------------- AVS
# The difference from AVE: the loss sees one frame of five, and the scores are of masks.


def train_avs(settings):
    """Audio-visual segmentation: settings -> a run in settings.out.

    Clips of five seconds with a frame each. In training only the first frame has a mask."""
    facts = {}
    loaders = open_loaders(settings, facts)
    model, forward, optimizer, log = start_run(settings, facts)

    while not is_over(settings, log):
        start = start_epoch(settings, log, model, optimizer, loaders["train"])
        losses = []  # of each step
        for frames, spectrograms, masks in progress(loaders["train"], epoch_name(log)):
            # S4 has a mask of the first frame only (AVS/avs_scripts/avs_s4/loss.py:17-24). Without
            # TPAVI the seconds meet in the adapters' batch statistics alone, so that a toy can do
            # without the other four.
            if settings.first_second:
                frames = frames[:, :1]  # (B,1,3,S,S)
                spectrograms = spectrograms[:, :1]
            frames, spectrograms, masks = on_device(settings, frames, spectrograms, masks)
            with autocast(settings):
                logits = forward(frames, spectrograms, first_only=True)  # (B,1,M,M)
            check_finite(logits, log)
            loss = F.binary_cross_entropy_with_logits(logits, masks)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        scores = evaluate_avs(settings, facts, model, loaders["val"])
        end_epoch(settings, facts, model, optimizer, log, losses, scores, start)

    finish(settings, facts, model, log, loaders["test"])


def evaluate_avs(settings, facts, model, loader):
    """-> {what: number}: mean IoU over all frames, and the F score with beta^2 = 0.3."""
    ious = []
    f_scores = []
    for logits, (_, _, masks) in outputs(settings, model, loader):  # (B,5,M,M)
        logits = logits[:, : masks.shape[1]].flatten(0, 1)  # train has a mask of the first frame
        masks = masks.flatten(0, 1)  # (n,M,M)
        ious.extend(mask_iou(logits, masks).tolist())
        f_scores.extend(f_score(logits, masks).tolist())
    ious = gather(ious)  # (frames,)
    f_scores = torch.tensor(gather(f_scores))  # (frames,255)
    # The best threshold of the split. AVSBench takes the best of each batch and averages those
    # (avs_s4/utils/utility.py:105-118): its score rises as batches get smaller.
    return {"mean IoU": float(np.mean(ious)), "F score": f_scores.nanmean(0).max().item()}


def mask_iou(logits, masks):
    """Logits and 0/1 masks (n,M,M) -> IoU of each frame (n,), as AVSBench counts it: an empty mask
    scores the share of pixels predicted empty (utility.py:45-70)."""
    p = logits.flatten(1) > 0  # (n,M*M): a sigmoid above 1/2
    m = masks.flatten(1) > 0  # (n,M*M)
    intersection = (p & m).sum(1)  # (n,)
    union = (p | m).sum(1)  # (n,)
    return torch.where(m.any(1), intersection / union.clamp(min=1), (~p).float().mean(1))


def f_score(logits, masks, beta2=0.3):
    """Logits and 0/1 masks (n,M,M) -> F scores (n,255), one for each threshold on the sigmoid; NaN
    for an empty mask, which has no recall (utility.py:74-118)."""
    p = logits.sigmoid().flatten(1)  # (n,M*M)
    m = masks.flatten(1)  # (n,M*M)
    scores = []
    for threshold in torch.linspace(0, 1, 255):
        predicted = (p >= threshold).float()
        true_positives = (predicted * m).sum(1)  # (n,)
        precision = true_positives / predicted.sum(1).clamp(min=1)
        recall = true_positives / m.sum(1)  # 0 / 0 is NaN
        sum_of_both = (beta2 * precision + recall).clamp(min=1e-20)
        scores.append((1 + beta2) * precision * recall / sum_of_both)
    return torch.stack(scores, 1)


# ---------------------------------------------------------------- AVQA
# The difference from AVE: a second loss on negatives, and a table by type of question.


def train_avqa(settings):
    """Audio-visual question answering: settings -> a run in settings.out.

    The net also learns, with half the weight, whether a frame goes with the sound: its own frames
    do, those of other videos (negatives) do not."""
    facts = {}
    loaders = open_loaders(settings, facts)
    facts["guesses"] = commonest_answers(data.source(loaders["train"]).questions)
    model, forward, optimizer, log = start_run(settings, facts)

    while not is_over(settings, log):
        start = start_epoch(settings, log, model, optimizer, loaders["train"])
        losses = []  # of each step
        for batch in progress(loaders["train"], epoch_name(log)):
            # One stream alone has no negatives: a match takes two.
            frames, spectrograms, question, answer, *negatives = on_device(settings, *batch)
            with autocast(settings):
                logits, match = forward(frames, spectrograms, question, *negatives)
            check_finite(logits, log)
            loss = F.cross_entropy(logits, answer)  # logits (B,answers)
            if match is not None:
                # Does this frame go with this sound? Here the first half does; loss and weight are
                # the release's (AVQA/net_grd_avst/main_avst.py:86-88).
                own, other = match.chunk(2)  # (BT,2) each
                yes = torch.ones(len(own), dtype=torch.long, device=own.device)
                goes_with = torch.cat([yes, 1 - yes])
                loss = loss + 0.5 * F.cross_entropy(match, goes_with)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        scores = evaluate_avqa(settings, facts, model, loaders["val"])
        end_epoch(settings, facts, model, optimizer, log, losses, scores, start)

    finish(settings, facts, model, log, loaders["test"])


def evaluate_avqa(settings, facts, model, loader):
    """-> {what: number}: accuracy over all questions, what the words of the questions alone would
    score, and accuracy by type of question."""
    right = []
    for logits, (_, _, _, answer, *_) in outputs(settings, model, loader):  # (B,answers)
        right.extend((logits.argmax(-1) == answer).tolist())
    right = gather(right)

    by_type = defaultdict(list)  # {type of question: is each one right?}
    guessed = []  # would the commonest answer be right?
    for is_right, question in zip(right, data.source(loader).questions):
        modality, kind = question["type"]
        by_type[f"{modality} {kind}"].append(is_right)
        by_type[f"{modality} average"].append(is_right)
        guess = facts["guesses"].get(" ".join(question["words"]), facts["guesses"][""])
        guessed.append(guess == question["answer"])
    scores = {"accuracy": float(np.mean(right))}
    scores["from the words of the question alone"] = float(np.mean(guessed))
    for name in sorted(by_type):
        scores[f"{name} ({len(by_type[name])})"] = float(np.mean(by_type[name]))
    return scores


def commonest_answers(questions):
    """What one can say without eyes and ears: {question: its commonest answer in training}.

    The key "" has the commonest of all answers, for questions that training does not have."""
    counts = defaultdict(Counter)
    for question in questions:
        counts[" ".join(question["words"])][question["answer"]] += 1
        counts[""][question["answer"]] += 1
    return {words: counter.most_common(1)[0][0] for words, counter in counts.items()}


# ---------------------------------------------------------------- UCF101
# The difference from AVE: one label for a clip, and clips without sound.


def train_ucf101(settings):
    """Action recognition: settings -> a run in settings.out. 16 frames and 8 seconds of sound a
    clip, which may be silent."""
    facts = {}
    loaders = open_loaders(settings, facts)
    model, forward, optimizer, log = start_run(settings, facts)

    while not is_over(settings, log):
        start = start_epoch(settings, log, model, optimizer, loaders["train"])
        losses = []  # of each step
        for batch in progress(loaders["train"], epoch_name(log)):
            frames, spectrograms, label, _ = on_device(settings, *batch)
            with autocast(settings):
                logits = forward(frames, spectrograms)  # (B,classes)
            check_finite(logits, log)
            loss = F.cross_entropy(logits, label)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        scores = evaluate_ucf101(settings, facts, model, loaders["val"])
        end_epoch(settings, facts, model, optimizer, log, losses, scores, start)

    finish(settings, facts, model, log, loaders["test"])


def evaluate_ucf101(settings, facts, model, loader):
    """-> {what: number}: accuracy over all clips, and of those with and without sound."""
    right = []
    heard = []
    for logits, (_, _, label, audible) in outputs(settings, model, loader):  # (B,classes)
        right.extend((logits.argmax(-1) == label).tolist())
        heard.extend(audible.tolist())
    right = np.array(gather(right))  # (clips,)
    heard = np.array(gather(heard))
    scores = {"accuracy": float(right.mean())}
    for what, chosen in (("with", heard), ("without", ~heard)):
        if chosen.any():
            scores[f"of clips {what} sound"] = float(right[chosen].mean())
    return scores


# ---------------------------------------------------------------- what the tasks share
# Evaluation differs in its scores alone.


@torch.no_grad()
def outputs(settings, model, loader):
    """The one loop of evaluation: yield the logits of each batch, on the CPU, and the batch.

    The model is in evaluation mode: batch norms use their running statistics, dropout is off."""
    model.eval()
    if dist.is_initialized():
        for buffer in model.buffers():  # the statistics of the first process, as in its checkpoint
            dist.broadcast(buffer, 0)
    for batch in progress(loader, "score"):
        logits = logits_of(settings, model, inputs_of(settings, batch))
        require(logits.isfinite().all(), "the net's output is not finite; lower --lr and --head-lr")
        yield logits, batch


@torch.no_grad()
def logits_of(settings, model, inputs):
    """What the net says to a batch of inputs, on the CPU. The model is in evaluation mode."""
    with autocast(settings):
        logits = model(*on_device(settings, *inputs))
    if settings.task == "avqa":
        logits, _ = logits  # and no match
    return logits.cpu()


def inputs_of(settings, batch):
    """Of a batch or an item, what the net reads: frames (B,T,3,S,S), spectrograms (B,T,S,S), and
    AVQA's question (B,W) or AVE's further features (B,T,128). The rest is what it should say."""
    if settings.task == "avqa":
        return batch[:3]
    if settings.extra_audio:
        return [*batch[:2], batch[3]]
    return batch[:2]


# By the name on the command line.
TRAIN = {"ave": train_ave, "avs": train_avs, "avqa": train_avqa, "ucf101": train_ucf101}
EVALUATE = {
    "ave": evaluate_ave,
    "avs": evaluate_avs,
    "avqa": evaluate_avqa,
    "ucf101": evaluate_ucf101,
}

# ---------------------------------------------------------------- data, model, optimiser
# What a model must know of its data (`facts`) is found here once, and is kept in the checkpoint.


def open_loaders(settings, facts):
    """{split: loader}. Each process has its share of every split: of training in an order that
    changes from epoch to epoch, of the others every n-th item."""
    loaders = {}
    for split in ("train", "val", "test"):
        dataset = open_split(settings, split, facts)
        if settings.cache and settings.workers == 0:  # each epoch's workers forget what they read
            dataset = data.Cached(dataset)
        sampler = range(rank(), len(dataset), processes())
        if split == "train":
            if settings.task == "avqa" and settings.modality == "av":
                dataset = data.NegativeFrames(dataset, settings.seed)
            sampler = torch.utils.data.DistributedSampler(
                dataset, processes(), rank(), seed=settings.seed
            )
        loaders[split] = make_loader(settings, dataset, sampler)
    return loaders


def open_split(settings, split, facts):
    """One split, with every file known to be there.

    The first split fills `facts`: classes, size of the masks, vocabulary, statistics of the
    spectrograms. They hold for the other splits, and for every data set that the run is scored on
    later, because the model was built and trained by them."""
    more = {"stats": facts.get("stats")}
    if settings.task == "ave":
        more["extra_audio"] = settings.extra_audio
    if settings.task == "avqa":
        more["moments"] = settings.moments
        more["vocabulary"] = facts.get("vocabulary")
    dataset = data.DATASETS[settings.task](settings.data, split, settings.image_size, **more)
    for name in ("classes", "mask_size", "vocabulary", "stats"):
        if hasattr(dataset, name):
            found = getattr(dataset, name)
            known = facts.setdefault(name, found)
            require(known == found, f"{settings.data}: {split} has other {name} than training")
    missing = data.missing_files(dataset)
    if missing:
        raise InputError(
            f"{len(missing)} files are missing, the first is {missing[0]}; the README says how they"
            " are made (for AVE and MUSIC-AVQA by: python data.py extract VIDEOS ROOT)"
        )
    return dataset


def make_loader(settings, dataset, sampler=None):
    """Batches of a dataset, read by settings.workers processes; 0: by this one."""
    return torch.utils.data.DataLoader(
        dataset,
        settings.batch_size,
        sampler=sampler,
        num_workers=settings.workers,
        pin_memory=settings.device != "cpu",
        # Of its own, so that a loader with workers does not draw from the net's random numbers.
        generator=torch.Generator(),
    )


def build(settings, facts):
    """The model of a task, on its device. Adapters and head start from the seed.

    Raises InputError if the frozen weights are not those that `facts` remember."""
    torch.manual_seed(settings.seed)
    backbone = lavish.make_backbone(settings.backbone, settings.image_size)
    path = weights_path(settings)
    if path is not None:
        lavish.load_pretrained(backbone, data.load_tensors(path))
    # A checkpoint holds adapters alone, which are worth nothing beside other frozen weights.
    found = checksum(backbone)
    known = facts.setdefault("backbone", found)
    require(
        known == found,
        f"{settings.out} was trained on other weights of {settings.backbone}; name them: --weights",
    )
    net = build_net(settings, backbone)
    if settings.task == "ave":
        extra_width = 128 if settings.extra_audio else 0
        model = lavish.AVE(net, len(facts["classes"]) + 1, extra_width)
    elif settings.task == "avs":
        model = lavish.AVS(net, facts["mask_size"], settings.channels, settings.tpavi)
    elif settings.task == "avqa":
        words = len(facts["vocabulary"]["words"])
        answers = len(facts["vocabulary"]["answers"])
        model = lavish.AVQA(net, words, answers, settings.hidden)
    else:
        model = lavish.UCF101(net, len(facts["classes"]))
    return model.to(settings.device)


def build_net(settings, backbone):
    """The frozen backbone with its adapters: both streams, or one.

    Raises InputError if reduction x groups does not divide the backbone's widths."""
    bottleneck = (settings.reduction, settings.groups)
    try:
        if settings.modality != "av":
            return lavish.OneStream(backbone, settings.modality, *bottleneck)
        return lavish.Lavish(
            backbone,
            settings.latents,
            *bottleneck,
            settings.one_direction,
            settings.drop_path,
            settings.checkpoint_activations,
        )
    except ValueError as error:  # the adapter's own words about its dim
        raise InputError(f"{settings.backbone} and --reduction, --groups: {error}") from None


def checksum(module):
    """A number that tells two sets of weights apart: the CRC-32 of all their bytes."""
    value = 0
    for tensor in module.state_dict().values():
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return value


def make_optimizer(settings, model):
    """Adam, with a learning rate for each part of the model, which start_epoch sets by its name.

    Of AVQA's head the supplementary names "the grounding modules and the final prediction layer"
    (3e-6); the rest (embedding, LSTM, question, input projections, fusion) has head_lr."""
    grounding = ("audio_out", "visual_out", "match", "when_heard", "when_seen", "answer")
    groups = {"lr": [], "head_lr": [], "grounding_lr": []}
    for name, parameter in model.named_parameters():
        module = name.split(".")[0]
        if not parameter.requires_grad:
            continue
        if module == "net":  # the backbone, which is frozen, and the adapters
            groups["lr"].append(parameter)
        elif settings.task == "avqa" and module in grounding:
            groups["grounding_lr"].append(parameter)
        else:
            groups["head_lr"].append(parameter)
    parts = [{"params": group, "rate": rate} for rate, group in groups.items() if group]
    # Adapters are many small tensors. foreach updates them in fewer calls, to the same bits, which
    # saves a tenth of a toy's step.
    return torch.optim.Adam(parts, foreach=True)


def weights_path(settings):
    """The file of the backbone's weights; None for random ones.

    The toy's lie beside the toy data, for all tasks. Published ones are kept where torch.hub keeps
    them: Microsoft's, of ImageNet-22k, or torchvision's."""
    require(settings.weights, "--weights must be given: a file, or none for random weights")
    if settings.weights == "none":
        return None
    if settings.weights == "toy":
        return os.path.join(os.path.dirname(os.path.abspath(settings.data)), "nano.pt")
    if settings.weights == "imagenet":
        name = os.path.basename(published(settings))
        return os.path.join(torch.hub.get_dir(), "checkpoints", name)
    return settings.weights


def published(settings):
    """The address of a backbone's published weights: Microsoft's or torchvision's.

    Raises InputError if there are none, or for another image size than theirs."""
    _, _, size, name = lavish.BACKBONES[settings.backbone]
    require(name, f"{settings.backbone} has no published weights; give a file: --weights FILE")
    require(settings.image_size == size, f"the weights of {settings.backbone} are for {size} px")
    if name.startswith("swinv2"):
        return f"https://github.com/SwinTransformer/storage/releases/download/v2.0.0/{name}.pth"
    return torchvision.models.get_model_weights(name).DEFAULT.url


def make_weights(settings):
    """Pretrain or download weights that are not there yet.

    Only training does so: whoever scores a run wants the weights that it was trained on.
    Raises InputError with the address if they cannot be downloaded."""
    path = weights_path(settings)
    if path is None or os.path.exists(path):
        return
    if settings.weights == "toy":
        pretrain_nano(path, settings.device)
    elif settings.weights == "imagenet":
        url = published(settings)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as error:  # urllib's URLError is one
            advice = f"fetch {url} elsewhere and save it as {path}"
            raise InputError(f"cannot download weights ({error}); {advice}") from None


def pretrain_nano(path, device, steps=500, batch=32, lr=1e-3):
    """The nano Swin-V2 learns from toy IMAGES, without any sound: they are its ImageNet. Done once.

    An image has two attributes, shape and colour of a thing or direction and period of stripes.
    It is the paper's point that a transformer which never heard anything can learn to listen."""
    torch.manual_seed(0)
    backbone = lavish.make_backbone("nano").to(device)
    images, attributes = data.toy_images(5000, backbone.image_size, np.random.default_rng(0))
    images = torchvision.transforms.functional.normalize(
        images / 255, data.IMAGENET_MEAN, data.IMAGENET_STD
    )
    head = torch.nn.Linear(backbone.dims[-1], attributes.shape[1]).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in progress(range(steps), "pretraining nano on toy images"):
        chosen = torch.randint(len(images), (batch,))
        logits = head(backbone(images[chosen].to(device))[-1].mean(1))  # (batch,attributes)
        targets = attributes[chosen].to(device) / 2  # two of them, each with half the mass
        loss = F.cross_entropy(logits, targets)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    # With two true attributes at 1/2 each, the loss cannot fall below log 2.
    print(f"nano pretrained on toy images: loss {np.mean(losses[-50:]):.2f}, at best 0.69")
    data.save_tensors(backbone.cpu().state_dict(), path)


# ---------------------------------------------------------------- several processes
# `torchrun --nproc_per_node=N train.py ave` starts this script N times. Each process trains on its
# share of every epoch. DistributedDataParallel averages their gradients, so that all keep the same
# weights. Batch norms see their own process's clips.


def join_processes(device):
    """Once, before data are made or read; without torchrun there is nothing to join."""
    if "RANK" not in os.environ:
        return
    on_gpu = device != "cpu"
    dist.init_process_group("nccl" if on_gpu else "gloo")  # between GPUs; between CPUs
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # one GPU for each
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (only the first process prints)


def rank():
    """This process's number; the first one, 0, writes and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def in_parallel(model):
    """What to call in training."""
    if not dist.is_initialized():
        return model
    # Some runs have parameters that no loss reaches: the last adapter of the audio stream, where
    # the masks read the visual tokens alone.
    return torch.nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=True
    )


def gather(items):
    """A list of one process's results -> the list of all of them, in the order of the data set.

    Of n processes the r-th one scored the items r, r + n, r + 2n ..."""
    if not dist.is_initialized():
        return items
    parts = [None] * processes()  # a list of each process
    dist.all_gather_object(parts, items)
    total = sum(map(len, parts))  # items of all processes
    return [parts[i % processes()][i // processes()] for i in range(total)]


# ---------------------------------------------------------------- a run, epoch by epoch
# A run can be stopped at any moment and goes on from the last whole epoch. Nothing random is kept
# for that: order, dropout and negatives of an epoch follow from the seed and its number.


def start_run(settings, facts):
    """-> the model, what to call in training, the optimiser, and the log of the epochs done.

    With --resume all of them are as the last whole epoch left them. Raises InputError if the run
    was started with other settings, data or weights, and names the first that differs."""
    model = build(settings, facts)
    optimizer = make_optimizer(settings, model)
    log = []
    if settings.resume:
        saved = load_run(settings.out, "state.pt")
        for name, value in dataclasses.asdict(settings).items():
            theirs = getattr(saved["settings"], name)
            same = name in MAY_CHANGE or value == theirs
            require(same, f"{settings.out} was started with {name} {theirs}, not {value}")
        require(saved["facts"] == facts, f"{settings.out} was trained on other data or weights")
        lavish.load_trained_state_dict(model, saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
    return model, in_parallel(model), optimizer, log


# What a resumed run may change. report ignores PLACES when it groups runs.
PLACES = ("data", "out", "workers", "cache", "device", "resume")
RATES = ("lr", "head_lr", "grounding_lr", "linear_decay")
MAY_CHANGE = (*PLACES, *RATES, "weights", "epochs", "patience", "split", "question", "repeat")


def is_over(settings, log):
    """log -> whether training ends: after all epochs, or after `patience` of them of which none was
    better on val."""
    waited = len(log) - best_epoch(log)
    return len(log) >= settings.epochs or 0 < settings.patience <= waited


def best_epoch(log):
    """log -> the number of the epoch with the best val score, counted from 1; 0 before any.

    Of equal ones it is the first; released AVE and AVQA keep the last (AVE/main_trans.py:231,
    AVQA/net_grd_avst/main_avst.py:300)."""
    scores = [entry["val"] for entry in log]  # of each epoch
    return scores.index(max(scores)) + 1 if scores else 0


def start_epoch(settings, log, model, optimizer, loader):
    """Prepare the next epoch, and return the time at which it starts.

    The order of the clips, the noise of dropout and the learning rates follow from the seed and the
    epoch's number, so that a run which was stopped goes on bit for bit. Each process of torchrun
    has noise of its own."""
    epoch = len(log)  # counted from 0
    torch.manual_seed((settings.seed * 1000 + epoch) * 1000 + rank())  # of dropout
    loader.sampler.set_epoch(epoch)
    loader.dataset.epoch = epoch  # of the negatives
    decay = 1.0
    if settings.linear_decay:
        decay = 1 - (epoch + 0.5) / settings.epochs  # from 1 to 0, in the middle of this epoch
    for group in optimizer.param_groups:
        group["lr"] = getattr(settings, group["rate"]) * decay
    model.train()
    return time.time()


def autocast(settings):
    """Matrix products in bfloat16 within the block, if the run is in bf16."""
    kind = settings.device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=settings.precision == "bf16")


def on_device(settings, *tensors):
    """The tensors on the run's device."""
    return [tensor.to(settings.device, non_blocking=True) for tensor in tensors]


def epoch_name(log):
    """Of the epoch after those in the log."""
    return f"epoch {len(log) + 1}"


def check_finite(logits, log):
    """A net that diverges ends its run here, before it can spoil what is saved."""
    advice = "go on with --resume and" if log else "start again with"
    fault = f"the net's output is not finite in {epoch_name(log)}"
    require(logits.isfinite().all(), f"{fault}; {advice} a lower --lr and --head-lr")


def end_epoch(settings, facts, model, optimizer, log, losses, scores, start):
    """Logs an epoch and keeps its state for --resume, and the model if it is the best so far.

    The best is chosen on val, so that test is seen once. The release chooses on test
    (AVE/main_trans.py:167, AVS avs_s4/train.py:203)."""
    score = scores[METRIC[settings.task]]
    loss = float(np.mean(losses))  # over the steps of the epoch
    seconds = time.time() - start  # with scoring on val
    log.append({"loss": loss, "val": score, "seconds": seconds})
    is_best = best_epoch(log) == len(log)
    print(
        f"epoch {len(log):3}   loss {loss:.4f}   val {score:.4f}   {seconds:5.1f} s",
        "  best so far" if is_best else "",
        flush=True,
    )
    if rank() > 0:
        return
    run = {
        "settings": dataclasses.asdict(settings),
        "facts": facts,
        "trained": lavish.trained_state_dict(model),
    }
    if is_best:
        data.save_tensors(run, os.path.join(settings.out, "adapters.pt"))
    run["log"] = log  # for --resume, with what follows
    run["optimizer"] = optimizer.state_dict()
    data.save_tensors(run, os.path.join(settings.out, "state.pt"))
    data.write_lines(map(json.dumps, log), os.path.join(settings.out, "log.jsonl"))


# The score that chooses the epoch and stands for the run.
METRIC = {"ave": "accuracy", "avs": "mean IoU", "avqa": "accuracy", "ucf101": "accuracy"}


def finish(settings, facts, model, log, loader):
    """Scores the best epoch on test, once, and writes result.json: with it the run is done.

    gflop is that of one clip; seconds are those of the epochs, with scoring on val."""
    wait_for_all()  # until the first process has written the best epoch
    lavish.load_trained_state_dict(model, load_run(settings.out, "adapters.pt")["trained"])
    scores = EVALUATE[settings.task](settings, facts, model, loader)
    if rank() > 0:
        return
    trained, total = lavish.count_parameters(model)  # numbers of parameters
    seconds = sum(entry["seconds"] for entry in log)
    result = {
        "test": scores[METRIC[settings.task]],
        "scores": scores,
        "seconds": seconds,
        "gflop": count_gflop(settings, model),
        "trainable_parameters": trained,
        "total_parameters": total,
        "settings": dataclasses.asdict(settings),
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, torchaudio, np)},
    }
    data.write_lines([json.dumps(result, indent=1)], os.path.join(settings.out, "result.json"))
    os.remove(os.path.join(settings.out, "state.pt"))  # nothing is left to resume
    print("\ntest")
    print_scores(scores)
    print(f"{'trainable of all parameters':45} {trained:,} of {total:,}")
    print(f"{'seconds, of all epochs':45} {seconds:.0f}")
    item = data.source(loader)[0]  # the first test clip
    truth = item[3 if settings.task == "avqa" else 2]
    path = os.path.join(settings.out, "test.png")
    draw(settings, facts, model, inputs_of(settings, item), truth, path)
    print(f"Next: python train.py eval {shlex.quote(settings.out)}")


def print_scores(scores):
    """Print a line for each score, within 80 columns."""
    for name, value in scores.items():
        print(f"{name:45} {value:.4f}")


# ---------------------------------------------------------------- a trained run
# Its checkpoint holds settings, facts, adapters and head. The frozen backbone is built anew, from
# its own weights, and must be the one that was trained on.


def load_run(folder, name):
    """What end_epoch saved: settings (as Settings), facts, trained, and of state.pt the rest.

    Raises InputError for a file that is not of this kind: it may be anybody's."""
    path = os.path.join(folder, name)
    run = data.load_tensors(path)
    try:
        settings = Settings(**run["settings"])
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            require(type(value) is field.type, f"{field.name} is {value!r}")
        return {**run, "settings": settings, "facts": run["facts"], "trained": run["trained"]}
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is of no run of this program: {error}") from None


def open_run(folder, given):
    """A folder that training left -> settings, facts, and the model with its best epoch.

    given: what the command line says in place of the run's own settings, --device for example."""
    run = load_run(folder, "adapters.pt")
    given = {"device": default_device(), **given, "out": folder}
    settings = dataclasses.replace(run["settings"], **given)
    check_values(settings)
    model = build(settings, run["facts"])
    lavish.load_trained_state_dict(model, run["trained"])
    return settings, run["facts"], model.eval()


def evaluate(folder, given):
    """Print the scores of a trained run on a split of its data set, or of another one with --data,
    which must have the same classes, vocabulary and mask size."""
    settings, facts, model = open_run(folder, given)
    loader = make_loader(settings, open_split(settings, settings.split, facts))
    print_scores(EVALUATE[settings.task](settings, facts, model, loader))
    print(f"Next, beside other runs: python train.py report {shlex.quote(folder)} RUN ...")


def predict(folder, videos, given):
    """A trained run on videos as they come: print what it finds, draw what it sees.

    folder: of the run; videos: files that ffmpeg reads; given: options, among them --out, the
    folder of the pictures, and --question. A film is cut into clips as long as those that the net
    was trained on, because memory is finite."""
    pictures = given.pop("out", ".")
    settings, facts, model = open_run(folder, given)
    require(videos, "predict wants the folder of a run, then videos")
    possible = settings.task != "ucf101" and not settings.extra_audio
    require(possible, "predict is for ave (without --extra-audio), avs and avqa")
    asks = settings.question != ""
    require(asks == (settings.task == "avqa"), "--question goes with avqa, always")
    more = []  # that the net reads beside frames and spectrograms
    if asks:
        words = settings.question.strip().rstrip("?\uff1f").split(" ")
        more = [data.encode(words, facts["vocabulary"])]
    os.makedirs(pictures, exist_ok=True)
    for number, video in enumerate(videos):
        print(video)
        name = os.path.splitext(os.path.basename(video))[0]
        frames, spectrograms = read_video(settings, facts, video)
        length = {"ave": 10, "avs": 5}.get(settings.task, len(frames))  # as it was trained on
        for start in range(0, len(frames), length):
            end = start + length
            clip = [frames[start:end], spectrograms[start:end], *more]
            picture = os.path.join(pictures, f"{number}-{name}-{start:04d}.png")
            logits = draw(settings, facts, model, clip, None, picture)
            if settings.task != "avs":
                print_found(labels_of(settings, facts), logits, start)


def read_video(settings, facts, video):
    """A video file -> frames (T,3,S,S), spectrograms (T,S,S), through a temporary extraction.

    The same functions read it that read the data sets. T is its seconds, or AVQA's moments."""
    with tempfile.TemporaryDirectory() as folder:
        name = data.extract_video(video, folder)
        paths = data.frame_paths(data.video_folder(folder, name))
        sound = data.read_wav(data.wav_path(folder, name))
        seconds = data.seconds_of(sound, len(paths))  # (T,16000)
        if settings.task == "avqa":
            chosen = data.evenly(len(paths), settings.moments)
            paths = [paths[second] for second in chosen]
            seconds = seconds[chosen]
        frames = data.read_frames(paths, settings.image_size)
    return frames, data.spectrograms_of(seconds, settings.image_size, facts["stats"])


def labels_of(settings, facts):
    """The names of what the logits stand for: answers, or classes with the background last."""
    if settings.task == "avqa":
        return facts["vocabulary"]["answers"]
    return [*facts["classes"], "background"]


def print_found(names, logits, start):
    """Print the likeliest of the named events in each second, of logits (T,classes), from second
    `start` on; or the likeliest answer, of logits (answers,)."""
    p = logits.view(-1, len(names)).softmax(-1)  # (T,classes) or (1,answers)
    for t, (share, k) in enumerate(zip(*p.max(-1)), start):
        when = f"{t:4} s" if logits.dim() > 1 else "answer"
        print(f"{when}  {names[k]:40} {share:.2f}")


def draw(settings, facts, model, clip, truth, path):
    """Write a picture of a clip as PNG, a column for each second, with these rows: its frames; the
    same, bright where the latents of the audio stream look; its spectrograms; what the net finds
    and, where it is known, the truth, as masks or as text. Returns the logits.

    clip: inputs of the net without a batch; truth: labels, masks or None; path: of the PNG."""
    heat, logits = look(settings, model, clip)
    frames, spectrograms, *_ = clip
    columns = len(spectrograms)  # seconds, T
    mean = torch.tensor(data.IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(data.IMAGENET_STD)[:, None, None]
    images = (frames * std + mean).clamp(0, 1)
    images = images[:: len(images) // columns]  # (T,3,S,S); UCF101 has two frames for a sound
    rows = [images]  # of tiles (T,3,S,S)
    if heat is not None:
        rows.append(images * (0.2 + 0.8 * F.interpolate(heat, images.shape[-2:])))
    # As people draw spectrograms: time runs right and pitch up.
    sounds = (0.4 + spectrograms / 3).clamp(0, 1).transpose(1, 2).flip(1)  # (T,S,S)
    rows.append(sounds[:, None].expand_as(images))
    texts = []
    if settings.task == "avs":
        for mask in [logits] if truth is None else [logits, truth]:
            mask = (mask > 0).float()[:, None]  # (T,1,M,M)
            rows.append(images * 0.3 + F.interpolate(mask, images.shape[-2:]) * 0.7)
    else:
        names = labels_of(settings, facts)
        texts = [f"found: {names[k]}" for k in logits.argmax(-1).view(-1)]
        if truth is not None:
            texts = [f"{text}\ntrue: {names[k]}" for text, k in zip(texts, truth.view(-1))]
    tiles = [F.interpolate(row, (112, 112)) for row in rows]  # (T,3,112,112) each
    grid = torchvision.utils.make_grid(torch.cat(tiles), columns, 4, pad_value=1)  # (3,H,W)
    if texts:  # torchvision writes them into boxes, here one below each column
        below = torch.tensor([[4, grid.shape[1], 116, grid.shape[1] + 36]])
        boxes = below + torch.tensor([116, 0, 116, 0]) * torch.arange(len(texts))[:, None]
        grid = F.pad(grid, (0, 0, 0, 40), value=1)
        grid = torchvision.utils.draw_bounding_boxes(grid, boxes, texts, "black")
    png = torchvision.io.encode_png((grid * 255).byte())
    data.write_atomic(path, png.numpy().tobytes())
    print(f"drawn in {path}")
    return logits


def look(settings, model, clip):
    """-> where the latents of the audio stream look in the frames, (T,1,h,h), and the logits.

    It is the attention of the compression, softmax(L y^T) of eq. 7, in the middle block, averaged
    over the latents and scaled to 1 at the most. The middle block is where it says most: earlier
    ones have many small patches, later ones few large ones. None where the audio stream has no
    latents, without a Swin-V2, and for UCF101, which has two frames for a sound."""
    heats = []  # of the one pass that is looked at
    inputs = [x[None] for x in clip]  # a batch of one

    def keep(adapter, tokens):
        attention = (adapter.latents @ tokens[1].transpose(1, 2)).softmax(-1)  # (T,m,N)
        heat = attention.mean(1) / attention.mean(1).amax(1, keepdim=True)  # (T,N)
        heats.append(lavish.to_maps(heat[..., None].cpu()))

    adapter = None
    is_swin = isinstance(model.net.backbone, lavish.SwinV2)
    if settings.modality == "av" and settings.task != "ucf101" and is_swin:
        middle = len(model.net.audio_adapters) // 2
        adapter = model.net.audio_adapters[middle][0]
    if not hasattr(adapter, "latents"):  # one stream, late fusion, or a sound that reads nothing
        return None, logits_of(settings, model, inputs)[0]
    hook = adapter.register_forward_pre_hook(keep)
    logits = logits_of(settings, model, inputs)[0]
    hook.remove()
    return heats[0], logits


# ---------------------------------------------------------------- report and cost
# A table of runs that are done, and what a step costs without any data.


def report(runs):
    """Print mean and spread of runs that differ in seed, paths and device alone: a line for each
    group, with the number of runs, trainable parameters, GFLOP of a clip and mean seconds."""
    groups = defaultdict(list)  # {all that must be equal: results}
    for run in runs:
        path = os.path.join(run, "result.json")
        require(os.path.exists(path), f"no {path}: that run is not done; leave it out")
        result = data.read_json(path)
        try:
            settings = {**result["settings"], "seed": 0, **dict.fromkeys(PLACES)}
            folder = os.path.basename(os.path.normpath(result["settings"]["data"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is no result of a run ({error!r}); leave it out") from None
        groups[folder, str(settings)].append(result)
    print("  test  +- std  n  trainable   GFLOP  seconds  the first of them")
    for results in groups.values():
        first = results[0]
        tests = [result["test"] for result in results]
        spread = np.std(tests, ddof=1) if len(tests) > 1 else float("nan")
        seconds = np.mean([result["seconds"] for result in results])
        print(
            f"{np.mean(tests):6.3f} {spread:7.3f} {len(tests):2} "
            f"{first['trainable_parameters'] / 1e6:9.2f}M {first['gflop']:7.2f} {seconds:8.0f}  "
            f"{first['settings']['out']}"
        )


def bench(settings):
    """Print clips a second, memory and GFLOP of a task's net, on random clips.

    A training step is the forward pass, the backward pass and Adam; the loss is any number that
    depends on all outputs. An evaluation is the forward pass alone, without gradients."""
    # The sizes of the real data sets.
    vocabulary = {"words": range(93), "answers": range(42)}
    facts = {"classes": range(28), "mask_size": 224, "vocabulary": vocabulary}
    model = build(settings, facts)
    optimizer = make_optimizer(settings, model)
    clips = random_clips(settings)
    more = []  # that training has: AVS decodes the first frame alone, AVQA reads negatives
    if settings.task == "avs":
        more = [True]
    elif settings.task == "avqa" and settings.modality == "av":
        more = [clips[0]]

    def training():
        with autocast(settings):
            logits = model(*clips, *more)
        logits = logits if isinstance(logits, tuple) else [logits]
        loss = sum(x.square().mean() for x in logits if x is not None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def evaluation():
        with autocast(settings), torch.no_grad():
            model(*clips)

    for step in (training, evaluation):
        model.train(step is training)
        times = [clock(settings)]
        for _ in range(settings.repeat + 1):
            step()
            times.append(clock(settings))
        # The first step warms up and does not count. Machines are noisy, so that the slowest and
        # the fastest stand beside the median.
        speeds = settings.batch_size / np.diff(times)[1:]
        low, middle, high = np.quantile(speeds, (0, 0.5, 1))
        print(f"{step.__name__:10} {middle:.3g} clips/s, median ({low:.3g} to {high:.3g})")
    print(f"{'memory':10} {peak_memory(settings):.1f} GB at most")
    print(f"{'operations':10} {count_gflop(settings, model):.1f} GFLOP a clip, to evaluate it")


def random_clips(settings):
    """A batch of noise in place of a task's inputs, of the real lengths: frames (B,T,3,S,S),
    spectrograms (B,T,S,S), and what else the net reads."""
    B = settings.batch_size
    S = settings.image_size
    T = {"ave": 10, "avs": 5, "avqa": settings.moments, "ucf101": 16}[settings.task]
    sounds = T // 2 if settings.task == "ucf101" else T
    clips = [torch.randn(B, T, 3, S, S), torch.randn(B, sounds, S, S)]
    if settings.task == "avqa":
        clips.append(torch.ones(B, 14, dtype=torch.long))  # a long question
    if settings.extra_audio:
        clips.append(torch.randn(B, T, 128))
    return on_device(settings, *clips)


def clock(settings):
    """Seconds, when all that was asked of the device is done."""
    if settings.device != "cpu":
        torch.cuda.synchronize()  # a GPU answers before it is done
    return time.perf_counter()


def peak_memory(settings):
    """The most memory that was in use so far, in GB: of the GPU, or of this process on a CPU."""
    if settings.device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024  # the Mac counts bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def count_gflop(settings, model):
    """10^9 operations of the matrix products and convolutions in the evaluation of one clip, by
    torch's own counter: a multiplication and an addition are two."""
    clip = random_clips(dataclasses.replace(settings, batch_size=1))
    torch.backends.mha.set_fastpath_enabled(False)  # the counter knows no fused attention
    with FlopCounterMode(display=False) as counter, autocast(settings), torch.no_grad():
        model.eval()(*clip)
    return counter.get_total_flops() / 1e9


# ---------------------------------------------------------------- the command line
# Errors that the user can mend end here, in one line and with exit code 2.


def parse(arguments):
    """-> the command, what follows it, and {setting: value} of the options that are given.

    Every field of Settings is an option of every command. In training and bench settings_of refuses
    what a task lacks; eval and predict ignore it."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = [*TRAIN, "eval", "predict", "report", "bench"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("paths", nargs="*", help="runs and videos; the task to bench")
    for field in dataclasses.fields(Settings)[1:]:
        kind = {"type": field.type, **field.metadata["argument"]}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        option = "--" + field.name.replace("_", "-")
        meaning = field.metadata["help"]
        parser.add_argument(option, default=argparse.SUPPRESS, help=meaning, **kind)
    given = vars(parser.parse_intermixed_args(arguments))  # only what was typed, by SUPPRESS
    return given.pop("command"), given.pop("paths"), given


def default_device():
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(task, given, recipes):
    """The task's recipe, with what the command line gives in its place.

    Raises InputError for what cannot work, before any data are made or read."""
    settings = dataclasses.replace(recipes[task], **{"device": default_device(), **given})
    check_values(settings)
    # bf16 only where the GPU computes in it.
    if settings.device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False):
        settings.precision = given.get("precision", "bf16")
    for name in given:
        theirs = Settings.__dataclass_fields__[name].metadata["task"]
        require(theirs in (None, task), f"--{name.replace('_', '-')} is for {theirs}")
    if settings.modality != "av":
        both = settings.drop_path or settings.checkpoint_activations or settings.tpavi
        options = "--drop-path, --checkpoint-activations and --tpavi"
        require(not both, f"{options} want both streams: --modality av")
        require(
            (task, settings.modality) != ("avs", "a"),
            "segmentation needs frames: --modality av or v",
        )
    fits = task == "ucf101" or "videomae" not in settings.backbone
    require(fits, "VideoMAE reads clips of 16 frames: it is for ucf101")
    with torch.device("meta"):  # what does not exist or fit ends here, before any data are made
        net = build_net(settings, lavish.make_backbone(settings.backbone, settings.image_size))
        if task == "avs":
            lavish.AVS(net)
    settings.image_size = net.backbone.image_size
    return settings


def check_values(settings):
    """InputError for numbers and devices that cannot work."""
    for name in ("batch_size", "reduction", "groups", "epochs", "moments", "hidden", "repeat"):
        require(getattr(settings, name) > 0, f"--{name.replace('_', '-')} must be at least 1")
    for name in ("workers", "latents", "seed", "patience", "image_size"):
        require(getattr(settings, name) >= 0, f"--{name.replace('_', '-')} must be at least 0")
    require(0 <= settings.drop_path <= 1, "--drop-path must be from 0 to 1")
    require(settings.hidden % 4 == 0, "--hidden must be a multiple of 4, the attention heads")
    wide = settings.channels > 0 and settings.channels % 8 == 0
    require(wide, "--channels must be a multiple of 8, by which the decoder divides them")
    known = re.fullmatch("cpu|cuda(:[0-9]+)?", settings.device)
    require(known, "--device must be cpu or cuda")
    has_gpu = torch.cuda.is_available()
    require(has_gpu or settings.device == "cpu", "--device cuda: torch sees no GPU here")


def train(task, given):
    """Train a task from data to test score, in a folder of its own.

    A folder that holds a finished run is refused, so is one that another run is writing to, and
    with --resume one that holds none."""
    toy = f"toy/{task}"
    given = {"data": toy, **given}
    given.setdefault("out", f"runs/{os.path.basename(os.path.normpath(given['data']))}")
    missing_toy = given["data"] == toy and not os.path.exists(toy)
    recipes = TOY if missing_toy or data.is_toy(given["data"]) else PAPER
    settings = settings_of(task, given, recipes)
    weights_path(settings)  # says what is wrong with --weights before any data are made
    os.makedirs(settings.out, exist_ok=True)
    lock_folder(settings.out)
    is_done = os.path.exists(os.path.join(settings.out, "result.json"))
    is_stopped = os.path.exists(os.path.join(settings.out, "state.pt"))
    require(not is_done, f"{settings.out} holds a run that is done; choose another --out")
    if settings.resume:
        require(is_stopped, f"{settings.out} holds no run to --resume")
    else:
        advice = "add --resume, or choose another --out"
        require(not is_stopped, f"{settings.out} holds a run that is not done; {advice}")
    join_processes(settings.device)
    if rank() == 0:
        if missing_toy:
            data.make_toy(task, toy)
        make_weights(settings)
    wait_for_all()
    TRAIN[task](settings)
    if dist.is_initialized():
        wait_for_all()  # a process that leaves early, with the group open, may abort
        dist.destroy_process_group()


def lock_folder(folder):
    """Refuse a folder that another run is writing to.

    The system ends the lock with this process, however that ends, so that no stale file remains."""
    if os.name == "posix" and "RANK" not in os.environ:
        import fcntl

        try:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is writing to {folder}; choose another --out") from None


def run_command(command, paths, given):
    """Training, or one of the commands beside it. Under torchrun those run once, in the first
    process."""
    if command in TRAIN:
        require(not paths, f"{command} takes no {paths}; options begin with --")
        train(command, given)
    elif int(os.environ.get("RANK", 0)) == 0:
        require(paths, f"{command} of what? See: python train.py --help")
        if command == "eval":
            require(len(paths) == 1, "eval takes the folder of one run")
            evaluate(paths[0], given)
        elif command == "predict":
            predict(paths[0], paths[1:], given)
        elif command == "report":
            report(paths)
        else:
            require(paths[0] in TRAIN, f"bench takes a task: {', '.join(TRAIN)}")
            given = {"weights": "none", "batch_size": 1, **given}
            bench(settings_of(paths[0], given, PAPER))


def main(arguments=None):
    """Run one command. Exit codes: 0, 2 for what the user can mend (in one line on stderr), 130
    after Ctrl-C."""
    command, paths, given = parse(arguments)
    try:
        run_command(command, paths, given)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is read-only
        # From a loader's process the message comes with its trace; the last line is ours.
        line = str(error).rstrip().split("\n")[-1].removeprefix("lavish.InputError: ")
        print(f"train.py: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        hint = "; --resume goes on after the last whole epoch" if command in TRAIN else ""
        print(f"train.py: stopped{hint}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
