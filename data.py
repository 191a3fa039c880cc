# SPDX-License-Identifier: MIT
"""Data: sound and frames from disk, the data sets' layouts, toy data in the same.

    python data.py extract VIDEOS DIR [--jobs N]  videos -> frames and sounds
    python data.py check TASK DIR [--size S]      what is missing or damaged
    python data.py stats TASK DIR [--size S]      mean and std, kept in DIR
    python data.py toy TASK DIR [--seed N]        the toy data set

TASK is ave, avs, avqa or ucf101; S the side of the images, 192. Top to bottom:
sound and frames, data sets, the toy world, its data sets, files, commands."""
import argparse, collections, csv, io, json, multiprocessing.pool, os, shutil, subprocess, sys, wave
from os.path import basename, dirname, exists, isdir, join, splitext
from pathlib import Path

import numpy as np
import torch, torchaudio, torchvision
from tqdm import tqdm
from lavish import AVE_MEAN, AVE_STD, SAMPLE_RATE, InputError, fbank, require

EXTRACT = "made from a folder of videos by: python data.py extract VIDEOS DIR"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def open_wav(path):
    """An open wave.Wave_read; an InputError if the file is missing or no PCM wav."""
    try:
        # 24 bit and multichannel files come as WAVE_FORMAT_EXTENSIBLE (65534), which `wave` reads
        # from Python 3.12 on only. For PCM inside it, the plain tag says the same.
        with open(path, "rb") as file:
            head = file.read(100)
            tag = head.find(b"fmt ") + 8
            if head[tag:tag + 2] + head[tag + 24:tag + 26] == b"\xfe\xff\1\0":
                plain = head[:tag] + b"\1\0" + head[tag + 2:] + file.read()
                return wave.open(io.BytesIO(plain))  # what follows the tag is not read
        return wave.open(path)
    except FileNotFoundError:
        raise InputError(f"no sound at {path}") from None
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(f"{path} is not a PCM wav ({str(error) or 'it ends too early'}); convert "
                         "it: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav") from None

