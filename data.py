# SPDX-License-Identifier: MIT
"""Data: sound and frames from disk, the data sets' layouts, and toy data in the same layouts.

    python data.py toy TASK DIR         write the toy data set (train.py does so by itself)
    python data.py stats TASK DIR       mean and std of a data set's spectrograms, kept in DIR

TASK is ave, avs or avqa. Read in this order: read_wav and read_frame, AVE, AVSBench, MusicAVQA,
then the toy world (what its instruments look and sound like) and the toy data sets made from it.
"""
import argparse
import csv
import io
import json
import os
import shutil
import sys
import wave

import numpy as np
import torch
import torchaudio
import torchvision
from tqdm import tqdm

from lavish import AVE_MEAN, AVE_STD, SAMPLE_RATE, InputError, fbank

EXTRACT = ("for each: ffmpeg -i ID.mp4 -vf fps=1 video_frames/ID/%04d.jpg "
           "-ac 1 -ar 16000 raw_audio/ID.wav")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def open_wav(path):
    """An open wave.Wave_read; an InputError if the file is missing or no PCM wav."""
    try:
        try:
            return wave.open(path)
        except wave.Error as error:
            # 24 bit and multichannel files come as WAVE_FORMAT_EXTENSIBLE (65534), which `wave`
            # reads from Python 3.12 on only. For PCM inside it, the plain tag says the same.
            if "65534" not in str(error):
                raise
            with open(path, "rb") as file:
                raw = bytearray(file.read())
            tag = raw.index(b"fmt ") + 8
            if raw[tag + 24:tag + 26] != b"\x01\x00":
                raise
            raw[tag:tag + 2] = b"\x01\x00"
            return wave.open(io.BytesIO(raw))
    except FileNotFoundError:
        raise InputError(f"no sound at {path}") from None
    except (wave.Error, EOFError, OSError) as error:
        reason = str(error) or "it ends too early"
        raise InputError(f"{path} is not a PCM wav ({reason}); convert it: ffmpeg -i IN -ac 1 "
                         f"-ar {SAMPLE_RATE} -c:a pcm_s16le OUT.wav") from None

def read_wav(path):
    """(N,) float32 mono at 16 kHz in [-1, 1], from PCM of 8, 16, 24 or 32 bit, any rate, channels.

    The standard library reads it, because torchaudio.load needs torchcodec now. Channels are
    averaged (the released code uses the left one alone) and the mean is removed, as released.
    """
    with open_wav(path) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    raw = raw[:len(raw) // (width * channels) * width * channels].reshape(-1, width)
    if width == 1:
        raw = raw ^ 128  # 8 bit is stored unsigned
    samples = np.zeros((len(raw), 4), np.uint8)
    samples[:, 4 - width:] = raw  # little-endian: the high bytes last
    samples = samples.view("<i4").reshape(-1, channels).mean(1, dtype=np.float64) / 2 ** 31
    sound = torch.from_numpy(samples.astype(np.float32))
    if rate != SAMPLE_RATE and len(sound):
        sound = torchaudio.functional.resample(sound, rate, SAMPLE_RATE)
    return sound - sound.mean() if len(sound) else sound

def read_image(path):
    """(3, height, width) uint8, from jpg or png."""
    try:
        return torchvision.io.decode_image(path, mode="RGB")
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path} is not a readable image ({reason}); extract it again") from None

def read_frame(path, size):
    """(3, size, size) float32, ImageNet-normalised; the aspect is not kept, as released."""
    image = read_image(path)
    # antialias: the torchvision of the released code had none, so a large frame aliased.
    image = torchvision.transforms.functional.resize(image, [size, size], antialias=True)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image / 255 - mean[:, None, None]) / std[:, None, None]

def seconds_of(sound, count):
    """(N,) -> (count, 16000): second t is samples [16000 t, 16000 (t+1)), silence past the end.

    The released code spreads `count` windows evenly instead, up to 0.1 s early against the labels,
    and stretches a short file over all of them.
    """
    sound = sound[:count * SAMPLE_RATE]
    sound = torch.nn.functional.pad(sound, (0, count * SAMPLE_RATE - len(sound)))
    return sound.view(count, SAMPLE_RATE)

