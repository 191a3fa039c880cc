# SPDX-License-Identifier: MIT
"""Training: one plain loop per task, from data to test score.

    python train.py ave                              the toy, from nothing
    python train.py ave --data AVE_Dataset           the paper's experiment
    python train.py eval runs/ave --split test       score a trained run
    python train.py predict runs/ave VIDEO.mp4       a trained run on videos
    python train.py look runs/ave                    where the latents look
    python train.py report runs/*                    mean and spread of runs
    python train.py bench ave --latents 2            cost, on random data

The tasks are ave, avs, avqa, ucf101. --help lists the settings. Those that are
not given come from the task's recipe: the toy's for toy data, the paper's for
any other. What each command makes use of:

    TASK        all except the last group, of one command alone
    eval        --split --data --weights --device --precision --batch-size
                --workers; all others are the run's own
    predict     --question --out --weights --device --precision
    look        as predict; without a video also --data --batch-size --workers
    report      none
    bench       those of machine, net and training; --repeat

A run leaves in --out
    adapters.pt   what was trained, of the epoch that is best on val
    result.json   scores, log of the epochs, settings: the run is done
    test.png      the first test clip with an error: found and true
    state.pt      for --resume, until the run is done

Read the settings and train_ave first; the other three loops differ where their
tasks do. That is all one needs to change a loop. Below them, from top to bottom:
how a model is scored; how data are opened, a net and its optimiser built;
several processes; what a run keeps of each epoch; what one does with a trained
run; report and cost; the command line.

Glossary
    settings    all that a run is told, an instance of Settings
    given       {setting: value} of the options on the command line
    facts       what a model must know of its data: classes or vocabulary, mask
                size, statistics of the spectrograms, AVQA's commonest answers;
                and the checksum of its frozen weights
    log         {"loss", "val", "seconds"} of each epoch that is done
    scores      {what: number}, the score of the task first
    B, T, S, M  clips in a batch, seconds of a clip, pixels of the side of an
                image and of a mask
"""

import argparse
import inspect
import json
import math
import os
import sys
import tempfile
import textwrap
import time
import zlib
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from os.path import basename, exists, normpath
from statistics import mode

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

import data
import lavish
from data import progress
from lavish import InputError, require

# ---------------------------------------------------------------- settings and recipes
# One dataclass holds all settings. A recipe is an instance of it: the paper's for real data, the
# toy's for toys. The command line replaces single fields. --help prints the class as it stands.


@dataclass
class Settings:
    """Each field but the first is an option of the command line."""

    task: str  # ave, avs, avqa or ucf101

    # Paths and machine. Workers and resume never change a result; device,
    # precision and compile change how it is rounded.
    data: str = ""  # folder of the data set; a toy's is made if missing
    out: str = ""  # folder of the run (runs/NAME_OF_THE_DATA), of pictures
    seed: int = 0  # of adapters, head, random weights, order, negatives
    workers: int = 4  # processes that read clips, at most one a core
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: str = "fp32"  # fp32 or bf16, by autocast
    compile: bool = False  # minutes at the start, then faster steps
    resume: bool = False  # go on with a stopped run, by its own settings

    # The net. The defaults are what the supplementary gives for AVS and AVQA.
    backbone: str = "large"  # a name of lavish.BACKBONES
    weights: str = "imagenet"  # imagenet, toy (nano's), none, or a file
    image_size: int = 0  # pixels a side; 0: what the weights are for
    modality: str = "av"  # both streams, or one alone: v or a
    latents: int = 16  # tokens m of an adapter; 0: late fusion
    reduction: int = 4  # r: width of a stage / width of its bottleneck
    groups: int = 2  # channel groups of the bottleneck's convolutions
    one_direction: bool = False  # vision reads sound, sound reads nothing
    checkpoint_activations: bool = False  # less memory, more time

    # The training. The rates are Adam's.
    epochs: int = 30  # at most
    patience: int = 0  # epochs to wait for a better val score; 0: for ever
    batch_size: int = 1  # clips of a step, in each process
    lr: float = 1e-4  # learning rate of the adapters
    head_lr: float = 1e-4  # learning rate of the head
    linear_decay: bool = False  # all rates fall linearly to zero

    # What one task alone has; the others ignore it.
    extra_audio: str = ""  # ave: .npy of VGGish features for the head
    tpavi: bool = False  # avs: AVSBench's own audio-visual block too
    first_second: bool = False  # avs: train on a clip's first second alone
    channels: int = 256  # avs: width of the decoder, a multiple of 8
    moments: int = 10  # avqa: seconds of a video that are looked at
    hidden: int = 512  # avqa: width of the head, a multiple of 4
    grounding_lr: float = 3e-6  # avqa: of grounding, match and answer

    # What one command alone has.
    split: str = "test"  # eval: what to score: train, val or test
    question: str = ""  # predict, look: what to ask of a video, with avqa
    repeat: int = 3  # bench: measured steps


CHOICES = {
    "precision": ("fp32", "bf16"),
    "modality": ("av", "v", "a"),
    "split": ("train", "val", "test"),
}
NEVER_ZERO = (
    "batch_size",
    "reduction",
    "groups",
    "epochs",
    "channels",
    "moments",
    "hidden",
    "repeat",
)

# The supplementary's settings, on Swin-V2-L at 192 px, where they are not the defaults. It states
# no epochs; these are the release's, and so is the patience of AVE and AVQA.
PAPER = {
    # AVE: ten seconds a clip, two latents; more of them did not help the paper (Figure 1).
    "ave": Settings(
        "ave",
        latents=2,
        reduction=8,
        batch_size=2,
        lr=5e-6,
        head_lr=4e-6,
        epochs=50,  # AVE/README.md:30
        patience=5,
    ),
    # AVS: five seconds a clip and a decoder of 19M, which learns as fast as the adapters.
    "avs": Settings(
        "avs",
        batch_size=4,
        epochs=30,  # AVS/README.md:14; its early stop never fires, avs_s4/train.py:281
    ),
    # AVQA: ten moments of a minute, so that one clip fills a GPU. 3e-6 is the rate of "the
    # grounding modules and the final prediction layer".
    "avqa": Settings(
        "avqa",
        lr=8e-5,
        head_lr=8e-5,  # not in the supplementary; released: main_avst.py:289
        epochs=30,  # AVQA/README.md:14
        patience=5,
    ),
    # UCF101, the supplementary's Table 2, by VideoMAE. The 7.4M of the table fix r and groups; the
    # rest is our guess.
    "ucf101": Settings(
        "ucf101",
        backbone="videomae",
        weights="",  # must be given: nobody publishes them under a fixed address
        batch_size=4,
        latents=2,
        head_lr=1e-3,
        epochs=20,
    ),
}

# The same adapters on a toy backbone. A net this small wants larger steps, and rates that fall: the
# gates start at zero and have to open within the first epochs, and the rest has to settle.
NANO = {
    "backbone": "nano",
    "weights": "toy",
    "latents": 2,
    "reduction": 8,
    "workers": 0,
    "batch_size": 8,
    "head_lr": 1e-3,
    "linear_decay": True,
    "patience": 0,
}
TOY = {
    "ave": replace(PAPER["ave"], **NANO, lr=2e-2, epochs=6),
    "avs": replace(PAPER["avs"], **NANO, channels=64, first_second=True, lr=1e-2, epochs=12),
    "avqa": replace(
        PAPER["avqa"], **NANO, moments=1, hidden=128, lr=4e-3, grounding_lr=1e-3, epochs=9
    ),
    "ucf101": replace(
        replace(PAPER["ucf101"], **NANO),
        backbone="videomae_nano",
        weights="none",  # random weights are enough
        lr=2e-3,
        epochs=8,
    ),
}

