# SPDX-License-Identifier: MIT
"""Data: sound and frames from disk, the data sets' layouts, and toy data in the same layouts.

    python data.py extract VIDEOS DIR   frames and sounds of a folder of videos, by ffmpeg
    python data.py check TASK DIR       read every clip, and say what is missing or damaged
    python data.py stats TASK DIR       mean and std of a data set's spectrograms, kept in DIR
    python data.py toy TASK DIR         write the toy data set (train.py does so by itself)

TASK is ave, avs or avqa. Read in this order: read_wav and read_frame, AVE, AVSBench, MusicAVQA,
then the toy world (what its instruments look and sound like) and the toy data sets made from it,
then the commands.
"""
import argparse, contextlib, csv, io, json, multiprocessing.pool, os, shutil, subprocess, sys, wave

import numpy as np
import torch, torchaudio, torchvision
from tqdm import tqdm

from lavish import AVE_MEAN, AVE_STD, SAMPLE_RATE, InputError, fbank

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
                head = head[:tag] + b"\1\0" + head[tag + 2:]
                return wave.open(io.BytesIO(head + file.read()))
        return wave.open(path)
    except FileNotFoundError:
        raise InputError(f"no sound at {path}") from None
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(f"{path} is not a PCM wav ({str(error) or 'it ends too early'}); convert "
                         f"it: ffmpeg -i IN -ac 1 -ar {SAMPLE_RATE} -c:a pcm_s16le OUT.wav"
                         ) from None

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
        raise InputError(f"{path} is not a readable image ({str(error).splitlines()[0]}); extract "
                         "it again") from None

def read_frame(path, size):
    """(3, size, size) float32, ImageNet-normalised; the aspect is not kept, as released."""
    image = read_image(path)
    # antialias: the torchvision of the released code had none, so a large frame aliased.
    image = torchvision.transforms.functional.resize(image, [size, size], antialias=True)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image / 255 - mean[:, None, None]) / std[:, None, None]

def seconds_of(sound, count):
    """(N,) -> (count, 16000): second t is samples [16000 t, 16000 (t+1)), silence past the end.

    The released code spreads `count` windows evenly, up to 0.1 s early against the labels.
    """
    sound = torch.nn.functional.pad(sound, (0, max(0, count * SAMPLE_RATE - len(sound))))
    return sound[:count * SAMPLE_RATE].view(count, SAMPLE_RATE)

def video_files(root, video):
    """The frames of a video, in the order of their numbers whatever the zero-padding (or the first
    that should be there), and its sound."""
    folder = os.path.join(root, "video_frames", video)
    names = [n for n in os.listdir(folder) if n.endswith(".jpg")] if os.path.isdir(folder) else []
    try:
        names = sorted(names, key=lambda name: int(name[:-4])) or ["0001.jpg"]
    except ValueError:
        raise InputError(f"{folder} holds frames that are not numbered like 0001.jpg") from None
    return ([os.path.join(folder, name) for name in names],
            os.path.join(root, "raw_audio", video + ".wav"))