def frame_paths(folder):
    """The *.jpg of a folder in the order of their numbers, whatever the zero-padding."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".jpg")]
        return [os.path.join(folder, n) for n in sorted(names, key=lambda n: int(n[:-4]))]
    except FileNotFoundError:
        return []
    except ValueError:
        raise InputError(f"{folder} holds frames that are not numbered like 0001.jpg") from None

def video_files(root, video):
    """The frames of a video, or the first that should be there, and its sound."""
    folder = os.path.join(root, "video_frames", video)
    return (frame_paths(folder) or [os.path.join(folder, "0001.jpg")],
            os.path.join(root, "raw_audio", video + ".wav"))

def read_lines(path):
    """The stripped, non-empty lines of a text file."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
        if lines:
            return lines
    raise InputError(f"no {path}, or nothing in it; the README says what a data folder holds")

def spectrogram_stats(dataset, root, size):
    """(mean, std) to normalise spectrograms with: what `data.py stats` left in root, or AVE's."""
    if not os.path.isdir(root):
        raise InputError(f"no data folder {root}; make a toy one: python data.py toy "
                         f"{dataset.task} {root}")
    return tuple(known_stats(root).get(str(size), (AVE_MEAN, AVE_STD)))

def known_stats(root):
    """{"192": [mean, std], ...}, by the size of the spectrogram image."""
    path = os.path.join(root, "fbank.json")
    return json.loads("".join(read_lines(path))) if os.path.exists(path) else {}

def spectrograms_of(seconds, size, stats):
    """(T, 16000) -> (T, size, size)."""
    return torch.stack([fbank(second, size, *stats) for second in seconds])

def check_files(dataset):
    """InputError if clips lack files; returns the paths of the sounds that end too early."""
    missing, short = [], []
    for i in range(len(dataset)):
        images, wav = dataset.files(i)
        lost = [path for path in (*images, wav) if not os.path.exists(path)]
        missing += lost[:1]
        if not lost:
            with open_wav(wav) as file:
                if file.getnframes() < dataset.seconds * file.getframerate():
                    short.append(wav)
    if missing:
        raise InputError(f"{len(missing)} of {len(dataset)} clips lack files, first {missing[0]}; "
                         f"{dataset.remedy}")
    return short

# ---------------------------------------------------------------- AVE