# ---------------------------------------------------------------- AVE
# The four loops are alike on purpose: read this one, then look for what the others do differently.


def train_ave(settings, net):
    """Audio-visual event localisation, from settings to test score. net: see make_net.

    Clips of ten seconds. Each second is labelled as one event or background, and all seconds count
    the same."""
    dataset = open_split(settings, "train")
    facts = {
        "classes": dataset.classes,
        "stats": dataset.stats,
        "backbone": checksum(net.backbone),
    }
    train = load_in_new_orders(settings, dataset)
    val = load_in_order(settings, "val", facts)
    test = load_in_order(settings, "test", facts)

    model = add_head(settings, facts, net)
    optimizer = make_optimizer(model)
    log = resume(settings, facts, model, optimizer)  # of the epochs done; empty without --resume
    # What to call in training: the model, on several processes DistributedDataParallel around it.
    parallel = in_parallel(model)

    for epoch in range(len(log), settings.epochs):
        if has_waited_enough(settings, log):
            break
        start = time.time()
        set_rates(settings, optimizer, epoch)
        # All random numbers follow from --seed and the epoch, so that a resumed run has the same
        # bits: here those of dropout, if a net has any; in batches the order.
        seed_epoch(settings, epoch)
        model.train()
        losses = []  # of each step
        # (B,10,3,S,S), (B,10,S,S) and (B,10); extra, (B,10,128), only with --extra-audio
        for frames, spectrograms, *extra, labels in batches(settings, train, epoch):
            with autocast(settings):
                logits = parallel(frames, spectrograms, *extra)  # (B,10,29), of a toy (B,10,5)
            check_finite(logits)
            # Binary cross-entropy of the softmax against the one-hot label, as the release has it
            # (AVE/nets/net_trans.py:425, main_trans.py:219); cross_entropy is another loss.
            targets = F.one_hot(labels, logits.shape[-1]).float()
            loss = F.binary_cross_entropy(logits.softmax(-1), targets)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del logits, loss  # free their graph now, else the memory of the next step is fragmented

        scores = evaluate_ave(settings, facts, model, val)
        log.append(log_entry(losses, scores["accuracy"], start))
        save_epoch(settings, facts, model, optimizer, log)

    load_best_epoch(settings, model)
    scores = evaluate_ave(settings, facts, model, test)
    finish(settings, facts, model, log, test, scores)


def evaluate_ave(settings, facts, model, loader):
    """Score a model on a split, as Tian et al. do: every second of every clip counts alike.

    -> {what: number}: accuracy over all seconds and, to compare it with, that of "background"
    everywhere. Here and below, the first number is the score of the task."""
    found, truth = labels_of(settings, model, loader)  # (clips,10) each
    background = len(facts["classes"])  # the number of its label
    return {
        "accuracy": np.mean(found == truth),
        "if all were called background": np.mean(truth == background),
    }


# ---------------------------------------------------------------- AVS
# The difference from AVE: the loss sees one frame of five, and the scores are of masks.


def train_avs(settings, net):
    """Audio-visual segmentation, from settings to test score.

    Clips of five seconds with a frame each. In training only the first frame has a mask."""
    dataset = open_split(settings, "train")
    facts = {
        "mask_size": dataset.mask_size,
        "stats": dataset.stats,
        "backbone": checksum(net.backbone),
    }
    train = load_in_new_orders(settings, dataset)
    val = load_in_order(settings, "val", facts)
    test = load_in_order(settings, "test", facts)

    model = add_head(settings, facts, net)
    optimizer = make_optimizer(model)
    log = resume(settings, facts, model, optimizer)  # of the epochs done; empty without --resume
    parallel = in_parallel(model)

    for epoch in range(len(log), settings.epochs):
        if has_waited_enough(settings, log):
            break
        start = time.time()
        set_rates(settings, optimizer, epoch)
        seed_epoch(settings, epoch)
        model.train()
        losses = []  # of each step
        for frames, spectrograms, masks in batches(settings, train, epoch):
            # S4 has a mask of the first frame only (AVS/avs_scripts/avs_s4/loss.py:17-24). Without
            # TPAVI the seconds meet only in the adapters' batch statistics, so that a toy leaves
            # the other four out.
            if settings.first_second:
                frames = frames[:, :1]  # (B,1,3,S,S)
                spectrograms = spectrograms[:, :1]
            with autocast(settings):
                logits = parallel(frames, spectrograms, first_only=True)  # (B,1,M,M)
            check_finite(logits)
            loss = F.binary_cross_entropy_with_logits(logits, masks)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del logits, loss

        scores = evaluate_avs(settings, facts, model, val)
        log.append(log_entry(losses, scores["mean IoU"], start))
        save_epoch(settings, facts, model, optimizer, log)

    load_best_epoch(settings, model)
    scores = evaluate_avs(settings, facts, model, test)
    finish(settings, facts, model, log, test, scores)


def evaluate_avs(settings, facts, model, loader):
    """-> {what: number}: mean IoU over all frames, and the F score."""
    ious = []
    f_scores = []
    for logits, masks in outputs(settings, model, loader):  # (B,5,M,M)
        logits = logits[:, : masks.shape[1]].flatten(0, 1)  # train has a mask of the first frame
        masks = masks.flatten(0, 1)  # (n,M,M)
        ious.extend(mask_iou(logits, masks).tolist())
        f_scores.extend(f_score(logits, masks).tolist())
    ious = gather(ious)  # (frames,)
    f_scores = torch.tensor(gather(f_scores))  # (frames,255)
    # The best threshold of the split. AVSBench takes the best of each batch and averages those
    # (avs_s4/utils/utility.py:105-118): its score rises as batches get smaller.
    return {"mean IoU": np.mean(ious), "F score": f_scores.nanmean(0).max().item()}


def mask_iou(logits, masks):
    """Logits and 0/1 masks (n,M,M) -> IoU of each frame (n,), as AVSBench counts it: an empty mask
    scores the share of pixels predicted empty (utility.py:45-70)."""
    p = logits.flatten(1) > 0  # (n,M*M): a sigmoid above 1/2
    m = masks.flatten(1) > 0  # (n,M*M)
    intersection = (p & m).sum(1)  # (n,)
    union = (p | m).sum(1)  # (n,)
    return torch.where(m.any(1), intersection / union.clamp(min=1), (~p).float().mean(1))


def f_score(logits, masks):
    """Logits and 0/1 masks (n,M,M) -> F scores (n,255) with beta^2 = 0.3, one for each threshold on
    the sigmoid; NaN for an empty mask, which has no recall (utility.py:74-118)."""
    p = logits.sigmoid().flatten(1)  # (n,M*M)
    m = masks.flatten(1)  # (n,M*M)
    scores = []
    for threshold in torch.linspace(0, 1, 255):
        predicted = (p >= threshold).float()
        true_positives = (predicted * m).sum(1)  # (n,)
        precision = true_positives / predicted.sum(1).clamp(min=1)
        recall = true_positives / m.sum(1)  # 0 / 0 is NaN
        sum_of_both = (0.3 * precision + recall).clamp(min=1e-20)
        scores.append(1.3 * precision * recall / sum_of_both)
    return torch.stack(scores, 1)


# ---------------------------------------------------------------- AVQA
# The difference from AVE: a second loss on negatives, and a table by type of question.