def read_wav(path):
    """(N,) float32 mono at 16 kHz in [-1, 1], from PCM of 8, 16, 24 or 32 bit, any rate, channels.

    The standard library reads it, because torchaudio.load needs torchcodec now. Channels are
    averaged (the released code uses the left one alone) and the mean is removed, as released."""
    with open_wav(path) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    raw = raw[:len(raw) // (width * channels) * width * channels].reshape(-1, width)
    samples = np.pad(raw ^ 128 if width == 1 else raw, ((0, 0), (4 - width, 0)))  # 8 bit: unsigned
    samples = samples.view("<i4").reshape(-1, channels).mean(1, dtype=np.float64) / 2 ** 31  # (N,)
    sound = torch.from_numpy(samples.astype(np.float32))
    if rate != SAMPLE_RATE and len(sound):
        sound = torchaudio.functional.resample(sound, rate, SAMPLE_RATE)
    return sound - sound.mean()  # as released

def read_image(path):
    """(3, height, width) uint8, from jpg or png."""
    try:
        return torchvision.io.decode_image(path, mode="RGB")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable image ({reason}); extract it again") from None

def read_frame(path, size):
    """(3, size, size) float32, ImageNet-normalised; the aspect is not kept, as released."""
    # antialias: the torchvision of the released code had none, so a large frame aliased.
    image = torchvision.transforms.functional.resize(read_image(path), [size, size], antialias=True)
    return torchvision.transforms.functional.normalize(image / 255, IMAGENET_MEAN, IMAGENET_STD)

def seconds_of(sound, count):
    """(N,) -> (count, 16000): second t is samples [16000 t, 16000 (t+1)), silence past the end. The
    released code spreads `count` windows evenly, up to 0.1 s early against the labels."""
    sound = torch.nn.functional.pad(sound, (0, max(0, count * SAMPLE_RATE - len(sound))))
    return sound[:count * SAMPLE_RATE].view(count, SAMPLE_RATE)                # (count,16000)

def video_paths(root, video):  # the folder of its frames, and its sound
    return join(root, "video_frames", video), join(root, "raw_audio", video + ".wav")

def video_files(root, video):
    """The frames of a video, in the order of their numbers whatever the zero-padding (or the first
    that should be there), and its sound."""
    folder, wav = video_paths(root, video)
    names = [n for n in os.listdir(folder) if n.endswith(".jpg")] if isdir(folder) else []
    try:
        names = sorted(names, key=lambda name: int(name[:-4])) or ["0001.jpg"]  # 9.jpg before 10
    except ValueError:
        raise InputError(f"{folder} holds frames that are not numbered like 0001.jpg") from None
    return [join(folder, name) for name in names], wav

def read_lines(path):
    """The stripped, non-empty lines of a text file."""
    text = Path(path).read_text(encoding="utf-8") if exists(path) else ""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    require(lines, f"no {path}, or nothing in it; the README says what a data folder holds")
    return lines

def known_stats(root):  # {"192": [mean, std], ...}, by the size of the spectrogram image
    path = join(root, "fbank.json")
    return json.loads(read_lines(path)[0]) if exists(path) else {}

def read_clip(paths, seconds, size, stats):
    """T paths of frames, sound (T,16000) -> frames (T,3,S,S), spectrograms (T,S,S)."""
    return (torch.stack([read_frame(path, size) for path in paths]),           # (T,3,S,S)
            torch.stack([fbank(second, size, *stats) for second in seconds]))  # (T,S,S)

class Clips(torch.utils.data.Dataset):
    """What the data sets share. files(i): the pictures of an item and its sound, None if it need
    not have one; wav(i): where its sound is or would be, without a look at the pictures."""
    kept = None  # all items, with --cache
    def __init__(self, root, split, size):
        self.root, self.split, self.size = root, split, size
        require(isdir(root), f"no data folder {root}; make one: data.py toy {self.task} {root}")
        self.stats = known_stats(root).get(str(size), [AVE_MEAN, AVE_STD])  # of the spectrograms
    def __len__(self):
        return len(self.clips)
    def __getitem__(self, i):
        return self.kept[i] if self.kept else self.read(i)
    def files(self, i):
        return video_files(self.root, self.clips[i][0])
    def wav(self, i):
        return video_paths(self.root, self.clips[i][0])[1]
    def sound(self, i):
        return seconds_of(read_wav(self.wav(i)), self.seconds)                 # (T,16000)

# ---------------------------------------------------------------- AVE
class AVE(Clips):
    """Audio-visual events (Tian et al., ECCV 2018): ten seconds, one event or background in each.

        root/Annotations.txt                 Category&VideoID&Quality&StartTime&EndTime
        root/trainSet.txt valSet.txt testSet.txt   the same lines, split
        root/video_frames/ID/*.jpg           at any rate, numbered with any zero-padding
        root/raw_audio/ID.wav                any PCM wav

    item: frames (10,3,S,S), spectrograms (10,S,S), labels (10,) int64: the category's place in
    order of first appearance in Annotations.txt if start <= second < end, else background, which
    comes last (28 in the real data, in which one row has start = end = 0: all background).
    extra_audio: a file of features, a row for each of Annotations.txt; item ends with (10,128)."""
    task, fact, seconds, remedy = "ave", "classes", 10, EXTRACT
    def __init__(self, root, split, size, extra_audio=None):
        super().__init__(root, split, size)
        rows = read_lines(join(root, "Annotations.txt"))
        rows = rows[rows[0].startswith("Category&"):]  # the zip's copy has a header, others none
        self.extra = extra_audio and dict(zip(rows, read_features(extra_audio, len(rows))))
        self.classes = list(dict.fromkeys(row.split("&")[0] for row in rows))
        self.clips = []  # (video id, category index, start, end, line)
        path = join(root, f"{split}Set.txt")
        for number, line in enumerate(read_lines(path), 1):
            try:
                category, video, _, start, end = line.split("&")
                category = self.classes.index(category)  # a ValueError if unknown
                self.clips.append((video, category, int(start), int(end), line))
            except ValueError:
                raise InputError(f"{path}, line {number}: {line!r} is not Category&VideoID&Quality&"
                                 "Start&End with a category of Annotations.txt") from None
    def labels(self, i):
        _, category, start, end, _ = self.clips[i]
        t = torch.arange(self.seconds)
        return torch.where((start <= t) & (t < end), category, len(self.classes))  # (10,)
    def read(self, i):
        paths, _ = self.files(i)
        # The middle frame of each second; released: linspace, at 3 a second in the same seconds.
        at = [paths[(2 * t + 1) * len(paths) // 20] for t in range(self.seconds)]
        extra = [self.extra[self.clips[i][-1]]] if self.extra else []          # (10,128)
        return *read_clip(at, self.sound(i), self.size, self.stats), self.labels(i), *extra

def read_features(path, count):
    """(count,10,128) float32, from an .npy or from AVE's audio_feature.h5, whose one data set ends
    the file uncompressed, as float64 behind 2144 bytes: no HDF5 library is needed for that."""
    try:
        whole, h5 = Path(path).read_bytes(), path.endswith(".h5")
        if h5 and (whole[:4] != b"\x89HDF" or len(whole) != 2144 + count * 10 * 128 * 8):
            raise ValueError("not AVE's own .h5")
        found = np.frombuffer(whole, "<f8", offset=2144) if h5 else np.load(io.BytesIO(whole))
        return torch.from_numpy(found.astype(np.float32).reshape(count, 10, 128))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} does not hold features ({count}, 10, 128): {error}; give an .npy "
                         "of that shape, in the order of Annotations.txt") from None

# ---------------------------------------------------------------- AVSBench S4
class AVSBench(Clips):
    """AVSBench S4 (Zhou et al., ECCV 2022): five seconds, and masks of the one thing that sounds.

        root/s4_meta_data.csv                columns name, ..., category, split
        root/s4_data/visual_frames/SPLIT/CATEGORY/NAME/NAME_{1..5}.png
        root/s4_data/gt_masks/SPLIT/CATEGORY/NAME/NAME_1.png in train, NAME_{1..5}.png in val, test
        root/s4_data/audio_wav/SPLIT/CATEGORY/NAME.wav

    item: frames (5,3,S,S), spectrograms (5,S,S), masks (1 in train, else 5, mask_size, mask_size)
    of 0 and 1. mask_size is that of the files (224). An empty mask is legal."""
    task, fact, seconds, remedy = "avs", "mask_size", 5, "they come with AVSBench-object"
    def __init__(self, root, split, size):
        super().__init__(root, split, size)
        path = join(root, "s4_meta_data.csv")
        rows = list(csv.reader(read_lines(path)))
        names = ("name", "category", "split")
        known = set(names) <= set(rows[0])  # else by their places; a header is of no split
        name, category, its_split = map(rows[0].index, names) if known else (0, 2, 3)
        require(min(map(len, rows)) > max(name, category, its_split), f"{path} has rows too short")
        self.clips = [(row[name], row[category]) for row in rows if row[its_split] == split]
        require(self.clips, f"{path} lists no {split} clips; its fourth column should say split")
        self.mask_size = read_image(self.files(0)[0][-1]).shape[-1]
    def files(self, i):
        return s4_files(self.root, self.split, *self.clips[i])
    def wav(self, i):
        return self.files(i)[1]
    def read(self, i):
        paths, _ = self.files(i)
        masks = torch.stack([self.read_mask(path) for path in paths[self.seconds:]])
        return *read_clip(paths[:self.seconds], self.sound(i), self.size, self.stats), masks
    def read_mask(self, path):
        """Stored as {0, 1}, {0, 255} or grey (above half counts), in one channel or more. The
        released loader's convert("1") turns a {0, 1} file all black and dithers a grey one."""
        mask = read_image(path).amax(0)
        height, width = mask.shape
        require(height == width == self.mask_size, f"{path} is {width} x {height}, not "
                f"{self.mask_size} x {self.mask_size} as the first mask; make all of one size")
        return (mask > (0 if mask.max() == 1 else 127)).float()

def s4_files(root, split, name, category):
    """A clip's five frames and its masks (in train one, of the first frame), and its sound."""
    folder = lambda kind: join(root, "s4_data", kind, split, category, name)
    kinds = ["visual_frames"] * 5 + ["gt_masks"] * (1 if split == "train" else 5)
    paths = [join(folder(kind), f"{name}_{k % 5 + 1}.png") for k, kind in enumerate(kinds)]
    return paths, folder("audio_wav") + ".wav"

# ---------------------------------------------------------------- MUSIC-AVQA
class MusicAVQA(Clips):
    """MUSIC-AVQA (Li et al., CVPR 2022): a question about a video of music, mostly a minute long.

        root/avqa-train.json avqa-val.json avqa-test.json      the data set's data/json
        root/video_frames/ID/*.jpg, root/raw_audio/ID.wav      as for AVE

    item: frames (T,3,S,S), spectrograms (T,S,S), question (W,) and answer () int64, and in train
    foreign (T,3,S,S), frames of other videos, drawn by the item's number. The T moments lie evenly
    from the first second to the last, however long the video is; frame and sound are of one second.
    vocabulary: from the training questions unless given. {"words", "answers"} in order of
    appearance, "<pad>" first (93 and 42 in the real data), and "length", that of the longest
    question, to which the others are padded (14 in the real data). A checkpoint keeps it."""
    task, fact, seconds, remedy = "avqa", "vocabulary", 1, EXTRACT
    def __init__(self, root, split, size, vocabulary=None, moments=10):
        super().__init__(root, split, size)
        asked_in = lambda split: read_questions(join(root, f"avqa-{split}.json"))
        self.moments, self.questions = moments, asked_in(split)
        self.vocabulary = vocabulary or make_vocabulary(asked_in("train"))
        for q in self.questions:
            asker = f"question {q['id']} of {split}: "
            q["indices"] = encode(q["words"], self.vocabulary, asker)
            require(q["answer"] in self.vocabulary["answers"],
                    f"{asker}{q['answer']!r} is in no training answer")
        self.clips = [(q["video"],) for q in self.questions]
        self.videos = list(dict.fromkeys(q["video"] for q in self.questions))
        require(split != "train" or len(self.videos) > 1, f"{root} needs two videos to train")
    def sound(self, i):
        sound = read_wav(self.wav(i))
        seconds = max(1, -(-len(sound) // SAMPLE_RATE))  # the last one may be half silence
        return seconds_of(sound, seconds)[moments(seconds, self.moments)]      # (T,16000)
    def read(self, i):
        q, (paths, _) = self.questions[i], self.files(i)
        at = [paths[k] for k in moments(len(paths), self.moments)]
        item = (*read_clip(at, self.sound(i), self.size, self.stats), q["indices"],
                torch.tensor(self.vocabulary["answers"].index(q["answer"])))
        if self.split != "train":
            return item
        rng, others = np.random.default_rng(i), [v for v in self.videos if v != q["video"]]
        draw_one = lambda items: items[rng.integers(len(items))]  # a video, then a frame of it
        foreign = [draw_one(video_files(self.root, draw_one(others))[0]) for _ in at]
        return (*item, torch.stack([read_frame(path, self.size) for path in foreign]))

def read_questions(path):
    """[{"id", "video", "type" (modality, kind), "words", "answer"}] from one of the json files.
    The data set's own rule: drop the last character (a "?", or a full-width one), split at spaces,
    put the next template value in place of each word with a "<"."""
    questions = []
    try:
        for number, row in enumerate(json.loads("\n".join(read_lines(path))), 1):
            values = iter(json.loads(row["templ_values"]))
            words = row["question_content"].rstrip()[:-1].split(" ")
            questions.append({
                "id": row["question_id"], "video": row["video_id"],
                "type": tuple(json.loads(row["type"])), "answer": row["anser"],  # [sic]
                "words": [next(values) if "<" in word else word for word in words]})
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not the JSON of MUSIC-AVQA: {error}") from None
    except (KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{path}, question {number}: {error!r} is missing or wrong") from None
    return questions

def moments(length, count):
    """The indices of `count` seconds that lie evenly over a video of `length`."""
    return np.linspace(0, length - 1, count).round().astype(int)

def encode(words, vocabulary, asker=""):
    """Words as indices (W,), padded; an InputError, which begins with the asker, for a word that no
    training question has."""
    known, length = vocabulary["words"], vocabulary["length"]
    unknown = [word for word in words if word not in known]
    require(not unknown and len(words) <= length, f"{asker}{(unknown or words)[-1]!r} is in no "
            f"training question, or this has over {length} words; known: {' '.join(known[1:])}")
    return torch.tensor([known.index(word) for word in words] + [0] * (length - len(words)))

def make_vocabulary(questions):
    return {"words": ["<pad>", *dict.fromkeys(w for q in questions for w in q["words"])],
            "answers": list(dict.fromkeys(q["answer"] for q in questions)),
            "length": max(len(q["words"]) for q in questions)}

# ---------------------------------------------------------------- UCF101
class UCF101(Clips):
    """Actions (Soomro et al., 2012): what is done in a clip of some seconds.

        root/classInd.txt, trainlist01.txt, testlist01.txt     the official lists of split 1
        root/video_frames/ID/*.jpg, root/raw_audio/ID.wav      as for AVE, 8 frames a second or more

    item: frames (16,3,S,S), evenly over the clip; spectrograms (8,S,S), of the second around each
    two frames; label () int64; audible () bool: a missing wav is silence. The label is the folder's
    in the list, for file names differ in case (HandstandPushups/v_HandStandPushups_g01_c01.avi).
    val: groups 24 and 25 of training (a group is cut from one video): no official list has one."""
    task, fact, seconds, remedy = "ucf101", "classes", 0, "the README says how they are made"
    def __init__(self, root, split, size):
        super().__init__(root, split, size)
        self.classes = [line.split()[-1] for line in read_lines(join(root, "classInd.txt"))]
        path, self.clips = join(root, f"{'test' if split == 'test' else 'train'}list01.txt"), []
        for number, line in enumerate(read_lines(path), 1):
            try:
                action, file = line.split()[0].split("/")
                label, late = self.classes.index(action), int(file.split("_g")[1][:2]) > 23
            except (ValueError, IndexError):
                raise InputError(f"{path}, line {number}: {line!r} is not CLASS/v_NAME_gGG_cCC.avi "
                                 "with a class of classInd.txt") from None
            if split == "test" or late == (split == "val"):
                self.clips.append((splitext(file)[0], label))
    def files(self, i):
        paths, wav = super().files(i)
        return paths, wav if exists(wav) else None  # half of the classes have none
    def sound(self, i):
        sound = read_wav(self.wav(i)) if exists(self.wav(i)) else torch.zeros(0)
        padded = torch.nn.functional.pad(sound, [SAMPLE_RATE // 2] * 2)
        starts = (2 * torch.arange(8) + 1) * len(sound) // 16
        return torch.stack([padded[start:start + SAMPLE_RATE] for start in starts])  # (8,16000)
    def read(self, i):
        paths, wav = self.files(i)
        at = [paths[(2 * k + 1) * len(paths) // 32] for k in range(16)]
        clip = read_clip(at, self.sound(i), self.size, self.stats)
        return *clip, torch.tensor(self.clips[i][1]), torch.tensor(wav is not None)

# ---------------------------------------------------------------- the toy world: looks and timbres
COLOURS = {"red": (230, 60, 50), "green": (60, 190, 80), "blue": (70, 100, 235),
           "yellow": (235, 205, 60), "magenta": (215, 80, 205), "cyan": (70, 205, 215)}
SHAPES = (  # signed distances from an outline about 1 in radius: inside is negative
    lambda x, y: np.hypot(x, y) - 0.9,                                              # circle
    lambda x, y: np.maximum(y - 0.7, 0.87 * abs(x) - 0.5 * y - 0.45),               # triangle
    lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,                                  # square
    lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,                                 # ring
    lambda x, y: np.minimum(np.maximum(abs(x) - 0.3, abs(y) - 1),
                            np.maximum(abs(y) - 0.3, abs(x) - 1)),                  # cross
    lambda x, y: abs(x) + abs(y) - 1.05)                                            # diamond
INSTRUMENTS = dict(zip(("bell", "flute", "drum", "horn", "bird", "rattle"), zip(SHAPES, COLOURS)))

def play(name, seconds, rng):
    """One instrument for some seconds, (seconds * 16000,) float64 with unit RMS; pitch is drawn."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE  # seconds
    pitch, phase = 2 ** rng.uniform(-0.3, 0.3), rng.uniform()
    beat = lambda rate: (t * rate * pitch + phase) % 1 / rate  # seconds since the last stroke
    noise = rng.standard_normal(len(t))
    tone = lambda hertz, r=1: np.sin(2 * np.pi * hertz * pitch * r * t)
    sound = {
        "bell": lambda: sum(tone(520, r) for r in (1, 2.76, 5.4)) * np.exp(-5 * beat(2)),
        "flute": lambda: np.sin(2 * np.pi * 880 * pitch * t + 3 * np.sin(2 * np.pi * 5 * t)),
        "drum": lambda: tone(90) * np.exp(-12 * beat(4)),  # low bursts
        "horn": lambda: 2 * ((220 * pitch * t) % 1) - 1,  # a sawtooth: all harmonics
        "bird": lambda: np.sin(2 * np.pi * (2000 + 4000 * beat(5)) * pitch * beat(5)) * (
            beat(5) < 0.12),  # upward chirps
        "rattle": lambda: np.diff(noise, prepend=0) * np.exp(-25 * beat(8))}[name]()
    return sound / np.sqrt(np.mean(sound ** 2))  # unit RMS

def draw(objects, size, rng):
    """A noisy scene. objects: (shape, rgb, x, y, radius), places and radius in units of the image.

    returns (3,size,size) uint8 and per object a mask (size,size) bool; later ones are on top."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    slope = rng.uniform(-40, 40, (2, 3, 1, 1))
    image = rng.uniform(40, 110, (3, 1, 1)) + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    masks = []
    for shape, rgb, x0, y0, radius in objects:
        inside = shape((x - x0) / radius, (y - y0) / radius) * radius * size  # in pixels
        cover = np.clip(0.5 - inside, 0, 1)  # a one-pixel soft edge
        image = image + cover * (np.reshape(rgb, (3, 1, 1)) - image)
        masks = [mask & (cover < 0.5) for mask in masks] + [cover >= 0.5]
    image = np.clip(image * rng.uniform(0.8, 1.15) + rng.normal(0, 14, image.shape), 0, 255)
    return torch.from_numpy(image.astype(np.uint8)), [torch.from_numpy(mask) for mask in masks]

def place(look, rng, smallest=0.14, largest=0.24):
    """A (shape, colour) at a random place and size, as draw takes it."""
    (shape, colour), radius = look, rng.uniform(smallest, largest)
    return [shape, COLOURS[colour], *rng.uniform(radius, 1 - radius, 2), radius]

def toy_images(count, size, rng):
    """In ImageNet's place, without sound: 36 kinds of things (a shape in a colour), 24 of texture
    (stripes, as in spectrograms) -> (count,3,size,size) uint8, labels (count,) in 0..59"""
    images, labels, grid = [], rng.integers(0, 60, count), np.arange(size)
    looks = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    for label in labels:
        if label < 36:  # a thing
            images.append(draw([place(looks[label], rng, 0.12, 0.3)], size, rng)[0])
        else:
            angle = (label - 36) // 3 * np.pi / 8 + rng.uniform(-0.1, 0.1)
            period = (3.5, 6, 11)[label % 3] * rng.uniform(0.85, 1.15)
            along = np.cos(angle) * grid + np.sin(angle) * grid[:, None]
            stripes = np.sin(2 * np.pi * (along / period + rng.uniform()))
            image = draw([], size, rng)[0].numpy() + stripes * rng.uniform(-90, 90, (3, 1, 1))
            images.append(torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8)))
    return torch.stack(images), torch.from_numpy(labels)

# ---------------------------------------------------------------- the toy data sets
def write_video(root, video, images, sound):
    """A toy video as files, extracted already: (T,3,S,S) uint8 images, (N,) sound."""
    folder, wav = video_paths(root, video)
    write_clip([join(folder, f"{t + 1:04d}.jpg") for t in range(len(images))], images, wav, sound)

def write_clip(paths, images, wav, sound):
    """Images as jpg or png, as many as there are paths, and the sound, if any, as 16 bit wav."""
    for path in (*paths, wav):
        os.makedirs(dirname(path), exist_ok=True)
    for path, image in zip(paths, images):
        jpeg = path.endswith(".jpg")
        code = torchvision.io.encode_jpeg(image, 95) if jpeg else torchvision.io.encode_png(image)
        torchvision.io.write_file(path, code)
    if sound is not None:
        with wave.open(wav, "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())

def make_toy(task, root, seed=0):
    """Write the toy data set of a task, complete or not at all."""
    require(not exists(root), f"{root} is there already; remove it or choose another folder")
    shutil.rmtree(partial := root.rstrip("/") + ".partial", ignore_errors=True)  # of a stopped run
    toys = {"ave": toy_ave, "avs": toy_avs, "avqa": toy_avqa, "ucf101": toy_ucf101}
    toys[task](partial, np.random.default_rng(seed))
    stats(task, partial, TOY_SIZE)
    write_lines([json.dumps({"task": task, "seed": seed})], join(partial, "toy.json"))
    os.replace(partial, root)

TOY_SIZE = 48  # pixels a side: what the nano backbone takes
TOY_CLIPS = {"ave": {"train": 240, "val": 60, "test": 120},
             "avs": {"train": 480, "val": 60, "test": 80},
             "avqa": {"train": 380, "val": 60, "test": 120},  # videos
             "ucf101": {"train": 32, "val": 4, "test": 14}}  # of each of nine actions

def toy_clips(task):
    """(split, number, id) of each clip of a toy; one id in four has a dash, as on YouTube."""
    for split, count in TOY_CLIPS[task].items():
        for i in bar(range(count), f"toy {task} {split}"):
            yield split, i, f"{'-' * (i % 4 == 0)}{split}{i:04d}"

def toy_ave(root, rng):
    """The AVE layout with the toy's instruments; neither sight nor sound alone can label it.
    A clip has one event, 3 to 7 seconds of its 10, in which its instrument is both seen and heard.
    The other seconds are background, each of one kind by chance: its instrument is seen but silent,
    or heard but unseen, or seen to another one's sound, or heard to another one's look.
    Worked example, `bell&toy0007&good&2&6`:
        second   0       1       2     3     4     5     6       7       8       9
        seen     bell    -       bell  bell  bell  bell  bell    drum    bell    -
        heard    -       bell    bell  bell  bell  bell  horn    bell    -       bell
        label    backgr. backgr. bell  bell  bell  bell  backgr. backgr. backgr. backgr.
    Sight alone sees a bell in seconds 0 and 2-6 and 8 and cannot tell which of them sound."""
    rows = {split: [] for split in TOY_CLIPS["ave"]}
    for split, i, _ in toy_clips("ave"):
        name, other = rng.permutation(list(INSTRUMENTS))[:2]  # the event, and a distractor
        length = rng.integers(3, 8)
        start = rng.integers(0, 11 - length)
        video = f"{'-' * (rng.uniform() < 0.25)}{split}{i:04d}"  # here one in four by chance
        images, sound = [], []
        for t in range(10):
            seen, heard = (name, name) if start <= t < start + length else (
                (name, None), (None, name), (name, other), (other, name))[rng.integers(4)]
            scene = [place(INSTRUMENTS[seen], rng)] if seen else []
            images.append(draw(scene, TOY_SIZE, rng)[0])
            sound.append(0.03 * rng.standard_normal(SAMPLE_RATE))
            if heard:
                sound[-1] += rng.uniform(0.03, 0.2) * play(heard, 1, rng)
        write_video(root, video, images, np.concatenate(sound))
        rows[split].append(f"{name}&{video}&good&{start}&{start + length}")
    write_lines(["Category&VideoID&Quality&StartTime&EndTime", *sum(rows.values(), [])],
                join(root, "Annotations.txt"))
    for split, lines in rows.items():
        write_lines(lines, join(root, f"{split}Set.txt"))

def moving(names, rng, steps=5):
    """A list over time of what draw takes: instruments in straight motion, never overlapping."""
    looks, paths = [INSTRUMENTS[name] for name in names], []  # paths (steps, 3): x, y, radius
    while len(paths) < len(looks):
        start, aim = (np.array(place(looks[0], rng, 0.17, 0.27)[2:]) for _ in range(2))
        path = np.linspace(start, (start + aim) / 2, steps)
        apart = [np.hypot(*(path - other)[:, :2].T) > path[:, 2] + other[:, 2] for other in paths]
        if np.all(apart):
            paths.append(path)
        elif rng.uniform() < 0.02:  # the first ones may leave no room
            paths = []
    things = [place(look, rng)[:2] for look in looks]
    return [[(*thing, *spot) for thing, spot in zip(things, spots)] for spots in zip(*paths)]

def toy_avs(root, rng):
    """The AVSBench S4 layout: two or three instruments move, and one of them sounds. Only the sound
    tells which one; an eye that finds them all has to guess among two or three."""
    rows = ["name,start,category,split"]
    for split, _, name in toy_clips("avs"):
        seen = rng.permutation(list(INSTRUMENTS))[:rng.integers(2, 4)]
        sounding = rng.integers(len(seen))  # which one is heard
        images, masks = zip(*(draw(scene, TOY_SIZE, rng) for scene in moving(seen, rng)))
        sound = rng.uniform(0.05, 0.2) * play(seen[sounding], 5, rng)
        paths, wav = s4_files(root, split, name, seen[sounding])
        write_clip(paths, [*images, *(mask[sounding][None].byte() * 255 for mask in masks)],
                   wav, sound + 0.03 * rng.standard_normal(len(sound)))
        rows.append(f"{name},0,{seen[sounding]},{split}")
    write_lines(rows, join(root, "s4_meta_data.csv"))

def toy_avqa(root, rng):
    """The MUSIC-AVQA layout. A video of 3 to 6 seconds shows one instrument or two, and lets one be
    heard, or two in turn. In every second video one of them is both seen and heard.
    Worked example: a bell and a drum are seen, a drum and a horn are heard. "How many instruments
    are sounding?" two. "Is the yellow one sounding?" no: the horn is heard, but it is not there.
    "Which instrument in the video is sounding?" drum, which neither eye nor ear can tell alone. No
    question asks who came first or stands left: the published head cannot know."""
    questions = {split: [] for split in TOY_CLIPS["avqa"]}
    number, (a, v, av) = ("zero", "one", "two"), ("Audio", "Visual", "Audio-Visual")
    for split, i, video in toy_clips("avqa"):
        seconds, drawn = rng.integers(3, 7), rng.permutation(list(INSTRUMENTS))
        both = i % 2  # how many are both
        n_seen, n_heard = rng.integers(1, 3, 2)
        seen, heard = drawn[:n_seen], drawn[n_seen - both:][:n_heard]
        images = [draw(scene, TOY_SIZE, rng)[0] for scene in moving(seen, rng, seconds)]
        order = heard[np.arange(seconds) * n_heard // seconds]  # one after the other
        sound = np.concatenate([rng.uniform(0.05, 0.2) * play(name, 1, rng) for name in order])
        write_video(root, video, images, sound + 0.03 * rng.standard_normal(len(sound)))
        match, dice = seen[-1], rng.integers(4)  # match: where one is both
        other = rng.choice([x for x in drawn[:n_seen + n_heard] if not both or x != match])
        asked = [  # if, modality, kind, question, answer, the instrument whose colour it names
            (dice == 0, v, "Counting", "How many instruments are in the video?", number[n_seen]),
            (n_seen < 2, v, "Instrument", "Which instrument is in the video?", seen[0]),
            (dice == 1, a, "Counting", "How many instruments are sounding?", number[n_heard]),
            (n_heard < 2, a, "Instrument", "Which instrument is sounding?", heard[0]),
            (True, av, "Counting", "How many instruments in the video are sounding?", number[both]),
            (both and n_seen + n_heard > 2, av, "Instrument",
             "Which instrument in the video is sounding?", match),
            (both, av, "Existential", "Is the <Colour> one sounding?", "yes", match),
            (dice < 2, av, "Existential", "Is the <Colour> one sounding?", "no", other)]
        for wanted, modality, kind, content, answer, *about in asked:
            if wanted:
                questions[split].append({
                    "video_id": video, "question_id": len(questions[split]),
                    "type": json.dumps([modality, kind]), "question_content": content,
                    "templ_values": json.dumps([INSTRUMENTS[name][1] for name in about]),
                    "question_deleted": 0, "anser": answer})
    for split, rows in questions.items():
        write_lines([json.dumps(rows, indent=1)], join(root, f"avqa-{split}.json"))

def toy_ucf101(root, rng):
    """The UCF101 layout: nine actions, a bell, a flute or a drum seen moving to the sound of a
    horn, of a rattle or, as in half of the real classes, to none. One sense knows one in three."""
    actions = [(x, y) for x in ("bell", "flute", "drum") for y in ("horn", "rattle", "")]
    names, lists = [seen.title() + heard.title() for seen, heard in actions], {}
    lists["classInd"] = [f"{number} {name}" for number, name in enumerate(names, 1)]
    first = {"train": 8, "val": 24, "test": 1}  # group; two clips in each
    for split, i, _ in toy_clips("ucf101"):
        for number, (name, (seen, heard)) in enumerate(zip(names, actions), 1):
            video = f"v_{name}_g{first[split] + i // 2:02}_c{i % 2 + 1:02}"
            images = [draw(scene, TOY_SIZE, rng)[0] for scene in moving([seen], rng, 16)]
            hiss = 0.03 * rng.standard_normal(2 * SAMPLE_RATE)
            sound = rng.uniform(0.05, 0.2) * play(heard, 2, rng) + hiss if heard else None
            write_video(root, video, images, sound)
            key, label = ("test", "") if split == "test" else ("train", f" {number}")
            lists.setdefault(key + "list01", []).append(f"{name}/{video}.avi{label}\r")  # as real
    for name, lines in lists.items():
        write_lines(lines, join(root, name + ".txt"))

# ---------------------------------------------------------------- files, whole or not at all
def bar(iterable, text, total=None):
    """A progress bar on a terminal, nothing in a log file."""
    return tqdm(iterable, text, total, leave=False, disable=None, ncols=79)

def write_atomic(path, content):
    """Write bytes under a temporary name, then rename: the file is there whole or not at all."""
    partial = Path(path + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after a full disk, say

def write_lines(lines, path):
    write_atomic(path, ("\n".join(lines) + "\n").encode())
def save_atomic(tensors, path):
    torch.save(tensors, file := io.BytesIO())
    write_atomic(path, file.getvalue())

def load_file(path):
    """torch.load for tensors alone: a file from a stranger cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no weights at {path}; check the path") from None
    except Exception as error:  # what torch raises for a file that is none is not documented
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a checkpoint of tensors ({reason})") from None

# ---------------------------------------------------------------- commands
def survey(dataset, read=False):
    """What is amiss with a split's files, as {kind: [path or line]}: missing, short and odd rate;
    with read=True every clip is read, and there are also corrupt and silent."""
    found = {kind: [] for kind in ("missing", "corrupt", "silent", "short", "odd rate")}
    for i in bar(one_per_sound(dataset), f"check {dataset.split}"):
        images, wav = dataset.files(i)
        if lost := [path for path in (*images, wav) if path and not exists(path)]:
            found["missing"].append(lost[0])
            continue
        try:
            if wav:
                with open_wav(wav) as file:
                    rate, width = file.getframerate(), file.getnchannels() * file.getsampwidth()
                    # What the file holds, whatever its header says.
                    samples = min(file.getnframes(), (os.path.getsize(wav) - 44) // width)
                found["short"] += [wav] * (samples < dataset.seconds * rate)
                found["odd rate"] += [wav] * (rate != SAMPLE_RATE)  # will be resampled
            if read and dataset[i] and dataset.sound(i).abs().max() < 1e-4:  # of full scale
                found["silent"].append(dataset.wav(i))
        except InputError as error:
            if not read:
                raise
            found["corrupt"].append(str(error))
    return found

def one_per_sound(dataset):
    """An item for each sound: the questions of MUSIC-AVQA share their videos."""
    return list({dataset.wav(i): i for i in reversed(range(len(dataset)))}.values())[::-1]

def extract_video(path, out):
    """OUT/video_frames/ID/NNNN.jpg, a frame from the middle of each second, and OUT/raw_audio/
    ID.wav, 16 kHz mono. Returns the ID, which is the file's name without its ending."""
    video = splitext(basename(path))[0]
    frames, wav = video_paths(out, video)
    if exists(wav):  # it comes last: where it is, all is
        return video
    require(shutil.which("ffmpeg"), "no ffmpeg; install it: apt, brew or conda install ffmpeg")
    require(not isdir(frames) or exists(join(frames, "sound.wav")),
            f"{frames} is there without {wav}, and not from here; move it away")
    for folder in (partial := frames + ".partial", frames):  # of a run that was stopped half-way
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (partial, dirname(wav)):
        os.makedirs(folder, exist_ok=True)
    # fps=1 takes the middle of each second (-r 1 would not). Written from within the folder and
    # read by an absolute path, so that no name is taken for an option or a pattern.
    run = subprocess.run(
        ["ffmpeg", "-nostdin", "-v", "error", "-i", os.path.abspath(path),
         "-map", "0:v:0", "-vf", "fps=1", "-q:v", "2", "%04d.jpg",
         "-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE), "-c:a", "pcm_s16le", "sound.wav"],
        cwd=partial, capture_output=True, text=True, errors="replace")
    if run.returncode or not exists(join(partial, "0001.jpg")):
        shutil.rmtree(partial)
        raise InputError(
            f"{path} has no sound, and both streams are wanted" if "'0:a:0'" in run.stderr else
            f"{path} has no pictures" if "'0:v:0'" in run.stderr or not run.stderr else
            f"{path} is no video to ffmpeg: {run.stderr.strip().splitlines()[-1]}")
    os.replace(partial, frames)
    os.replace(join(frames, "sound.wav"), wav)
    return video

def extract(videos, out, jobs):
    """All videos of a folder not done yet, `jobs` at a time. Returns 1 if any failed, else 0."""
    names = sorted(name for name in os.listdir(videos) if not name.startswith("."))
    namesakes = collections.Counter(splitext(name)[0] for name in names)

    def fault(name):  # returned, for an exception would end the others too
        if namesakes[splitext(name)[0]] > 1:
            return f"{name}: another file has the same name; rename one of them"
        try:
            extract_video(join(videos, name), out)
        except InputError as error:
            return str(error)

    with multiprocessing.pool.ThreadPool(jobs) as pool:
        faults = list(filter(None, bar(pool.imap(fault, names), "extract", len(names))))
    print(*faults, f"{len(names) - len(faults)} of {len(names)} videos are in {out}",
          f"Next, with the annotations in place: python data.py check TASK {out}", sep="\n")
    return int(bool(faults))

def check(task, root, size):
    """Reads every clip and prints what there is and what is wrong; returns 1 if training would
    fail, else 0. Silent, short and resampled sounds do no harm but to the score."""
    fails = 0
    for split in ("train", "val", "test"):
        try:
            dataset = DATASETS[task](root, split, size)
            found = survey(dataset, read=True)
            print(f"{split}: {len(dataset)} items, {len(one_per_sound(dataset))} sounds;",
                  ", ".join(f"{kind} {len(paths)}" for kind, paths in found.items()))
            for kind, paths in found.items():
                for path in [*paths[:5], f"and {len(paths) - 5} more"][:len(paths)]:
                    print(f"  {kind}: {path}")
            fails += len(found["missing"]) + len(found["corrupt"])  # the rest does no harm
        except InputError as error:
            print(f"{split}: {error}")
            fails += 1
    print("training would fail: mend what is missing or corrupt" if fails else
          f"all can be read. Next: python train.py {task} --data {root}")
    return int(fails > 0)

def stats(task, root, size):
    """Mean and std of the training spectrograms before normalisation, into root/fbank.json: the
    mean of the seconds' means and the mean of their stds, as the authors measured theirs, but over
    the second's real rows alone (padding is no sound)."""
    dataset = DATASETS[task](root, "train", size)
    raw = (fbank(second, size, 0.0, 0.5) for i in bar(one_per_sound(dataset), "stats")
           if dataset.files(i)[1] for second in dataset.sound(i))
    real = (image[image.abs().sum(1) > 0] for image in raw)
    found = [(rows.mean().item(), rows.std().item()) for rows in real]
    known = {**known_stats(root), str(size): [float(np.mean(column)) for column in zip(*found)]}
    write_lines([json.dumps(known)], join(root, "fbank.json"))
    return known[str(size)]

DATASETS = {"ave": AVE, "avs": AVSBench, "avqa": MusicAVQA, "ucf101": UCF101}

def main():
    text = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**text)
    commands = parser.add_subparsers(dest="command", required=True)
    command = {name: commands.add_parser(name, **text)
               for name in ("extract", "check", "stats", "toy")}
    for name, option in {"check": "--size", "stats": "--size", "toy": "--seed"}.items():
        command[name].add_argument("task", choices=DATASETS)
        command[name].add_argument("root")
        command[name].add_argument(option, type=int, default={"--size": 192}.get(option, 0))
    for name in ("videos", "out"):
        command["extract"].add_argument(name)
    command["extract"].add_argument("--jobs", type=int, default=os.cpu_count())
    args = vars(parser.parse_args())
    name = args.pop("command")
    try:
        done = {"extract": extract, "check": check, "stats": stats, "toy": make_toy}[name](**args)
        if name in ("extract", "check"):
            sys.exit(done)
        if name == "stats":
            print("mean {:.6f}  std {:.6f}  (kept in {root}/fbank.json)".format(*done, **args))
        print("Next: python train.py {task} --data {root}".format(**args))
    except (InputError, OSError) as error:
        sys.exit(print(f"data.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("stopped; the same command goes on from there", file=sys.stderr) or 130)

if __name__ == "__main__":
    main()