def read_lines(path):
    """The stripped, non-empty lines of a text file."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
        if lines:
            return lines
    raise InputError(f"no {path}, or nothing in it; the README says what a data folder holds")

def known_stats(root):
    """{"192": [mean, std], ...}, by the size of the spectrogram image."""
    path = os.path.join(root, "fbank.json")
    return json.loads(read_lines(path)[0]) if os.path.exists(path) else {}

def read_clip(paths, seconds, size, stats):
    """T paths of frames, sound (T,16000) -> frames (T,3,S,S), spectrograms (T,S,S)."""
    return (torch.stack([read_frame(path, size) for path in paths]),
            torch.stack([fbank(second, size, *stats) for second in seconds]))

def survey(dataset, read=False):
    """What is amiss with a split's files, as {kind: [path or line]}: missing, short and odd rate;
    with read=True every clip is read, and there are also corrupt and silent."""
    found = {kind: [] for kind in ("missing", "corrupt", "silent", "short", "odd rate")}
    for i in bar(one_per_sound(dataset), f"check {dataset.split}"):
        images, wav = dataset.files(i)
        if lost := [path for path in (*images, wav) if not os.path.exists(path)]:
            found["missing"].append(lost[0])
            continue
        try:
            with open_wav(wav) as file:
                rate, width = file.getframerate(), file.getnchannels() * file.getsampwidth()
                # What the file holds, whatever its header says.
                samples = min(file.getnframes(), (os.path.getsize(wav) - 44) // width)
            found["short"] += [wav] * (samples < dataset.seconds * rate)
            found["odd rate"] += [wav] * (rate != SAMPLE_RATE)
            if read and dataset[i] and dataset.sound(i).abs().max() < 1e-4:
                found["silent"].append(wav)
        except InputError as error:
            if not read:
                raise
            found["corrupt"].append(str(error))
    return found

def one_per_sound(dataset):
    """An item for each sound: the questions of MUSIC-AVQA share their videos."""
    return list({dataset.files(i)[1]: i for i in reversed(range(len(dataset)))}.values())[::-1]

class Clips(torch.utils.data.Dataset):
    """What the three data sets share; files(i) are the pictures and the sound of an item."""
    kept = None  # all items, with --cache

    def __init__(self, root, split, size):
        self.root, self.split, self.size = root, split, size
        if not os.path.isdir(root):
            raise InputError(f"no data folder {root}; make one: data.py toy {self.task} {root}")
        # Mean and std of the spectrograms: what `data.py stats` left here, or AVE's.
        self.stats = known_stats(root).get(str(size), [AVE_MEAN, AVE_STD])

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.kept[i] if self.kept else self.read(i)

    def files(self, i):
        return video_files(self.root, self.clips[i][0])

    def sound(self, i):
        return seconds_of(read_wav(self.files(i)[1]), self.seconds)            # (T,16000)

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
    """

    task, fact, seconds, remedy = "ave", "classes", 10, EXTRACT

    def __init__(self, root, split, size):
        super().__init__(root, split, size)
        rows = read_lines(os.path.join(root, "Annotations.txt"))
        rows = rows[rows[0].startswith("Category&"):]  # the zip's copy has a header, others none
        self.classes = list(dict.fromkeys(row.split("&")[0] for row in rows))
        self.clips = []  # (video id, category index, start, end)
        path = os.path.join(root, f"{split}Set.txt")
        for number, line in enumerate(read_lines(path), 1):
            try:
                category, video, _, start, end = line.split("&")
                self.clips.append((video, self.classes.index(category), int(start), int(end)))
            except ValueError:
                raise InputError(f"{path}, line {number}: {line!r} is not Category&VideoID&Quality&"
                                 "Start&End with a category of Annotations.txt") from None

    def labels(self, i):
        _, category, start, end = self.clips[i]
        t = torch.arange(self.seconds)
        return torch.where((start <= t) & (t < end), category, len(self.classes))

    def read(self, i):
        paths, _ = self.files(i)
        # The frame in the middle of each second. Released: linspace from the first to the last,
        # which at 3 frames a second comes to the same seconds.
        at = [paths[(2 * t + 1) * len(paths) // 20] for t in range(self.seconds)]
        return *read_clip(at, self.sound(i), self.size, self.stats), self.labels(i)

# ---------------------------------------------------------------- AVSBench S4
class AVSBench(Clips):
    """AVSBench S4 (Zhou et al., ECCV 2022): five seconds, and masks of the one thing that sounds.

        root/s4_meta_data.csv                columns name, ..., category, split
        root/s4_data/visual_frames/SPLIT/CATEGORY/NAME/NAME_{1..5}.png
        root/s4_data/gt_masks/SPLIT/CATEGORY/NAME/NAME_1.png in train, NAME_{1..5}.png in val, test
        root/s4_data/audio_wav/SPLIT/CATEGORY/NAME.wav

    item: frames (5,3,S,S), spectrograms (5,S,S), masks (1 in train, else 5, mask_size, mask_size)
    of 0 and 1. mask_size is that of the files (224). An empty mask is legal.
    """

    task, fact, seconds, remedy = "avs", "mask_size", 5, "they come with AVSBench-object"

    def __init__(self, root, split, size):
        super().__init__(root, split, size)
        path = os.path.join(root, "s4_meta_data.csv")
        rows = list(csv.reader(read_lines(path)))
        names, columns = ("name", "category", "split"), (0, 2, 3)  # where the names do not tell
        if set(names) <= set(rows[0]):
            columns = [rows[0].index(name) for name in names]
        if min(map(len, rows)) <= max(columns):
            raise InputError(f"{path} has rows without name, category and split")
        rows = [[row[column] for column in columns] for row in rows]  # a header is of no split
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

    def read(self, i):
        paths, _ = self.files(i)
        masks = torch.stack([self.read_mask(path) for path in paths[self.seconds:]])
        return *read_clip(paths[:self.seconds], self.sound(i), self.size, self.stats), masks

    def read_mask(self, path):
        """Stored as {0, 1}, {0, 255} or grey (above half counts), in one channel or more. The
        released loader's convert("1") turns a {0, 1} file all black and dithers a grey one."""
        mask = read_image(path).amax(0)
        if mask.shape != (self.mask_size, self.mask_size):
            raise InputError(f"{path} is {mask.shape[1]} x {mask.shape[0]}, not {self.mask_size} x "
                             f"{self.mask_size} as the first mask; make the masks of one size")
        return (mask > (0 if mask.max() == 1 else 127)).float()

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
    question, to which the others are padded (14 in the real data). A checkpoint keeps it.
    """

    task, fact, seconds, remedy = "avqa", "vocabulary", 1, EXTRACT

    def __init__(self, root, split, size, vocabulary=None, moments=10):
        super().__init__(root, split, size)
        self.moments = moments
        self.questions = read_questions(os.path.join(root, f"avqa-{split}.json"))
        self.vocabulary = vocabulary or make_vocabulary(
            read_questions(os.path.join(root, "avqa-train.json")))
        for q in self.questions:
            try:
                q["indices"] = encode(q["words"], self.vocabulary)
                if q["answer"] not in self.vocabulary["answers"]:
                    raise InputError(f"{q['answer']!r} is in no training answer")
            except InputError as error:
                raise InputError(f"question {q['id']} of {split}: {error}") from None
        self.clips = [(q["video"],) for q in self.questions]
        self.videos = list(dict.fromkeys(q["video"] for q in self.questions))
        if split == "train" and len(self.videos) < 2:
            raise InputError(f"{root}: foreign frames need a second video in avqa-train.json")

    def sound(self, i):
        sound = read_wav(self.files(i)[1])
        seconds = max(1, -(-len(sound) // SAMPLE_RATE))
        return seconds_of(sound, seconds)[moments(seconds, self.moments)]      # (T,16000)

    def read(self, i):
        q, (paths, _) = self.questions[i], self.files(i)
        at = [paths[k] for k in moments(len(paths), self.moments)]
        item = (*read_clip(at, self.sound(i), self.size, self.stats), q["indices"],
                torch.tensor(self.vocabulary["answers"].index(q["answer"])))
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

def moments(length, count):
    """The indices of `count` seconds that lie evenly over a video of `length`."""
    return np.linspace(0, length - 1, count).round().astype(int)

def encode(words, vocabulary):
    """Words as indices (W,), padded; InputError for a word that no training question has."""
    unknown = [word for word in words if word not in vocabulary["words"]]
    if unknown or len(words) > vocabulary["length"]:
        raise InputError(f"{(unknown or words)[-1]!r} is in no training question, or the question "
                         f"has over {vocabulary['length']} words; known: "
                         + " ".join(vocabulary["words"][1:]))
    question = torch.zeros(vocabulary["length"], dtype=torch.long)
    question[:len(words)] = torch.tensor([vocabulary["words"].index(word) for word in words])
    return question

def make_vocabulary(questions):
    return {"words": ["<pad>", *dict.fromkeys(w for q in questions for w in q["words"])],
            "answers": list(dict.fromkeys(q["answer"] for q in questions)),
            "length": max(len(q["words"]) for q in questions)}

# ---------------------------------------------------------------- the toy world
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
# Six instruments, each with a look and a timbre (see play).
INSTRUMENTS = {name: (shape, colour) for name, shape, colour in zip(
    ("bell", "flute", "drum", "horn", "bird", "rattle"), SHAPES,
    ("red", "green", "blue", "yellow", "magenta", "cyan"))}

def play(name, seconds, rng):
    """One instrument for some seconds, (seconds * 16000,) float64 with unit RMS; pitch is drawn."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
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

    One of 36 kinds of things (a shape in a colour) or 24 of texture (stripes of 8 directions and 3
    widths), for spectrograms are texture. -> (count,3,size,size) uint8, labels (count,) in 0..59
    """
    images, labels, grid = [], rng.integers(0, 60, count), np.arange(size)
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

def write_video(root, video, images, sound):
    """A toy video as files, extracted already: (T,3,S,S) uint8 images, (N,) sound."""
    folder = os.path.join(root, "video_frames", video)
    os.makedirs(folder)
    os.makedirs(os.path.join(root, "raw_audio"), exist_ok=True)
    for t, image in enumerate(images):
        torchvision.io.write_jpeg(image, os.path.join(folder, f"{t + 1:04d}.jpg"), 95)
    write_wav(sound, os.path.join(root, "raw_audio", video + ".wav"))

def write_wav(sound, path):
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())

def bar(iterable, text, total=None):
    """A progress bar on a terminal, nothing in a log file."""
    return tqdm(iterable, text, total, leave=False, disable=None, ncols=79)

def write_atomic(path, content):
    """Write bytes under a temporary name, then rename: the file is there whole or not at all."""
    try:
        with open(path + ".partial", "wb") as file:
            file.write(content)
        os.replace(path + ".partial", path)
    except OSError:  # a full disk, say: no debris
        with contextlib.suppress(OSError):
            os.remove(path + ".partial")
        raise

def write_lines(lines, path):
    write_atomic(path, ("\n".join(lines) + "\n").encode())
def save_atomic(tensors, path):
    file = io.BytesIO()
    torch.save(tensors, file)
    write_atomic(path, file.getvalue())

def make_toy(task, root, seed=0):
    """Write the toy data set of a task, complete or not at all."""
    if os.path.exists(root):
        raise InputError(f"{root} is there already; remove it or choose another folder")
    shutil.rmtree(partial := root.rstrip("/") + ".partial", ignore_errors=True)
    os.makedirs(partial)
    {"ave": toy_ave, "avs": toy_avs, "avqa": toy_avqa}[task](partial, np.random.default_rng(seed))
    stats(task, partial, TOY_SIZE)
    write_lines([json.dumps({"task": task, "seed": seed})], os.path.join(partial, "toy.json"))
    os.replace(partial, root)

TOY_SIZE = 48  # pixels a side: what the nano backbone takes
TOY_CLIPS = {"ave": {"train": 240, "val": 60, "test": 120},
             "avs": {"train": 480, "val": 60, "test": 80},
             "avqa": {"train": 380, "val": 60, "test": 120}}  # videos

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
    Sight alone sees a bell in seconds 0 and 2-6 and 8 and cannot tell which of them sound.
    """
    names, rows = list(INSTRUMENTS), {"train": [], "val": [], "test": []}
    for split, count in TOY_CLIPS["ave"].items():
        for i in bar(range(count), f"toy ave {split}"):
            name, other = (names[k] for k in rng.permutation(len(names))[:2])
            length = rng.integers(3, 8)
            start = rng.integers(0, 11 - length)
            # One id in four begins with a dash, as on YouTube.
            video = f"{'-' if rng.uniform() < 0.25 else ''}{split}{i:04d}"
            images, sound = [], []
            for t in range(10):
                seen, heard = (name, name) if start <= t < start + length else (
                    (name, None), (None, name), (name, other), (other, name))[rng.integers(4)]
                images.append(draw([place(seen, rng)] if seen else [], TOY_SIZE, rng)[0])
                second = 0.03 * rng.standard_normal(SAMPLE_RATE)
                if heard:
                    second = second + rng.uniform(0.03, 0.2) * play(heard, 1, rng)
                sound.append(second)
            write_video(root, video, images, np.concatenate(sound))
            rows[split].append(f"{name}&{video}&good&{start}&{start + length}")
    write_lines(["Category&VideoID&Quality&StartTime&EndTime", *sum(rows.values(), [])],
                os.path.join(root, "Annotations.txt"))
    for split, lines in rows.items():
        write_lines(lines, os.path.join(root, f"{split}Set.txt"))

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
    write_lines(rows, os.path.join(root, "s4_meta_data.csv"))

def toy_avqa(root, rng):
    """The MUSIC-AVQA layout. A video of 3 to 6 seconds shows one instrument or two, and lets one be
    heard, or two in turn. In every second video one of them is both seen and heard.

    Worked example: a bell and a drum are seen, a drum and a horn are heard. "How many instruments
    are sounding?" two. "Is the yellow one sounding?" no: the horn is heard, but it is not there.
    "Which instrument in the video is sounding?" drum, which neither eye nor ear can tell alone.
    No question asks who came first or stands left: the published head cannot know.
    """
    names, questions = list(INSTRUMENTS), {split: [] for split in TOY_CLIPS["avqa"]}
    number, (a, v, av) = ("zero", "one", "two"), ("Audio", "Visual", "Audio-Visual")
    for split, count in TOY_CLIPS["avqa"].items():
        for i in bar(range(count), f"toy avqa {split}"):
            video, seconds = f"{'-' if i % 4 == 0 else ''}{split}{i:04d}", rng.integers(3, 7)
            drawn, both = [names[k] for k in rng.permutation(6)], i % 2  # how many are both
            n_seen, n_heard = rng.integers(1, 3, 2)
            seen, heard = drawn[:n_seen], drawn[n_seen - both:][:n_heard]
            images = [draw(scene, TOY_SIZE, rng)[0] for scene in moving(seen, rng, seconds)]
            sound = np.concatenate([
                rng.uniform(0.05, 0.2) * play(heard[k * n_heard // seconds], 1, rng)
                for k in range(seconds)])
            write_video(root, video, images, sound + 0.03 * rng.standard_normal(len(sound)))
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
        write_lines([json.dumps(rows, indent=1)], os.path.join(root, f"avqa-{split}.json"))

# ---------------------------------------------------------------- commands
def extract_video(path, out):
    """OUT/video_frames/ID/NNNN.jpg, a frame from the middle of each second, and OUT/raw_audio/
    ID.wav, 16 kHz mono. Returns the ID, which is the file's name without its ending."""
    video = os.path.splitext(os.path.basename(path))[0]
    frames, wav = os.path.join(out, "video_frames", video), video_files(out, video)[1]
    if os.path.exists(wav):  # it comes last: where it is, all is
        return video
    if not shutil.which("ffmpeg"):
        raise InputError("no ffmpeg found; install it: apt, brew or conda install ffmpeg")
    if os.path.isdir(frames) and not os.path.exists(wav + ".partial"):
        raise InputError(f"{frames} is there without {wav}, and not from here; move it away")
    for folder in (partial := frames + ".partial", frames):  # of a run that was stopped half-way
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (partial, os.path.dirname(wav)):
        os.makedirs(folder, exist_ok=True)
    # fps=1 takes the middle of each second (-r 1 would not). Written from within the folder and
    # read by an absolute path, so that no name is taken for an option or a pattern.
    run = subprocess.run(
        ["ffmpeg", "-nostdin", "-v", "error", "-i", os.path.abspath(path),
         "-map", "0:v:0", "-vf", "fps=1", "-q:v", "2", "%04d.jpg",
         "-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE), "-c:a", "pcm_s16le", "sound.wav"],
        cwd=partial, capture_output=True, text=True, errors="replace")
    if run.returncode or not os.path.exists(os.path.join(partial, "0001.jpg")):
        shutil.rmtree(partial)
        raise InputError(
            f"{path} has no sound, and both streams are wanted" if "'0:a:0'" in run.stderr else
            f"{path} has no pictures" if "'0:v:0'" in run.stderr or not run.stderr else
            f"{path} is no video to ffmpeg: {run.stderr.strip().splitlines()[-1]}")
    os.replace(os.path.join(partial, "sound.wav"), wav + ".partial")
    os.replace(partial, frames)
    os.replace(wav + ".partial", wav)
    return video

def extract(videos, out, jobs):
    """All videos of a folder, `jobs` at a time, but for those that are done. Returns 1 if any
    failed, 0 otherwise."""
    names = [name for name in sorted(os.listdir(videos)) if not name.startswith(".")]
    ids = [os.path.splitext(name)[0] for name in names]

    def one(name):  # an exception would end the others too
        try:
            if ids.count(os.path.splitext(name)[0]) > 1:
                raise InputError(f"{name}: another file has the same name; rename one of them")
            extract_video(os.path.join(videos, name), out)
        except InputError as error:
            return str(error)

    with multiprocessing.pool.ThreadPool(jobs) as pool:
        faults = list(filter(None, bar(pool.imap(one, names), "extract", len(ids))))
    print(*faults, f"{len(ids) - len(faults)} of {len(ids)} videos are in {out}",
          f"Next, with the annotations in place: python data.py check TASK {out}", sep="\n")
    return int(bool(faults))

def check(task, root, size):
    """Reads every clip; prints what there is, and what is wrong; returns 1 if training would fail,
    0 otherwise. Silent, short and resampled sounds do no harm but to the score."""
    fails = 0
    for split in ("train", "val", "test"):
        try:
            found = survey(dataset := DATASETS[task](root, split, size), read=True)
        except InputError as error:
            print(f"{split}: {error}")
            fails += 1
            continue
        print(f"{split}: {len(dataset)} items, {len(one_per_sound(dataset))} sounds;",
              ", ".join(f"{kind} {len(paths)}" for kind, paths in found.items()))
        for kind, paths in found.items():
            for path in [*paths[:5], f"and {len(paths) - 5} more"][:len(paths)]:
                print(f"  {kind}: {path}")
        fails += len(found["missing"]) + len(found["corrupt"])
    print("training would fail: mend what is missing or corrupt" if fails else
          f"all can be read. Next: python train.py {task} --data {root}")
    return int(fails > 0)

def stats(task, root, size):
    """Mean and std of the training spectrograms before normalisation, into root/fbank.json: the
    mean of the seconds' means and the mean of their stds, as the authors measured theirs, but over
    the second's real rows alone (padding is no sound)."""
    dataset = DATASETS[task](root, "train", size)
    means, stds = [], []
    for i in bar(one_per_sound(dataset), "stats"):
        for image in (fbank(second, size, 0.0, 0.5) for second in dataset.sound(i)):  # raw
            image = image[image.abs().sum(1) > 0]
            means.append(image.mean().item())
            stds.append(image.std().item())
    known = {**known_stats(root), str(size): [float(np.mean(means)), float(np.mean(stds))]}
    write_lines([json.dumps(known)], os.path.join(root, "fbank.json"))
    return known[str(size)]

DATASETS = {"ave": AVE, "avs": AVSBench, "avqa": MusicAVQA}

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = {name: commands.add_parser(name) for name in ("extract", "check", "stats", "toy")}
    for name in ("check", "stats", "toy"):
        command[name].add_argument("task", choices=DATASETS)
        command[name].add_argument("root", help="the data set's folder")
    for name in ("check", "stats"):
        command[name].add_argument("--size", type=int, default=192, help="side of the images")
    command["toy"].add_argument("--seed", type=int, default=0)
    command["extract"].add_argument("videos", help="a folder of anything that ffmpeg reads")
    command["extract"].add_argument("out", help="gets video_frames/ID/NNNN.jpg, raw_audio/ID.wav")
    command["extract"].add_argument("--jobs", type=int, default=os.cpu_count())
    args, code = parser.parse_args(), 0
    try:
        if args.command == "extract":
            code = extract(args.videos, args.out, args.jobs)
        elif args.command == "check":
            code = check(args.task, args.root, args.size)
        else:
            if args.command == "toy":
                make_toy(args.task, args.root, args.seed)
            else:
                mean, std = stats(args.task, args.root, args.size)
                print(f"mean {mean:.6f}  std {std:.6f}  (kept in {args.root}/fbank.json)")
            print(f"Next: python train.py {args.task} --data {args.root}")
    except (InputError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        code = 130
    sys.exit(code)

if __name__ == "__main__":
    main()