def train_avqa(settings, net):
    """Audio-visual question answering, from settings to test score.

    The net also learns, with half the weight, whether a frame goes with the sound: its own frames
    do, those of other videos (negatives) do not."""
    dataset = open_split(settings, "train")
    facts = {
        "guesses": commonest_answers(dataset.questions),
        "vocabulary": dataset.vocabulary,
        "stats": dataset.stats,
        "backbone": checksum(net.backbone),
    }
    if settings.modality == "av":  # one stream alone has no negatives: a match takes two
        dataset = data.NegativeFrames(dataset, settings.seed)
    train = load_in_new_orders(settings, dataset)
    val = load_in_order(settings, "val", facts)
    test = load_in_order(settings, "test", facts)

    model = add_head(settings, facts, net)
    optimizer = make_optimizer(model)
    log = resume(settings, facts, model, optimizer)  # of the epochs done; empty without --resume
    parallel = in_parallel(model)

    for epoch in range(len(log), settings.epochs):
        if has_waited_enough(settings, log):
            break
        start = time.time()
        set_rates(settings, optimizer, epoch)
        seed_epoch(settings, epoch)
        model.train()
        losses = []  # of each step
        for frames, spectrograms, question, *negatives, answer in batches(settings, train, epoch):
            with autocast(settings):
                logits, match = parallel(frames, spectrograms, question, *negatives)
            check_finite(logits)
            loss = F.cross_entropy(logits, answer)  # logits (B,answers)
            if match is not None:
                # Does this frame go with this sound? Here the first half does, 1, and the second
                # does not, 0; loss and weight are the release's (AVQA/net_grd_avst/
                # main_avst.py:86-88).
                halves = torch.tensor([1, 0], device=match.device)
                truth = halves.repeat_interleave(len(match) // 2)  # (2BT,)
                loss = loss + 0.5 * F.cross_entropy(match, truth)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del logits, match, loss

        scores = evaluate_avqa(settings, facts, model, val)
        log.append(log_entry(losses, scores["accuracy"], start))
        save_epoch(settings, facts, model, optimizer, log)

    load_best_epoch(settings, model)
    scores = evaluate_avqa(settings, facts, model, test)
    finish(settings, facts, model, log, test, scores)


def evaluate_avqa(settings, facts, model, loader):
    """-> {what: number}: accuracy over all questions, what the words of the questions alone would
    score, and accuracy by type of question."""
    found, truth = labels_of(settings, model, loader)  # (questions,) each
    right = found == truth
    by_type = defaultdict(list)  # {type of question: is each one right?}
    guessed = []  # would the commonest answer be right?
    for is_right, question in zip(right, loader.dataset.questions):
        modality, kind = question["type"]
        by_type[f"{modality} {kind}"].append(is_right)
        by_type[f"{modality} average"].append(is_right)
        guess = facts["guesses"].get(" ".join(question["words"]))
        guessed.append(guess == question["answer"])
    scores = {
        "accuracy": np.mean(right),
        "from the words of the question alone": np.mean(guessed),
    }
    for name in sorted(by_type):
        scores[f"{name} ({len(by_type[name])})"] = np.mean(by_type[name])
    return scores


def commonest_answers(questions):
    """What one can say without eyes and ears: {question: its commonest answer in training}."""
    answers = defaultdict(list)
    for question in questions:
        answers[" ".join(question["words"])].append(question["answer"])
    return {words: mode(those) for words, those in answers.items()}


# ---------------------------------------------------------------- UCF101
# The difference from AVE: one label for a clip, and clips without sound.


def train_ucf101(settings, net):
    """Action recognition, from settings to test score. 16 frames and 8 seconds of sound a clip,
    which may be silent."""
    dataset = open_split(settings, "train")
    facts = {
        "classes": dataset.classes,
        "stats": dataset.stats,
        "backbone": checksum(net.backbone),
    }
    train = load_in_new_orders(settings, dataset)
    val = load_in_order(settings, "val", facts)
    test = load_in_order(settings, "test", facts)

    model = add_head(settings, facts, net)
    optimizer = make_optimizer(model)
    log = resume(settings, facts, model, optimizer)  # of the epochs done; empty without --resume
    parallel = in_parallel(model)

    for epoch in range(len(log), settings.epochs):
        if has_waited_enough(settings, log):
            break
        start = time.time()
        set_rates(settings, optimizer, epoch)
        seed_epoch(settings, epoch)
        model.train()
        losses = []  # of each step
        for frames, spectrograms, label in batches(settings, train, epoch):
            with autocast(settings):
                logits = parallel(frames, spectrograms)  # (B,classes)
            check_finite(logits)
            loss = F.cross_entropy(logits, label)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del logits, loss

        scores = evaluate_ucf101(settings, facts, model, val)
        log.append(log_entry(losses, scores["accuracy"], start))
        save_epoch(settings, facts, model, optimizer, log)

    load_best_epoch(settings, model)
    scores = evaluate_ucf101(settings, facts, model, test)
    finish(settings, facts, model, log, test, scores)


def evaluate_ucf101(settings, facts, model, loader):
    """-> {what: number}: accuracy over all clips."""
    found, truth = labels_of(settings, model, loader)  # (clips,) each
    return {"accuracy": np.mean(found == truth)}


# ---------------------------------------------------------------- what the tasks share
# All tasks are evaluated by the same loop, `outputs`. The functions above turn what it yields into
# their scores.


def labels_of(settings, model, loader):
    """Two arrays over all clips of a split: the labels that the model finds, and the true ones."""
    found = []
    truth = []
    for logits, labels in outputs(settings, model, loader):  # (B,...,classes), (B,...)
        found.extend(logits.argmax(-1).tolist())
        truth.extend(labels.tolist())
    return np.array(gather(found)), np.array(gather(truth))


def outputs(settings, model, loader):
    """The one loop of evaluation: yield the logits of each batch, on the CPU, and the truth.

    The model is in evaluation mode: batch norms use their running statistics, dropout is off."""
    model.eval()
    if dist.is_initialized():
        for buffer in model.buffers():  # the statistics of the first process, as it saves them
            dist.broadcast(buffer, 0)
    for *inputs, truth in progress(loader, "score"):
        yield logits_of(settings, model, inputs), truth


@torch.no_grad()
def logits_of(settings, model, inputs):
    """What the net says to a batch of inputs, on the CPU. The model is in evaluation mode."""
    with autocast(settings):
        logits = model(*on_device(settings, inputs))
    if settings.task == "avqa":
        logits, _ = logits  # and no match
    check_finite(logits)
    return logits.cpu()


# By the name on the command line.
LOOPS = {"ave": train_ave, "avs": train_avs, "avqa": train_avqa, "ucf101": train_ucf101}
SCORERS = {
    "ave": evaluate_ave,
    "avs": evaluate_avs,
    "avqa": evaluate_avqa,
    "ucf101": evaluate_ucf101,
}

# ---------------------------------------------------------------- data, model, optimiser
# Each process has its share of every split.


def open_split(settings, split, facts=None):
    """One split, with every file known to be there.

    facts: of the training split. Its statistics and its vocabulary are used here too. Classes and
    mask size must be the same here; InputError otherwise."""
    facts = facts or {}
    options = {"stats": facts.get("stats")}
    if settings.task == "ave":
        options["extra_audio"] = settings.extra_audio
    if settings.task == "avqa":
        options["moments"] = settings.moments
        options["vocabulary"] = facts.get("vocabulary")
    dataset = data.DATASETS[settings.task](settings.data, split, settings.image_size, **options)
    for name in ("classes", "mask_size"):
        same = name not in facts or facts[name] == getattr(dataset, name)
        require(same, f"{settings.data}: {split} has other {name} than training")
    missing = data.missing_files(dataset)
    require(not missing, f"{len(missing)} files are missing: {missing[:1]} ...; see the README")
    return dataset


def load_in_new_orders(settings, dataset):
    """Batches for training, in another order in each epoch (see `batches`)."""
    sampler = DistributedSampler(dataset, processes(), rank(), seed=settings.seed)
    return make_loader(settings, dataset, sampler)


def load_in_order(settings, split, facts):
    """Batches of a split for scoring: each process has its share, which are items in a row."""
    dataset = open_split(settings, split, facts)
    shares = np.array_split(range(len(dataset)), processes())
    return make_loader(settings, dataset, shares[rank()])


def make_loader(settings, dataset, sampler):
    """Batches of a dataset, read by settings.workers processes; 0: by this one."""
    return DataLoader(
        dataset,
        settings.batch_size,
        sampler=sampler,
        num_workers=min(settings.workers, cores()),  # more of them only slow each other down
        # One of its own, so that the loader does not use up the random numbers of dropout.
        generator=torch.Generator(),
    )


def cores():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux, where it may be fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def batches(settings, loader, epoch):
    """The training batches of an epoch, on the device. The sampler shuffles them in an order of
    this epoch; AVQA's data set draws other negatives, the rest do not look at the number."""
    loader.sampler.set_epoch(epoch)
    loader.dataset.epoch = epoch
    for batch in progress(loader, "train"):
        yield on_device(settings, batch)


def make_net(settings):
    """The frozen backbone with its adapters, which start from the seed.

    It is built before data are made or read, so that an option which does not fit ends here.
    Sets settings.image_size, where that was left to the backbone. Raises InputError."""
    torch.manual_seed(settings.seed)
    backbone = lavish.make_backbone(settings.backbone, settings.image_size)
    settings.image_size = backbone.image_size
    if isinstance(backbone, lavish.VideoMAE):
        require(settings.task == "ucf101", "VideoMAE reads 16 frames: it is for ucf101")
    if settings.task == "avs":
        require(len(backbone.dims) > 1, "segmentation needs maps of several stages")
    if settings.modality != "av":
        of_two = settings.one_direction or settings.checkpoint_activations or settings.compile
        require(not of_two, "one direction, recomputed activations, --compile: of both streams")
    try:
        if settings.modality != "av":
            return lavish.OneStream(
                backbone, settings.modality, settings.reduction, settings.groups
            )
        if settings.compile:
            print("--compile: the first steps take some minutes")
        return lavish.Lavish(
            backbone,
            settings.latents,
            settings.reduction,
            settings.groups,
            one_direction=settings.one_direction,
            checkpoint_activations=settings.checkpoint_activations,
            compile_blocks=settings.compile,
        )
    except (ValueError, RuntimeError) as error:  # also too many latents for the memory
        raise InputError(f"{settings.backbone} with these options: {error}") from None


def load_weights(settings, net):
    """Give the backbone its pretrained weights, if it has any."""
    if settings.weights != "none":
        lavish.load_pretrained(net.backbone, data.load_tensors(weights_path(settings)))


def add_head(settings, facts, net):
    """The model of a task on its device: the net and a head, which starts from the seed too."""
    if settings.task == "ave":
        extra_width = 128 if settings.extra_audio else 0
        model = lavish.AVE(net, len(facts["classes"]) + 1, extra_width)
    elif settings.task == "avs":
        model = lavish.AVS(net, facts["mask_size"], settings.channels, settings.tpavi)
    elif settings.task == "avqa":
        vocabulary = facts["vocabulary"]
        words = len(vocabulary["words"])
        model = lavish.AVQA(net, words, len(vocabulary["answers"]), settings.hidden)
    else:
        model = lavish.UCF101(net, len(facts["classes"]))
    return model.to(settings.device)


def checksum(module):
    """A number that tells two sets of weights apart: the CRC-32 of all their bytes."""
    value = 0
    for tensor in module.state_dict().values():
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return value


def make_optimizer(model):
    """Adam, with a learning rate for each part of the model, which set_rates sets by its name.

    The supplementary gives 3e-6 to "the grounding modules and the final prediction layer" of AVQA's
    head; the rest (embedding, LSTM, question, input projections, fusion) has head_lr."""
    # The setting that holds the rate of each part. The net has the adapters, and the backbone,
    # which is frozen. AVQA's head alone has the others.
    rate_names = {"net": "lr"}
    for module in ("audio_out", "visual_out", "match", "when_heard", "when_seen", "answer"):
        rate_names[module] = "grounding_lr"
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.split(".")[0]
            groups[rate_names.get(module, "head_lr")].append(parameter)
    parts = [{"params": group, "rate_name": name} for name, group in groups.items()]
    # Adapters are many small tensors. foreach updates them in fewer calls, to the same bits, which
    # saves a tenth of a toy's step.
    return torch.optim.Adam(parts, foreach=True)


def weights_path(settings):
    """The file of the backbone's weights; with --weights none it is not read.

    The toy's lie beside the toy data, for all tasks; with other data in toy/. Published ones are
    kept where torch.hub keeps them. Raises InputError if this backbone has no such weights, or if
    the published ones are for another image size."""
    _, _, size, url = lavish.BACKBONES[settings.backbone]
    if settings.weights == "toy":
        folder = f"{settings.data}/.." if data.is_toy(settings.data) else "toy"
        require("nano" in settings.backbone, "--weights toy are for nano, vit_nano, resnet_nano")
        return normpath(f"{folder}/{settings.backbone}.pt")
    if settings.weights == "imagenet":
        require(url, f"{settings.backbone} has no published weights; give a file: --weights FILE")
        require(settings.image_size == size, f"weights of {settings.backbone} are for {size} px")
        return f"{torch.hub.get_dir()}/checkpoints/{basename(url)}"
    require(settings.weights, "--weights must be given: a file, or none for random weights")
    return settings.weights


def make_weights(settings):
    """Pretrain or download weights that are not there yet.

    Only training does so: whoever scores a run wants the weights that it was trained on.
    Raises InputError with the address if they cannot be downloaded."""
    path = weights_path(settings)
    if exists(path):
        return
    if settings.weights == "toy":
        with torch.random.fork_rng([]):  # the head, which is made later, starts from --seed
            torch.manual_seed(0)
            pretrain_nano(settings.backbone, path)
    elif settings.weights == "imagenet":
        *_, url = lavish.BACKBONES[settings.backbone]
        data.make_folder_of(path)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as error:  # urllib's URLError is one
            raise InputError(f"cannot fetch {url} ({error}); save it as {path}") from None


def pretrain_nano(name, path, steps=300):
    """A nano backbone learns from toy IMAGES, without any sound: they are its ImageNet. Done once.

    It is the paper's point that a transformer which never heard anything can learn to listen."""
    backbone = lavish.make_backbone(name)
    images, classes = data.toy_images(3000, np.random.default_rng(0))
    head = torch.nn.Linear(backbone.dims[-1], 16)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in progress(range(steps), f"pretraining {name} on toy images"):
        chosen = torch.randint(len(images), (32,))
        logits = head(lavish.image_vectors(backbone, backbone(images[chosen])[-1]))  # (32,16)
        loss = F.cross_entropy(logits, classes[chosen])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    images, classes = data.toy_images(1000, np.random.default_rng(1))  # others
    backbone.eval()
    with torch.no_grad():
        logits = head(lavish.image_vectors(backbone, backbone(images)[-1]))  # (1000,16)
    accuracy = (logits.argmax(-1) == classes).float().mean()
    data.make_folder_of(path)
    data.save_tensors(backbone.state_dict(), path)
    print(f"{name} is pretrained on toy images: accuracy {accuracy:.3f}; kept in {path}")


# ---------------------------------------------------------------- several processes
# `torchrun --nproc_per_node=N train.py ave` starts this script N times. Each process trains on its
# share of every epoch. DistributedDataParallel averages their gradients, so that all keep the same
# weights. Batch norms see their own process's clips.


def join_processes(device):
    """Once, before data are made or read; without torchrun there is nothing to join."""
    if "RANK" not in os.environ:
        return
    on_gpu = device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")  # between GPUs; between CPUs
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # one GPU for each
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (only the first process prints)


def rank():
    """This process's number, from torchrun; the first one, 0, writes and talks."""
    return int(os.environ.get("RANK", 0))


def processes():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_processes():
    """Once, at the end of a run; the inverse of join_processes."""
    if dist.is_initialized():
        wait_for_all()  # a process that leaves early, with the group open, may abort
        # torch's own thread frees the last message, for which it needs Python. Without a pause
        # torch 2.6 waits for ever, once in some twenty times.
        time.sleep(0.1)
        dist.destroy_process_group()


def in_parallel(model):
    """The model to call in training: in DistributedDataParallel, if there are several processes."""
    if not dist.is_initialized():
        return model
    # Some runs have parameters that no loss reaches: the last adapter of the audio stream, where
    # the masks read the visual tokens alone.
    return torch.nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=True
    )