class AVE(torch.utils.data.Dataset):
    """Audio-visual events (Tian et al., ECCV 2018): ten seconds, one event or background in each.

        root/Annotations.txt                 Category&VideoID&Quality&StartTime&EndTime
        root/trainSet.txt valSet.txt testSet.txt   the same lines, split
        root/video_frames/ID/*.jpg           at any rate, numbered with any zero-padding
        root/raw_audio/ID.wav                any PCM wav

    item: frames (10,3,S,S), spectrograms (10,S,S), labels (10,) int64. A label is the category's
    place in order of first appearance in Annotations.txt; background comes after the last one (28
    in the real data). Second t holds the event iff start <= t < end.

    Known of the real data: 10 videos are in both train and val, 8 in both train and test (a video
    may have two events, annotated apart and contradicting each other); one row has start = end = 0
    and is all background here.
    """

    task, seconds, remedy = "ave", 10, EXTRACT

    def __init__(self, root, split, size):
        self.root, self.size, self.stats = root, size, spectrogram_stats(self, root, size)
        rows = read_lines(os.path.join(root, "Annotations.txt"))
        rows = rows[rows[0].startswith("Category&"):]  # the zip's copy has a header, others none
        self.categories = list(dict.fromkeys(row.split("&")[0] for row in rows))
        self.clips = []  # (video id, category index, start, end)
        path = os.path.join(root, f"{split}Set.txt")
        for number, line in enumerate(read_lines(path), 1):
            try:
                category, video, _, start, end = line.split("&")
                self.clips.append((video, self.categories.index(category), int(start), int(end)))
            except ValueError:
                raise InputError(f"{path}, line {number}: {line!r} is not Category&VideoID&Quality&"
                                 "Start&End with a category of Annotations.txt") from None

    def files(self, i):
        return video_files(self.root, self.clips[i][0])

    def sound(self, i):
        return seconds_of(read_wav(self.files(i)[1]), self.seconds)            # (10,16000)

    def labels(self, i):
        _, category, start, end = self.clips[i]
        t = torch.arange(self.seconds)
        return torch.where((start <= t) & (t < end), category, len(self.categories))

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        paths, _ = self.files(i)
        # The frame in the middle of each second. Released: linspace from the first to the last,
        # which at 3 frames a second comes to the same seconds.
        frames = [read_frame(paths[(2 * t + 1) * len(paths) // (2 * self.seconds)], self.size)
                  for t in range(self.seconds)]
        return (torch.stack(frames), spectrograms_of(self.sound(i), self.size, self.stats),
                self.labels(i))

# ---------------------------------------------------------------- AVSBench S4

class AVSBench(torch.utils.data.Dataset):
    """AVSBench S4 (Zhou et al., ECCV 2022): five seconds, and masks of the one thing that sounds.

        root/s4_meta_data.csv                columns name, ..., category, split
        root/s4_data/visual_frames/SPLIT/CATEGORY/NAME/NAME_{1..5}.png
        root/s4_data/gt_masks/SPLIT/CATEGORY/NAME/NAME_1.png in train, NAME_{1..5}.png in val, test
        root/s4_data/audio_wav/SPLIT/CATEGORY/NAME.wav

    item: frames (5,3,S,S), spectrograms (5,S,S), masks (1 in train, else 5, mask_size, mask_size)
    of 0 and 1. mask_size is that of the files (224). An empty mask is legal. The log-mel pickles
    that the released loader opens, and does not use, are not touched.
    """

    task, seconds = "avs", 5
    remedy = "they come with AVSBench-object, Single-source"

    def __init__(self, root, split, size):
        self.root, self.split, self.size = root, split, size
        self.stats = spectrogram_stats(self, root, size)
        path = os.path.join(root, "s4_meta_data.csv")
        rows = list(csv.reader(read_lines(path)))
        names, columns = ("name", "category", "split"), (0, 2, 3)  # where the names do not tell
        if set(names) <= set(rows[0]):
            columns = [rows[0].index(name) for name in names]
        if len(rows[0]) > max(columns) and rows[0][columns[2]] not in ("train", "val", "test"):
            rows = rows[1:]  # a header
        try:
            rows = [[row[column] for column in columns] for row in rows]
        except IndexError:
            raise InputError(f"{path} has rows without name, category and split") from None
        self.clips = [(name, category) for name, category, its_split in rows if its_split == split]
        if not self.clips:
            raise InputError(f"{path} lists no {split} clips; its fourth column should say split")
        self.mask_size = read_image(self.files(0)[0][-1]).shape[-1]

    def files(self, i):
        """Five frames and the masks, in one list, and the sound."""
        name, category = self.clips[i]
        folder = lambda kind: os.path.join(self.root, "s4_data", kind, self.split, category, name)
        masks = 1 if self.split == "train" else self.seconds
        return ([os.path.join(folder(kind), f"{name}_{k + 1}.png") for kind, count in
                 (("visual_frames", self.seconds), ("gt_masks", masks)) for k in range(count)],
                folder("audio_wav") + ".wav")

    def sound(self, i):
        return seconds_of(read_wav(self.files(i)[1]), self.seconds)            # (5,16000)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        paths, _ = self.files(i)
        frames = [read_frame(path, self.size) for path in paths[:self.seconds]]
        masks = [self.read_mask(path) for path in paths[self.seconds:]]
        return (torch.stack(frames), spectrograms_of(self.sound(i), self.size, self.stats),
                torch.stack(masks))

    def read_mask(self, path):
        """Stored as {0, 1}, {0, 255} or grey (of which above half counts), in one channel or more.

        The released loader's convert("1") turns a {0, 1} file all black and dithers a grey one.
        """
        mask = read_image(path).amax(0)
        if mask.shape != (self.mask_size, self.mask_size):
            raise InputError(f"{path} is {mask.shape[1]} x {mask.shape[0]}, not {self.mask_size} "
                             f"x {self.mask_size} as the first mask; make the masks of one size")
        return (mask > (0 if mask.max() == 1 else 127)).float()

# ---------------------------------------------------------------- MUSIC-AVQA

class MusicAVQA(torch.utils.data.Dataset):
    """MUSIC-AVQA (Li et al., CVPR 2022): a question about a video of music, mostly a minute long.

        root/avqa-train.json avqa-val.json avqa-test.json      the data set's data/json
        root/video_frames/ID/*.jpg, root/raw_audio/ID.wav      as for AVE

    item: frames (T,3,S,S), spectrograms (T,S,S), question (W,) and answer () int64, and in train
    foreign (T,3,S,S), frames of other videos, drawn by the item's number. The T moments lie evenly
    from the first second to the last, however long the video is; frame and sound are of one second.

    vocabulary: from the training questions unless given. {"words", "answers"} in order of
    appearance, "<pad>" first (93 and 42 in the real data), and "length", that of the longest
    question, to which the others are padded (14 in the real data). A checkpoint keeps it.
    """

    task, seconds, remedy = "avqa", 1, EXTRACT

    def __init__(self, root, split, size, vocabulary=None, moments=10):
        self.root, self.split, self.size, self.moments = root, split, size, moments
        self.stats = spectrogram_stats(self, root, size)
        self.questions = read_questions(os.path.join(root, f"avqa-{split}.json"))
        self.vocabulary = vocabulary or make_vocabulary(
            read_questions(os.path.join(root, "avqa-train.json")))
        for q in self.questions:
            unknown = ([w for w in q["words"] if w not in self.vocabulary["words"]]
                       + [a for a in [q["answer"]] if a not in self.vocabulary["answers"]]
                       + q["words"][self.vocabulary["length"]:])
            if unknown:
                raise InputError(f"question {q['id']} of {split}: {unknown[0]!r} is in no training "
                                 "question or answer, or the question is too long; mend it")
        self.videos = list(dict.fromkeys(q["video"] for q in self.questions))
        if split == "train" and len(self.videos) < 2:
            raise InputError(f"{root}: foreign frames need a second video in avqa-train.json")

    def files(self, i):
        return video_files(self.root, self.questions[i]["video"])

    def sound(self, i):
        sound = read_wav(self.files(i)[1])
        seconds = max(1, -(-len(sound) // SAMPLE_RATE))
        at = np.linspace(0, seconds - 1, self.moments).round().astype(int)
        return seconds_of(sound, seconds)[at]                                  # (T,16000)

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, i):
        q, (paths, _) = self.questions[i], self.files(i)
        at = np.linspace(0, len(paths) - 1, self.moments).round().astype(int)
        words, answers, length = (self.vocabulary[k] for k in ("words", "answers", "length"))
        question = torch.zeros(length, dtype=torch.long)
        question[:len(q["words"])] = torch.tensor([words.index(word) for word in q["words"]])
        item = (torch.stack([read_frame(paths[k], self.size) for k in at]),
                spectrograms_of(self.sound(i), self.size, self.stats), question,
                torch.tensor(answers.index(q["answer"])))
        if self.split != "train":
            return item
        rng, foreign = np.random.default_rng(i), []
        others = [video for video in self.videos if video != q["video"]]
        for _ in range(self.moments):
            paths, _ = video_files(self.root, others[rng.integers(len(others))])
            foreign.append(read_frame(paths[rng.integers(len(paths))], self.size))
        return (*item, torch.stack(foreign))

def read_questions(path):
    """[{"id", "video", "type" (modality, kind), "words", "answer"}] from one of the json files.

    The data set's own rule: drop the last character (a "?", or a full-width one), split at spaces,
    put the next template value in place of each word with a "<".
    """
    questions = []
    try:
        rows = json.loads("\n".join(read_lines(path)))
        for number, row in enumerate(rows):
            values = iter(json.loads(row["templ_values"]))
            words = row["question_content"].rstrip()[:-1].split(" ")
            questions.append({
                "id": row["question_id"], "video": row["video_id"],
                "type": tuple(json.loads(row["type"])), "answer": row["anser"],  # [sic]
                "words": [next(values) if "<" in word else word for word in words]})
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not the JSON of MUSIC-AVQA: {error}") from None
    except (KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{path}, question {number + 1}: {error!r} is missing or wrong") from None
    return questions

def make_vocabulary(questions):
    return {"words": ["<pad>", *dict.fromkeys(w for q in questions for w in q["words"])],
            "answers": list(dict.fromkeys(q["answer"] for q in questions)),
            "length": max(len(q["words"]) for q in questions)}

# ---------------------------------------------------------------- the toy world
#
# Six instruments, each with a look and a timbre.

COLOURS = {"red": (230, 60, 50), "green": (60, 190, 80), "blue": (70, 100, 235),
           "yellow": (235, 205, 60), "magenta": (215, 80, 205), "cyan": (70, 205, 215)}

def circle(x, y): return np.hypot(x, y) - 0.9
def square(x, y): return np.maximum(abs(x), abs(y)) - 0.8
def triangle(x, y): return np.maximum(y - 0.7, 0.87 * abs(x) - 0.5 * y - 0.45)
def cross(x, y): return np.minimum(np.maximum(abs(x) - 0.3, abs(y) - 1),
                                   np.maximum(abs(y) - 0.3, abs(x) - 1))
def ring(x, y): return abs(np.hypot(x, y) - 0.75) - 0.25
def diamond(x, y): return abs(x) + abs(y) - 1.05

SHAPES = (circle, triangle, square, ring, cross, diamond)  # signed distances: inside is negative

INSTRUMENTS = {  # name: (shape, colour)
    "bell": (circle, "red"), "flute": (triangle, "green"), "drum": (square, "blue"),
    "horn": (ring, "yellow"), "bird": (cross, "magenta"), "rattle": (diamond, "cyan")}

def play(name, seconds, rng):
    """One instrument for some seconds, (seconds * 16000,) float64 with unit RMS; pitch is drawn."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch, phase = 2 ** rng.uniform(-0.3, 0.3), rng.uniform()
    beat = lambda rate: (t * rate * pitch + phase) % 1 / rate  # seconds since the last stroke
    noise = rng.standard_normal(len(t))
    if name == "bell":      # inharmonic partials that ring off
        partials = sum(np.sin(2 * np.pi * 520 * pitch * r * t) for r in (1, 2.76, 5.4))
        sound = partials * np.exp(-5 * beat(2))
    elif name == "flute":   # one tone with vibrato
        sound = np.sin(2 * np.pi * 880 * pitch * t + 3 * np.sin(2 * np.pi * 5 * t))
    elif name == "drum":    # low bursts
        sound = np.sin(2 * np.pi * 90 * pitch * t) * np.exp(-12 * beat(4))
    elif name == "horn":    # a sawtooth: all harmonics
        sound = 2 * ((220 * pitch * t) % 1) - 1
    elif name == "bird":    # upward chirps
        sound = np.sin(2 * np.pi * (2000 + 4000 * beat(5)) * pitch * beat(5)) * (beat(5) < 0.12)
    else:                   # rattle: short bursts of bright noise
        sound = np.diff(noise, prepend=0) * np.exp(-25 * beat(8))
    return sound / np.sqrt(np.mean(sound ** 2))

def draw(objects, size, rng):
    """A noisy scene. objects: (shape, rgb, x, y, radius), places and radius in units of the image.

    returns (3,size,size) uint8 and per object a mask (size,size) bool; later ones are on top.
    """
    grid = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    slope = rng.uniform(-40, 40, (2, 3, 1, 1))
    image = rng.uniform(40, 110, (3, 1, 1)) + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    masks = []
    for shape, rgb, x0, y0, radius in objects:
        inside = shape((x - x0) / radius, (y - y0) / radius) * radius * size  # in pixels
        cover = np.clip(0.5 - inside, 0, 1)  # a one-pixel soft edge
        image = image + cover * (np.reshape(rgb, (3, 1, 1)) - image)
        masks = [mask & (cover < 0.5) for mask in masks] + [cover >= 0.5]
    image = image * rng.uniform(0.8, 1.15) + rng.normal(0, 14, image.shape)
    image = torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8))
    return image, [torch.from_numpy(mask) for mask in masks]

def place(name, rng, smallest=0.14, largest=0.24):
    """An instrument at a random place and size, as draw takes it."""
    shape, colour = INSTRUMENTS[name]
    radius = rng.uniform(smallest, largest)
    x, y = rng.uniform(radius, 1 - radius, 2)
    return [shape, COLOURS[colour], x, y, radius]

def toy_images(count, size, rng):
    """Images without sound, to pretrain the toy backbone on in ImageNet's place.

    Each is one of 36 classes of things (a shape in a colour) or 24 of texture (stripes of 8
    directions and 3 widths), because a spectrogram is texture more than it is things.
    returns images (count,3,size,size) uint8 and labels (count,) in 0..59
    """
    images, labels = [], rng.integers(0, 60, count)
    grid = np.arange(size)
    for label in labels:
        if label < 36:
            radius = rng.uniform(0.12, 0.3)
            thing = (SHAPES[label // 6], list(COLOURS.values())[label % 6],
                     *rng.uniform(radius, 1 - radius, 2), radius)
            images.append(draw([thing], size, rng)[0])
        else:
            angle = (label - 36) // 3 * np.pi / 8 + rng.uniform(-0.1, 0.1)
            period = (3.5, 6, 11)[label % 3] * rng.uniform(0.85, 1.15)
            along = np.cos(angle) * grid + np.sin(angle) * grid[:, None]
            stripes = np.sin(2 * np.pi * (along / period + rng.uniform()))
            image = draw([], size, rng)[0].numpy() + stripes * rng.uniform(-90, 90, (3, 1, 1))
            images.append(torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8)))
    return torch.stack(images), torch.from_numpy(labels)

def write_wav(sound, path):
    """(N,) in [-1, 1] -> 16 bit mono at 16 kHz."""
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())

def bar(iterable, text):
    """A progress bar on a terminal, nothing in a log file."""
    return tqdm(iterable, desc=text, leave=False, disable=None, ncols=79)

def write_atomic(path, content):
    """Write bytes under a temporary name, then rename: the file is there whole or not at all."""
    with open(path + ".partial", "wb") as file:
        file.write(content)
    os.replace(path + ".partial", path)

def save_atomic(tensors, path):
    """torch.save, whole or not at all."""
    file = io.BytesIO()
    torch.save(tensors, file)
    write_atomic(path, file.getvalue())

def make_toy(task, root, seed=0):
    """Write the toy data set of a task, complete or not at all; its settings go to toy.json."""
    if os.path.exists(root):
        raise InputError(f"{root} is there already; remove it or choose another folder")
    partial = root.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    {"ave": toy_ave, "avs": toy_avs, "avqa": toy_avqa}[task](partial, np.random.default_rng(seed))
    stats(task, partial, TOY_SIZE)
    settings = {"task": task, "seed": seed, "image_size": TOY_SIZE}
    write_atomic(os.path.join(partial, "toy.json"), json.dumps(settings).encode())
    os.replace(partial, root)

TOY_SIZE = 48  # pixels a side: what the nano backbone takes
TOY_CLIPS = {"ave": {"train": 240, "val": 60, "test": 120},
             "avs": {"train": 480, "val": 60, "test": 80},
             "avqa": {"train": 380, "val": 60, "test": 120}}  # videos

def toy_ave(root, rng):
    """The AVE layout with the toy's instruments; neither sight nor sound alone can label it.

    A clip has one event, 3 to 7 seconds of its 10, in which its instrument is both seen and heard.
    The other seconds are background, each of one kind by chance: its instrument
        is seen but silent, or heard but unseen, or seen to another one's sound, or heard to
        another one's look.
    Worked example, `bell&toy0007&good&2&6`:
        second   0       1       2     3     4     5     6       7       8       9
        seen     bell    -       bell  bell  bell  bell  bell    drum    bell    -
        heard    -       bell    bell  bell  bell  bell  horn    bell    -       bell
        label    backgr. backgr. bell  bell  bell  bell  backgr. backgr. backgr. backgr.
    Sight alone sees a bell in seconds 0 and 2-6 and 8 and cannot tell which of them sound. Half of
    all seconds are background; of those, three in four show an instrument, as all events do.
    """
    names, rows = list(INSTRUMENTS), {split: [] for split in TOY_CLIPS["ave"]}
    os.makedirs(os.path.join(root, "raw_audio"))
    for split, count in TOY_CLIPS["ave"].items():
        for i in bar(range(count), f"toy ave {split}"):
            name, other = (names[k] for k in rng.permutation(len(names))[:2])
            length = rng.integers(3, 8)
            start = rng.integers(0, 11 - length)
            # Ids as people have them: one in four begins with a dash, as on YouTube.
            video = f"{'-' if rng.uniform() < 0.25 else ''}{split}{i:04d}"
            folder = os.path.join(root, "video_frames", video)
            os.makedirs(folder)
            sound = []
            for t in range(10):
                kinds = [(name, None), (None, name), (name, other), (other, name)]
                event = start <= t < start + length
                seen, heard = (name, name) if event else kinds[rng.integers(4)]
                image, _ = draw([place(seen, rng)] if seen else [], TOY_SIZE, rng)
                torchvision.io.write_jpeg(image, os.path.join(folder, f"{t + 1:04d}.jpg"), 95)
                second = 0.03 * rng.standard_normal(SAMPLE_RATE)
                if heard:
                    second = second + rng.uniform(0.03, 0.2) * play(heard, 1, rng)
                sound.append(second)
            write_wav(np.concatenate(sound), os.path.join(root, "raw_audio", video + ".wav"))
            rows[split].append(f"{name}&{video}&good&{start}&{start + length}")
    rows = {"Annotations": ["Category&VideoID&Quality&StartTime&EndTime", *sum(rows.values(), [])],
            **{f"{split}Set": lines for split, lines in rows.items()}}
    for name, lines in rows.items():
        write_atomic(os.path.join(root, name + ".txt"), ("\n".join(lines) + "\n").encode())

def moving(names, rng, steps=5):
    """A list over time of what draw takes: instruments in straight motion, never overlapping."""
    paths = []  # (steps, 3) each: x, y, radius
    while len(paths) < len(names):
        start, aim = (np.array(place(names[0], rng, 0.17, 0.27)[2:]) for _ in range(2))
        path = np.linspace(start, (start + aim) / 2, steps)
        if all((np.hypot(*(path - other)[:, :2].T) > path[:, 2] + other[:, 2]).all()
               for other in paths):
            paths.append(path)
        elif rng.uniform() < 0.02:  # the first ones may leave no room
            paths = []
    looks = [place(name, rng)[:2] for name in names]
    return [[(*look, *path[k]) for look, path in zip(looks, paths)] for k in range(steps)]

def toy_avs(root, rng):
    """The AVSBench S4 layout: two or three instruments move, and one of them sounds.

    Only the sound tells which one; an eye that finds them all has to guess among two or three.
    """
    names, rows = list(INSTRUMENTS), ["name,start,category,split"]
    for split, count in TOY_CLIPS["avs"].items():
        for i in bar(range(count), f"toy avs {split}"):
            seen = [names[k] for k in rng.permutation(len(names))[:rng.integers(2, 4)]]
            sounding = rng.integers(len(seen))
            name, category = f"{'-' if i % 4 == 0 else ''}{split}{i:04d}", seen[sounding]
            folder = lambda kind: os.path.join(root, "s4_data", kind, split, category)
            for path in (folder("audio_wav"), *(os.path.join(folder(kind), name)
                                                for kind in ("visual_frames", "gt_masks"))):
                os.makedirs(path, exist_ok=True)
            scenes = moving(seen, rng)
            for k in range(5):
                image, masks = draw(scenes[k], TOY_SIZE, rng)
                path = lambda kind: os.path.join(folder(kind), name, f"{name}_{k + 1}.png")
                torchvision.io.write_png(image, path("visual_frames"))
                if k == 0 or split != "train":
                    torchvision.io.write_png(masks[sounding][None].byte() * 255, path("gt_masks"))
            sound = rng.uniform(0.05, 0.2) * play(category, 5, rng)
            write_wav(sound + 0.03 * rng.standard_normal(len(sound)),
                      os.path.join(folder("audio_wav"), name + ".wav"))
            rows.append(f"{name},0,{category},{split}")
    write_atomic(os.path.join(root, "s4_meta_data.csv"), ("\n".join(rows) + "\n").encode())

def toy_avqa(root, rng):
    """The MUSIC-AVQA layout. A video of 3 to 6 seconds shows one instrument or two, and lets one be
    heard, or two in turn. In every second video one of them is both seen and heard.

    Worked example: a bell and a drum are seen, a drum and a horn are heard. "How many instruments
    are sounding?" two. "Is the yellow one sounding?" no: the horn is heard, but it is not there.
    "Which instrument in the video is sounding?" drum, which neither eye nor ear can tell alone.
    A template's answers are about equally frequent. No question asks who came first or stands left:
    the published head knows no order of seconds, and its means over the tokens keep no place.
    """
    names, questions = list(INSTRUMENTS), {split: [] for split in TOY_CLIPS["avqa"]}
    number, (a, v, av) = ("zero", "one", "two"), ("Audio", "Visual", "Audio-Visual")
    os.makedirs(os.path.join(root, "raw_audio"))
    for split, count in TOY_CLIPS["avqa"].items():
        for i in bar(range(count), f"toy avqa {split}"):
            video, seconds = f"{'-' if i % 4 == 0 else ''}{split}{i:04d}", rng.integers(3, 7)
            drawn, both = [names[k] for k in rng.permutation(6)], i % 2  # how many are both
            n_seen, n_heard = rng.integers(1, 3, 2)
            seen, heard = drawn[:n_seen], drawn[n_seen - both:][:n_heard]
            os.makedirs(folder := os.path.join(root, "video_frames", video))
            for k, scene in enumerate(moving(seen, rng, seconds)):
                image, _ = draw(scene, TOY_SIZE, rng)
                torchvision.io.write_jpeg(image, os.path.join(folder, f"{k + 1:06d}.jpg"), 95)
            sound = np.concatenate([
                rng.uniform(0.05, 0.2) * play(heard[k * n_heard // seconds], 1, rng)
                for k in range(seconds)])
            write_wav(sound + 0.03 * rng.standard_normal(len(sound)),
                      os.path.join(root, "raw_audio", video + ".wav"))
            match, dice = seen[-1], rng.integers(4)  # match: where one is both
            other = rng.choice([x for x in drawn[:n_seen + n_heard] if not both or x != match])
            asked = [  # if, modality, kind, template, its value, answer
                (dice == 0, v, "Counting", "How many instruments are in the video?", "",
                 number[n_seen]),
                (n_seen < 2, v, "Instrument", "Which instrument is in the video?", "", seen[0]),
                (dice == 1, a, "Counting", "How many instruments are sounding?", "",
                 number[n_heard]),
                (n_heard < 2, a, "Instrument", "Which instrument is sounding?", "", heard[0]),
                (True, av, "Counting", "How many instruments in the video are sounding?", "",
                 number[both]),
                (both and n_seen + n_heard > 2, av, "Instrument",
                 "Which instrument in the video is sounding?", "", match),
                (both, av, "Existential", "Is the <Colour> one sounding?", match, "yes"),
                (dice < 2, av, "Existential", "Is the <Colour> one sounding?", other, "no")]
            for _, *kind, content, about, answer in filter(lambda row: row[0], asked):
                questions[split].append({
                    "video_id": video, "question_id": len(questions[split]),
                    "type": json.dumps(kind), "question_content": content,
                    "templ_values": json.dumps([INSTRUMENTS[about][1]] if about else []),
                    "question_deleted": 0, "anser": answer})
    for split, rows in questions.items():
        write_atomic(os.path.join(root, f"avqa-{split}.json"), json.dumps(rows, indent=1).encode())

# ---------------------------------------------------------------- commands

def stats(task, root, size):
    """Mean and std of the training spectrograms before normalisation, into root/fbank.json.

    Over the second's real rows alone (padding is no sound): the mean of the seconds' means and the
    mean of their stds, as the authors measured theirs.
    """
    dataset = DATASETS[task](root, "train", size)
    check_files(dataset)
    means, stds = [], []
    once = {dataset.files(i)[1]: i for i in range(len(dataset))}
    for i in bar(list(once.values()), "stats"):
        for image in spectrograms_of(dataset.sound(i), size, (0.0, 0.5)):  # raw log energies
            image = image[image.abs().sum(1) > 0]
            means.append(image.mean().item())
            stds.append(image.std().item())
    known = {**known_stats(root), str(size): [float(np.mean(means)), float(np.mean(stds))]}
    write_atomic(os.path.join(root, "fbank.json"), json.dumps(known).encode())
    return known[str(size)]

DATASETS = {"ave": AVE, "avs": AVSBench, "avqa": MusicAVQA}

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write a toy data set in the real layout")
    toy.add_argument("task", choices=DATASETS)
    toy.add_argument("root", help="a folder that is not there yet")
    toy.add_argument("--seed", type=int, default=0)
    measure = commands.add_parser("stats", help="mean and std of a data set's spectrograms")
    measure.add_argument("task", choices=DATASETS)
    measure.add_argument("root")
    measure.add_argument("--size", type=int, default=192, help="side of the spectrogram image")
    args = parser.parse_args()
    try:
        if args.command == "toy":
            make_toy(args.task, args.root, args.seed)
            print(f"{args.root} is ready. Next: python train.py {args.task} --data {args.root}")
        else:
            mean, std = stats(args.task, args.root, args.size)
            print(f"mean {mean:.6f}  std {std:.6f}  (kept in {args.root}/fbank.json)")
    except (InputError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