def gather(items):
    """A list of one process's results -> the list of all of them, in the order of the data set."""
    if not dist.is_initialized():
        return items
    parts = [None] * processes()  # a list of each process
    dist.all_gather_object(parts, items)
    return sum(parts, [])  # one after the other, as load_in_order has cut them


# ---------------------------------------------------------------- a run, epoch by epoch
# A run can be stopped at any moment and goes on from the last whole epoch. Nothing random is kept
# for that: order, dropout and negatives of an epoch follow from the seed and the epoch's number.


def resume(settings, facts, model, optimizer):
    """With --resume, bring model and optimiser to where the last whole epoch left them. -> log

    Raises InputError if the facts of the data (classes, statistics ...) or the frozen weights have
    changed since."""
    if not settings.resume:
        return []
    saved = load_run(f"{settings.out}/state.pt")
    require(saved["facts"] == facts, f"{settings.out} was trained on other data or weights")
    lavish.load_trained_state_dict(model, saved["trained"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["log"]


def has_waited_enough(settings, log):
    """Whether the last `patience` epochs brought no better val score."""
    waited = len(log) - best_epoch(log)
    return 0 < settings.patience <= waited


def best_epoch(log):
    """log -> the number of the epoch with the best val score, counted from 1; 0 before any.

    Of equal ones it is the first; released AVE and AVQA keep the last (AVE/main_trans.py:231,
    AVQA/net_grd_avst/main_avst.py:300)."""
    scores = [done["val"] for done in log]  # of each epoch
    return scores.index(max(scores)) + 1 if scores else 0


def set_rates(settings, optimizer, epoch):
    """Give each part of the model its learning rate in this epoch, counted from 0."""
    decay = 1.0
    if settings.linear_decay:
        # A line from 1, at the start of the run, to 0, at its end. An epoch has the value at its
        # middle.
        decay = 1 - (epoch + 0.5) / settings.epochs
    for group in optimizer.param_groups:
        group["lr"] = getattr(settings, group["rate_name"]) * decay


def seed_epoch(settings, epoch):
    """Seed torch's random numbers, those of dropout: other ones in each epoch, in each process."""
    torch.manual_seed((settings.seed * 1000 + epoch) * 1000 + rank())


def autocast(settings):
    """Matrix products in bfloat16 within the block, if the run is in bf16."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16")


def on_device(settings, tensors):
    """A list of the tensors, moved to the run's device."""
    return [tensor.to(settings.device) for tensor in tensors]


def check_finite(logits):
    """A net that diverges ends its run here, before it can spoil what is saved."""
    require(
        logits.isfinite().all(),
        "the net's output is not finite; try a lower --lr, --head-lr, --grounding-lr, with "
        "--resume if an epoch was done",
    )


def log_entry(losses, score, start):
    """What the log keeps of an epoch: mean loss over its steps, score on val, seconds of both."""
    return {"loss": float(np.mean(losses)), "val": float(score), "seconds": time.time() - start}


def save_epoch(settings, facts, model, optimizer, log):
    """Keep the state of the epoch that is done, for --resume, and the model if it is the best so
    far. Then print the epoch.

    The best is chosen on val, so that test is seen once. The release chooses on test
    (AVE/main_trans.py:167, AVS avs_s4/train.py:203)."""
    if rank() > 0:
        return
    is_best = best_epoch(log) == len(log)
    state = {
        "settings": asdict(settings),
        "facts": facts,
        "trained": lavish.trained_state_dict(model),
    }
    if is_best:
        data.save_tensors(state, f"{settings.out}/adapters.pt")
    state["log"] = log  # for --resume, with what follows
    state["optimizer"] = optimizer.state_dict()
    data.save_tensors(state, f"{settings.out}/state.pt")
    last = log[-1]
    print(
        f"epoch {len(log):3}   loss {last['loss']:.4f}   val {last['val']:.4f}   "
        f"{last['seconds']:5.1f} s{'   best so far' if is_best else ''}",
        flush=True,
    )


def load_best_epoch(settings, model):
    """Take the model back to the epoch that was the best on val."""
    wait_for_all()  # until the first process has written it
    lavish.load_trained_state_dict(model, load_run(f"{settings.out}/adapters.pt")["trained"])


def finish(settings, facts, model, log, test, scores):
    """Print the scores on test, draw a clip and write result.json: with it the run is done.

    gflop is that of one clip; seconds are those of the epochs, with scoring on val."""
    if rank() > 0:
        return
    print("\ntest")
    print_scores(scores)
    trained, total = lavish.count_parameters(model)
    print(f"{'trainable of all parameters':45} {trained:,} of {total:,}")
    *clip, truth = first_with_error(settings, model, test.dataset)
    answers = {"found": predict_clip(settings, model, clip), "true": truth}
    rows = rows_of(clip) | rows_of_answers(settings, facts, clip, answers)
    draw(rows, f"{settings.out}/test.png")
    result = {
        "test": list(scores.values())[0],
        "scores": scores,
        "log": log,
        "seconds": sum(done["seconds"] for done in log),
        "gflop": count_gflop(settings, model),
        "settings": asdict(settings),
        "code": CODE,
    }
    data.write_lines([json.dumps(result, indent=1)], f"{settings.out}/result.json")
    os.remove(f"{settings.out}/state.pt")  # nothing is left to resume


def checksum_of_code():
    """The CRC-32 of the three files, so that report averages runs of the same code alone."""
    sources = [inspect.getsource(module) for module in (lavish, data, sys.modules[__name__])]
    return zlib.crc32("".join(sources).encode())


CODE = checksum_of_code()  # at the start: a file may be edited while a run goes on


def print_scores(scores):
    """Print a line for each score, within 80 columns."""
    for name, value in scores.items():
        print(f"{name:45} {value:.4f}")


# ---------------------------------------------------------------- a trained run
# Its checkpoint holds settings, facts, adapters and head. The frozen backbone is built anew, from
# its own weights, and must be the one that was trained on.


def load_run(path):
    """What save_epoch saved: settings (as Settings), facts, trained, and of state.pt the rest.

    Raises InputError for a file that is not of this kind: it may be anybody's."""
    saved = data.load_tensors(path)
    try:
        saved["settings"] = Settings(**saved["settings"])
    except (LookupError, TypeError) as error:
        raise InputError(f"{path} is of no run of this program: {error!r}") from None
    for setting in fields(Settings):
        value = getattr(saved["settings"], setting.name)
        require(type(value) is setting.type, f"{path}: {setting.name} cannot be {value!r}")
    return saved


def open_run(folder, given):
    """A folder that training left -> settings, facts, and the model of its best epoch.

    given: what the command line says in place of the run's own settings, --data for example. The
    device is this machine's, unless given: the run may have been trained on another one."""
    saved = load_run(f"{folder}/adapters.pt")
    settings = settings_of(saved["settings"], {"device": Settings.device, "out": folder, **given})
    facts = saved["facts"]
    net = make_net(settings)
    load_weights(settings, net)
    # A checkpoint holds adapters alone, which are worth nothing beside other frozen weights.
    require(
        checksum(net.backbone) == facts["backbone"],
        f"{folder} was trained on other weights of {settings.backbone}; name them: --weights",
    )
    model = add_head(settings, facts, net)
    lavish.load_trained_state_dict(model, saved["trained"])
    return settings, facts, model.eval()


def evaluate(folder, given):
    """Print the scores of a trained run on a split of its data set, or of another one with --data,
    which must have the same classes, vocabulary and mask size."""
    settings, facts, model = open_run(folder, given)
    loader = load_in_order(settings, settings.split, facts)
    print_scores(SCORERS[settings.task](settings, facts, model, loader))


# Seconds of a clip; AVQA's has --moments instead.
SECONDS = {"ave": 10, "avs": 5, "ucf101": 8}


def predict(folder, videos, given):
    """A trained run on videos as they come: print what it finds, draw what it sees.

    folder: of the run; videos: files that ffmpeg reads; given: options, among them --out, the
    folder of the pictures, and --question. A film is cut into clips as long as those that the net
    was trained on, because memory is finite. A video that cannot be read does not end the others:
    InputError at the end."""
    require(videos, "predict wants the folder of a run, then videos")
    pictures = given.get("out", ".")
    settings, facts, model = open_run(folder, given)
    question = read_question(settings, facts)
    faults = []
    for video in videos:
        try:
            frames, spectrograms = read_video(settings, facts, video)
        except InputError as error:
            print(error)
            faults.append(video)
            continue
        length = SECONDS.get(settings.task, len(frames))
        for start in range(0, len(frames), length):
            end = start + length
            clip = [frames[start:end], spectrograms[start:end], *question]
            answers = {"found": predict_clip(settings, model, clip)}
            rows = rows_of(clip) | rows_of_answers(settings, facts, clip, answers)
            # All names, because several runs, videos and questions may write into one folder.
            name = f"{normpath(folder)}-{normpath(video)}-{start:04d}"
            if settings.task == "avqa":
                print(f"{video}: {settings.question} {rows['found'][0]}")
                asked = rows["question"][0].replace(" ", "-")
                name = f"{name}-{asked}"
            elif settings.task == "ave":
                for t, event in enumerate(rows["found"], start):
                    print(f"{video}, from {t} s: {event}")
            name = name.replace(os.sep, "-").lstrip("-.")
            draw(rows, f"{pictures}/{name}.png")
    require(not faults, f"{len(faults)} of {len(videos)} videos could not be read: {faults}")


def predict_clip(settings, model, clip):
    """What the net says to a clip, its inputs without a batch: masks (T,M,M), labels (T,), or one
    answer or action ()."""
    logits = logits_of(settings, model, [x[None] for x in clip])[0]
    return logits > 0 if settings.task == "avs" else logits.argmax(-1)


def read_question(settings, facts):
    """What is given to a net beside a video: of AVQA [the question, (W,)], of other tasks [].

    Raises InputError for a run that cannot use videos, and for a question that is missing or holds
    an unknown word."""
    require(
        settings.task != "ucf101" and not settings.extra_audio,
        "videos are for ave (without --extra-audio), avs and avqa",
    )
    words = data.words_of(settings.question)
    if settings.task == "avqa":
        require(words, "avqa wants --question")
        return [data.encode(words, facts["vocabulary"])]
    require(not words, "--question is for avqa alone")
    return []


def read_video(settings, facts, video):
    """A video file -> frames (T,3,S,S), spectrograms (T,S,S).

    The same functions read it that read the data sets. T is its seconds, or AVQA's moments."""
    with tempfile.TemporaryDirectory() as folder:
        paths, wav = data.video_files(folder, data.extract_video(video, folder))
        count = settings.moments if settings.task == "avqa" else len(paths)
        chosen = data.evenly(len(paths), count)
        frames = data.read_frames([paths[second] for second in chosen], settings.image_size)
        seconds = data.seconds_of(data.read_wav(wav), len(paths))[chosen]  # (T,16000)
    return frames, data.spectrograms_of(seconds, settings.image_size, facts["stats"])


# ---------------------------------------------------------------- what the latents look at
# A latent's attention shows where it looks. To see whether that matters, one has to set the gate to
# 0 and score again.


def look(folder, videos, given):
    """Print the gates of a trained run, and the score with each g_av at 0. Draw where the latents
    look, for the two adapters without which the score is lowest. For AVS draw one frame beside
    other sounds instead.

    folder: of the run; videos: one to look at, or none for the test split."""
    require(len(videos) < 2, "look takes the folder of a run and at most one video")
    # What is compiled calls no hooks, see rows_of_latents.
    settings, facts, model = open_run(folder, {**given, "compile": False})
    adapters = adapters_with_latents(model.net)
    require(adapters, f"{folder} has no latents to look at")
    if videos:
        question = read_question(settings, facts)
        clip = [*read_video(settings, facts, videos[0]), *question]
    else:
        test = load_in_order(settings, "test", facts)
        *clip, truth = first_with_error(settings, model, test.dataset)
    untouched = predict_clip(settings, model, clip)

    def score():
        """On the test split; on a video the share of its labels or pixels that did not change."""
        if videos:
            return (predict_clip(settings, model, clip) == untouched).float().mean().item()
        scores = SCORERS[settings.task](settings, facts, model, test)
        return list(scores.values())[0]

    what = "answers that stay" if videos else "score"
    print(f"{'the adapter whose g_av is set to 0':38}      g    g_av   {what}")
    print(f"{'none':38} {'':14}   {score():.4f}")
    scores = {}  # {name of an adapter: score without what it reads}
    for name, adapter in adapters.items():
        scores[name] = score_without(adapter, score)
        gates = f"{adapter.gate.item():6.3f}  {adapter.gate_av.item():6.3f}"
        print(f"{name:38} {gates}   {scores[name]:.4f}")

    if settings.task == "avs":
        rows = swap_sounds(settings, facts, model, clip)
    else:
        rows = rows_of(clip)
        matter_most = sorted(scores, key=scores.get)[:2]
        for name in matter_most:
            rows |= rows_of_latents(settings, model, clip, name, adapters[name])
        answers = {"found": untouched}
        if not videos:
            answers["true"] = truth
        rows |= rows_of_answers(settings, facts, clip, answers)
    name = "-".join(["look", *map(basename, videos)])  # look, or look-film.mp4
    draw(rows, f"{settings.out}/{name}.png")


def score_without(adapter, score):
    """What score() gives while the g_av of an adapter is 0. Afterwards it is open again."""
    gate = adapter.gate_av.item()
    adapter.gate_av.data.zero_()
    without = score()
    adapter.gate_av.data.fill_(gate)
    return without


def first_with_error(settings, model, dataset):
    """The first clip of a split whose answer has an error, since errors teach more; otherwise the
    first one."""
    for *clip, truth in dataset:  # up to the IndexError behind its last item
        if not torch.equal(predict_clip(settings, model, clip), truth):
            return [*clip, truth]
    return dataset[0]


def adapters_with_latents(net):
    """{name: adapter}, "sight reads sound, block 2, MLP" for example; first those of sight, from
    the first block to the last."""
    named = {}
    for path, module in net.named_modules():
        if hasattr(module, "latents"):
            adapters, block, branch = path.split(".")  # of Lavish: visual_adapters.1.1
            stream = "sight reads sound" if adapters == "visual_adapters" else "sound reads sight"
            place = "attention" if branch == "0" else "MLP"
            named[f"{stream}, block {int(block) + 1}, {place}"] = module
    return named


def rows_of_latents(settings, model, clip, name, adapter):
    """{name of a row: the picture that a latent reads, as bright as its weight there}, for each
    latent of an adapter. The name of the row says how many times an even look its greatest
    weight is."""
    inputs = []
    hook = adapter.register_forward_pre_hook(lambda module, tokens: inputs.extend(tokens))
    predict_clip(settings, model, clip)
    hook.remove()
    _, other = inputs  # (BT,N,d)
    with torch.no_grad():
        attention, _ = adapter.compress(other)  # (BT,m,N)
    rows = {}
    frames, spectrograms = rows_of(clip).values()
    reads_sound = name.startswith("sight")
    picture = spectrograms if reads_sound else frames  # (T,C,H,W)
    for number, weights in enumerate(attention.float().cpu().unbind(1), 1):  # (BT,N)
        greatest = weights.max() * weights.shape[1]
        if len(weights) == 1:  # VideoMAE's tokens of a clip are one sequence
            weights = weights.view(len(picture), -1)  # (T,N)
        weights = weights[:: len(weights) // len(picture)]  # (T,N), of the frames that are drawn
        side = math.isqrt(weights.shape[1])
        maps = weights[:, -side * side :]  # without a ViT's class token
        maps = maps.view(-1, 1, side, side)  # (T,1,H,H)
        if reads_sound:
            maps = as_drawn(maps[:, 0])
        # Each second has its own greatest weight, which is drawn at full brightness.
        maps = maps / maps.amax((2, 3), keepdim=True)
        maps = F.interpolate(maps, picture.shape[-2:])
        rows[f"{name}: latent {number} ({greatest:.1f} x even)"] = maps * picture
    return rows


def swap_sounds(settings, facts, model, clip):
    """{name of a row: tiles} of an intervention: the frame of a clip beside sounds of up to four
    categories and noise, and the masks found; in the last row all g_av are 0."""
    frames, _ = clip
    dataset = open_split(settings, "test", facts)
    sounds = {}  # {category, or noise: spectrogram (S,S)}
    for i, (_, category) in enumerate(dataset.videos):
        if category not in sounds and len(sounds) < 4:
            _, spectrograms, _ = dataset[i]
            sounds[category] = spectrograms[0]
    hiss = 0.01 * torch.randn(lavish.SAMPLE_RATE)  # one second
    sounds["noise"] = lavish.fbank(hiss, settings.image_size, *facts["stats"])
    heard = torch.stack([*sounds.values()])  # (n,S,S)
    swapped = [frames[:1].expand(len(heard), -1, -1, -1), heard]
    rows = rows_of(swapped)
    rows["heard"] = [*sounds]
    clips = [x[:, None] for x in swapped]  # of a second each, so that TPAVI mixes no sounds
    rows["mask found"] = logits_of(settings, model, clips)[:, 0] > 0  # (n,M,M)
    for adapter in adapters_with_latents(model.net).values():
        adapter.gate_av.data.zero_()
    rows["with g_av at 0"] = logits_of(settings, model, clips)[:, 0] > 0
    return rows


# ---------------------------------------------------------------- pictures


TILE = 112  # pixels a side of a tile


def rows_of(clip):
    """{name of a row: its tiles (T,C,H,W) from 0 to 1}: what the net gets, a column a second."""
    frames, spectrograms, *_ = clip
    frames = frames[:: len(frames) // len(spectrograms)]  # (T,3,S,S); UCF101 has two for a sound
    mean, std = torch.tensor([data.IMAGENET_MEAN, data.IMAGENET_STD]).view(2, 3, 1, 1)
    sounds = as_drawn(spectrograms)  # (T,1,S,S)
    darkest, brightest = sounds.aminmax()
    sounds = (sounds - darkest) / (brightest - darkest).clamp(min=1e-6)  # silence is all one grey
    return {"frame": frames * std + mean, "sound (time right, pitch up)": sounds}


def as_drawn(spectrograms):
    """(T,S,S), rows time -> (T,1,S,S) as people draw spectrograms: time runs right and pitch up."""
    return spectrograms.transpose(1, 2).flip(1)[:, None]


def rows_of_answers(settings, facts, clip, answers):
    """{name of a row: masks or texts} of answers, {"found" and "true": masks or labels}. AVQA's
    question stands above its answers."""
    if settings.task == "avs":
        return answers
    names = facts.get("classes") or facts["vocabulary"]["answers"]
    names = [*names, "background"]  # the last label of AVE
    rows = {}
    if settings.task == "avqa":
        words = facts["vocabulary"]["words"]
        question = [words[index] for index in clip[2] if index > 0]
        rows["question"] = [" ".join(question)]
    for what, labels in answers.items():
        rows[what] = [names[k] for k in labels.view(-1)]
    return rows


def draw(rows, path):
    """Write a picture as PNG: a row for each name, a column for each second.

    rows: {name: T images (T,1 or 3,H,W) from 0 to 1, T masks (T,H,W), or texts}. A single text may
    run over the columns to its right; several stay in their own."""
    left = 190  # of the columns: the names have room before them
    step = TILE + 4  # from one tile to the next, with a white edge
    columns = max(len(tiles) for tiles in rows.values())
    width = left + step * max(columns, 6)  # room for a question above one column
    page = Image.new("RGB", (width, step * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(17)  # large enough to read at the width of a page
    top = 0  # of the row
    for name, tiles in rows.items():
        texts = [textwrap.fill(name, 20)]
        pen.text((4, top + 4), texts[0], "black", font)
        for column, tile in enumerate(tiles):
            x = left + column * step
            if torch.is_tensor(tile):
                image = to_pil_image(tile.float().expand(3, -1, -1).clamp(0, 1))
                page.paste(image.resize((TILE, TILE), Image.NEAREST), (x, top))
            else:
                texts.append(tile if len(tiles) == 1 else textwrap.fill(tile, 12))
                pen.text((x + 4, top + 4), texts[-1], "black", font)
        lines = max(text.count("\n") + 1 for text in texts)
        top += step if torch.is_tensor(tiles) else 28 * lines
    data.make_folder_of(path)
    page.crop((0, 0, width, top)).save(path)
    print(f"drawn in {path}")


# ---------------------------------------------------------------- report and cost
# A table of runs that are done, and what a step costs without any data.


def report(folders):
    """Print mean and spread of repeated runs: those that have the same code and the same settings,
    but for seed, out, workers, device, resume and the place of the data. A line for each group: the
    number of runs, GFLOP of a clip, mean seconds."""
    groups = defaultdict(list)  # {what must be equal: what is printed of each run}
    for folder in folders:
        path = f"{folder}/result.json"
        result = data.read_json(path)
        try:
            settings = Settings(**result["settings"])
            settings.data = basename(normpath(settings.data))
            same = replace(settings, out="", seed=0, workers=0, device="", resume=False)
            numbers = [float(result[name]) for name in ("test", "seconds", "gflop")]
            group = f"{same} {result['code']}"
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no result of a run ({error!r}); leave it out") from None
        groups[group].append([settings.task, folder, *numbers])
    print("task      test  +- std   n      GFLOP  seconds  the first of them")
    for rows in groups.values():
        tasks, names, tests, seconds, gflops = zip(*rows)  # from rows to columns
        spread = f"{np.std(tests, ddof=1):.4f}" if len(tests) > 1 else "-"
        print(
            f"{tasks[0]:7} {np.mean(tests):.4f} {spread:>7} {len(tests):3} {gflops[0]:10.4f} "
            f"{np.mean(seconds):8.0f}  {names[0]}"
        )


# The sizes of AVE, AVSBench and MUSIC-AVQA. UCF101 has 101 classes, but 28 in their place change no
# digit that is printed.
REAL_SIZES = {
    "classes": range(28),
    "mask_size": 224,
    "vocabulary": {"words": range(93), "answers": range(42)},
}


def bench(settings):
    """Print clips a second, memory and GFLOP of a task's net, on random clips.

    A training step is the forward pass, the backward pass and Adam; the loss is any number that
    depends on all outputs. An evaluation is the forward pass alone, without gradients."""
    net = make_net(settings)
    load_weights(settings, net)
    model = add_head(settings, REAL_SIZES, net)
    optimizer = make_optimizer(model)
    clips = random_clips(settings)
    in_training = []  # AVS then decodes the first frame alone, and AVQA reads negatives
    if settings.task == "avs":
        in_training = [True]
    elif settings.task == "avqa" and settings.modality == "av":
        in_training = [clips[0]]
    for name, inputs in (("training", [*clips, *in_training]), ("evaluation", clips)):
        training = name == "training"
        model.train(training)
        times = [clock(settings)]
        for _ in range(settings.repeat + 1):
            with autocast(settings), torch.set_grad_enabled(training):
                logits = model(*inputs)
            if training:
                # AVQA's net returns two tensors, or one and None. The others return one: x is then
                # what they say of one clip.
                loss = sum(x.square().mean() for x in logits if x is not None)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                del loss
            del logits  # as training does
            times.append(clock(settings))
        # The first step warms up and does not count. Machines are noisy: look at all of them.
        speeds = settings.batch_size / np.diff(times)[1:]
        print(f"{name:10} {np.median(speeds):.3g} clips/s, median of {speeds.round(4)}")
    print(f"{'memory':10} {peak_memory(settings):.1f} GB at most")
    print(f"{'operations':10} {count_gflop(settings, model):.1f} GFLOP a clip, to evaluate it")


def random_clips(settings):
    """A batch of noise in place of a task's inputs, of the real lengths: frames (B,T,3,S,S),
    spectrograms (B,T,S,S), and what else the net reads."""
    B = settings.batch_size
    S = settings.image_size
    T = SECONDS.get(settings.task, settings.moments)
    frames = 2 * T if settings.task == "ucf101" else T
    clips = [torch.randn(B, frames, 3, S, S), torch.randn(B, T, S, S)]
    if settings.task == "avqa":
        clips.append(torch.ones(B, 14, dtype=torch.long))  # a long question
    if settings.task == "ave" and settings.extra_audio:
        clips.append(torch.randn(B, T, 128))
    return on_device(settings, clips)


def clock(settings):
    """Seconds, when all that was asked of the device is done."""
    if not settings.device.startswith("cpu"):
        torch.accelerator.synchronize(settings.device)  # a GPU answers before it is done
    return time.perf_counter()


def peak_memory(settings):
    """The most memory that was in use so far, in GB: of the GPU, or of this process on a CPU."""
    if settings.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(settings.device) / 1e9
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # the Mac counts bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def count_gflop(settings, model):
    """10^9 operations of the matrix products and convolutions in the evaluation of one clip, by
    torch's own counter: a multiplication and an addition are two."""
    clip = random_clips(replace(settings, batch_size=1))
    # The counter does not know all that is fused: attention is computed as it is written.
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_of(settings, model.eval(), clip)
    return counter.get_total_flops() / 1e9


# ---------------------------------------------------------------- the command line
# Errors that the user can mend end here, in one line and with exit code 2.


def parse(arguments):
    """-> the command, what follows it, and {setting: value} of the options that are given.

    Every field of Settings is an option of every command."""
    parser = argparse.ArgumentParser(
        usage="python train.py COMMAND [PATH ...] [--OPTION VALUE ...]",
        description=__doc__,
        epilog="Options, with - in place of _:\n\n" + inspect.getsource(Settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # so that a misspelt option is refused
    )
    parser.add_argument("command", choices=[*LOOPS, "eval", "predict", "look", "report", "bench"])
    parser.add_argument("paths", nargs="*", help="runs and videos; eval and bench take one")
    for setting in fields(Settings)[1:]:
        if setting.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": setting.type, "choices": CHOICES.get(setting.name)}
        parser.add_argument(option(setting.name), help=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_intermixed_args(arguments))  # only what was typed, by SUPPRESS
    return given.pop("command"), given.pop("paths", []), given


def option(name):
    """The option of a setting: head_lr -> --head-lr."""
    return f"--{name.replace('_', '-')}"


def settings_of(recipe, given):
    """A recipe, or the settings of a run, with what the command line gives in their place.

    Raises InputError for a number or a device that no task can work with."""
    settings = replace(recipe, **given)
    try:
        torch.zeros(1, device=settings.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {settings.device} cannot be used: {reason}") from None
    for setting in fields(Settings):
        if setting.type in (int, float):
            least = 1 if setting.name in NEVER_ZERO else 0
            require(
                least <= getattr(settings, setting.name) < 10**9,  # false for NaN too
                f"{option(setting.name)} must be at least {least} and below 10^9",
            )
    require(settings.channels % 8 == 0, "--channels must be a multiple of 8")
    require(settings.hidden % 4 == 0, "--hidden must be a multiple of 4")
    return settings


def train_task(task, given):
    """Train a task from data to test score, in a folder of its own.

    A folder that is there already is refused, unless with --resume, which takes up the settings of
    the run that was stopped in it."""
    toy = f"toy/{task}"
    folder = given.get("data", toy)
    recipes = TOY if folder == toy or data.is_toy(folder) else PAPER
    if recipes is PAPER and "nano" in given.get("backbone", ""):
        recipes = TOY
        print("A nano backbone takes the toy's recipe: the paper's rates are too small for it.")
    out = given.get("out", f"runs/{basename(normpath(folder))}")
    recipe = replace(recipes[task], data=folder)
    if given.get("resume"):
        recipe = load_run(f"{out}/state.pt")["settings"]
        require(recipe.task == task, f"{out} holds a run of {recipe.task}")
    else:
        used = exists(out) and os.listdir(out)  # an empty folder is of a run that was killed
        require(not used, f"{out} is there already; --resume it, or choose another --out")
    settings = settings_of(recipe, {**given, "out": out})
    require(settings.data == toy or exists(settings.data), f"--data: there is no {settings.data}")
    net = make_net(settings)  # before data are made or read: it refuses options that do not fit
    weights_path(settings)  # refuses a wrong --weights; the path is not needed yet
    join_processes(settings.device)
    if rank() == 0:
        if not exists(settings.data):
            data.make_toy(task, toy)
        make_weights(settings)
        os.makedirs(out, exist_ok=True)
    wait_for_all()
    try:
        load_weights(settings, net)
        LOOPS[task](settings, net)
    finally:
        with suppress(OSError):  # the folder is not empty: an epoch was done, keep it
            os.rmdir(out)
    leave_processes()


def main(arguments=None):
    """Run one command. Exit codes: 0, 2 for what the user can mend (in one line on stderr), 130
    after Ctrl-C."""
    command, paths, given = parse(arguments)
    # TF32 in a GPU's matrix products, as the release had it: the default of its torch 1.7
    # (AVE/requirements.txt:19). A CPU computes as before.
    torch.set_float32_matmul_precision("high")
    try:
        if command in LOOPS:
            require(not paths, f"{command} takes no {paths}; options begin with --")
            train_task(command, given)
        elif rank() == 0:  # under torchrun these run once
            require(paths, f"{command} of what? See: python train.py --help")
            first, *others = paths
            if command in ("eval", "bench"):
                require(not others, f"{command} takes one path or task, not also {others}")
            if command == "eval":
                evaluate(first, given)
            elif command == "predict":
                predict(first, others, given)
            elif command == "look":
                look(first, others, given)
            elif command == "report":
                report(paths)
            else:
                require(first in LOOPS, f"bench takes a task: {', '.join(LOOPS)}")
                recipe = replace(PAPER[first], weights="none", batch_size=1)
                bench(settings_of(recipe, given))
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is read-only
        # From a loader's process the message comes with its trace; the last line is ours.
        line = str(error).rstrip().split("\n")[-1].removeprefix("lavish.InputError: ")
        print(f"train.py: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; --resume goes on if an epoch was done", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
